"""What the nodes cost: one call of a FLUX-shaped model in a real ComfyUI.

Core's model at full width and reduced depth, with seeded weights, called as the sampler calls
them, with everything that the nodes install. ``README.md`` says how to read the result.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import attention as blocks
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, os.environ["COMFYUI_PATH"])

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing(False)
from comfy.cli_args import args as comfy_args  # noqa: E402

comfy_args.cpu = not torch.cuda.is_available()
comfy_args.use_pytorch_cross_attention = True

import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402

RANKS = (16, 64)
METHODS = {
    "plain": "plain",
    "plain again": "plain, again",
    "outside": "TACA, outside the window",
    "outside lora": "TACA and LoRA, outside the window",
    "inside": "TACA, inside the window",
    **{f"lora {rank}": f"TACA and LoRA r = {rank}, inside" for rank in RANKS},
}
BLOCKS = {"flux": "1 double and 2 single blocks"}
T_INSIDE, T_OUTSIDE = 0.99, 0.5


def load_pack() -> Any:
    """The pack, as ComfyUI loads it."""
    spec = importlib.util.spec_from_file_location("taca_pack", ROOT / "__init__.py")
    pack = importlib.util.module_from_spec(spec)
    sys.modules["taca_pack"] = pack
    spec.loader.exec_module(pack)
    return (
        importlib.import_module("taca_pack.taca.patch"),
        importlib.import_module("taca_pack.taca.schedule"),
        importlib.import_module("taca_pack.taca.lora"),
    )


def flux(double: int = 1, single: int = 2) -> dict[str, torch.Tensor]:
    """Seeded weights of FLUX.1-dev's width, in the published layout."""
    h, mlp = 3072, 4 * 3072
    linear = {
        "img_in": (h, 64), "txt_in": (h, 4096), "vector_in.in_layer": (h, 768),
        "final_layer.linear": (64, h), "final_layer.adaLN_modulation.1": (2 * h, h),
        "vector_in.out_layer": (h, h),
    }  # fmt: skip
    for name in ("time_in", "guidance_in"):
        linear |= {f"{name}.in_layer": (h, 256), f"{name}.out_layer": (h, h)}
    norm = []
    for i in range(double):
        for s in ("img", "txt"):
            b = f"double_blocks.{i}.{s}"
            linear |= {f"{b}_mod.lin": (6 * h, h), f"{b}_attn.qkv": (3 * h, h),
                       f"{b}_attn.proj": (h, h), f"{b}_mlp.0": (mlp, h),
                       f"{b}_mlp.2": (h, mlp)}  # fmt: skip
            norm += [f"{b}_attn.norm.{w}_norm.scale" for w in ("query", "key")]
    for i in range(single):
        b = f"single_blocks.{i}"
        linear |= {f"{b}.linear1": (3 * h + mlp, h), f"{b}.linear2": (h, h + mlp),
                   f"{b}.modulation.lin": (3 * h, h)}  # fmt: skip
        norm += [f"{b}.norm.{w}_norm.scale" for w in ("query", "key")]
    return seeded(linear) | {name: torch.ones(128) for name in norm}


def seeded(linear: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    state = {}
    for name, (rows, columns) in linear.items():
        state[f"{name}.weight"] = torch.randn(rows, columns) * columns**-0.5
        state[f"{name}.bias"] = torch.zeros(rows)
    return state


def random_lora(model: Any, rank: int) -> dict[str, torch.Tensor]:
    """On every linear layer of the blocks."""
    state = {}
    for name, module in model.model.named_modules():
        if "blocks" in name and hasattr(module, "in_features"):
            state[f"{name}.lora_up.weight"] = torch.randn(module.out_features, rank) * 0.01
            state[f"{name}.lora_down.weight"] = torch.randn(rank, module.in_features) * 0.01
    return state


def calls(size: int, dtype: torch.dtype, device: torch.device) -> Any:
    """A function that calls the model by one of ``METHODS``."""
    patch, schedule, lora = load_pack()
    torch.manual_seed(0)
    plain = comfy.sd.load_diffusion_model_state_dict(flux(), model_options={"dtype": dtype})
    taca = patch.patch_model(plain, schedule.Schedule())
    models = {"plain": plain, "plain again": plain, "outside": taca, "inside": taca}
    for rank in RANKS:
        fitted = lora.fit_lora(random_lora(plain, rank), plain.model, f"r = {rank}", 1.0)
        models[f"lora {rank}"] = patch.patch_lora(taca, fitted)
    models["outside lora"] = models[f"lora {RANKS[-1]}"]
    loaded = [*models.values(), *(a for m in models.values() for a in m.get_additional_models())]
    comfy.model_management.load_models_gpu(loaded)
    x = torch.randn(1, 16, size // 8, size // 8, device=device)
    extra = {
        "y": torch.randn(1, 768, device=device),
        "guidance": torch.full((1,), 3.5, device=device),
    }
    context = torch.randn(1, 512, 4096, device=device)

    def call(method: str) -> torch.Tensor:
        model = models[method]
        is_inside = method == "inside" or method.startswith("lora")
        sigma = torch.full((1,), T_INSIDE if is_inside else T_OUTSIDE, device=device)
        model.pre_run()
        try:
            return model.model.apply_model(
                x, sigma, c_crossattn=context, transformer_options={"wrappers": model.wrappers},
                **extra,
            )  # fmt: skip
        finally:
            model.cleanup()

    if not torch.equal(call("outside lora"), call("plain")):
        raise ValueError("outside the window the model is not the plain one")
    if torch.equal(call("inside"), call("outside")) or torch.equal(call("lora 64"), call("inside")):
        raise ValueError("TACA or its LoRA does nothing")
    return call


def table(rows: dict[str, dict[str, float]]) -> str:
    """Ratios as Markdown."""
    lines = ["| | one call of the model | seconds |", "|---|---|---|"]
    for name, label in METHODS.items():
        row = rows[name]
        lines.append(f"| {label} | {row['ratio']:.3f} ({row['ratio_p10']:.3f}-"
                     f"{row['ratio_p90']:.3f}) | {row['median_s']:.4g} |")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, help="width and height; 1024 on a GPU, 512 on a CPU")
    parser.add_argument("--rounds", type=int, help="50 on a GPU, 11 on a CPU")
    parser.add_argument("--shapes", nargs="+", choices=BLOCKS, default=list(BLOCKS))
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    device = comfy.model_management.get_torch_device()
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    size = options.size or (1024 if on_gpu else 512)
    report: dict[str, Any] = {
        "environment": {
            "machine": blocks.machine(device), "device": device.type,
            "threads": torch.get_num_threads(), "dtype": str(dtype).removeprefix("torch."),
            "torch": torch.__version__, "python": platform.python_version(),
        },
        "size": size,
        "models": {},
    }  # fmt: skip
    for name in options.shapes:
        call = calls(size, dtype, device)
        rounds = options.rounds or (50 if on_gpu else 11)
        rows = blocks.interleaved(call, list(METHODS), rounds, device, name)
        report["models"][name] = {"blocks": BLOCKS[name], "call": rows}
        print(f"\n### {name}: {BLOCKS[name]}, {size} x {size}\n\n{table(rows)}")
        comfy.model_management.unload_all_models()
    slug = re.sub(r"[^a-z0-9]+", "-", report["environment"]["machine"].lower()).strip("-")
    file = options.out / f"model-{slug}.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nSaved {file}")


if __name__ == "__main__":
    main()
