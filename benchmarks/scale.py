"""How TACA's cost grows: with image and text tokens, batch, blocks and heads.

Measured on the attention call and on FLUX-shaped blocks, with the model that explains it. For a
batch of B, D blocks of width h, N tokens of which T are text:

    plain   = D (a B N h^2 + b B N^2 h)           the linear layers, and attention
    extra   = D (c B T h + d B N h + e)           text keys; K's copy and joined outputs; two calls

a to e are fitted to all points, each weighted by its own spread, and the same numbers are then
compared with each point: whether batch and blocks leave the ratio as it is, the points say and not
the model. What is not affordable is left out: attention over very many tokens is measured with
fewer heads, in few rounds, and a whole step over so many is the model's word alone.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import attention as blocks
import numpy as np
import timing
import torch
from reporting import markdown, subplots
from scipy.optimize import nnls

HEAD, HEADS = 128, 24  # FLUX's
TEXT = (77, 256, 512, 1024, 4096)
BASE = {"image": 1024, "text": 512, "batch": 1, "depth": 1, "heads": HEADS}
AXES = dict(zip(BASE, ("image tokens", "text tokens", "batch", "blocks", "heads"), strict=True))
NAMES, KINDS = ["plain", "plain again", "inside"], ("call", "step")


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
            point["heads"] = max(1, min(HEADS, 64 * affordable**2 // tokens**2))
    return [point for i, point in enumerate(whole) if point not in whole[:i]]


def measure(
    point: dict[str, int], rounds: int, affordable: int, device: torch.device, dtype: str
) -> dict[str, Any]:
    """One point: a call, and a step where there are all heads."""
    image, text, batch, depth, heads = (point[key] for key in BASE)
    with_step = heads == HEADS and (image + text) * batch * depth <= affordable
    shape = blocks.Shape(heads * HEAD, heads, text, rope=True)
    case = blocks.Case(shape, image, batch, device, dtype, depth if with_step else 0)
    label = ", ".join(f"{key} {value}" for key, value in point.items())
    # Twice as many for a call; one to three where even that takes long.
    far, found = (image + text) / affordable, {**point, "peak_mib": {}}
    often = {"call": 2 * rounds if far <= 1.2 else 3 if far <= 5 else 1, "step": rounds}
    for kind in KINDS if with_step else KINDS[:1]:
        found[kind], peaks = case.measure(kind, NAMES, often[kind], label)
        found["peak_mib"][kind] = peaks
    return found


def terms(point: dict[str, Any], kind: str) -> tuple[list[float], list[float]]:
    """What a, b and what c, d, e are multiplied by, for a point."""
    h = float(point["heads"] * HEAD)
    n, text, batch = point["image"] + point["text"], point["text"], point["batch"]
    depth = point["depth"] if kind == "step" else 1
    linear = n * h * h if kind == "step" else 0.0
    plain = [depth * batch * x for x in (linear, n * n * h)]
    return plain, [depth * x for x in (batch * text * h, batch * n * h, 1.0)]


def solve(columns: list[list[float]], y: list[float], error: list[float]) -> np.ndarray:
    """Weighted least squares with no constant below zero: values and standard errors."""
    weights = 1 / np.array(error)
    matrix, right = np.array(columns) * weights[:, None], np.array(y) * weights
    scale = np.linalg.norm(matrix, axis=0).clip(1e-300)  # with no steps a has no column
    values, rest = nnls(matrix / scale, right)
    kept, spread = values > 0, np.zeros_like(values)
    # Larger where the points scatter more than their spread explains.
    excess = max(1.0, rest / max(1, len(y) - kept.sum()) ** 0.5)
    normal = np.linalg.pinv(matrix[:, kept] / scale[kept])
    spread[kept] = excess * np.linalg.norm(normal, axis=1)
    return np.array([values, spread]) / scale


def fit(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The constants in seconds, with standard errors, and how far each point is from them."""
    plain, extra = [], []
    for row in rows:
        for kind in ("call", "step"):
            if kind not in row or row[kind]["plain"]["rounds"] < 2:
                continue
            (first, second), times = terms(row, kind), row[kind]
            # A spread can be small by chance where rounds are few: plain against plain's at least,
            # and of the plain time itself 3 %, for the machine's slow drift.
            again, median = times["plain again"]["extra_error_s"], times["plain"]["median_s"]
            plain.append((first, median, max(again, 0.03 * median, 1e-7)))
            error = max(times["inside"]["extra_error_s"], again, 1e-7)
            extra.append((second, times["inside"]["extra_s"], error))
    found = [solve(*map(list, zip(*part, strict=True))) for part in (plain, extra)]
    values, spread = np.concatenate(found, axis=1).tolist()
    off = [abs(y - np.dot(values[2:], own)) <= 2 * error for own, y, error in extra]
    return {
        "constants": dict(zip("abcde", values, strict=True)),
        "errors": dict(zip("abcde", spread, strict=True)),
        "within_two_errors": [int(sum(off)), len(off)],
    }


def predicted(fitted: dict[str, Any], point: dict[str, Any], kind: str) -> float:
    """The model's ratio of a call, or a step, inside the window to a plain one."""
    a, b, *rest = fitted["constants"].values()
    plain, extra = terms(point, kind)
    return float(1 + np.dot(rest, extra) / np.dot((a, b), plain))


# Reporting


def plot(report: dict[str, Any], results: timing.Results) -> None:
    """Ratio over each of ``AXES``, and the model's lines."""
    figure, axes = subplots(1, len(BASE), 4, 4, sharey=True)
    for axis, (key, label) in zip(axes.flat, AXES.items(), strict=True):
        base = BASE | ({"image": 256} if key == "depth" else {})
        free = {key, "heads"} if key == "image" else {key}  # over many tokens with fewer heads
        rows = [
            row for row in report["points"] if all(row[k] == base[k] for k in BASE.keys() - free)
        ]
        rows.sort(key=lambda row: row[key])
        axis.set_visible(bool(rows))
        if not rows:
            continue
        for kind, colour in (("call", "C0"), ("step", "C1")):
            some = [row for row in rows if kind in row]
            if some:
                places, inside = [row[key] for row in some], [row[kind]["inside"] for row in some]
                timing.errorbar(axis, places, inside, "y", color=colour, label=kind)
            if report["fit"] and len(rows) > 1:
                fine = np.geomspace(rows[0][key], 65536 if key == "image" else rows[-1][key], 50)
                line = [predicted(report["fit"], base | {key: each}, kind) for each in fine]
                axis.plot(fine, line, color=colour, ls="--", label=f"{kind}, by the model")
        peaks = [row["peak_mib"]["call"] for row in rows]
        memory = [each["inside"] / each["plain"] for each in peaks]
        axis.plot([row[key] for row in rows], memory, "s:", c="0.6", label="call, peak memory")
        axis.axhline(1, color="black", lw=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xlabel(label)
    axes[0, 0].legend(fontsize=7, frameon=False)
    results.save(figure, timing.said(report["environment"]))


def table(report: dict[str, Any]) -> str:
    """All points beside what the model says."""
    fitted, rows = report["fit"], []
    for row in report["points"]:
        cells = [row[key] for key in BASE] + [timing.cell(row["call"]["plain again"])]
        for kind in KINDS:
            cells.append(timing.cell(row[kind]["inside"]) if kind in row else "")
            cells.append(f"{predicted(fitted, row, kind):.3f}" if fitted else "")
            cells.append(timing.peak_cell(row["peak_mib"].get(kind, {}), "inside"))
        rows.append(cells)
    head = ["image", "text", "batch", "blocks", "heads", "call, plain again"]
    head += [f"{kind}{what}" for kind in KINDS for what in ("", " by the model", ", peak MiB")]
    text = markdown(head, rows)
    if not fitted:
        return text
    errors, (inside, of) = fitted["errors"], fitted["within_two_errors"]
    said = (f"{k} = {value:.3g} ± {errors[k]:.1g}" for k, value in fitted["constants"].items())
    return (
        f"{text}\n\nConstants in seconds: {', '.join(said)}. Within two standard errors of what "
        f"the model says is the extra time of {inside} of {of} measurements. A step where none is "
        f"given is extrapolated."
    )


@torch.inference_mode()
def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add, tokens = parser.add_argument, "tokens of a step, blocks and batch included"
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--most", type=int, default=65536, help="image tokens, of an attention")
    tokens += "; of an attention with all heads: 70000 on a GPU, 4608 on a CPU"
    add("--affordable", type=int, help=tokens)
    options = timing.parse(parser, "30 on a GPU, 5 on a CPU")
    device = torch.device(options.device)
    usual = (70000, 30, "bfloat16") if device.type == "cuda" else (4608, 5, "float32")
    affordable, rounds, dtype = options.affordable or usual[0], options.rounds or usual[1], usual[2]
    environment = timing.environment(device, options.clock) | {"dtype": dtype}
    report: dict[str, Any] = {"environment": environment, "points": [], "fit": {}}
    results = timing.Results("scale", options.out, device)
    for point in points(options.most, affordable):
        row = measure(point, rounds, affordable, device, dtype)
        report["points"].append(row)
        ratios = [f"{kind} {timing.cell(row[kind]['inside'])}" for kind in KINDS if kind in row]
        print(json.dumps(point), *ratios, flush=True)
        results.add("scale", report)
    report["fit"] = fit(report["points"])
    results.add("scale", report)
    results.report("How the cost grows", table)
    plot(report, results)


if __name__ == "__main__":
    main()
