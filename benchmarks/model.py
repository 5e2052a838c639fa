"""What the nodes cost: one step of a model in a real ComfyUI, by core's sampler.

Core's models at full width, with all blocks on a GPU and few on a CPU, with seeded weights: a
FLUX.1-dev, SD3.5-Medium and -Large, Qwen-Image and Chroma, with what the nodes install; and the
paper's ways, by core's override of attention. ``README.md`` says how to read the result.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from logging.handlers import BufferingHandler
from typing import Any

import attention as blocks
import timing
import torch
from reporting import ROOT, markdown
from torch import Tensor

sys.path.append(str(ROOT / "hosting"))

import comfyui  # isort: skip
import comfy.ldm.modules.attention
import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.supported_models
from comfy_api.torch_helpers import set_torch_compile_wrapper

RANKS = (16, 64)
STRENGTH = 0.8  # of a LoRA
PAPER = {"two full": blocks.Joint.two_full, "dense": blocks.Joint.dense}
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
WORDS = {"word": 1.5, "negative word": -1.0}
WEIGHED = {
    "plain": "plain",
    "plain again": "plain, again",
    "word": "one word at 1.5",
    "negative word": "one word at -1",
}
T_INSIDE, T_OUTSIDE = 0.99, 0.5
DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn")


@dataclass(frozen=True)
class Model:
    """A published model's sizes, as ComfyUI's detection finds them."""

    config: str  # class in comfy.supported_models
    sizes: dict[str, Any]  # of its transformer
    depth: dict[str, Any]  # numbers of blocks, as published
    reduced: dict[str, Any]  # the same on a CPU, and what else is made smaller there
    text: tuple[int, int]  # tokens and width
    latent: tuple[int, ...] = (16,)  # channels, and frames of those that have them
    pooled: int = 0  # width of the other prompt vector
    mask: str = ""  # which of attention.mask_of


FLUX_LIKE = {"patch_size": 2, "context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0}
FLUX_LIKE |= {"num_heads": 24, "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True}
FLUX_LIKE |= {"txt_ids_dims": []}
FLUX = FLUX_LIKE | {"image_model": "flux", "in_channels": 16, "out_channels": 16}
FLUX |= {"vec_in_dim": 768, "guidance_embed": True}
CHROMA = FLUX_LIKE | {"image_model": "chroma", "in_channels": 64, "out_channels": 64}
CHROMA |= {"vec_in_dim": None, "in_dim": 64, "out_dim": 3072, "hidden_dim": 5120, "n_layers": 5}
FLUX_BLOCKS = {"depth": 19, "depth_single_blocks": 38}
TWO = {"depth": 1, "depth_single_blocks": 1}
SD3 = {"in_channels": 16, "out_channels": 16, "patch_size": 2, "input_size": None}
SD3 |= {"adm_in_channels": 2048, "pos_embed_max_size": 192, "num_patches": 192 * 192}
SD3 |= {"qk_norm": "rms", "pos_embed_scaling_factor": None}


def sd3(width: int, twice: int) -> Model:
    """An SD3.5 of width 64 times ``width``; in ``twice`` of its blocks the image attends twice."""
    linear = {"in_features": 4096, "out_features": 64 * width}
    embedder = {"target": "torch.nn.Linear", "params": linear}
    sizes = SD3 | {"depth": width, "context_embedder_config": embedder}
    sizes |= {"x_block_self_attn_layers": list(range(twice))}
    reduced = {"num_blocks": 2, "x_block_self_attn_layers": [0] * bool(twice)}
    return Model("SD3", sizes, {"num_blocks": width}, reduced, (333, 4096), pooled=2048)


QWEN, QWEN_BLOCKS = {"image_model": "qwen_image"}, ({"num_layers": 60}, {"num_layers": 1})
SMALL = TWO | {"hidden_dim": 512}
MODELS = {
    "flux": Model("Flux", FLUX, FLUX_BLOCKS, TWO, (512, 4096), pooled=768),
    "sd35-medium": sd3(24, 13),
    "sd35-large": sd3(38, 0),
    "qwen-image": Model("QwenImage", QWEN, *QWEN_BLOCKS, (256, 3584), (16, 1), mask="keys"),
    "chroma": Model("Chroma", CHROMA, FLUX_BLOCKS, SMALL, (512, 4096), mask="regions"),
}


def load(model: Model, depth: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    """The model with seeded weights, as core's loader would make it from a file."""
    config = getattr(comfy.supported_models, model.config)({**model.sizes, **depth})
    fp8 = dtype == torch.float8_e4m3fn
    config.set_inference_dtype(dtype, torch.bfloat16 if fp8 else None)
    loaded = config.get_model({}, "", device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in loaded.diffusion_model.state_dict().items():  # SD3 has a buffer in it
        value = torch.empty(weight.shape, device=device, dtype=torch.bfloat16 if fp8 else dtype)
        if weight.ndim < 2:
            value.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            value.normal_(0, weight[0].numel() ** -0.5, generator=generator)
        weight.copy_(value)
    offload = comfy.model_management.unet_offload_device()
    return comfy.model_patcher.ModelPatcher(loaded, load_device=device, offload_device=offload)


def random_lora(model: Any, rank: int) -> dict[str, Tensor]:
    """On every linear layer of the blocks."""
    state, generator = {}, torch.Generator().manual_seed(0)
    for name, module in model.model.named_modules():
        if "blocks" in name and hasattr(module, "in_features"):
            shapes = {"up": (module.out_features, rank), "down": (rank, module.in_features)}
            for part, shape in shapes.items():
                value = torch.randn(shape, generator=generator) * 0.01
                state[f"{name}.lora_{part}.weight"] = value
    return state


def paper(
    way: Any, sizes: Any, func: Any, q: Any, k: Any, v: Any, heads: int, *rest: Any, **kwargs: Any
) -> Tensor:
    """One of the paper's ways, as core's override of the joint attention."""
    (text, length), (mask, *_) = sizes, (*rest, kwargs.pop("mask", None))
    if not kwargs.pop("skip_reshape", False):
        q, k, v = (x.flatten(2).unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return func(q, k, v, heads, mask=mask, skip_reshape=True, **kwargs)

    if q.shape[2] != length:  # the second attention of SD3.5-Medium
        return attend(q, k, v, mask)
    gamma = torch.full((1,), blocks.GAMMA, device=q.device)
    return way(blocks.Joint(q, k, v, text, mask, gamma, attend))


class Methods:
    """A model, compiled or not, with every method on it, and seeded inputs.

    ``overrides`` are those of attention, by name: none on a compiled model, where core freezes an
    override at its first call. ``pack`` is the package to measure, by default this checkout's.
    """

    def __init__(
        self,
        plain: Any,
        model: Model,
        size: int,
        batch: int,
        overrides: Any,
        ranks: Any,
        pack: str = "taca",
    ) -> None:
        names = "patch", "schedule", "lora_fit", "conditioning", "words", "prompt_tokens"
        parts = (importlib.import_module(f"{pack}.{name}") for name in names)
        patch, schedule, lora, *of_words = parts
        taca = patch.patch_model(plain, schedule.Schedule())
        self.models = {"plain": plain, "plain again": plain, "outside": taca, "inside": taca}
        for rank in ranks:
            fitted = lora.fit_lora(random_lora(plain, rank), plain.model, f"r = {rank}", STRENGTH)
            self.models[f"lora {rank}"] = patch.patch_lora(taca, fitted)
        self.models["outside lora"] = self.models[f"lora {ranks[-1]}"]
        for name, override in overrides.items():
            self.models[name] = plain.clone()
            options = self.models[name].model_options.setdefault("transformer_options", {})
            options["optimized_attention_override"] = override
        text, side, generator = model.text[0], size // 16, torch.Generator().manual_seed(0)
        self.noise = torch.randn(batch, *model.latent, size // 8, size // 8, generator=generator)
        conds: dict[str, Any] = {"guidance": 3.5}
        if model.pooled:
            conds["pooled_output"] = torch.randn(1, model.pooled, generator=generator)
        mask = blocks.mask_of(model.mask, text, side**2, torch.float32)
        if model.mask == "keys":  # as a text encoder gives it
            conds["attention_mask"] = (mask[:, 0, :text] == 0).long()
        elif model.mask:
            conds |= {"attention_mask": mask, "attention_mask_img_shape": (side, side)}
        self.conditioning = [[torch.randn(1, *model.text, generator=generator), conds]]
        conditioning, words, tokens = of_words
        self.weighed = {}
        for name, weight in WORDS.items():  # a word of two tokens, on the plain model
            weights = (1.0,) * 5 + (weight,) * 2 + (1.0,) * (text - 7)
            prompt = tokens.PromptTokens("", ((),) * text)
            own = words.Words(prompt, weights, (("word", weight),))
            self.models[name] = plain
            self.weighed[name] = conditioning.attach(self.conditioning, own)

    def run(self, method: str, around: Callable[..., Any], is_inside: bool | None = None) -> Any:
        """One sampling run by core, whose sampler calls the model as ``around`` says.

        ``around`` is given what calls the model once, at a sigma that by default is the method's.
        The run's own sigmas have a step inside the window, and one outside.
        """
        if is_inside is None:
            is_inside = method == "inside" or method.startswith("lora")
        t, found = T_INSIDE if is_inside else T_OUTSIDE, []

        def sampler(model: Any, x: Tensor, sigmas: Tensor, extra_args: Any, **_: Any) -> Tensor:
            sigma = torch.full((x.shape[0],), t, device=x.device)
            found.append(around(partial(model, x, sigma, **extra_args)))
            return x

        sampled = comfy.samplers.KSAMPLER(sampler), torch.tensor([T_INSIDE, T_OUTSIDE, 0.0])
        positive = self.weighed.get(method, self.conditioning)
        inputs = positive, self.conditioning, torch.zeros_like(self.noise)
        model, options = self.models[method], {"disable_pbar": True, "seed": 0}
        comfy.sample.sample_custom(model, self.noise, 1.0, *sampled, *inputs, **options)
        return found[0]

    def output(self, method: str, is_inside: bool) -> Tensor:
        """What a call gives."""
        return self.run(method, lambda call: call().clone(), is_inside)


def check(methods: Methods, names: list[str], uncompiled: dict[str, Tensor]) -> dict[str, Tensor]:
    """What each method gives inside the window, made sure of; and a first call of each.

    ``uncompiled`` is the same of the model that is not compiled; empty if this is it.

    Raises ValueError if a method outside the window is not the plain model to the bit, if TACA or
    its LoRA does nothing inside, if a way of the paper's computes something else, or a compiled
    model.
    """
    outside = {name for name in ("outside", "outside lora") if name in names}
    for name in outside:
        if not torch.equal(methods.output(name, False), methods.output("plain", False)):
            raise ValueError(f"{name} the window: not the plain model")
    inside = [name for name in names if name not in {"plain again", *outside}]
    found = {name: methods.output(name, True).double() for name in inside}
    ours = [name for name in inside if name not in PAPER]
    for name, other in itertools.pairwise(ours):
        if torch.equal(found[name], found[other]):
            raise ValueError(f"{other}: the same as {name}")
    for way in set(PAPER) & set(inside) if "inside" in found else ():
        effect = torch.dist(found["plain"], found["inside"])
        if not torch.dist(found[way], found["inside"]) < 0.5 * effect:
            raise ValueError(f"{way}: not what TACA computes")
    for name in ours if uncompiled else ():
        nearest = min(ours, key=lambda other: torch.dist(found[name], uncompiled[other]))
        if nearest != name:
            raise ValueError(f"{name}, compiled: nearer to uncompiled {nearest}")
    return found


def without_options(entries: Any) -> list[bool]:
    """The guards that core's node for torch.compile keeps; it needs packages that are not here."""
    return ["transformer_options" not in entry.name for entry in entries]


def compile_seconds(methods: Methods, method: str) -> float:
    """Seconds of a first call, when nothing is compiled and nothing kept."""
    torch.compiler.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        start = time.perf_counter()
        methods.output(method, True)
        return time.perf_counter() - start


def heading(case: dict[str, Any]) -> str:
    kinds = {"depth": "double", "depth_single_blocks": "single"}
    kinds |= {"num_blocks": "joint", "num_layers": "joint"}
    depth = ", ".join(f"{n} {kinds[key]}" for key, n in case["depth"].items() if key in kinds)
    return (
        f"{case['model']}, {case['size']}², {case['dtype']} weights, batch {case['batch']}, "
        f"{'compiled, ' * case['compiled']}{case['attention']} attention "
        f"({depth} blocks{blocks.MASKED[case['mask']]})"
    )


def table(case: dict[str, Any], methods: dict[str, str] = METHODS) -> str:
    """Ratios as Markdown."""
    steps, rows = case["step"], []
    for name, label in methods.items():
        if name in steps:
            row, pictures = steps[name], ["", ""]
            if name == "inside" or name.startswith("lora") or name in PAPER:
                outside = "outside lora" if name.startswith("lora") else "outside"
                outside = steps.get("plain again" if name in PAPER else outside)
                ways = timing.picture(row), timing.picture(row, outside)
                pictures = [timing.ranged(way, 4) for way in ways]
            peak = timing.peak_cell(case["peak_mib"], name, 1)
            rows.append([label, timing.cell(row), f"{row['median_s']:.4g}", *pictures, peak])
    head = ["", "one step", "seconds", "30 steps", "30 steps, outside as measured", "peak MiB"]
    notes = [f"TACA says: {note}" for note in case["notes"]]
    if "compiling" in case:
        ratio = timing.cell(case["compiling"]["inside"])
        notes.append(f"Compiling a call inside the window takes {ratio} of plain's time.")
    return "\n\n".join([markdown(head, rows), *notes])


def measure(
    plain: Any,
    name: str,
    model: Model,
    size: int,
    batch: int,
    options: Any,
    device: torch.device,
    ranks: tuple[int, ...] = RANKS,
) -> dict[str, Any]:
    """One model at one size and batch; compiled, also how long compiling takes.

    Raises SystemExit if core says that another attention runs than the one that was asked for.
    """
    uncompiled: dict[str, Tensor] = {}
    names = ["plain", *(options.methods or list(WEIGHED if options.words else METHODS)[1:])]
    overrides, said = {}, BufferingHandler(10**6)
    said.addFilter(lambda record: "attention" in record.getMessage().lower())
    said.setLevel(logging.WARNING)
    logging.getLogger().addHandler(said)
    try:
        if options.compile:
            names = [name for name in names if name not in PAPER]
            uncompiled = check(Methods(plain, model, size, batch, {}, ranks), names, {})
            torch.compiler.reset()
            plain = plain.clone()
            filtered = {"guard_filter_fn": without_options}
            set_torch_compile_wrapper(plain, backend="inductor", options=filtered)
        else:
            sizes = model.text[0], model.text[0] + (size // 16) ** 2
            overrides = {name: partial(paper, way, sizes) for name, way in PAPER.items()}
        methods = Methods(plain, model, size, batch, overrides, ranks)
        compiling = {}
        if options.compile:
            measured = partial(compile_seconds, methods)
            times = timing.interleaved(measured, ("plain", "inside"), 3, "compiling", (), False)
            compiling = {"compiling": timing.summaries(times)}
        check(methods, names, uncompiled)
        seconds, peak = (partial(f, device=device) for f in (timing.seconds, timing.peak_mib))
        label, warm_up = f"{name} {size}² batch {batch}", device.type == "cuda"
        times = timing.interleaved(
            lambda name: methods.run(name, seconds), names, options.rounds, label, (), warm_up
        )
        peaks = {each: methods.run(each, peak) for each in names}
        found = {"step": timing.summaries(times), "peak_mib": peaks, **compiling}
    finally:
        logging.getLogger().removeHandler(said)
    notes, others = ([], [])
    for record in said.buffer:
        (notes if record.name == "taca" else others).append(record.getMessage())
    if others:
        raise SystemExit(
            f"--attention {comfyui.asked} does not run this model, for core says: {others[0]} "
            f"What would be timed is another kernel: take that one."
        )
    return found | {"notes": notes}


@torch.inference_mode()  # as ComfyUI runs its nodes
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, parents=[comfyui.parser])
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=["flux"])
    add("--methods", nargs="+", choices=list(METHODS | WEIGHED)[1:], help="beside plain")
    add("--words", action="store_true", help="words that weigh, in place of TACA and the paper's")
    add("--compile", action="store_true", help="by torch's inductor")
    add("--full", action="store_true", help="all blocks, as on a GPU")
    options = timing.parse_cases(parser, DTYPES)
    attention = comfy.ldm.modules.attention.optimized_attention.__name__.partition("_")[2]
    if attention != comfyui.asked:
        raise SystemExit(
            f"--attention {comfyui.asked} was asked for, and core chose {attention}: it does not "
            f"run here (core's log says why)."
        )
    device = comfy.model_management.get_torch_device()
    methods = WEIGHED if options.words else METHODS
    table_of = partial(table, methods=methods)
    results = timing.Results("words-cost" if options.words else "model", options.out, device)
    for name, dtype in itertools.product(options.models, options.dtypes):
        model = MODELS[name]
        depth = model.depth if options.full or device.type == "cuda" else model.reduced
        plain = load(model, depth, getattr(torch, dtype), device)
        for size, batch in itertools.product(options.sizes, options.batches):
            case = {"model": name, "dtype": dtype, "size": size, "batch": batch, "depth": depth}
            case |= {"compiled": options.compile, "attention": attention, "mask": model.mask}
            case |= {"text_tokens": model.text[0]}
            case["environment"] = timing.environment(device, options.clock)
            case |= measure(plain, name, model, size, batch, options, device)
            results.add(heading(case), case)
            print(f"\n### {heading(case)}\n\n{table_of(case)}", flush=True)
        comfy.model_management.unload_all_models()
    results.report("One step of a model in ComfyUI", table_of)
    results.plot(methods)


if __name__ == "__main__":
    main()
