"""TACA beside what users combine it with: each equals the same combination done densely."""

import gc
import sys

import comfy.hooks
import comfy.sd
import comfy.utils
import pytest
import tiny
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_apg import APG
from comfy_extras.nodes_cfg import CFGNorm, CFGZeroStar
from comfy_extras.nodes_mahiro import Mahiro
from comfy_extras.nodes_model_merging import ModelMergeSimple
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
from comfy_extras.nodes_tcfg import TCFG
from reference import dense_override, image_tokens
from test_lora import random_lora
from test_model import KINDS, installed_on, sample

try:
    from comfy_extras.nodes_nag import NAGuidance
except ImportError:  # not in every ComfyUI
    NAGuidance = None
try:
    from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
except ImportError:
    EasyCacheNode = LazyCacheNode = None

import nodes

TEXT, SIZE = 7, (16, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def dense(model, gamma=1.4, text=TEXT, size=SIZE, more=0):
    """The model with Eq. 10 in dense float64, in all steps."""
    model = model.clone()
    inner = dense_override(gamma, text, text + image_tokens(torch.empty(1, 16, *size)) + more)

    def override(func, q, k, v, heads, **kwargs):
        return inner(func, q, k, v, heads, **kwargs).to(q.dtype)

    options = model.model_options.setdefault("transformer_options", {})
    options["optimized_attention_override"] = override
    return model


def block_name(kind):
    return "double" if kind == "flux" else "joint"


def residual(model, kind):
    """What a cache or an accelerator does to a call: here it halves what the model says."""
    model = model.clone()
    model.add_wrapper_with_key(
        WrappersMP.APPLY_MODEL, "halve", lambda executor, *a, **k: executor(*a, **k) * 0.5
    )
    return model


COMBINATIONS = {
    "skip layer guidance": lambda m, kind: SkipLayerGuidanceDiT.execute(
        m, 3.0, 0.0, 1.0, *(("1", "0") if kind == "flux" else ("1", "")), 0.0
    ).result[0],
    "NAG": lambda m, kind: NAGuidance.execute(m, 5.0, 0.5, 1.5).result[0],
    "APG": lambda m, kind: APG.execute(m, 0.7, 5.0, 0.3).result[0],
    "CFG-Zero*": lambda m, kind: CFGZeroStar.execute(m).result[0],
    "CFG norm": lambda m, kind: CFGNorm.execute(m, 1.0).result[0],
    "TCFG": lambda m, kind: TCFG.execute(m).result[0],
    "Mahiro": lambda m, kind: Mahiro.execute(m).result[0],
    "a wrapper around calls": residual,
    "EasyCache": lambda m, kind: EasyCacheNode.execute(m, 0.3, 0.1, 0.9, False).result[0],
    "LazyCache": lambda m, kind: LazyCacheNode.execute(m, 0.3, 0.1, 0.9, False).result[0],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", COMBINATIONS)
@pytest.mark.parametrize("ours_first", [True, False])
def test_beside(folder, apply_taca, kind, name, ours_first):
    if (name == "NAG" and NAGuidance is None) or ("Cache" in name and EasyCacheNode is None):
        pytest.skip(f"this ComfyUI has no {name}")
    model = tiny.load(folder, kind)
    combine = COMBINATIONS[name]
    settings = {"steps": 6, "text": (TEXT, TEXT)}
    expected = sample(combine(dense(model), kind), kind, **settings)
    if ours_first:
        ours = combine(apply_taca(model, 1.4, 0.0), kind)
    else:
        ours = apply_taca(combine(model, kind), 1.4, 0.0)
    torch.testing.assert_close(sample(ours, kind, **settings), expected, atol=2e-3, rtol=2e-3)
    plain = sample(combine(model, kind), kind, **settings)
    assert (plain - expected).abs().max() > 0.1
    assert not installed_on(model)


@pytest.mark.parametrize("kind", KINDS)
def test_regional_prompts(folder, apply_taca, kind):
    """Two positive prompts, each in its half of the picture, and one for some of the steps."""
    model = tiny.load(folder, kind)
    left, right = (torch.zeros(1, *SIZE) for _ in range(2))
    left[:, :, :8], right[:, :, 8:] = 1.0, 1.0
    positive = [
        *nodes.ConditioningSetMask().append(
            tiny.conditioning(kind, TEXT), left, "default", 1.0)[0],
        *nodes.ConditioningSetMask().append(
            tiny.conditioning(kind, TEXT, seed=8), right, "default", 1.0)[0],
        *nodes.ConditioningSetTimestepRange().set_range(
            tiny.conditioning(kind, TEXT, seed=9), 0.0, 0.4)[0],
    ]  # fmt: skip
    settings = {"steps": 4, "text": (TEXT, TEXT), "positive": positive}
    expected = sample(dense(model), kind, **settings)
    ours = sample(apply_taca(model, 1.4, 0.0), kind, **settings)
    torch.testing.assert_close(ours, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_conditioning_areas(folder, apply_taca, kind):
    """A prompt for a part of the picture: its calls are of that part's size."""
    model = tiny.load(folder, kind)
    area = nodes.ConditioningSetArea().append(
        tiny.conditioning(kind, 9, seed=8), 64, 64, 32, 32, 1.0)[0]  # fmt: skip
    positive = [*tiny.conditioning(kind, TEXT), *area]
    settings = {"steps": 3, "text": (TEXT, TEXT), "positive": positive, "cfg": 1.0}
    ours = sample(apply_taca(model, 1.4, 0.0), kind, **settings)
    small, large = dense(model, text=9, size=(8, 8)), dense(model)
    overrides = [m.model_options["transformer_options"]["optimized_attention_override"]
                 for m in (small, large)]  # fmt: skip
    both = model.clone()

    def override(func, q, k, v, heads, **kwargs):
        length = q.shape[2 if kwargs.get("skip_reshape") else 1]
        return overrides[length != 9 + 16](func, q, k, v, heads, **kwargs)

    both.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = (
        override
    )
    torch.testing.assert_close(ours, sample(both, kind, **settings), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [True, False])
def test_an_attention_backend_that_replaces_the_slot(folder, apply_taca, kind, first):
    """As KJNodes' Sage patch and core's coming ModelAttentionBackend: one node sets the slot, for
    good, to a kernel of its own that takes no other arguments than attention's."""
    model = tiny.load(folder, kind)
    used = []

    def backend(func, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False,
                skip_output_reshape=False, **kwargs):  # fmt: skip
        used.append(q.shape)
        return func(q, k, v, heads, mask=mask, skip_reshape=skip_reshape,
                    skip_output_reshape=skip_output_reshape, **kwargs)  # fmt: skip

    def choose(m):
        m = m.clone()
        options = m.model_options.setdefault("transformer_options", {})
        options["optimized_attention_override"] = backend
        return m

    ours = choose(apply_taca(model, 1.4, 0.0)) if first else apply_taca(choose(model), 1.4, 0.0)
    settings = {"steps": 3, "text": (TEXT, TEXT)}
    result = sample(ours, kind, **settings)
    assert used
    torch.testing.assert_close(result, sample(dense(model), kind, **settings), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sparse_kernel_that_wants_as_many_queries_as_keys(folder, apply_taca, kind):
    """It cannot take split queries: the run stops with its own error, nothing is left behind."""
    model = tiny.load(folder, kind)
    plain = sample(model, kind, steps=2)

    def sparse(func, q, k, v, heads, **kwargs):
        if q.shape != k.shape:
            raise ValueError("sparse attention needs as many queries as keys")
        return func(q, k, v, heads, **kwargs)

    ours = apply_taca(model, 1.4)
    ours.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = (
        sparse
    )
    with pytest.raises(ValueError, match="as many queries as keys"):
        sample(ours, kind, steps=2)
    assert not installed_on(model)
    assert torch.equal(sample(model, kind, steps=2), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_hooked_to_steps(folder, apply_taca, kind):
    """Core's keyframed LoRA on the conditioning, beside TACA."""
    model = tiny.load(folder, kind)
    lora = random_lora(model, only="blocks")

    def hooked(m):
        positive = tiny.conditioning(kind, TEXT)
        hook = comfy.hooks.create_hook_lora(lora=dict(lora), strength_model=1.0, strength_clip=0.0)
        keyframes = comfy.hooks.HookKeyframeGroup()
        for strength, start in ((1.0, 0.0), (0.0, 0.5)):
            keyframes.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
        hook.set_keyframes_on_hooks(keyframes)
        return comfy.hooks.set_hooks_for_conditioning(positive, hook)

    settings = {"steps": 4, "text": (TEXT, TEXT), "cfg": 1.0}
    expected = sample(dense(model), kind, positive=hooked(model), **settings)
    ours = sample(apply_taca(model, 1.4, 0.0), kind, positive=hooked(model), **settings)
    torch.testing.assert_close(ours, expected, atol=2e-3, rtol=2e-3)
    without = sample(apply_taca(model, 1.4, 0.0), kind, **settings)
    assert not torch.allclose(ours, without, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_and_saving(folder, apply_taca, kind, tmp_path):
    """A merge of a patched model is the merge; a saved patched model is the plain file."""
    one, two = tiny.load(folder, kind), tiny.load(folder, kind, seed=9)
    merged = ModelMergeSimple().merge(one, two, 0.5)[0]
    ours = ModelMergeSimple().merge(apply_taca(one, 1.4), two, 0.5)[0]
    assert torch.equal(sample(ours, kind), sample(apply_taca(merged, 1.4), kind))
    for m in (one, apply_taca(one)):
        sample(m, kind, steps=1)
        state = m.model.state_dict_for_saving(m.model_state_dict())
        assert not any("taca" in key for key in state)
        for key, value in tiny.weights(kind).items():
            names = (
                f".{key}",
                f".{key.replace('.scale', '.weight')}",
            )  # as core calls FLUX's norms
            saved = next(tensor for name, tensor in state.items() if name.endswith(names))
            assert torch.equal(saved, value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "sampler",
    ["heun", "dpmpp_2s_ancestral", "res_multistep", "dpmpp_sde", "uni_pc", "euler_ancestral"],
)
def test_samplers_densely(folder, apply_taca, kind, sampler):
    """Several calls a step, and noise between them."""
    model = tiny.load(folder, kind)
    settings = {"steps": 4, "text": (TEXT, TEXT), "sampler": sampler}
    expected = sample(dense(model), kind, **settings)
    ours = sample(apply_taca(model, 1.4, 0.0), kind, **settings)
    torch.testing.assert_close(ours, expected, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize(("denoise", "inside"), [(0.9, 0), (0.95, 1), (1.0, 2)])
def test_image_to_image(folder, apply_taca, denoise, inside, caplog):
    """With denoise below 1 the window lies partly or wholly before the run: said once."""
    caplog.set_level("INFO", logger="taca")
    model = tiny.load(folder, "flux")
    start = {"samples": tiny.latent(16, 16)}
    runs = [
        nodes.common_ksampler(
            m, 3, 20, 1.0, "euler", "simple", tiny.conditioning("flux", TEXT),
            tiny.conditioning("flux", TEXT), start, denoise=denoise,
        )[0]["samples"]
        for m in (model, apply_taca(model, 1.4))
    ]  # fmt: skip
    said = [r for r in caplog.records if r.name == "taca"]
    assert len(said) == 1
    assert f"acts on {inside} of 20" in said[0].message
    assert (said[0].levelname == "WARNING") == (inside == 0)
    assert torch.equal(*runs) == (inside == 0)


def test_schedule_is_resolved_for_each_part_of_a_split_run(folder, apply_taca):
    """KSampler (Advanced) twice: each half has the steps that are its own."""
    model = tiny.load(folder, "sd3")
    patched = apply_taca(model, 1.4)
    positive, negative = (tiny.conditioning("sd3", TEXT, seed=s) for s in (1, 5))
    arguments = (20, 1.0, "euler", "simple", positive, negative)
    latent = {"samples": torch.zeros(1, 16, *SIZE)}
    whole = nodes.common_ksampler(patched, 3, *arguments, latent)[0]
    advanced = nodes.KSamplerAdvanced()
    first = advanced.sample(patched, "enable", 3, *arguments, latent, 0, 10, "enable")[0]
    second = advanced.sample(patched, "disable", 3, *arguments, first, 10, 20, "disable")[0]
    torch.testing.assert_close(second["samples"], whole["samples"], atol=1e-3, rtol=1e-3)
    plain = advanced.sample(model, "disable", 3, *arguments, first, 10, 20, "disable")[0]
    assert torch.equal(plain["samples"], second["samples"])


def test_two_patched_clones_and_a_shared_model_in_turn(folder, apply_taca):
    """Fifty runs of five settings in random order: each as in its first, and no memory kept."""
    model = tiny.load(folder, "flux")
    kinds = [
        model, apply_taca(model), apply_taca(model, 1.6, 900.0),
        SkipLayerGuidanceDiT.execute(apply_taca(model), 3.0, 0.0, 1.0, "1", "0").result[0],
        residual(apply_taca(model, 0.8, 0.0), "flux"),
    ]  # fmt: skip
    expected = [sample(m, "flux", steps=3) for m in kinds]
    gc.collect()
    holders = sys.getrefcount(model.model)
    order = torch.randint(5, (50,), generator=torch.manual_seed(0)).tolist()
    for i in order:
        assert torch.equal(sample(kinds[i], "flux", steps=3), expected[i])
    assert not installed_on(model)
    gc.collect()
    # Core holds on to the patcher that ran last; nothing grows with the runs.
    assert sys.getrefcount(model.model) <= holders + 1
