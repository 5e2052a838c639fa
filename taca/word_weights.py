"""Word weights and words to avoid in joint attention. Pure torch; shapes as in attention.py.

    image query i:  out_i = sum_j w_j e^s_ij v_j / sum_j |w_j| e^s_ij

w is 1 for all but text; s are the logits, with gamma where TACA acts. A weight of 1 changes
nothing, 0 is as if the token were absent, 2 as if it occurred twice; a negative one attends by |w|
and subtracts the value. In a call of attention, log |w| is added to the logits as a mask of one
row, and the values of negative weights change their sign.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .spans import Group, Layout, check_num_text

Negative = tuple[int, int, Tensor, Tensor | None]
Shared = tuple[Sequence[Tensor | None], Sequence[Negative]]


@dataclass(frozen=True, eq=False)
class WordWeights:
    """The weights of a call's text tokens; a batch axis of 1 stands for all rows."""

    weights: Tensor  # w, float32 (b, t)
    is_negative: Tensor | None = None  # bool (b, t); None where none is
    # How much each token counts in the mean value about which negative weights mirror, float32
    # (b, t), in sum 1; None to mirror about zero, which subtracts.
    centre: Tensor | None = None
    # Tokens to avoid, bool (b, t): image queries and these tokens attend to them, other text does
    # not.
    avoided: Tensor | None = None
    # What blocks share, by layout and dtype: computed in the first of them.
    shared: dict[Any, "Shared"] = field(default_factory=dict)

    def of_rows(self, rows: Tensor) -> "WordWeights":
        """The weights of some rows of the batch; ``rows`` are indices."""
        if len(self.weights) == 1:
            return self
        is_negative, centre, avoided = (
            each if each is None else each[rows]
            for each in (self.is_negative, self.centre, self.avoided)
        )
        return WordWeights(self.weights[rows], is_negative, centre, avoided)


def weigh(
    words: WordWeights, v: Tensor, layout: Layout, groups: Sequence[Group], dim: int
) -> tuple[Sequence[Tensor | None], Tensor]:
    """What is added to the logits of each group of queries, and V as image queries get it.

    For image queries that is log |w|, ``(b, 1, 1, n)``; for others, with tokens to avoid, a mask
    that hides these and the other text from each other, ``(b, 1, queries, n)``, else None. With
    negative weights V is a copy in which their values are mirrored about zero or the centre.
    """
    if torch.compiler.is_compiling():  # a length used as a key would be a constant of the graph
        found = _of_layout(words, layout, groups, v)
    else:
        key = (*layout, v.dtype)
        if key not in words.shared:
            words.shared[key] = _of_layout(words, layout, groups, v)
        found = words.shared[key]
    biases, negatives = found
    if not negatives:
        return biases, v
    v = v.clone()
    shape = [1] * v.ndim  # SD3 hands its V as (b, n, h, d) also where dim is 1
    shape[0], shape[dim] = len(words.weights), -1
    mirror = v.new_zeros(())
    for start, length, _, centre in negatives:
        if centre is not None:
            mean = v.narrow(dim, start, length).float() * centre.view(shape)
            mirror = mirror + 2 * mean.sum(dim, keepdim=True)
    mirror = mirror.to(v)
    for start, length, is_negative, _ in negatives:
        text = v.narrow(dim, start, length)
        text.copy_(torch.where(is_negative.view(shape), mirror - text, text))
    return biases, v


def _of_layout(words: WordWeights, layout: Layout, groups: Sequence[Group], like: Tensor) -> Shared:
    """The biases of ``weigh``; for each span of text its negative weights, and their centre."""
    image = image_bias(words, layout, like)
    biases = [
        image if is_image else _text_bias(words.avoided, layout, start, length, like)
        for is_image, start, length in groups
    ]
    negatives: list[Negative] = []
    start = done = 0
    for kind, length, _ in layout:
        if kind == "text":
            if words.is_negative is not None:
                is_negative = words.is_negative.narrow(1, done, length)
                centre = None if words.centre is None else words.centre.narrow(1, done, length)
                negatives.append((start, length, is_negative, centre))
            done += length
        start += length
    return biases, negatives


def image_bias(words: WordWeights, layout: Layout, like: Tensor) -> Tensor:
    """The bias of image queries: log |w| of each key, ``(b, 1, 1, n)``; dtype as ``like``.

    Raises ValueError if the sequence has other text tokens than those with weights.
    """
    check_num_text(layout, words.weights.shape[1])
    return over_keys(words.weights.abs().log(), layout, 0.0)[:, None, None].to(like)


def _text_bias(
    avoided: Tensor | None, layout: Layout, start: int, length: int, like: Tensor
) -> Tensor | None:
    """The bias of other queries, ``start`` to ``start + length`` among all; see ``weigh``."""
    if avoided is None:
        return None
    others = over_keys(~avoided, layout, False)
    avoided = over_keys(avoided, layout, False)
    parts = avoided.split([span.length for span in layout], 1)
    queries = [part for part, span in zip(parts, layout, strict=True) if span.is_query]
    is_avoided = torch.cat(queries, 1).narrow(1, start, length)[:, None, :, None]
    hidden = torch.where(is_avoided, others[:, None, None], avoided[:, None, None])
    return torch.zeros_like(hidden, dtype=like.dtype).masked_fill(hidden, -torch.inf)


def add_bias(mask: Tensor, bias: Tensor) -> Tensor:
    """The sum of a bias and the model's mask, of any shape that ComfyUI's attention takes."""
    mask = mask.unsqueeze(1) if mask.ndim == 3 else mask
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=bias.dtype).masked_fill(~mask, -torch.inf)
    return mask + bias


def over_keys(values: Tensor, layout: Layout, elsewhere: float) -> Tensor:
    """Values of text tokens ``(b, t)`` at their positions in a sequence ``(b, n)``."""
    parts, done = [], 0
    for kind, length, _ in layout:
        if kind == "text":
            parts.append(values.narrow(1, done, length))
            done += length
        else:
            parts.append(values.new_full((values.shape[0], length), elsewhere))
    return torch.cat(parts, 1)
