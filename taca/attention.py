"""Temperature-adjusted joint attention (TACA, arXiv 2506.07986, Eq. 10). Pure torch.

Shapes: b batch, h heads, n tokens, d channels of a head, t text tokens. q, k and v are
``(b, h, n, d)`` with ``dim=2`` or ``(b, n, h * d)`` with ``dim=1``; k and v may have fewer heads.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .spans import Layout, check_num_text, query_groups
from .word_weights import WordWeights, add_bias, weigh

Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
"""Plain attention of any backend: ``(q, k, v, mask) -> output``."""


def temperature_adjusted_attention(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma: Tensor | None,
    layout: Layout,
    mask: Tensor | None = None,
    dim: int = 2,
    out_dim: int = 2,
    words: WordWeights | None = None,
) -> Tensor:
    """Joint attention whose image-query x text-key logits are multiplied by gamma (Eq. 10).

        image queries: softmax(q [gamma K_txt ; K_img]^T / sqrt(d)) V
        other queries: softmax(q [K_txt ; K_img]^T / sqrt(d)) V

    Scaling a key scales its logits, so this equals Eq. 10 up to rounding. It costs the FLOPs of
    one plain attention and works with any kernel; no n x n matrix is built. Word weights act
    besides gamma, see word_weights.py.

    Parameters
    ----------
    attend : Attend
        Plain attention; returns one row for each query.
    q, k, v : Tensor
        After QK-norm and RoPE. q holds only the tokens that are queries.
    gamma : Tensor, optional
        float32, ``(1,)`` or ``(b,)``; or ``(1, t)`` or ``(b, t)``, one factor for each text token.
        None leaves the logits as they are.
    layout : Layout
        What the n tokens of k are.
    mask : Tensor, optional
        Broadcasts to ``(..., n, n)``; its query axis may be 1.
    dim, out_dim : int
        Token axis of q, k and v, and of what ``attend`` returns.
    words : WordWeights, optional
        With them ``attend`` has to take masks.

    Raises ValueError if gamma has neither one entry nor one per row of k, or not one per text
    token.
    """
    groups = query_groups(layout)
    outputs = [q] * len(groups)
    keys = k if gamma is None else scale_text_keys(k, gamma, layout, dim)  # [gamma K_txt ; K_img]
    biases, values = weigh(words, v, layout, groups, dim) if words is not None else (None, v)
    for image in (True, False):  # image queries first, so that their keys and values are freed
        for i, (is_image, start, length) in enumerate(groups):
            if is_image == image:
                queries, rows = q.narrow(dim, start, length), mask
                if mask is not None and mask.ndim > 1 and mask.shape[-2] != 1:
                    rows = mask.narrow(-2, start, length)
                if biases is not None and (bias := biases[i]) is not None:
                    rows = bias if rows is None else add_bias(rows, bias)
                outputs[i] = attend(queries, keys, values, rows)
        keys, values = k, v  # for the other queries
    return torch.cat(outputs, out_dim)


def scale_text_keys(k: Tensor, gamma: Tensor, layout: Layout, dim: int) -> Tensor:
    """A copy of k with its text keys multiplied by gamma; arguments and errors as above."""
    # In bfloat16 1.2 is 1.203. As gamma is a float32 tensor with axes, torch multiplies in float32
    # and rounds once.
    adjusted, start, done = k.clone(), 0, 0
    if gamma.shape != (1,):  # else it broadcasts as it is
        gamma = _along(k, gamma, layout, dim)
    is_each = gamma.ndim > 1 and gamma.shape[dim] != 1
    for kind, length, _ in layout:
        if kind == "text":
            factor = gamma.narrow(dim, done, length) if is_each else gamma
            adjusted.narrow(dim, start, length).mul_(factor)
            done += length
        start += length
    return adjusted


def _along(k: Tensor, gamma: Tensor, layout: Layout, dim: int) -> Tensor:
    """Gamma with the axes of k, its text tokens on ``dim``; errors as above."""
    if gamma.shape[0] not in (1, k.shape[0]):
        raise ValueError(
            f"TACA has gamma of shape {tuple(gamma.shape)} for an attention of {k.shape[0]} rows."
        )
    if gamma.ndim > 1:
        check_num_text(layout, gamma.shape[1])
    return gamma.view(gamma.shape[0], *(1,) * (dim - 1), -1, 1)
