"""What attention does in a run: how much of it goes to text, and where each word is looked at.

Attention is linear in V: the same attention call, with V replaced by columns that are 1 at some
tokens and 0 elsewhere, returns how much of each query's attention goes to those tokens. So any
kernel can be asked, no N x N matrix is made, and a sample of the image queries is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from .attention import Tokens, attends_over, scale_text
from .families import Locate, Seen, family_of, part_of, uncompiled
from .lora import Wrap
from .options import NO_OPTIONS, short
from .patch import (
    OVERRIDE,
    Settings,
    first_seen,
    gamma_of_rows,
    handing,
    installed,
    joint_blocks,
    located_blocks,
    options_of,
    resolve,
    settings_of,
    taking_options,
    timestep,
    uncompiled_calls,
)
from .schedule import Resolved, Schedule, TimestepWindow

QUERIES = 1024
"""At most so many image queries are asked, evenly over the picture."""


@dataclass
class Report:
    """What a run showed.

    Parameters
    ----------
    words : dict
        A word -> the numbers of its text tokens.
    blocks : list of str
        Names of the joint blocks.
    shares : dict
        ``(step, block)`` -> for each call a pair of tensors: the share of the image queries'
        attention that goes to text, without TACA and as the run had it.
    maps : Tensor, optional
        ``(words, rows, columns)``: the attention each place of the picture pays to each word,
        averaged over heads, blocks and steps, as the run had it.
    """

    words: dict[str, list[int]]
    blocks: list[str] = field(default_factory=list)
    shares: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    maps: Tensor | None = None
    calls: int = 0

    def table(self) -> Tensor:
        """Shares ``(2, steps, blocks)``: without TACA and with; NaN where nothing was seen."""
        steps = 1 + max((step for step, _ in self.shares), default=-1)
        table = torch.full((2, steps, len(self.blocks)), torch.nan)
        for (step, block), pairs in self.shares.items():
            for which in (0, 1):
                table[which, step, block] = torch.stack([pair[which] for pair in pairs]).mean()
        return table

    def add_maps(self, maps: Tensor) -> None:
        self.maps = maps if self.maps is None else self.maps + maps
        self.calls += 1


def watched(model: Any, report: Report) -> Any:
    """A clone of a model whose next run fills a report.

    Parameters
    ----------
    model : comfy.model_patcher.ModelPatcher
        With TACA or without; left as it is.
    report : Report
        Filled in.
    """
    settings = settings_of(model) or Settings(Schedule(1.0, TimestepWindow()))
    patched = model.clone()
    transformer = uncompiled(patched.get_model_object("diffusion_model"))
    report.blocks += [
        f"{short(name)} {i}"
        for name in family_of(transformer).joint
        for i in range(len(part_of(transformer, name)))
    ]
    # First, so that it is around TACA's own: what it puts on a block is then inside of TACA's.
    wrappers = patched.wrappers.setdefault(WrappersMP.APPLY_MODEL, {})
    patched.wrappers[WrappersMP.APPLY_MODEL] = {
        "taca_report": [partial(_watch_call, settings, report)], **wrappers
    }  # fmt: skip
    return patched


def _watch_call(settings: Settings, report: Report, executor: Any, x: Tensor, t_model: Tensor,
                *args: Any, **kwargs: Any) -> Any:  # fmt: skip
    """Around one call of the model: a measuring override in every joint block."""
    base_model = executor.class_obj
    options = args[3]
    steps = timestep(base_model.model_sampling, options["sample_sigmas"])
    t = timestep(base_model.model_sampling, t_model)
    resolved: Resolved = resolve(
        settings.schedule, base_model.model_sampling, options["sample_sigmas"]
    )
    gamma = gamma_of_rows(settings.options, resolved, t, *args)
    limited = {id(block) for block, _ in joint_blocks(base_model.diffusion_model, settings.options)}
    chunks = options.get("cond_or_uncond", [0])
    positive = [chunk == 0 for chunk in chunks for _ in range(len(t) // len(chunks))]
    if not any(positive):
        return executor(x, t_model, *args, **kwargs)
    seen = first_seen(*args, **kwargs)
    probe = Probe(
        report=report,
        rows=torch.tensor(positive).nonzero().flatten().to(x.device),
        step=int((steps[:-1] > t.max() * (1 + 1e-6)).sum()),
        latent=tuple(x.shape[-2:]),
    )
    forwards: list[tuple[nn.Module, Wrap]] = []
    joint = [block for block, _ in joint_blocks(base_model.diffusion_model, NO_OPTIONS)]
    for block, locate in located_blocks(base_model.diffusion_model, NO_OPTIONS).items():
        own = gamma if id(block) in limited else torch.ones_like(gamma)
        i = joint.index(block) if block in joint else -1  # has no joint attention to measure
        forwards.append(
            (block, partial(_measured, locate=locate, gamma=own, seen=seen, probe=probe, block=i))
        )
    with installed(forwards), uncompiled_calls:
        return executor(x, t_model, *args, **kwargs)


@dataclass
class Probe:
    """What the blocks of one call are asked, and where the answers go.

    Parameters
    ----------
    report : Report
        Where.
    rows : Tensor
        Rows of the batch that are the positive prompt's.
    step : int
        Of the run, from 0.
    latent : tuple of int
        Height and width of the latents.
    """

    report: Report
    rows: Tensor
    step: int
    latent: tuple[int, ...]

    def places(self, image: int) -> tuple[Tensor, tuple[int, int]]:
        """Numbers of the image tokens to ask, and the rows and columns they lie in."""
        height, width = grid_of(self.latent, image)
        stride = 1
        while -(-height // stride) * -(-width // stride) > QUERIES:
            stride += 1
        grid = torch.arange(height * width).view(height, width)[::stride, ::stride]
        return grid.flatten(), (grid.shape[0], grid.shape[1])


def grid_of(latent: Sequence[int], image: int) -> tuple[int, int]:
    """Rows and columns of a latent's image tokens, of which there are more with references."""
    grids = [(-(-latent[0] // p), -(-latent[1] // p)) for p in (1, 2, 4, 8)]
    for height, width in grids:
        if height * width <= image:
            return height, width
    return image, 1


def _measured(forward: Callable[..., Any], locate: Locate, gamma: Tensor, seen: Seen, probe: Probe,
              block: int) -> Callable[..., Any]:  # fmt: skip
    """A block's forward, with its attention asked before it goes on as it would."""
    with_options = taking_options(forward)

    def measured_forward(*args: Any, **kwargs: Any) -> Any:
        tokens = locate(args, kwargs, seen)
        if not tokens:
            return forward(*args, **kwargs)
        options = options_of(kwargs)
        override = _measuring(gamma, tokens, probe, block, options.get(OVERRIDE))
        return with_options(*args, **handing(kwargs, {**options, OVERRIDE: override}))

    return measured_forward


def _measuring(gamma: Tensor, tokens: Tokens, probe: Probe, block: int,
               other: Callable[..., Tensor] | None) -> Callable[..., Tensor]:  # fmt: skip
    def measuring_override(func: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int,
                           *args: Any, **kwargs: Any) -> Tensor:  # fmt: skip
        backend = func if other is None else partial(other, func)
        result = backend(q, k, v, heads, *args, **kwargs)
        dim = 2 if kwargs.get("skip_reshape") else 1
        if attends_over(tokens, q, k, dim):
            ask(func, q, k, heads, gamma, tokens, probe, block, dim, args, kwargs)
        return result

    return measuring_override


def ask(func: Callable[..., Tensor], q: Tensor, k: Tensor, heads: int, gamma: Tensor,
        tokens: Tokens, probe: Probe, block: int, dim: int, args: tuple[Any, ...],
        kwargs: dict[str, Any]) -> None:  # fmt: skip
    """One attention's share of text, with plain and with adjusted keys, and its maps of words."""
    asking = [span for span in tokens if span.asks]
    starts = [sum(span.length for span in asking[:i]) for i in range(len(asking))]
    image = max((span.length, start) for span, start in zip(asking, starts, strict=True)
                if span.kind == "image")  # fmt: skip
    places, grid = probe.places(image[0])
    queries = (places + image[1]).to(q.device)
    is_text = torch.cat([
        torch.full((span.length,), span.kind == "text") for span in tokens
    ])  # fmt: skip
    text = is_text.nonzero().flatten().to(q.device)
    if not len(text):
        return
    rows = probe.rows.to(q.device)
    q, k = q[rows].index_select(dim, queries), k[rows]
    gamma = gamma[rows] if len(gamma) > 1 else gamma
    head_dim = k.shape[-1] if dim == 2 else k.shape[-1] // heads
    words = list(probe.report.words.values())
    for word, numbers in probe.report.words.items():
        if max(numbers) >= len(text):
            raise ValueError(
                f"TACA Attention Report: {word!r} is said to be text token {max(numbers)}, but the "
                f"prompt has {len(text)} text tokens, counted from 0."
            )
    if len(words) >= head_dim:
        raise ValueError(
            f"TACA Attention Report asks for at most {head_dim - 1} words at once on this model, "
            f"not {len(words)}: name fewer."
        )
    # Column 0 is all of the text, column i the i-th word.
    columns = torch.zeros(is_text.shape[0], head_dim, device=k.device, dtype=k.dtype)
    columns[text, 0] = 1
    for i, numbers in enumerate(words, 1):
        columns[text[numbers], i] = 1
    if dim == 2:
        indicator = columns.expand(*k.shape[:2], -1, -1).contiguous()
    else:
        indicator = columns.repeat(1, k.shape[-1] // head_dim).expand(k.shape[0], -1, -1)
    mask = kwargs.get("mask", args[0] if args else None)
    if mask is not None:
        mask = mask[rows] if mask.ndim > 2 and mask.shape[0] > 1 else mask
        if mask.ndim > 1 and mask.shape[-2] != 1:
            mask = mask.index_select(-2, queries)
    settings = {**kwargs, "mask": mask, "skip_output_reshape": False}

    def mass(keys: Tensor) -> Tensor:
        """``(queries, columns)``, averaged over rows and heads."""
        out = func(q, keys, indicator.contiguous(), heads, *args[1:], **settings)
        return out.float().unflatten(-1, (-1, head_dim)).mean((0, 2))

    plain = mass(k)
    adjusted = mass(scale_text(k, gamma, tokens, dim)) if bool((gamma != 1).any()) else plain
    pair = (plain[:, 0].mean().cpu(), adjusted[:, 0].mean().cpu())
    probe.report.shares.setdefault((probe.step, block), []).append(pair)
    if words:
        probe.report.add_maps(adjusted[:, 1 : len(words) + 1].T.unflatten(-1, grid).cpu())
