"""The TACA LoRA: weights that join the model's inside the window, and only there (Eq. 12).

    W' = W + strength (alpha / r) B A

No stored weight is touched: ``lora_forward.py`` adds the delta in the forward pass. Formats and
arithmetic are ComfyUI's own (``comfy.lora``, ``comfy.weight_adapter``).
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import comfy.model_management
import comfy.model_patcher
import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter import LoRAAdapter, WeightAdapterBase
from torch import Tensor, nn

from .events import Say, silent
from .families import part_of

LORA_KEY = "taca_lora"
Value = Any
"""What ``comfy.lora.load_lora`` gives for a parameter: an adapter, or ``("diff", (delta,))``."""


class Place(NamedTuple):
    """The parameter that a LoRA changes, or rows of it."""

    parameter: str  # "weight" or "bias"
    rows: tuple[int, int, int] | None = None  # (0, start, length): a slice of a fused parameter
    permute: Callable[[Tensor], Tensor] | None = None  # reorders the rows of the delta


class LoRADelta(nn.Module):
    """What a LoRA does to one parameter.

    Its tensors become this module's parameters, so that ComfyUI moves, counts and frees them. If
    ``additive``, it is added to a layer's output, without knowing the weight. The others (norms,
    DoRA, OFT ...) change the weight each time it is used, for that use only.
    """

    def __init__(self, place: Place, value: Value, strength: float, additive: bool) -> None:
        super().__init__()
        self.place, self.strength, self.additive = place, strength, additive
        parts = parts_of(value)
        self._parts = [None if isinstance(part, Tensor) else part for part in parts]
        for i, part in enumerate(parts):
            if isinstance(part, Tensor):
                self.register_parameter(f"tensor{i}", nn.Parameter(part, requires_grad=False))
        self._kind = "" if isinstance(value, WeightAdapterBase) else value[0]
        self._adapter = type(value)(set(), ()) if isinstance(value, WeightAdapterBase) else None
        self._scale: float | None = None  # of B A x, where no adapter is needed to add it
        if self._adapter is not None:
            self._adapter.multiplier = strength
            down, alpha = parts[1:3]
            is_plain = isinstance(value, LoRAAdapter) and place.permute is None and additive
            if is_plain and len(self._parameters) == 2 and down.ndim == 2 and down.numel():
                self._scale = strength * (1.0 if alpha is None else float(alpha) / len(down))

    def cast(self, dtype: torch.dtype) -> None:
        """Cast once to the dtype that a model computes in, before core counts its bytes.

        An adapter computes in the file's own dtype and is left alone.
        """
        if self._scale is not None and dtype.itemsize > 1:
            self.to(dtype)

    def value(self, device: torch.device) -> Value:
        """The value as core's loader gave it, on a device."""
        parts = list(self._parts)
        for name, tensor in self.named_parameters():
            parts[int(name.removeprefix("tensor"))] = tensor.to(device)
        if self._adapter is None:
            return (self._kind, tuple(parts))
        adapter = copy.copy(self._adapter)
        adapter.weights = tuple(parts)
        return adapter

    def entry(self, device: torch.device) -> tuple[Any, ...]:
        """The delta as ``comfy.lora.calculate_weight`` takes it."""
        return (self.strength, self.value(device), 1.0, *self.place[1:])

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """Add to the output y of a linear layer at x, in place.

        y and x are ``(..., out_features)`` and ``(..., in_features)``.
        """
        parameter, rows, permute = self.place
        y = y if rows is None else y.narrow(-1, *rows[1:])
        if self._scale is not None:
            # Without a copy of y's size, and without an adapter: a model has hundreds of layers.
            up: Any = self._parameters["tensor0"]
            down: Any = self._parameters["tensor1"]
            if up.dtype != x.dtype or up.device != x.device:  # see ``cast``; not loaded
                up, down = up.to(x), down.to(x)
            low = F.linear(x, down).flatten(0, -2)
            y.view(-1, y.shape[-1]).addmm_(low, up.T, alpha=self._scale)
            return
        value = self.value(x.device)
        if isinstance(value, WeightAdapterBase):
            delta = value.h(x, y)
        else:
            delta = value[1][0].to(x.dtype) * self.strength
            delta = delta if parameter == "bias" else F.linear(x, delta)
        if permute is not None:
            delta = permute(delta.movedim(-1, 0)).movedim(0, -1)
        y += delta


class PeftDoRA(LoRAAdapter):
    """DoRA by PEFT's rule: each row of ``W + s B A`` gets the length of its magnitude.

    Core's own divides by the lengths of W's rows.
    """

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: Any,
        function: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        up, down, alpha, _, magnitude, *_ = (
            part.to(weight) if isinstance(part, Tensor) else part for part in self.weights
        )
        scale = 1.0 if alpha is None else alpha / len(down)
        delta = scale * up.flatten(1) @ down.flatten(1)
        moved = weight.flatten(1) + function(delta)
        length = moved.norm(dim=1, keepdim=True).clamp_min(torch.finfo(moved.dtype).tiny)
        moved *= function(magnitude[:, None]) / length
        weight += strength * (moved.view(weight.shape) - weight)
        return weight


def parts_of(value: Value) -> Any:
    """The tensors and numbers of a value."""
    return value.weights if isinstance(value, WeightAdapterBase) else value[1]


class LoRA(nn.Module):
    """A LoRA's deltas by the module they change; its name and strength are for messages."""

    def __init__(self, name: str, strength: float, deltas: dict[str, list[LoRADelta]]) -> None:
        super().__init__()
        self.name, self.strength = name, strength
        self.say: Say = silent
        self.module_names = list(deltas)
        self.deltas = nn.ModuleList(nn.ModuleList(each) for each in deltas.values())


def submodule(model: nn.Module, name: str) -> nn.Module:
    """A module by name.

    Raises RuntimeError if there is none: another pack has replaced the model's modules.
    """
    found = part_of(model, name)
    if found is None:
        raise RuntimeError(
            f"Load TACA LoRA does not find {name} in the model as it runs: another node, often "
            f"a cache, has put its own blocks there. Take out that node or Load TACA LoRA."
        )
    return found


def is_norm(module: nn.Module) -> bool:
    """Whether the module is no linear layer, and all its parameters are vectors."""
    own = [each for each in module._parameters.values() if each is not None]
    is_linear = hasattr(module, "in_features")
    return bool(own) and not is_linear and all(each.ndim == 1 for each in own)


def loras_of(patcher: ModelPatcher) -> list[LoRA]:
    """The TACA LoRAs of a model."""
    return [each.model for each in patcher.get_additional_models_with_key(LORA_KEY)]


def patcher_of(lora: LoRA) -> ModelPatcher:
    """A separate patcher for the LoRA, which core loads, counts and frees along with the model's.

    It is of core's own class: a model without dynamic VRAM would make ComfyUI unload all others.
    """
    return _patcher_of(lora, comfy.model_patcher.CoreModelPatcher)


def _patcher_of(lora: LoRA, kind: type[ModelPatcher]) -> ModelPatcher:
    management = comfy.model_management
    patcher = kind(lora, management.get_torch_device(), management.unet_offload_device())
    # With this core makes copies for other devices, or without dynamic VRAM.
    patcher.cached_patcher_init = (_fresh_patcher_of, (lora,))
    return patcher


def _fresh_patcher_of(lora: LoRA, disable_dynamic: bool = False) -> ModelPatcher:
    patcher = comfy.model_patcher
    kind = patcher.ModelPatcher if disable_dynamic else patcher.CoreModelPatcher
    return _patcher_of(copy.deepcopy(lora), kind)
