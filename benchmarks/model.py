"""What the nodes cost: one call of a model in a real ComfyUI.

Core's models at full width, with all blocks on a GPU and few on a CPU, with seeded weights, called
as the sampler calls them, with everything that the nodes install. Of a FLUX.1-dev, SD3.5-Medium
and -Large, Qwen-Image and Chroma. ``README.md`` says how to read the result.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from dataclasses import dataclass
from functools import partial
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


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["flux"])
    parser.add_argument("--sizes", type=int, nargs="+", help="1024 on a GPU, 512 on a CPU")
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="of the weights")
    parser.add_argument("--compile", action="store_true", help="by torch's inductor")
    parser.add_argument("--attention", choices=("pytorch", "sage", "flash", "xformers"),
                        default="pytorch")  # fmt: skip
    parser.add_argument("--full", action="store_true", help="all blocks, as on a GPU")
    parser.add_argument("--rounds", type=int, help="50 on a GPU, 11 on a CPU")
    parser.add_argument("--clock", choices=blocks.CLOCKS, default="wall")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder")
    return parser.parse_args()


comfy_args.cpu = not torch.cuda.is_available()
# Core chooses its attention while it is imported.
chosen = sys.argv[sys.argv.index("--attention") + 1] if "--attention" in sys.argv else "pytorch"
comfy_args.use_sage_attention, comfy_args.use_flash_attention = chosen == "sage", chosen == "flash"
comfy_args.use_pytorch_cross_attention = chosen == "pytorch"

import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.supported_models  # noqa: E402
from comfy.patcher_extension import WrappersMP  # noqa: E402
from comfy_api.torch_helpers import set_torch_compile_wrapper  # noqa: E402
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict  # noqa: E402


def load_pack() -> Any:
    """The pack's modules, in ComfyUI."""
    spec = importlib.util.spec_from_file_location("taca_pack", ROOT / "__init__.py")
    pack = importlib.util.module_from_spec(spec)
    sys.modules["taca_pack"] = pack
    spec.loader.exec_module(pack)
    return (
        importlib.import_module("taca_pack.taca.patch"),
        importlib.import_module("taca_pack.taca.schedule"),
        importlib.import_module("taca_pack.taca.lora"),
    )


PACK = load_pack()
RANKS = (16, 64)
METHODS = {
    "plain": "plain",
    "plain again": "plain, again",
    "outside": "TACA, outside the window",
    "outside lora": "TACA and LoRA, outside the window",
    "inside": "TACA, inside the window",
    **{f"lora {rank}": f"TACA and LoRA r = {rank}, inside" for rank in RANKS},
}
T_INSIDE, T_OUTSIDE = 0.99, 0.5
DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn")


@dataclass(frozen=True)
class Model:
    """A published model's sizes, as ComfyUI's detection finds them.

    Parameters
    ----------
    config : str
        Class in ``comfy.supported_models``.
    sizes : dict
        Of its transformer.
    depth : dict
        Numbers of blocks, as published.
    reduced : dict
        The same on a CPU, and what else is made smaller there.
    latent : tuple
        Channels, and frames of those that have them.
    text : tuple
        Tokens and width.
    vectors : dict
        Names and widths of the other conditioning; width 0 for one number.
    """

    config: str
    sizes: dict[str, Any]
    depth: dict[str, Any]
    reduced: dict[str, Any]
    latent: tuple[int, ...]
    text: tuple[int, int]
    vectors: dict[str, int]


FLUX_LIKE = {
    "patch_size": 2, "context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0,
    "num_heads": 24, "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True,
    "txt_ids_dims": [],
}  # fmt: skip
FLUX = FLUX_LIKE | {"image_model": "flux", "in_channels": 16, "out_channels": 16,
                    "vec_in_dim": 768, "guidance_embed": True}  # fmt: skip
CHROMA = FLUX_LIKE | {"image_model": "chroma", "in_channels": 64, "out_channels": 64,
                      "vec_in_dim": None, "in_dim": 64, "out_dim": 3072, "hidden_dim": 5120,
                      "n_layers": 5}  # fmt: skip
SD3 = {
    "in_channels": 16, "out_channels": 16, "patch_size": 2, "input_size": None,
    "adm_in_channels": 2048, "pos_embed_max_size": 192, "num_patches": 192 * 192,
    "qk_norm": "rms", "pos_embed_scaling_factor": None,
}  # fmt: skip
TWO = {"depth": 1, "depth_single_blocks": 2}


def sd3(width: int, x_blocks: int) -> dict[str, Any]:
    """Sizes of an SD3.5 of width 64 times ``width``."""
    embedder = {"target": "torch.nn.Linear",
                "params": {"in_features": 4096, "out_features": 64 * width}}  # fmt: skip
    return SD3 | {"depth": width, "context_embedder_config": embedder,
                  "x_block_self_attn_layers": list(range(x_blocks))}  # fmt: skip


MODELS = {
    "flux": Model("Flux", FLUX, {"depth": 19, "depth_single_blocks": 38}, TWO, (16,), (512, 4096),
                  {"y": 768, "guidance": 0}),
    "sd35-medium": Model("SD3", sd3(24, 13), {"num_blocks": 24},
                         {"num_blocks": 2, "x_block_self_attn_layers": [0]}, (16,), (333, 4096),
                         {"y": 2048}),
    "sd35-large": Model("SD3", sd3(38, 0), {"num_blocks": 38}, {"num_blocks": 2}, (16,),
                        (333, 4096), {"y": 2048}),
    "qwen-image": Model("QwenImage", {"image_model": "qwen_image"}, {"num_layers": 60},
                        {"num_layers": 1}, (16, 1), (256, 3584), {}),
    "chroma": Model("Chroma", CHROMA, {"depth": 19, "depth_single_blocks": 38},
                    TWO | {"hidden_dim": 512}, (16,), (512, 4096), {"guidance": 0}),
}  # fmt: skip


def load(model: Model, depth: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    """The model with seeded weights, as core's loader would make it from a file."""
    config_class = getattr(comfy.supported_models, model.config)
    config = config_class({**model.sizes, **depth})
    fp8 = dtype == torch.float8_e4m3fn
    config.set_inference_dtype(dtype, torch.bfloat16 if fp8 else None)
    loaded = config.get_model({}, "", device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in loaded.diffusion_model.named_parameters():
        value = torch.empty(weight.shape, device=device, dtype=torch.bfloat16 if fp8 else dtype)
        if weight.ndim < 2:
            value.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            value.normal_(0, weight[0].numel() ** -0.5, generator=generator)
        weight.data = value.to(weight.dtype)
    return comfy.model_patcher.ModelPatcher(
        loaded, load_device=device, offload_device=comfy.model_management.unet_offload_device()
    )


def random_lora(model: Any, rank: int) -> dict[str, torch.Tensor]:
    """On every linear layer of the blocks."""
    state = {}
    for name, module in model.model.named_modules():
        if "blocks" in name and hasattr(module, "in_features"):
            state[f"{name}.lora_up.weight"] = torch.randn(module.out_features, rank) * 0.01
            state[f"{name}.lora_down.weight"] = torch.randn(rank, module.in_features) * 0.01
    return state


def calls(plain: Any, model: Model, size: int, batch: int, device: torch.device) -> Any:
    """A function that calls the model by one of ``METHODS``.

    Raises
    ------
    ValueError
        If outside the window it is not the plain model, or inside it is.
    """
    patch, schedule, lora = PACK
    taca = patch.patch_model(plain, schedule.Schedule())
    models = {"plain": plain, "plain again": plain, "outside": taca, "inside": taca}
    for rank in RANKS:
        fitted = lora.fit_lora(random_lora(plain, rank), plain.model, f"r = {rank}", 1.0)
        models[f"lora {rank}"] = patch.patch_lora(taca, fitted)
    models["outside lora"] = models[f"lora {RANKS[-1]}"]
    loaded = [*models.values(), *(a for m in models.values() for a in m.get_additional_models())]
    comfy.model_management.load_models_gpu(loaded)
    torch.manual_seed(0)
    x = torch.randn(batch, *model.latent, size // 8, size // 8, device=device)
    extra = {
        name: torch.randn(batch, width, device=device) if width
        else torch.full((batch,), 3.5, device=device)
        for name, width in model.vectors.items()
    }  # fmt: skip
    context = torch.randn(batch, *model.text, device=device)
    sampling = plain.get_model_object("model_sampling")
    resolved = patch.resolve(schedule.Schedule(), sampling)
    runs = {id(m): patch.Run(schedule=resolved) for m in models.values()}

    def call(method: str) -> torch.Tensor:
        patched = models[method]
        is_inside = method == "inside" or method.startswith("lora")
        sigma = torch.full((batch,), T_INSIDE if is_inside else T_OUTSIDE, device=device)
        wrappers = {kind: dict(keyed) for kind, keyed in patched.wrappers.items()}
        if patched is not plain:  # as around a run of the sampler
            own = partial(patch._adjust_call, patch.settings_of(patched), runs[id(patched)])
            wrappers[WrappersMP.APPLY_MODEL][patch.KEY] = [own]
        patched.pre_run()
        try:
            return patched.model.apply_model(
                x, sigma, c_crossattn=context, transformer_options={"wrappers": wrappers}, **extra
            )
        finally:
            patched.cleanup()

    return call


def check(call: Any) -> None:
    """Outside the window the plain model to the bit; inside something else."""
    if not torch.equal(call("outside lora"), call("plain")):
        raise ValueError("outside the window the model is not the plain one")
    if torch.equal(call("inside"), call("outside")) or torch.equal(call("lora 64"), call("inside")):
        raise ValueError("TACA or its LoRA does nothing")


def hot_spots(call: Any) -> list[list[Any]]:
    """Where the GPU's time goes that TACA adds: kernels, and milliseconds more than plain."""
    found: dict[str, float] = {}
    for method, sign in (("plain", -1), ("inside", 1)):
        with torch.profiler.profile() as profile:
            call(method)
            torch.cuda.synchronize()
        for event in profile.key_averages():
            time_ms = event.self_device_time_total / 1000
            found[event.key] = found.get(event.key, 0.0) + sign * time_ms
    return sorted(map(list, found.items()), key=lambda row: -abs(row[1]))[:10]


def table(case: dict[str, Any]) -> str:
    """Ratios as Markdown."""
    lines = ["| | one call of the model | 30 steps | seconds | peak MiB |", "|---|---|---|---|---|"]
    for name, label in METHODS.items():
        row = case["call"][name]
        picture = (blocks.STEPS_INSIDE * row["ratio"] + blocks.STEPS - blocks.STEPS_INSIDE) / 30
        inside = name == "inside" or name.startswith("lora")
        lines.append(
            f"| {label} | {row['ratio']:.3f} ({row['ratio_p10']:.3f}-{row['ratio_p90']:.3f}) | "
            f"{f'{picture:.4f}' if inside else ''} | {row['median_s']:.4g} | "
            f"{case['peak_mib'][name]:.0f} |"
        )
    return "\n".join(lines)


def measure(name: str, dtype_name: str, options: argparse.Namespace,
            device: torch.device) -> list[dict[str, Any]]:  # fmt: skip
    """One model in one dtype, at every size and batch."""
    model, dtype = MODELS[name], getattr(torch, dtype_name)
    depth = model.depth if options.full else model.reduced
    plain = load(model, depth, dtype, device)
    if options.compile:
        set_torch_compile_wrapper(plain, backend="inductor",
                                  options={"guard_filter_fn": skip_torch_compile_dict})  # fmt: skip
    cases = []
    for size in options.sizes:
        for batch in options.batches:
            call = calls(plain, model, size, batch, device)
            if not options.compile:
                check(call)
            label = f"{name} {dtype_name} {size} x {size}, batch {batch}"
            case = {
                "model": name, "dtype": dtype_name, "size": size, "batch": batch, "depth": depth,
                "text_tokens": model.text[0], "compiled": options.compile,
                "call": blocks.interleaved(call, list(METHODS), options.rounds, device, label),
                "peak_mib": {m: blocks.peak_mib(partial(call, m), device) for m in METHODS},
            }  # fmt: skip
            if device.type == "cuda":
                case["profile"] = hot_spots(call)
            print(f"\n### {label}{', compiled' * options.compile}\n\n{table(case)}", flush=True)
            cases.append(case)
    comfy.model_management.unload_all_models()
    return cases


@torch.inference_mode()  # as ComfyUI runs its nodes
def main() -> None:
    on_gpu = torch.cuda.is_available()
    options = parse()
    blocks.set_clock(options.clock)
    options.full = options.full or on_gpu
    options.rounds = options.rounds or (50 if on_gpu else 11)
    options.sizes = options.sizes or [1024 if on_gpu else 512]
    options.dtypes = options.dtypes or ["bfloat16" if on_gpu else "float32"]
    device = comfy.model_management.get_torch_device()
    file = options.out / f"model-{blocks.slug_of(device)}.json"
    report = json.loads(file.read_text()) if file.exists() else {}
    kept = {"environment": blocks.environment(device, options.clock)
            | {"attention": options.attention}}  # fmt: skip
    for name in options.models:
        for dtype_name in options.dtypes:
            for case in measure(name, dtype_name, options, device):
                key = " ".join(str(case[part]) for part in ("model", "dtype", "size", "batch"))
                key += " compiled" * case["compiled"] + f" {options.attention}"
                report[key] = kept | case
                file.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nSaved {file}")


if __name__ == "__main__":
    main()
