"""Reading a LoRA file and fitting it to a model."""

import copy
import json
import logging
import re
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.utils
import torch
from comfy.model_base import BaseModel
from comfy.weight_adapter import LoHaAdapter, LoKrAdapter, LoRAAdapter, WeightAdapterBase
from torch import Tensor

from .lora import LoRA, LoRADelta, PeftDoRA, Place, is_norm, parts_of, submodule

SUMS = (LoRAAdapter, LoHaAdapter, LoKrAdapter)
"""Adapters that, without DoRA, only add ``h(x)`` to a linear layer's output."""

SCALES = (".alpha", ".reshape_weight")
"""Endings of keys that core reads as numbers; messages do not count them as tensors."""

PEFT_PREFIX = "base_model.model."

log = logging.getLogger("taca")


def read_lora(path: str) -> dict[str, Tensor]:
    """The tensors of a LoRA file, with the alpha that PEFT keeps in the file's metadata.

    Raises ValueError if it is not a safetensors file, or is damaged.
    """
    name = Path(path).name
    if not name.lower().endswith((".safetensors", ".sft")):
        raise ValueError(
            f"TACA does not open {name}: only safetensors files are read, since others can run "
            f"code. Convert it to safetensors."
        )
    try:
        state, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
        return _named_as_core(_with_alphas(state, metadata or {}))
    except Exception as error:
        raise ValueError(
            f"{name} cannot be read: it is damaged, or only a part of it. Get it again. ({error})"
        ) from error


def _with_alphas(state: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, Tensor]:
    """The tensors, and PEFT's scale as the ``alpha`` tensors that ComfyUI looks for."""
    config = json.loads(metadata.get("lora_adapter_metadata") or "{}") or {}
    config = {key.removeprefix("transformer."): value for key, value in config.items()}
    if "lora_alpha" not in config:
        return state
    alphas = {}
    for key, tensor in state.items():
        base, is_down, _ = key.partition(".lora_A.")
        if is_down and f"{base}.alpha" not in state:
            # PEFT's rule: the first pattern that matches the end of the layer's name counts.
            layer = base.removeprefix(PEFT_PREFIX).removeprefix("transformer.")
            patterns = (config.get("alpha_pattern") or {}).items()
            matches = (alpha for each, alpha in patterns if re.match(rf"(.*\.)?({each})$", layer))
            alpha = float(next(matches, config["lora_alpha"]))
            # ComfyUI divides by the rank; PEFT by its root, if use_rslora is set.
            alpha *= len(tensor) ** 0.5 if config.get("use_rslora") else 1.0
            alphas[f"{base}.alpha"] = torch.tensor(alpha)
    return state | alphas


def _named_as_core(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, and PEFT's biases and DoRA magnitudes under the names that ComfyUI looks for.

    A magnitude keeps its one axis, by which ``fit_lora`` knows it from other files' DoRA.
    """
    named = {}
    for key, tensor in state.items():
        if found := re.fullmatch(r"(.+)\.lora_B\.bias", key):
            base = found[1]
            alpha, rank = state.get(f"{base}.alpha"), len(state[f"{base}.lora_A.weight"])
            tensor = tensor * (1.0 if alpha is None else alpha.item() / rank)
            key = f"{base}.diff_b"
        elif found := re.fullmatch(r"(.+)\.lora_magnitude_vector(\.default)?(\.weight)?", key):
            key, tensor = f"{found[1]}.dora_scale", tensor.flatten()
        named[key] = tensor
    return named


def fit_lora(state: dict[str, Tensor], model: BaseModel, name: str, strength: float) -> LoRA:
    """A LoRA for a model, from a file's tensors under any keys that ComfyUI knows.

    Logs a warning with counts if only some of them fit.

    Raises ValueError if none fits, or a part is missing or holds no usable numbers.
    """
    keys = comfy.lora.model_lora_keys_unet(model, {})
    # The model may be compiled. Core knows PEFT's own prefix for some models only.
    keys = {re.sub(r"_orig_mod[._]", "", key): target for key, target in keys.items()}
    for key, target in list(keys.items()):
        keys.setdefault(re.sub(r"^transformer\.", PEFT_PREFIX, key), target)
    try:
        state = comfy.lora_convert.convert_lora(state)
        loaded = comfy.lora.load_lora(state, keys, log_missing=False)
        for key, target in keys.items():  # core knows no bias of a part of a fused layer
            if isinstance(target, tuple) and f"{key}.diff_b" in state:
                part = (re.sub("weight$", "bias", target[0]), *target[1:])
                loaded[part] = ("diff", (state[f"{key}.diff_b"],))
    except (KeyError, IndexError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{name} is not a whole LoRA: a part is missing or misshapen ({error}). Get it again."
        ) from error
    dora = {id(tensor) for key, tensor in state.items() if key.endswith(".dora_scale")}
    known = model.state_dict().keys()
    deltas: dict[str, list[LoRADelta]] = {}
    used: set[int] = set()
    for key, value in loaded.items():
        target, *slice_of = key if isinstance(key, tuple) else (key,)
        if target not in known:  # a bias of what has none
            continue
        module_name, _, parameter = target.replace("_orig_mod.", "").rpartition(".")
        parts = parts_of(value)
        _check_numbers(parts, target, name)
        tensors = {id(part) for part in parts if isinstance(part, Tensor)}
        module = submodule(model, module_name)
        if isinstance(value, LoRAAdapter) and parts[4] is not None and parts[4].ndim == 1:
            value = PeftDoRA(value.loaded_keys, parts)
        if hasattr(module, "in_features"):
            try:
                value = _flat(value)
            except (RuntimeError, IndexError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{name} is not a whole LoRA: a part of {target} is missing or misshapen "
                    f"({error}). Get it again."
                ) from error
        if isinstance(value, WeightAdapterBase):
            is_sum = isinstance(value, SUMS) and not tensors & dora and list not in map(type, parts)
        else:
            is_sum = value[0] == "diff"
        additive = is_sum and hasattr(module, "in_features")
        delta = LoRADelta(Place(parameter, *slice_of), value, strength, additive)
        adjustable = hasattr(module, f"{parameter}_function") or is_norm(module)
        if (additive or (adjustable and _merges(delta, module))) and _fits(delta, module):
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
    if not hasattr(module, "in_features"):
        if own is None:
            return False
        if isinstance(value, LoRAAdapter):
            up, down = (torch.atleast_2d(part).flatten(1) for part in value.weights[:2])
            kernel = 1 if value.weights[3] is None else value.weights[3][0, 0].numel()
            return (up.shape[0], down.shape[1] * kernel) == (own.shape[0], own[0].numel())
        return isinstance(value, WeightAdapterBase) or value[1][0].shape == own.shape
    # Not the weight's own shape: it may differ if quantised.
    rows = place.rows[2] if place.rows else module.out_features
    if place.rows and sum(place.rows[1:]) > module.out_features:
        return False  # core's table of parts is for other proportions (Lumina 2's fewer keys)
    if isinstance(value, WeightAdapterBase):
        if value.name == "glora":  # a1 a2 and b1 b2, or in older files a2 a1 and b2 b1
            a1, a2, b1, b2 = (part.shape for part in value.weights[:4])
            return any(
                (a[0], c[1], b[0], d[1]) == (*[module.in_features] * 2, rows, module.in_features)
                and a[1] == c[0] == b[1] == d[0]
                for a, c, b, d in ((a1, a2, b1, b2), (a2, a1, b2, b1))
            )
        x, y = torch.zeros(1, module.in_features), torch.zeros(1, rows)
        try:
            return bool(value.bypass_forward(lambda x: y + 0 * x.sum(), x).shape == y.shape)
        except (RuntimeError, ValueError, IndexError, ZeroDivisionError):
            return False
    shape = (rows, module.in_features) if place.parameter == "weight" else (rows,)
    return own is not None and value[1][0].shape == shape
