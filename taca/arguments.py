"""What ComfyUI calls a model with, and whose rows these are."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layouts import CallState


class CallArguments(NamedTuple):
    """The arguments of ``BaseModel.apply_model``, in core's order and with core's names."""

    x: Tensor
    t: Tensor  # (b,), a sigma for each row
    c_concat: Any = None
    c_crossattn: Tensor | None = None  # the text, (b, num_text, channels)
    control: Any = None
    transformer_options: Mapping[str, Any] = {}
    others: Mapping[str, Any] = {}

    @classmethod
    def of(cls, *args: Any, **kwargs: Any) -> "CallArguments":
        """By position or by name."""
        named = {name: kwargs.pop(name) for name in cls._fields if name in kwargs}
        return cls(*args, **named)._replace(others=kwargs)

    def initial_state(self) -> CallState:
        """What the arguments show: the text, and a picture that a vision encoder saw."""
        text, vision = (
            0 if tokens is None else tokens.shape[1]
            for tokens in (self.c_crossattn, self.others.get("clip_fea"))
        )
        return CallState(text, vision, num_cached=self.others.get("ar_len", 0))


class Prompts(NamedTuple):
    """The prompts of one run, as its guider has them."""

    guider: Any
    batch: int  # of the run's latents

    def texts(self, positive: bool) -> list[dict[str, Any]]:
        """ComfyUI's own entries of the positive prompt, or of all others."""
        named = self.guider.conds.items()
        return [each for name, own in named if (name == "positive") == positive for each in own]


def positive_rows(call: CallArguments, prompts: Prompts | None) -> Tensor:
    """Which rows of a call are the positive prompt's, bool ``(b,)``.

    ComfyUI tells the prompt of each chunk of the batch. Where a node has put the rows in another
    order, their text tells. Outside a run the first prompt counts as positive, as in core's CFG.

    Raises ValueError if it cannot be known.
    """
    chunks = call.transformer_options.get("cond_or_uncond") or [0]
    if prompts is None:
        positive = torch.tensor([chunk == 0 for chunk in chunks])
        return positive.repeat_interleave(len(call.t) // len(chunks))
    own, others = ({each["uuid"] for each in prompts.texts(kind)} for kind in (True, False))
    uuids = call.transformer_options.get("uuids", ())
    if len(call.t) == len(uuids) * prompts.batch and not own & others & set(uuids):
        return torch.tensor([uuid in own for uuid in uuids]).repeat_interleave(prompts.batch)
    rows = [] if call.c_crossattn is None else list(call.c_crossattn)
    is_own, is_other = ([_has_text(row, prompts.texts(k)) for row in rows] for k in (True, False))
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
