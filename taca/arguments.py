"""What ComfyUI calls a model with."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

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
        cached = self.others.get("ar_len", 0)
        return CallState(text, vision, num_cached=cached, references=self._references(text))

    def _references(self, text: int) -> list[tuple[int, int]]:
        """Where each reference stands in the text, behind it if nothing says so; and its tokens."""
        references = self.others.get("ref_latents") or ()
        slots = [*(self.others.get("image_slots") or ()), *[text] * len(references)]
        return [(slot, math.prod(each.shape[-2:])) for slot, each in zip(slots, references)]  # noqa: B905
