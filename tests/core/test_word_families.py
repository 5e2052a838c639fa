"""Words that weigh on every family of models, in runs against dense float64."""

import torch

from support import families
from support.family_runs import dense, sample
from support.words import weighed

WEIGHTS = [1.0, 2.0, 0.0, 0.5, 1.0, -1.0, 3.0]


def text_places(case):
    """Where the tokens of the conditioning are among all keys of the sequence."""
    at, places = 0, []
    for kind, length, *_ in case.spans(case.text[0], case.tokens):
        if kind == "text":
            places += range(at, at + length)
        at += length
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


def test_words_weigh(case, folder, monkeypatch):
    model = families.load(case, folder, monkeypatch)
    number = case.text[0]
    weights = (WEIGHTS * number)[:number]
    positive = weighed(families.conditioning(case), weights)
    ours = sample(model, case, positive=positive)
    at = dict(zip(text_places(case), weights, strict=False))  # some models cut the text
    expected = sample(dense(model, case, 1.0, weights=at), case)
    assert (sample(model, case) - expected).abs().max() > 3e-4
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-3)
