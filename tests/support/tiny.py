"""Tiny FLUX and SD3.5-Medium-shaped models: published key layout, core's loaders, seeded weights.

The weights are large enough that attention is far from uniform, so that gamma shows.
"""

import comfy.samplers
import comfy.sd
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_custom_sampler import (
    BasicGuider,
    CFGGuider,
    KSamplerSelect,
    Noise_RandomNoise,
)
from safetensors.torch import save_file

import nodes

from .reference import euler

KINDS = ["flux", "sd3"]
HIDDEN = 128  # of FLUX, with its one head of 128 (16 + 56 + 56 for RoPE)
CONTEXT = {"flux": 64, "flux-fill": 64, "schnell": 64, "sd3": 48}


def shapes_flux(in_channels=64, guidance=True, depth=2):
    """Names and shapes of a FLUX.1 with so many double and so many single blocks."""
    h, context, vector, mlp = HIDDEN, CONTEXT["flux"], 32, 4 * HIDDEN
    linear = {
        "img_in": (h, in_channels),
        "txt_in": (h, context),
        "time_in.in_layer": (h, 256),
        "time_in.out_layer": (h, h),
        "vector_in.in_layer": (h, vector),
        "vector_in.out_layer": (h, h),
        "final_layer.linear": (64, h),
        "final_layer.adaLN_modulation.1": (2 * h, h),
    }
    if guidance:
        linear |= {"guidance_in.in_layer": (h, 256), "guidance_in.out_layer": (h, h)}
    norm = {}
    for i in range(depth):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            linear |= {
                f"{block}_mod.lin": (6 * h, h),
                f"{block}_attn.qkv": (3 * h, h),
                f"{block}_attn.proj": (h, h),
                f"{block}_mlp.0": (mlp, h),
                f"{block}_mlp.2": (h, mlp),
            }
            norm |= {f"{block}_attn.norm.{which}_norm.scale": (128,) for which in ("query", "key")}
        block = f"single_blocks.{i}"
        linear |= {
            f"{block}.linear1": (3 * h + mlp, h),
            f"{block}.linear2": (h, h + mlp),
            f"{block}.modulation.lin": (3 * h, h),
        }
        norm |= {f"{block}.norm.{which}_norm.scale": (128,) for which in ("query", "key")}
    return linear, norm, {}


def shapes_sd3():
    """Names and shapes of an SD3.5-Medium with 2 blocks, the first with ``attn2``."""
    h, context, pooled, mlp = 128, CONTEXT["sd3"], 32, 512
    linear = {
        "context_embedder": (h, context),
        "t_embedder.mlp.0": (h, 256),
        "t_embedder.mlp.2": (h, h),
        "y_embedder.mlp.0": (h, pooled),
        "y_embedder.mlp.2": (h, h),
        "final_layer.linear": (64, h),
        "final_layer.adaLN_modulation.1": (2 * h, h),
    }
    norm = {}
    for i in range(2):
        for stream in ("context", "x"):
            block = f"joint_blocks.{i}.{stream}_block"
            last_context = i == 1 and stream == "context"  # "pre only": it gives keys and values
            attentions = ["attn", "attn2"] if (i == 0 and stream == "x") else ["attn"]
            chunks = 2 if last_context else 9 if len(attentions) == 2 else 6
            linear[f"{block}.adaLN_modulation.1"] = (chunks * h, h)
            for attention in attentions:
                linear[f"{block}.{attention}.qkv"] = (3 * h, h)
                norm |= {f"{block}.{attention}.ln_{which}.weight": (64,) for which in ("q", "k")}
                if not last_context:
                    linear[f"{block}.{attention}.proj"] = (h, h)
            if not last_context:
                linear |= {f"{block}.mlp.fc1": (mlp, h), f"{block}.mlp.fc2": (h, mlp)}
    other = {
        "x_embedder.proj.weight": (h, 16, 2, 2),
        "x_embedder.proj.bias": (h,),
        "pos_embed": (1, 32 * 32, h),
    }
    return linear, norm, other


def weights(kind, seed=0):
    """A seeded state dict in the layout of the published file."""
    linear, norm, other = {
        "flux": shapes_flux,
        "flux-fill": lambda: shapes_flux(in_channels=384),
        "flux-short": lambda: shapes_flux(depth=1),
        "schnell": lambda: shapes_flux(guidance=False),
        "sd3": shapes_sd3,
    }[kind]()
    generator = torch.Generator().manual_seed(seed)

    def normal(shape, std):
        return torch.randn(shape, generator=generator) * std

    state = {}
    for name, (rows, columns) in linear.items():
        state[f"{name}.weight"] = normal((rows, columns), columns**-0.5)
        state[f"{name}.bias"] = normal((rows,), 0.1)
    for name, shape in norm.items():
        state[name] = 2.0 + normal(shape, 0.2)
    for name, shape in other.items():
        state[name] = normal(shape, 0.1)
    return state


def load(folder, kind, seed=0, **options):
    """The model as core's UNETLoader reads it from a file; a ModelPatcher."""
    path = folder / f"{kind}-{seed}.safetensors"
    if not path.exists():
        save_file(weights(kind, seed), path)
    return comfy.sd.load_diffusion_model(str(path), model_options=options)


def conditioning(kind, length, seed=1, batch=1, **values):
    """A seeded CONDITIONING of this many text tokens."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(batch, length, CONTEXT[kind], generator=generator)
    pooled = torch.randn(batch, 32, generator=generator)
    return [[text, {"pooled_output": pooled, **values}]]


def latent(height, width, batch=1, seed=2, channels=16):
    """Seeded latents."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, height, width, generator=generator)


def sample(
    model,
    kind,
    steps=10,
    cfg=3.0,
    size=(16, 16),
    text=(7, 12),
    batch=1,
    sampler="euler",
    scheduler="simple",
    positive=None,
    negative=None,
    seed=3,
):
    """Latents of a run through core's KSampler function."""
    positive = positive or conditioning(kind, text[0])
    negative = negative or conditioning(kind, text[1], seed=5)
    empty = {"samples": torch.zeros(batch, 16, *size)}
    return nodes.common_ksampler(
        model, seed, steps, cfg, sampler, scheduler, positive, negative, empty
    )[0]["samples"]


def reference(
    model,
    kind,
    steps=10,
    cfg=3.0,
    size=(16, 16),
    text=(7, 12),
    gamma=1.2,
    first=1,
    seed=3,
    guidance=3.5,
):
    """The same run, dense, in float64, with the authors' gate."""
    conds = [conditioning(kind, text[0]), conditioning(kind, text[1], seed=5)]
    extra = [{"y": c[0][1]["pooled_output"]} for c in conds]
    if kind in ("flux", "flux-fill"):
        extra = [e | {"guidance": torch.tensor([guidance])} for e in extra]
    noise = torch.randn(1, 16, *size, generator=torch.manual_seed(seed))
    model_sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(model_sampling, "simple", steps)
    concat = None
    if kind == "flux-fill":  # no picture is given, and all of it is to be painted
        picture = model.model.process_latent_in(torch.zeros_like(noise))
        concat = torch.cat([picture, torch.ones(1, 64, *size)], 1)
    texts = (cond[0][0] for cond in conds)
    return euler(model, noise, sigmas, *texts, cfg, gamma, first, extra, concat)


def installed_on(model):
    """Joint blocks whose forward is not their class's own."""
    transformer = model.model.diffusion_model
    return [b for b in transformer.modules() if "forward" in b.__dict__]


def call(model, x, sigma, text, extra):
    """One call of the model with its wrappers, as the sampler merges them."""
    options = {"wrappers": model.wrappers}
    return model.model.apply_model(x, sigma, c_crossattn=text, transformer_options=options, **extra)


def sigmas_of(model, steps):
    return comfy.samplers.calculate_sigmas(
        model.get_model_object("model_sampling"), "simple", steps
    )


def run(node, model, kind, steps=4, cfg=1.0, size=(16, 16), text=7, sampler="euler", **more):
    """The node, or core's SamplerCustomAdvanced, on seeded inputs; its results."""
    positive, negative = conditioning(kind, text), conditioning(kind, text, seed=5)
    guider = (
        BasicGuider.execute(model, positive)
        if cfg == 1
        else CFGGuider.execute(model, positive, negative, cfg)
    ).result[0]
    return node.execute(
        Noise_RandomNoise(3),
        guider,
        KSamplerSelect.execute(sampler).result[0],
        sigmas_of(model, steps),
        {"samples": torch.zeros(1, 16, *size)},
        **more,
    ).result


def counting(model):
    """A clone of the model, and a list that gets the number of rows of each of its calls."""
    calls, counted = [], model.clone()

    def count(executor, *args, **kwargs):
        calls.append(len(args[0]))
        return executor(*args, **kwargs)

    counted.add_wrapper(WrappersMP.APPLY_MODEL, count)
    return counted, calls


def tiled(together):
    """A node's function around the model: two tiles, in one call or in two.

    In one call the rows are t1 positive, t1 negative, t2 positive, t2 negative.
    """

    def call(apply_model, given):
        x, t, c = given["input"], given["timestep"], given["c"]
        tiles = x.chunk(2, -1)
        if not together:
            return torch.cat([apply_model(tile, t, **c) for tile in tiles], -1)
        twice = {
            key: torch.cat([each, each]) if isinstance(each, torch.Tensor) else each
            for key, each in c.items()
        }
        both = apply_model(torch.cat(tiles), torch.cat([t, t]), **twice)
        return torch.cat(both.chunk(2), -1)

    return call
