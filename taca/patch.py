"""TACA on a ComfyUI model: two keyed wrappers, and what they install for one call of the model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.model_sampling
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from .attention import Tokens, temperature_adjusted_attention
from .families import Locate, Seen, family_of, uncompiled
from .schedule import Schedule

KEY = "taca"
OVERRIDE = "optimized_attention_override"

log = logging.getLogger("taca")


@dataclass
class Run:
    """What one sampling run has shown so far.

    Parameters
    ----------
    ran : bool
        Whether a joint block with text ran inside the window.
    attended : bool
        Whether a joint attention reached TACA.
    eager : bool
        Whether the model's blocks turned out not to compile in one piece.
    """

    ran: bool = False
    attended: bool = False
    eager: bool = False


def patch_model(model: Any, schedule: Schedule) -> Any:
    """A clone of the model that samples with TACA.

    Parameters
    ----------
    model : comfy.model_patcher.ModelPatcher
        Left as it is.
    schedule : Schedule
        gamma over t. A model that already has TACA gets this one instead.

    Raises
    ------
    ValueError
        If the model has no joint attention that TACA can reach.
    """
    family_of(model.get_model_object("diffusion_model"))
    patched = model.clone()
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, partial(_watch_run, schedule)),
        (WrappersMP.APPLY_MODEL, partial(_adjust_call, schedule, Run())),
    ):
        patched.remove_wrappers_with_key(kind, KEY)
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    return patched


def timestep(model_sampling: Any, sigma: Tensor) -> Tensor:
    """The paper's t, 0..1000 (1000 = pure noise), of sigma; of sigma's shape.

    A flow model's sigma is its noise share, whatever unit the model itself is told time in.
    """
    if isinstance(model_sampling, comfy.model_sampling.CONST):
        return sigma * 1000.0
    return model_sampling.timestep(sigma)


def _watch_run(schedule: Schedule, executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Around one sampling run: say what TACA will do, and make sure that it did it."""
    guider = executor.class_obj
    patcher = guider.model_patcher
    family = family_of(patcher.get_model_object("diffusion_model"))
    sigmas = args[3] if len(args) > 3 else kwargs["sigmas"]
    gamma = schedule.gamma_at(timestep(patcher.get_model_object("model_sampling"), sigmas[:-1]))
    inside = int((gamma != 1).sum())
    blocks = len(list(family.joint_blocks(uncompiled(patcher.model.diffusion_model))))
    log.log(
        logging.INFO if inside or schedule.gamma == 1 else logging.WARNING,
        "TACA: gamma %g at %s acts on %d of %d steps, %d joint blocks of %s.%s",
        schedule.gamma, schedule.window, inside, len(gamma), blocks, family.name,
        "" if inside or schedule.gamma == 1 else " No step is inside the window: lower its "
        "threshold or use more steps, or the picture is the plain model's.",
    )  # fmt: skip
    # This run's record goes to its calls inside their wrapper, not as an entry of
    # transformer_options: code that torch.compile made for a model fails without the entries it
    # was made with. The guider's options are this run's own copy.
    run = Run()
    wrappers = guider.model_options["transformer_options"]["wrappers"][WrappersMP.APPLY_MODEL]
    wrappers[KEY] = [partial(_adjust_call, schedule, run)]
    result = executor(*args, **kwargs)
    if run.ran and not run.attended:
        raise RuntimeError(
            f"TACA changed nothing: the blocks of {type(patcher.model).__name__} ran inside the "
            f"window, but none of their attention reached TACA. Another node or pack probably "
            f"replaced this model's attention or blocks: remove it, or take out TACA Patch Model."
        )
    return result


def _adjust_call(schedule: Schedule, run: Run, executor: Any, x: Tensor, t: Tensor, *args: Any,
                 **kwargs: Any) -> Any:  # fmt: skip
    """Around one call of the model: TACA in every joint block, if a row of the batch is inside."""
    base_model = executor.class_obj
    gamma = schedule.gamma_at(timestep(base_model.model_sampling, t))
    rows = set(gamma.tolist())
    if rows <= {1.0}:
        return executor(x, t, *args, **kwargs)
    seen = Seen()
    with _installed(base_model.diffusion_model, gamma if len(rows) > 1 else gamma[:1], seen):
        result = _without_graph_breaks(run, partial(executor, x, t, *args, **kwargs))
    run.ran |= seen.ran
    run.attended |= seen.attended
    return result


def _without_graph_breaks(run: Run, call: Callable[[], Any]) -> Any:
    """Call a model that may be compiled, and never in pieces.

    A kernel that torch.compile cannot trace breaks the graph, and what follows is compiled piece
    by piece. ComfyUI compiles without guards on ``transformer_options``, so such a piece, made
    with TACA's override, would later be taken for the plain model's, or the other way round.
    Hence blocks with TACA are compiled whole or, where that fails, not at all.
    """
    if not run.eager:
        try:
            return call()
        except Exception as error:
            if type(error).__module__ != "torch._dynamo.exc":
                raise
            log.warning(
                "TACA: this model's blocks cannot be compiled in one piece (often: an attention "
                "kernel that torch.compile cannot trace). Steps inside the window run uncompiled."
            )
            run.eager = True
    with torch.compiler.set_stance("force_eager"):
        return call()


@contextmanager
def _installed(diffusion_model: nn.Module, gamma: Tensor, seen: Seen) -> Iterator[None]:
    """For the length of this context, every joint block runs with TACA in its attention.

    It is the blocks' ``forward`` that is replaced, not an entry of the model's
    ``transformer_options``: ComfyUI compiles models without guards on those, so a compiled model
    would keep for ever what they held at its first call.
    """
    diffusion_model = uncompiled(diffusion_model)
    before = []
    try:
        for block, locate in family_of(diffusion_model).joint_blocks(diffusion_model):
            before.append((block, block.__dict__.get("forward")))
            block.forward = _joint_forward(block.forward, locate, gamma, seen)
        yield
    finally:
        for block, forward in before:
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _joint_forward(forward: Callable[..., Any], locate: Locate, gamma: Tensor,
                   seen: Seen) -> Callable[..., Any]:  # fmt: skip
    """A block's forward, with TACA as the attention override of this one block."""

    def taca_forward(*args: Any, **kwargs: Any) -> Any:
        tokens = locate(args, kwargs, seen)
        if not any(run.kind == "text" and run.length for run in tokens):
            return forward(*args, **kwargs)
        seen.ran = True
        options = kwargs.get("transformer_options") or {}
        override = _override(gamma, tokens, seen, options.get(OVERRIDE))
        kwargs = {**kwargs, "transformer_options": {**options, OVERRIDE: override}}
        if not torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        with torch._dynamo.error_on_graph_break(True):  # see _without_graph_breaks
            return forward(*args, **kwargs)

    return taca_forward


def _override(gamma: Tensor, tokens: Tokens, seen: Seen,
              other: Callable[..., Tensor] | None) -> Callable[..., Tensor]:  # fmt: skip
    """The attention override of one block; ``other`` is whoever's was there, and still attends."""

    def taca_override(func: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int,
                      mask: Tensor | None = None, attn_precision: Any = None,
                      skip_reshape: bool = False, skip_output_reshape: bool = False,
                      **kwargs: Any) -> Tensor:  # fmt: skip
        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            backend = func if other is None else partial(other, func)
            return backend(
                q, k, v, heads, mask=mask, attn_precision=attn_precision,
                skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape, **kwargs,
            )  # fmt: skip

        dim = 2 if skip_reshape else 1
        if not q.shape[dim] == k.shape[dim] == sum(run.length for run in tokens):
            return attend(q, k, v, mask)  # not the joint attention of this block
        seen.attended = True
        return temperature_adjusted_attention(
            attend, q, k, v, gamma, tokens, mask, dim, out_dim=2 if skip_output_reshape else 1
        )

    return taca_override
