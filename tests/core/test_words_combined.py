"""Words that weigh beside what users combine them with: each equals the same done densely."""

import contextlib
from functools import partial
from types import SimpleNamespace

import comfy.hooks
import comfy.samplers
import comfy.sd
import pytest
import torch
from comfy.ldm.flux.redux import ReduxImageEncoder
from comfy_extras.nodes_apg import APG
from comfy_extras.nodes_perpneg import Guider_PerpNeg
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

import nodes
from support import families, tiny
from support.clips import FLUX, clip_of
from support.loras import hooked, lora_hooks, random_lora
from support.tiny import KINDS, counting, installed_on, sample, tiled
from support.words import PROMPT, by_reference, dense_words, weighed

NAGuidance = EasyCacheNode = None
with contextlib.suppress(ImportError):  # not in every ComfyUI
    from comfy_extras.nodes_nag import NAGuidance
with contextlib.suppress(ImportError):
    from comfy_extras.nodes_easycache import EasyCacheNode

OTHER = [1.0, 1.0, 1.0, 0.25, 1.0, 1.0, 3.0, 1.0, -0.5]
NEGATIVE = [1.0] * 11 + [-1.5]
CLOSE = {"atol": 1e-3, "rtol": 1e-3}
WEIGHTS = {7: PROMPT, 9: OTHER, 12: [1.0] * 12}


def words(kind="flux", length=7, seed=1, weights=PROMPT, **how):
    return weighed(tiny.conditioning(kind, length, seed=seed), weights, **how)


def inside_override(model):
    """The model, its attention by what ``guided`` makes of that in the slot."""
    model = model.clone()
    options = model.model_options.setdefault("transformer_options", {})
    inner = options.get("optimized_attention_override")

    def guided(func, q, k, v, heads, **kwargs):
        """As NAG: away from attention to half the keys' sharpness, and no further than a norm."""

        def attend(k):
            if inner is None:
                return func(q, k, v, heads, **kwargs)
            return inner(func, q, k, v, heads, **kwargs)

        out, away = attend(k), attend(k * 0.5)
        far = out + 2.0 * (out - away)
        return (
            far
            * (1.5 * out.norm(dim=-1) / far.norm(dim=-1).clamp_min(1e-6)).clamp_max(1.0)[..., None]
        )

    options["optimized_attention_override"] = guided
    return model


BESIDE = {
    "an override as NAG's": inside_override,
    "NAG": lambda m: NAGuidance.execute(m, 5.0, 0.5, 1.5).result[0],
    "skip layer guidance": lambda m: SkipLayerGuidanceDiT.execute(
        m, 3.0, 0.0, 1.0, "1", "0", 0.0
    ).result[0],
    "APG": lambda m: APG.execute(m, 0.7, 5.0, 0.3).result[0],
    "EasyCache": lambda m: EasyCacheNode.execute(m, 3.0, 0.1, 0.9, False).result[0],
}


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("gamma", [None, 1.3])
def test_beside(folder, apply_taca, name, gamma):
    if (name == "NAG" and NAGuidance is None) or (name == "EasyCache" and EasyCacheNode is None):
        pytest.skip(f"this ComfyUI has no {name}")
    model, combine = tiny.load(folder, "flux"), BESIDE[name]
    settings = {"steps": 6, "text": (7, 7)}
    plain = sample(combine(model), "flux", **settings)
    assert (plain - sample(model, "flux", **settings)).abs().max() > 0.05
    override = dense_words({7: [1.0] * 7, (7, 0): PROMPT}, gamma or 1.0, threshold=0.0)
    expected = sample(combine(by_reference(model, override)), "flux", **settings)
    assert (plain - expected).abs().max() > 0.05
    taca = model if gamma is None else apply_taca(model, gamma, 0.0)
    ours = sample(combine(taca), "flux", positive=words(), **settings)
    torch.testing.assert_close(ours, expected, **CLOSE)
    assert not installed_on(model)


def test_the_models_own_masks(folder):
    """Regional prompts: a mask of all queries and keys, in which each half has half the text."""
    model, mask = tiny.load(folder, "flux"), torch.zeros(1, 71, 71)
    mask[:, 7:39, :3] = mask[:, 39:, 3:7] = -1e4
    region = {"attention_mask": mask, "attention_mask_img_shape": (8, 8)}
    masked = tiny.conditioning("flux", 7, **region)
    settings = {"steps": 3, "cfg": 1.0}
    plain = sample(model, "flux", positive=masked, **settings)
    reference = by_reference(model, dense_words(WEIGHTS))
    expected = sample(reference, "flux", positive=masked, **settings)
    unmasked = sample(reference, "flux", **settings)
    assert min((expected - each).abs().max() for each in (plain, unmasked)) > 0.05
    ours = sample(model, "flux", positive=weighed(masked, PROMPT), **settings)
    torch.testing.assert_close(ours, expected, **CLOSE)


def redux(conditioning, strength_type, strength):
    """Core's Apply Style Model with a tiny Redux, which appends five tokens."""
    encoder = ReduxImageEncoder(16, 64, dtype=torch.float32)
    encoder.load_state_dict(families.seeded(encoder, 3))
    picture = torch.randn(1, 5, 16, generator=torch.manual_seed(4))
    seen = SimpleNamespace(last_hidden_state=picture)
    [styled] = nodes.StyleModelApply().apply_stylemodel(
        conditioning, comfy.sd.StyleModel(encoder), seen, strength, strength_type
    )
    return styled


@pytest.mark.parametrize(("strength_type", "strength"), [("multiply", 0.7), ("attn_bias", 0.3)])
def test_a_picture_behind_the_text(folder, apply_taca, strength_type, strength):
    """Redux: its tokens are text for gamma, and weigh 1; its mask adds to the weights."""
    model = tiny.load(folder, "flux")
    prompt = redux(tiny.conditioning("flux", 7), strength_type, strength)
    settings = {"steps": 3, "cfg": 1.0, "batch": 2}
    override = dense_words({12: [*PROMPT, *[1.0] * 5]}, 1.4, threshold=0.0)
    expected = sample(by_reference(model, override), "flux", positive=prompt, **settings)
    taca = apply_taca(model, 1.4, 0.0)
    for other in (model, taca):
        other = sample(other, "flux", positive=prompt, **settings)
        assert (other - expected).abs().max() > 0.5
    ours = sample(taca, "flux", positive=redux(words(), strength_type, strength), **settings)
    torch.testing.assert_close(ours, expected, **CLOSE)


def test_what_tells_the_text_from_a_picture_behind_it(folder, pack):
    """TACA Weigh Words in front of Redux; whatever cannot tell them apart says so."""
    clip, weigh = clip_of(*FLUX), pack["TACAWeighWords"].execute
    (plain,) = nodes.CLIPTextEncode().encode(clip, "a red cat")
    plain[0][1]["pooled_output"] = torch.zeros(1, 32)
    (told,) = weigh(plain, clip, "a red cat").result
    model = tiny.load(folder, "flux")
    options = pack["TACAOptions"].execute(False, "", clip, "a red cat").result[0]
    limited = pack["TACAPatchModel"].execute(model, 1.4, 0.0, options=options).result[0]
    watched, report = pack["TACAWatchAttention"].execute(model, "cat", clip, "a red cat").result
    styled = redux(plain, "multiply", 1.0)
    way_out = "TACA Weigh Words directly behind the node that encodes the text"
    for asks in (limited, watched):
        with pytest.raises(ValueError, match=f"has 261 text tokens, its prompt 256.*{way_out}"):
            sample(asks, "flux", steps=1, cfg=1.0, positive=styled)
        sample(asks, "flux", steps=1, cfg=1.0, positive=redux(told, "multiply", 1.0))
    assert [*report.asked.words] == ["cat"]
    with pytest.raises(ValueError, match=r"has 261 text tokens, and the text has 256.*directly b"):
        weigh(styled, clip, "a (red:2) cat")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights_first", [True, False])
def test_a_lora_hooked_to_steps(folder, kind, weights_first):
    """Core's keyframed LoRA on the conditioning whose words weigh; hooks of both."""
    model = tiny.load(folder, kind)
    lora, prompt = random_lora(model, only="blocks"), tiny.conditioning(kind, 7)
    settings = {"steps": 4, "cfg": 3.0}
    both = (
        hooked(weighed(prompt, PROMPT), lora)
        if weights_first
        else weighed(hooked(prompt, lora), PROMPT)
    )
    plain = sample(model, kind, positive=hooked(prompt, lora), **settings)
    reference = by_reference(model, dense_words(WEIGHTS))
    expected = sample(reference, kind, positive=hooked(prompt, lora), **settings)
    without = sample(reference, kind, **settings)
    assert min((expected - each).abs().max() for each in (plain, without)) > 0.05
    torch.testing.assert_close(sample(model, kind, positive=both, **settings), expected, **CLOSE)
    assert torch.equal(sample(model, kind, positive=hooked(prompt, lora), **settings), plain)


@pytest.mark.parametrize("weights_first", [True, False])
@pytest.mark.parametrize("weighing", [("positive",), ("positive", "negative")])
def test_prompts_of_one_lora_stay_in_one_call(folder, weights_first, weighing):
    """ComfyUI calls the model once for prompts that share their hooks."""
    model = tiny.load(folder, "flux")
    lora = lora_hooks(random_lora(model, only="blocks"))
    hook = partial(comfy.hooks.set_hooks_for_conditioning, hooks=lora)
    calls, drawn = {}, {}
    for weighed_ones in ((), weighing):
        given = {}
        for name, seed in {"positive": 1, "negative": 5}.items():
            weigh = partial(weighed, weights=PROMPT) if name in weighed_ones else list
            steps = (weigh, hook) if weights_first else (hook, weigh)
            given[name] = steps[1](steps[0](tiny.conditioning("flux", 7, seed=seed)))
        counted, calls[weighed_ones] = counting(model)
        drawn[weighed_ones] = sample(counted, "flux", steps=4, **given)
    assert len(calls[()]) == len(calls[weighing]) == 4
    assert not torch.allclose(drawn[()], drawn[weighing], atol=0.05)


def test_one_lora_at_other_times_stays_apart(folder):
    """Hooks of one LoRA with keyframes of their own are not the same."""
    model = tiny.load(folder, "flux")
    lora = lora_hooks(random_lora(model, only="blocks"))
    positive, negative = (tiny.conditioning("flux", 7, seed=seed) for seed in (1, 5))
    always = lora.clone()
    always.set_keyframes_on_hooks(comfy.hooks.HookKeyframeGroup())
    given = {"negative": comfy.hooks.set_hooks_for_conditioning(negative, always)}
    hooked_one = comfy.hooks.set_hooks_for_conditioning(positive, lora)
    override = dense_words({7: [1.0] * 7, (7, 0): PROMPT}, threshold=0.0)
    expected = sample(by_reference(model, override), "flux", positive=hooked_one, **given)
    ours = sample(model, "flux", positive=weighed(hooked_one, PROMPT), **given)
    torch.testing.assert_close(ours, expected, **CLOSE)


@pytest.mark.parametrize("zeroed", [False, True])
def test_a_lora_hooked_to_another_prompt(folder, zeroed):
    """Of hooks that ComfyUI does not register it leaves None in a prompt, and then reads that."""
    model = tiny.load(folder, "flux")
    prompt = tiny.conditioning("flux", 7)
    other = hooked(tiny.conditioning("flux", 7, seed=5), random_lora(model, only="blocks"))
    override = dense_words({7: [1.0] * 7, (7, 0): [1.0] * 7 if zeroed else PROMPT}, threshold=0.0)
    given = [prompt, weighed(prompt, PROMPT)]
    if zeroed:
        given = [nodes.ConditioningZeroOut().zero_out(each)[0] for each in given]
    expected = sample(by_reference(model, override), "flux", positive=given[0], negative=other)
    ours = sample(model, "flux", positive=given[1], negative=other)
    torch.testing.assert_close(ours, expected, **CLOSE)


def averaged(a, b):
    return nodes.ConditioningAverage().addWeighted(a, b, 0.6)[0]


def in_areas(a, b):
    return [*a, *nodes.ConditioningSetArea().append(b, 64, 128, 0, 0, 1.0)[0]]


def in_masks(a, b):
    left, right = torch.zeros(1, 16, 16), torch.zeros(1, 16, 16)
    left[:, :, :8], right[:, :, 8:] = 1.0, 1.0
    set_mask = nodes.ConditioningSetMask().append
    return [*set_mask(a, left, "default", 1.0)[0], *set_mask(b, right, "mask bounds", 1.0)[0]]


def in_steps(a, b):
    set_range = nodes.ConditioningSetTimestepRange().set_range
    return [*set_range(a, 0.0, 0.6)[0], *set_range(b, 0.4, 1.0)[0]]


@pytest.mark.parametrize("node", [averaged, in_areas, in_masks, in_steps])
@pytest.mark.parametrize("kind", KINDS)
def test_nodes_of_conditionings(folder, kind, node):
    """An average has the weights of the first; the others each its own."""
    model = tiny.load(folder, kind)
    plain = node(tiny.conditioning(kind, 7), tiny.conditioning(kind, 9, seed=8))
    positive = node(words(kind), words(kind, 9, 8, OTHER))
    settings = {"steps": 4, "text": (7, 12)}
    reference = by_reference(model, dense_words(WEIGHTS))
    expected = sample(reference, kind, positive=plain, **settings)
    assert (sample(model, kind, positive=plain, **settings) - expected).abs().max() > 0.05
    ours = sample(model, kind, positive=positive, **settings)
    torch.testing.assert_close(ours, expected, **CLOSE)


def test_perp_neg(folder):
    """Three conditionings, of which the positive and the negative have weights of their own."""
    model, results = tiny.load(folder, "flux"), []
    plain = [tiny.conditioning("flux", n, seed=n) for n in (7, 12, 9)]
    ours = [weighed(plain[0], PROMPT), weighed(plain[1], NEGATIVE), plain[2]]
    override = dense_words({7: PROMPT, 12: NEGATIVE, 9: [1.0] * 9})
    for m, conds in ((model, ours), (by_reference(model, override), plain), (model, plain)):
        guider = Guider_PerpNeg(m)
        guider.set_conds(*conds)
        guider.set_cfg(4.0, 0.8)
        noise = tiny.latent(16, 16)
        sampler = comfy.samplers.sampler_object("euler")
        sigmas = torch.linspace(1, 0, 4)
        results.append(guider.sample(noise, torch.zeros_like(noise), sampler, sigmas))
    torch.testing.assert_close(*results[:2], **CLOSE)
    assert (results[2] - results[1]).abs().max() > 0.05


@pytest.mark.parametrize("batch", [1, 2])
def test_tiles_in_one_batch(folder, batch):
    """Rows in another order, as tiled diffusion makes them: the text tells whose each is."""

    def run(model, together, positive=None):
        model = model.clone()
        model.set_model_unet_function_wrapper(tiled(together))
        return sample(model, "flux", steps=3, text=(7, 7), batch=batch, positive=positive)

    model = tiny.load(folder, "flux")
    reference = by_reference(model, dense_words({7: [1.0] * 7, (7, 0): PROMPT}))
    expected = run(reference, False)
    assert (run(model, True) - expected).abs().max() > 0.05
    torch.testing.assert_close(run(model, True, words()), expected, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("weights", "dtype"),
    [(torch.float16, torch.float16), (torch.float8_e4m3fn, torch.bfloat16)],
)
def test_reduced_precision(folder, kind, weights, dtype):
    """As near to dense attention as the plain run is to its own."""
    model = tiny.load(folder, kind, dtype=weights)
    model.set_model_compute_dtype(dtype)
    settings = {"steps": 2, "cfg": 1.0}
    errors, expected = [], []
    for positive, each in ((None, [1.0] * 7), (words(kind), PROMPT)):
        expected.append(sample(by_reference(model, dense_words({7: each})), kind, **settings))
        ours = sample(model, kind, positive=positive, **settings)
        errors.append((ours - expected[-1]).norm())
    assert errors[1] < 1.5 * errors[0]
    assert (expected[1] - expected[0]).norm() > 10 * errors[1]
