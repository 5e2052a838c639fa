"""How TACA's cost grows with tokens, text and batch: the attention call and a FLUX-shaped block.

With the model that explains it. Of a block of width h, N tokens of which T are text:

    plain   = a N h^2 + b N^2 h          the linear layers, and attention
    extra   = c T h + d N h + e          text keys to and fro; the joined outputs; one call more

so that the ratio falls with the tokens, and blocks and batch do not change it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import attention as blocks
import torch
from torch import Tensor

SHAPE = blocks.SHAPES["flux"]
TEXT = (77, 256, 512, 1024, 4096)


class Block:
    """One FLUX-shaped block, or several, at some number of tokens."""

    def __init__(self, text: int, image: int, batch: int, depth: int, weights: blocks.Block,
                 device: torch.device) -> None:  # fmt: skip
        dtype, width = next(weights.parameters()).dtype, SHAPE.hidden
        options = {"device": device, "dtype": dtype}
        torch.manual_seed(0)
        joint = (batch, SHAPE.heads, text + image, width // SHAPE.heads)
        self.qkv = [torch.randn(joint, **options) for _ in range(3)]
        self.inputs = [torch.randn(batch, n, width, **options) for n in (text, image)]
        self.vector = torch.randn(batch, width, **options)
        angles = torch.randn(text + image, width // SHAPE.heads // 2, device=device)
        self.rope = torch.stack([angles.cos(), angles.sin()])
        self.weights, self.depth = weights, depth
        self.methods = blocks.methods(text, image, device)

    def call(self, method: str) -> Tensor:
        """The attention alone."""
        return self.methods[method](*self.qkv)

    def step(self, method: str) -> list[Tensor]:
        """The whole block, as often as there are blocks."""
        tokens = self.inputs
        for _ in range(self.depth):
            tokens = self.weights(*tokens, self.vector, self.rope, self.methods[method])
        return list(tokens)


def cases(largest: int) -> list[dict[str, int]]:
    """Image tokens, text tokens, batch and blocks: each varied while the others stay."""
    image = [256 * 4**i for i in range(5) if 256 * 4**i <= largest]
    found = [{"image": n, "text": 512} for n in image]
    found += [{"image": 1024, "text": text} for text in TEXT if text <= max(512, largest)]
    found += [{"image": 1024, "text": 512, "batch": batch} for batch in (2, 4)]
    found += [{"image": 256, "text": 512, "depth": depth} for depth in (2, 4, 8)]
    filled = [{"batch": 1, "depth": 1} | case for case in found]
    return [case for i, case in enumerate(filled) if case not in filled[:i]]


def fit(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The model's constants, in seconds per unit, by least squares on relative errors."""
    h = float(SHAPE.hidden)
    one = [row for row in rows if row["batch"] == row["depth"] == 1]
    n = torch.tensor([float(row["image"] + row["text"]) for row in one])
    text = torch.tensor([float(row["text"]) for row in one])

    def solve(columns: list[Tensor], y: Tensor) -> list[float]:
        weight = 1 / y.abs().clamp_min(1e-9)
        scale = torch.stack([column.mean() for column in columns])
        matrix = torch.stack(columns, 1) / scale * weight[:, None]
        solution = torch.linalg.lstsq(matrix.double(), (y * weight).double()[:, None]).solution
        return (solution[:, 0] / scale).tolist()

    plain = torch.tensor([row["step"]["plain"]["median_s"] for row in one])
    extra = torch.tensor([row["call_extra_s"] for row in one])
    a, b = solve([n * h * h, n * n * h], plain)
    c, d, e = solve([text * h, n * h, torch.ones_like(n)], extra)
    return {"a": a, "b": b, "c": c, "d": d, "e": e}


def predicted(constants: dict[str, float], image: float, text: float) -> float:
    """The model's ratio of a step inside the window to a plain one."""
    h, n = SHAPE.hidden, image + text
    plain = constants["a"] * n * h * h + constants["b"] * n * n * h
    return 1 + (constants["c"] * text * h + constants["d"] * n * h + constants["e"]) / plain


def measure(case: dict[str, int], weights: blocks.Block, rounds: int,
            device: torch.device) -> dict[str, Any]:  # fmt: skip
    """One point."""
    block, names = Block(**case, weights=weights, device=device), ["plain", "plain again", "inside"]
    label = ", ".join(f"{key} {value}" for key, value in case.items())

    def timed(function: Callable[[str], Any], count: int) -> Any:
        return blocks.interleaved(function, names, count, device, label)

    call, step = timed(block.call, 2 * rounds), timed(block.step, rounds)
    peaks = {m: blocks.peak_mib(partial(block.step, m), device) for m in ("plain", "inside")}
    extra = call["plain"]["median_s"] * (call["inside"]["ratio"] - 1)
    return {**case, "call": call, "step": step, "call_extra_s": extra, "peak_mib": peaks}


def plot(report: dict[str, Any], file: Path) -> None:
    """Ratio over image tokens, text tokens, batch and blocks; the model's line with the first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(16, 3.8), sharey=True)
    axis_of = {"image": ("text", 512), "text": ("image", 1024), "batch": None, "depth": None}
    base = {"image": 1024, "text": 512, "batch": 1, "depth": 1}
    for axis, key in zip(axes, axis_of, strict=True):
        fixed = base | ({"image": 256} if key == "depth" else {})
        rows = sorted(
            (row for row in report["points"]
             if all(row[other] == fixed[other] for other in fixed if other != key)),
            key=lambda row: row[key],
        )  # fmt: skip
        x = [row[key] for row in rows]
        for kind, colour in (("call", "#a9d6e5"), ("step", "#2a6f97")):
            inside = [row[kind]["inside"] for row in rows]
            ratio = [each["ratio"] for each in inside]
            spread = [[each["ratio"] - each["ratio_p10"] for each in inside],
                      [each["ratio_p90"] - each["ratio"] for each in inside]]  # fmt: skip
            axis.errorbar(x, ratio, spread, color=colour, marker="o", capsize=2, label=kind)
        memory = [row["peak_mib"]["inside"] / row["peak_mib"]["plain"] for row in rows]
        axis.plot(x, memory, color="#999999", marker="s", ls=":", label="peak memory of a step")
        if key in ("image", "text") and report["constants"]:
            fine = torch.logspace(8, 16 if key == "image" else 12, 50, 2).tolist()
            line = [predicted(report["constants"], **{**{"image": 1024, "text": 512}, key: each})
                    for each in fine]  # fmt: skip
            axis.plot(fine, line, color="#2a6f97", lw=0.8, ls="--", label="step, by the model")
        axis.axhline(1, color="black", lw=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xlabel({"image": "image tokens (512 text)", "text": "text tokens (1024 image)",
                         "batch": "batch", "depth": "blocks"}[key])  # fmt: skip
    axes[0].set_ylabel("inside / plain (median, 10–90 %)")
    axes[0].legend(fontsize=8, frameon=False)
    machine, dtype = (report["environment"][key] for key in ("machine", "dtype"))
    figure.suptitle(f"{machine}, {dtype}")
    figure.tight_layout()
    figure.savefig(file, dpi=100)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--largest", type=int, help="image tokens: 65536 on a GPU, 4096 on a CPU")
    parser.add_argument("--rounds", type=int, help="30 on a GPU, 5 on a CPU")
    parser.add_argument("--clock", choices=blocks.CLOCKS, default="wall")
    parser.add_argument("--out", type=Path, default=blocks.HERE / "results", help="folder")
    options = parser.parse_args()
    blocks.set_clock(options.clock)
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    with device:
        weights = blocks.Block(SHAPE).to(dtype)
    environment = blocks.environment(device, options.clock) | {"dtype": blocks.short(dtype)}
    report: dict[str, Any] = {"environment": environment, "points": [], "constants": {}}
    file = options.out / f"scale-{blocks.slug_of(device)}.json"
    for case in cases(options.largest or (65536 if on_gpu else 4096)):
        point = measure(case, weights, options.rounds or (30 if on_gpu else 5), device)
        report["points"].append(point)
        ratios = (f"{k} {point[k]['inside']['ratio']:.3f} (plain again "
                  f"{point[k]['plain again']['ratio']:.3f})" for k in ("call", "step"))  # fmt: skip
        print(case, *ratios, {k: round(v) for k, v in point["peak_mib"].items()}, flush=True)
        file.write_text(json.dumps(report, indent=1) + "\n")
    if len(report["points"]) > 5:
        report["constants"] = fit(report["points"])
    file.write_text(json.dumps(report, indent=1) + "\n")
    plot(report, file.with_suffix(".png"))
    print(f"Saved {file}")


if __name__ == "__main__":
    main()
