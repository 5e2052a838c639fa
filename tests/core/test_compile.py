"""torch.compile as core's TorchCompileModel and KJNodes' nodes apply it.

ComfyUI compiles with a filter that drops every guard on ``transformer_options``; what a patch
changes there is frozen at the first trace. Dynamo alone, without a backend, shows it.
"""

import re
import sys
import threading

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from support import families, tiny
from support.compiling import compiled, load
from support.families import exists, named
from support.family_runs import dense
from support.family_runs import sample as sample_family
from support.tiny import KINDS, installed_on, sample

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
compiler = sys.modules["taca_pack.taca.compiler"]
schedule = sys.modules["taca_pack.taca.schedule"]


@pytest.mark.parametrize(
    ("kind", "whole"),
    [
        ("sd3", False),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in [("sd3", True), ("flux", True), ("flux", False)]
        ),
    ],
)
def test_both_orders_on_and_off(folder, apply_taca, kind, whole):
    """Compile before or after TACA, with and without it, in one process: never a stale result."""
    model = load(folder, kind, whole)
    plain, ours = (sample(m, kind, steps=6, text=(7, 7)) for m in (model, apply_taca(model)))
    fast = compiled(model, whole)
    for m, expected in [
        (apply_taca(fast), ours),
        (fast, plain),
        (compiled(apply_taca(model), whole), ours),
        (apply_taca(fast), ours),
        (fast, plain),
    ]:
        result = sample(m, kind, steps=6, text=(7, 7))
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain, ours, atol=1e-2)
    assert not counters["graph_break"]
    assert not installed_on(model)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_graphs_a_shape_and_none_for_gamma(folder, apply_taca, kind):
    fast = compiled(load(folder, kind), whole=True)

    def graphs(gamma, text):
        sample(apply_taca(fast, gamma), kind, steps=6, text=(text, text))
        return counters["stats"]["unique_graphs"]

    assert graphs(1.2, 7) == 2
    assert graphs(1.3, 7) == 2
    dynamic = graphs(1.2, 9)  # dynamo makes the length dynamic: two more graphs, for all lengths
    assert dynamic == 4
    assert graphs(1.4, 12) == dynamic


SIZES = [(8, 8), (8, 12), (12, 16)]


# Not the whole of FLUX: over these sizes it meets dynamo's limit of recompilations without TACA.
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "whole"), [("sd3", True), ("sd3", False), ("flux", False)])
def test_twice_the_plain_models_graphs(folder, apply_taca, kind, whole):
    """Inside the window as many as outside, over sizes and batches, and about as many guards; not
    one more frame is compiled for gamma or a prompt."""
    ramp = schedule.Schedule(1.3, schedule.TimestepWindow(500.0, "linear"))
    counts, guards = [], []

    def graphs(model, seed=1):
        for batch in (1, 2):
            for size in SIZES:
                positive = tiny.conditioning(kind, 7, seed=seed)
                settings = {"steps": 4, "size": size, "batch": batch, "text": (7, 7), "cfg": 1.0}
                sample(model, kind, positive=positive, **settings)
        assert not counters["graph_break"]
        return counters["stats"]["unique_graphs"], counters["frames"]["total"]

    for with_taca in (False, True):
        torch._dynamo.reset()
        counters.clear()
        torch._dynamo.utils.clear_compilation_metrics()
        fast = compiled(load(folder, kind, whole), whole)
        if with_taca:
            graphs(apply_taca(fast, schedule=ramp))
        counts.append(graphs(fast))
        found = torch._dynamo.utils.get_compilation_metrics()
        guards.append(max(each.guard_count for each in found))
    assert counts[1] == tuple(2 * count for count in counts[0])
    assert guards[1] <= 1.15 * guards[0]
    assert graphs(apply_taca(fast, 1.1)) == counts[1]
    assert graphs(apply_taca(fast, schedule=ramp), seed=5) == counts[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("whole", [True, False])
def test_a_kernel_that_breaks_the_graph(folder, apply_taca, untraceable, caplog, kind, whole):
    """With e.g. SageAttention the graph breaks and is compiled in pieces, without guards: those
    with TACA must never be taken for the plain model's."""
    model = load(folder, kind, whole)
    plain, ours = (sample(m, kind, steps=6, text=(7, 7)) for m in (model, apply_taca(model)))
    fast = compiled(model, whole)
    caplog.clear()
    for m, expected in [(apply_taca(fast), ours), (fast, plain)] * 2:
        result = sample(m, kind, steps=6, text=(7, 7))
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
    assert "cannot be compiled in one piece" in caplog.text
    assert not installed_on(model)


QUICK = named("Chroma")  # traced soonest


@pytest.mark.parametrize(
    ("case", "whole"),
    [
        pytest.param(
            case,
            whole,
            id=f"{case}-{'whole' if whole else 'blocks'}",
            marks=[] if case in QUICK and not whole else pytest.mark.slow,
        )
        for whole in (True, False)
        for case in (families.ONE_EACH if whole else families.CASES)
    ],
)
def test_families(case, folder, apply_taca, monkeypatch, caplog, whole):
    """TACA on a compiled model and off again, twice, then compiled with TACA in it, against dense
    attention; nothing is stale, and the blocks compile in one piece.

    Where they cannot (``Case.pieces``), steps with TACA run uncompiled, and the log says so.
    """
    if not exists(case):
        pytest.skip(f"this ComfyUI has no {case.name}")
    model = families.load(case, folder, monkeypatch)
    plain, expected = (sample_family(dense(model, case, gamma), case) for gamma in (1.0, 1.4))
    effect = (plain - expected).abs().max()
    transformer = model.model.diffusion_model
    lists = [
        name
        for name, child in transformer.named_modules()
        if type(child) is nn.ModuleList and not re.search(r"\d", name)  # not in another list
    ]
    fast = compiled(model, whole, lists=lists)
    runs = [(apply_taca(fast, 1.4), expected), (fast, plain)] * 2
    runs += [(compiled(apply_taca(model, 1.4), whole, lists=lists), expected), (fast, plain)]
    for m, wanted in runs:
        assert (sample_family(m, case) - wanted).abs().max() < 2e-3 * effect
    assert counters["stats"]["unique_graphs"]
    assert ("cannot be compiled" in caplog.text) == bool(case.pieces)
    assert not installed_on(model)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_inductor(folder, apply_taca, kind):
    """The compiler users have, on the whole model."""
    model = load(folder, kind)
    plain, ours = (sample(m, kind, steps=6, text=(7, 7)) for m in (model, apply_taca(model)))
    fast = compiled(model, whole=True, backend="inductor")
    for m, expected in [(apply_taca(fast), ours), (fast, plain)]:
        result = sample(m, kind, steps=6, text=(7, 7))
        torch.testing.assert_close(result, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("whole", [True, False])
@torch._dynamo.config.patch(recompile_limit=2, automatic_dynamic_shapes=False)
def test_past_dynamos_limit_of_recompilations(folder, apply_taca, kind, whole):
    """Then dynamo runs functions as they are, and must not run the plain block's code in ours."""
    model = load(folder, kind, whole)
    fast = compiled(model, whole)
    for size, text in (((8, 8), 7), ((8, 10), 9), ((12, 10), 11)):
        settings = {"steps": 4, "size": size, "text": (text, text), "cfg": 1.0}
        plain = sample(model, kind, **settings)
        ours = sample(apply_taca(model, 1.5), kind, **settings)
        assert not torch.allclose(plain, ours, atol=0.1)
        for m, expected in [(fast, plain), (apply_taca(fast, 1.5), ours)] * 2:
            result = sample(m, kind, **settings)
            torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)


def test_the_uncompiled_stance_is_reset_by_the_last(folder):
    """Two devices' threads inside at once: compilation is off for both, and on again after."""
    uncompiled = compiler.uncompiled_calls
    is_on = torch.compile(lambda x: x * torch.compiler.is_compiling(), backend="eager")
    entered, leave = threading.Event(), threading.Event()

    def other():
        with uncompiled:
            entered.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with uncompiled:
        thread.start()
        entered.wait()
    assert not is_on(torch.ones(1))
    leave.set()
    thread.join()
    assert is_on(torch.ones(1))


def test_an_older_torch_is_told(folder, apply_taca, monkeypatch):
    model = tiny.load(folder, "flux")
    fast = apply_taca(compiled(model, whole=False))
    uncompiled = sample(apply_taca(model), "flux")
    monkeypatch.delattr(torch._dynamo, "error_on_graph_break")
    with pytest.raises(RuntimeError, match="needs a later torch"):
        sample(fast, "flux")
    assert torch.equal(sample(apply_taca(model), "flux"), uncompiled)
