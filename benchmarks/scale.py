"""How TACA's cost grows: with image and text tokens, batch, blocks and heads.

Measured on the attention call and on FLUX-shaped blocks, with the model that explains it. For a
batch of B, D blocks of width h, N tokens of which T are text:

    plain   = D (a B N h^2 + b B N^2 h)           the linear layers, and attention
    extra   = D (c B T h + d B N h + e)           text keys to and fro; joined outputs; two calls

a to e are fitted to all points, each weighted by its own spread, and the same numbers are then
compared with each point: whether batch and blocks leave the ratio as it is, the points say and not
the model. What is not affordable is left out: attention over very many tokens is measured with
fewer heads, in few rounds, and a whole step over so many is the model's word alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import attention as blocks
import timing
import torch
from torch import Tensor

SHAPE = blocks.SHAPES["flux"]
HEAD = SHAPE.hidden // SHAPE.heads
TEXT = (77, 256, 512, 1024, 4096)
BASE = {"image": 1024, "text": 512, "batch": 1, "depth": 1, "heads": SHAPE.heads}
NAMES = ["plain", "plain again", "inside"]


class Block:
    """FLUX-shaped blocks at some number of tokens, and one attention among them."""

    def __init__(self, point: dict[str, int], weights: blocks.Block,
                 device: torch.device) -> None:  # fmt: skip
        text, image, batch, heads = (point[key] for key in ("text", "image", "batch", "heads"))
        options = {"device": device, "dtype": next(weights.parameters()).dtype}
        torch.manual_seed(0)
        self.qkv = [torch.randn(batch, heads, text + image, HEAD, **options) for _ in range(3)]
        self.inputs = [torch.randn(batch, n, SHAPE.hidden, **options) for n in (text, image)]
        self.vector = torch.randn(batch, SHAPE.hidden, **options)
        angles = torch.randn(text + image, HEAD // 2, device=device)
        self.rope = torch.stack([angles.cos(), angles.sin()])
        self.weights, self.depth, self.device = weights, point["depth"], device
        self.methods = {
            method: partial(attend, mask=None)
            for method, attend in blocks.methods(text, image, device).items()
        }

    def call(self, method: str) -> Tensor:
        """The attention alone."""
        return self.methods[method](*self.qkv)

    def step(self, method: str) -> list[Tensor]:
        """The whole block, as often as there are blocks."""
        tokens = self.inputs
        for _ in range(self.depth):
            tokens = self.weights(*tokens, self.vector, self.rope, self.methods[method])
        return list(tokens)


def points(most: int, affordable: int) -> list[dict[str, int]]:
    """Image tokens, text tokens, batch, blocks and heads: each varied while the others stay.

    Parameters
    ----------
    most : int
        Image tokens of an attention.
    affordable : int
        Tokens of an attention with all heads, or of a step.
    """
    found = [{"image": n} for n in (256, 1024, 4096, 16384, 65536) if n <= most]
    found += [{"text": text} for text in TEXT]
    found += [{"batch": batch} for batch in (2, 4)]
    found += [{"image": 256, "depth": depth} for depth in (2, 4, 8) if 768 * depth <= affordable]
    found += [{"heads": heads} for heads in (1, 4)]
    whole = [BASE | each for each in found]
    for point in whole:
        tokens = point["image"] + point["text"]
        if tokens > 1.2 * affordable:
            point["heads"] = max(1, min(SHAPE.heads, 64 * affordable**2 // tokens**2))
    return [point for i, point in enumerate(whole) if point not in whole[:i]]


def rounds_of(point: dict[str, int], rounds: int, affordable: int) -> int:
    """Twice as many for a call; one to three where even that takes long."""
    ratio = (point["image"] + point["text"]) / affordable
    return 2 * rounds if ratio <= 1.2 else 3 if ratio <= 5 else 1


def measure(point: dict[str, int], weights: blocks.Block, rounds: int, affordable: int,
            device: torch.device) -> dict[str, Any]:  # fmt: skip
    """One point: a call, and a step where there are all heads."""
    block = Block(point, weights, device)
    label = ", ".join(f"{key} {value}" for key, value in point.items())

    def timed(function: Callable[[str], Any], count: int) -> Any:
        return timing.interleaved(
            lambda method: timing.seconds(partial(function, method), device),
            NAMES, count, label, warm_up=count > 1,
        )  # fmt: skip

    found = {**point, "call": timed(block.call, rounds_of(point, rounds, affordable))}
    kinds = {"call": block.call}
    tokens = (point["image"] + point["text"]) * point["batch"] * point["depth"]
    if point["heads"] == SHAPE.heads and tokens <= affordable:
        found["step"] = timed(block.step, rounds)
        kinds["step"] = block.step
    found["peak_mib"] = {
        kind: {m: timing.peak_mib(partial(function, m), device) for m in ("plain", "inside")}
        for kind, function in kinds.items()
    }
    return found


# The model


def terms(point: dict[str, Any], kind: str) -> tuple[list[float], list[float]]:
    """What a, b and what c, d, e are multiplied by, for a point."""
    h = float(point["heads"] * HEAD)
    n, text, batch = point["image"] + point["text"], point["text"], point["batch"]
    depth = point["depth"] if kind == "step" else 1
    linear = n * h * h if kind == "step" else 0.0
    plain = [depth * batch * x for x in (linear, n * n * h)]
    return plain, [depth * x for x in (batch * text * h, batch * n * h, 1.0)]


def error_of(row: dict[str, Any], again: dict[str, Any] | None = None) -> float:
    """Standard error of a median, from the 10-90 % range; at least that of plain against plain.

    A spread can be small by chance where rounds are few.
    """

    def one(each: dict[str, Any]) -> float:
        return 1.25 * (each["extra_p90_s"] - each["extra_p10_s"]) / 2.56 / each["rounds"] ** 0.5

    return max(one(row), one(again) if again else 0.0, 1e-7)


def solve(columns: list[list[float]], y: list[float],
          error: list[float]) -> tuple[list[float], list[float]]:  # fmt: skip
    """Weighted least squares with no constant below zero: values and standard errors."""
    matrix = torch.tensor(columns).double() / torch.tensor(error).double()[:, None]
    right = torch.tensor(y).double() / torch.tensor(error).double()
    kept = list(range(matrix.shape[1]))
    while True:
        scale = matrix[:, kept].norm(dim=0)
        normal = torch.linalg.pinv(matrix[:, kept] / scale)
        values = normal @ right / scale
        if not len(kept) or values.min() >= 0:
            break
        kept.pop(int(values.argmin()))
    # Larger where the points scatter more than their spread explains.
    rest = right - matrix[:, kept] @ values
    excess = max(1.0, (rest.square().sum() / max(1, len(y) - len(kept))).item() ** 0.5)
    spread = excess * normal.norm(dim=1) / scale
    found = {k: (values[i].item(), spread[i].item()) for i, k in enumerate(kept)}
    return tuple(map(list, zip(*(found.get(k, (0.0, 0.0)) for k in range(matrix.shape[1])),
                               strict=True)))  # type: ignore[return-value]  # fmt: skip


def fit(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The constants in seconds, with standard errors, and how far each point is from them."""
    plain, extra = [], []
    for row in rows:
        for kind in ("call", "step"):
            if kind not in row or row[kind]["plain"]["rounds"] < 2:
                continue
            times, own = row[kind], terms(row, kind)
            # Of the plain time itself the machine's slow drift is the error: 3 % at least.
            error = max(error_of(times["plain again"]), 0.03 * times["plain"]["median_s"])
            plain.append((own[0], times["plain"]["median_s"], error))
            extra.append((own[1], times["inside"]["extra_s"],
                          error_of(times["inside"], times["plain again"])))  # fmt: skip
    (a, b), plain_errors = solve(*map(list, zip(*plain, strict=True)))
    (c, d, e), extra_errors = solve(*map(list, zip(*extra, strict=True)))
    constants = dict(zip("abcde", (a, b, c, d, e), strict=True))
    errors = dict(zip("abcde", (*plain_errors, *extra_errors), strict=True))
    within = sum(
        abs(y - sum(constants[k] * x for k, x in zip("cde", own, strict=True))) <= 2 * error
        for own, y, error in extra
    )
    return {"constants": constants, "errors": errors,
            "within_two_errors": [within, len(extra)]}  # fmt: skip


def predicted(constants: dict[str, float], point: dict[str, Any], kind: str) -> float:
    """The model's ratio of a call, or a step, inside the window to a plain one."""
    plain, extra = terms(point, kind)
    first = sum(constants[k] * x for k, x in zip("ab", plain, strict=True))
    return 1 + sum(constants[k] * x for k, x in zip("cde", extra, strict=True)) / first


# Reporting

AXES = {"image": "image tokens", "text": "text tokens", "batch": "batch", "depth": "blocks",
        "heads": "heads"}  # fmt: skip


def series(rows: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """The points where ``key`` alone varies; of many image tokens those of fewer heads too."""
    fixed = BASE | ({"image": 256} if key == "depth" else {})
    free = {key, "heads"} if key == "image" else {key}
    found = [row for row in rows if all(row[k] == fixed[k] for k in fixed if k not in free)]
    if key == "image":
        found = [row for row in found if row["heads"] == SHAPE.heads or row["image"] > 4096]
    return sorted(found, key=lambda row: row[key])


def plot(report: dict[str, Any], file: timing.Path) -> None:
    """Ratio over each of ``AXES``, and the model's lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(AXES), figsize=(3.9 * len(AXES), 3.8), sharey=True)
    colours = {"call": "#61a5c2", "step": "#013a63"}
    for axis, (key, label) in zip(axes, AXES.items(), strict=True):
        rows = series(report["points"], key)
        axis.set_visible(bool(rows))
        if not rows:
            continue
        for kind, colour in colours.items():
            some = [row for row in rows if kind in row]
            inside = [row[kind]["inside"] for row in some]
            spread = [[each["ratio"] - each["ratio_p10"] for each in inside],
                      [each["ratio_p90"] - each["ratio"] for each in inside]]  # fmt: skip
            if inside:
                axis.errorbar([row[key] for row in some], [each["ratio"] for each in inside],
                              spread, color=colour, marker="o", ls="", capsize=2,
                              label=f"{kind}, measured")  # fmt: skip
            if report["fit"] and (inside or kind == "call") and len(rows) > 1:
                ends = [rows[0][key], 65536 if key == "image" else rows[-1][key]]
                fine = torch.logspace(*torch.tensor(ends).double().log2().tolist(), 50, 2).tolist()
                base = BASE | ({"image": 256} if key == "depth" else {})
                line = [predicted(report["fit"]["constants"], base | {key: each}, kind)
                        for each in fine]  # fmt: skip
                axis.plot(fine, line, color=colour, lw=0.9, ls="--", label=f"{kind}, by the model")
        memory = [row["peak_mib"]["call"]["inside"] / row["peak_mib"]["call"]["plain"]
                  for row in rows]  # fmt: skip
        axis.plot([row[key] for row in rows], memory, color="#999999", marker="s", ms=4, ls=":",
                  label="call, peak memory")  # fmt: skip
        axis.axhline(1, color="black", lw=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xlabel(label)
    axes[0].set_ylabel("inside / plain (median, 10–90 %)")
    axes[0].legend(fontsize=7, frameon=False)
    figure.suptitle(timing.said(report["environment"]), fontsize=10)
    figure.tight_layout()
    figure.savefig(file, dpi=90)


def table(report: dict[str, Any]) -> str:
    """All points beside what the model says."""
    lines = [
        "| image | text | batch | blocks | heads | call | plain again | by the model | step | "
        "by the model | call, peak MiB | step, peak MiB |", "|---|" + "---|" * 11,
    ]  # fmt: skip
    constants = report["fit"].get("constants")
    for row in report["points"]:
        cells = [str(row[key]) for key in AXES]
        for kind in ("call", "step"):
            cells.append(timing.cell(row[kind]["inside"]) if kind in row else "")
            if kind == "call":
                cells.append(timing.cell(row[kind]["plain again"]))
            cells.append(f"{predicted(constants, row, kind):.3f}" if constants else "")
        for kind in ("call", "step"):
            peaks = row["peak_mib"].get(kind)
            cells.append(f"{peaks['inside']:.0f} ({peaks['inside'] / peaks['plain']:.3f}×)"
                         if peaks else "")  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    if constants:
        fitted = report["fit"]
        said = ", ".join(f"{k} = {constants[k]:.3g} ± {fitted['errors'][k]:.1g}" for k in constants)
        inside, of = fitted["within_two_errors"]
        lines += ["", f"Constants in seconds: {said}. Within two standard errors of what the model "
                  f"says is the extra time of {inside} of {of} measurements. A step where none is "
                  "given is extrapolated."]  # fmt: skip
    return "\n".join(lines)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--most", type=int, default=65536, help="image tokens, of an attention")
    parser.add_argument("--affordable", type=int,
                        help="tokens of a step, blocks and batch included; of an attention with "
                        "all heads: 70000 on a GPU, 4608 on a CPU")  # fmt: skip
    parser.add_argument("--rounds", type=int, help="30 on a GPU, 5 on a CPU")
    parser.add_argument("--clock", choices=timing.CLOCKS, default="wall")
    parser.add_argument("--out", type=timing.Path, default=timing.RESULTS, help="folder")
    options = parser.parse_args()
    timing.set_clock(options.clock)
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    affordable = options.affordable or (70000 if on_gpu else 4608)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    with device:
        weights = blocks.Block(SHAPE).to(dtype)
    environment = timing.environment(device, options.clock) | {"dtype": timing.short(dtype)}
    report: dict[str, Any] = {"environment": environment, "points": [], "fit": {}}
    results = timing.Results("scale", options.out, device)
    for point in points(options.most, affordable):
        rounds = options.rounds or (30 if on_gpu else 5)
        row = measure(point, weights, rounds, affordable, device)
        report["points"].append(row)
        ratios = (f"{kind} {timing.cell(row[kind]['inside'])}" for kind in ("call", "step")
                  if kind in row)  # fmt: skip
        print(json.dumps(point), *ratios, flush=True)
        results.add("scale", report)
    report["fit"] = fit(report["points"])
    results.add("scale", report)
    plot(report, results.file.with_suffix(".png"))
    text = f"# How the cost grows\n\n{timing.said(environment)}\n\n{table(report)}\n"
    results.write(text)


if __name__ == "__main__":
    main()
