"""What was aimed at, what was measured, how far that is and why; memory, the host, what was tried.

``python dev.py run benchmarks/targets.py`` after the others; it reads their results and writes
these tables between the marks of ``README.md``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import timing
from reporting import markdown, write_between

README = timing.RESULTS.parent / "README.md"
NO_GPU = "not measured: no GPU was at hand"
TWO_CALLS = "two attention calls for one, scaled text keys, and joined outputs: see what was tried"
STEP = f"{TWO_CALLS}; the more, the larger attention's share of a step"
MEMORY = "the LoRA's own tensors and products; without one, the copy of K"
PICTURE = "three times a thirtieth of a step's ratio"
LORA = "the LoRA's own products, and the host's work for each of its layers"
WORDS = "a mask of one row, and with a negative weight a copy of V"
HOST = "Python wraps, calls and puts back 57 blocks' forwards; with a LoRA 304 layers' more"


def read(kind: str) -> dict[str, dict[str, Any]]:
    """All cases of one script, of all machines."""
    files = sorted(timing.RESULTS.glob(f"{kind}-*.json"))
    return {name: case for file in files for name, case in timing.read(file).items()}


def row(target: str, case: str, limit: float, spreads: Any, why: str, digits: int = 3) -> list[str]:
    """A measurement beside its target; its spread, and that of plain against plain."""
    found, plain = spreads
    distance = found[1] - limit
    verdict = "met" if distance <= 0 else f"missed by {distance:.{digits}f}"
    if distance > 0 and plain and plain[2] >= found[1]:
        verdict += ", within plain's own spread"
    said = [timing.ranged(each, digits, " to ") if each else "" for each in (found, plain)]
    unit = "×" if digits else " µs"
    return [target, case, f"{limit:g}{unit}", *said, verdict, why if distance > 0 else ""]


def rows() -> Iterator[list[str]]:
    """Every target, on every case that was measured."""
    models, gpu, cpu = read("model"), "step inside the window, GPU", "step inside the window, CPU"

    def of(name: str, where: dict[str, Any]) -> tuple[list[float], list[float]]:
        plain = where.get("plain again")
        return timing.ratios(where[name]), timing.ratios(plain) if plain else []

    asked = ("cuda", "flux", 1024, "bfloat16")
    steps = []
    for name, case in models.items():
        device, compiled = case["environment"]["device"], ", compiled" * case["compiled"]
        if (device, case["model"], case["size"], case["dtype"]) == asked:
            steps.append(row(gpu + compiled, name, 1.01, of("inside", case["step"]), STEP))
        elif device == "cpu":
            steps.append(row(cpu + compiled, name, 1.02, of("inside", case["step"]), STEP))
    if not any(step[0].startswith(gpu) for step in steps):
        yield [gpu, "FLUX.1 at 1024², bfloat16", "1.01×", NO_GPU, "", "", ""]
    yield from steps
    for name, case in read("attention").items():
        if "call" in case:
            found = of("inside", case["call"])
            yield row("attention call alone", name, 1.05, found, TWO_CALLS)
    for name, case in models.items():
        peak = case["peak_mib"]
        if "inside" in peak:
            found = [peak["inside"] / peak["plain"]] * 3
            yield row("peak memory", name, 1.01, (found, []), MEMORY)
    for name, case in models.items():
        pair = [timing.picture(case["step"][key]) for key in ("inside", "plain again")]
        yield row("30-step picture", name, 1.002, pair, PICTURE, 4)
    for name, case in models.items():
        if "lora 64" in case["step"]:
            found = of("lora 64", case["step"])
            yield row("step inside with a LoRA r = 64", name, 1.10, found, LORA)
    for name, case in read("words-cost").items():
        for key, weight in (("word", "1.5"), ("negative word", "-1")):
            yield row(f"step with a word at {weight}", name, 1.05, of(key, case["step"]), WORDS)
            found = [case["peak_mib"][key] / case["peak_mib"]["plain"]] * 3
            yield row(f"its peak memory at {weight}", name, 1.02, (found, []), WORDS)
    for name, case in read("host").items():
        us = {key: [each[k] for k in ("p10", "us", "p90")] for key, each in case["rows"].items()}
        parts = ("inside", "57 blocks", 1000), ("inside lora", "and a LoRA on 304 layers", 1500)
        for key, what, limit in parts:
            label, pair = f"{what} ({name})", (us[key], us["plain again"])
            yield row("host's overhead a call", label, limit, pair, HOST, 0)
    counted = "0 more, by `tests/core/test_performance.py`"
    what = "FLUX.1, SD3.5-Medium, without and with a LoRA"
    yield ["operations outside the window", what, "0 more", counted, "", "met", ""]


def table() -> str:
    """All targets as Markdown."""
    head = ["target", "case", "at most", "measured", "plain against plain", "", "why"]
    return markdown(head, rows())


def memory() -> str:
    """Peak memory of a step as Markdown."""
    names = {"plain": "plain", "inside": "TACA", "lora 16": "and a LoRA, r = 16"}
    names |= {"lora 64": "r = 64", "two full": "two full attentions", "dense": "dense matrix"}
    found = [
        [
            name,
            *(f"{case['peak_mib'][key]:.1f}" if key in case["peak_mib"] else "" for key in names),
        ]
        for name, case in read("model").items()
    ]
    return markdown(["peak MiB of a step", *names.values()], found)


def quoted(kind: str) -> str:
    """What a script wrote as Markdown, of all machines; its headings in bold."""
    files = sorted(timing.RESULTS.glob(f"{kind}-*.md"))
    texts = [file.read_text("utf-8").partition("\n")[2].strip() for file in files]
    return re.sub("^## (.+)$", r"**\1**", "\n\n".join(texts), flags=re.MULTILINE)


def main() -> None:
    parts = {"targets": f"{table()}\n\n{memory()}", "tried": quoted("tried")}
    parts["host"] = quoted("host")
    for name, text in parts.items():
        print(f"\n{text}")
        write_between(README, name, f"\n{text}\n\n")


if __name__ == "__main__":
    main()
