"""Core's MultiGPU CFG Split: a copy of the model on each device, each in a thread of its own.

The devices are "cpu" and "cpu:0", which torch and core tell apart; all else is core's own path.
"""

import sys

import comfy.model_management
import comfy.sd
import pytest
import torch

import nodes
from support import tiny
from support.loras import random_lora
from support.multigpu import DEVICES, needs_multigpu, split, watched
from support.reference import dense
from support.tiny import KINDS, reference, sample
from support.words import PROMPT, by_reference, dense_words, weighed

pytestmark = needs_multigpu
lora_module = sys.modules["taca_pack.taca.lora"]


@pytest.fixture(autouse=True)
def two_devices(monkeypatch):
    monkeypatch.setattr(
        comfy.model_management, "get_all_torch_devices", lambda exclude_current=False: DEVICES[:]
    )


ORDERS = {
    "ours first": lambda model, ours: split(ours(model)),
    "split first": lambda model, ours: ours(split(model)),
}
each_order = pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)


def installed_on(models):
    return [m for model in models for m in model.modules() if "forward" in m.__dict__]


@pytest.mark.parametrize("kind", KINDS)
@each_order
def test_cfg_on_two_devices(folder, apply_taca, kind, order):
    """A device for each half of CFG: the authors' run on one."""
    model = tiny.load(folder, kind)
    both, calls = watched(order(model, lambda m: apply_taca(m, 1.4)))
    settings = {"steps": 4, "text": (7, 12)}
    plain = sample(model, kind, **settings)
    ours = sample(both, kind, **settings)
    expected = reference(model, kind, gamma=1.4, first=1, **settings)
    effect = (plain - expected).abs().max()
    assert effect > 1e-2
    assert (ours - expected).abs().max() < 1e-3 * effect
    assert len(calls) == 4 * 2
    assert len({call[:3] for call in calls}) == 2  # one model and one thread for each device
    assert [{d for d, *_ in calls[i : i + 2]} for i in (0, 2, 4, 6)] == [set(DEVICES)] * 4
    assert not installed_on({base for _, base, *_ in calls})
    assert torch.equal(sample(model, kind, **settings), plain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gamma", [None, 1.3])
def test_words_on_two_devices(folder, apply_taca, kind, gamma):
    """Each half of CFG has its own weights, on its own device."""
    model, negative = tiny.load(folder, kind), [1.0] * 11 + [3.0]
    settings = {"steps": 3, "text": (7, 12)}
    override = dense_words({7: PROMPT, 12: negative}, gamma or 1.0, threshold=0.0)
    expected = sample(by_reference(model, override), kind, **settings)
    assert (sample(model, kind, **settings) - expected).abs().max() > 0.05
    both, calls = watched(split(model if gamma is None else apply_taca(model, gamma, 0.0)))
    given = weighed(tiny.conditioning(kind, 7), PROMPT), tiny.conditioning(kind, 12, seed=5)
    given = given[0], weighed(given[1], negative)
    empty = {"samples": torch.zeros(1, 16, 16, 16)}
    ours = nodes.common_ksampler(both, 3, 3, 3.0, "euler", "simple", *given, empty)[0]["samples"]
    torch.testing.assert_close(ours, expected, atol=1e-3, rtol=1e-3)
    assert [{d for d, *_ in calls[i : i + 2]} for i in (0, 2, 4)] == [set(DEVICES)] * 3
    assert not installed_on({base for _, base, *_ in calls})


@pytest.mark.parametrize("kind", KINDS)
@each_order
def test_a_lora_on_two_devices(folder, apply_taca, load_lora, kind, order):
    """Each device has its own copy, also of another LoRA on the same split model."""
    model = tiny.load(folder, kind)
    settings = {"steps": 3, "text": (7, 7)}
    without = sample(dense(model), kind, **settings)
    start = split(model)
    for seed in (0, 1):
        lora = random_lora(model, seed=seed)
        merged = comfy.sd.load_lora_for_models(model, None, dict(lora), 0.5, 0)[0]
        expected = sample(dense(merged), kind, **settings)
        given = start if order is ORDERS["split first"] else model
        both = order(given, lambda m, lora=lora: load_lora(apply_taca(m, 1.4, 0.0), lora, 0.5))
        both, calls = watched(both)
        for _ in range(2):
            ours = sample(both, kind, **settings)
            effect = (without - expected).abs().max()
            assert effect > 1e-2
            assert (ours - expected).abs().max() < 2e-3 * effect
        bases = {base for _, base, *_ in calls}
        assert len(bases) == 2
        copies = [both, *both.get_additional_models_with_key("multigpu")]
        assert (
            len({id(each) for m in copies for each in lora_module.loras_of(m)}) == len(copies) == 2
        )
        assert not installed_on(bases)


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_that_fails(folder, apply_taca, kind):
    """Its error ends the run; neither device's model keeps anything."""
    model = tiny.load(folder, kind)
    settings = {"steps": 2, "text": (7, 12)}
    plain = sample(model, kind, **settings)
    both, calls = watched(split(apply_taca(model, 1.4)))

    def failing(func, *args, transformer_options, **kwargs):
        if transformer_options["multigpu_thread_device"] == DEVICES[1]:
            raise comfy.model_management.OOM_EXCEPTION("out of memory")
        return func(*args, transformer_options=transformer_options, **kwargs)

    options = both.model_options.setdefault("transformer_options", {})
    options["optimized_attention_override"] = failing
    with pytest.raises(comfy.model_management.OOM_EXCEPTION):
        sample(both, kind, **settings)
    bases = {base for _, base, *_ in calls}
    assert len(bases) == 2
    assert not installed_on(bases)
    del options["optimized_attention_override"]
    assert not torch.equal(sample(both, kind, **settings), plain)
    assert torch.equal(sample(model, kind, **settings), plain)
