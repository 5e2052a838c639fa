"""What a joint block does inside the window: its own forward, with an attention override."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .attention import temperature_adjusted_attention
from .compiler import frame_callback
from .families import JointBlock
from .layouts import CallState
from .spans import Layout, Span, num_tokens
from .swap import Forward, looks_like
from .word_weights import WordWeights

JointOverride = Callable[..., Tensor]
"""``(trace, layout, joint, other, func, q, k, v, heads, ...)``: an ``Override`` preceded by what
the block did so far, the layout of its tokens, and the layout's ``num_tokens``."""

AFTER_HEADS = "mask", "attn_precision", "skip_reshape", "skip_output_reshape"
"""The arguments of core's attention after its heads, in order."""


@dataclass
class Trace:
    """What one block, or the layers of LoRAs, did in one call.

    Blocks only set fields, for torch.compile.
    """

    forward: Forward | None = None  # what ran as the block's forward; None for layers of LoRAs
    called: bool = False
    ran: bool = False  # with text to attend to
    attended: bool = False  # by the override


def joint_forward(
    forward: Forward,
    block: JointBlock,
    state: CallState,
    override: JointOverride,
    traces: list[Trace],
) -> Forward:
    """A block's forward, for one call, whose attention runs through an override.

    ``forward`` is the block's own or another pack's.
    """
    trace = Trace(forward)
    traces.append(trace)
    locate, reach = block.locate, block.reach

    @looks_like(forward)
    def taca_forward(*args: Any, **kwargs: Any) -> Any:
        trace.called = True
        layout = locate(args, kwargs, state)
        if not layout:
            return forward(*args, **kwargs)
        trace.ran = True
        chained = partial(override, trace, layout, num_tokens(layout))
        if torch.compiler.is_compiling():  # in one graph, or not at all: see compiler.py
            with torch._dynamo.error_on_graph_break(True):
                attend, args, kwargs = reach(forward, args, kwargs, chained)  # type: ignore[assignment]
                return attend(*args, **kwargs)
        attend, args, kwargs = reach(forward, args, kwargs, chained)  # type: ignore[assignment]
        if "torch._dynamo" in sys.modules and frame_callback() is not None:
            # Past its recompilation limit dynamo runs this function uncompiled. The code compiled
            # for the plain block, without guards on transformer_options, must not run inside.
            attend = torch.compiler.disable(attend)
        return attend(*args, **kwargs)

    taca_forward.chains_overrides = True  # type: ignore[attr-defined]  # see ``through_globals``
    return taca_forward


def taca_override(
    gamma: Tensor | None,
    words: WordWeights | None,
    instead: Forward | None,
    trace: Trace,
    layout: Layout,
    joint: tuple[int, int],
    other: Forward | None,
    func: Forward,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """TACA as an attention override; arguments as ``joint_forward`` gives them.

    gamma and words are as ``temperature_adjusted_attention`` takes them. ``joint`` has the numbers
    of queries and keys of the block's joint attention: a call with other queries, or fewer keys, is
    a different attention, such as attn2 of SD3.5-Medium. ``other`` is the override that was there
    before; it still attends, unless there is an attention to run ``instead``.

    Raises ValueError if the attention kernel does not return one row for each query.
    """
    backend = func if other is None else partial(other, func)
    if args:
        kwargs.update(zip(AFTER_HEADS, args, strict=False))
    mask = kwargs.pop("mask", None)
    dim = 2 if kwargs.get("skip_reshape") else 1
    out_dim = 2 if kwargs.get("skip_output_reshape") else 1
    num_kept = k.shape[dim] - joint[1]
    if q.shape[dim] != joint[0] or num_kept < 0:
        return backend(q, k, v, heads, mask=mask, **kwargs)
    if num_kept:  # keys of earlier steps, appended by another node such as core's Flux KV Cache
        layout = (*layout, Span("other", num_kept, is_query=False))
    trace.attended = True
    backend = instead or backend

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return backend(q, k, v, heads, mask=mask, **kwargs)

    output = temperature_adjusted_attention(
        attend, q, k, v, gamma, layout, mask, dim, out_dim, words
    )
    if output.shape[out_dim] != joint[0]:
        raise ValueError(
            f"TACA needs an attention kernel for any number of queries. This one answers "
            f"{joint[0]} queries with {output.shape[out_dim]} rows: take out the node that chose "
            f"it, or the TACA node."
        )
    return output
