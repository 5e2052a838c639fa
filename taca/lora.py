"""The TACA LoRA: weights that join the model's inside the window, and only there (Eq. 12).

No stored weight is touched. Inside the window a linear layer computes
``W x + strength (alpha / r) B A x``, or the like for any adapter that is a sum; for norms, and for
adapters that are none (DoRA, OFT ...), the weight is adjusted for the length of its one use. Keys,
formats and arithmetic are ComfyUI's own (``comfy.lora``, ``comfy.weight_adapter``).
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import comfy.lora
import comfy.lora_convert
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.weight_adapter import LoHaAdapter, LoKrAdapter, LoRAAdapter, WeightAdapterBase
from torch import Tensor, nn

from .families import uncompiled

SUMS = (LoRAAdapter, LoHaAdapter, LoKrAdapter)
"""Adapters whose ``h(x)`` is all they do: without DoRA they add to a linear layer's output."""

log = logging.getLogger("taca")


def read_lora(path: str) -> dict[str, Tensor]:
    """The tensors of a LoRA file, with the alpha that PEFT keeps in the file's metadata.

    Raises
    ------
    ValueError
        If it is no safetensors file, or a broken one.
    """
    name = Path(path).name
    if not name.endswith((".safetensors", ".sft")):
        raise ValueError(
            f"TACA does not open {name}: only safetensors files are read, for any other kind can "
            f"run code when it is opened. Convert it to safetensors, or get it in that format."
        )
    try:
        state, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
        return _with_alphas(state, metadata or {})
    except Exception as error:
        raise ValueError(
            f"{name} cannot be read: it is damaged, or its download was cut short. Get it again. "
            f"({error})"
        ) from error


def _with_alphas(state: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, Tensor]:
    """The alpha of PEFT's configuration, where ComfyUI looks for it: among the tensors."""
    config = json.loads(metadata.get("lora_adapter_metadata") or "{}")
    config = {key.removeprefix("transformer."): value for key, value in config.items()}
    if "lora_alpha" not in config:
        return state
    alphas = {}
    for key in state:
        base, down, _ = key.partition(".lora_A.")
        if down and f"{base}.alpha" not in state:
            pattern = config.get("alpha_pattern") or {}
            alpha = next((a for name, a in pattern.items() if base.endswith(name)), None)
            alphas[f"{base}.alpha"] = torch.tensor(float(alpha or config["lora_alpha"]))
    return state | alphas


class Patch(nn.Module):
    """What a LoRA does to one parameter, or to some rows of it.

    Parameters
    ----------
    parameter : str
        ``"weight"`` or ``"bias"``.
    rows : (int, int, int), optional
        ``(0, start, length)``, where it is a slice of a fused parameter.
    permute : callable, optional
        Reorders the rows of the difference.
    value : WeightAdapterBase or tuple
        As ``comfy.lora.load_lora`` gives it. Its tensors become this module's parameters, so that
        ComfyUI moves, counts and frees them.
    strength : float
        Factor of the whole.
    is_sum : bool
        Whether it adds to the module's output, so that the weight need not be known.
    """

    tensor0: Tensor
    tensor1: Tensor

    def __init__(self, parameter: str, rows: tuple[int, int, int] | None,
                 permute: Callable[[Tensor], Tensor] | None, value: Any, strength: float,
                 is_sum: bool) -> None:  # fmt: skip
        super().__init__()
        self.parameter, self.rows, self.permute = parameter, rows, permute
        self.strength, self.is_sum = strength, is_sum
        self._like = value
        parts = value.weights if isinstance(value, WeightAdapterBase) else value[1]
        self._parts = [None if isinstance(part, Tensor) else part for part in parts]
        for i, part in enumerate(parts):
            if isinstance(part, Tensor):
                self.register_parameter(f"tensor{i}", nn.Parameter(part, requires_grad=False))
        self._scale: float | None = None  # of B A x, where no adapter is needed to add it
        if isinstance(value, WeightAdapterBase):
            self._like = type(value)(set(), ())
            self._like.multiplier = strength
            down, alpha = parts[1:3]
            is_plain = isinstance(value, LoRAAdapter) and permute is None and is_sum
            if is_plain and down.ndim == 2 and down.numel():
                self._scale = strength * (1.0 if alpha is None else float(alpha) / len(down))

    def value(self, device: torch.device) -> Any:
        """The adapter or the difference, on a device."""
        parts = list(self._parts)
        for name, tensor in self.named_parameters():
            parts[int(name.removeprefix("tensor"))] = tensor.to(device)
        if not isinstance(self._like, WeightAdapterBase):
            return (self._like[0], tuple(parts))
        adapter = copy.copy(self._like)
        adapter.weights = tuple(parts)
        return adapter

    def entry(self, device: torch.device) -> tuple[Any, ...]:
        """As ``comfy.lora.calculate_weight`` takes it."""
        return (self.strength, self.value(device), 1.0, self.rows, self.permute)

    def add_to(self, y: Tensor, x: Tensor, inside: Tensor | None) -> None:
        """Add to these rows of the output y of a linear layer at x, in place.

        Parameters
        ----------
        y, x : Tensor
            ``(B, ..., rows)`` and ``(B, ..., in_features)``.
        inside : Tensor, optional
            bool ``(B,)``: which of the batch is inside the window; by default all.
        """
        if self._scale is not None and inside is None:
            # W x + strength (alpha / r) B A x, without a copy of y's size, and without building an
            # adapter: a model has hundreds of such layers.
            up, down = self.tensor0.to(x), self.tensor1.to(x)
            low = F.linear(x, down).flatten(0, -2)
            y.view(-1, y.shape[-1]).addmm_(low, up.T, alpha=self._scale)
            return
        value = self.value(x.device)
        if isinstance(value, WeightAdapterBase):
            delta = value.h(x, y)
        else:
            difference = value[1][0].to(x.dtype) * self.strength
            delta = difference if self.parameter == "bias" else F.linear(x, difference)
        if self.permute is not None:
            delta = self.permute(delta.movedim(-1, 0)).movedim(0, -1)
        if inside is not None:
            delta = delta * _per_row(inside, x).to(delta.dtype)
        y += delta


class LoRA(nn.Module):
    """A LoRA's patches, by the name of the module that they are for.

    Parameters
    ----------
    name : str
        The file's, for messages.
    strength : float
        Its factor, for messages.
    patches : dict
        Name of a module of the model -> its patches.
    """

    def __init__(self, name: str, strength: float, patches: dict[str, list[Patch]]) -> None:
        super().__init__()
        self.name, self.strength = name, strength
        self.module_names = list(patches)
        self.patches = nn.ModuleList(nn.ModuleList(each) for each in patches.values())

    def by_module(self) -> dict[str, list[Patch]]:
        """Name of a module of the model -> its patches."""
        return {
            name: list(patches)  # type: ignore[call-overload]
            for name, patches in zip(self.module_names, self.patches, strict=True)
        }


def fit_lora(state: dict[str, Tensor], model: Any, name: str, strength: float) -> LoRA:
    """A LoRA for a model.

    Parameters
    ----------
    state : dict
        The file's tensors: in the keys of diffusers, PEFT, kohya, OneTrainer, ai-toolkit ...
    model : comfy.model_base.BaseModel
        Only looked at.

    Raises
    ------
    ValueError
        If nothing of it fits, or a part is missing or holds no usable numbers. What fits in part is
        a warning with counts.
    """
    keys = comfy.lora.model_lora_keys_unet(model, {})
    try:
        state = comfy.lora_convert.convert_lora(state)
        state = {_without_peft_prefix(key, keys): tensor for key, tensor in state.items()}
        loaded = comfy.lora.load_lora(state, keys, log_missing=False)
    except (KeyError, IndexError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{name} is no whole LoRA: a part of it is missing or has an impossible shape "
            f"({error}). Get it again."
        ) from error
    dora = {id(t) for key, t in state.items() if key.endswith(".dora_scale")}
    patches: dict[str, list[Patch]] = {}
    used: set[int] = set()
    for key, value in loaded.items():
        target, rows, permute = (*key, None)[:3] if isinstance(key, tuple) else (key, None, None)
        module_name, _, parameter = target.rpartition(".")
        parts = value.weights if isinstance(value, WeightAdapterBase) else value[1]
        _check_numbers(parts, target, name)
        tensors = {id(part) for part in parts if isinstance(part, Tensor)}
        module = submodule(model, module_name)
        is_linear = hasattr(module, "in_features")
        is_sum = is_linear and (
            isinstance(value, SUMS) and not tensors & dora and list not in map(type, parts)
            if isinstance(value, WeightAdapterBase)
            else value[0] == "diff"
        )  # fmt: skip
        patch = Patch(parameter, rows, permute, value, strength, is_sum)
        if not (is_sum or hasattr(module, "weight_function")) or not _fits(patch, module):
            continue
        used |= tensors
        patches.setdefault(module_name, []).append(patch)
    scales = (".alpha", ".dora_scale", ".reshape_weight")
    missed = [k for k, t in state.items() if id(t) not in used and not k.endswith(scales)]
    total = sum(not k.endswith(scales) for k in state)
    if not patches:
        raise ValueError(
            f"{name} does not fit this model ({type(model).__name__}): none of its {total} tensors "
            f"has a place here. It is for another model. Its first keys: {', '.join(missed[:3])}"
        )
    if missed:
        log.warning("TACA: %d of %d tensors of %s have no place in this model and are left out, "
                    "for example %s.", len(missed), total, name, ", ".join(missed[:3]))  # fmt: skip
    log.info("TACA: %s fits %d modules, strength %g.", name, len(patches), strength)
    return LoRA(name, strength, patches)


def _check_numbers(parts: Any, target: str, name: str) -> None:
    """Refuse what would turn every picture black, or mean something else than it says."""
    for part in parts:
        if isinstance(part, float) or (isinstance(part, Tensor) and part.is_floating_point()):
            usable = bool(torch.as_tensor(part).float().isfinite().all())
        else:
            usable = not isinstance(part, Tensor)
        if not usable:
            what = f"{part.dtype} tensors" if isinstance(part, Tensor) else str(part)
            raise ValueError(
                f"{name} is no usable LoRA: for {target} it holds {what} with numbers that are not "
                f"finite, or that are no floating-point numbers. Its training went wrong, or the "
                f"file is damaged: get it again, or take an earlier checkpoint."
            )


def _without_peft_prefix(key: str, keys: dict[str, Any]) -> str:
    """PEFT's own files say ``base_model.model.``, which ComfyUI knows of some models only."""
    bare = key.removeprefix("base_model.model.")
    if bare == key or key.rpartition(".lora_")[0] in keys:
        return key
    return f"transformer.{bare}"


def _fits(patch: Patch, module: Any) -> bool:
    """Whether its shapes are the module's."""
    value = patch.value(torch.device("cpu"))
    if not hasattr(module, "in_features"):
        own = getattr(module, patch.parameter, None)
        if own is None:
            return False
        if isinstance(value, LoRAAdapter):
            up, down = (part.flatten(1) for part in value.weights[:2])
            return (up.shape[0], down.shape[1]) == (own.shape[0], own[0].numel())
        return isinstance(value, WeightAdapterBase) or value[1][0].shape == own.shape
    # A quantised weight's own shape may be another.
    rows = patch.rows[2] if patch.rows else module.out_features
    if isinstance(value, WeightAdapterBase):
        x, y = torch.zeros(1, module.in_features), torch.zeros(1, rows)
        try:
            return bool(value.bypass_forward(lambda x: y + 0 * x.sum(), x).shape == y.shape)
        except (RuntimeError, ValueError, IndexError, ZeroDivisionError):
            return False
    shape = (rows, module.in_features) if patch.parameter == "weight" else (rows,)
    return getattr(module, patch.parameter) is not None and value[1][0].shape == shape


def submodule(model: nn.Module, name: str) -> nn.Module:
    """A module by name, through whatever torch.compile has wrapped.

    Raises
    ------
    RuntimeError
        If there is none, for another pack has put modules of its own in the place of the model's.
    """
    for part in name.split("."):
        found = getattr(uncompiled(model), part, None)
        if found is None:
            raise RuntimeError(
                f"Load TACA LoRA does not find {name} in the model as it runs: another node has "
                f"put blocks of its own in its place, as caches by the first block do. Take that "
                f"node out, or Load TACA LoRA."
            )
        model = found
    return uncompiled(model)


Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
"""A module's forward -> what runs in its place."""


def remembering(wrap: Wrap) -> Wrap:
    """``wrap``, made once for the forward that it was last given."""
    of: Callable[..., Any] | None = None
    made: Callable[..., Any] | None = None

    def wrap_once(forward: Callable[..., Any]) -> Callable[..., Any]:
        nonlocal of, made
        if made is None or forward != of:
            of, made = forward, wrap(forward)
        return made

    return wrap_once


class Target(NamedTuple):
    """A module that LoRAs change: what they add to its output, and to its weights."""

    module: nn.Module
    name: str
    sums: list[Patch]
    others: list[Patch]


def lora_targets(loras: list[LoRA], model: nn.Module) -> Iterator[Target]:
    """Each module that LoRAs change.

    Parameters
    ----------
    loras : list of LoRA
        All that are on the model.
    model : comfy.model_base.BaseModel
        The model that is running.
    """
    patches: dict[str, list[Patch]] = {}
    for lora in loras:
        for name, each in lora.by_module().items():
            patches.setdefault(name, []).extend(each)
    for name, each in patches.items():
        sums = [patch for patch in each if patch.is_sum]
        others = [patch for patch in each if not patch.is_sum]
        yield Target(submodule(model, name), name, sums, others)


def lora_forwards(targets: list[Target],
                  inside: Tensor | None) -> Iterator[tuple[nn.Module, Wrap]]:  # fmt: skip
    """Each of these modules, and what its forward becomes.

    Parameters
    ----------
    targets : list of Target
        Of one model.
    inside : Tensor, optional
        bool ``(B,)``: which rows of the batch are inside the window; by default all.
    """
    for module, name, sums, others in targets:
        if others:
            yield module, _adjusted(module, name, others, inside)
        if sums:
            yield module, _summed(sums, inside)


def _summed(patches: list[Patch], rows: Tensor | None) -> Wrap:
    """A linear layer's output, and what the patches add to it."""

    def wrap(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def lora_forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y = forward(x, *args, **kwargs).contiguous()  # as linear layers give it
            for patch in patches:
                patch.add_to(y if patch.rows is None else y.narrow(-1, *patch.rows[1:]), x, rows)
            return y

        return lora_forward

    return wrap


def _per_row(rows: Tensor, x: Tensor) -> Tensor:
    if x.shape[0] != rows.shape[0]:
        raise ValueError(
            f"TACA LoRA: a layer works on {x.shape[0]} rows at once, {rows.shape[0]} of the batch, "
            f"of which only some are inside the window. Sample them one by one (batch size 1)."
        )
    return rows.view(-1, *(1,) * (x.ndim - 1))


def _adjusted(module: nn.Module, name: str, patches: list[Patch], rows: Tensor | None) -> Wrap:
    """A module's output with adjusted weights, by ComfyUI's hook for a weight's one use."""

    def wrap(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def lora_forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            used = []

            def adjust(weight: Tensor, parameter: str) -> Tensor:
                used.append(parameter)
                entries = [p.entry(weight.device) for p in patches if p.parameter == parameter]
                full = comfy.lora.calculate_weight(
                    entries, weight.float().clone(), f"{name}.{parameter}"
                )
                return full.to(weight.dtype)

            wanted = {patch.parameter for patch in patches}
            before = {p: getattr(module, f"{p}_function") for p in wanted}
            try:
                for p in wanted:
                    setattr(module, f"{p}_function",
                            [*before[p], lambda weight, p=p: adjust(weight, p)])  # fmt: skip
                y = forward(x, *args, **kwargs)
            finally:
                for p in wanted:
                    setattr(module, f"{p}_function", before[p])
            if not wanted <= set(used):
                raise RuntimeError(
                    f"TACA LoRA: the weight of {name} ({type(module).__name__}) cannot be adjusted "
                    f"as this LoRA asks. Use it on a model that is not quantised this way, or a "
                    f"LoRA without DoRA, OFT or changes of norms."
                )
            if rows is None:
                return y
            return torch.where(_per_row(rows, y), y, forward(x, *args, **kwargs))

        return lora_forward

    return wrap


def patcher_of(lora: LoRA) -> Any:
    """A patcher of its own for the LoRA: loaded, counted and freed beside the model's."""
    patcher = comfy.model_patcher.ModelPatcher(
        lora,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    # From this core makes the copy for a further device.
    patcher.cached_patcher_init = (_fresh_patcher_of, (lora,))
    return patcher


def _fresh_patcher_of(lora: LoRA, disable_dynamic: bool = False) -> Any:
    return patcher_of(copy.deepcopy(lora))
