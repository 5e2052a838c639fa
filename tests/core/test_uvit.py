"""U-ViT: the published forward, other fusions, files, and what ComfyUI does with it."""

import dataclasses
import json
import math
from pathlib import Path

import comfy.clip_model
import comfy.ldm.models.autoencoder
import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import folder_paths
import pytest
import torch
from comfy_extras.nodes_model_merging import ModelMergeSimple, ModelSave
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters

import nodes
from support import tiny
from support.compiling import compiled
from support.multigpu import DEVICES, needs_multigpu, split, watched
from support.training import train
from support.uvit import (
    FILES,
    FUSIONS,
    MODEL,
    ONE_SOFTMAX,
    TINY,
    UViT,
    UViTConfig,
    conditioning,
    inputs,
    predicted,
    reference,
    reference_run,
    sample,
    seeded,
    write,
)

PUBLISHED = {"small": (13, 44_692_644), "small deep": (17, 58_345_636)}
TIMES = torch.tensor([1, 317, 1000])
CONDITIONINGS = "concatenation", "cross-attention"
STREAMS = [(6, 0, 0), (6, 3, 1), (6, 1, 3), (12, 3, 3), (12, 0, 4), (12, 5, 2), (12, 2, 6)]
"""Depth, c and v; depth 12 with c = v = 3 is what the author's code sets."""


@pytest.mark.slow
@pytest.mark.parametrize("size", PUBLISHED)
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


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion(fusion):
    network = seeded(UViT(UViTConfig(**TINY | FUSIONS[fusion])))
    x, t, context = inputs(network.config)
    expected = predicted(network.config, network.state_dict(), x, t, context)
    assert (network(x, t, context) - expected).abs().max() < 1e-5 * expected.abs().max()
    metadata = FILES.metadata_of(network.config, 0.5)
    assert FILES.read_config(network.state_dict(), metadata, "it") == (network.config, 0.5)


@pytest.mark.parametrize("conditioning_by", CONDITIONINGS)
@pytest.mark.parametrize(("depth", "c", "v"), STREAMS)
def test_is_the_authors_network(load_node, depth, c, v, conditioning_by):
    """Through Load U-ViT and with ComfyUI's attention, to 1e-5; sizes are read from its keys."""
    size = {"blocks": depth + 1, "caption_blocks": c, "image_blocks": v}
    model, config = load_node(**size, conditioning=conditioning_by)
    network = model.model.diffusion_model
    assert network.config == config
    x, _, context = inputs(config, 3)
    expected = predicted(config, network.state_dict(), x, TIMES, context)
    ours = network(x, TIMES - 1, context)
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("conditioning_by", CONDITIONINGS)
def test_is_the_authors_network_at_its_size(conditioning_by):
    """Parameters, names and the forward of c = v = 3, to 1e-5."""
    config = UViTConfig(image_blocks=3, caption_blocks=3, conditioning=conditioning_by)
    network = seeded(UViT(config))
    state = network.state_dict()
    assert sum(p.numel() for p in state.values()) == 44_692_644 + 3 * 3_150_848
    parts = {name.rpartition(".0.")[0]: 0 for name in state if "_blocks.0." in name}
    counts = {part: len({k.split(".")[1] for k in state if k.startswith(part)}) for part in parts}
    assert counts == {
        "image_blocks": 3,
        "caption_blocks": 3,
        "joint_blocks": 3,
        "joint_skip_blocks": 3,
        "image_skip_blocks": 3,
    }
    assert ("caption_blocks.2.attn.kv.weight" in state) == (conditioning_by == "cross-attention")
    assert FILES.read_config(state, None, "it") == (config, 0.23010)
    x, _, context = inputs(config, 3)
    expected = predicted(config, state, x, TIMES, context)
    assert (network(x, TIMES, context) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("v", [0, 1, 2])
def test_the_authors_network_without_captions_is_the_published_one(v):
    """But for names and the order of positions."""
    early = seeded(UViT(UViTConfig(**TINY, image_blocks=v)))
    author = UViT(UViTConfig(**TINY, image_blocks=v, caption_blocks=0))
    time, text, image = early.pos_embed.split([1, 7, 16], 1)
    state = early.state_dict() | {"pos_embed": torch.cat((image, time, text), 1)}
    renamed = {}
    for name, weight in state.items():
        part, _, rest = name.partition("_blocks.")
        number, _, rest = rest.partition(".")
        if part == "in":
            outer, i = int(number) < v, int(number)
            name = f"image_blocks.{i}.{rest}" if outer else f"joint_blocks.{i - v}.{rest}"
        elif part == "out":
            outer, i = int(number) >= 2 - v, int(number)
            name = (
                f"image_skip_blocks.{i - 2 + v}.{rest}"
                if outer
                else f"joint_skip_blocks.{i}.{rest}"
            )
        if name != "fused_blocks":
            renamed[name] = weight
    author.load_state_dict(renamed)
    given = inputs(early.config)
    assert torch.equal(author(*given), early(*given))


@pytest.fixture
def load_node(tmp_path, pack, monkeypatch):
    """``changes -> MODEL, config`` of a tiny U-ViT, by Load U-ViT."""

    def load(**changes):
        path, config = write(tmp_path / "it.safetensors", **changes)
        monkeypatch.setattr(folder_paths, "get_full_path_or_raise", lambda kind, name: path)
        return pack["LoadUViT"].execute("it.safetensors").result[0], config

    return load


@pytest.mark.parametrize("fusion", FUSIONS)
def test_core_samples_the_published_process(load_node, fusion):
    """Loader, schedule, timesteps, latent scale and attention, through core's sampler."""
    model, config = load_node(**FUSIONS[fusion])
    state = model.model.diffusion_model.state_dict()
    for run in ({}, {"steps": 2, "cfg": 2.0}):
        expected = reference_run(config, state, **run)
        ours = sample(model, config, **run)
        assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("fusion", ONE_SOFTMAX)
def test_taca_equals_dense(tmp_path, apply_taca, fusion):
    """In the blocks that share text and image, and in no other."""
    path, config = write(tmp_path / "it.safetensors", **FUSIONS[fusion])
    model, state = MODEL.load_uvit(path), load_file(path)
    plain, expected = (reference_run(config, state, gamma=g) for g in (1.0, 1.5))
    ours = sample(apply_taca(model, 1.5, 0.0), config)
    assert (ours - expected).abs().max() < 2e-3 * (plain - expected).abs().max()
    assert torch.equal(sample(apply_taca(model, 1.0, 0.0), config), sample(model, config))


def test_taca_refuses_cross_attention(tmp_path, apply_taca):
    path, _ = write(tmp_path / "it.safetensors", **FUSIONS["central, attended apart"])
    with pytest.raises(ValueError, match="U-ViT with a separate cross-attention"):
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
    parts = {
        "double_z": True,
        "z_channels": 4,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fusion", "whole"),
    [
        ("central", True),
        ("central", False),
        ("central, attended apart", True),
        ("two streams, text as keys", True),
        ("two streams, text as keys", False),
        ("two streams", True),
    ],
)
def test_compiled(tmp_path, apply_taca, fusion, whole):
    """As core compiles, with TACA and without in turn; nothing is stale."""
    path, config = write(tmp_path / "it.safetensors", **FUSIONS[fusion])
    model, state = MODEL.load_uvit(path), load_file(path)
    torch._dynamo.reset()
    counters.clear()
    fast = compiled(
        model,
        whole,
        lists=[
            name
            for name, _ in model.model.diffusion_model.named_children()
            if name.endswith("_blocks")
        ],
    )
    plain = reference_run(config, state)
    turns, effect = [(fast, plain)], plain.abs().max()
    if fusion in ONE_SOFTMAX:
        expected = reference_run(config, state, gamma=1.5)
        turns.insert(0, (apply_taca(fast, 1.5, 0.0), expected))
        effect = (plain - expected).abs().max()
    for m, wanted in turns * 2:
        assert (sample(m, config) - wanted).abs().max() < 2e-3 * effect
    assert counters["stats"]["unique_graphs"]
    assert not counters["graph_break"]
    torch._dynamo.reset()


@needs_multigpu
def test_cfg_on_two_devices(tmp_path, apply_taca, monkeypatch):
    """Core's MultiGPU CFG Split: a copy of the model and a thread for each half."""
    monkeypatch.setattr(
        comfy.model_management, "get_all_torch_devices", lambda exclude_current=False: DEVICES[:]
    )
    path, config = write(tmp_path / "it.safetensors", image_blocks=1)
    model, state = MODEL.load_uvit(path), load_file(path)
    plain, expected = (reference_run(config, state, gamma=g, cfg=2.0) for g in (1.0, 1.5))
    both, calls = watched(split(apply_taca(model, 1.5, 0.0)))
    ours = sample(both, config, cfg=2.0)
    assert (ours - expected).abs().max() < 2e-3 * (plain - expected).abs().max()
    assert len(calls) == 4 * 2
    assert {device for device, *_ in calls} == set(DEVICES)
    assert len({base for _, base, *_ in calls}) == 2


def test_the_wrong_latents_and_prompts_are_told(tmp_path):
    path, config = write(tmp_path / "it.safetensors")
    model = MODEL.load_uvit(path)
    with pytest.raises(ValueError, match="64 x 64 pixels"):
        sample(model, dataclasses.replace(config, side=16))
    for tokens, told in (
        (14, "without words to avoid, and take out Conditioning"),
        (6, "not 6 of"),
    ):
        with pytest.raises(ValueError, match=rf"7 tokens of 48.*{told}"):
            sample(model, dataclasses.replace(config, text_tokens=tokens))
    area = nodes.ConditioningSetArea().append(conditioning(config), 32, 64, 0, 0, 1.0)[0]
    empty = {"samples": torch.zeros(1, 4, 8, 8)}
    with pytest.raises(ValueError, match="no area of a picture"):
        nodes.common_ksampler(model, 3, 4, 1.0, "euler", "normal", area, area, empty)


def test_core_loads_it_again(tmp_path):
    """What core's trainer and its nodes for several GPUs ask for."""
    path, config = write(tmp_path / "it.safetensors", image_blocks=2)
    model = MODEL.load_uvit(path)
    make, given = model.cached_patcher_init
    again = make(*given)
    assert torch.equal(sample(again, config), sample(model, config))
    assert not make(*given, disable_dynamic=True).is_dynamic()


def save(pack, model, monkeypatch, folder):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(folder))
    pack["SaveUViT"].execute(model, "uvit")
    return str(next(folder.glob("uvit_*.safetensors")))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_what_is_saved_is_what_is_loaded(tmp_path, pack, monkeypatch, fusion):
    path, config = write(tmp_path / "it.safetensors", **FUSIONS[fusion])
    model = MODEL.load_uvit(path)
    saved = save(pack, model, monkeypatch, tmp_path)
    assert torch.equal(sample(MODEL.load_uvit(saved), config), sample(model, config))
    assert load_file(saved).keys() == load_file(path).keys()
    assert MODEL.load_uvit(saved).model.latent_format.scale_factor == 0.25
    with pytest.raises(ValueError, match="takes a U-ViT"):
        save(pack, tiny.load(tmp_path, "sd3"), monkeypatch, tmp_path)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_what_core_merges_and_saves(tmp_path, pack, monkeypatch, fusion):
    """Every weight, the positions too; by core's nodes and by ours; the first model stays."""
    models, states = [], []
    for seed in (0, 1):
        path, config = write(tmp_path / f"{seed}.safetensors", seed, **FUSIONS[fusion])
        models.append(MODEL.load_uvit(path))
        states.append(load_file(path))
    plain = sample(models[0], config)
    merged = ModelMergeSimple().merge(*models, 0.25)[0]
    state = {
        key: 0.25 * w.double() + 0.75 * states[1][key] if w.is_floating_point() else w
        for key, w in states[0].items()
    }
    expected = reference_run(config, state)
    close = 1e-5 * expected.abs().max()
    assert (sample(merged, config) - expected).abs().max() < close
    assert torch.equal(sample(models[0], config), plain)
    core = ModelSave()
    core.output_dir = str(tmp_path)
    core.save(merged, "core")
    files = save(pack, merged, monkeypatch, tmp_path), str(next(tmp_path.glob("core_*")))
    for file in files:
        again = MODEL.load_uvit(file)
        assert again.model.diffusion_model.config == config
        assert again.model.latent_format.scale_factor == 0.25
        assert torch.equal(sample(again, config), sample(merged, config))
    assert load_file(files[0]).keys() == states[0].keys()


@pytest.mark.parametrize("fusion", ["central", "two streams, text as keys"])
def test_core_trains_and_merges_a_lora(tmp_path, pack, monkeypatch, fusion):
    """Core's trainer on a U-ViT; and a file has in it what its LoRAs made of the weights."""
    path, config = write(tmp_path / "it.safetensors", **FUSIONS[fusion])
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
