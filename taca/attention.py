"""Temperature-adjusted joint attention (TACA, arXiv 2506.07986, Eq. 10). Pure torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
"""Plain attention of any backend: ``(q, k, v, mask) -> output``."""


Kind = Literal["text", "image", "other"]


class Span(NamedTuple):
    """Consecutive tokens of one kind in a joint sequence.

    Parameters
    ----------
    kind : str
        Logits are scaled where an ``"image"`` query meets a ``"text"`` key. ``"other"`` tokens,
        such as registers, are neither.
    length : int
        How many tokens.
    asks : bool
        Whether they are queries too. A model that keeps the keys of its text from step to step
        asks with the others alone.
    """

    kind: Kind
    length: int
    asks: bool = True


Tokens = Sequence[Span]
"""A whole joint sequence, in its order."""


def attends_over(tokens: Tokens, q: Tensor, k: Tensor, dim: int) -> bool:
    """Whether an attention is the one over these tokens, by its lengths."""
    asking = sum(span.length for span in tokens if span.asks)
    return q.shape[dim] == asking and k.shape[dim] == sum(span.length for span in tokens)


def temperature_adjusted_attention(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma: Tensor,
    tokens: Tokens,
    mask: Tensor | None = None,
    dim: int = 2,
    out_dim: int = 2,
) -> Tensor:
    """Joint attention whose image-query x text-key logits are multiplied by gamma (Eq. 10).

    Scaling a key scales every logit it takes part in, so the queries are split: image queries
    attend to ``[gamma * K_text ; K_image]``, all others to K as it is. Each query still has one
    softmax over all keys, hence this equals Eq. 10 to rounding, with the operations of one plain
    attention, any kernel, and no N x N matrix of our own.

    Parameters
    ----------
    attend : Attend
        Plain attention.
    q, k, v : Tensor
        ``(B, heads, N, D)`` with ``dim=2`` or ``(B, N, heads * D)`` with ``dim=1``, after QK-norm
        and RoPE; k and v may have fewer heads (grouped queries), q only those tokens that ask.
    gamma : Tensor
        ``(1,)`` or ``(B,)``, float32: one factor for all rows of the batch, or one for each; or
        ``(1, T)`` or ``(B, T)``: one for each of the T text tokens too.
    tokens : Tokens
        What the N tokens of k are.
    mask : Tensor, optional
        Anything that broadcasts to ``(..., N, N)``; its query axis may be 1.
    dim, out_dim : int
        The token axis of q, k and v, and of what ``attend`` returns.

    Returns
    -------
    Tensor
        What ``attend(q, k, v, mask)`` would return in shape and dtype.

    Raises
    ------
    ValueError
        If gamma has neither one entry nor one per row of k, or not one per text token; or if
        ``attend`` does not answer each query.
    """
    text = sum(span.length for span in tokens if span.kind == "text")
    if gamma.shape[0] not in (1, k.shape[0]) or gamma.shape[1:] not in ((), (text,)):
        raise ValueError(
            f"TACA has gamma of shape {tuple(gamma.shape)} for an attention of {k.shape[0]} rows "
            f"and {text} text tokens."
        )
    asking = [span for span in tokens if span.asks]
    lengths = [span.length for span in asking]
    is_image = [span.kind == "image" for span in asking]
    queries = q.split(lengths, dim)
    masks = _split_queries(mask, lengths)

    outputs: list[Tensor] = [q] * len(asking)
    for image in (True, False):
        spans = [i for i in range(len(asking)) if is_image[i] == image]
        if spans:
            rows = _join([queries[i] for i in spans], dim)
            mask_rows = mask if masks is None else _join([masks[i] for i in spans], -2)
            if image:
                output = _attend_to_scaled(attend, rows, k, v, mask_rows, gamma, tokens, dim)
            else:
                output = attend(rows, k, v, mask_rows)
            if output.shape[out_dim] != rows.shape[dim]:
                raise ValueError(
                    f"TACA lets the image's queries attend apart from the text's, and the "
                    f"attention kernel of this model answers {rows.shape[dim]} queries with "
                    f"{output.shape[out_dim]} rows: it takes as many queries as keys for granted. "
                    f"A node chose that kernel: take that node out, or TACA Patch Model."
                )
            for i, piece in zip(
                spans, output.split([lengths[i] for i in spans], out_dim), strict=True
            ):
                outputs[i] = piece
    return torch.cat(outputs, out_dim)


def scale_text(k: Tensor, gamma: Tensor, tokens: Tokens, dim: int) -> Tensor:
    """A copy of K with its text keys multiplied by gamma."""
    scaled = k.clone()
    for keys, factor in _text_keys(scaled, gamma, tokens, dim):
        keys.mul_(factor)
    return scaled


def _text_keys(k: Tensor, gamma: Tensor, tokens: Tokens,
               dim: int) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Views of K's text keys, span by span, and what to multiply them by.

    1.2 is 1.203 in bfloat16: a float32 gamma that has axes makes torch multiply in float32, and
    the product alone is rounded to K's dtype.
    """
    start = done = 0
    for span in tokens:
        if span.kind == "text":
            factor = gamma[:, done : done + span.length] if gamma.ndim == 2 else gamma[:, None]
            done += span.length
            factor = factor.view(factor.shape[0], *(1,) * (dim - 1), factor.shape[1], 1)
            yield k.narrow(dim, start, span.length), factor
        start += span.length


def _attend_to_scaled(attend: Attend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
                      gamma: Tensor, tokens: Tokens, dim: int) -> Tensor:  # fmt: skip
    """``attend`` to K with scaled text keys.

    A copy of K costs more than all the rest of TACA. So the text keys are scaled where they lie
    and put back afterwards, to the bit, where nothing else can see it.
    """
    if not _is_alone(k, q, v):
        return attend(q, scale_text(k, gamma, tokens, dim), v, mask)
    text = list(_text_keys(k, gamma, tokens, dim))
    own = [keys.clone() for keys, _ in text]
    try:
        for keys, factor in text:
            keys.mul_(factor)
        return attend(q, k, v, mask)
    finally:
        for (keys, _), before in zip(text, own, strict=True):
            keys.copy_(before)


def _is_alone(k: Tensor, q: Tensor, v: Tensor) -> bool:
    """Whether K can be changed during one attention without anything else seeing it.

    Not in a graph that is being traced, for the copy is fused there; not where autograd may want
    K, as of an inference tensor it cannot; not where K's memory is also q's or v's, or that of
    two keys. On CPUs and CUDA, where this is known to be right.
    """
    return (
        not torch.compiler.is_compiling()
        and torch.is_inference_mode_enabled()
        and k.is_inference()
        and type(k) is Tensor
        and k.device.type in ("cpu", "cuda")
        and 0 not in k.stride()
        and all(k.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() for x in (q, v))
    )


def _split_queries(mask: Tensor | None, lengths: list[int]) -> Sequence[Tensor] | None:
    """The mask's rows for each span of queries; None for a mask that is alike for all queries."""
    if mask is None or mask.ndim < 2 or mask.shape[-2] == 1:
        return None
    return mask.split(lengths, -2)


def _join(pieces: list[Tensor], dim: int) -> Tensor:
    """The pieces in one tensor; a lone piece stays the view it is."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
