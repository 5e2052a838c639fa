"""LoRAs in the formats that core reads, and what merging them gives."""

import comfy.hooks
import comfy.sd
import torch
from comfy.weight_adapter import adapter_maps
from safetensors.torch import save_file


def core_model(path, state):
    """A transformer's tensors in diffusers' layout, through a file and core's loader."""
    save_file({k: v.clone().contiguous() for k, v in state.items()}, path)
    return comfy.sd.load_diffusion_model(str(path))


def replaced(model):
    """Modules whose forward is not their class's own, or whose weights have a function."""
    return [
        name
        for name, module in model.model.named_modules()
        if "forward" in module.__dict__ or getattr(module, "weight_function", [])
    ]


def key_of(naming, name):
    """The key of a module of the model in a naming."""
    key = naming.format(name.removeprefix("diffusion_model."))
    return key.replace(".", "_") if naming.startswith("lora_") else key


def random_lora(model, algorithm="lora", naming="diffusion_model.{}", rank=4, seed=1, only=""):
    """A LoRA as core's trainer would write it: every weight and bias, or those named."""
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def random(*shape, scale=0.05):
        return torch.randn(shape, generator=generator) * scale

    for name, module in model.model.named_modules():
        if algorithm == "norms" and only in name:
            for name_of, own in module.named_parameters(recurse=False):
                if own.ndim == 1 and "bias" not in name_of:
                    ending = "" if name_of == "weight" else f".{name_of}"
                    state[f"{key_of(naming, name)}{ending}.diff"] = random(*own.shape, scale=0.5)
        if algorithm == "norms" or not hasattr(module, "weight_function") or only not in name:
            continue
        key = key_of(naming, name)
        weight = module.weight
        if weight is not None and weight.ndim >= 2:
            rows, columns = weight.shape[0], weight[0].numel()
            if algorithm in ("lora", "dora"):
                state[f"{key}.lora_up.weight"] = random(rows, rank, scale=0.2)
                state[f"{key}.lora_down.weight"] = random(rank, columns, scale=0.2)
                state[f"{key}.alpha"] = torch.tensor(2.0)
                if algorithm == "dora":
                    state[f"{key}.dora_scale"] = weight.flatten(1).norm(dim=1)[:, None] * 1.1
            elif algorithm in ("1 x 1", "tucker"):  # as LyCORIS writes them for convolutions
                kernel = weight.shape[2:] or (1, 1)
                own = (rank, weight.shape[1], *(kernel if algorithm == "1 x 1" else (1, 1)))
                state[f"{key}.lora_up.weight"] = random(rows, rank, 1, 1, scale=0.2)
                state[f"{key}.lora_down.weight"] = random(*own, scale=0.2)
                if algorithm == "tucker":
                    state[f"{key}.lora_mid.weight"] = random(rank, rank, *kernel, scale=0.6)
                state[f"{key}.alpha"] = torch.tensor(2.0)
            elif algorithm == "LoHa, tucker":  # a kernel of 1 is also written for linear layers
                kernel = weight.shape[2:] or (1, 1)
                for part in ("1", "2"):
                    state[f"{key}.hada_w{part}_a"] = random(rank, rows, scale=0.4)
                    state[f"{key}.hada_w{part}_b"] = random(rank, weight.shape[1], scale=0.4)
                    state[f"{key}.hada_t{part}"] = random(rank, rank, *kernel, scale=0.4)
                state[f"{key}.alpha"] = torch.tensor(2.0)
            elif algorithm == "set":
                state[f"{key}.set_weight"] = weight + random(*weight.shape, scale=0.02)
            elif algorithm == "LoKr, both":  # factors decomposed, with a rank each
                outer = (4, 4) if rows % 4 == 0 == weight.shape[1] % 4 else (1, 1)
                inner = rows // outer[0], weight.shape[1] // outer[1]
                state[f"{key}.lokr_w1_a"] = random(outer[0], 2, scale=0.6)
                state[f"{key}.lokr_w1_b"] = random(2, outer[1], scale=0.6)
                if weight.ndim > 2:
                    state[f"{key}.lokr_w2"] = random(*inner, *weight.shape[2:], scale=0.2)
                else:
                    state[f"{key}.lokr_w2_a"] = random(inner[0], rank, scale=0.2)
                    state[f"{key}.lokr_w2_b"] = random(rank, inner[1], scale=0.2)
                state[f"{key}.alpha"] = torch.tensor(2.0)
            elif algorithm == "LoKr, whole":  # as LyCORIS writes it, but for the alpha of 0
                state[f"{key}.lokr_w1"] = random(1, 1, scale=0.6)
                state[f"{key}.lokr_w2"] = random(*weight.shape, scale=0.2)
                state[f"{key}.alpha"] = torch.tensor(0.0)
            elif algorithm == "full":
                state[f"{key}.diff"] = random(*weight.shape, scale=0.02)
            elif algorithm.startswith("GLoRA"):
                is_old = algorithm == "GLoRA, old"
                side = columns if is_old else weight.shape[1]
                shapes = [(side, rank), (rank, side), (rows, rank), (rank, columns)]
                parts = ("a2", "a1", "b2", "b1") if is_old else ("a1", "a2", "b1", "b2")
                for part, shape in zip(parts, shapes, strict=True):
                    state[f"{key}.{part}.weight"] = random(*shape)
                state[f"{key}.alpha"] = torch.tensor(2.0)
            else:
                train = adapter_maps[algorithm].create_train(weight, rank=rank, alpha=1.0)
                for part, tensor in train.named_parameters():
                    filled = tensor.detach().clone()
                    if part != "alpha":
                        filled = random(*tensor.shape, scale=0.15)
                    state[f"{key}.{part}"] = filled
        elif weight is not None and algorithm == "full":
            state[f"{key}.diff"] = random(*weight.shape, scale=0.3)
        if algorithm == "full" and getattr(module, "bias", None) is not None:
            state[f"{key}.diff_b"] = random(*module.bias.shape)
    return state


def merged_by_core(model, state, strength=1.0):
    return comfy.sd.load_lora_for_models(model, None, dict(state), strength, 0)[0]


NAMINGS = {
    "generic": "diffusion_model.{}",  # core's trainer, ai-toolkit
    "kohya": "lora_unet_{}",
}


def with_lora(weights, lora):
    """A file's weights and, in float64, a LoRA of linear layers; others of it are left out."""
    merged = dict(weights)
    for key, up in lora.items():
        base, is_up, _ = key.partition(".lora_up.weight")
        name = f"{base.removeprefix('diffusion_model.')}.weight"
        if is_up and name in weights:
            down = lora[f"{base}.lora_down.weight"].double()
            delta = lora[f"{base}.alpha"] / len(down) * up.double() @ down
            merged[name] = weights[name].double().add(delta.view(weights[name].shape)).float()
    return merged


def in_blocks(weights):
    """Names of the linear layers that quantised files quantise."""
    return [
        k.removesuffix(".weight")
        for k, v in weights.items()
        if "blocks" in k and k.endswith(".weight") and v.ndim == 2
    ]


def lora_hooks(lora):
    """Core's hook of a keyframed LoRA: on in the first half of the sampling."""
    hook = comfy.hooks.create_hook_lora(lora=dict(lora), strength_model=1.0, strength_clip=0.0)
    keyframes = comfy.hooks.HookKeyframeGroup()
    for strength, start in ((1.0, 0.0), (0.0, 0.5)):
        keyframes.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
    hook.set_keyframes_on_hooks(keyframes)
    return hook


def hooked(conditioning, lora):
    """A prompt with ``lora_hooks``."""
    return comfy.hooks.set_hooks_for_conditioning(conditioning, lora_hooks(lora))
