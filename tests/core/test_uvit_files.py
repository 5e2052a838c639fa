"""U-ViT's files: the published one, damaged ones, those of other models, and what is saved."""

import json
from pathlib import Path

import comfy.model_base
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from support import ROOT, tiny
from support.fuzz import CASES
from support.uvit import (
    FUSIONS,
    MODEL,
    UViT,
    UViTConfig,
    reference_run,
    sample,
    seeded,
    without,
    write,
)


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
        weights = {key: value.float() for key, value in state.items()}
        expected = reference_run(network.config, weights, steps=1, scale=0.23010)
        ours = sample(model, network.config, steps=1)
        assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()


def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


WRAPPED = {
    "data parallel": lambda s, _: under("module.", s),
    "compiled": lambda s, _: under("_orig_mod.", s),
    "lightning": lambda s, _: {"state_dict": under("model.", s), "epoch": 3},
    "whole training": lambda s, old: {"nnet": old, "nnet_ema": s, "step": 7, "optimizer": {0: s}},
    "average beside": lambda s, old: under("model.", old) | under("model_ema.module.", s),
    "average beside bare weights": lambda s, old: old | under("ema.", s),
    "another model beside": lambda s, _: under("nnet.", s) | {"vae.decoder.weight": torch.ones(2)},
}


@pytest.mark.parametrize("fusion", ["early", "central", "two streams", "two streams, text as keys"])
@pytest.mark.parametrize("how", WRAPPED)
def test_what_a_training_script_wrote(tmp_path, how, fusion):
    """Under a prefix, in dictionaries, beside other things; of two the averaged one."""
    config = UViTConfig(blocks=5, width=64, side=8, **FUSIONS[fusion])
    state, old = (seeded(UViT(config), seed).state_dict() for seed in (0, 1))
    files = [as_pth(tmp_path / "it.pth", WRAPPED[how](state, old))]
    flat = {k: v.clone() for k, v in WRAPPED[how](state, old).items() if torch.is_tensor(v)}
    if flat:
        files.append(str(tmp_path / "it.safetensors"))
        save_file(flat, files[1])
    for file in files:
        network = MODEL.load_uvit(file).model.diffusion_model
        assert network.config == config
        assert all(torch.equal(state[key], w) for key, w in network.state_dict().items())


def test_which_of_several_is_told(tmp_path):
    state = UViT(UViTConfig(blocks=3, width=64)).initialise().state_dict()
    for one, other in (("first.", "second."), ("ema_slow.", "ema_fast."), ("", "other.")):
        path = as_pth(tmp_path / "two.pth", under(one, state) | under(other, state))
        with pytest.raises(ValueError, match=r"two\.pth holds several U-ViTs, under .*file of its"):
            MODEL.load_uvit(path)


BROKEN = {
    "is not a U-ViT": lambda s: {"weight": torch.zeros(2)},
    "lacks mid_block.attn.qkv.weight": lambda s: without(s, "mid_block.attn.qkv.weight"),
    "lacks out_blocks.0": lambda s: without(s, "out_blocks.0"),
    "lacks out_blocks.1": lambda s: without(s, "out_blocks.1"),
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
    "with text, is [nan, 3.0]": lambda s: s | {"fused_blocks": torch.tensor([torch.nan, 3])},
    "with text, is [1.5, 3.0]": lambda s: s | {"fused_blocks": torch.tensor([1.5, 3.0])},
    "with text, is [(1+0j), (3+0j)]": lambda s: s | {"fused_blocks": s["fused_blocks"] + 0j},
    "side is at least 1": lambda s: s | {"patch_embed.proj.weight": torch.zeros(128, 4, 0, 2)},
    "in a type that is not floating-point": lambda s: (
        s | {"norm.bias": s["norm.bias"].to(torch.int8)}
    ),
    "has NaN or infinity in norm.bias": lambda s: s | {"norm.bias": s["norm.bias"] / 0},
    "NaN or infinity in mid_block.mlp.fc1.bias": lambda s: (
        s | {"mid_block.mlp.fc1.bias": torch.full((512,), torch.nan).to(torch.float8_e4m3fn)}
    ),
    "draws classes": lambda s: without(s, "context_embed") | {"label_emb.weight": torch.ones(3)},
    "lacks context_embed": lambda s: without(s, "context_embed"),
    "beside a U-ViT's": lambda s: s | {"label_emb.weight": torch.ones(3)},
    "not the ends of its central blocks": lambda s: s | {"fused_blocks": torch.tensor([3, 9])},
}


@pytest.mark.parametrize("problem", BROKEN)
def test_a_wrong_file_is_told(tmp_path, problem):
    path, _ = write(tmp_path / "wrong.safetensors", image_blocks=1)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(BROKEN[problem](load_file(path)), path, metadata)
    with pytest.raises(ValueError, match=r"wrong\.safetensors") as told:
        MODEL.load_uvit(path)
    assert problem in str(told.value)


METADATA = {  # by a file's metadata
    "not JSON": "{",
    "no table": "[]",
    "no number": '{"text_tokens": "many"}',
    "endless": '{"text_tokens": 1e999}',
    "less than none": '{"text_tokens": -2}',
    "no scale": '{"latent_scale": 0}',
    "nan": '{"latent_scale": NaN}',
}


@pytest.mark.parametrize("what", METADATA)
def test_wrong_metadata_is_told(tmp_path, what):
    path, _ = write(tmp_path / "it.safetensors")
    save_file(load_file(path), path, {"uvit": METADATA[what]})
    with pytest.raises(ValueError, match=r"it\.safetensors.*Save U-ViT"):
        MODEL.load_uvit(path)


def test_another_model_is_told(tmp_path):
    """Those with a U-ViT's names among theirs too; not "download it again"."""
    pixart = {"pos_embed": torch.zeros(1, 4, 8), "blocks.0.attn.qkv.weight": torch.zeros(24, 8)}
    mae = pixart | {
        "patch_embed.proj.weight": torch.zeros(8, 3, 2, 2),
        "decoder_pred.weight": torch.zeros(12, 8),
    }
    vae = {"decoder.mid_block.attn.qkv.weight": torch.zeros(24, 8), "decoder.norm": torch.zeros(8)}
    others = {"sd3": tiny.weights("sd3"), "pixart": pixart, "mae": mae, "vae": vae}
    for name, state in others.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    models = {"blocks": ["pixart", "mae"], "joint_blocks": ["sd3"], "decoder": ["vae"]}
    paths = [(part, tmp_path / f"{name}.safetensors") for part in models for name in models[part]]
    demos = ROOT / "demo/models/taca_demo_mmdit.safetensors"
    for part, path in [*paths, ("joint_blocks", demos)]:
        with pytest.raises(ValueError, match=rf"{path.name} is not a U-ViT.* {part}.*Load Diff"):
            MODEL.load_uvit(str(path))


@pytest.fixture(scope="module", params=["central", "two streams, text as keys"])
def whole_file(tmp_path_factory, request):
    """A U-ViT's file, and its tensors and metadata."""
    small = {"blocks": 3, "width": 64} | FUSIONS[request.param]
    path, _ = write(tmp_path_factory.mktemp("whole") / "it.safetensors", **small)
    with safe_open(path, "pt") as file:
        return Path(path), load_file(path), file.metadata()


SHAPES = st.lists(st.integers(0, 5), max_size=5)
KINDS = st.sampled_from(
    [
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.int64,
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.float8_e4m3fn,
        torch.complex64,
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=3,
)


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


@settings(max_examples=CASES // 4)
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
