"""Words that weigh on every family of models, in runs against dense float64."""

import pytest
import torch

from support import families
from support.family_runs import TABLE, dense, sample
from support.words import weighed

WEIGHTS = [1.0, 2.0, 0.0, 0.5, 1.0, -1.0, 3.0]


def all_text(case):
    """Where text is among all keys of the sequence."""
    at, places = 0, []
    for kind, length, *_ in case.spans(case.text[0], case.tokens):
        if kind == "text":
            places += range(at, at + length)
        at += length
    return places


def text_places(case):
    """Where the tokens of the conditioning are among all keys."""
    places = all_text(case)
    first = FIRST.get(case.name, 0)
    if "FLUX.2" in case.name:  # filled up in front
        first = len(places) - case.text[0]
    return places[first : first + case.text[0]]


GLYPHS, REFERENCES = 5, 8 + 8
FIRST = {
    "HunyuanVideo 1.5": GLYPHS,
    "HunyuanVideo 1.5 I2V": GLYPHS,
    "Z-Image Omni": REFERENCES,
    "Z-Image with references and no SigLIP": REFERENCES,
}
"""How many text tokens are before those of the conditioning."""
PICTURES = {"MiniMax-H3 I2V": (2, 3)}
"""Tokens of the conditioning that are image to the model."""


def test_words_weigh(case, folder, monkeypatch):
    model = families.load(case, folder, monkeypatch)
    number = case.text[0]
    weights = (WEIGHTS * number)[:number]
    positive = weighed(families.conditioning(case), weights)
    ours = sample(model, case, positive=positive)
    own = [w for i, w in enumerate(weights) if i not in PICTURES.get(case.name, ())]
    at = dict(zip(text_places(case), own, strict=False))  # some models cut the text
    expected = sample(dense(model, case, 1.0, weights=at), case)
    assert (sample(model, case) - expected).abs().max() > 3e-4
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-3)


def test_what_is_avoided_is_not_seen_by_the_prompt(case, folder, monkeypatch):
    """What is avoided changes the picture, and no key of the prompt; or the model is refused."""
    texts = families.conditioning(case), families.conditioning(case)
    for ((_, extras),) in texts:
        if "attention_mask" in extras:  # which hides the last tokens
            extras["attention_mask"] = torch.ones_like(extras["attention_mask"])
    model = families.load(case, folder, monkeypatch)
    texts[1][0][0][:, -3:] *= -2
    weights = [1.0] * (case.text[0] - 3) + [-1.0] * 3
    positives = [weighed(text, weights, num_avoided=3) for text in texts]
    mixes = TABLE.family_of(model.model.diffusion_model).mixes_text
    if mixes or case.name == "PixelDiT":  # whose case has more text than it takes
        reason = "TACA cannot avoid words on" if mixes else "cuts off what is to be avoided"
        with pytest.raises(ValueError, match=reason):
            sample(model, case, positive=positives[0])
        return
    own = text_places(case)[: case.text[0] - 3]
    joint = sum(length for _, length, *_ in case.spans(case.text[0], case.tokens))

    def looks(func, q, k, v, heads, *args, **kwargs):
        each = k if kwargs.get("skip_reshape") else k.unflatten(-1, (heads, -1)).transpose(1, 2)
        if each.shape[2] == joint:
            keys.append(each[:, :, own])
        return func(q, k, v, heads, *args, **kwargs)

    pictures, seen = [], []
    for positive in positives:
        observed, keys = model.clone(), []
        observed.model_options["transformer_options"]["optimized_attention_override"] = looks
        pictures.append(sample(observed, case, positive=positive))
        seen.append(keys)
    assert not torch.equal(*pictures)
    if case.name in ("Mochi", "Ernie-Image"):  # cropped by the mask; asks no override
        return
    # Of the second block: what the first has made of the prompt, beside what is avoided. From the
    # third on the prompt sees it through the picture.
    second = len(keys) // case.joint
    assert torch.equal(seen[0][second], seen[1][second])


@pytest.mark.parametrize("weighs", [True, False])
def test_weights_that_a_model_cuts_off_are_told(weighs, folder, monkeypatch):
    (case,) = families.named("PixelDiT")  # with more text than it takes
    if not families.exists(case):
        pytest.skip("this ComfyUI has no PixelDiT")
    model, said = families.load(case, folder, monkeypatch), []
    weights = [2.0] + [1.0] * (case.text[0] - 2) + [3.0 if weighs else 1.0]
    sample(model, case, positive=weighed(families.conditioning(case), weights, say=said.append))
    assert ("The model cuts off words that weigh" in said[0]) == weighs


BESIDE = {
    "HiDream-I1": ("conditioning_llama3", 9, 2),  # behind the text, of two layers
    "HunyuanImage 2.1": ("conditioning_byt5small", 9, 1),
    "HunyuanVideo 1.5": ("conditioning_byt5small", 0, 1),
}
"""What is beside the text, its first place among the text's, and how often it is there."""


@pytest.mark.parametrize("name", BESIDE)
def test_words_weigh_in_what_is_beside_the_text(name, folder, monkeypatch):
    (case,) = families.named(name)
    if not families.exists(case):
        pytest.skip(f"this ComfyUI has no {name}")
    model = families.load(case, folder, monkeypatch)
    key, first, times = BESIDE[name]
    first = case.text[0] if first else 0
    weights = (1.0, 2.0, -1.0, 0.0, 3.0)
    positive = weighed(
        families.conditioning(case), [2.0] + [1.0] * (case.text[0] - 1), beside={key: weights}
    )
    ours = sample(model, case, positive=positive)
    places = all_text(case)[first:]
    at = dict(zip(places, weights * times, strict=False))
    at[text_places(case)[0]] = 2.0
    expected = sample(dense(model, case, 1.0, weights=at), case)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-3)
