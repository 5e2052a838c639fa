"""What TACA costs one joint block of a model, and what the paper's own ways do.

Pure torch, random weights, one block shaped as those of FLUX.1, SD3.5-Medium and -Large,
Qwen-Image and Chroma: all blocks of a model cost alike, so its ratios are those of a model whose
steps are spent in such blocks. ``README.md`` says how to read the
result.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import psutil
import timing
import torch
from reporting import ROOT, markdown
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

sys.path.append(str(ROOT))

from taca.attention import temperature_adjusted_attention
from taca.spans import Span

GAMMA = 1.2
compile_once = cache(torch.compile)
TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
KINDS = {"call": "attention call", "step": "one step"}


@dataclass(frozen=True)
class Shape:
    """A joint transformer block; text comes first in the joint sequence."""

    hidden: int
    heads: int
    text: int
    rope: bool = False  # queries and keys are rotated
    attn2: bool = False  # the image tokens have a second attention, among them alone
    modulated: bool = True  # the block computes its modulation; else it is given
    mask: str = ""  # of MASKED


SHAPES = {
    "flux": Shape(hidden=3072, heads=24, text=512, rope=True),
    "sd35-medium": Shape(hidden=1536, heads=24, text=333, attn2=True),
    "sd35-large": Shape(hidden=2432, heads=38, text=333),
    # of a batch of two prompts, the shorter one padded
    "qwen-image": Shape(hidden=3072, heads=24, text=256, rope=True, mask="keys"),
    # with regional prompts; alone ComfyUI masks nothing there
    "chroma": Shape(hidden=3072, heads=24, text=512, rope=True, modulated=False, mask="regions"),
}
MASKED = {"": "", "keys": ", padding masked", "regions": ", regions masked"}


def mask_of(kind: str, text: int, image: int, dtype: torch.dtype) -> Tensor | None:
    """Zero where a query may attend to a key, as ComfyUI hands it to attention.

    Of "keys" the last text tokens are padding, for all queries; of "regions" one half of the prompt
    is for each half of the picture.
    """
    length, low, half = text + image, torch.finfo(dtype).min, text + image // 2
    mask = torch.zeros(1, length if kind == "regions" else 1, length, dtype=dtype)
    if kind == "keys":
        mask[:, :, text - text // 4 : text] = low
    elif kind == "regions":
        mask[:, text:half, text // 2 : text] = low
        mask[:, half:, : text // 2] = low
    return mask if kind else None


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Plain attention as ComfyUI's backends return it: ``(B, N, heads * D)``."""
    mask = mask[:, None] if mask is not None and mask.ndim == 3 else mask
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


class Joint(NamedTuple):
    """A joint attention, and every way to do it, by its name in ``METHODS``."""

    q: Tensor  # as k and v (B, heads, N, D)
    k: Tensor
    v: Tensor
    text: int
    mask: Tensor | None  # added to the logits
    gamma: Tensor
    attend: Callable[..., Tensor] = plain

    def rows(self, keys: Tensor, rows: slice = slice(None)) -> Tensor:
        mask = self.mask
        if mask is not None and mask.shape[-2] != 1:
            mask = mask[..., rows, :]
        return self.attend(self.q[:, :, rows], keys, self.v, mask)

    def scaled(self) -> Tensor:
        """K, its text keys times gamma."""
        keys = self.k.clone()
        keys[:, :, : self.text].mul_(self.gamma)
        return keys

    def plain(self) -> Tensor:
        return self.rows(self.k)

    def inside(self) -> Tensor:
        layout = (Span("text", self.text), Span("image", self.k.shape[2] - self.text))
        joint = (self.attend, self.q, self.k, self.v, self.gamma, layout, self.mask)
        return temperature_adjusted_attention(*joint, out_dim=1)

    plain_again = plain

    def two_full(self) -> Tensor:  # the paper's "selective recomposition": rows picked
        adjusted = self.rows(self.scaled())[:, self.text :]
        return torch.cat([self.rows(self.k)[:, : self.text], adjusted], 1)

    def dense(self) -> Tensor:
        logits = self.q @ self.k.transpose(-2, -1) * self.q.shape[-1] ** -0.5
        logits[:, :, self.text :, : self.text] *= self.gamma
        if self.mask is not None:
            logits += self.mask[:, None]
        return (logits.softmax(-1) @ self.v).transpose(1, 2).flatten(2)

    def flex(self, function: Callable[..., Tensor] = flex_attention) -> Tensor:
        q, k, v, text, mask, gamma, _ = self

        def score(logit: Tensor, _b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            logit = torch.where((query >= text) & (key < text), logit * gamma[0], logit)
            if mask is None:
                return logit
            return logit + (mask[0, 0, key] if mask.shape[1] == 1 else mask[0, query, key])

        return function(q, k, v, score_mod=score).transpose(1, 2).flatten(2)

    def flex_compiled(self) -> Tensor:
        return self.flex(compile_once(flex_attention, dynamic=False))


METHODS = {
    "plain": "plain",
    "plain again": "plain, again",
    "inside": "TACA, inside the window",
    "two full": "paper: two full attentions",
    "flex compiled": "paper: flex, compiled",
    "flex": "paper: flex, uncompiled",
    "dense": "paper: dense matrix",
}
SLOW = ("flex", "dense")


# Blocks


class Stream(nn.Module):
    """One kind of token's weights: modulation, one attention or two, and MLP."""

    def __init__(self, shape: Shape, attentions: int) -> None:
        super().__init__()
        w, self.heads, each = shape.hidden, shape.heads, range(attentions)
        norms = [nn.RMSNorm(w // shape.heads, eps=1e-6) for _ in range(2 * attentions)]
        modulation = [nn.SiLU(), nn.Linear(w, 3 * (attentions + 1) * w)]
        self.modulation = nn.Sequential(*modulation if shape.modulated else ())
        self.qkv = nn.ModuleList(nn.Linear(w, 3 * w) for _ in each)
        self.norms = nn.ModuleList(norms)
        self.out = nn.ModuleList(nn.Linear(w, w) for _ in each)
        self.mlp = nn.Sequential(nn.Linear(w, 4 * w), nn.GELU("tanh"), nn.Linear(4 * w, w))

    def project(self, x: Tensor, mod: tuple[Tensor, ...], i: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of its i-th attention."""
        qkv = self.qkv[i](adjusted(x, mod)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return self.norms[2 * i](q), self.norms[2 * i + 1](k), v

    def finish(self, x: Tensor, attended: list[Tensor], mods: list[tuple[Tensor, ...]]) -> Tensor:
        for out, rows, mod in zip(self.out, attended, mods, strict=False):
            x = x + mod[2] * out(rows)
        return x + mods[-1][2] * self.mlp(adjusted(x, mods[-1]))


class Block(nn.Module):
    """A joint block of two streams. Its joint attention is an argument of the call."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.streams = nn.ModuleList([Stream(shape, 1), Stream(shape, 1 + shape.attn2)])

    def forward(
        self, x: list[Tensor], vector: Tensor, rope: Tensor | None, joint: Callable[..., Tensor]
    ) -> list[Tensor]:
        """Text and image tokens after the block."""
        mods = []
        for stream in self.streams:  # (shift, scale, gate) for each attention and for the MLP
            parts = stream.modulation(vector)[:, None].unflatten(-1, (-1, 3, x[0].shape[-1]))
            mods.append([part.unbind(2) for part in parts.unbind(2)])
        each = list(zip(self.streams, x, mods, strict=True))
        qkv = [stream.project(tokens, mod[0], 0) for stream, tokens, mod in each]
        q, k, v = (torch.cat(pair, 2) for pair in zip(*qkv, strict=True))
        if rope is not None:
            q, k = rotated(q, rope), rotated(k, rope)
        attended = [[rows] for rows in joint(q, k, v).split([y.shape[1] for y in x], 1)]
        if len(self.streams[1].qkv) > 1:
            attended[1].append(plain(*self.streams[1].project(x[1], mods[1][1], 1)))
        return [s.finish(y, rows, mod) for (s, y, mod), rows in zip(each, attended, strict=True)]


def adjusted(x: Tensor, mod: tuple[Tensor, ...]) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + mod[1]) + mod[0]


def rotated(x: Tensor, rope: Tensor) -> Tensor:
    """x, its pairs turned by the angles whose (cos, sin) is ``rope``, in float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x)


# Measuring


class Case:
    """What one measurement needs: seeded inputs, and the two things that are timed.

    A step is ``depth`` blocks; with none, the attention alone is measured.
    """

    def __init__(
        self, shape: Shape, image: int, batch: int, device: torch.device, dtype: str, depth: int = 1
    ) -> None:
        self.device, self.dtype, self.depth = device, dtype, depth
        torch.manual_seed(0)
        kind = getattr(torch, dtype)
        random = partial(torch.randn, device=device, dtype=kind)
        head, length = shape.hidden // shape.heads, shape.text + image
        qkv = [random(batch, shape.heads, length, head) for _ in range(3)]
        self.inputs = [random(batch, n, shape.hidden) for n in (shape.text, image)]
        self.vector = random(batch, shape.hidden * (1 if shape.modulated else 6))
        angles = torch.randn(length, head // 2, device=device)
        self.rope = torch.stack([angles.cos(), angles.sin()]) if shape.rope else None
        with device:
            mask = mask_of(shape.mask, shape.text, image, kind)
            self.rest = (shape.text, mask, torch.full((1,), GAMMA))
            self.block = Block(shape).to(kind) if depth else None
        self.joint = Joint(*qkv, *self.rest)

    def call(self, method: str) -> Any:
        return getattr(self.joint, method.replace(" ", "_"))()

    def step(self, method: str) -> list[Tensor]:
        x, name = self.inputs, method.replace(" ", "_")
        for _ in range(self.depth):
            way = lambda *qkv: getattr(Joint(*qkv, *self.rest), name)()  # noqa: E731
            x = self.block(x, self.vector, self.rope, way)
        return x

    def measure(self, kind: str, names: list[str], rounds: int, label: str) -> tuple[Any, Any]:
        """``summary`` of each method's ``call`` or ``step``, and its peak MiB."""
        run = {name: partial(getattr(self, kind), name) for name in names}
        measured = lambda name: timing.seconds(run[name], self.device)  # noqa: E731
        label, warm_up = f"{label}, {kind}", rounds > 1
        times = timing.interleaved(measured, names, rounds, label, SLOW, warm_up)
        names = [name for name in names if name != "plain again"]
        peaks = {name: timing.peak_mib(run[name], self.device) for name in names}
        return timing.summaries(times), peaks

    def reference(self, rows: list[int], gamma: float) -> Tensor:
        """Eq. 10 in float64 for some queries, of the first of the batch, head by head."""
        heads, (*qkv, text, mask, _, _) = [], self.joint
        is_image = torch.tensor(rows, device=self.device) >= text
        for q, k, v in zip(*(x[0].double() for x in qkv), strict=True):
            logits = q[rows] @ k.T * q.shape[-1] ** -0.5
            logits[is_image, :text] *= gamma
            if mask is not None:
                logits += mask[0] if mask.shape[1] == 1 else mask[0, rows]
            heads.append(logits.softmax(-1) @ v)
        return torch.cat(heads, -1)

    def check(self, names: list[str]) -> tuple[dict[str, float], dict[str, str]]:
        """Each method's largest difference from float64; the reasons of those that cannot run.

        Raises ValueError if a method computes something else.
        """
        batch, heads, length, _ = self.joint.q.shape
        rows = sorted({int(i) for i in torch.linspace(0, length - 1, 64).tolist()})
        gamma = torch.tensor(GAMMA).item()  # as float32 holds it
        right = [self.reference(rows, each) for each in (1.0, gamma)]
        limit = min(TOLERANCE[self.dtype], torch.dist(*right, torch.inf).item() / 2)
        need, free = 12 * batch * heads * length**2, psutil.virtual_memory().available
        if self.device.type == "cuda":  # a CPU would end the process, instead of raising
            free = torch.cuda.mem_get_info()[0]
        found, skipped = {}, {}
        for name in names:
            try:
                if name in SLOW and need > free:
                    raise MemoryError(f"its matrices, {need / 2**30:.0f} GiB, do not fit")
                output = self.call(name)
            except Exception as error:
                skipped[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                continue
            wanted = right[not name.startswith("plain")]
            found[name] = (output[0, rows].double() - wanted).abs().max().item()
            if not found[name] <= limit:
                raise ValueError(f"{name}: off by {found[name]:.1e}")
        return found, skipped


# Reporting


def table(result: dict[str, Any]) -> str:
    """One case as Markdown."""
    kinds = {kind: label for kind, label in KINDS.items() if kind in result}
    units = itertools.product(("", " (ms)", ", peak MiB"), kinds.values())
    head = ["method", *(label + unit for unit, label in units)]
    head += ["30 steps"] * ("step" in kinds) + ["max error"]
    rows = []
    for name, label in METHODS.items():
        if name not in result["max_abs_error"]:
            reason = result["skipped"].get(name, "not measured")
            rows.append([label, f"skipped: {reason}", *[""] * (len(head) - 2)])
            continue
        found = [result[kind][name] for kind in kinds]
        cells = [label, *map(timing.cell, found), *(f"{1000 * x['median_s']:.4g}" for x in found)]
        cells += [timing.peak_cell(result["peak_mib"][kind], name) for kind in kinds]
        if "step" in kinds:
            whole = timing.picture(result["step"][name])
            cells.append("" if name.startswith("plain") else timing.ranged(whole, 4))
        rows.append([*cells, f"{result['max_abs_error'][name]:.0e}"])
    tokens = f"{result['text_tokens']} text + {result['image_tokens']} image tokens"
    return f"{tokens}{MASKED[result['mask']]}.\n\n{markdown(head, rows)}"


@torch.inference_mode()  # as ComfyUI runs its nodes
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    add("--kinds", nargs="+", choices=KINDS, help="attention alone (3 times the rounds), block")
    options = timing.parse_cases(parser, TOLERANCE)
    warnings.filterwarnings("ignore", message=".*flex_attention")
    device, kinds = torch.device(options.device), options.kinds or list(KINDS)
    results = timing.Results("attention", options.out, device)
    cases = itertools.product(options.shapes, options.sizes, options.dtypes, options.batches)
    for name, size, dtype, batch in cases:
        shape, image = SHAPES[name], (size // 16) ** 2
        label = f"{name}, {size}², {dtype}, batch {batch}"
        case = Case(shape, image, batch, device, dtype, int("step" in kinds))
        found, skipped = case.check(list(METHODS))
        result = {"shape": name, "size": size, "batch": batch, "dtype": dtype, "mask": shape.mask}
        result |= {"image_tokens": image, "text_tokens": shape.text, "peak_mib": {}}
        result |= {"max_abs_error": found, "skipped": skipped}
        for kind in kinds:
            often = options.rounds * (3 if kind == "call" else 1)
            result[kind], peaks = case.measure(kind, list(found), often, label)
            result["peak_mib"][kind] = peaks
        results.add(label, result | {"environment": timing.environment(device, options.clock)})
        print(f"\n### {label}\n\n{table(result)}", flush=True)
    results.report("One joint block, and its attention", table)
    results.plot(METHODS)


if __name__ == "__main__":
    main()
