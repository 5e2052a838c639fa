"""Tiny U-ViTs, and the published forward and process in float64."""

import importlib
import itertools

import torch
from einops import rearrange
from safetensors.torch import save_file

import nodes
from support.uvit_streams import streams

CONFIG = importlib.import_module("taca_pack.uvit.config")
NETWORK = importlib.import_module("taca_pack.uvit.network")
FILES = importlib.import_module("taca_pack.uvit.files")
MODEL = importlib.import_module("taca_pack.uvit.model")
TRAINING = importlib.import_module("taca_pack.uvit.training")
UViTConfig, UViT = CONFIG.UViTConfig, NETWORK.UViT
TINY = {"blocks": 5, "width": 128, "channels": 4, "side": 8, "text_tokens": 7, "text_width": 48}
FUSIONS = {
    "early": {},
    "central": {"image_blocks": 1},
    "middle": {"image_blocks": 2},
    "early, attended apart": {"conditioning": "cross-attention"},
    "central, attended apart": {"image_blocks": 1, "conditioning": "cross-attention"},
    "two streams": {"image_blocks": 1, "caption_blocks": 2},
    "two streams, text as keys": {
        "image_blocks": 1,
        "caption_blocks": 2,
        "conditioning": "cross-attention",
    },
}
"""What a file can be; all but those attended apart have one softmax over text and image."""
ONE_SOFTMAX = [name for name in FUSIONS if "apart" not in name]


def seeded(network, seed=0):
    """Weights large enough that every part counts."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, tensor in network.state_dict().items():
        if not tensor.is_floating_point():
            state[key] = tensor
        elif "norm" in key and key.endswith("weight"):
            state[key] = 1 + 0.2 * torch.randn(tensor.shape, generator=generator)
        else:
            scale = tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.1
            state[key] = scale * torch.randn(tensor.shape, generator=generator)
    network.load_state_dict(state)
    return network


def inputs(config, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, config.channels, config.side, config.side, generator=generator)
    t = torch.tensor([317, 1000, 1][:batch])
    return x, t, torch.randn(batch, config.text_tokens, config.text_width, generator=generator)


def reference(w, x, t, context, blocks, heads, first, last, cross=False, gamma=1.0):
    """U-ViT in float64, from its weights by name, with dense attention; shares nothing with ours.

    Text is a stream of its own here, and skips are kept apart for each stream.
    """
    w = {key: value.double() for key, value in w.items()}
    x, context = x.double(), context.double()
    width = w["norm.weight"].shape[0]
    n_text = context.shape[1]

    def linear(name, value):
        out = torch.einsum("bnc,dc->bnd", value, w[f"{name}.weight"])
        return out + w[f"{name}.bias"] if f"{name}.bias" in w else out

    def norm(name, value):
        mean = value.mean(-1, keepdim=True)
        variance = ((value - mean) ** 2).mean(-1, keepdim=True)
        return (value - mean) / (variance + 1e-5) ** 0.5 * w[f"{name}.weight"] + w[f"{name}.bias"]

    def softmax_attention(q, k, v, scale=1.0):
        q, k, v = (rearrange(z, "b n (h d) -> b h n d", h=heads) for z in (q, k, v))
        logits = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5 * scale
        out = torch.einsum("bhij,bhjd->bhid", logits.softmax(-1), v)
        return rearrange(out, "b h n d -> b n (h d)")

    frequencies = torch.tensor(
        [10000 ** (-i / (width // 2)) for i in range(width // 2)], dtype=torch.float64
    )
    angles = t.double()[:, None] * frequencies
    time = torch.cat([torch.cos(angles), torch.sin(angles)], 1)[:, None]
    kernel = w["patch_embed.proj.weight"]
    p = kernel.shape[-1]
    patches = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
    image = torch.einsum("bnc,dc->bnd", patches, kernel.flatten(1)) + w["patch_embed.proj.bias"]
    text = linear("context_embed", context) + w["pos_embed"][:, 1 : 1 + n_text]
    time, image = time + w["pos_embed"][:, :1], image + w["pos_embed"][:, 1 + n_text :]
    image, skips = torch.cat([time, image], 1), []  # time is the first of the image's stream

    half = blocks // 2
    joint_text = text
    for i in range(blocks):
        name = (
            f"in_blocks.{i}"
            if i < half
            else "mid_block"
            if i == half
            else f"out_blocks.{i - half - 1}"
        )
        joint = first <= i <= last and not cross
        if i > half:
            skip_image, skip_text = skips.pop()
            image = linear(f"{name}.skip_linear", torch.cat([image, skip_image], -1))
            if joint:
                if skip_text is None:
                    skip_text = torch.zeros_like(joint_text)
                joint_text = linear(f"{name}.skip_linear", torch.cat([joint_text, skip_text], -1))
        # [time | image | text]: the order does not matter to a softmax
        tokens = torch.cat([image, joint_text], 1) if joint else image
        scale = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.float64)
        scale[1 : image.shape[1], image.shape[1] :] = gamma
        q, k, v = linear(f"{name}.attn.qkv", norm(f"{name}.norm1", tokens)).split(width, -1)
        tokens = tokens + linear(f"{name}.attn.proj", softmax_attention(q, k, v, scale))
        if cross and first <= i <= last:
            q = linear(f"{name}.cross.q", norm(f"{name}.norm_cross", tokens))
            k, v = linear(f"{name}.cross.kv", text).split(width, -1)
            tokens = tokens + linear(f"{name}.cross.proj", softmax_attention(q, k, v))
        hidden = linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", tokens))
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        tokens = tokens + linear(f"{name}.mlp.fc2", hidden)
        image = tokens[:, : image.shape[1]]
        if joint:
            joint_text = tokens[:, image.shape[1] :]
        if i < half:
            skips.append((image, joint_text if joint else None))
    patches = linear("decoder_pred", norm("norm", image))[:, 1:]
    grid = x.shape[-1] // p
    latent = rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=grid, p=p, q=p)
    return torch.nn.functional.conv2d(
        latent, w["final_layer.weight"], w["final_layer.bias"], padding=1
    )


def predicted(config, state, x, t, context, gamma=1.0):
    """The noise that a network of this config predicts, by whichever reference is its own."""
    heads = config.width // 64
    if config.caption_blocks is not None:
        return torch.from_numpy(streams(state, x, t, context, heads, gamma))
    first, last = config.image_blocks, config.blocks - 1 - config.image_blocks
    cross = config.conditioning == "cross-attention"
    return reference(state, x, t, context, config.blocks, heads, first, last, cross, gamma)


def write(path, seed=0, metadata=True, **changes):
    """A tiny U-ViT's file; its path and config."""
    network = seeded(UViT(UViTConfig(**TINY | changes)), seed)
    said = FILES.metadata_of(network.config, 0.25) if metadata else {}
    save_file(network.state_dict(), path, said)
    return str(path), network.config


def conditioning(config, seed=1):
    return [[inputs(config, 1, seed)[2], {}]]


def sample(model, config, steps=4, cfg=1.0, seed=3):
    """A run through core's KSampler function."""
    empty = {"samples": torch.zeros(1, config.channels, config.side, config.side)}
    positive, negative = conditioning(config), conditioning(config, 2)
    return nodes.common_ksampler(
        model, seed, steps, cfg, "euler", "normal", positive, negative, empty
    )[0]["samples"]


def reference_run(config, state, steps=4, gamma=1.0, scale=0.25, seed=3, cfg=1.0, texts=None):
    """The same run in float64, by the reference network and the published schedule."""
    betas = torch.linspace(0.00085**0.5, 0.0120**0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)
    sigmas = ((1 - kept) / kept) ** 0.5
    times = torch.linspace(999, 0, steps, dtype=torch.float64).round().long().tolist()
    levels = [*sigmas[times].tolist(), 0.0]
    shape = (1, config.channels, config.side, config.side)
    noise = torch.randn(shape, generator=torch.manual_seed(seed)).double()
    x = noise * (1 + levels[0] ** 2) ** 0.5
    positive, negative = texts or (conditioning(config, seed)[0][0] for seed in (1, 2))
    for t, (sigma, following) in zip(times, itertools.pairwise(levels), strict=True):
        parts = [
            predicted(
                config, state, x / (1 + sigma**2) ** 0.5, torch.tensor([t + 1]), context, gamma
            )
            for context in ([positive] if cfg == 1 else [positive, negative])
        ]
        epsilon = parts[-1] + cfg * (parts[0] - parts[-1])
        x = x + (following - sigma) * epsilon
    return x / scale


def without(state, part):
    return {key: value for key, value in state.items() if part not in key}
