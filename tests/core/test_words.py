"""Words that weigh: attention, whole runs, and prompts, against dense float64."""

import sys
from functools import partial

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_custom_sampler import BasicGuider, Guider_DualCFG
from comfy_extras.nodes_perpneg import PerpNeg
from hypothesis import given, settings
from hypothesis import strategies as st

import nodes
from support import tiny
from support.attention import random, sdpa
from support.tiny import sample
from support.words import (
    PROMPT,
    PromptTokens,
    Words,
    attach,
    by_reference,
    dense,
    dense_words,
    weighed,
)

taca = {
    name: sys.modules[f"taca_pack.taca.{name}"] for name in ("attention", "spans", "word_weights")
}
adjusted, Span = taca["attention"].temperature_adjusted_attention, taca["spans"].Span
WordWeights = taca["word_weights"].WordWeights
WEIGHTS = st.sampled_from([-2.0, -1.0, 0.0, 0.25, 0.5, 1.0, 2.0, 3.0])


@settings(max_examples=120)
@given(
    runs=st.lists(
        st.tuples(st.sampled_from(["text", "image", "other"]), st.integers(1, 6)),
        min_size=1,
        max_size=5,
    ),
    data=st.data(),
    batch=st.integers(1, 3),
    gamma=st.sampled_from([None, 1.3]),
    mask_kind=st.sampled_from(["none", "full", "rows", "bool", "three"]),
    grouped=st.booleans(),
    flat=st.booleans(),
)
def test_equals_dense(runs, data, batch, gamma, mask_kind, grouped, flat):
    layout = [Span(*run) for run in runs]
    kinds = [span.kind for span in layout for _ in range(span.length)]
    n, text = len(kinds), [i for i, kind in enumerate(kinds) if kind == "text"]
    is_image = torch.tensor([kind == "image" for kind in kinds])
    rows = data.draw(st.sampled_from([1, batch]))
    draw = st.lists(WEIGHTS, min_size=len(text), max_size=len(text))
    w = torch.tensor([data.draw(draw) for _ in range(rows)]).view(rows, len(text))
    avoided = (
        torch.tensor(
            [
                data.draw(st.lists(st.booleans(), min_size=len(text), max_size=len(text)))
                for _ in range(rows)
            ]
        )
        .view(rows, len(text))
        .bool()
    )
    if not (bool(is_image.any()) or len(text) < n):
        w = w.abs().clamp_min(0.1)  # something has to be left to attend to
    q, k, v = (random(batch, 1 if grouped and i else 2, n, 8, seed=i) for i in range(3))
    shapes = {
        "full": (batch, 1, n, n),
        "rows": (1, 1, 1, n),
        "bool": (batch, 1, n, n),
        "three": (batch, n, n),
    }
    mask = None if mask_kind == "none" else random(*shapes[mask_kind], seed=9)
    if mask_kind == "bool":
        mask = torch.ones(shapes["bool"], dtype=torch.bool)
        mask[..., : n // 3] = bool(is_image.any()) and not is_image[: n // 3].any()
        mask |= torch.eye(n, dtype=torch.bool)
    words = WordWeights(w, w < 0, None, avoided if avoided.any() else None)
    scale = None if gamma is None else torch.tensor([gamma])
    if flat and not grouped:
        q_, k_, v_ = (x.transpose(1, 2).flatten(2) for x in (q, k, v))

        def attend(q, k, v, mask):
            q, k, v = (x.unflatten(-1, (2, 8)).transpose(1, 2) for x in (q, k, v))
            return sdpa(q, k, v, four(mask)).transpose(1, 2).flatten(2)

        out = adjusted(attend, q_, k_, v_, scale, layout, mask, 1, 1, words)
        out = out.unflatten(-1, (2, 8)).transpose(1, 2)
    else:
        out = adjusted(
            lambda q, k, v, m: sdpa(q, k, v, four(m)), q, k, v, scale, layout, mask, 2, 2, words
        )
    every = torch.ones(batch, n, dtype=torch.float64)
    every[:, text] = w.double().expand(batch, -1)
    is_avoided = torch.zeros(batch, n, dtype=torch.bool)
    is_avoided[:, text] = avoided.expand(batch, -1)
    is_own = ~is_avoided & torch.tensor([kind == "text" for kind in kinds])
    not_image = ~is_image
    hidden = (is_avoided[:, :, None] & is_own[:, None]) | (
        (~is_avoided & not_image)[:, :, None] & is_avoided[:, None]
    )
    factor = torch.ones(n, n, dtype=torch.float64)
    if gamma is not None:
        factor[is_image.nonzero(), torch.tensor(text, dtype=torch.long)[None]] = gamma
    expected = dense(q, k, v, every, is_image, factor, mask, hidden)
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=1e-4)


def four(mask):
    return mask[:, None] if mask is not None and mask.ndim == 3 else mask


def test_zero_is_a_deleted_key_and_two_a_doubled_one():
    q, k, v = (random(2, 2, 9, 8, seed=i) for i in range(3))
    layout = (Span("text", 4), Span("image", 5))
    image = q[:, :, 4:]
    for weight, keys in ((0.0, [0, 2, 3, 4, 5, 6, 7, 8]), (2.0, [0, 1, 1, 2, 3, 4, 5, 6, 7, 8])):
        words = WordWeights(torch.tensor([[1.0, weight, 1.0, 1.0]]))
        out = adjusted(sdpa, q, k, v, None, layout, words=words)
        expected = sdpa(image, k[:, :, keys], v[:, :, keys], None)
        torch.testing.assert_close(out[:, :, 4:], expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(out[:, :, :4], sdpa(q[:, :, :4], k, v, None), atol=0, rtol=0)


def test_a_negative_weight_about_the_mean():
    q, k, v = (random(1, 1, 6, 4, seed=i) for i in range(3))
    w = torch.tensor([[1.0, -1.5, 1.0]])
    centre = torch.tensor([[0.5, 0.5, 0.0]])
    layout = (Span("text", 3), Span("image", 3))
    out = adjusted(sdpa, q, k, v, None, layout, words=WordWeights(w, w < 0, centre))
    mirrored = v.double().clone()
    mirrored[:, :, 1] = v[:, :, :2].double().sum(2) - v[:, :, 1].double()
    every = torch.cat([w.abs(), torch.ones(1, 3)], 1)
    expected = dense(q, k, mirrored, every, torch.arange(6) > 2)
    torch.testing.assert_close(out[:, :, 3:].double(), expected[:, :, 3:], atol=1e-5, rtol=1e-5)


# --- whole runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flux", "sd3"])
@pytest.mark.parametrize("gamma", [None, 1.3])
def test_a_run_equals_dense(kind, gamma, folder, apply_taca):
    model = tiny.load(folder, kind)
    words = weighed(tiny.conditioning(kind, 7), PROMPT)
    taca_model = model if gamma is None else apply_taca(model, gamma, 970.0)
    ours = sample(taca_model, kind, steps=4, positive=words)
    override = dense_words({7: PROMPT, 12: [1.0] * 12}, gamma or 1.0)
    expected = sample(by_reference(model, override), kind, steps=4)
    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=1e-4)
    plain = sample(model, kind, steps=4)
    assert (plain - expected).abs().max() > 0.05
    assert not [m for m in model.model.diffusion_model.modules() if "forward" in m.__dict__]


def test_alone_in_a_batch(folder, apply_taca):
    """Positive and negative of one length: one call of two rows, the negative's bits as ever."""
    model = tiny.load(folder, "flux")
    watched, calls = tiny.counting(model)
    ours = sample(
        watched,
        "flux",
        steps=3,
        text=(7, 7),
        positive=weighed(tiny.conditioning("flux", 7), PROMPT),
    )
    assert calls == [2] * 3
    override = dense_words({7: [1.0] * 7, (7, 0): PROMPT})
    expected = sample(by_reference(model, override), "flux", steps=3, text=(7, 7))
    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=1e-4)


def test_what_is_avoided_stays_in_one_batch(folder):
    """Without a ControlNet ComfyUI is told nothing of it."""
    watched, calls = tiny.counting(tiny.load(folder, "flux"))
    avoiding = weighed(tiny.conditioning("flux", 7), [1.0] * 5 + [-1.5] * 2, num_avoided=2)
    sample(watched, "flux", steps=2, text=(7, 7), positive=avoiding)
    assert calls == [2] * 2


def test_at_weight_one_bits_are_cores(folder):
    model = tiny.load(folder, "flux")
    plain = sample(model, "flux", steps=2)
    one = weighed(tiny.conditioning("flux", 7), [1.0] * 7)
    assert "hooks" not in one[0][1]
    assert torch.equal(sample(model, "flux", steps=2, positive=one), plain)


def test_through_taca_on_the_model_alone(folder, apply_taca):
    """Without the hook: the same bits on a model with TACA, and an error on any other."""
    model = tiny.load(folder, "flux")
    plain = tiny.conditioning("flux", 7)
    by_hook, by_model = (weighed(plain, PROMPT, any_model=any_model) for any_model in (True, False))
    assert "hooks" not in by_model[0][1]
    patched = apply_taca(model, 1.0, 970.0)
    expected = sample(patched, "flux", steps=3, positive=by_hook)
    for _ in range(2):  # nothing of the first run is left in the conditioning
        assert torch.equal(sample(patched, "flux", steps=3, positive=by_model), expected)
    with pytest.raises(RuntimeError, match="any_model is off"):
        sample(model, "flux", steps=3, positive=by_model)
    assert torch.equal(sample(model, "flux", steps=3, positive=by_hook), expected)


@pytest.mark.parametrize("any_model", [True, False])
def test_a_prompt_that_a_node_keeps_for_itself(folder, apply_taca, any_model):
    """Perp-Neg as a model patch calls the model with its own, of which no guider knows."""
    model, plain = tiny.load(folder, "flux"), tiny.conditioning("flux", 7)
    model = model if any_model else apply_taca(model)
    weighs = weighed(plain, PROMPT, any_model=any_model)
    sample(PerpNeg.execute(model, plain, 1.0).result[0], "flux", steps=1, positive=weighs)
    with pytest.raises(RuntimeError, match="needs one without weights"):
        sample(PerpNeg.execute(model, weighs, 1.0).result[0], "flux", steps=1)


def test_dynamic_vram_stays(folder, apply_taca, monkeypatch, caplog):
    """ComfyUI gives it up for a hook, which the run says; not where TACA is on the model."""
    patched, given_up = apply_taca(tiny.load(folder, "flux"), 1.0, 970.0), []
    kind = type(patched)

    def delegate(self):
        given_up.append(self)
        static = self.clone()
        static.is_dynamic = lambda: False
        return static

    monkeypatch.setattr(kind, "is_dynamic", lambda self: True)
    monkeypatch.setattr(kind, "get_non_dynamic_delegate", delegate, raising=False)
    plain = tiny.conditioning("flux", 7)
    for any_model in (False, True):
        guider = comfy.samplers.CFGGuider(patched)
        guider.set_conds(weighed(plain, PROMPT, any_model=any_model), plain)
        assert len(given_up) == any_model
    guider.model_options = guider.model_patcher.model_options
    monkeypatch.setattr(kind, "is_dynamic", lambda self: self is patched)
    latent = torch.zeros(1, 16, 16, 16)
    sampler = comfy.samplers.sampler_object("euler")
    guider.sample(latent, latent, sampler, torch.tensor([1.0, 0.5, 0.0]))
    assert "turn any_model off" in caplog.text


def test_a_window_of_their_own(folder, apply_taca):
    """Weights in the first half alone, gamma in the paper's window; neither ends the other."""
    schedule = sys.modules["taca_pack.taca.schedule"]
    half = schedule.Schedule(1.2, schedule.TimestepWindow(700.0))
    words = weighed(tiny.conditioning("flux", 7), PROMPT, schedule=half)
    model = tiny.load(folder, "flux")
    override = dense_words({7: PROMPT, 12: [1.0] * 12}, 1.3, lambda sigma: sigma >= 0.7)
    expected = sample(by_reference(model, override), "flux", steps=4)
    ours = sample(apply_taca(model, 1.3, 970.0), "flux", steps=4, positive=words)
    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=1e-4)
    never = schedule.Schedule(1.2, schedule.PercentWindow(0.999, 1.0))
    words = weighed(tiny.conditioning("flux", 7), PROMPT, schedule=never)
    assert torch.equal(
        sample(model, "flux", steps=2, positive=words), sample(model, "flux", steps=2)
    )


def test_what_no_step_enters_is_said(folder, caplog):
    schedule = sys.modules["taca_pack.taca.schedule"]
    never = schedule.Schedule(1.2, schedule.PercentWindow(0.999, 1.0))
    words = weighed(tiny.conditioning("flux", 7), PROMPT, schedule=never)
    sample(tiny.load(folder, "flux"), "flux", steps=2, positive=words)
    (said,) = [r for r in caplog.records if "weights of 'it' 2" in r.getMessage()]
    assert said.levelname == "WARNING"
    assert "No step was inside the window" in said.getMessage()


def test_what_acted_is_logged(folder, caplog, apply_taca):
    caplog.set_level("INFO")
    words = weighed(tiny.conditioning("flux", 7), PROMPT)
    sample(apply_taca(tiny.load(folder, "flux")), "flux", steps=10, positive=words)
    said = [r.getMessage() for r in caplog.records if "acted on" in r.getMessage()]
    assert len(said) == 2
    assert "gamma 1.2 at t >= 970 acted on 1 of 10 steps, 4 joint blocks of FLUX.1" in said[0]
    assert "weights of 'it' 2 acted on 10 of 10 steps" in said[1]


def test_each_conditioning_has_its_own(folder):
    """Dual guider, an area, a timestep range and a batch: each row's own weights."""
    model = tiny.load(folder, "flux")
    a, b = tiny.conditioning("flux", 7), tiny.conditioning("flux", 9, seed=2)
    area = {"area": (8, 16, 0, 0), "strength": 1.0}
    late = {"start_percent": 0.5, "end_percent": 1.0}
    second = [0.5, 1.0, 3.0, *[1.0] * 6]
    third = [1.0] * 11 + [-1.5]
    negative = tiny.conditioning("flux", 12, seed=5)
    positives = {
        "plain": [*a, *[[b[0][0], {**b[0][1], **area}]], [b[0][0], {**b[0][1], **late}]],
        "ours": [
            *weighed(a, PROMPT),
            *weighed([[b[0][0], {**b[0][1], **area}]], second),
            *weighed([[b[0][0], {**b[0][1], **late}]], second),
        ],
    }
    results = []
    for which, negatives in (("plain", negative), ("ours", weighed(negative, third))):
        override = dense_words({7: PROMPT, 9: second, 12: third})
        guider = Guider_DualCFG(model if which == "ours" else by_reference(model, override))
        guider.set_conds(positives[which], tiny.conditioning("flux", 5, seed=8), negatives)
        guider.set_cfg(3.0, 2.0)
        noise = torch.randn(2, 16, 16, 16, generator=torch.manual_seed(3))
        sampler = comfy.samplers.sampler_object("euler")
        sigmas = torch.linspace(1, 0, 4)
        results.append(guider.sample(noise, torch.zeros_like(noise), sampler, sigmas))
    torch.testing.assert_close(*results, atol=3e-4, rtol=1e-3)


def test_what_is_appended_weighs_one(folder):
    model, said = tiny.load(folder, "flux"), []
    words = weighed(tiny.conditioning("flux", 7), PROMPT, say=said.append)
    more = tiny.conditioning("flux", 3, seed=9)
    both = nodes.ConditioningConcat().concat(words, more)[0]
    ours = sample(model, "flux", steps=2, positive=both)
    plain = nodes.ConditioningConcat().concat(tiny.conditioning("flux", 7), more)[0]
    override = dense_words({10: PROMPT + [1.0] * 3, 12: [1.0] * 12})
    expected = sample(by_reference(model, override), "flux", steps=2, positive=plain)
    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=1e-4)
    assert [each.count("3 text tokens that another node appended weigh 1") for each in said] == [1]


@pytest.mark.parametrize("num_avoided", [0, 3])
def test_zeroed_text_has_no_words(num_avoided, folder, caplog):
    """Zero Out keeps the words of what it zeroes, and both stand in one run at CFG 1 and above."""
    model = tiny.load(folder, "flux")
    weights = [2.0, 1.0, 1.0, 0.5, -1.0, -1.0, -1.0]
    words = weighed(tiny.conditioning("flux", 7), weights, num_avoided=num_avoided)
    zeroed, plain = (
        nodes.ConditioningZeroOut().zero_out(each)[0]
        for each in (words, tiny.conditioning("flux", 7))
    )
    empty = {"samples": torch.zeros(1, 16, 16, 16)}
    for cfg in (1.0, 3.0):
        both = [
            nodes.common_ksampler(model, 3, 2, cfg, "euler", "simple", words, each, empty)[0]
            for each in (zeroed, plain)
        ]
        torch.testing.assert_close(both[0]["samples"], both[1]["samples"], atol=1e-5, rtol=1e-5)
        unweighed = nodes.common_ksampler(
            model, 3, 2, cfg, "euler", "simple", tiny.conditioning("flux", 7), plain, empty
        )[0]["samples"]
        assert (both[0]["samples"] - unweighed).abs().max() > 1e-2
        caplog.clear()
        alone = tiny.conditioning("flux", 7)
        nodes.common_ksampler(model, 3, 1, cfg, "euler", "simple", alone, zeroed, empty)
        assert "weights of" not in caplog.text


@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_avoided_words(kind, folder, apply_taca):
    """Their own text and the prompt's do not see one another; pictures subtract them."""
    model = tiny.load(folder, kind)
    weights = [*PROMPT, -1.5, -1.5, -1.5]
    words = weighed(tiny.conditioning(kind, 10), weights, num_avoided=3)
    override = dense_words({10: weights, 9: [1.0] * 9}, 1.3, num_avoided=3)
    expected = sample(
        by_reference(model, override),
        kind,
        steps=3,
        text=(10, 9),
        positive=tiny.conditioning(kind, 10),
    )
    ours = sample(apply_taca(model, 1.3, 970.0), kind, steps=3, text=(10, 9), positive=words)
    torch.testing.assert_close(ours, expected, atol=3e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_avoided_outside_their_window_as_if_not_there(kind, folder):
    model = tiny.load(folder, kind)
    schedule = sys.modules["taca_pack.taca.schedule"]
    never = schedule.Schedule(1.2, schedule.PercentWindow(0.999, 1.0))
    longer = tiny.conditioning(kind, 10)
    words = weighed(longer, [*[1.0] * 7, -1.5, -1.5, -1.5], num_avoided=3, schedule=never)
    shorter = [[longer[0][0][:, :7], longer[0][1]]]
    torch.testing.assert_close(
        sample(model, kind, steps=2, positive=words),
        sample(model, kind, steps=2, positive=shorter),
        atol=1e-4,
        rtol=1e-4,
    )


def no_masks(func, q, k, v, heads, mask=None, **kwargs):
    """A kernel that swallows masks, as some of SageAttention do."""
    return func(q, k, v, heads, **kwargs)


def refuses_masks(func, q, k, v, heads, mask=None, **kwargs):
    if mask is not None:
        raise RuntimeError("no masks")
    return func(q, k, v, heads, **kwargs)


@pytest.mark.parametrize("kernel", [no_masks, refuses_masks])
def test_a_kernel_without_masks(kernel, folder, caplog):
    model = tiny.load(folder, "flux")
    words = weighed(tiny.conditioning("flux", 7), PROMPT)
    ours = sample(by_reference(model, kernel), "flux", steps=2, positive=words)
    expected = sample(model, "flux", steps=2, positive=words)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    said = [r.getMessage() for r in caplog.records if "takes no masks" in r.getMessage()]
    assert said == [
        f"TACA: the attention {kernel.__name__} takes no masks. Where words weigh, PyTorch's runs "
        f"in its place."
    ]


def test_a_model_without_joint_attention_is_refused(folder):
    model = tiny.load(folder, "flux", seed=7)
    transformer = model.model.diffusion_model
    transformer.__class__ = type("WanModel", (type(transformer),), {})
    words = weighed(tiny.conditioning("flux", 7), PROMPT)
    with pytest.raises(ValueError, match="TACA cannot act on Wan"):
        sample(model, "flux", steps=2, positive=words)


def test_limits_of_gamma_are_not_the_words(folder, pack):
    """Gamma in block 0 alone; the words weigh in all."""
    model = tiny.load(folder, "flux")
    options = pack["TACAOptions"].execute(False, "double 0").result[0]
    limited = pack["TACAPatchModel"].execute(model, 1.0, 0.0, None, options).result[0]
    words = weighed(tiny.conditioning("flux", 7), PROMPT)
    torch.testing.assert_close(
        sample(limited, "flux", steps=2, positive=words),
        sample(model, "flux", steps=2, positive=words),
        atol=0,
        rtol=0,
    )


def test_after_an_error_nothing_is_left(folder, monkeypatch):
    model = tiny.load(folder, "flux")
    before = sample(model, "flux", steps=2)

    def broken(func, *args, **kwargs):
        if kwargs.get("mask") is not None and args[1].shape[-2] > 64:
            raise RuntimeError("stopped")
        return func(*args, **kwargs)

    words = weighed(tiny.conditioning("flux", 7), PROMPT)
    with pytest.raises(RuntimeError, match="stopped"):
        sample(by_reference(model, broken), "flux", steps=2, positive=words)
    assert not [m for m in model.model.diffusion_model.modules() if "forward" in m.__dict__]
    assert torch.equal(sample(model, "flux", steps=2), before)


def test_other_tokens_than_the_text_has(folder):
    words = Words(PromptTokens("", ((),) * 7), (2.0,) * 7, ())
    with pytest.raises(ValueError, match="has 9 text tokens, and the text has 7 with this CLIP"):
        attach(tiny.conditioning("flux", 9), words)


def test_limits_and_report_know_the_prompts_own_tokens(folder, pack, apply_taca):
    """Of a conditioning that carries them, without clip and prompt."""
    model, text = tiny.load(folder, "flux"), tiny.conditioning("flux", 7)
    token = sys.modules["taca_pack.taca.prompt_tokens"].Token
    own = [(token("t5xxl", i, i + 1, False, False),) for i in range(4)]
    padding = [(token("t5xxl", 0, 0, True, False),)] * 3
    prompt = PromptTokens("abcd", (*own, *padding))
    carrying = attach(text, Words(prompt, (1.0,) * 7, ()))
    options = pack["TACAOptions"].execute(False, "", None, None, True).result[0]
    limited = pack["TACAPatchModel"].execute(model, 1.5, 0.0, None, options).result[0]
    ours = sample(limited, "flux", steps=2, cfg=1.0, positive=carrying)
    override = dense_words({7: [1.0] * 7}, [1.5] * 4 + [1.0] * 3, threshold=0.0)
    expected = sample(by_reference(model, override), "flux", steps=2, cfg=1.0)
    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="encode the positive prompt with TACA Text Encode"):
        sample(limited, "flux", steps=2, cfg=1.0)


def test_the_report_shows_what_weighs(folder, pack):
    """Its default words are those that weigh; shares are those of the weighed attention."""
    model, text = tiny.load(folder, "flux"), tiny.conditioning("flux", 3)
    token = sys.modules["taca_pack.taca.prompt_tokens"].Token
    prompt = PromptTokens("a b c", tuple((token("l", i, i + 1, False, False),) for i in (0, 2, 4)))
    words = attach(text, Words(prompt, (1.0, 3.0, 1.0), (("b", 3.0),), ((1,),)))
    seen = []

    def looks(func, q, k, *args, **kwargs):
        seen.append((q.double(), k.double()))
        return func(q, k, *args, **kwargs)

    guider = BasicGuider.execute(by_reference(model, looks), words).result[0]
    ask = partial(sys.modules["taca_pack.nodes.report"].asked, "", None, None)
    assert ask(guider).words == {"b": [1]}
    report = sys.modules["taca_pack.taca.report"].Report(ask)
    watched = sys.modules["taca_pack.taca.report"].watched
    guider.model_patcher = watched(guider.model_patcher, report)
    noise = torch.randn(1, 16, 16, 16, generator=torch.manual_seed(3))
    sampler = comfy.samplers.sampler_object("euler")
    guider.sample(noise, torch.zeros_like(noise), sampler, torch.tensor([1.0, 0.0]))
    plain, weighed = report.table()
    q, k = next((q, k) for q, k in seen if q.shape[2] == 64)  # the image's queries
    odds = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
    shares = []
    for weight in (1.0, 3.0):
        odds[..., 1] *= weight
        shares.append((odds[..., :3].sum(-1) / odds.sum(-1)).mean())
    torch.testing.assert_close(plain[0, 0].double(), shares[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(weighed[0, 0].double(), shares[1], atol=1e-5, rtol=1e-4)
    expected = (odds[..., 1] / odds.sum(-1)).mean()
    torch.testing.assert_close(report.maps[0].mean().double(), expected, atol=1e-5, rtol=1e-4)


def test_training_goes_on_without_them(folder, monkeypatch, caplog):
    model = tiny.load(folder, "flux")
    monkeypatch.setattr(comfy.model_management, "in_training", True)
    words = weighed(tiny.conditioning("flux", 7), PROMPT)
    ours = sample(model, "flux", steps=2, positive=words)
    assert torch.equal(ours, sample(model, "flux", steps=2))
    assert "word weights do not act in training" in caplog.text
