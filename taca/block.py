"""What a joint block does inside the window: its own forward, with TACA as attention override."""

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .attention import Layout, num_tokens, temperature_adjusted_attention
from .compiler import frame_callback
from .families import JointBlock
from .layouts import CallState
from .swap import Forward, looks_like

AFTER_HEADS = "mask", "attn_precision", "skip_reshape", "skip_output_reshape"
"""The arguments of core's attention after its heads, in order."""


def joint_forward(forward: Forward, block: JointBlock, gamma: Tensor, state: CallState) -> Forward:
    """A block's forward with TACA, for the length of one call.

    ``forward`` is the block's, with whatever other packs have put there; gamma is as
    ``temperature_adjusted_attention`` takes it.
    """
    locate, reach = block.locate, block.reach

    @looks_like(forward)
    def taca_forward(*args: Any, **kwargs: Any) -> Any:
        layout = locate(args, kwargs, state)
        if not layout:
            return forward(*args, **kwargs)
        state.ran = True
        override = partial(taca_override, gamma, layout, num_tokens(layout), state)
        if torch.compiler.is_compiling():  # in one graph, or not at all: see compiler.py
            with torch._dynamo.error_on_graph_break(True):
                attend, args, kwargs = reach(forward, args, kwargs, override)  # type: ignore[assignment]
                return attend(*args, **kwargs)
        attend, args, kwargs = reach(forward, args, kwargs, override)  # type: ignore[assignment]
        if "torch._dynamo" in sys.modules and frame_callback() is not None:
            # Past its limit of recompilations dynamo runs this function as it is. What it compiled
            # for the plain block, without guards on transformer_options, must not run inside.
            attend = torch.compiler.disable(attend)
        return attend(*args, **kwargs)

    return taca_forward


def taca_override(
    gamma: Tensor,
    layout: Layout,
    joint: tuple[int, int],
    state: CallState,
    other: Forward | None,
    func: Forward,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """ComfyUI's ``optimized_attention_override`` of one block.

    ``joint`` is the ``num_tokens`` of the joint attention; a block may have others, such as attn2
    of SD3.5-Medium. ``other`` is the override that was there before, which still attends.

    Raises ValueError if the attention kernel does not return one row for each query.
    """
    backend = func if other is None else partial(other, func)
    kwargs.update(zip(AFTER_HEADS, args, strict=False))
    mask = kwargs.pop("mask", None)
    dim = 2 if kwargs.get("skip_reshape") else 1
    out_dim = 2 if kwargs.get("skip_output_reshape") else 1
    if (q.shape[dim], k.shape[dim]) != joint:
        return backend(q, k, v, heads, mask=mask, **kwargs)
    state.attended = True

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        output = backend(q, k, v, heads, mask=mask, **kwargs)
        if output.shape[out_dim] != q.shape[dim]:
            raise ValueError(
                f"TACA lets the image's queries attend apart from the text's, and the attention "
                f"kernel of this model answers {q.shape[dim]} queries with "
                f"{output.shape[out_dim]} rows: it takes as many queries as keys for granted. A "
                f"node chose that kernel: take that node out, or TACA Patch Model."
            )
        return output

    return temperature_adjusted_attention(attend, q, k, v, gamma, layout, mask, dim, out_dim)
