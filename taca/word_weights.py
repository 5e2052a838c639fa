"""Words that weigh in joint attention, and words to avoid. Pure torch; shapes as in attention.py.

    image query i:  out_i = sum_j w_j e^s_ij v_j / sum_j |w_j| e^s_ij

w is 1 for all but text; s are the logits, with gamma where TACA acts. A weight of 1 changes
nothing, 0 is as if the token were not there, 2 as if it stood there twice; a negative one attends
by |w| and subtracts the value. In a call of attention, log |w| is added to the logits as a mask of
one row, and values change their sign.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .spans import Layout


class WordWeights(NamedTuple):
    """The weights of a call's text tokens; a batch axis of 1 stands for all rows."""

    weights: Tensor  # w, float32 (b, t)
    subtracts: bool = False  # whether any is negative
    # Shares of the mean value about which a negative weight mirrors, float32 (b, t); None for zero,
    # which subtracts.
    centre: Tensor | None = None
    # Tokens to avoid, bool (b, t): image queries and one another ask them, the other text does not.
    avoided: Tensor | None = None

    def of_rows(self, rows: Tensor) -> "WordWeights":
        """Those of some rows of the batch, by index."""
        if len(self.weights) == 1:
            return self
        chosen = (each if each is None else each[rows] for each in (self.centre, self.avoided))
        return WordWeights(self.weights[rows], self.subtracts, *chosen)


def image_mask(words: WordWeights, mask: Tensor | None, layout: Layout, like: Tensor) -> Tensor:
    """What is added to the logits of image queries: the model's mask and log |w|.

    ``mask`` is the model's, for these queries. Returns ``(b, 1 or h, 1 or queries, n)`` of the
    dtype and device of ``like``.
    """
    bias = over_keys(words.weights.abs().log(), layout, 0.0)[:, None, None]
    bias = bias.to(like)
    return bias if mask is None else _added(mask, bias)


def text_mask(
    avoided: Tensor, mask: Tensor | None, layout: Layout, start: int, length: int, like: Tensor
) -> Tensor:
    """The same for other queries, ``start`` to ``start + length`` among all queries.

    Tokens to avoid and the other text do not see one another.
    """
    others = over_keys(~avoided, layout, False)
    avoided = over_keys(avoided, layout, False)
    asks = torch.cat(_per_query(avoided, layout), 1).narrow(1, start, length)[:, None, :, None]
    hidden = torch.where(asks, others[:, None, None], avoided[:, None, None])
    bias = torch.zeros_like(hidden, dtype=like.dtype).masked_fill(hidden, -torch.inf)
    return bias if mask is None else _added(mask, bias)


def signed_values(words: WordWeights, v: Tensor, layout: Layout, dim: int) -> Tensor:
    """V with the values of negative weights negated, or mirrored about the prompt's mean value."""
    # SD3 hands its V as (b, n, h, d) also where dim is 1.
    shape = [1] * (v.ndim - 1)
    shape[dim - 1] = -1
    is_negative = over_keys(words.weights < 0, layout, False)
    mirror: Tensor | float = 0.0
    if words.centre is not None:
        share = over_keys(words.centre, layout, 0.0)
        share = share.view(len(share), *shape)
        mirror = 2 * (v.float() * share).sum(dim, keepdim=True).to(v)
    return torch.where(is_negative.view(len(is_negative), *shape), mirror - v, v)


def over_keys(values: Tensor, layout: Layout, elsewhere: float) -> Tensor:
    """Values of the text tokens ``(b, t)`` at their places in a sequence ``(b, n)``."""
    parts, done = [], 0
    for kind, length, _ in layout:
        if kind == "text":
            parts.append(values.narrow(1, done, length))
            done += length
        else:
            parts.append(values.new_full((values.shape[0], length), elsewhere))
    return torch.cat(parts, 1)


def _per_query(per_key: Tensor, layout: Layout) -> list[Tensor]:
    """The parts of ``(b, n)`` whose tokens are queries."""
    parts = per_key.split([length for _, length, _ in layout], 1)
    return [part for part, span in zip(parts, layout, strict=True) if span.is_query]


def _added(mask: Tensor, bias: Tensor) -> Tensor:
    """A mask as ComfyUI's attention takes it, of any shape, and a bias ``(b, 1, rows, n)``."""
    mask = mask.unsqueeze(1) if mask.ndim == 3 else mask
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=bias.dtype).masked_fill(~mask, -torch.inf)
    return mask + bias
