"""What a module's forward becomes where a LoRA acts on it."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import comfy.lora
import torch
from comfy.model_base import BaseModel
from torch import Tensor, nn

from .block import Seen
from .lora import LoRA, LoRADelta, submodule
from .swap import Forward, Wrap, looks_like


def lora_swaps(
    loras: list[LoRA], model: BaseModel, ran: Seen, inside: Tensor | None = None
) -> Iterator[tuple[nn.Module, Wrap]]:
    """Each module of the running model that LoRAs change, and a wrap of its forward.

    ``inside`` is bool ``(b,)``: which rows of the batch are inside the window; None for all.
    ``ran`` is told when any of them is called.
    """
    by_module: dict[str, list[Any]] = {}
    for lora in loras:
        for name, deltas in zip(lora.module_names, lora.deltas, strict=True):
            by_module.setdefault(name, []).extend(deltas)  # type: ignore[arg-type]
    for name, own in by_module.items():
        module = submodule(model, name)
        # What is no sum depends on what came before it: as in a merge, all of it in its order.
        changed = {delta.place.parameter for delta in own if not delta.additive}
        if others := [delta for delta in own if delta.place.parameter in changed]:
            wrap = partial(reparametrized_forward, name=name, deltas=others)
            yield module, partial(wrap, module=module, ran=ran, inside=inside)
        for delta in [delta for delta in own if delta.place.parameter not in changed]:
            wrap = partial(additive_forward, delta=delta)
            yield module, partial(wrap, module=module, ran=ran, inside=inside)


def additive_forward(
    forward: Forward, module: nn.Module, ran: Seen, delta: LoRADelta, inside: Tensor | None
) -> Forward:
    """A linear layer's forward, with a delta added to its output."""
    # Another pack's forward may keep what it returns: only a layer's own output is added to.
    is_own = forward == type(module).forward.__get__(module) or hasattr(forward, "taca_lora")

    @looks_like(forward)
    def lora_forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        ran.called = ran.attended = True
        y = forward(x, *args, **kwargs)
        y = y.contiguous() if is_own else y.clone(memory_format=torch.contiguous_format)
        if y.numel():  # an expert may get no tokens
            delta.add_to(y, x, None if inside is None else _rows(inside, x))
        return y

    lora_forward.taca_lora = True  # type: ignore[attr-defined]
    return lora_forward


def reparametrized_forward(
    forward: Forward,
    module: nn.Module,
    ran: Seen,
    name: str,
    deltas: list[LoRADelta],
    inside: Tensor | None,
) -> Forward:
    """A module's forward with changed weights, by ComfyUI's hook on each use of a weight.

    This is for norms, which core's trainer changes, and for all adapters that are not a sum. Some
    families have norms of their own without that hook: their weights are replaced.
    """
    parameters = sorted({delta.place.parameter for delta in deltas})

    @looks_like(forward)
    def lora_forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        ran.called = ran.attended = True
        used = set()

        def adjust(parameter: str, weight: Any) -> Tensor:
            used.add(parameter)
            entries = [d.entry(weight.device) for d in deltas if d.place.parameter == parameter]
            key = f"{name}.{parameter}"
            return comfy.lora.calculate_weight(entries, weight.float().clone(), key).to(weight)

        names = [p for p in parameters if hasattr(module, f"{p}_function")]
        hooks = {parameter: getattr(module, f"{parameter}_function") for parameter in names}
        plain = {p: module._parameters[p] for p in parameters if p not in hooks}
        try:
            for parameter, weight in plain.items():
                adjusted = nn.Parameter(adjust(parameter, weight), requires_grad=False)
                module._parameters[parameter] = adjusted
            for parameter, others in hooks.items():
                setattr(module, f"{parameter}_function", [*others, partial(adjust, parameter)])
            y = forward(x, *args, **kwargs)
        finally:
            module._parameters.update(plain)
            for parameter, others in hooks.items():
                setattr(module, f"{parameter}_function", others)
        if len(used) < len(parameters):
            raise RuntimeError(
                f"TACA LoRA cannot adjust the weight of {name} ({type(module).__name__}). "
                f"Use a model that is not quantised this way, or a LoRA without DoRA, OFT or norms."
            )
        if inside is None:
            return y
        return torch.where(_rows(inside, y), y, forward(x, *args, **kwargs))

    return lora_forward


def _rows(inside: Tensor, x: Tensor) -> Tensor:
    """``inside``, ``(b,)``, with axes to broadcast over x; ValueError if x does not have b rows."""
    if x.shape[0] != inside.shape[0]:
        raise ValueError(
            f"TACA LoRA: a layer got {x.shape[0]} rows for a batch of {inside.shape[0]}, of which "
            f"only some are inside the window. Sample them one by one (batch size 1)."
        )
    return inside.view(-1, *(1,) * (x.ndim - 1))
