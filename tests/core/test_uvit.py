"""U-ViT: the published forward, other fusions, files, and what ComfyUI does with it."""

import dataclasses
import importlib
import io
import itertools
import json
import math
import os
from pathlib import Path
from unittest import mock

import comfy.clip_model
import comfy.ldm.models.autoencoder
import comfy.model_base
import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.utils
import folder_paths
import numpy as np
import pytest
import tiny
import torch
from einops import rearrange
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_compile import compiled
from test_server import load
from test_training import train
from torch._dynamo.utils import counters
from workflow import ONE_THREAD, ROOT, api_form, read

import nodes

CONFIG = importlib.import_module("taca_pack.uvit.config")
NETWORK = importlib.import_module("taca_pack.uvit.network")
FILES = importlib.import_module("taca_pack.uvit.files")
MODEL = importlib.import_module("taca_pack.uvit.model")
TRAINING = importlib.import_module("taca_pack.uvit.training")
UViTConfig, UViT = CONFIG.UViTConfig, NETWORK.UViT

CASES = int(os.environ.get("TACA_FUZZ", "300"))
PUBLISHED = {"small": (13, 44_692_644), "small deep": (17, 58_345_636)}
TINY = {"blocks": 5, "width": 128, "channels": 4, "side": 8, "text_tokens": 7, "text_width": 48}
FUSIONS = {
    "early": (0, 4), "central": (1, 3), "middle": (2, 2), "front": (0, 2), "back": (1, 4),
}  # fmt: skip


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
        name = (f"in_blocks.{i}" if i < half else "mid_block" if i == half
                else f"out_blocks.{i - half - 1}")  # fmt: skip
        joint = first <= i <= last and not cross
        if i > half:
            skip_image, skip_text = skips.pop()
            image = linear(f"{name}.skip_linear", torch.cat([image, skip_image], -1))
            if joint:
                if skip_text is None:
                    skip_text = torch.zeros_like(joint_text)
                joint_text = linear(
                    f"{name}.skip_linear", torch.cat([joint_text, skip_text], -1)
                )  # fmt: skip
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


@pytest.mark.parametrize("size", ["small", pytest.param("small deep", marks=pytest.mark.slow)])
def test_is_the_published_network(size):
    """Parameters, names and the forward of the published shapes, to 1e-5: by torch and as ComfyUI
    calls it, at the first and the last timestep.
    """
    blocks, count = PUBLISHED[size]
    network = seeded(UViT(UViTConfig(blocks=blocks)))
    state = network.state_dict()
    assert sum(p.numel() for p in state.values()) == count
    assert state["pos_embed"].shape == (1, 334, 512)
    assert state["out_blocks.0.skip_linear.weight"].shape == (512, 1024)
    assert state["mid_block.attn.qkv.weight"].shape == (1536, 512)
    assert state["decoder_pred.weight"].shape == (16, 512)
    assert FILES.read_config(state, None, "it") == (network.config, 0.23010)
    x, _, context = inputs(network.config)
    t = torch.tensor([1, 1000])
    expected = reference(state, x, t, context, blocks, 8, 0, blocks - 1)
    assert (network(x, t, context) - expected).abs().max() < 1e-5 * expected.abs().max()
    operations = comfy.ops.disable_weight_init
    in_comfyui = MODEL.ComfyUViT(network.config, torch.float32, None, operations)
    in_comfyui.load_state_dict(state)
    ours = in_comfyui(x, t - 1, context)
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("conditioning", ["concatenation", "cross-attention"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion(fusion, conditioning):
    """Also where the text's blocks do not lie evenly around the middle one."""
    first, last = FUSIONS[fusion]
    network = seeded(UViT(UViTConfig(**TINY, first=first, last=last, conditioning=conditioning)))
    given = inputs(network.config)
    cross = conditioning == "cross-attention"
    expected = reference(network.state_dict(), *given, 5, 2, first, last, cross)
    assert (network(*given) - expected).abs().max() < 1e-5 * expected.abs().max()
    metadata = FILES.metadata_of(network.config, 0.5)
    assert FILES.read_config(network.state_dict(), metadata, "it") == (network.config, 0.5)


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
    )[0]["samples"]  # fmt: skip


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
            reference(
                state, x / (1 + sigma**2) ** 0.5, torch.tensor([t + 1]), context, config.blocks,
                config.width // 64, config.first, config.last,
                config.conditioning == "cross-attention", gamma,
            )
            for context in ([positive] if cfg == 1 else [positive, negative])
        ]  # fmt: skip
        epsilon = parts[-1] + cfg * (parts[0] - parts[-1])
        x = x + (following - sigma) * epsilon
    return x / scale


@pytest.mark.parametrize("conditioning_by", ["concatenation", "cross-attention"])
def test_core_samples_the_published_process(tmp_path, pack, conditioning_by, monkeypatch):
    """Loader, schedule, timesteps, latent scale and attention, through core's sampler."""
    path, config = write(tmp_path / "it.safetensors", first=1, last=3, conditioning=conditioning_by)
    monkeypatch.setattr(folder_paths, "get_full_path_or_raise", lambda kind, name: path)
    model = pack["LoadUViT"].execute("it.safetensors").result[0]
    assert model.model.diffusion_model.config == config
    expected = reference_run(config, load_file(path))
    ours = sample(model, config)
    assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()
    assert torch.isfinite(sample(model, config, steps=2, cfg=2.0)).all()


def test_taca_equals_dense(tmp_path, apply_taca):
    """In the blocks that share text and image, and in no other."""
    path, config = write(tmp_path / "it.safetensors", first=1, last=3)
    model, state = MODEL.load_uvit(path), load_file(path)
    plain, expected = (reference_run(config, state, gamma=g) for g in (1.0, 1.5))
    ours = sample(apply_taca(model, 1.5, 0.0), config)
    assert (ours - expected).abs().max() < 2e-3 * (plain - expected).abs().max()
    assert torch.equal(sample(apply_taca(model, 1.0, 0.0), config), sample(model, config))


def test_taca_refuses_cross_attention(tmp_path, apply_taca):
    path, _ = write(tmp_path / "it.safetensors", first=1, last=3, conditioning="cross-attention")
    with pytest.raises(ValueError, match="U-ViT with text by cross-attention"):
        apply_taca(MODEL.load_uvit(path))


def seeded_as(kind, *given, **more):
    """A module of core's, made without its own first weights."""
    with torch.device("meta"):
        module = kind(*given, **more)
    return seeded(module.to_empty(device="cpu")).state_dict()


@pytest.mark.slow
def test_core_draws_a_picture_of_a_prompt(tmp_path, pack, monkeypatch):
    """Load CLIP with a CLIP-L of full size, the published text and latent scale, CFG, and an SD VAE
    of few channels: the picture is the one of the float64 run.
    """
    config = json.loads(Path(comfy.sd1_clip.__file__).with_name("sd1_clip_config.json").read_text())
    operations = comfy.ops.disable_weight_init
    text = seeded_as(comfy.clip_model.CLIPTextModel, config, torch.float32, None, operations)
    parts = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3,
             "ch": 32, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [],
             "dropout": 0.0}  # fmt: skip
    vae = seeded_as(comfy.ldm.models.autoencoder.AutoencoderKL, embed_dim=4, ddconfig=parts)
    vae = {key: value for key, value in vae.items() if "encoder" not in key}
    network = seeded(UViT(UViTConfig(blocks=3, width=64, side=8)))
    files = {"text_encoders": text, "vae": vae, "diffusion_models": network.state_dict()}
    for kind, state in files.items():
        save_file(state, tmp_path / f"{kind}.safetensors")
        monkeypatch.setitem(
            folder_paths.folder_names_and_paths, kind, ([str(tmp_path)], {".safetensors"})
        )
    model = pack["LoadUViT"].execute("diffusion_models.safetensors").result[0]
    clip = nodes.CLIPLoader().load_clip("text_encoders.safetensors", "stable_diffusion")[0]
    decoder = nodes.VAELoader().load_vae("vae.safetensors")[0]
    texts = [nodes.CLIPTextEncode().encode(clip, words)[0] for words in ("a red train", "")]
    latent = nodes.EmptyLatentImage().generate(64, 64)[0]
    drawn = nodes.KSampler().sample(model, 3, 4, 2.0, "euler", "normal", *texts, latent)[0]
    expected = reference_run(
        network.config, network.state_dict(), scale=0.23010, cfg=2.0, texts=[c[0][0] for c in texts]
    )
    assert (drawn["samples"] - expected).abs().max() < 1e-4 * expected.abs().max()
    decode = nodes.VAEDecode().decode
    ours, picture = (decode(decoder, z)[0] for z in (drawn, {"samples": expected.float()}))
    assert ours.shape == (1, 64, 64, 3)
    assert picture.std() > 0.05
    assert (ours - picture).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("conditioning_by", "whole"),
    [
        ("concatenation", True),
        pytest.param("concatenation", False, marks=pytest.mark.slow),
        pytest.param("cross-attention", True, marks=pytest.mark.slow),
    ],
)
def test_compiled(tmp_path, apply_taca, conditioning_by, whole):
    """As core compiles, with TACA and without in turn; nothing is stale."""
    path, config = write(tmp_path / "it.safetensors", first=1, last=3, conditioning=conditioning_by)
    model, state = MODEL.load_uvit(path), load_file(path)
    torch._dynamo.reset()
    counters.clear()
    fast = compiled(model, whole, lists=("in_blocks", "out_blocks"))
    plain = reference_run(config, state)
    turns, effect = [(fast, plain)], plain.abs().max()
    if conditioning_by == "concatenation":
        expected = reference_run(config, state, gamma=1.5)
        turns.insert(0, (apply_taca(fast, 1.5, 0.0), expected))
        effect = (plain - expected).abs().max()
    for m, wanted in turns * 2:
        assert (sample(m, config) - wanted).abs().max() < 2e-3 * effect
    assert counters["stats"]["unique_graphs"]
    assert not counters["graph_break"]
    torch._dynamo.reset()


def test_cfg_on_two_devices(tmp_path, apply_taca, monkeypatch):
    """Core's MultiGPU CFG Split: a copy of the model and a thread for each half."""
    pytest.importorskip("comfy_extras.nodes_multigpu", reason="this ComfyUI runs on one device")
    from test_multigpu import DEVICES, split, watched

    monkeypatch.setattr(
        comfy.model_management, "get_all_torch_devices", lambda exclude_current=False: DEVICES[:]
    )
    path, config = write(tmp_path / "it.safetensors", first=1, last=3)
    model, state = MODEL.load_uvit(path), load_file(path)
    plain, expected = (reference_run(config, state, gamma=g, cfg=2.0) for g in (1.0, 1.5))
    both, calls = watched(split(apply_taca(model, 1.5, 0.0)))
    ours = sample(both, config, cfg=2.0)
    assert (ours - expected).abs().max() < 2e-3 * (plain - expected).abs().max()
    assert len(calls) == 4 * 2
    assert {device for device, *_ in calls} == set(DEVICES)
    assert len({base for _, base, *_ in calls}) == 2


def as_pth(path, state):
    """A bare state dict, as the published ones are."""
    torch.save(state, path)
    return str(path)


def test_the_published_file(tmp_path):
    """``.pth``, without metadata: text of 77 tokens, its own latent scale; fp16 too."""
    network = seeded(UViT(UViTConfig(blocks=3, width=64)))
    half = {key: value.half() for key, value in network.state_dict().items()}
    for state in (network.state_dict(), half):
        model = MODEL.load_uvit(as_pth(tmp_path / "mscoco.pth", state))
        assert model.model.diffusion_model.config == network.config
        assert model.model.latent_format.scale_factor == 0.23010
        assert model.model.model_type == comfy.model_base.ModelType.EPS
        assert torch.isfinite(sample(model, network.config, steps=1)).all()


def without(state, part):
    return {key: value for key, value in state.items() if part not in key}


BROKEN = {
    "is not a U-ViT": lambda s: {"weight": torch.zeros(2)},
    "lacks mid_block.attn.qkv.weight": lambda s: without(s, "mid_block.attn.qkv.weight"),
    "lacks out_blocks.0": lambda s: without(s, "out_blocks.0"),
    "odd number": lambda s: without(s, "out_blocks.1"),
    "lacks pos_embed": lambda s: without(s, "pos_embed"),
    "positions": lambda s: s | {"pos_embed": s["pos_embed"][:, 1:]},
    "in another shape": lambda s: s | {"norm.weight": torch.ones(3)},
    "lacks in_blocks.2": lambda s: s | {"in_blocks.900000000.norm1.weight": torch.ones(128)},
    "patch_embed.proj.weight has 2 axes": lambda s: (
        s | {"patch_embed.proj.weight": s["patch_embed.proj.weight"].flatten(1)}
    ),
    "pos_embed has 1 axes": lambda s: s | {"pos_embed": s["pos_embed"].flatten()},
    "decoder_pred.weight has 0 axes": lambda s: s | {"decoder_pred.weight": torch.tensor(1.0)},
    "fused_blocks, the first": lambda s: s | {"fused_blocks": torch.tensor([1])},
    "with text, is (nan, 3.0)": lambda s: s | {"fused_blocks": torch.tensor([torch.nan, 3])},
    "with text, is (1.5, 3.0)": lambda s: s | {"fused_blocks": torch.tensor([1.5, 3.0])},
    "with text, is ((1+0j), (3+0j))": lambda s: s | {"fused_blocks": s["fused_blocks"] + 0j},
    "side is at least 1": lambda s: s | {"patch_embed.proj.weight": torch.zeros(128, 4, 0, 2)},
    "in a type that is not floating-point": lambda s: (
        s | {"norm.bias": s["norm.bias"].to(torch.int8)}
    ),
    "draws classes": lambda s: without(s, "context_embed") | {"label_emb.weight": torch.ones(3)},
    "lacks context_embed": lambda s: without(s, "context_embed"),
    "beside a U-ViT's": lambda s: s | {"label_emb.weight": torch.ones(3)},
    "cannot join": lambda s: s | {"fused_blocks": torch.tensor([3, 9])},
}


@pytest.mark.parametrize("problem", BROKEN)
def test_a_wrong_file_is_told(tmp_path, problem):
    path, _ = write(tmp_path / "wrong.safetensors", first=1, last=3)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(BROKEN[problem](load_file(path)), path, metadata)
    with pytest.raises(ValueError, match=r"wrong\.safetensors") as told:
        MODEL.load_uvit(path)
    assert problem in str(told.value)


METADATA = {  # by a file's metadata
    "not JSON": "{", "no table": "[]", "no number": '{"text_tokens": "many"}',
    "endless": '{"text_tokens": 1e999}', "less than none": '{"text_tokens": -2}',
    "no scale": '{"latent_scale": 0}', "nan": '{"latent_scale": NaN}',
}  # fmt: skip


@pytest.mark.parametrize("what", METADATA)
def test_wrong_metadata_is_told(tmp_path, what):
    path, _ = write(tmp_path / "it.safetensors")
    save_file(load_file(path), path, {"uvit": METADATA[what]})
    with pytest.raises(ValueError, match=r"it\.safetensors.*Save U-ViT"):
        MODEL.load_uvit(path)


def test_another_model_is_told(tmp_path):
    """Those with a U-ViT's names among theirs too; not "download it again"."""
    pixart = {"pos_embed": torch.zeros(1, 4, 8), "blocks.0.attn.qkv.weight": torch.zeros(24, 8)}
    mae = pixart | {"patch_embed.proj.weight": torch.zeros(8, 3, 2, 2),
                    "decoder_pred.weight": torch.zeros(12, 8)}  # fmt: skip
    for name, state in {"sd3": tiny.weights("sd3"), "pixart": pixart, "mae": mae}.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    models = {"blocks": ["pixart", "mae"], "joint_blocks": ["sd3"]}
    paths = [(part, tmp_path / f"{name}.safetensors") for part in models for name in models[part]]
    demos = ROOT / "demo/models/taca_demo_mmdit.safetensors"
    for part, path in [*paths, ("joint_blocks", demos)]:
        with pytest.raises(ValueError, match=rf"{path.name} is not a U-ViT.* {part}.*Load Diff"):
            MODEL.load_uvit(str(path))


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory):
    """A U-ViT's file, and its tensors and metadata."""
    small = {"blocks": 3, "width": 64, "first": 1, "last": 1}
    path, _ = write(tmp_path_factory.mktemp("whole") / "it.safetensors", **small)
    with safe_open(path, "pt") as file:
        return Path(path), load_file(path), file.metadata()


SHAPES = st.lists(st.integers(0, 5), max_size=5)
KINDS = st.sampled_from(
    [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8,
     torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64]
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3), max_leaves=3,
)  # fmt: skip


def damage_tensors(data, state):
    for key in sorted(data.draw(st.sets(st.sampled_from(sorted(state)), min_size=1, max_size=2))):
        how = data.draw(st.sampled_from(["lost", "shape", "kind", "name", "number"]))
        old = state.pop(key)
        if how == "shape":
            state[key] = torch.zeros(data.draw(SHAPES))
        elif how == "kind":
            state[key] = old.to(data.draw(KINDS))
        elif how != "lost":
            new = data.draw(st.text(max_size=9)) if how == "name" else key.replace("0", "7")
            state[new] = old


@settings(max_examples=CASES // 2, deadline=None, database=None)
@seed(0)
@given(data=st.data())
def test_any_damaged_file_is_told_or_loaded(whole_file, data):
    """Tensors lost, misshapen, of other types or names; metadata or bytes changed; cut short."""
    good, state, metadata = whole_file
    state = dict(state)
    what = data.draw(st.sampled_from(["tensors", "tensors", "metadata", "bytes", "cut"]))
    if what == "tensors":
        damage_tensors(data, state)
    if what == "metadata":
        said = json.loads(metadata["uvit"])
        said |= data.draw(st.dictionaries(st.sampled_from(sorted(said)), JSON, min_size=1))
        metadata = metadata | {"uvit": json.dumps(said)}
    path = good.with_name("damaged." + data.draw(st.sampled_from(["pth", "safetensors"])))
    if path.suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path, metadata)
    whole = bytearray(path.read_bytes())
    if what == "bytes":
        for at in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=3)):
            whole[at] = data.draw(st.integers(0, 255))
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))] if what == "cut" else whole)
    try:
        model = MODEL.load_uvit(str(path))
    except ValueError as error:
        assert path.name in str(error)  # noqa: PT017
    else:
        sample(model, model.model.diffusion_model.config, steps=1)


def test_an_unreadable_file_is_told(tmp_path):
    path, _ = write(tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:999])
    (tmp_path / "cut.pth").write_bytes(b"no archive")
    torch.save({"pos_embed": "text"}, tmp_path / "text.pth")
    torch.save({"pos_embed": Path("x")}, tmp_path / "code.pth")  # weights_only refuses it
    save_file({"a": torch.zeros(1)}, tmp_path / "said.safetensors")
    for name in ("cut.safetensors", "cut.pth", "text.pth", "code.pth", "said.safetensors"):
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            MODEL.load_uvit(str(tmp_path / name))
    write(tmp_path / "other.safetensors", metadata=False)  # 7 text tokens, as nothing says
    with pytest.raises(ValueError, match="Save U-ViT"):
        MODEL.load_uvit(str(tmp_path / "other.safetensors"))
    assert path


def test_the_wrong_latents_and_prompts_are_told(tmp_path):
    path, config = write(tmp_path / "it.safetensors")
    model = MODEL.load_uvit(path)
    with pytest.raises(ValueError, match="64 x 64 pixels"):
        sample(model, dataclasses.replace(config, side=16))
    with pytest.raises(ValueError, match="7 tokens of 48"):
        sample(model, dataclasses.replace(config, text_tokens=14))


def test_core_loads_it_again(tmp_path):
    """What core's trainer and its nodes for several GPUs ask for."""
    path, config = write(tmp_path / "it.safetensors", first=2, last=2)
    model = MODEL.load_uvit(path)
    make, given = model.cached_patcher_init
    again = make(*given)
    assert torch.equal(sample(again, config), sample(model, config))
    assert not make(*given, disable_dynamic=True).is_dynamic()


def save(pack, model, monkeypatch, folder):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(folder))
    pack["SaveUViT"].execute(model, "uvit")
    return str(next(folder.glob("uvit_*.safetensors")))


@pytest.mark.parametrize("conditioning_by", ["concatenation", "cross-attention"])
def test_what_is_saved_is_what_is_loaded(tmp_path, pack, monkeypatch, conditioning_by):
    path, config = write(tmp_path / "it.safetensors", first=1, last=3, conditioning=conditioning_by)
    model = MODEL.load_uvit(path)
    saved = save(pack, model, monkeypatch, tmp_path)
    assert torch.equal(sample(MODEL.load_uvit(saved), config), sample(model, config))
    assert MODEL.load_uvit(saved).model.latent_format.scale_factor == 0.25
    with pytest.raises(ValueError, match="takes a U-ViT"):
        save(pack, tiny.load(tmp_path, "sd3"), monkeypatch, tmp_path)


def test_core_trains_and_merges_a_lora(tmp_path, pack, monkeypatch):
    """Core's trainer on a U-ViT; and a file has in it what its LoRAs made of the weights."""
    path, config = write(tmp_path / "it.safetensors", first=1, last=3)
    model = MODEL.load_uvit(path)
    latents = [{"samples": inputs(config, 1, seed)[0]} for seed in (1, 2)]
    positive = [conditioning(config, seed) for seed in (1, 2)]
    lora, losses = train(model, None, optimizer="AdamW", rate=1e-2, data=(latents, positive))
    assert all(map(math.isfinite, losses))
    tuned, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)
    expected = sample(tuned, config)
    assert not torch.allclose(expected, sample(model, config))
    saved = save(pack, tuned, monkeypatch, tmp_path)
    ours = sample(MODEL.load_uvit(saved), config)
    assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()


RECIPE = {"batch_size": 4, "learning_rate": 1e-3, "warm_up": 3, "ema": 0.9, "bf16": False}


def data_of(pictures=6):
    x, _, context = inputs(UViTConfig(**TINY), 3)
    times = pictures // 3
    return TRAINING.Data(
        x.repeat(times, 1, 1, 1), context.repeat(times, 1, 1), context[:1] * 0, 0.5
    )  # fmt: skip


def training(folder, config=None, name="it", data=None, **changes):
    config = config or UViTConfig(**TINY, first=1, last=3)
    recipe = TRAINING.Recipe(**RECIPE | changes)
    return TRAINING.Training(config, recipe, data or data_of(), folder / f"{name}.safetensors")


@pytest.fixture
def grad():
    with torch.enable_grad():
        yield


def test_a_stopped_training_goes_on_to_the_bit(tmp_path, grad):
    """Stopped by an interrupt between two checkpoints, and by the end."""
    whole = training(tmp_path, name="whole")
    whole.run(9, 100, lambda running: None)

    def interrupt(running):
        if running.step == 4:
            raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        training(tmp_path).run(9, 100, interrupt)
    second = training(tmp_path)
    assert second.step == 4
    second.run(6, 100, lambda running: None)
    resumed = training(tmp_path)
    assert resumed.step == 6
    resumed.run(9, 100, lambda running: None)
    files = [load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "it")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    assert len(resumed.losses) == 9
    loaded = MODEL.load_uvit(str(tmp_path / "it.safetensors")).model.diffusion_model
    assert torch.equal(loaded.pos_embed, resumed.average["pos_embed"])


def test_a_checkpoint_of_another_training_is_told(tmp_path, grad):
    training(tmp_path).run(1, 1, lambda running: None)
    for changes, told in (
        ({"seed": 1}, "seed 0, now 1"),
        ({"config": UViTConfig(**TINY)}, "another network"),
        ({"config": UViTConfig(**TINY | {"width": 64}, first=1, last=3)}, "another network"),
    ):
        with pytest.raises(ValueError, match=told):
            training(tmp_path, **changes)
    write(tmp_path / "it.safetensors")
    with pytest.raises(ValueError, match=r"it\.safetensors is not a checkpoint"):
        training(tmp_path)


def test_a_checkpoint_of_other_data_is_told(tmp_path, grad):
    """More, others, in another order; one among 900, picture or caption; not the last bits of those
    encoded anew.
    """
    training(tmp_path).run(1, 1, lambda running: None)
    many, one, two = data_of(900), data_of(900), data_of(900)
    one.latents[17] = one.latents[17].flip(0)
    two.context[17] = two.context[17].flip(0)
    training(tmp_path, name="many", data=many).run(1, 1, lambda running: None)
    data = data_of()
    for told, name, changed in (
        ("other pictures; other captions[.]", "it", data_of(9)),
        ("other pictures[.]", "it", dataclasses.replace(data, latents=data.latents.flip(0))),
        ("other pictures[.]", "it", dataclasses.replace(data, latents=1.01 * data.latents)),
        ("other captions[.]", "it", dataclasses.replace(data, context=data.context.flip(0))),
        ("another empty prompt", "it", dataclasses.replace(data, empty=data.context[:1])),
        ("latent_scale 0.5, now 0.6", "it", dataclasses.replace(data, latent_scale=0.6)),
        ("other pictures[.]", "many", one),
        ("other captions[.]", "many", two),
    ):
        with pytest.raises(ValueError, match=rf"{name}\.safetensors was.*{told}.*another name"):
            training(tmp_path, name=name, data=changed)
    noise = torch.randn(data.latents.shape, generator=torch.manual_seed(0))
    latents = data.latents * (1 + 1e-3 * noise)
    anew = dataclasses.replace(data, latents=latents, latent_scale=0.5001)
    assert training(tmp_path, data=anew).step == 1


EARLIER = {"no data": {}, "a sketch": {"data": {"latents": [6, 4, 8, 8, 39.0, 0.1, 0.2, 0.3, 0.4]}}}


@pytest.mark.parametrize("kept", EARLIER)
def test_a_checkpoint_without_samples_of_its_data_resumes(tmp_path, grad, caplog, kept):
    """As those of earlier versions; the next checkpoint has them."""
    training(tmp_path).run(1, 1, lambda running: None)
    path = tmp_path / "it.safetensors"
    with safe_open(path, "pt") as file:
        said = json.loads(file.metadata()["uvit"]) | EARLIER[kept]
    save_file(without(load_file(path), "training.data"), path, {"uvit": json.dumps(said)})
    running = training(tmp_path, data=data_of(9))
    assert "it.safetensors is of an earlier version" in caplog.text
    running.run(2, 1, lambda running: None)
    with pytest.raises(ValueError, match="other pictures"):
        training(tmp_path)


def test_a_training_that_diverges_is_told(tmp_path, grad):
    running = training(tmp_path, learning_rate=1e30, warm_up=0)
    with pytest.raises(RuntimeError, match="lower the learning rate"):
        running.run(50, 1, lambda running: None)
    state = load_file(tmp_path / "it.safetensors")
    assert all(w.isfinite().all() for w in state.values() if w.is_floating_point())


@pytest.mark.parametrize("bf16", [False, True])
def test_the_gradient_is_that_of_the_published_loss(tmp_path, grad, bf16):
    """The first step's loss and update, from the reference network in float64."""
    running = training(tmp_path, bf16=bf16, p_uncond=0.5, warm_up=0, learning_rate=1e-4)
    before = {k: w.detach().clone() for k, w in running.network.state_dict().items()}
    drawn = torch.Generator().manual_seed(1)
    chosen = torch.randint(6, (4,), generator=drawn)
    t = torch.randint(1, 1001, (4,), generator=drawn)
    empty = torch.rand(4, generator=drawn) < 0.5
    noise = torch.randn(4, 4, 8, 8, generator=drawn)
    assert empty.any()
    assert not empty.all()
    betas = torch.linspace(0.00085**0.5, 0.0120**0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)[t - 1][:, None, None, None]
    noisy = kept**0.5 * running.data.latents[chosen] + (1 - kept) ** 0.5 * noise
    context = running.data.context[chosen] * ~empty[:, None, None]
    leaves = {k: w.double().requires_grad_(w.is_floating_point()) for k, w in before.items()
              if w.is_floating_point()}  # fmt: skip
    loss = (reference(leaves, noisy, t, context, 5, 2, 1, 3) - noise).square().mean()
    loss.backward()
    running.run(1, 1, lambda running: None)
    assert running.losses[0] == pytest.approx(loss.item(), rel=1e-2 if bf16 else 1e-5)
    if not bf16:  # AdamW's first step is the gradient's sign
        after = running.network.state_dict()
        for key, leaf in leaves.items():
            moved = after[key] - before[key] * (1 - 1e-4 * 0.03)
            clear = leaf.grad.abs() > 1e-5
            assert torch.allclose(
                moved[clear], -1e-4 * leaf.grad[clear].sign().float(), atol=1e-5
            ), key  # fmt: skip


NODE = {
    "fusion": "intermediate", "text_blocks": 1, "conditioning": "concatenation", "blocks": 3,
    "width": 64, "steps": 40, "batch_size": 6, "learning_rate": 3e-3, "warm_up": 5, "ema": 0.9,
    "p_uncond": 0.1, "precision": "fp32", "seed": 0, "checkpoint": "it", "checkpoint_every": 100,
}  # fmt: skip


@pytest.fixture
def train_node(pack, tmp_path, monkeypatch):
    """Train U-ViT as core calls it: all inputs in lists, in inference mode."""
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    config = UViTConfig(**TINY)

    def run(latents=None, positive=None, **changes):
        x, _, context = inputs(config, 3)
        with torch.inference_mode():
            latents = latents or [{"samples": x[i : i + 1]} for i in range(3)]
            positive = positive or [[[context[i : i + 1], {}]] for i in range(3)]
            negative = [[[torch.zeros(1, *context.shape[1:]), {}]]]
            settings = {name: [value] for name, value in (NODE | changes).items()}
            return pack["TrainUViT"].execute(latents, positive, negative, **settings)

    return run


def test_the_node_trains(train_node, tmp_path):
    """The loss falls, the plot is shown, the model samples; started again, it is there."""
    out = train_node()
    losses = load_file(tmp_path / "uvit/it.safetensors")["training.losses"]
    assert len(losses) == 40
    assert losses[-5:].mean() < 0.7 * losses[:5].mean()
    model, plot = out.result
    assert plot.shape == (1, 360, 720, 3)
    assert out.ui["images"]
    assert "40 steps" in out.ui["text"][0]
    config = model.model.diffusion_model.config
    assert (config.first, config.last, config.blocks) == (1, 1, 3)
    assert model.model.latent_format.scale_factor == 0.23010
    assert torch.isfinite(sample(model, config)).all()
    assert torch.equal(sample(train_node().result[0], config), sample(model, config))
    with pytest.raises(ValueError, match="40 steps already"):
        train_node(steps=39)


def test_an_interrupt_keeps_the_checkpoint(train_node, tmp_path, monkeypatch):
    """The page's Stop button, pressed as the progress bar begins."""

    def press(value, total, *args, **kwargs):
        assert total == 40
        comfy.model_management.interrupt_current_processing(value == 1)

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", press)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train_node()
    assert len(load_file(tmp_path / "uvit/it.safetensors")["training.losses"]) == 1
    monkeypatch.undo()
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    assert train_node().ui["text"][0].startswith("40 steps")


def test_one_batch_and_other_latents(train_node):
    """As the demo's dataset has them; and a scale of their own where there is no published one."""
    x = 5 * torch.randn(3, 16, 8, 8, generator=torch.manual_seed(0))
    _, _, context = inputs(UViTConfig(**TINY), 3)
    out = train_node(
        [{"samples": x}], [[[c[None], {}] for c in context]], steps=2, fusion="early",
        conditioning="cross-attention", precision="bf16",
    )  # fmt: skip
    model = out.result[0].model
    assert model.latent_format.scale_factor == pytest.approx(1 / x.std().item(), abs=1e-4)
    assert model.diffusion_model.config.is_early
    assert model.diffusion_model.joint_blocks is None


BAD_DATA = {
    "square": {"latents": [{"samples": torch.zeros(3, 4, 8, 6)}]},
    "of one size": {"latents": [{"samples": torch.zeros(1, 4, s, s)} for s in (8, 8, 6)]},
    "multiple of 16": {"latents": [{"samples": torch.zeros(3, 4, 7, 7)}]},
    "2 captions": {"positive": [[[torch.zeros(2, 7, 48), {}]]]},
    "14 x 48, 7 x 48": {"positive": [[[torch.zeros(3, 14, 48), {}]]]},
    "no name for a checkpoint": {"checkpoint": "../it"},
    "odd number": {"blocks": 4},
}


@pytest.mark.parametrize("told", BAD_DATA)
def test_bad_data_is_told(train_node, told):
    with pytest.raises(ValueError, match=told):
        train_node(**BAD_DATA[told])


@pytest.mark.slow
def test_the_demo_learns_to_draw_its_prompts(tmp_path):
    """The demo's workflow in full on a server: the loss falls, and by the checker the prompted
    shapes appear; from the saved file the same pictures, and those of another prompt it learnt.
    """
    world = load("world")
    with (
        mock.patch.dict(os.environ, ONE_THREAD),
        load("comfy_server").serving(tmp_path / "base", tmp_path / "log") as server,
    ):
        graph = api_form(read(ROOT / "demo/workflows/taca_demo_uvit.json"),
                         server.get("/object_info"))  # fmt: skip
        ids = {node["class_type"]: key for key, node in graph.items()}
        [prompt] = [n["inputs"] for n in graph.values() if n["inputs"].get("text")]
        first = pictures_of(server, server.run(graph)[ids["SaveImage"]])
        saved = next((tmp_path / "base/output/diffusion_models").glob("*.safetensors"))
        graph[ids["TrainUViT"]] = {"class_type": "LoadUViT", "inputs": {"unet_name": saved.name}}
        del graph[ids["SaveUViT"]]
        again = pictures_of(server, server.run(graph)[ids["SaveImage"]])
        told, prompt["text"] = prompt["text"], "a blue circle below a cyan circle"
        other = pictures_of(server, server.run(graph)[ids["SaveImage"]])
    checkpoint = next((tmp_path / "base/output/uvit").glob("*.safetensors"))
    losses = load_file(checkpoint)["training.losses"]
    assert losses[-100:].mean() < 0.1 * losses[:100].mean()
    for pictures, caption in ((first, told), (other, prompt["text"])):
        right = [world.check(picture, caption)["everything"] for picture in pictures]
        assert len(right) == 4
        assert sum(right) >= 3, caption
    assert np.abs(first - again).max() < 0.02


def pictures_of(server, output):
    """The pictures of a node's output, in [0, 1]."""
    files = [io.BytesIO(server.picture(image)) for image in output["images"]]
    return np.stack([np.asarray(Image.open(f).convert("RGB"), np.float32) / 255 for f in files])
