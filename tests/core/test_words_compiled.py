"""Words that weigh in compiled models: as uncompiled, in one graph, and none for other weights."""

import sys

import pytest
import torch
from torch._dynamo.utils import counters

from support import families, tiny
from support.compiling import compiled, load
from support.families import exists
from support.family_runs import sample as sample_family
from support.tiny import KINDS, installed_on, sample
from support.words import PROMPT, weighed

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
POSITIVE = [abs(weight) for weight in PROMPT]
AVOID = {"weights": [1.0] * 5 + [-1.5] * 2, "num_avoided": 2}


def words(kind, weights=PROMPT, length=7, seed=1, **how):
    return weighed(tiny.conditioning(kind, length, seed=seed), weights, **how)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("whole", [True, False])
def test_on_and_off(folder, apply_taca, kind, whole):
    """Weights, gamma and words to avoid in turn on one compiled model: never a stale result."""
    model = load(folder, kind, whole)
    fast = compiled(model, whole)
    settings = {"steps": 4, "text": (7, 7)}
    plain = sample(fast, kind, **settings)
    torch.testing.assert_close(plain, sample(model, kind, **settings), atol=1e-4, rtol=1e-4)
    prompts = {
        "weights": words(kind),
        "avoided": words(kind, **AVOID),
        "about the mean": words(kind, about_mean=True),
    }
    for with_taca in (False, True):
        for positive in prompts.values():
            pair = [apply_taca(m) if with_taca else m for m in (fast, model)]
            ours, expected = (sample(m, kind, positive=positive, **settings) for m in pair)
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
            assert (ours - plain).abs().max() > 0.02
            assert torch.equal(sample(fast, kind, **settings), plain)
    assert not counters["graph_break"]
    assert not installed_on(model)


@pytest.mark.parametrize(
    ("kind", "cfg"), [pytest.param("flux", 3.0, marks=pytest.mark.slow), ("sd3", 1.0)]
)
def test_no_graph_for_other_weights(folder, kind, cfg):
    """One graph for weights, one more where any is negative; none for a prompt or its weights."""
    fast = compiled(load(folder, kind), whole=True)

    def graphs(weights, seed=1):
        positive = words(kind, weights, len(weights), seed)
        sample(fast, kind, steps=2, cfg=cfg, text=(7, len(weights)), positive=positive)
        return counters["stats"]["unique_graphs"]

    assert graphs(POSITIVE) == 1
    assert graphs([1.0, 1.0, 1.5, 1.0, 1.0, 1.0, 1.0]) == 1
    assert graphs(POSITIVE[::-1], seed=8) == 1
    assert graphs(PROMPT) == 2
    assert graphs(PROMPT[::-1], seed=8) == 2
    dynamic = graphs([*PROMPT, 1.0, 1.0])  # dynamo makes the length dynamic
    assert dynamic == 3
    assert graphs([*PROMPT, *[1.0] * 5]) == dynamic


@pytest.mark.slow
def test_two_graphs_beside_gamma(folder, apply_taca):
    """Inside the window of gamma, and outside; weights and gamma change nothing."""
    fast = compiled(load(folder, "flux"), whole=True)
    for gamma, weights in ((1.2, POSITIVE), (1.4, POSITIVE[::-1])):
        positive = words("flux", weights)
        sample(apply_taca(fast, gamma), "flux", steps=6, text=(7, 7), positive=positive)
        assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.slow
def test_a_window_of_their_own(folder):
    """Steps outside it run the plain graph."""
    schedule = sys.modules["taca_pack.taca.schedule"]
    model = load(folder, "flux")
    fast = compiled(model, whole=True)
    half = schedule.Schedule(1.2, schedule.TimestepWindow(700.0))
    positive = words("flux", schedule=half)
    settings = {"steps": 4, "text": (7, 7), "positive": positive}
    ours, expected = (sample(m, "flux", **settings) for m in (fast, model))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_inductor(folder, kind):
    """The compiler users have, on the whole model."""
    model = load(folder, kind)
    fast = compiled(model, whole=True, backend="inductor")
    settings = {"steps": 2, "text": (7, 7)}
    for positive in (words(kind), words(kind, **AVOID), None):
        ours, expected = (sample(m, kind, positive=positive, **settings) for m in (fast, model))
        torch.testing.assert_close(ours, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("case", families.ONE_EACH, ids=str)
def test_families(case, folder, monkeypatch, caplog):
    """Weights on each family's compiled model, and off again, as uncompiled."""
    if not exists(case):
        pytest.skip(f"this ComfyUI has no {case.name}")
    model = families.load(case, folder, monkeypatch)
    fast = compiled(model, whole=True)
    number = case.text[0]
    positive = weighed(families.conditioning(case), (PROMPT * number)[:number])
    plain, expected = (sample_family(model, case, positive=each) for each in (None, positive))
    effect = (plain - expected).abs().max()
    assert effect > 3e-4
    for each, wanted in ((positive, expected), (None, plain), (positive, expected), (None, plain)):
        ours = sample_family(fast, case, positive=each)
        assert (ours - wanted).abs().max() < 2e-3 * effect + 1e-5
    assert ("cannot be compiled" in caplog.text) == bool(case.pieces)
    assert not installed_on(model)
