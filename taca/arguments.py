"""The arguments of ComfyUI's calls: of a sampling run, and of a model in it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .layouts import CallState

RUN = "noise", "latent_image", "sampler", "sigmas", "denoise_mask", "callback"
"""The first arguments of ``CFGGuider.outer_sample``, in core's order and with core's names."""


def run_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a run by name; ``latent_shapes`` is always among them."""
    given = {**dict(zip(RUN, args, strict=False)), **kwargs}
    return {**given, "latent_shapes": given.get("latent_shapes") or [given["noise"].shape]}


def with_callback(
    args: Sequence[Any], kwargs: Mapping[str, Any], callback: Callable[..., Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a run with another callback, by position if they had one by position."""
    at = RUN.index("callback")
    if len(args) > at:
        return (*args[:at], callback, *args[at + 1 :]), dict(kwargs)
    return tuple(args), {**kwargs, "callback": callback}


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

    @property
    def num_text(self) -> int:
        """Text tokens of the conditioning."""
        return 0 if self.c_crossattn is None else self.c_crossattn.shape[1]

    def initial_state(self) -> CallState:
        """What the arguments show: numbers of text and vision tokens, and the references."""
        seen = self.others.get("clip_fea")
        num_vision = 0 if seen is None else seen.shape[1]
        cached, references = self.others.get("ar_len", 0), self._references()
        return CallState(self.num_text, num_vision, num_cached=cached, references=references)

    def _references(self) -> list[tuple[int, int]]:
        """For each reference: its place in the text, by default the end, and its token count."""
        references = self.others.get("ref_latents") or ()
        slots = [*(self.others.get("image_slots") or ()), *[self.num_text] * len(references)]
        return [(slot, math.prod(each.shape[-2:])) for slot, each in zip(slots, references)]  # noqa: B905
