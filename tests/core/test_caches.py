"""TACA beside caches that answer some of a model's calls or blocks."""

import contextlib
import sys
from unittest import mock

import pytest
import torch
from comfy.ldm.flux.layers import timestep_embedding
from comfy.patcher_extension import WrappersMP

from support import tiny
from support.loras import random_lora
from support.reference import (
    TEXT,
    dense,
)
from support.tiny import KINDS, installed_on, sample
from support.words import PROMPT, by_reference, dense_words, weighed


def skips(model):
    """A cache by a DIFFUSION_MODEL wrapper: every second call is answered from the one before."""
    model, kept = model.clone(), []

    def cached(executor, x, *args, **kwargs):
        if kept:
            return x + kept.pop()
        y = executor(x, *args, **kwargs)
        kept.append(y - x)
        return y

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "cache", cached)
    return model


def around(model, patches, calls=99):
    """As older packs do: attributes of the model are others for the length of its first calls."""
    model, left = model.clone(), [calls]

    def call(function, args):
        left[0] -= 1
        theirs = mock.patch.multiple(model.model.diffusion_model, **patches)
        with theirs if left[0] >= 0 else contextlib.nullcontext():
            return function(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(call)
    return model


def own_forward(model, hands_options=False):
    """As TeaCache: FLUX's forward written anew, without options for its blocks, and their sum
    kept: every second call is answered from the one before."""
    flux, kept = model.model.diffusion_model, []

    def forward(
        img,
        img_ids,
        txt,
        txt_ids,
        timesteps,
        y,
        guidance=None,
        control=None,
        transformer_options=None,
        attn_mask=None,
        **kwargs,
    ):
        img, txt = flux.img_in(img), flux.txt_in(txt)
        vec = flux.time_in(timestep_embedding(timesteps, 256)) + flux.vector_in(y)
        vec = vec + flux.guidance_in(timestep_embedding(guidance, 256))
        more = {"vec": vec, "pe": flux.pe_embedder(torch.cat((txt_ids, img_ids), 1))}
        if hands_options:
            more["transformer_options"] = transformer_options
        if kept:
            return flux.final_layer(img + kept.pop(), vec)
        before, tokens = img, txt.shape[1]
        for block in flux.double_blocks:
            img, txt = block(img=img, txt=txt, **more)
        both = torch.cat((txt, img), 1)
        for block in flux.single_blocks:
            both = block(both, **more)
        kept.append(both[:, tokens:] - before)
        return flux.final_layer(both[:, tokens:], vec)

    return around(model, {"forward_orig": forward})


class FirstBlock(torch.nn.Module):
    """As first-block caches: one block that stands for all, and may leave out all but the first."""

    def __init__(self, double, single=()):
        super().__init__()
        self.double, self.single, self.kept = double, single, []

    def forward(self, *streams, img=None, txt=None, **kwargs):
        if streams:  # SD3's
            txt, img = streams
            txt, img = self.double[0](txt, img, **kwargs)
        else:
            img, txt = self.double[0](img=img, txt=txt, **kwargs)
        first = img
        if self.kept:
            img = first + self.kept.pop()
            return (txt, img) if streams else (img, txt)
        for block in self.double[1:]:
            if streams:
                txt, img = block(txt, img, **kwargs)
            else:
                img, txt = block(img=img, txt=txt, **kwargs)
        if self.single:
            both = torch.cat((txt, img), 1)
            for block in self.single:
                both = block(both, **kwargs)
            txt, img = both[:, : txt.shape[1]], both[:, txt.shape[1] :]
        self.kept.append(img - first)
        return (txt, img) if streams else (img, txt)


def first_block(model, calls=99):
    transformer = model.model.diffusion_model
    if hasattr(transformer, "joint_blocks"):
        one = FirstBlock(list(transformer.joint_blocks))
        return around(model, {"joint_blocks": torch.nn.ModuleList([one])}, calls)
    one = FirstBlock(list(transformer.double_blocks), list(transformer.single_blocks))
    lists = {"double_blocks": [one], "single_blocks": []}
    lists = {name: torch.nn.ModuleList(each) for name, each in lists.items()}
    return around(model, lists, calls)


CACHES = {
    "wrapper": ("flux", skips, skips),
    "forward": ("flux", own_forward, lambda model: own_forward(model, hands_options=True)),
    "first block of FLUX": ("flux", first_block, first_block),
    "first block of SD3": ("sd3", first_block, first_block),
    "first block, then none": ("flux", *(lambda model: first_block(model, 4),) * 2),
}


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("ours_first", [True, False])
def test_a_cache(folder, apply_taca, name, ours_first):
    """As the packs of caches do it: what they compute has gamma, what they leave out has none."""
    kind, cache, dense_cache = CACHES[name]
    model = tiny.load(folder, kind)
    settings = {"steps": 6, "text": (TEXT, TEXT)}
    expected = sample(dense_cache(dense(model)), kind, **settings)
    ours = cache(apply_taca(model, 1.4, 0.0)) if ours_first else apply_taca(cache(model), 1.4, 0.0)
    torch.testing.assert_close(sample(ours, kind, **settings), expected, atol=2e-3, rtol=2e-3)
    plain = sample(cache(model), kind, **settings)
    assert (plain - expected).abs().max() > 0.1
    assert (plain - sample(model, kind, **settings)).abs().max() > 0.1, "the cache left out calls"
    assert not installed_on(model)


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_and_words(folder, name):
    """The same for weights: also on a model without TACA, where they come in the conditioning."""
    kind, cache, dense_cache = CACHES[name]
    model = tiny.load(folder, kind)
    settings = {"steps": 6, "text": (TEXT, TEXT)}
    override = dense_words({TEXT: [1.0] * TEXT, (TEXT, 0): PROMPT})
    expected = sample(dense_cache(by_reference(model, override)), kind, **settings)
    assert (sample(cache(model), kind, **settings) - expected).abs().max() > 0.05
    positive = weighed(tiny.conditioning(kind, TEXT), PROMPT)
    ours = sample(cache(model), kind, positive=positive, **settings)
    torch.testing.assert_close(ours, expected, atol=2e-3, rtol=2e-3)
    assert not installed_on(model)


@pytest.mark.parametrize("gamma", [1.0, 1.4])
def test_a_lora_acts_in_no_call_that_a_cache_answers(folder, apply_taca, load_lora, caplog, gamma):
    """Also where it acts alone."""
    caplog.set_level("INFO", logger="taca")
    model = tiny.load(folder, "flux")
    model = load_lora(apply_taca(model, gamma, 0.0), random_lora(model, only="blocks"))
    sample(skips(model), "flux", steps=6, text=(TEXT, TEXT))
    assert "acted on 3 of 6 steps" in caplog.records[-1].message
    assert "A cache answered 3 calls" in caplog.records[-1].message


@pytest.mark.parametrize("gamma", [1.0, 1.4])
@pytest.mark.parametrize(("threshold", "inside"), [(800.0, 3), (700.0, 4)])
def test_what_a_pack_keeps_of_a_lora(folder, apply_taca, load_lora, gamma, threshold, inside):
    """A cache's answer behind the window that the LoRA had a part in is an error; a call of the
    model there is none, and a run without a LoRA goes on."""
    model = tiny.load(folder, "flux")
    taca = apply_taca(model, gamma, threshold)
    lora = load_lora(taca, random_lora(model, only="blocks"))
    sample(skips(taca), "flux", steps=6, text=(TEXT, TEXT))
    if inside % 2:  # the first step behind the window is answered from the last one inside
        with pytest.raises(RuntimeError, match=r"no block of Flux ran in the first step after .*L"):
            sample(skips(lora), "flux", steps=6, text=(TEXT, TEXT))
    else:
        sample(skips(lora), "flux", steps=6, text=(TEXT, TEXT))
    assert not installed_on(model)


@pytest.mark.parametrize("name", ["EasyCacheNode", "LazyCacheNode"])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_what_core_keeps_ends_with_the_window(
    folder, apply_taca, load_lora, name, sampler, monkeypatch
):
    """Behind the window of a LoRA, the plain model's own answers are kept and no others."""
    caches = pytest.importorskip("comfy_extras.nodes_easycache")
    holder = getattr(caches, name.replace("Node", "Holder"))
    model = tiny.load(folder, "flux")
    lora = load_lora(apply_taca(model, 1.4, 700.0), random_lora(model, only="blocks"))
    cached = getattr(caches, name).execute(lora, 3.0, 0.1, 1.0, False).result[0]
    made, used = [], []
    update, apply = holder.update_cache_diff, holder.apply_cache_diff

    def told(self, x, *args):
        used.append((sigma[0], made[-1]))
        return apply(self, x, *args)

    def kept(self, *args):
        made.append(sigma[0])
        return update(self, *args)

    sigma = []

    def watch(executor, x, t, *args):
        sigma[:] = [1000 * float(t.max())]
        return executor(x, t, *args)

    monkeypatch.setattr(holder, "apply_cache_diff", told)
    monkeypatch.setattr(holder, "update_cache_diff", kept)
    others = cached.wrappers.pop(WrappersMP.PREDICT_NOISE, {})
    cached.wrappers[WrappersMP.PREDICT_NOISE] = {"watch": [watch], **others}
    settings = {"steps": 10, "text": (TEXT, TEXT), "sampler": sampler}
    sample(cached, "flux", **settings)
    assert any(at < 700 for at, _ in used)
    assert any(at >= 700 for at, _ in used)
    assert all((at < 700) == (of < 700) for at, of in used)


def test_a_cache_that_hides_the_chosen_blocks(folder, pack):
    """A first-block cache and TACA Options' blocks: an error, not another choice of blocks."""
    model = tiny.load(folder, "flux")
    options = pack["TACAOptions"].execute(False, "double 1").result[0]
    ours = pack["TACAPatchModel"].execute(model, 1.4, 0.0, None, options).result[0]
    with pytest.raises(ValueError, match=r"'double 1' is not within .* double 0-0\. A cache"):
        sample(first_block(ours), "flux", steps=2)
    assert not installed_on(model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_that_hides_the_modules_of_a_lora(folder, apply_taca, kind):
    """A first-block cache and Load TACA LoRA: an error that names both, and nothing left behind."""
    model = tiny.load(folder, kind)
    taca = apply_taca(model, 1.4, 0.0)
    lora = sys.modules["taca_pack.taca.lora_fit"].fit_lora(
        random_lora(model, only="blocks"), taca.model, "lora", 1.0
    )
    patch_lora = sys.modules["taca_pack.taca.patch"].patch_lora
    with pytest.raises(RuntimeError, match=r"Load TACA LoRA does not find .* cache"):
        sample(first_block(patch_lora(taca, lora)), kind, steps=2)
    assert not installed_on(model)
