"""Fitting a LoRA's tensors to a model: which of its parameters they change, and how."""

import copy
import logging
import re
from typing import Any

import comfy.lora
import comfy.lora_convert
import torch
from comfy.model_base import BaseModel
from comfy.weight_adapter import LoHaAdapter, LoKrAdapter, LoRAAdapter, WeightAdapterBase
from torch import Tensor, nn

from .lora import LoRA, LoRADelta, PeftDoRA, Place, Value, is_norm, parts_of, submodule
from .lora_file import PEFT_PREFIX

SUMS = (LoRAAdapter, LoHaAdapter, LoKrAdapter)
"""Adapters that, without DoRA, only add ``h(x)`` to a linear layer's output."""

SCALES = (".alpha", ".reshape_weight")
"""Endings of keys that core reads as numbers; messages do not count them as tensors."""

log = logging.getLogger("taca")


def fit_lora(state: dict[str, Tensor], model: BaseModel, name: str, strength: float) -> LoRA:
    """A LoRA for a model, from a file's tensors under any keys that ComfyUI knows.

    Logs a warning with counts if only some of them fit.

    Raises ValueError if none fits, or a part is missing or holds no usable numbers.
    """
    try:
        state = comfy.lora_convert.convert_lora(state)
        values = _values(state, model)
    except (KeyError, IndexError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{name} is not a whole LoRA: a part is missing or misshapen ({error}). Get it again."
        ) from error
    dora = {id(tensor) for key, tensor in state.items() if key.endswith(".dora_scale")}
    known = model.state_dict().keys()
    deltas: dict[str, list[LoRADelta]] = {}
    used: set[int] = set()
    for key, value in values.items():
        target, *slice_of = key if isinstance(key, tuple) else (key,)
        if target not in known:  # a bias of what has none
            continue
        module_name, _, parameter = target.replace("_orig_mod.", "").rpartition(".")
        module = submodule(model, module_name)
        tensors = _tensors(value)
        _check_numbers(parts_of(value), target, name)
        try:
            value = _flat(value) if hasattr(module, "in_features") else value
        except (RuntimeError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{name} is not a whole LoRA: a part of {target} is missing or misshapen "
                f"({error}). Get it again."
            ) from error
        additive = hasattr(module, "in_features") and _is_sum(value, bool(tensors & dora))
        delta = LoRADelta(Place(parameter, *slice_of), value, strength, additive)
        if _applies(delta, module) and _fits(delta, module):
            _check_weight(delta, module, target, name)
            used |= tensors
            deltas.setdefault(module_name, []).append(delta)
    counted = {key: tensor for key, tensor in state.items() if not key.endswith(SCALES)}
    missed = [key for key, tensor in counted.items() if id(tensor) not in used]
    first = ", ".join(missed[:3])
    if not counted:
        raise ValueError(f"{name} is not a LoRA: it holds no weights. Get it again.")
    if not deltas:
        raise ValueError(
            f"{name} does not fit this model ({type(model).__name__}): none of its {len(counted)} "
            f"tensors has a place here. It is for another model. Its first keys: {first}"
        )
    if missed:
        log.warning(
            "TACA: %d of %d tensors of %s have no place in this model and are left out, for "
            "example %s.",
            len(missed),
            len(counted),
            name,
            first,
        )
    log.info("TACA: %s fits %d modules, strength %g.", name, len(deltas), strength)
    return LoRA(name, strength, deltas)


def _values(state: dict[str, Tensor], model: BaseModel) -> dict[Any, Value]:
    """What a state holds for each parameter of a model, or part of one; keys as core's loader."""
    keys = comfy.lora.model_lora_keys_unet(model, {})
    # The model may be compiled. Core knows PEFT's own prefix for some models only.
    keys = {re.sub(r"_orig_mod[._]", "", key): target for key, target in keys.items()}
    for prefix in ("transformer.", "diffusion_model."):  # of diffusers' model, of ComfyUI's own
        for key, target in list(keys.items()):
            if key.startswith(prefix):
                keys.setdefault(PEFT_PREFIX + key.removeprefix(prefix), target)
    values = comfy.lora.load_lora(state, keys, log_missing=False)
    for key, target in keys.items():  # core knows no bias of a part of a fused layer
        if isinstance(target, tuple) and f"{key}.diff_b" in state:
            part = (re.sub("weight$", "bias", target[0]), *target[1:])
            values[part] = ("diff", (state[f"{key}.diff_b"],))
    for key, value in values.items():
        # Other files' magnitudes have two axes or more.
        if isinstance(value, LoRAAdapter) and getattr(value.weights[4], "ndim", 0) == 1:
            values[key] = PeftDoRA(value.loaded_keys, value.weights)
    return values


def _tensors(value: Value) -> set[int]:
    """The ``id()`` of each tensor of a value."""
    return {id(part) for part in parts_of(value) if isinstance(part, Tensor)}


def _is_sum(value: Value, is_dora: bool) -> bool:
    """Whether a value for a linear layer is only added to its output."""
    if not isinstance(value, WeightAdapterBase):
        return value[0] == "diff"
    return isinstance(value, SUMS) and not is_dora and list not in map(type, value.weights)


def _flat(value: Any) -> Any:
    """An adapter of a linear layer in the form that ``h(x)`` takes: matrices.

    Tensors of convolutions have more axes, and their LoRAs a third tensor between the two. Of a
    LoKr with both factors decomposed, core's merge and ``h(x)`` use the ranks of different factors:
    the merge's counts. One with both factors whole has no rank, and core's merge ignores its alpha;
    ``h(x)`` would divide by it.
    """
    parts: tuple[Any, ...]
    if isinstance(value, LoRAAdapter):
        up, down, alpha, mid, *more = value.weights
        if mid is not None and mid[0, 0].numel() == 1:
            down, mid = mid.float().flatten(1) @ down.float().flatten(1), None
        parts = (up.flatten(1), down.flatten(1), alpha, mid, *more)
    elif isinstance(value, LoHaAdapter) and value.weights[5] is not None:
        w1_a, w1_b, alpha, w2_a, w2_b, t1, t2, *more = value.weights
        parts = (*_untucked(w1_a, w1_b, t1), alpha, *_untucked(w2_a, w2_b, t2), None, None, *more)
    elif isinstance(value, LoKrAdapter):
        w1, w2, alpha, w1_a, w1_b, w2_a, w2_b, t2, *more = value.weights
        if t2 is not None:
            w2_a, w2_b = _untucked(w2_a, w2_b, t2)
            t2 = None
        w2 = None if w2 is None else w2.flatten(1)
        if w1 is None is w2:
            w1, w1_a, w1_b = w1_a.float() @ w1_b.float(), None, None
        elif w1 is not None is not w2:
            alpha = None
        parts = (w1, w2, alpha, w1_a, w1_b, w2_a, w2_b, t2, *more)
    else:
        return value
    flat = copy.copy(value)
    flat.weights = parts
    return flat


def _untucked(a: Tensor, b: Tensor, core: Tensor) -> tuple[Tensor, Tensor]:
    """The two matrices that three tensors of a Tucker decomposition come to, if its kernel is 1."""
    return a.float().T, core.float().flatten(1) @ b.float()


def _check_numbers(parts: Any, target: str, name: str) -> None:
    """Raise ValueError for numbers that are integers, NaN or infinite."""
    for part in parts:
        if not isinstance(part, (float, Tensor)):
            continue
        numbers = torch.as_tensor(part)
        if not numbers.is_floating_point() or not bool(numbers.float().isfinite().all()):
            raise ValueError(
                f"{name} is not a usable LoRA: its {numbers.dtype} numbers for {target} are "
                f"integers, NaN or infinite. Get it again, or take an earlier checkpoint."
            )


def _check_weight(delta: LoRADelta, module: Any, target: str, name: str) -> None:
    """Raise ValueError for a delta that needs a weight which only its layer can unpack (GGUF)."""
    own = getattr(module, delta.place.parameter, None)
    if not delta.additive and (own is None or not own.is_floating_point()):
        raise ValueError(
            f"{name} needs the weights themselves (DoRA, OFT, GLoRA ...), and {target} of this "
            f"model is packed (GGUF). Use the model as bf16 or fp8, or a LoRA without DoRA."
        )


def _applies(delta: LoRADelta, module: nn.Module) -> bool:
    """Whether there is a way to apply a delta to a module while it runs."""
    adjustable = hasattr(module, f"{delta.place.parameter}_function") or is_norm(module)
    return delta.additive or (adjustable and _merges(delta, module))


def _merges(delta: LoRADelta, module: Any) -> bool:
    """Whether core can merge what is no sum: it only logs that it cannot. Tried without numbers."""
    meta = torch.device("meta")
    value, own = delta.value(meta), getattr(module, delta.place.parameter, None)
    if own is None or not isinstance(value, WeightAdapterBase) or value.name in ("oft", "boft"):
        return own is not None  # OFT looks at its numbers
    is_linear = hasattr(module, "in_features")  # of which the weight may be packed
    shape = (module.out_features, module.in_features) if is_linear else own.shape
    errors: list[logging.LogRecord] = []

    def caught(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            errors.append(record)
        return record.levelno < logging.ERROR

    logging.getLogger().addFilter(caught)
    try:
        comfy.lora.calculate_weight([delta.entry(meta)], torch.empty(shape, device=meta), "")
    except (RuntimeError, IndexError):
        return False
    finally:
        logging.getLogger().removeFilter(caught)
    return not errors


def _fits(delta: LoRADelta, module: Any) -> bool:
    """Whether the shapes of a delta fit the module."""
    value, place = delta.value(torch.device("cpu")), delta.place
    own = getattr(module, place.parameter, None)
    if hasattr(module, "in_features"):
        # Not the weight's own shape: it may differ if quantised.
        first, rows = place.rows[1:] if place.rows else (0, module.out_features)
        if first + rows > module.out_features:
            return False  # core's table of parts is for other proportions (Lumina 2's fewer keys)
        if isinstance(value, WeightAdapterBase):
            return _fits_linear(value, rows, module.in_features)
        shape = (rows, module.in_features) if place.parameter == "weight" else (rows,)
        return own is not None and value[1][0].shape == shape
    if own is None:
        return False
    if isinstance(value, LoRAAdapter):
        up, down = (torch.atleast_2d(part).flatten(1) for part in value.weights[:2])
        kernel = 1 if value.weights[3] is None else value.weights[3][0, 0].numel()
        return (up.shape[0], down.shape[1] * kernel) == (own.shape[0], own[0].numel())
    return isinstance(value, WeightAdapterBase) or value[1][0].shape == own.shape


def _fits_linear(adapter: WeightAdapterBase, rows: int, columns: int) -> bool:
    """Whether an adapter fits a matrix ``(rows, columns)``."""
    if adapter.name == "glora":  # a1 a2 and b1 b2, or in older files a2 a1 and b2 b1
        a1, a2, b1, b2 = (part.shape for part in adapter.weights[:4])
        return any(
            (a[0], c[1], b[0], d[1]) == (columns, columns, rows, columns)
            and a[1] == c[0] == b[1] == d[0]
            for a, c, b, d in ((a1, a2, b1, b2), (a2, a1, b2, b1))
        )
    x, y = torch.zeros(1, columns), torch.zeros(1, rows)
    try:
        return bool(adapter.bypass_forward(lambda x: y + 0 * x.sum(), x).shape == y.shape)
    except (RuntimeError, ValueError, IndexError, ZeroDivisionError):
        return False
