"""How much of one block's attention goes to text, and to each word.

Attention is linear in V: the same attention call, with V replaced by columns that are 1 at some
tokens and 0 elsewhere, returns how much of each query's attention goes to those tokens. So it works
with any kernel, no n x n matrix is built, and a sample of the image queries is enough.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .attention import scale_text_keys
from .block import AFTER_HEADS, Trace
from .layouts import TextPlaces
from .spans import Layout, Span, check_num_text
from .swap import Forward
from .word_weights import WordWeights, add_bias, image_bias

QUERIES = 1024
"""The largest number of image queries that are measured, evenly over the picture."""
FRAMES = 4
"""The largest number of a video's frames that are measured."""

Pair = tuple[Tensor, Tensor]
"""The share of the image queries' attention that goes to text: without TACA, as the run had it."""


@dataclass
class Probe:
    """What to measure in one block of one call, and where the results go."""

    asked: Mapping[str, list[int]]  # word -> its tokens in the conditioning
    gamma: Tensor  # of the call's rows, as in this block
    words: WordWeights | None  # of the call's rows
    rows: Tensor  # indices of the rows of the batch that are the positive prompt's
    own_places: Callable[[int], Tensor]  # as ``Family.own_places``
    is_last: bool  # whether they are in the last span of image tokens, and not the first
    text: TextPlaces
    # What was measured: the share of the text; and for each measured row the attention that each
    # place of the picture pays to each word as the run had it, averaged over heads and frames,
    # ``(b, words, rows, columns)``; None without words.
    found: Callable[[Pair, Tensor | None], None]

    def override(
        self,
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
        """An override like ``taca_override``: attends as before, then measures."""
        backend = func if other is None else partial(other, func)
        result = backend(q, k, v, heads, *args, **kwargs)
        kwargs.update(zip(AFTER_HEADS, args, strict=False))
        mask = kwargs.pop("mask", None)
        is_split = kwargs.get("skip_reshape", False)
        dim = 2 if is_split else 1
        num_kept = k.shape[dim] - joint[1]
        if q.shape[dim] == joint[0] and num_kept >= 0:
            layout = (*layout, Span("other", num_kept, is_query=False))
            if not is_split:
                head_dim = q.shape[-1] // heads
                q, k = (x.unflatten(-1, (-1, head_dim)).transpose(1, 2) for x in (q, k))
            how = {**kwargs, "skip_reshape": True, "skip_output_reshape": False}
            self.measure(partial(func, heads=heads, **how), q, k, mask, layout)
        return result

    def places(self, num_image: int) -> Tensor:
        """The image tokens to measure ``(frames, rows, columns)``, evenly over the picture."""
        places = self.own_places(num_image)
        places = places[:: -(-len(places) // FRAMES)]
        stride = 1
        while places[:, ::stride, ::stride].numel() > QUERIES:
            stride += 1
        return places[:, ::stride, ::stride]

    def measure(
        self, attend: Forward, q: Tensor, k: Tensor, mask: Tensor | None, layout: Layout
    ) -> None:
        """Measure the share of text, with plain and with adjusted keys, and the maps of words.

        q and k are ``(b, h, n, d)``.

        Raises ValueError if a word is outside the prompt, or there are more words than this model
        has channels for.
        """
        queries = [span for span in layout if span.is_query]
        starts = accumulate((span.length for span in queries), initial=0)
        images = [pair for pair in zip(queries, starts, strict=False) if pair[0].kind == "image"]
        image, start = images[-1 if self.is_last else 0]
        grid = self.places(image.length)
        places = (grid.flatten() + start).to(q.device)
        kinds = torch.cat([torch.full((length,), kind == "text") for kind, length, _ in layout])
        text = kinds.nonzero().flatten().to(q.device)
        words = {}
        if self.asked:
            check_num_text(layout, self.text.num_text)
            self.check_words(k.shape[-1])
            words = {
                word: [copy[i] for copy in self.text.copies for i in at if i in copy]
                for word, at in self.asked.items()
            }
        rows = self.rows.to(q.device)
        q, k = q[rows].index_select(2, places), k[rows]
        gamma = self.gamma[rows] if len(self.gamma) > 1 else self.gamma
        if mask is not None:
            mask = mask[rows] if mask.ndim > 2 and mask.shape[0] > 1 else mask
            if mask.ndim > 1 and mask.shape[-2] != 1:
                mask = mask.index_select(-2, places)
        # In place of V: column 0 is all of the text, column i the i-th word.
        columns = torch.zeros_like(k)
        columns[:, :, text, 0] = 1
        for i, indices in enumerate(words.values(), 1):
            columns[:, :, text[indices], i] = 1

        def mass(keys: Tensor, mask: Tensor | None) -> Tensor:
            """Attention to each column ``(b, queries, d)``, averaged over heads."""
            out = attend(q, keys, columns, mask=mask)  # (b, queries, h * d)
            return out.float().unflatten(-1, (-1, k.shape[-1])).mean(2)

        plain = mass(k, mask)
        is_adjusted = bool((gamma != 1).any())
        keys, weighed = scale_text_keys(k, gamma, layout, 2) if is_adjusted else k, mask
        if self.words is not None:
            bias = image_bias(self.words.of_rows(rows), layout, q)
            weighed = bias if mask is None else add_bias(mask, bias)
        adjusted = plain if keys is k and weighed is mask else mass(keys, weighed)
        maps = adjusted[..., 1 : len(words) + 1].mT.unflatten(-1, grid.shape).mean(2).cpu()
        shares = plain[..., 0].mean().cpu(), adjusted[..., 0].mean().cpu()
        self.found(shares, maps if words else None)

    def check_words(self, head_dim: int) -> None:
        """Raise ValueError if these words cannot be measured in one attention call."""
        known = self.text.copies[0]
        for word, indices in self.asked.items():
            if lacking := [i for i in indices if i not in known]:
                raise ValueError(
                    f"TACA Attention Report: {word!r} is text token {lacking[-1]}, counted from "
                    f"0, and the prompt has {len(known)}."
                )
        if len(self.asked) >= head_dim:
            raise ValueError(
                f"TACA Attention Report takes at most {head_dim - 1} words on this model: name "
                f"fewer than these {len(self.asked)}."
            )
