"""The Attention Report and TACA Options in runs of other kinds: keys that core keeps, from picture
to noise, prompts of two lengths joined in one call."""

import sys

import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_custom_sampler import (
    BasicGuider,
    FlipSigmas,
    KSamplerSelect,
    Noise_RandomNoise,
    SamplerCustomAdvanced,
)

from support import families, tiny
from support.families import exists, named
from support.family_runs import sample as sample_family
from support.reference import dense_attention
from support.reports import report_on

REPORT = sys.modules["taca_pack.taca.report"]
OPTIONS = sys.modules["taca_pack.taca.options"].Options
PATCH = sys.modules["taca_pack.taca.patch"].patch_model
SCHEDULE = sys.modules["taca_pack.taca.schedule"]


def attending(model, override):
    model = model.clone()
    model.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = (
        override
    )
    return model


def test_keys_of_references_that_core_keeps(folder, apply_taca, monkeypatch):
    """Flux KV Cache: shares and maps of every step, not only the first, are the dense ones."""
    nodes_flux = pytest.importorskip("comfy_extras.nodes_flux")
    if not hasattr(nodes_flux, "FluxKVCache"):
        pytest.skip("this ComfyUI has no Flux KV Cache")
    [case] = named("FLUX.2 Klein, references without noise")
    model = families.load(case, folder, monkeypatch)
    text, image, found = 512, 12, []

    def dense(func, q, k, v, heads, mask=None, skip_reshape=False, **kwargs):
        factor = torch.ones(q.shape[2], k.shape[2], dtype=torch.float64)
        factor[text:, :text] = 1.5
        eye = torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1)
        seen = dense_attention(q, k, eye, factor)[0].mean(0)[text : text + image, :text]
        found.append((seen.sum(-1).mean(), seen[:, 505].view(4, 3)))
        return dense_attention(q, k, v, factor, mask).transpose(1, 2).flatten(2).to(q.dtype)

    cached = lambda m: nodes_flux.FluxKVCache.execute(m).result[0]  # noqa: E731
    sample_family(attending(cached(model), dense), case, steps=3)
    report = report_on({"word": [505]})
    sample_family(REPORT.watched(cached(apply_taca(model, 1.5, 0.0)), report), case, steps=3)
    shares = torch.stack([share for share, _ in found]).view(3, case.joint)
    close = {"atol": 1e-5, "rtol": 1e-3}
    torch.testing.assert_close(report.table()[1].double(), shares, **close)
    maps = torch.stack([seen for _, seen in found])
    torch.testing.assert_close(torch.stack(report.maps)[:, 0].double(), maps, **close)


def test_steps_from_picture_to_noise(folder, apply_taca):
    """FlipSigmas: the report's steps are in the order of the run."""
    schedule = SCHEDULE.Schedule(1.5, SCHEDULE.TimestepWindow(700.0))
    model = tiny.load(folder, "flux")
    sampling = model.get_model_object("model_sampling")
    sigmas = FlipSigmas.execute(comfy.samplers.calculate_sigmas(sampling, "simple", 8)).result[0]
    report = report_on({})
    watched = REPORT.watched(PATCH(model, schedule), report)
    guider = BasicGuider.execute(watched, tiny.conditioning("flux", 7)).result[0]
    SamplerCustomAdvanced.execute(
        Noise_RandomNoise(3),
        guider,
        KSamplerSelect.execute("euler").result[0],
        sigmas,
        {"samples": torch.zeros(1, 16, 16, 16)},
    )
    table = report.table()
    assert table.shape == (2, 8, 4)
    assert table.isfinite().all()
    acted = [bool((step[0] != step[1]).any()) for step in table.transpose(0, 1)]
    assert acted == [float(1000 * s) >= 700 for s in sigmas[:-1]]
    assert acted[-1]
    assert not acted[0]


OWN = (1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0)
FILM = 36  # tokens


def joined(factor, found=None):
    """Dense attention over 18 text tokens and the film's, with a factor for each text key of the
    positive prompt."""

    def override(
        func, q, k, v, heads, mask=None, skip_reshape=False, skip_output_reshape=False, **kwargs
    ):
        if not skip_reshape:
            q, k, v = (x.flatten(2).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        assert k.shape[2] == 18 + FILM
        factors = torch.ones(2, 1, q.shape[2], k.shape[2], dtype=torch.float64)
        positive = kwargs["transformer_options"]["cond_or_uncond"].index(0)
        factors[positive, :, 18:, :18] = factor
        factors[1 - positive, :, 18:, :18] = 1.5
        if found is not None:
            eye = torch.eye(18 + FILM).expand(*k.shape[:2], -1, -1)
            seen = dense_attention(q, k, eye, factors)[positive].mean(0)[18:]
            found.append(seen[:, [2, 11]].sum(-1).view(3, 4, 3).mean(0))
        out = dense_attention(q, k, v, factors, mask).to(q.dtype)
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    return override


@pytest.fixture
def film(folder, monkeypatch):
    """CogVideoX, whose prompts of two lengths core joins in one call by repeating each."""
    [case] = named("CogVideoX")
    if not exists(case):
        pytest.skip("this ComfyUI has no CogVideoX")
    return case, families.load(case, folder, monkeypatch)


def test_prompts_that_core_repeats(film):
    """The prompt's own tokens limit gamma on each of their copies; a word is looked at there."""
    (case, model), how = film, {"steps": 2, "cfg": 3.0, "shorter": 3}
    schedule = SCHEDULE.Schedule(1.5, SCHEDULE.TimestepWindow(0.0))
    factor, found = 1 + 0.5 * torch.tensor(OWN * 2, dtype=torch.float64), []
    expected = sample_family(attending(model, joined(factor, found)), case, **how)
    plain = sample_family(attending(model, joined(1.5)), case, **how)
    ours = PATCH(model, schedule, OPTIONS(prompt=OWN))
    effect = (expected - plain).abs().max()
    assert effect > 1e-2
    assert (sample_family(ours, case, **how) - expected).abs().max() < 2e-3 * effect
    for num_tokens in (None, 9):
        report = report_on({"word": [2]}, num_tokens)
        sample_family(REPORT.watched(ours, report), case, **how)
        maps = torch.stack(report.maps)[:, 0].double()
        torch.testing.assert_close(maps, torch.stack(found), atol=1e-5, rtol=1e-3)


def test_another_prompt_is_still_told(film):
    """A conditioning whose length is a multiple of the prompt's is not a repeated one."""
    case, model = film
    schedule = SCHEDULE.Schedule(1.5, SCHEDULE.TimestepWindow(0.0))
    with pytest.raises(ValueError, match="has 9 text tokens, its prompt 3"):
        sample_family(PATCH(model, schedule, OPTIONS(prompt=OWN[:3])), case)


def test_pictures_amid_the_text(folder, monkeypatch):
    """MiniMax-H3: what its encoder saw is image to the model, the third and fourth of nine tokens.

    Words behind it, and the prompt's own tokens, are counted in the conditioning."""
    [case] = named("MiniMax-H3 I2V")
    if not exists(case):
        pytest.skip("this ComfyUI has no MiniMax-H3")
    model = families.load(case, folder, monkeypatch)
    kinds = [k for kind, n, *_ in case.spans(case.text[0], case.tokens) for k in [kind] * n]
    image = torch.tensor([kind == "image" for kind in kinds])
    factor = torch.ones(len(kinds), len(kinds), dtype=torch.float64)
    own = torch.tensor(OWN)
    own[5] = 1.0
    for i in (0, 1, 4, 5, 6, 7, 8):
        factor[image, i] = 1 + 0.5 * own[i].double()
    found = []

    def dense(func, q, k, v, heads, mask=None, skip_reshape=False, **kwargs):
        assert skip_reshape
        if k.shape[2] != len(kinds):
            return func(q, k, v, heads, mask=mask, skip_reshape=True, **kwargs)
        eye = torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1)
        seen = dense_attention(q, k, eye, factor)[0].mean(0)
        found.append(seen[-2 * case.tokens :, 5].view(2, 4, 3).mean(0))
        out = dense_attention(q, k, v, factor, mask).to(q.dtype)
        return out if kwargs.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)

    expected = sample_family(attending(model, dense), case)
    schedule = SCHEDULE.Schedule(1.5, SCHEDULE.TimestepWindow(0.0))
    ours = PATCH(model, schedule, OPTIONS(prompt=tuple(own.tolist())))
    report = report_on({"word": [5]}, 9)
    result = sample_family(REPORT.watched(ours, report), case)
    effect = (sample_family(model, case) - expected).abs().max()
    assert (result - expected).abs().max() < 2e-3 * effect
    maps = torch.stack(report.maps)[:, 0].double()
    torch.testing.assert_close(maps, torch.stack(found), atol=1e-5, rtol=1e-3)
    report = report_on({"word": [3]}, 9)
    with pytest.raises(ValueError, match=r"'word' is text token 3, .* and the prompt has 7"):
        sample_family(REPORT.watched(ours, report), case)


@pytest.mark.parametrize("share", [0.9, 1.2])
def test_steps_of_a_sampler_that_tells_another_sigma(folder, apply_taca, share):
    """The report's steps are the sampler's own."""
    model, report = tiny.load(folder, "flux"), report_on({})

    def other(model, x, sigmas, extra_args, callback, **kwargs):
        for i, sigma in enumerate(sigmas[:-1]):
            denoised = model(x, sigma * share * x.new_ones(len(x)), **extra_args)
            callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
            x = denoised + (x - denoised) * sigmas[i + 1] / sigma
        return x

    guider = comfy.samplers.CFGGuider(REPORT.watched(apply_taca(model, 1.4, 700.0), report))
    guider.set_conds(tiny.conditioning("flux", 7), tiny.conditioning("flux", 7, seed=5))
    noise, sigmas = tiny.latent(8, 8), torch.linspace(1, 0, 21)
    guider.sample(noise, torch.zeros_like(noise), comfy.samplers.KSAMPLER(other), sigmas)
    table = report.table()
    assert table.shape[1] == 20
    assert not table.isnan().any()
    acted = (table[0] != table[1]).any(1).tolist()
    assert acted == [float(1000 * share * sigma) >= 700 for sigma in sigmas[:-1]]
