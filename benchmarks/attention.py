"""What TACA costs: one step of a FLUX- and of an SD3.5-shaped block, and the paper's own ways.

Pure torch, random weights, one block: all blocks of a model cost alike, so its ratios are those of
a model whose steps are spent in such blocks. ``README.md`` says how to read the result.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import re
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

HERE = Path(__file__).resolve().parent
GAMMA = 1.2
STEPS, STEPS_INSIDE = 30, 3
SLOW_ROUNDS = 3
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

METHODS = {
    "plain": "plain",
    "plain again": "plain, again",
    "outside": "TACA, outside the window",
    "inside": "TACA, inside the window",
    "two full": "paper: two full attentions",
    "flex compiled": "paper: flex, compiled",
    "flex": "paper: flex, uncompiled",
    "dense": "paper: dense matrix",
}
PLAIN = ("plain", "plain again", "outside")
SLOW = ("flex", "dense")


def load_pack() -> Any:
    """Import the pack's ``taca.attention`` by its path, without ComfyUI or ``sys.path``."""
    folder = HERE.parent / "taca"
    spec = importlib.util.spec_from_file_location(
        "taca", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules["taca"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["taca"])
    return importlib.import_module("taca.attention")


# Blocks


@dataclass(frozen=True)
class Shape:
    """A joint transformer block; text comes first in the joint sequence.

    Parameters
    ----------
    hidden, heads, text : int
        Width, heads and text tokens.
    rope : bool
        Whether queries and keys are rotated.
    attn2 : bool
        Whether a second attention is among the image tokens alone.
    """

    hidden: int
    heads: int
    text: int
    rope: bool = False
    attn2: bool = False


SHAPES = {
    "flux": Shape(hidden=3072, heads=24, text=512, rope=True),
    "sd35-medium": Shape(hidden=1536, heads=24, text=333, attn2=True),
}


class Attend(nn.Module):
    """The projections around one attention."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.q_norm = nn.RMSNorm(hidden // heads, eps=1e-6)
        self.k_norm = nn.RMSNorm(hidden // heads, eps=1e-6)
        self.out = nn.Linear(hidden, hidden)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as ``(B, heads, N, D)``."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.q_norm(q), self.k_norm(k), v


class Stream(nn.Module):
    """One kind of token's weights: modulation, attention and MLP."""

    def __init__(self, hidden: int, heads: int, attn2: bool = False) -> None:
        super().__init__()
        self.attn = Attend(hidden, heads)
        self.attn2 = Attend(hidden, heads) if attn2 else None
        self.modulation = nn.Linear(hidden, (9 if attn2 else 6) * hidden)
        self.mlp = nn.Sequential(
            nn.Linear(hidden, 4 * hidden), nn.GELU("tanh"), nn.Linear(4 * hidden, hidden)
        )

    def modulate(self, vector: Tensor) -> tuple[Tensor, ...]:
        """(shift, scale, gate) for attention, MLP and, where there is one, attn2."""
        parts = 9 if self.attn2 else 6
        return self.modulation(F.silu(vector)).unsqueeze(1).chunk(parts, -1)

    def finish(
        self, x: Tensor, attended: Tensor, attended2: Tensor | None, mod: tuple[Tensor, ...]
    ) -> Tensor:
        """Do what follows the attention."""
        attended_x = x + mod[2] * self.attn.out(attended)
        if self.attn2 is not None:
            attended_x = attended_x + mod[8] * self.attn2.out(attended2)
        return attended_x + mod[5] * self.mlp(_norm(attended_x, mod[3], mod[4]))


class Block(nn.Module):
    """A joint block of two streams. Its joint attention is an argument of the call."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.text = Stream(shape.hidden, shape.heads)
        self.image = Stream(shape.hidden, shape.heads, shape.attn2)

    def forward(
        self, text: Tensor, image: Tensor, vector: Tensor, rope: Tensor | None, joint: Attention
    ) -> tuple[Tensor, Tensor]:
        """Text and image tokens after the block."""
        text_mod, image_mod = self.text.modulate(vector), self.image.modulate(vector)
        text_qkv = self.text.attn.project(_norm(text, *text_mod[:2]))
        image_qkv = self.image.attn.project(_norm(image, *image_mod[:2]))
        q, k, v = (torch.cat(pair, 2) for pair in zip(text_qkv, image_qkv, strict=True))
        if rope is not None:
            q, k = _rotate(q, rope), _rotate(k, rope)
        text_out, image_out = joint(q, k, v).split([text.shape[1], image.shape[1]], 1)
        image_out2 = None
        if self.image.attn2 is not None:
            image_out2 = plain(*self.image.attn2.project(_norm(image, *image_mod[6:8])))
        return (
            self.text.finish(text, text_out, None, text_mod),
            self.image.finish(image, image_out, image_out2, image_mod),
        )


def _norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def _rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn x's pairs by the angles whose (cos, sin) is ``rope``, in float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x)


# Methods


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Plain attention as ComfyUI's backends return it: ``(B, N, heads * D)``."""
    return _merge(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def _merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def methods(text: int, image: int, device: torch.device) -> dict[str, Attention]:
    """Every method of ``METHODS`` as ``(q, k, v) -> output``, for these numbers of tokens."""
    pack = load_pack()
    gamma = torch.full((1,), GAMMA, device=device)
    tokens = (pack.Span("text", text), pack.Span("image", image))

    def inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return pack.temperature_adjusted_attention(plain, q, k, v, gamma, tokens, out_dim=1)

    def two_full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scaled = k.clone()
        scaled[:, :, :text] *= gamma
        return torch.cat([plain(q, k, v)[:, :text], plain(q, scaled, v)[:, text:]], 1)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        logits[:, :, text:, :text] *= gamma
        return _merge(logits.softmax(-1) @ v)

    def score(logit: Tensor, _b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.where((query >= text) & (key < text), logit * gamma[0], logit)

    def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _merge(flex_attention(q, k, v, score_mod=score))

    compiled = torch.compile(flex_attention, dynamic=False)

    def flex_compiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _merge(compiled(q, k, v, score_mod=score))

    return {
        **dict.fromkeys(PLAIN, plain),
        "inside": inside,
        "two full": two_full,
        "flex compiled": flex_compiled,
        "flex": flex,
        "dense": dense,
    }


def reference(q: Tensor, k: Tensor, v: Tensor, text: int, gamma: float) -> Tensor:
    """Eq. 10 in float64, head by head."""
    heads = []
    for one_q, one_k, one_v in zip(*(x[0].double() for x in (q, k, v)), strict=True):
        logits = one_q @ one_k.T * q.shape[-1] ** -0.5
        logits[text:, :text] *= gamma
        heads.append(logits.softmax(-1) @ one_v)
    return torch.cat(heads, -1)[None]


# Measuring


@dataclass
class Case:
    """What one shape needs: seeded inputs, and the two things that are timed."""

    name: str
    size: int
    device: torch.device
    dtype: torch.dtype

    def __post_init__(self) -> None:
        shape = SHAPES[self.name]
        image = (self.size // 16) ** 2
        torch.manual_seed(0)
        options = {"device": self.device, "dtype": self.dtype}
        head_dim = shape.hidden // shape.heads
        self.text, self.image = shape.text, image
        joint = (1, shape.heads, shape.text + image, head_dim)
        self.qkv = [torch.randn(joint, **options) for _ in range(3)]
        self.inputs = [
            torch.randn(1, shape.text, shape.hidden, **options),
            torch.randn(1, image, shape.hidden, **options),
            torch.randn(1, shape.hidden, **options),
        ]
        self.rope = None
        if shape.rope:
            angles = torch.randn(shape.text + image, head_dim // 2, device=self.device)
            self.rope = torch.stack([angles.cos(), angles.sin()])
        with self.device:
            self.block = Block(shape).to(self.dtype)
        self.methods = methods(shape.text, image, self.device)

    def call(self, method: str) -> Tensor:
        """Call the attention alone."""
        return self.methods[method](*self.qkv)

    def step(self, method: str) -> Any:
        """Run the whole block."""
        return self.block(*self.inputs, self.rope, self.methods[method])

    def errors(self) -> tuple[dict[str, float], dict[str, str]]:
        """Each method's largest difference from float64; the reasons of those that cannot run.

        Raises
        ------
        ValueError
            If a method computes something else.
        """
        # gamma as float32 holds it
        adjusted = reference(*self.qkv, self.text, torch.tensor(GAMMA).item())
        unadjusted = reference(*self.qkv, self.text, 1.0)
        found, skipped = {}, {}
        for name in METHODS:
            try:
                output = self.call(name)
            except Exception as error:
                skipped[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                continue
            right = unadjusted if name in PLAIN else adjusted
            found[name] = (output.double() - right).abs().max().item()
            if not found[name] <= TOLERANCE[self.dtype]:
                raise ValueError(f"{self.name}, {name}: off by {found[name]:.1e}")
        return found, skipped


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""On a CPU that is shared with other work, the process's own time says more: ``--clock cpu``."""
clock = CLOCKS["wall"]


def set_clock(name: str) -> None:
    global clock
    clock = CLOCKS[name]


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """How long one call takes."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        function()  # keeps the GPU busy while the timed call is queued, as in sampling
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    start = clock()
    function()
    return clock() - start


def interleaved(
    function: Callable[[str], Any], names: list[str], rounds: int, device: torch.device, label: str
) -> dict[str, dict[str, float]]:
    """Time every method once per round, in a new order each; the slow ones in the first rounds."""
    times: dict[str, list[float]] = {name: [] for name in names}
    shuffle = torch.Generator().manual_seed(0)
    for name in names:  # warm-up
        seconds(lambda name=name: function(name), device)
    for index in range(rounds):
        print(f"\r{label}: round {index + 1}/{rounds} ", end="", file=sys.stderr, flush=True)
        for i in torch.randperm(len(names), generator=shuffle).tolist():
            name = names[i]
            if name not in SLOW or index < SLOW_ROUNDS:
                times[name].append(seconds(lambda name=name: function(name), device))
    print(file=sys.stderr)
    result = {}
    for name, own in times.items():
        ratios = torch.tensor([a / b for a, b in zip(own, times["plain"], strict=False)])
        low, middle, high = ratios.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
        result[name] = {
            "rounds": len(own),
            "median_s": torch.tensor(own).quantile(0.5).item(),
            "ratio": middle,
            "ratio_p10": low,
            "ratio_p90": high,
        }
    return result


def peak_mib(function: Callable[[], Any], device: torch.device) -> float:
    """Peak memory that one call allocates, above weights and inputs.

    On a CPU from the profiler's record of every allocation, so that it is exact.
    """
    function()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        function()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    used = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        used += event.nbytes()
        peak = max(peak, used)
    return peak / 2**20


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Everything about one shape."""
    errors, skipped = case.errors()
    names = list(errors)
    result: dict[str, Any] = {
        "image_tokens": case.image,
        "text_tokens": case.text,
        "max_abs_error": errors,
        "skipped": skipped,
        "call": interleaved(case.call, names, 3 * rounds, case.device, f"{case.name}, call"),
        "step": interleaved(case.step, names, rounds, case.device, f"{case.name}, step"),
    }
    result["picture_ratio"] = {  # outside the window a step is a plain one, for all ways
        name: (STEPS_INSIDE * row["ratio"] + STEPS - STEPS_INSIDE) / STEPS
        for name, row in result["step"].items()
        if name not in PLAIN
    }
    print(f"{case.name}, memory", file=sys.stderr)
    result["step_peak_mib"] = {
        name: peak_mib(lambda name=name: case.step(name), case.device)
        for name in names
        if name not in PLAIN or name == "plain"
    }
    return result


# Reporting


def machine(device: torch.device) -> str:
    """Name the model of GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found.group(1) if found else platform.processor() or platform.machine()


def slug_of(device: torch.device) -> str:
    """The machine's name for a file."""
    return re.sub(r"[^a-z0-9]+", "-", machine(device).lower()).strip("-")


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def environment(device: torch.device, clock_name: str) -> dict[str, Any]:
    """What a result depends on."""
    return {
        "machine": machine(device),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "clock": "CUDA events" if device.type == "cuda" else clock_name,
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def table(result: dict[str, Any]) -> str:
    """One shape as Markdown."""
    lines = [
        "| method | attention call | one step | step (ms) | 30 steps | peak MiB | max error |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, label in METHODS.items():
        if name in result["skipped"]:
            lines.append(f"| {label} | skipped: {result['skipped'][name]} | | | | | |")
            continue
        call, step = (
            "{ratio:.3f} ({ratio_p10:.3f}–{ratio_p90:.3f})".format(**result[kind][name])
            for kind in ("call", "step")
        )
        picture = result["picture_ratio"].get(name)
        peak = result["step_peak_mib"].get(name)
        cells = [
            label,
            call,
            step,
            f"{1000 * result['step'][name]['median_s']:.4g}",
            "" if picture is None else f"{picture:.3f}",
            "" if peak is None else f"{peak:.0f}",
            f"{result['max_abs_error'][name]:.0e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(report: dict[str, Any], file: Path) -> None:
    """Bars of the ratios, a panel for each shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shapes = report["shapes"]
    figure, axes = plt.subplots(
        1, len(shapes), figsize=(6 * len(shapes), 4.2), sharey=True, squeeze=False
    )
    colours = {"step": "#2a6f97", "call": "#a9d6e5"}
    labels = {"step": "one step (whole block)", "call": "attention call alone"}
    for axis, (shape, result) in zip(axes[0], shapes.items(), strict=True):
        names = [name for name in METHODS if name in result["step"] and name != "plain"]
        for offset, kind in ((-0.2, "step"), (0.2, "call")):
            rows = [result[kind][name] for name in names]
            ratios = [row["ratio"] for row in rows]
            spread = [
                [row["ratio"] - row["ratio_p10"] for row in rows],
                [row["ratio_p90"] - row["ratio"] for row in rows],
            ]
            places = [i + offset for i in range(len(names))]
            axis.barh(
                places,
                [ratio - 1 for ratio in ratios],
                0.38,
                left=1,
                xerr=spread,
                error_kw={"lw": 0.8, "capsize": 2},
                color=colours[kind],
                label=labels[kind],
            )
            for place, row in zip(places, rows, strict=True):
                axis.annotate(
                    f"{row['ratio']:.2f}",
                    (max(row["ratio_p90"], 1), place),
                    (4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                )
        top = max(result[kind][name]["ratio_p90"] for kind in colours for name in names)
        axis.set_xscale("log")
        axis.set_xlim(0.8, max(2.0, 1.35 * top))
        ticks = [t for t in (1, 2, 5, 10, 20, 50) if t <= 1.3 * top]
        axis.set_xticks(ticks, [f"{t}×" for t in ticks])
        axis.minorticks_off()
        axis.axvline(1, color="black", lw=0.8)
        axis.set_yticks(range(len(names)), [METHODS[name] for name in names])
        axis.set_title(
            f"{shape}: {result['text_tokens']} text + {result['image_tokens']} image tokens"
        )
        axis.set_xlabel("time / plain (median, 10–90 %; log)")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].invert_yaxis()
    axes[0][-1].legend(loc="upper right", fontsize=8, frameon=False)
    environment = report["environment"]
    figure.suptitle(
        f"{environment['machine']}, {environment['dtype']}, torch {environment['torch']}"
    )
    figure.tight_layout()
    figure.savefig(file, dpi=110)


@torch.inference_mode()  # as ComfyUI runs its nodes
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, help="width and height; 1024 on a GPU, 512 on a CPU")
    parser.add_argument("--rounds", type=int, help="50 on a GPU, 7 on a CPU")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    set_clock(options.clock)

    warnings.filterwarnings("ignore", message=".*flex_attention")
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    size = options.size or (1024 if on_gpu else 512)
    rounds = options.rounds or (50 if on_gpu else 7)

    report: dict[str, Any] = {
        "environment": environment(device, options.clock) | {"dtype": short(dtype)},
        "gamma": GAMMA,
        "size": size,
        "picture": f"{STEPS_INSIDE} of {STEPS} steps inside the window, derived from step ratios",
        "memory": "peak of one step above weights and inputs: "
        + ("torch.cuda.max_memory_allocated" if on_gpu else "torch's profiler"),
        "shapes": {},
    }
    print(json.dumps(report["environment"]))
    for name in options.shapes:
        result = measure(Case(name, size, device, dtype), rounds)
        report["shapes"][name] = result
        tokens = f"{result['text_tokens']} text + {result['image_tokens']} image tokens"
        print(f"\n### {name}, {tokens}\n\n{table(result)}")

    slug = slug_of(device)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"{slug}.json"
    file.write_text(json.dumps(report, indent=2) + "\n")
    plot(report, file.with_suffix(".png"))
    print(f"\nSaved {file} and {file.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
