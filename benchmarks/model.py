"""What the nodes cost: one step of a model in a real ComfyUI, by core's sampler.

Core's models at full width, with all blocks on a GPU and few on a CPU, with seeded weights: a
FLUX.1-dev, SD3.5-Medium and -Large, Qwen-Image and Chroma, with what the nodes install; and the
paper's ways, by core's override of attention. ``README.md`` says how to read the result.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import attention as blocks
import timing
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, os.environ["COMFYUI_PATH"])

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing(False)
from comfy.cli_args import args as comfy_args  # noqa: E402

KERNELS = {"pytorch": "torch", "sage": "sageattention", "flash": "flash_attn",
           "xformers": "xformers"}  # fmt: skip

# Core chooses its attention while it is imported, so this option is read before.
early = argparse.ArgumentParser(add_help=False)
early.add_argument("--attention", choices=KERNELS, default="pytorch")
chosen = early.parse_known_args()[0].attention if __name__ == "__main__" else "pytorch"
if importlib.util.find_spec(KERNELS[chosen]) is None:
    raise SystemExit(f"--attention {chosen} needs the package {KERNELS[chosen]}: install it.")
comfy_args.cpu = not torch.cuda.is_available()
if comfy_args.cpu and chosen != "pytorch":
    raise SystemExit(f"--attention {chosen} needs a GPU, and torch finds none: take pytorch.")
comfy_args.use_sage_attention, comfy_args.use_flash_attention = chosen == "sage", chosen == "flash"
comfy_args.use_pytorch_cross_attention = chosen == "pytorch"

import comfy.ldm.modules.attention  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.supported_models  # noqa: E402
from comfy_api.torch_helpers import set_torch_compile_wrapper  # noqa: E402
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict  # noqa: E402


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, parents=[early])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["flux"])
    parser.add_argument("--sizes", type=int, nargs="+", help="1024 on a GPU, 512 on a CPU")
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="of the weights")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS)[1:], help="beside plain")
    parser.add_argument("--compile", action="store_true", help="by torch's inductor")
    parser.add_argument("--full", action="store_true", help="all blocks, as on a GPU")
    parser.add_argument("--rounds", type=int, help="50 on a GPU, 7 on a CPU")
    parser.add_argument("--clock", choices=timing.CLOCKS, default="wall")
    parser.add_argument("--out", type=Path, default=timing.RESULTS, help="folder")
    return parser.parse_args()


def load_pack() -> Any:
    """The pack's modules, in ComfyUI."""
    if "taca_pack" not in sys.modules:
        spec = importlib.util.spec_from_file_location("taca_pack", ROOT / "__init__.py")
        pack = importlib.util.module_from_spec(spec)
        sys.modules["taca_pack"] = pack
        spec.loader.exec_module(pack)
    return (
        importlib.import_module("taca_pack.taca.patch"),
        importlib.import_module("taca_pack.taca.schedule"),
        importlib.import_module("taca_pack.taca.lora_file"),
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
    "two full": "paper: two full attentions",
    "dense": "paper: dense matrix",
}
PAPER = ("two full", "dense")
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
    pooled : int
        Width of the other prompt vector, 0 for none.
    mask : str
        Which of ``attention.mask_of``.
    """

    config: str
    sizes: dict[str, Any]
    depth: dict[str, Any]
    reduced: dict[str, Any]
    latent: tuple[int, ...]
    text: tuple[int, int]
    pooled: int = 0
    mask: str = ""


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
TWO = {"depth": 1, "depth_single_blocks": 1}


def sd3(width: int, x_blocks: int) -> dict[str, Any]:
    """Sizes of an SD3.5 of width 64 times ``width``."""
    embedder = {"target": "torch.nn.Linear",
                "params": {"in_features": 4096, "out_features": 64 * width}}  # fmt: skip
    return SD3 | {"depth": width, "context_embedder_config": embedder,
                  "x_block_self_attn_layers": list(range(x_blocks))}  # fmt: skip


MODELS = {
    "flux": Model("Flux", FLUX, {"depth": 19, "depth_single_blocks": 38}, TWO, (16,), (512, 4096),
                  768),
    "sd35-medium": Model("SD3", sd3(24, 13), {"num_blocks": 24},
                         {"num_blocks": 2, "x_block_self_attn_layers": [0]}, (16,), (333, 4096),
                         2048),
    "sd35-large": Model("SD3", sd3(38, 0), {"num_blocks": 38}, {"num_blocks": 2}, (16,),
                        (333, 4096), 2048),
    "qwen-image": Model("QwenImage", {"image_model": "qwen_image"}, {"num_layers": 60},
                        {"num_layers": 1}, (16, 1), (256, 3584), mask="keys"),
    "chroma": Model("Chroma", CHROMA, {"depth": 19, "depth_single_blocks": 38},
                    TWO | {"hidden_dim": 512}, (16,), (512, 4096), mask="regions"),
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
    state, generator = {}, torch.Generator().manual_seed(0)

    def random(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * 0.01

    for name, module in model.model.named_modules():
        if "blocks" in name and hasattr(module, "in_features"):
            state[f"{name}.lora_up.weight"] = random(module.out_features, rank)
            state[f"{name}.lora_down.weight"] = random(rank, module.in_features)
    return state


def one_call(patcher: Any, conditioning: Any, noise: torch.Tensor, t: float,
             around: Callable[[Callable[[], torch.Tensor]], Any]) -> Any:  # fmt: skip
    """One sampling run by core, whose sampler calls the model as ``around`` says.

    Parameters
    ----------
    t : float
        sigma of the calls. The run's own has a step inside the window, and one outside.
    around : callable
        Given what calls the model once.
    """
    found = []

    def sampler(model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any],
                **_: Any) -> torch.Tensor:  # fmt: skip
        sigma = torch.full((x.shape[0],), t, device=x.device)
        found.append(around(partial(model, x, sigma, **extra_args)))
        return x

    comfy.sample.sample_custom(
        patcher, noise, 1.0, comfy.samplers.KSAMPLER(sampler),
        torch.tensor([T_INSIDE, T_OUTSIDE, 0.0]), conditioning, conditioning,
        torch.zeros_like(noise), disable_pbar=True, seed=0,
    )  # fmt: skip
    return found[0]


def paper_override(way: str, text: int, image: int) -> Callable[..., torch.Tensor]:
    """One of the paper's ways, as core's override of the joint attention."""

    def override(func: Callable[..., torch.Tensor], q: torch.Tensor, k: torch.Tensor,
                 v: torch.Tensor, heads: int, mask: torch.Tensor | None = None,
                 skip_reshape: bool = False, **kwargs: Any) -> torch.Tensor:  # fmt: skip
        if not skip_reshape:
            q, k, v = (x.flatten(2).unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                   mask: torch.Tensor | None) -> torch.Tensor:  # fmt: skip
            return func(q, k, v, heads, mask=mask, skip_reshape=True, **kwargs)

        if q.shape[2] != text + image:  # the second attention of SD3.5-Medium
            return attend(q, k, v, mask)
        gamma = torch.full((1,), blocks.GAMMA, device=q.device)
        if way == "dense":
            return blocks.dense(text, gamma)(q, k, v, mask)
        return blocks.two_full(attend, text, gamma)(q, k, v, mask)

    return override


class Methods:
    """A model, and every method of ``METHODS`` on it.

    Parameters
    ----------
    plain : comfy.model_patcher.ModelPatcher
        Compiled or not.
    paper : bool
        Whether the paper's ways are among them. Not on a compiled model, where core freezes an
        override at its first call.
    """

    def __init__(self, plain: Any, model: Model, size: int, batch: int, device: torch.device,
                 paper: bool) -> None:  # fmt: skip
        patch, schedule, lora = PACK
        taca = patch.patch_model(plain, schedule.Schedule())
        self.models = {"plain": plain, "plain again": plain, "outside": taca, "inside": taca}
        for rank in RANKS:
            fitted = lora.fit_lora(random_lora(plain, rank), plain.model, f"r = {rank}", 1.0)
            self.models[f"lora {rank}"] = patch.patch_lora(taca, fitted)
        self.models["outside lora"] = self.models[f"lora {RANKS[-1]}"]
        text, image = model.text[0], (size // 16) ** 2
        for way in PAPER if paper else ():
            patched = plain.clone()
            options = patched.model_options.setdefault("transformer_options", {})
            options["optimized_attention_override"] = paper_override(way, text, image)
            self.models[way] = patched
        generator = torch.Generator().manual_seed(0)
        self.noise = torch.randn(batch, *model.latent, size // 8, size // 8, generator=generator)
        conds: dict[str, Any] = {"guidance": 3.5}
        if model.pooled:
            conds["pooled_output"] = torch.randn(1, model.pooled, generator=generator)
        mask = blocks.mask_of(model.mask, text, image, torch.float32, torch.device("cpu"))
        if model.mask == "keys":  # as a text encoder gives it
            conds["attention_mask"] = (mask[:, 0, :text] == 0).long()
        elif model.mask:
            side = size // 16
            conds |= {"attention_mask": mask, "attention_mask_img_shape": (side, side)}
        self.conditioning = [[torch.randn(1, *model.text, generator=generator), conds]]
        self.device = device

    def run(self, method: str, around: Callable[[Callable[[], torch.Tensor]], Any],
            t: float | None = None) -> Any:  # fmt: skip
        """One sampling run whose call of the model is ``around``'s; t by default the method's."""
        if t is None:
            is_inside = method == "inside" or method.startswith("lora")
            t = T_INSIDE if is_inside else T_OUTSIDE
        return one_call(self.models[method], self.conditioning, self.noise, t, around)

    def output(self, method: str, t: float) -> torch.Tensor:
        """What a call at t gives."""
        return self.run(method, lambda call: call().clone(), t)

    def seconds(self, method: str) -> float:
        """Of a call."""
        return self.run(method, partial(timing.seconds, device=self.device))

    def peak_mib(self, method: str) -> float:
        """Peak memory of a call, above what is loaded."""
        return self.run(method, partial(timing.peak_mib, device=self.device))


class Warnings(logging.Handler):
    """What core and the pack say of attention while a model is called."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.taca: list[str] = []

    def __enter__(self) -> Warnings:
        self.core: list[str] = []
        logging.getLogger().addHandler(self)
        return self

    def emit(self, record: logging.LogRecord) -> None:
        if "attention" in record.getMessage().lower():
            (self.taca if record.name == "taca" else self.core).append(record.getMessage())

    def __exit__(self, *_: Any) -> None:
        logging.getLogger().removeHandler(self)
        if self.core:
            raise SystemExit(
                f"--attention {chosen} does not run this model, for core says: {self.core[0]} "
                f"What would be timed is another kernel: take that one."
            )


def check(methods: Methods, names: list[str],
          uncompiled: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:  # fmt: skip
    """What each method gives inside the window, made sure of; and a first call of each.

    Parameters
    ----------
    uncompiled : dict
        The same of the model that is not compiled; empty if this is it.

    Raises
    ------
    ValueError
        If a method outside the window is not the plain model to the bit, if TACA or its LoRA does
        nothing inside, if a way of the paper's computes something else, or a compiled model.
    """
    plain = methods.output("plain", T_OUTSIDE)
    for name in ("outside", "outside lora"):
        if name in names and not torch.equal(methods.output(name, T_OUTSIDE), plain):
            raise ValueError(f"{name} the window: not the plain model")
    inside = [name for name in names if name not in ("plain again", "outside", "outside lora")]
    found = {name: methods.output(name, T_INSIDE).double() for name in inside}

    def distance(one: torch.Tensor, other: torch.Tensor) -> float:
        return (one - other).norm().item()

    ours = [name for name in found if name not in PAPER]
    for name, other in zip(ours[1:], ours, strict=False):
        if torch.equal(found[name], found[other]):
            raise ValueError(f"{name}: the same as {other}")
    for way in set(PAPER) & set(found) if "inside" in found else ():
        effect = distance(found["plain"], found["inside"])
        if not distance(found[way], found["inside"]) < 0.5 * effect:
            raise ValueError(f"{way}: not what TACA computes")
    for name in ours if uncompiled else ():
        nearest = min(ours, key=lambda other: distance(found[name], uncompiled[other]))
        if nearest != name:
            raise ValueError(f"{name}, compiled: nearer to uncompiled {nearest}")
    return found


PROFILED = 3


def hot_spots(methods: Methods) -> list[dict[str, Any]]:
    """Operations, or kernels, that take longest more inside the window than in a plain call."""

    def profiled(call: Callable[[], Any]) -> dict[str, tuple[float, int]]:
        with torch.profiler.profile() as profile:
            call()
            if methods.device.type == "cuda":
                torch.cuda.synchronize()
        times: dict[str, tuple[float, int]] = {}
        for event in profile.key_averages():
            on_gpu = methods.device.type == "cuda"
            own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            key = re.sub(r"(CompiledFxGraph|Region:) \S+", r"\1", event.key)  # a name of its own
            before = times.get(key, (0.0, 0))
            times[key] = (before[0] + own / 1000, before[1] + event.count)
        return times

    found: dict[str, list[dict[str, tuple[float, int]]]] = {"plain": [], "inside": []}
    for _ in range(PROFILED):
        for method, calls in found.items():
            calls.append(methods.run(method, profiled))
    rows = []
    for key in {key for calls in found.values() for call in calls for key in call}:
        ms, count = (
            [statistics.median(call.get(key, (0.0, 0))[i] for call in found[method])
             for method in ("plain", "inside")]
            for i in (0, 1)
        )  # fmt: skip
        rows.append({"operation": key, "ms": round(ms[1] - ms[0], 3),
                     "plain_ms": round(ms[0], 3), "calls": int(count[1] - count[0])})  # fmt: skip
    # What runs more often first: the rest differs by the machine's spread alone.
    return sorted(rows, key=lambda row: (not row["calls"], -abs(row["ms"])))[:10]


BLOCKS = {"depth": "double", "depth_single_blocks": "single", "num_blocks": "joint",
          "num_layers": "joint"}  # fmt: skip


def heading(case: dict[str, Any]) -> str:
    depth = ", ".join(f"{case['depth'][k]} {kind}" for k, kind in BLOCKS.items()
                      if k in case["depth"]) + " blocks"  # fmt: skip
    masked = {"": "", "keys": ", padding masked", "regions": ", regions masked"}[case["mask"]]
    return (
        f"{case['model']}, {case['size']}², {case['dtype']} weights, batch {case['batch']}, "
        f"{'compiled, ' * case['compiled']}{case['attention']} attention ({depth}{masked})"
    )


def table(case: dict[str, Any]) -> str:
    """Ratios as Markdown."""
    lines = ["| | one step | seconds | 30 steps | 30 steps, outside as measured | peak MiB |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for name, label in METHODS.items():
        if name not in case["step"]:
            continue
        row, peak = case["step"][name], case["peak_mib"]
        pictures = ["", ""]
        if name == "inside" or name.startswith("lora") or name in PAPER:
            outside = "outside lora" if name.startswith("lora") else "outside"
            outside = "plain again" if name in PAPER else outside
            ways = timing.picture(row), timing.picture(row, case["step"].get(outside))
            pictures = [f"{x[1]:.4f} ({x[0]:.4f}-{x[2]:.4f})" for x in ways]
        lines.append(
            f"| {label} | {timing.cell(row)} | {row['median_s']:.4g} | {' | '.join(pictures)} | "
            f"{peak[name]:.1f} ({peak[name] / peak['plain']:.3f}×) |"
        )
    hot = [
        f"| `{row['operation']}` | {row['ms']:+.2f} | {row['plain_ms']:.2f} | {row['calls']:+d} |"
        for row in case["profile"]
    ]
    return "\n".join([
        *lines, "", "Where the time goes that a step inside the window takes more (medians of "
        f"{PROFILED} profiled calls; with no call more it is the machine's spread):", "",
        "| operation | ms more | plain, ms | calls more |", "|---|---|---|---|", *hot,
        *(f"\nTACA says: {note}" for note in case["notes"]),
    ])  # fmt: skip


def measure(plain: Any, name: str, size: int, batch: int, options: argparse.Namespace,
            device: torch.device) -> dict[str, Any]:  # fmt: skip
    """One model at one size and batch."""
    model = MODELS[name]
    names = ["plain", *(options.methods or list(METHODS)[1:])]
    if options.compile:
        names = [name for name in names if name not in PAPER]
    uncompiled: dict[str, torch.Tensor] = {}
    with Warnings() as warnings:
        if options.compile:
            uncompiled = check(Methods(plain, model, size, batch, device, False), names, {})
            torch.compiler.reset()
            plain = plain.clone()
            filtered = {"guard_filter_fn": skip_torch_compile_dict}  # as core's own node
            set_torch_compile_wrapper(plain, backend="inductor", options=filtered)
        methods = Methods(plain, model, size, batch, device, not options.compile)
        check(methods, names, uncompiled)
        label = f"{name} {size}² batch {batch}"
        return {
            "step": timing.interleaved(methods.seconds, names, options.rounds, label,
                                       warm_up=device.type == "cuda"),
            "peak_mib": {each: methods.peak_mib(each) for each in names},
            "profile": hot_spots(methods),
            "notes": warnings.taca,
        }  # fmt: skip


def attention_in_use() -> str:
    """The kernel that core has chosen.

    Raises
    ------
    SystemExit
        If it is not the one that was asked for.
    """
    used = comfy.ldm.modules.attention.optimized_attention.__name__.removeprefix("attention_")
    if used != chosen:
        raise SystemExit(
            f"--attention {chosen} was asked for, and core chose {used}: it does not run here "
            f"(core's log says why)."
        )
    return used


@torch.inference_mode()  # as ComfyUI runs its nodes
def main() -> None:
    options = parse()
    attention = attention_in_use()
    device = comfy.model_management.get_torch_device()
    on_gpu = device.type == "cuda"
    timing.set_clock(options.clock)
    options.full = options.full or on_gpu
    options.rounds = options.rounds or (50 if on_gpu else 7)
    results = timing.Results("model", options.out, device)
    for name in options.models:
        model = MODELS[name]
        depth = model.depth if options.full else model.reduced
        for dtype in options.dtypes or ["bfloat16" if on_gpu else "float32"]:
            plain = load(model, depth, getattr(torch, dtype), device)
            for size in options.sizes or [1024 if on_gpu else 512]:
                for batch in options.batches:
                    case = {
                        "model": name, "dtype": dtype, "size": size, "batch": batch,
                        "depth": depth, "compiled": options.compile, "attention": attention,
                        "text_tokens": model.text[0], "mask": model.mask,
                        "environment": timing.environment(device, options.clock),
                        **measure(plain, name, size, batch, options, device),
                    }  # fmt: skip
                    results.add(heading(case), case)
                    print(f"\n### {heading(case)}\n\n{table(case)}", flush=True)
            comfy.model_management.unload_all_models()
    parts = ["# One step of a model in ComfyUI\n"]
    for title, case in results.cases.items():
        parts.append(f"## {title}\n\n{timing.said(case['environment'])}\n\n{table(case)}\n")
    panels = {
        title: {"one step": {m: row for m, row in case["step"].items() if m != "plain"}}
        for title, case in results.cases.items()
    }
    timing.bars(panels, METHODS, results.file.with_suffix(".png"),
                timing.said(case["environment"]))  # fmt: skip
    results.write("\n".join(parts))


if __name__ == "__main__":
    main()
