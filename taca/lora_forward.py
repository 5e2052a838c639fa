"""What is swapped in a module where a LoRA acts on it."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import comfy.lora
import torch
from comfy.model_base import BaseModel
from torch import Tensor, nn

from .block import Trace
from .lora import LoRA, LoRADelta, is_norm, submodule
from .swap import Forward, Swap, looks_like

Adjust = Callable[[Tensor], Tensor]
"""A parameter -> what it is inside the window."""


def lora_swaps(loras: list[LoRA], model: BaseModel, trace: Trace) -> Iterator[Swap]:
    """What LoRAs swap in the running model; ``trace`` is told when a layer of theirs is called."""
    by_module: dict[str, list[Any]] = {}
    for lora in loras:
        for name, deltas in zip(lora.module_names, lora.deltas, strict=True):
            by_module.setdefault(name, []).extend(deltas)  # type: ignore[arg-type]
    for name, own in by_module.items():
        module = submodule(model, name)
        # What is no sum depends on what came before it: as in a merge, all of it in its order.
        changed = sorted({delta.place.parameter for delta in own if not delta.additive})
        adjust: dict[str, Adjust] = {
            p: partial(adjusted, name, [delta for delta in own if delta.place.parameter == p], p)
            for p in changed
        }
        if is_norm(module):
            yield from norm_swaps(module, adjust, trace)
        elif adjust:
            wrap = partial(
                reparametrized_forward, module=module, trace=trace, name=name, adjust=adjust
            )
            yield module, "forward", wrap
        for delta in [delta for delta in own if delta.place.parameter not in changed]:
            wrap = partial(additive_forward, module=module, trace=trace, delta=delta)
            yield module, "forward", wrap


def adjusted(name: str, deltas: list[LoRADelta], parameter: str, weight: Tensor) -> Tensor:
    """A parameter of the module of this name with deltas, by core's merge in float32."""
    entries = [delta.entry(weight.device) for delta in deltas]
    key = f"{name}.{parameter}"
    return comfy.lora.calculate_weight(entries, weight.float().clone(), key).to(weight)


def norm_swaps(module: nn.Module, adjust: dict[str, Adjust], trace: Trace) -> Iterator[Swap]:
    """What is swapped in a norm for the length of a call.

    ComfyUI's hook on each use of a weight; some families use a norm's weight in a fused kernel
    and never call the norm. Norms without that hook get other weights.
    """

    def hooked(others: list[Any], own: Adjust) -> list[Any]:
        def use(weight: Tensor) -> Tensor:
            trace.called = trace.attended = True
            return own(weight)

        return [*others, use]

    def hiding(weight: Tensor, own: Adjust) -> Tensor:
        return own(weight.float())

    def traced(forward: Forward) -> Forward:
        @looks_like(forward)
        def lora_forward(*args: Any, **kwargs: Any) -> Any:
            trace.called = trace.attended = True
            return forward(*args, **kwargs)

        return lora_forward

    for parameter, own in adjust.items():
        if hasattr(module, f"{parameter}_function"):
            yield module, f"{parameter}_function", partial(hooked, own=own)
        else:
            # An attribute hides the parameter. In float32, which float8 would round.
            yield module, parameter, partial(hiding, own=own)
            yield module, "forward", traced


def additive_forward(forward: Forward, module: Any, trace: Trace, delta: LoRADelta) -> Forward:
    """A linear layer's forward, with a delta added to its output."""
    # Another pack's forward may keep what it returns: only a layer's own output is added to.
    is_own = forward == type(module).forward.__get__(module) or hasattr(forward, "taca_lora")

    @looks_like(forward)
    def lora_forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        trace.called = trace.attended = True
        y = forward(x, *args, **kwargs)
        y = y.contiguous() if is_own else y.clone(memory_format=torch.contiguous_format)
        if y.numel():  # an expert may get no tokens
            if x.shape[-1] != module.in_features:  # a Control LoRA, which core merges, adds inputs
                x = x[..., : module.in_features]
            delta.add_to(y, x)
        return y

    lora_forward.taca_lora = True  # type: ignore[attr-defined]
    return lora_forward


def reparametrized_forward(
    forward: Forward, module: nn.Module, trace: Trace, name: str, adjust: dict[str, Adjust]
) -> Forward:
    """A module's forward with changed weights, by ComfyUI's hook on each use of a weight.

    This is for all adapters that are not a sum.
    """

    @looks_like(forward)
    def lora_forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        trace.called = trace.attended = True
        used = set()

        def use(parameter: str, weight: Tensor) -> Tensor:
            used.add(parameter)
            return adjust[parameter](weight)

        hooks = {parameter: getattr(module, f"{parameter}_function") for parameter in adjust}
        try:
            for parameter, others in hooks.items():
                setattr(module, f"{parameter}_function", [*others, partial(use, parameter)])
            y = forward(x, *args, **kwargs)
        finally:
            for parameter, others in hooks.items():
                setattr(module, f"{parameter}_function", others)
        if len(used) < len(adjust):
            raise RuntimeError(
                f"TACA LoRA cannot adjust the weight of {name} ({type(module).__name__}). "
                f"Use a model that is not quantised this way, or a LoRA without DoRA, OFT or norms."
            )
        return y

    return lora_forward
