"""What ComfyUI calls a model with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layouts import CallState


class CallArguments(NamedTuple):
    """The arguments of ``BaseModel.apply_model``."""

    x: Tensor
    sigma: Tensor  # (b,), one for each row
    c_concat: Any
    context: Tensor | None  # the text, (b, num_text, channels)
    control: Any
    options: Mapping[str, Any]  # transformer_options
    others: dict[str, Any]

    @classmethod
    def of(
        cls,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Tensor | None = None,
        control: Any = None,
        transformer_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> CallArguments:
        """By position or by name, in core's order and with core's names."""
        return cls(x, t, c_concat, c_crossattn, control, transformer_options or {}, kwargs)

    def run(self, executor: Any, options: Mapping[str, Any]) -> Tensor:
        """Go on with other options."""
        return executor(*self[:5], options, **self.others)

    def initial_state(self) -> CallState:
        """What the arguments show: the text, and a picture that a vision encoder saw."""
        text, vision = (
            0 if tokens is None else tokens.shape[1]
            for tokens in (self.context, self.others.get("clip_fea"))
        )
        return CallState(text, vision, num_cached=self.others.get("ar_len", 0))

    def is_positive(self) -> Tensor:
        """Which rows are the positive prompt's, bool ``(b,)``: chunk 0 of ``cond_or_uncond``."""
        chunks = self.options.get("cond_or_uncond") or [0]
        positive = torch.tensor([chunk == 0 for chunk in chunks])
        return positive.repeat_interleave(len(self.sigma) // len(chunks))
