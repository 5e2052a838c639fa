"""Qwen-Image 2.1 keeps the keys and values of its prefix: text, and references in or behind it."""

import sys
from dataclasses import replace

import pytest
import torch
from comfy.patcher_extension import WrappersMP
from safetensors.torch import save_file

from support import families
from support.families import named
from support.family_runs import dense, sample
from support.loras import random_lora
from support.reference import dense_attention
from support.reports import report_on

REPORT = sys.modules["taca_pack.taca.report"]
CASES = [case for case in families.CASES if "Qwen-Image 2.1" in case.name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("qwen-image21")


@pytest.fixture
def keeping(monkeypatch):
    """``model -> clone`` whose runs keep the prefix, as core's do; ``kept`` counts the prefixes."""
    kept = []

    def around(executor, *args, **kwargs):
        model = executor.class_obj.model_patcher.model.diffusion_model
        model.reset_prefix_cache(True)
        try:
            return executor(*args, **kwargs)
        finally:
            kept.append(len(model.prefix_cache))
            model.reset_prefix_cache(False)

    def keep(model):
        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "prefix", around)
        return model

    keep.kept = kept
    return keep


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("threshold", [0.0, 970.0])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_a_kept_prefix(case, folder, apply_taca, keeping, monkeypatch, caplog, threshold, cfg):
    """The first call, which fills the cache, and later ones are those without a cache."""
    caplog.set_level("INFO", logger="taca")
    model = families.load(case, folder, monkeypatch)
    how = {"steps": 3, "cfg": cfg, "batch": 2, "shorter": 4}
    texts = case.text[0], case.text[0] - 4
    plain = sample(dense(model, case, 1.0, texts=texts), case, **how)
    assert torch.equal(
        sample(keeping(apply_taca(model, 1.0)), case, **how), sample(keeping(model), case, **how)
    )
    ours = sample(keeping(apply_taca(model, 1.4, threshold)), case, **how)
    assert keeping.kept == [1 if cfg == 1 else 2] * 3
    assert f"acted on {1 if threshold else 3} of 3 steps" in caplog.text
    if threshold:
        expected = sample(apply_taca(model, 1.4, threshold), case, **how)
    else:
        expected = sample(dense(model, case, 1.4, texts=texts), case, **how)
    effect = (expected - plain).abs().max()
    assert effect > 1e-3
    assert (ours - expected).abs().max() < 2e-3 * effect


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kept", [True, False])
def test_reported_in_every_step(case, folder, apply_taca, keeping, monkeypatch, kept):
    """The picture's own tokens' share of text, and a word's map, with a kept prefix or without."""
    model = families.load(case, folder, monkeypatch)
    spans = case.spans(case.text[0], case.tokens)
    keys = torch.tensor([kind == "text" for kind, length, *_ in spans for _ in range(length)])
    shares, maps = [], []

    def looks(q, k, adjusted, mask):
        eye = torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1)
        seen = dense_attention(q, k, eye, adjusted, mask)[0].mean(0)[:, keys]
        shares.append(seen.sum(-1).mean())
        maps.append(seen[:, 6].view(4, 3))

    sample(dense(model, case, 1.4, looks=looks), case, steps=3)
    report = report_on({"word": [6]})
    watched = REPORT.watched(apply_taca(model, 1.4, 0.0), report)
    sample(keeping(watched) if kept else watched, case, steps=3)
    close = {"atol": 1e-5, "rtol": 1e-3}
    expected = torch.stack(shares).view(3, case.joint)
    torch.testing.assert_close(report.table()[1].double(), expected, **close)
    ours = torch.stack(report.maps)[:, 0].double()
    torch.testing.assert_close(ours, torch.stack(maps), **close)


def test_blocks_that_another_node_wraps(folder, apply_taca, keeping, monkeypatch):
    """Then core keeps no prefix, and the blocks are called with the options that it hands on."""
    [case] = named("Qwen-Image 2.1, a stand-in with references in the text")
    model = families.load(case, folder, monkeypatch)
    calls = []

    def around(args, extra):
        calls.append(args["img"].shape[1])
        options = {**args["transformer_options"], "mine": True}
        return extra["original_block"]({**args, "transformer_options": options})

    replaced = model.clone()
    for i in range(2):
        replaced.set_model_patch_replace(around, "dit", "single_block", i)
    plain, expected = (sample(dense(model, case, gamma), case, steps=2) for gamma in (1.0, 1.4))
    ours = sample(keeping(apply_taca(replaced, 1.4, 0.0)), case, steps=2)
    assert calls == [9 + 16 + 4 + 12] * 4
    assert (ours - expected).abs().max() < 2e-3 * (expected - plain).abs().max()


def test_no_text(folder, apply_taca, keeping, monkeypatch):
    """Nothing to adjust, and no error."""
    [case] = named("Qwen-Image 2.1, a stand-in with references")
    model = families.load(case, folder, monkeypatch)
    empty = replace(case, text=(0, 48))
    plain, ours = (sample(keeping(m), empty, steps=2) for m in (model, apply_taca(model, 1.4, 0.0)))
    assert torch.equal(plain, ours)


def test_the_prompts_own_tokens(folder, pack, keeping, monkeypatch):
    """Weights of text tokens on both sides of a reference land on theirs."""
    [case] = named("Qwen-Image 2.1, a stand-in with references in the text")
    model = families.load(case, folder, monkeypatch)
    own = (1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0)
    options = sys.modules["taca_pack.taca.options"].Options(prompt=own)
    patch = sys.modules["taca_pack.taca.patch"].patch_model
    schedule = sys.modules["taca_pack.taca.schedule"]
    ours = patch(model, schedule.Schedule(1.4, schedule.TimestepWindow(0.0)), options)
    kinds = [kind for kind, length, *_ in case.spans(9, 12) for _ in range(length)]
    weights = torch.zeros(len(kinds))
    weights[torch.tensor([kind == "text" for kind in kinds])] = torch.tensor(own)

    def override(func, q, k, v, heads, mask=None, **kwargs):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        factor = 1.0
        if (q.shape[2], k.shape[2]) == (12, len(kinds)):
            factor = (1 + 0.4 * weights).expand(12, -1)
        return dense_attention(q, k, v, factor, mask).to(q).transpose(1, 2).flatten(2)

    reference = model.clone()
    reference.model_options["transformer_options"]["optimized_attention_override"] = override
    plain, expected = sample(model, case, steps=2), sample(reference, case, steps=2)
    result = sample(keeping(ours), case, steps=2)
    assert (result - expected).abs().max() < 2e-3 * (expected - plain).abs().max()


def test_an_attention_that_another_node_wrapped_is_told(folder, apply_taca, monkeypatch):
    model = families.load(CASES[0], folder, monkeypatch)
    module = sys.modules["comfy.ldm.qwen_image21.model"]
    make = module.block_causal_attention
    monkeypatch.setattr(
        module, "block_causal_attention", lambda *a: lambda *b, **c: make(*a)(*b, **c)
    )
    with pytest.raises(RuntimeError, match="another node has wrapped it"):
        sample(apply_taca(model, 1.4), CASES[0])


def test_a_lora_that_would_stay_is_refused(folder, pack, apply_taca, loras, monkeypatch):
    model = families.load(CASES[0], folder, monkeypatch)
    save_file(random_lora(model, rank=2), loras / "lora.safetensors")
    with pytest.raises(ValueError, match=r"LoRA .* on Qwen-Image 2.1, since ComfyUI caches"):
        pack["LoadTACALoRA"].execute(apply_taca(model), "lora.safetensors", 0.5)


def test_training_is_refused(folder, pack, apply_taca, monkeypatch):
    model = apply_taca(families.load(CASES[0], folder, monkeypatch))
    with pytest.raises(ValueError, match=r"Qwen-Image 2.1 in training.*keeps the keys of its text"):
        pack["TACATrainingWindow"].execute(model)
