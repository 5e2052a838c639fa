"""What TACA costs one joint block of a model, and what the paper's own ways do.

Pure torch, random weights, one block shaped as those of FLUX.1, SD3.5-Medium and -Large,
Qwen-Image and Chroma: all blocks of a model cost alike, so its ratios are those of a model whose
steps are spent in such blocks. ``--tried`` times other ways to scale the text keys instead.
``README.md`` says how to read the result.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import timing
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

GAMMA = 1.2
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = [timing.short(dtype) for dtype in TOLERANCE]

Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
"""q, k, v as ``(B, heads, N, D)``, and a mask that is added to the logits."""

METHODS = {
    "plain": "plain",
    "plain again": "plain, again",
    "inside": "TACA, inside the window",
    "two full": "paper: two full attentions",
    "flex compiled": "paper: flex, compiled",
    "flex": "paper: flex, uncompiled",
    "dense": "paper: dense matrix",
}
PLAIN = ("plain", "plain again")
SLOW = ("flex", "dense")
TRIED = {
    "plain": "plain",
    "plain again": "plain, again",
    "two calls": "two calls, nothing else (no TACA)",
    "joined": "and their outputs joined by `cat` (no TACA)",
    "inside": "**TACA: text keys scaled where they lie, and put back**",
    "one buffer": "the same, both outputs copied into one buffer instead of `cat`",
    "written once": "K written once (`mul(out=)` and `copy_`)",
    "cloned": "K cloned, its text keys scaled (without inference mode, and traced)",
    "cat": "text keys scaled, then `cat` with the rest",
    "rows again": "all queries with scaled K, text queries again with K",
}


@cache
def load_pack() -> Any:
    """Import the pack's ``taca.attention`` by its path, without ComfyUI or ``sys.path``."""
    folder = timing.RESULTS.parent.parent / "taca"
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
    modulated : bool
        Whether the block computes its modulation; else it is given.
    mask : str
        ``"keys"``: the last text tokens are padding, for all queries. ``"regions"``: one half of
        the prompt is for each half of the picture.
    """

    hidden: int
    heads: int
    text: int
    rope: bool = False
    attn2: bool = False
    modulated: bool = True
    mask: str = ""


SHAPES = {
    "flux": Shape(hidden=3072, heads=24, text=512, rope=True),
    "sd35-medium": Shape(hidden=1536, heads=24, text=333, attn2=True),
    "sd35-large": Shape(hidden=2432, heads=38, text=333),
    # of a batch of two prompts, the shorter one padded
    "qwen-image": Shape(hidden=3072, heads=24, text=256, rope=True, mask="keys"),
    # with regional prompts; alone ComfyUI masks nothing there
    "chroma": Shape(hidden=3072, heads=24, text=512, rope=True, modulated=False, mask="regions"),
}


def mask_of(kind: str, text: int, image: int, dtype: torch.dtype,
            device: torch.device) -> Tensor | None:  # fmt: skip
    """Zero where a query may attend to a key, as ComfyUI hands it to attention."""
    if not kind:
        return None
    length = text + image
    if kind == "keys":
        mask = torch.zeros(1, 1, length, dtype=dtype, device=device)
        mask[:, :, text - text // 4 : text] = torch.finfo(dtype).min
        return mask
    mask = torch.zeros(1, length, length, dtype=dtype, device=device)
    halves = [slice(0, text // 2), slice(text // 2, text)]
    pictures = [slice(text, text + image // 2), slice(text + image // 2, length)]
    for queries, keys in zip(pictures, halves[::-1], strict=True):
        mask[:, queries, keys] = torch.finfo(dtype).min
    return mask


class Projections(nn.Module):
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

    def __init__(self, shape: Shape, attn2: bool) -> None:
        super().__init__()
        hidden, heads = shape.hidden, shape.heads
        self.parts = 9 if attn2 else 6
        self.attn = Projections(hidden, heads)
        self.attn2 = Projections(hidden, heads) if attn2 else None
        self.modulation = nn.Linear(hidden, self.parts * hidden) if shape.modulated else None
        self.mlp = nn.Sequential(
            nn.Linear(hidden, 4 * hidden), nn.GELU("tanh"), nn.Linear(4 * hidden, hidden)
        )

    def modulate(self, vector: Tensor) -> tuple[Tensor, ...]:
        """(shift, scale, gate) for attention, MLP and, where there is one, attn2."""
        if self.modulation is not None:
            vector = self.modulation(F.silu(vector))
        return vector.unsqueeze(1).chunk(self.parts, -1)

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
        self.text = Stream(shape, attn2=False)
        self.image = Stream(shape, shape.attn2)

    def forward(
        self,
        text: Tensor,
        image: Tensor,
        vector: Tensor,
        rope: Tensor | None,
        joint: Callable[..., Tensor],
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
    if mask is not None and mask.ndim == 3:
        mask = mask[:, None]
    return _merge(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def _merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _rows(mask: Tensor | None, rows: slice) -> Tensor | None:
    """The mask of these queries."""
    return mask if mask is None or mask.shape[-2] == 1 else mask[..., rows, :]


def two_full(attend: Attend, text: int, gamma: Tensor) -> Attend:
    """The paper's "selective recomposition": two whole attentions, rows picked."""

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scaled = k.clone()
        scaled[:, :, :text] *= gamma
        adjusted = attend(q, scaled, v, mask)
        return torch.cat([attend(q, k, v, mask)[:, :text], adjusted[:, text:]], 1)

    return run


def dense(text: int, gamma: Tensor) -> Attend:
    """All logits as a matrix."""

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        logits[:, :, text:, :text] *= gamma
        if mask is not None:
            logits += mask[:, None]
        return _merge(logits.softmax(-1) @ v)

    return run


def flex(text: int, gamma: Tensor, compiled: bool) -> Attend:
    """Flex attention, whose score function multiplies by gamma."""
    function = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        def score(logit: Tensor, _b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            logit = torch.where((query >= text) & (key < text), logit * gamma[0], logit)
            if mask is None:
                return logit
            return logit + (mask[0, 0, key] if mask.shape[1] == 1 else mask[0, query, key])

        return _merge(function(q, k, v, score_mod=score))

    return run


def taca(attend: Attend, text: int, image: int, gamma: Tensor) -> Attend:
    """The pack's."""
    pack = load_pack()
    tokens = (pack.Span("text", text), pack.Span("image", image))

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return pack.temperature_adjusted_attention(attend, q, k, v, gamma, tokens, mask, out_dim=1)

    return run


def methods(text: int, image: int, device: torch.device) -> dict[str, Attend]:
    """Every method of ``METHODS``, for these numbers of tokens."""
    gamma = torch.full((1,), GAMMA, device=device)
    return {
        **dict.fromkeys(PLAIN, plain),
        "inside": taca(plain, text, image, gamma),
        "two full": two_full(plain, text, gamma),
        "flex compiled": flex(text, gamma, compiled=True),
        "flex": flex(text, gamma, compiled=False),
        "dense": dense(text, gamma),
    }


def tried(text: int, image: int, device: torch.device) -> dict[str, Attend]:
    """Every method of ``TRIED``: ways to give image queries other text keys."""
    gamma = torch.full((1,), GAMMA, device=device)
    first, last = slice(text), slice(text, None)

    def both(q: Tensor, k: Tensor, scaled: Tensor, v: Tensor,
             mask: Tensor | None) -> tuple[Tensor, Tensor]:  # fmt: skip
        image_rows = plain(q[:, :, last], scaled, v, _rows(mask, last))
        return plain(q[:, :, first], k, v, _rows(mask, first)), image_rows

    def in_place(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        own = k[:, :, first].clone()
        k[:, :, first].mul_(gamma)
        image_rows = plain(q[:, :, last], k, v, _rows(mask, last))
        k[:, :, first].copy_(own)
        return plain(q[:, :, first], k, v, _rows(mask, first)), image_rows

    def one_buffer(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        pieces = in_place(q, k, v, mask)
        output = torch.empty(q.shape[0], text + image, pieces[0].shape[2], dtype=q.dtype,
                             device=q.device)  # fmt: skip
        for rows, piece in zip((first, last), pieces, strict=True):
            output[:, rows] = piece
        return output

    def written(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scaled = torch.empty_like(k)
        torch.mul(k[:, :, first], gamma.to(k.dtype), out=scaled[:, :, first])
        scaled[:, :, last].copy_(k[:, :, last])
        return torch.cat(both(q, k, scaled, v, mask), 1)

    def cloned(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scaled = k.clone()
        scaled[:, :, first].mul_(gamma)
        return torch.cat(both(q, k, scaled, v, mask), 1)

    def by_cat(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scaled = torch.cat([(k[:, :, first] * gamma).to(k.dtype), k[:, :, last]], 2)
        return torch.cat(both(q, k, scaled, v, mask), 1)

    def again(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scaled = k.clone()
        scaled[:, :, first].mul_(gamma)
        output = plain(q, scaled, v, mask)
        output[:, first] = plain(q[:, :, first], k, v, _rows(mask, first))
        return output

    return {
        **dict.fromkeys(PLAIN, plain),
        "two calls": lambda q, k, v, mask: both(q, k, k, v, mask),
        "joined": lambda q, k, v, mask: torch.cat(both(q, k, k, v, mask), 1),
        "inside": taca(plain, text, image, gamma),
        "one buffer": one_buffer,
        "written once": written,
        "cloned": cloned,
        "cat": by_cat,
        "rows again": again,
    }


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, text: int, gamma: float,
              rows: list[int]) -> Tensor:  # fmt: skip
    """Eq. 10 in float64 for some queries, of the first of the batch, head by head."""
    heads = []
    is_image = torch.tensor(rows, device=q.device) >= text
    for one_q, one_k, one_v in zip(*(x[0].double() for x in (q, k, v)), strict=True):
        logits = one_q[rows] @ one_k.T * q.shape[-1] ** -0.5
        logits[is_image, :text] *= gamma
        if mask is not None:
            logits += mask[0] if mask.shape[1] == 1 else mask[0, rows]
        heads.append(logits.softmax(-1) @ one_v)
    return torch.cat(heads, -1)


# Measuring


@dataclass
class Case:
    """What one measurement needs: seeded inputs, and the two things that are timed."""

    name: str
    size: int
    batch: int
    device: torch.device
    dtype: torch.dtype
    tried: bool = False

    def __post_init__(self) -> None:
        shape = SHAPES[self.name]
        image = (self.size // 16) ** 2
        torch.manual_seed(0)
        options = {"device": self.device, "dtype": self.dtype}
        head_dim = shape.hidden // shape.heads
        self.text, self.image = shape.text, image
        joint = (self.batch, shape.heads, shape.text + image, head_dim)
        self.qkv = [torch.randn(joint, **options) for _ in range(3)]
        vector = shape.hidden if shape.modulated else 6 * shape.hidden
        self.inputs = [
            torch.randn(self.batch, shape.text, shape.hidden, **options),
            torch.randn(self.batch, image, shape.hidden, **options),
            torch.randn(self.batch, vector, **options),
        ]
        self.rope = None
        if shape.rope:
            angles = torch.randn(shape.text + image, head_dim // 2, device=self.device)
            self.rope = torch.stack([angles.cos(), angles.sin()])
        self.mask = mask_of(shape.mask, shape.text, image, self.dtype, self.device)
        with self.device:
            self.block = Block(shape).to(self.dtype)
        self.methods = (tried if self.tried else methods)(shape.text, image, self.device)

    @property
    def label(self) -> str:
        return f"{self.name}, {self.size}², {timing.short(self.dtype)}, batch {self.batch}"

    def call(self, method: str) -> Any:
        """Call the attention alone."""
        return self.methods[method](*self.qkv, self.mask)

    def step(self, method: str) -> Any:
        """Run the whole block."""
        attend = self.methods[method]
        return self.block(*self.inputs, self.rope, partial(attend, mask=self.mask))

    def seconds(self, kind: str, method: str) -> float:
        """Of a ``call`` or a ``step``."""
        return timing.seconds(partial(getattr(self, kind), method), self.device)

    def check(self, names: list[str]) -> tuple[dict[str, float], dict[str, str]]:
        """Each method's largest difference from float64; the reasons of those that cannot run.

        Raises
        ------
        ValueError
            If a method computes something else.
        """
        length = self.text + self.image
        rows = sorted({int(i) for i in torch.linspace(0, length - 1, 64).tolist()})
        matrix = 4 * self.qkv[0].shape[0] * self.qkv[0].shape[1] * length**2
        # gamma as float32 holds it
        right = {
            gamma: reference(*self.qkv, self.mask, self.text, gamma, rows)
            for gamma in (1.0, torch.tensor(GAMMA).item())
        }
        found, skipped = {}, {}
        for name in names:
            if name in SLOW and 3 * matrix > timing.free_bytes(self.device):
                skipped[name] = f"its matrices, {3 * matrix / 2**30:.0f} GiB, do not fit"
                continue
            try:
                output = self.call(name)
            except Exception as error:
                skipped[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                continue
            if name == "two calls":
                output = torch.cat(output, 1)
            wanted = [*right.values()][name not in (*PLAIN, "two calls", "joined")]
            found[name] = (output[0, rows].double() - wanted).abs().max().item()
            if not found[name] <= TOLERANCE[self.dtype]:
                raise ValueError(f"{self.label}, {name}: off by {found[name]:.1e}")
        return found, skipped


def measure(case: Case, rounds: int, kinds: list[str]) -> dict[str, Any]:
    """Everything about one case."""
    labels = TRIED if case.tried else METHODS
    errors, skipped = case.check(list(labels))
    names = list(errors)
    result: dict[str, Any] = {
        "shape": case.name, "size": case.size, "batch": case.batch,
        "dtype": timing.short(case.dtype), "image_tokens": case.image, "text_tokens": case.text,
        "mask": SHAPES[case.name].mask, "max_abs_error": errors, "skipped": skipped,
    }  # fmt: skip
    for kind in kinds:
        result[kind] = timing.interleaved(
            partial(case.seconds, kind), names, rounds * (3 if kind == "call" else 1),
            f"{case.label}, {kind}", SLOW,
        )  # fmt: skip
    result["peak_mib"] = {
        kind: {
            name: timing.peak_mib(partial(getattr(case, kind), name), case.device)
            for name in names
            if name != "plain again"
        }
        for kind in kinds
    }
    return result


# Reporting


def table(result: dict[str, Any], labels: dict[str, str]) -> str:
    """One case as Markdown."""
    kinds = [kind for kind in ("call", "step") if kind in result]
    names = {"call": "attention call", "step": "one step"}
    head = [names[kind] for kind in kinds] + [f"{names[kind]} (ms)" for kind in kinds]
    head += [f"{names[kind]}, peak MiB" for kind in kinds]
    head += ["30 steps"] * ("step" in result) + ["max error"]
    lines = [f"| method | {' | '.join(head)} |", "|---|" + "---|" * len(head)]
    for name, label in labels.items():
        if name not in result["max_abs_error"]:
            reason = result["skipped"].get(name, "not measured")
            lines.append(f"| {label} | skipped: {reason} |" + " |" * (len(head) - 1))
            continue
        cells = [timing.cell(result[kind][name]) for kind in kinds]
        cells += [f"{1000 * result[kind][name]['median_s']:.4g}" for kind in kinds]
        for kind in kinds:
            peak, plain = (result["peak_mib"][kind].get(n) for n in (name, "plain"))
            cells.append("" if peak is None else f"{peak:.0f} ({peak / plain:.3f}×)")
        if "step" in result:
            low, middle, high = timing.picture(result["step"][name])
            show = name not in PLAIN
            cells.append(f"{middle:.4f} ({low:.4f}-{high:.4f})" if show else "")
        cells.append(f"{result['max_abs_error'][name]:.0e}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def heading(case: dict[str, Any]) -> str:
    masked = {"": "", "keys": ", padding masked", "regions": ", regions masked"}[case["mask"]]
    return (
        f"{case['shape']}, {case['size']}², {case['dtype']}, batch {case['batch']}: "
        f"{case['text_tokens']} text + {case['image_tokens']} image tokens{masked}"
    )


def report(results: timing.Results, labels: dict[str, str], title: str) -> None:
    """Table and plot of all cases."""
    parts = [f"# {title}\n"]
    panels = {}
    for case in results.cases.values():
        environment = timing.said(case["environment"])
        parts.append(f"## {heading(case)}\n\n{environment}\n\n{table(case, labels)}\n")
        kinds = {"one step": "step", "attention call": "call"}
        panels[heading(case)] = {
            kind: {m: row for m, row in case[key].items() if m != "plain"}
            for kind, key in kinds.items()
            if key in case
        }
    timing.bars(panels, labels, results.file.with_suffix(".png"), environment)
    results.write("\n".join(parts))


@torch.inference_mode()  # as ComfyUI runs its nodes
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--sizes", type=int, nargs="+",
                        help="512 to 2048; 1024 on a GPU, 512 on a CPU")  # fmt: skip
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES,
                        help="bfloat16 on a GPU, float32 on a CPU")  # fmt: skip
    parser.add_argument("--kinds", nargs="+", choices=("call", "step"),
                        help="attention alone (3 times the rounds), whole block")  # fmt: skip
    parser.add_argument("--tried", action="store_true", help="other ways to scale the text keys")
    parser.add_argument("--rounds", type=int, help="50 on a GPU, 7 on a CPU")
    parser.add_argument("--out", type=timing.Path, default=timing.RESULTS, help="folder")
    parser.add_argument("--clock", choices=timing.CLOCKS, default="wall")
    options = parser.parse_args()
    timing.set_clock(options.clock)

    warnings.filterwarnings("ignore", message=".*flex_attention")
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    kinds = options.kinds or (["call"] if options.tried else ["call", "step"])
    labels = TRIED if options.tried else METHODS
    results = timing.Results("tried" if options.tried else "attention", options.out, device)
    for name, size, dtype, batch in itertools.product(
        options.shapes,
        options.sizes or [1024 if on_gpu else 512],
        options.dtypes or ["bfloat16" if on_gpu else "float32"],
        options.batches,
    ):
        case = Case(name, size, batch, device, getattr(torch, dtype), options.tried)
        result = measure(case, options.rounds or (50 if on_gpu else 7), kinds)
        result["environment"] = timing.environment(device, options.clock)
        results.add(case.label, result)
        print(f"\n### {heading(result)}\n\n{table(result, labels)}", flush=True)
    title = "Ways to scale the text keys" if options.tried else "One joint block, and its attention"
    report(results, labels, title)


if __name__ == "__main__":
    main()
