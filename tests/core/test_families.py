"""TACA on every family, against dense float64 attention in the same model."""

import ast
import inspect
import sys
from dataclasses import replace
from functools import partial, reduce

import comfy.model_base
import comfy.utils
import comfyui_version
import pytest
import torch

from support import families
from support.families import named
from support.family_runs import TABLE, dense, sample, tell
from support.reference import dense_attention
from support.reports import report_on

FAMILIES = TABLE.FAMILIES
REPORT = sys.modules["taca_pack.taca.report"]


def test_equals_dense(case, folder, apply_taca, monkeypatch, record_property):
    """Exact, with masks and references, text before the image or behind it."""
    model = families.load(case, folder, monkeypatch)
    tell(record_property, model, case, case.text[:1])
    calls = []
    expected = sample(dense(model, case, 1.4, calls), case)
    assert len(calls) == case.joint
    plain = sample(dense(model, case, 1.0), case)
    ours = sample(apply_taca(model, 1.4), case)
    error, effect = (ours - expected).abs().max(), (plain - expected).abs().max()
    assert error < 2e-3 * effect
    if case.options:  # the other override attends, inside ours
        beside = sample(apply_taca(dense(model, case, 1.0), 1.4), case)
        assert (beside - expected).abs().max() < 2e-3 * effect
    assert not any("forward" in m.__dict__ for m in model.model.modules())


@pytest.mark.parametrize("shorter", [pytest.param(0, marks=pytest.mark.slow), 4])
def test_equals_dense_with_cfg_in_a_batch(
    case, folder, apply_taca, monkeypatch, record_property, shorter
):
    """Two steps of two pictures at another size, with prompts as long as each other or not."""
    why = case.fixed if shorter else case.alone
    if why:
        pytest.skip(f"{case.name}: {why}")
    model, wide = families.load(case, folder, monkeypatch), case.wide()
    how = {"steps": 2, "cfg": 3.0, "batch": 1 if case.alone else 2, "shorter": shorter}
    texts, calls = (case.text[0], case.text[0] - shorter), []
    tell(record_property, model, wide, texts)
    expected, plain = (
        sample(dense(model, wide, gamma, calls, texts), wide, **how) for gamma in (1.4, 1.0)
    )
    assert sum(calls) == 2 * 2 * 2 * how["batch"] * case.joint  # both runs, steps and prompts
    ours = sample(apply_taca(model, 1.4, 0.0), wide, **how)
    assert (ours - expected).abs().max() < 2e-3 * (plain - expected).abs().max()


def test_off_is_bit_identical(case, folder, apply_taca, monkeypatch):
    model = families.load(case, folder, monkeypatch)
    assert torch.equal(sample(apply_taca(model, 1.0), case), sample(model, case))
    two = {"steps": 2, "cfg": 1.0 if case.alone else 3.0}
    assert not torch.equal(sample(apply_taca(model, 1.4), case, **two), sample(model, case, **two))


# Of the image tokens of a sequence, how many come before the picture's own, and its frames.
BEFORE = {
    "HunyuanVideo Custom": 12,
    "Z-Image Omni": 16 + 8,
    "OmniGen2, editing": 16 + 4,
    "Z-Image with references and no SigLIP": 16 + 8,
    "Boogu, editing": 16 + 4,
    "MiniMax-H3 I2V": 2 + 12,
}
FRAMES = {
    "CogVideoX": 3,
    "CogVideoX 1.5 I2V": 2,
    "Mochi": 2,
    "MiniMax-H3": 2,
    "MiniMax-H3 I2V": 2,
    "HunyuanVideo": 3,
    "HunyuanVideo Custom": 3,
    "HunyuanVideo I2V": 3,
    "HunyuanVideo 1.5": 3,
    "HunyuanVideo 1.5, masked": 3,
    "HunyuanVideo 1.5 I2V": 3,
}


def test_is_reported(case, folder, apply_taca, monkeypatch):
    """The Attention Report asks the picture's own tokens in every joint block, changes nothing."""
    model = families.load(case, folder, monkeypatch)
    spans = case.spans(case.text[0], case.tokens)
    queries = [kind for kind, length, *no_query in spans for _ in range(0 if no_query else length)]
    image = torch.tensor([i for i, kind in enumerate(queries) if kind == "image"])
    frames, rows, columns = FRAMES.get(case.name, 1), *((4, 4) if case.tokens == 16 else (4, 3))
    first = BEFORE.get(case.name, 0)
    own = image[first : first + frames * rows * columns].view(frames, rows, columns)
    if case.name == "HiDream-E1":  # side by side
        own = image.view(1, 4, 6)[:, :, :3]
    assert_reported(case, model, apply_taca, own)


@pytest.mark.parametrize("case", named("HiDream-E1"), ids=str, indirect=True)
def test_a_picture_beside_another_is_reported(case, folder, apply_taca, monkeypatch):
    """The two are 22 latents wide, so that one column of tokens has a half of each."""
    model = families.load(case, folder, monkeypatch)
    odd = replace(case, latent=(16, 8, 11), tokens=22)
    assert_reported(odd, model, apply_taca, torch.arange(44).view(1, 4, 11)[:, :, :6])


def assert_reported(case, model, apply_taca, own):
    """Shares and maps are those of these queries, in the dense model."""
    spans = case.spans(case.text[0], case.tokens)
    keys = torch.tensor([kind == "text" for kind, length, *_ in spans for _ in range(length)])
    shares, maps = [], []

    def looks(q, k, adjusted, mask):
        eye = torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1)
        seen = dense_attention(q, k, eye, adjusted, mask)[0].mean(0)[own.flatten()]
        seen = seen[:, keys]
        shares.append(seen.sum(-1).mean())
        maps.append(seen[:, 1].view(own.shape).mean(0))

    sample(dense(model, case, 1.4, looks=looks), case)
    patched = apply_taca(model, 1.4)
    report = report_on({"word": [1]})
    assert torch.equal(sample(REPORT.watched(patched, report), case), sample(patched, case))
    table = report.table()
    close = {"atol": 1e-5, "rtol": 1e-3}
    torch.testing.assert_close(table[1, 0].double(), torch.stack(shares), **close)
    assert report.maps[0].shape == (1, *own.shape[1:])
    ours = torch.stack(report.maps)[:, 0].double()
    torch.testing.assert_close(ours, torch.stack(maps), **close)


@pytest.mark.parametrize("case", named("HiDream-I1", "Boogu"), ids=str, indirect=True)
def test_blocks_left_out_still_show_the_text(case, folder, pack, apply_taca, monkeypatch):
    """A single block is not told how much of its sequence is text."""
    model = families.load(case, folder, monkeypatch)

    def limited(blocks):
        options = pack["TACAOptions"].execute(False, blocks).result[0]
        node = pack["TACAPatchModel"]
        return sample(node.execute(model, 1.4, 970.0, None, options).result[0], case)

    plain, all_of_them, single = sample(model, case), limited("double, single"), limited("single")
    assert torch.equal(all_of_them, sample(apply_taca(model, 1.4), case))
    assert not torch.equal(single, plain)
    assert not torch.equal(single, all_of_them)


@pytest.mark.parametrize("case", named("Ideogram 4"), ids=str, indirect=True)
def test_a_pass_without_text(case, folder, apply_taca, monkeypatch):
    """Its unconditional half of CFG is the image alone."""
    model = families.load(case, folder, monkeypatch)
    prompts = iter([families.conditioning(case), [[None, {}]]] * 3)
    monkeypatch.setattr(families, "conditioning", lambda *args, **kwargs: next(prompts))
    expected, plain, ours = (
        sample(m, case, cfg=3.0)
        for m in (dense(model, case, 1.4), dense(model, case, 1.0), apply_taca(model, 1.4))
    )
    assert (ours - expected).abs().max() < 2e-3 * (plain - expected).abs().max()


DIFFUSERS = {
    "AuraFlow": lambda c: comfy.utils.auraflow_to_diffusers(c),
    "FLUX.1": lambda c: comfy.utils.flux_to_diffusers(c),
    "SD3.5-Medium": lambda c: comfy.utils.mmdit_to_diffusers(c | {"num_blocks": 2}),
    "Z-Image": lambda c: comfy.utils.z_image_to_diffusers(c),
}


@pytest.mark.parametrize("case", named(*DIFFUSERS), ids=str, indirect=True)
def test_diffusers_files(case, folder, apply_taca, monkeypatch):
    """Published in the keys of diffusers too, which core converts: with q, k and v apart."""
    mapping = DIFFUSERS[case.name](case.config)
    other = replace(
        case,
        name=f"{case.name} of diffusers",
        published=partial(families.in_keys_of_diffusers, mapping),
    )
    models = [families.load(each, folder, monkeypatch) for each in (case, other)]
    own, theirs = (model.model.diffusion_model.state_dict() for model in models)
    assert all(torch.equal(own[key], theirs[key]) for key in own)
    assert torch.equal(*(sample(apply_taca(model, 1.4), case) for model in models))


def test_every_family_has_a_case():
    names = {case.transformer.rpartition(":")[2] for case in families.CASES}
    missing = [f.name for f in FAMILIES if not set(f.models) & names]
    assert not missing


def core_models():
    """Each class of ``diffusion_model`` that this ComfyUI can build."""
    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(comfy.model_base))):
        values = []
        if isinstance(node, ast.keyword) and node.arg == "unet_model":
            values.append(node.value)
        if isinstance(node, ast.arguments):
            named = node.args[len(node.args) - len(node.defaults) :]
            pairs = zip(named, node.defaults, strict=True)
            values += [default for arg, default in pairs if arg.arg == "unet_model"]
        for value in values:
            first, *rest = ast.unparse(value).split(".")
            if (first, *rest) != ("unet_model",):
                found.add(reduce(getattr, rest, vars(comfy.model_base)[first]))
    return sorted(found, key=lambda cls: cls.__name__)


class Parts(tuple):
    """No blocks, with any parts."""

    def __getattr__(self, name):
        return self


def with_any_blocks(cls):
    """A model of this class that is not built."""

    def blocks(self, name):
        if name == "_orig_mod":
            raise AttributeError(name)
        return Parts()

    model = type(cls.__name__, (cls,), {"__getattr__": blocks})
    return model.__new__(model)


NOT_IMAGE = {
    "ACEStepTransformer2DModel",
    "AceStepConditionGenerationModel",
    "AudioDiffusionTransformer",
    "HunYuanDiTPlain",
    "Hunyuan3Dv2",
    "LatentSeqMMFlowModel",  # 3D, from a picture
    "DepthAnything3Net",
    "RTv4",
    "SAM3Model",  # look at pictures
}
NUNCHAKU = {
    "ComfyFluxWrapper",
    "NunchakuFluxTransformer2dModel",
    "ComfyFlux2Wrapper",
    "NunchakuQwenImageTransformer2DModel",
}
# In the sources of a ComfyUI after 0.30.
LATER = {"Kandinsky6", "MiniMaxMusic3DiT", "Prism", "SenseNovaU15", "Trellis2"}


on_newest = pytest.mark.skipif(
    tuple(map(int, comfyui_version.__version__.split(".")[:2])) < (0, 30),
    reason="the table is of the models of ComfyUI 0.30",
)


@on_newest
def test_every_model_of_core_is_known_or_refused_with_the_reason():
    unknown = []
    for cls in core_models():
        model = with_any_blocks(cls)
        try:
            TABLE.family_of(model)
        except ValueError as error:
            if cls.__name__ not in NOT_IMAGE and not any(
                f"{name} ({cls.__name__}): {reason}" in str(error)
                for name, reason in TABLE.REFUSED.values()
            ):
                unknown.append(cls.__name__)
        else:
            assert cls.__name__ not in NOT_IMAGE
    assert not unknown, "add a Family, or the reason to REFUSED"


@on_newest
def test_every_refusal_is_of_a_class_that_core_has():
    names = {base.__name__ for cls in core_models() for base in cls.__mro__}
    assert set(TABLE.REFUSED) <= names | NUNCHAKU | LATER | {"UViT"}  # the pack's own
    assert names >= NOT_IMAGE


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("NunchakuQwenImageTransformer2DModel", "nunchaku's Qwen-Image"),
        ("PacksQwenImageTransformer2DModel", ""),
    ],
)
def test_a_packs_own_subclass(folder, apply_taca, monkeypatch, name, called):
    """nunchaku makes its Qwen-Image from core's class, and its blocks take no options."""
    [case] = named("Qwen-Image")
    model = families.load(case, folder, monkeypatch)
    transformer = model.model.diffusion_model
    monkeypatch.setattr(
        transformer, "__class__", type(name, (type(transformer),), {"__module__": "a_pack"})
    )
    if called:
        with pytest.raises(ValueError, match=f"{called} .{name}.: .*or as GGUF"):
            apply_taca(model)
    else:
        assert not torch.equal(sample(apply_taca(model, 1.4), case), sample(model, case))


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["Kandinsky6"], "Kandinsky 6 .Kandinsky6.: it attends to the text by cross-attention"),
        (["WanAnimate2Model", "WanModel"], "Wan .WanAnimate2Model.: it attends to the text by"),
        (["Trellis2"], "TRELLIS.2 .Trellis2.: .* takes no prompt"),
        (["MiniMaxMusic3DiT"], "it makes music"),
        (["SenseNovaU15"], "by methods of their own, which TACA does not reach"),
        (
            ["NextYearsDiT"],
            r"version of TACA does not know the model NextYearsDiT\. .*report it: h",
        ),
    ],
)
def test_models_of_a_later_core(names, says):
    """Refused by name, or unknown with where to report it."""
    cls = torch.nn.Module
    for name in reversed(names):
        cls = type(name, (cls,), {})
    with pytest.raises(ValueError, match=says):
        TABLE.family_of(cls())


@pytest.mark.parametrize("name", sorted(NUNCHAKU))
def test_nunchakus_models_are_refused(name):
    model = type(name, (torch.nn.Module,), {})()
    with pytest.raises(ValueError, match=r"nunchaku's .*Load the model with one of ComfyUI's own"):
        TABLE.family_of(model)


@pytest.mark.parametrize("case", named("Ernie-Image", "HiDream-O1"), ids=str, indirect=True)
def test_the_training_of_some_models_is_refused(case, pack, folder, apply_taca, monkeypatch):
    """See ``Family.reach``."""
    model = apply_taca(families.load(case, folder, monkeypatch))
    with pytest.raises(ValueError, match=f"{case.name} in training"):
        pack["TACATrainingWindow"].execute(model)


def test_an_attention_that_another_node_wrapped_is_told():
    """HiDream-O1's blocks are handed theirs, with the options in it."""
    reach = next(f.reach for f in FAMILIES if f.name == "HiDream-O1")
    with pytest.raises(RuntimeError, match="another node has wrapped it"):
        reach(print, (), {"optimized_attention": partial(print)}, print)
