"""Which calls of a run are a prompt's, where several are combined."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .arguments import CallArguments


def conditionings_of(
    guider: Any, num_tokens: int | None, encode: Callable[[], Tensor] | None
) -> frozenset[Any] | None:
    """The uuids of the conditionings that a prompt made; None where there is no choice.

    Of several positive ones that could be the prompt's, those are that ``encode`` makes again, or
    the first one if there is no telling.

    Raises ValueError if none is.
    """
    positive = getattr(guider, "original_conds", {}).get("positive", ())
    texts = {cond["uuid"]: cond.get("cross_attn") for cond in positive if "uuid" in cond}
    if len(texts) < 2:
        return None
    fitting = {
        uuid: text
        for uuid, text in texts.items()
        if num_tokens is None or (text is not None and text.shape[1] == num_tokens)
    }
    if encode is not None and len(fitting) > 1:
        own = encode()
        fitting = {uuid: text for uuid, text in fitting.items() if _is_alike(own, text)}
    elif fitting:
        return frozenset([next(iter(fitting))])
    if not fitting:
        raise ValueError(
            f"TACA: none of the {len(texts)} combined conditionings is of this prompt. Connect the "
            f"CLIP and the prompt that made one of them."
        )
    return frozenset(fitting)


def rows_of(call: CallArguments, uuids: frozenset[Any] | None) -> Tensor:
    """Which rows of a call are the positive prompt's, and of these conditionings; bool ``(b,)``."""
    positive = call.is_positive()
    chunks = call.transformer_options.get("uuids")
    if uuids is None or not chunks:
        return positive
    ours = torch.tensor([uuid in uuids for uuid in chunks], device=positive.device)
    return positive & ours.repeat_interleave(len(positive) // len(chunks))


def _is_alike(own: Tensor, text: Tensor | None) -> bool:
    """Whether they differ by rounding alone."""
    if text is None or own.shape != text.shape:
        return False
    own, text = own.double().cpu(), text.double().cpu()
    return bool((own - text).norm() <= 1e-3 * own.norm())
