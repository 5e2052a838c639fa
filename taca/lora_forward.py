"""What a module's forward becomes while LoRAs act on it."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import comfy.lora
import torch
from torch import Tensor, nn

from .lora import LoRATarget
from .swap import Forward, Wrap, looks_like


def lora_swaps(
    targets: list[LoRATarget], inside: Tensor | None = None
) -> Iterator[tuple[nn.Module, Wrap]]:
    """Each target and the wraps of its forward.

    ``inside`` is bool ``(b,)``: which rows of the batch are inside the window; None for all.
    """
    for target in targets:
        if target.reparametrized:
            yield target.module, partial(reparametrized_forward, target=target, inside=inside)
        if target.additive:
            yield target.module, partial(additive_forward, target=target, inside=inside)


def additive_forward(forward: Forward, target: LoRATarget, inside: Tensor | None) -> Forward:
    """A linear layer's output, and what the deltas add to it."""

    @looks_like(forward)
    def lora_forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = forward(x, *args, **kwargs).contiguous()  # as linear layers give it
        rows = None if inside is None else _rows(inside, x)
        for delta in target.additive:
            delta.add_to(y, x, rows)
        return y

    return lora_forward


def reparametrized_forward(forward: Forward, target: LoRATarget, inside: Tensor | None) -> Forward:
    """A module's output with other weights, by ComfyUI's hook for a weight's one use.

    Norms need this, which core's trainer changes, and every adapter that is not a sum.
    """
    module, deltas = target.module, target.reparametrized
    parameters = sorted({delta.place.parameter for delta in deltas})

    @looks_like(forward)
    def lora_forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        used = set()

        def adjust(parameter: str, weight: Tensor) -> Tensor:
            used.add(parameter)
            entries = [d.entry(weight.device) for d in deltas if d.place.parameter == parameter]
            key = f"{target.name}.{parameter}"
            return comfy.lora.calculate_weight(entries, weight.float().clone(), key).to(weight)

        hooks = {parameter: getattr(module, f"{parameter}_function") for parameter in parameters}
        try:
            for parameter, others in hooks.items():
                setattr(module, f"{parameter}_function", [*others, partial(adjust, parameter)])
            y = forward(x, *args, **kwargs)
        finally:
            for parameter, others in hooks.items():
                setattr(module, f"{parameter}_function", others)
        if len(used) < len(parameters):
            raise RuntimeError(
                f"TACA LoRA: the weight of {target.name} ({type(module).__name__}) cannot be "
                f"adjusted as this LoRA asks. Use it on a model that is not quantised this way, or "
                f"a LoRA without DoRA, OFT or changes of norms."
            )
        if inside is None:
            return y
        return torch.where(_rows(inside, y), y, forward(x, *args, **kwargs))

    return lora_forward


def _rows(inside: Tensor, x: Tensor) -> Tensor:
    """``inside`` such that it broadcasts over x; an error if x has other rows than the batch."""
    if x.shape[0] != inside.shape[0]:
        raise ValueError(
            f"TACA LoRA: a layer works on {x.shape[0]} rows at once, {inside.shape[0]} of the "
            f"batch, of which only some are inside the window. Sample them one by one (batch size "
            f"1)."
        )
    return inside.view(-1, *(1,) * (x.ndim - 1))
