"""Whose the rows of a call are: the positive prompt's, or one of several that are combined."""

from collections.abc import Callable
from typing import Any, NamedTuple

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


def _is_alike(own: Tensor, text: Tensor | None) -> bool:
    """Whether they differ by rounding alone."""
    if text is None or own.shape != text.shape:
        return False
    own, text = own.double().cpu(), text.double().cpu()
    return bool((own - text).norm() <= 1e-3 * own.norm())


class Prompts(NamedTuple):
    """The prompts of one run, as its guider has them."""

    guider: Any
    batch: int  # of the run's latents
    limited: frozenset[Any] | None = None  # uuids of the conditionings that TACA Options limits

    def texts(self, uuids: frozenset[Any] | None) -> tuple[list[Any], list[Any]]:
        """ComfyUI's entries of the positive prompt, or those of it with these uuids; all others."""
        own: list[Any] = []
        others: list[Any] = []
        for name, entries in self.guider.conds.items():
            for each in entries:
                is_own = name == "positive" and (uuids is None or each["uuid"] in uuids)
                (own if is_own else others).append(each)
        return own, others

    def repeats(self, call: CallArguments, uuids: frozenset[Any] | None) -> int:
        """How often a call holds the text of these conditionings, one behind the other.

        To join texts of two lengths, ComfyUI repeats each of them.
        """
        own = [each["model_conds"].get("c_crossattn") for each in self.texts(uuids)[0]]
        if call.c_crossattn is None or not own or own[0] is None:
            return 1
        return max(1, call.c_crossattn.shape[1] // max(1, own[0].cond.shape[1]))


def positive_rows(
    call: CallArguments, prompts: Prompts | None, uuids: frozenset[Any] | None = None
) -> Tensor:
    """Which rows of a call are the positive prompt's, bool ``(b,)``; of these conditionings alone.

    ComfyUI tells the prompt of each chunk of the batch. Where a node has put the rows in another
    order, their text tells. Outside a run the first prompt counts as positive, as in core's CFG.

    Raises ValueError if it cannot be known.
    """
    chunks = call.transformer_options.get("cond_or_uncond") or [0]
    if prompts is None:
        positive = torch.tensor([chunk == 0 for chunk in chunks])
        return positive.repeat_interleave(len(call.t) // len(chunks))
    texts = prompts.texts(uuids)
    own, others = ({each["uuid"] for each in kind} for kind in texts)
    told = call.transformer_options.get("uuids", ())
    if len(call.t) == len(told) * prompts.batch and not own & others & set(told):
        return torch.tensor([uuid in own for uuid in told]).repeat_interleave(prompts.batch)
    rows = [] if call.c_crossattn is None else list(call.c_crossattn)
    is_own, is_other = ([_has_text(row, kind) for row in rows] for kind in texts)
    if not rows or any(a == b for a, b in zip(is_own, is_other, strict=True)):
        raise ValueError(
            "TACA cannot tell which rows of the batch are the positive prompt's, since another "
            "node has changed the batch. Take out that node, or TACA Options and the report."
        )
    return torch.tensor(is_own)


def _has_text(row: Tensor, texts: list[dict[str, Any]]) -> bool:
    """Whether a row ``(num_text, channels)`` holds one of these texts.

    To join texts of two lengths, ComfyUI repeats each of them.
    """
    known = (each["model_conds"]["c_crossattn"].cond.to(row) for each in texts)
    return any(torch.equal(row[: one.shape[0]], one) for text in known for one in text)
