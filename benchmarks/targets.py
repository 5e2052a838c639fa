"""What was aimed at, what was measured, how far that is and why; memory, the host, what was tried.

``python dev.py run benchmarks/targets.py`` after the others; it reads their results and writes
these tables between the marks of ``README.md``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import attention
import timing

README = timing.RESULTS.parent / "README.md"
NO_GPU = "not measured: no GPU was at hand"

TWO_CALLS = (
    "two attention calls for one, text keys to and fro, and joined outputs: see what was tried"
)
REASONS = {
    "step": f"{TWO_CALLS}; the more, the larger attention's share of a step",
    "call": TWO_CALLS,
    "memory": "the LoRA's own tensors and products; without one, the text keys' copy",
    "picture": "three times a thirtieth of a step's ratio",
    "lora": "the LoRA's own products, and the host's work for each of its layers",
    "host": "Python wraps, calls and puts back 57 blocks' forwards; with a LoRA 304 layers' more",
}


@dataclass
class Row:
    """One measurement beside its target.

    Parameters
    ----------
    target, case : str
        What was aimed at, and of what it was measured.
    limit : float
        At most.
    found : list of float
        10 %, 50 % and 90 %; empty where nothing was measured.
    plain : list of float
        The same of plain against plain.
    reason : str
        Key of ``REASONS``.
    digits : int
        Of the numbers.
    """

    target: str
    case: str
    limit: float
    found: list[float]
    plain: list[float]
    reason: str
    digits: int = 3

    def cells(self) -> list[str]:
        limit = f"{self.limit:g}{'×' if self.digits else ' µs'}"
        if not self.found:
            return [self.target, self.case, limit, NO_GPU, "", "", ""]
        distance = self.found[1] - self.limit
        verdict = "met" if distance <= 0 else f"missed by {distance:.{self.digits}f}"
        if distance > 0 and self.plain and self.plain[2] >= self.found[1]:
            verdict += ", within plain's own spread"
        return [
            self.target, self.case, limit, self.said(self.found), self.said(self.plain), verdict,
            REASONS[self.reason] if distance > 0 else "",
        ]  # fmt: skip

    def said(self, values: list[float]) -> str:
        """A median and its spread."""
        if not values:
            return ""
        low, middle, high = (f"{value:.{self.digits}f}" for value in values)
        return f"{middle} ({low} to {high})"


def read(kind: str) -> dict[str, dict[str, Any]]:
    """All cases of one script, of all machines."""
    found = {}
    for file in sorted(timing.RESULTS.glob(f"{kind}-*.json")):
        held = json.loads(file.read_text())
        if held.get("schema") == timing.SCHEMA:
            found |= held["cases"]
    return found


def of(row: dict[str, Any]) -> list[float]:
    """A ratio and its spread."""
    return [row[key] for key in ("ratio_p10", "ratio", "ratio_p90")]


def rows() -> Iterator[Row]:
    """Every target, on every case that was measured."""
    models = read("model")
    gpu = {name: case for name, case in models.items() if case["environment"]["device"] == "cuda"}
    cpu = {name: case for name, case in models.items() if name not in gpu}

    def steps(cases: dict[str, Any], compiled: bool) -> Iterator[tuple[str, dict[str, Any]]]:
        yield from ((name, c["step"]) for name, c in cases.items() if c["compiled"] == compiled)

    wanted = {
        name: case for name, case in gpu.items()
        if (case["model"], case["size"], case["dtype"]) == ("flux", 1024, "bfloat16")
    }  # fmt: skip
    label = "step inside the window, GPU"
    if not wanted:
        yield Row(label, "FLUX.1 at 1024², bfloat16", 1.01, [], [], "step")
    for compiled in (False, True):
        kind = ", compiled" * compiled
        for name, step in steps(wanted, compiled):
            yield Row(label + kind, name, 1.01, of(step["inside"]), of(step["plain again"]), "step")
        for name, step in steps(cpu, compiled):
            yield Row(f"step inside the window, CPU{kind}", name, 1.02, of(step["inside"]),
                      of(step["plain again"]), "step")  # fmt: skip
    for name, case in read("attention").items():
        if "call" in case:
            yield Row("attention call alone", name, 1.05, of(case["call"]["inside"]),
                      of(case["call"]["plain again"]), "call")  # fmt: skip
    for name, case in models.items():
        peak = case["peak_mib"]
        if "inside" in peak:
            yield Row("peak memory", name, 1.01, [peak["inside"] / peak["plain"]] * 3, [], "memory")
    for name, case in models.items():
        step = case["step"]
        yield Row("30-step picture", name, 1.002, timing.picture(step["inside"]),
                  timing.picture(step["plain again"]), "picture", 4)  # fmt: skip
    for name, case in models.items():
        if "lora 64" in case["step"]:
            yield Row("step inside with a LoRA r = 64", name, 1.10, of(case["step"]["lora 64"]),
                      of(case["step"]["plain again"]), "lora")  # fmt: skip
    for name, case in read("host").items():
        for key, what in (("inside", "57 blocks"), ("inside lora", "and a LoRA on 304 layers")):
            row, plain = case["rows"][key], case["rows"]["plain again"]
            yield Row("host's overhead a call", f"{what} ({name})", 200,
                      [row[k] for k in ("p10", "us", "p90")],
                      [plain[k] for k in ("p10", "us", "p90")], "host", 0)  # fmt: skip


def table() -> str:
    """All targets as Markdown."""
    head = ["target", "case", "at most", "measured", "plain against plain", "", "why"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [f"| {' | '.join(row.cells())} |" for row in rows()]
    outside = ["operations outside the window", "FLUX.1, SD3.5-Medium, without and with a LoRA",
               "0 more", "0 more, by `tests/test_performance.py`", "", "met", ""]  # fmt: skip
    lines.append(f"| {' | '.join(outside)} |")
    return "\n".join(lines)


def memory() -> str:
    """Peak memory of a step as Markdown."""
    names = {
        "plain": "plain", "inside": "TACA", "lora 16": "and a LoRA, r = 16", "lora 64": "r = 64",
        "two full": "two full attentions", "dense": "dense matrix",
    }  # fmt: skip
    lines = [
        f"| peak MiB of a step | {' | '.join(names.values())} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for name, case in read("model").items():
        peak = case["peak_mib"]
        cells = [f"{peak[key]:.1f}" if key in peak else "" for key in names]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tried() -> str:
    """Ways to scale the text keys as Markdown: a column for each case."""
    cases = read("tried")
    heads = [attention.heading(case) for case in cases.values()]
    lines = [f"| one attention call | {' | '.join(heads)} |", "|---" * (len(cases) + 1) + "|"]
    for name, label in attention.TRIED.items():
        cells = [timing.cell(case["call"][name]) for case in cases.values() if name != "plain"]
        if cells:
            lines.append(f"| {label} | {' | '.join(cells)} |")
    environments = {timing.said(case["environment"]) for case in cases.values()}
    return "\n".join([*lines, "", *sorted(environments)])


def host() -> str:
    """The host's work as Markdown: a column for each result, in microseconds a call."""
    cases = read("host")
    lines = [f"| µs a call | {' | '.join(cases)} |", "|---" * (len(cases) + 1) + "|"]
    for key, row in next(iter(cases.values()), {"rows": {}})["rows"].items():
        found = [case["rows"][key] for case in cases.values()]
        cells = [f"{each['us']:.0f} ({each['low']:.0f} to {each['high']:.0f})" for each in found]
        lines.append(f"| {row['label']} | {' | '.join(cells)} |")
    notes = [
        f"{name}: {case['calls']} calls of each kind in each of {case['rounds']} rounds, beside "
        f"the plain call's {case['plain_ms']} ms; medians and their 95 % intervals. "
        f"`torch.compiler.disable` made and called for {case['blocks']} blocks: "
        f"{case['disable_us']:.0f}. {timing.said(case['environment'])}."
        for name, case in cases.items()
    ]  # fmt: skip
    return "\n".join([*lines, *(f"\n{note}" for note in notes)])


def write(readme: str, name: str, text: str) -> str:
    """The README with this text between the marks of that name.

    Raises
    ------
    SystemExit
        If it has no such marks.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    before, first, rest = readme.partition(begin)
    _, last, after = rest.partition(end)
    if not (first and last):
        raise SystemExit(f"{README.name} has no marks {begin.strip()} and {end.strip()}.")
    return f"{before}{begin}\n{text}\n\n{end}{after}"


def main() -> None:
    readme = README.read_text(encoding="utf-8")
    parts = {"targets": f"{table()}\n\n{memory()}", "tried": tried(), "host": host()}
    for name, text in parts.items():
        print(f"\n{text}")
        readme = write(readme, name, text)
    README.write_text(readme, encoding="utf-8")


if __name__ == "__main__":
    main()
