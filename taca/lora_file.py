"""Reading a LoRA file: its tensors under the names that ComfyUI looks for."""

import json
import re
from pathlib import Path

import comfy.utils
import torch
from torch import Tensor

PEFT_PREFIX = "base_model.model."


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
