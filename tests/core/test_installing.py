"""What the pack puts into a model for a call: how it looks, what it costs, that it goes again."""

import copy
import functools
import inspect
import re
import sys
import threading
from collections import Counter
from pathlib import Path
from types import MethodType

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_custom_sampler import (
    BasicGuider,
    KSamplerSelect,
    Noise_RandomNoise,
    SamplerCustomAdvanced,
)
from torch._dynamo.utils import counters
from torch._inductor.exc import InductorError

from support import tiny
from support.compiling import compiled, load
from support.loras import random_lora
from support.tiny import KINDS, call, installed_on, run, sample, sigmas_of
from support.words import weighed

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
TACA = Path(sys.modules["taca_pack"].__file__).parent / "taca"


def module(name):
    return sys.modules[f"taca_pack.taca.{name}"]


def inner_wrapper(model, wrapper):
    """A clone whose calls run this APPLY_MODEL wrapper inside all that are there already."""
    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "inner", wrapper)
    return model


# Forwards that are swapped


def test_a_wrap_that_fails_takes_the_earlier_ones_out():
    """Its own error comes out, and each module has the forward that it had."""
    first, second, third = modules = [torch.nn.Linear(2, 2) for _ in range(3)]
    theirs = second.forward = lambda x: 2 * x

    def wrap(forward):
        return lambda x: forward(x) + 1

    def fails(forward):
        assert first.forward(torch.ones(1, 2)).shape == (1, 2)
        assert all("forward" in each.__dict__ for each in (first, second))
        raise ValueError("of this wrap")

    swaps = [(first, wrap), (second, wrap), (first, wrap), (third, fails)]
    swaps = [(each, "forward", wrap) for each, wrap in swaps]
    entered = []
    with pytest.raises(ValueError, match="of this wrap"), module("swap").swapped(swaps):
        entered.append(True)
    assert not entered
    assert [each.__dict__.get("forward") for each in modules] == [None, theirs, None]


def own_forward(layer):
    return MethodType(type(layer).forward, layer)


def check_looks(layers):
    assert layers
    for layer in layers:
        forward, own = layer.forward, own_forward(layer)
        assert forward != own
        assert inspect.signature(forward) == inspect.signature(own)
        assert forward.__name__ == own.__name__
        assert hasattr(forward, "__wrapped__")
        assert inspect.unwrap(forward) == own


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("algorithm", [None, "lora", "full", "dora"])
def test_what_is_put_in_looks_like_what_was_there(folder, apply_taca, load_lora, kind, algorithm):
    """Blocks, linear layers and norms: other packs inspect the signature of a forward."""
    model = apply_taca(tiny.load(folder, kind))
    if algorithm:
        model = load_lora(model, random_lora(model, algorithm))
    seen = []

    def look(executor, *args, **kwargs):
        layers = installed_on(model)
        if layers:
            check_looks(layers)
        seen.append(len(layers))
        return executor(*args, **kwargs)

    sample(inner_wrapper(model, look), kind, steps=4, cfg=1.0)
    assert seen[0] >= (20 if algorithm else 2)
    assert seen[1:] == [0] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_training_looks_like_what_was_there(folder, apply_taca, pack, kind):
    model = pack["TACATrainingWindow"].execute(apply_taca(tiny.load(folder, kind))).result[0]
    module("training")._install(model)
    try:
        assert not installed_on(model)  # hooks, so no forward is another
    finally:
        module("training")._remove(model)


def test_a_report_looks_like_what_was_there(folder, apply_taca, pack):
    model = apply_taca(tiny.load(folder, "flux"))
    seen = []

    def look(executor, *args, **kwargs):
        check_looks(installed_on(model))
        seen.append(True)
        return executor(*args, **kwargs)

    run(pack["TACAAttentionReport"], inner_wrapper(model, look), "flux", words="")
    assert len(seen) == 4


def test_a_pack_that_inspects_blocks_acts_inside_the_window(folder, apply_taca):
    """A wrapper inside ours that wraps, in each call, blocks that take transformer_options."""
    model = tiny.load(folder, "flux")
    blocks = [
        *model.model.diffusion_model.double_blocks,
        *model.model.diffusion_model.single_blocks,
    ]
    calls = []

    def counted(forward):
        @functools.wraps(forward)
        def theirs(*args, **kwargs):
            calls[-1] += 1
            return forward(*args, **kwargs)

        return theirs

    def each_call(executor, *args, **kwargs):
        calls.append(0)
        before = [(block, block.__dict__.get("forward")) for block in blocks]
        for block in blocks:
            if "transformer_options" in inspect.signature(block.forward).parameters:
                block.forward = counted(block.forward)
        try:
            return executor(*args, **kwargs)
        finally:
            for block, forward in before:
                block.__dict__.pop("forward", None)
                if forward is not None:
                    block.forward = forward

    settings = {"steps": 4, "cfg": 1.0}
    patched = apply_taca(model)
    result = sample(inner_wrapper(patched, each_call), "flux", **settings)
    assert calls == [len(blocks)] * 4  # of which the first is inside the window
    assert torch.equal(result, sample(patched, "flux", **settings))
    assert not installed_on(model)


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_training_installed_twice_is_removed_by_one(folder, apply_taca, pack, kind, foreign):
    """The trainer may load a model twice before it is unloaded."""
    model = pack["TACATrainingWindow"].execute(apply_taca(tiny.load(folder, kind))).result[0]
    blocks = [block for block, *_ in module("training")._blocks(model)]
    theirs = functools.partial(own_forward(blocks[0]))
    if foreign:
        blocks[0].forward = theirs
    for _ in range(2):
        module("training")._install(model)
    assert all(len(block._forward_pre_hooks) == 1 for block in blocks)
    module("training")._remove(model)
    assert not any(block._forward_pre_hooks for block in blocks)
    expected = [theirs if foreign else None] + [None] * (len(blocks) - 1)
    assert [block.__dict__.get("forward") for block in blocks] == expected
    assert not any(module("training").TRAINING_KEY in block.__dict__ for block in blocks)


# Wrappers of other packs around ours


def around(model, kind, wrapper):
    """A clone with a wrapper outside all others, also those that are added later."""
    model = model.clone()
    comfy.patcher_extension.add_wrapper_with_key(
        kind, "outer", wrapper, model.model_options, is_model_options=True
    )
    return model


def by_name(function, calls):
    """A wrapper that calls what it wraps by the names of its arguments alone."""
    names = inspect.signature(function)

    def wrapper(executor, *args, **kwargs):
        bound = names.bind(executor.class_obj, *args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        arguments.pop("self")
        calls.append(sorted(arguments))
        return executor(**arguments.pop("kwargs", {}), **arguments)

    return wrapper


OUTER = {
    WrappersMP.APPLY_MODEL: (comfy.model_base.BaseModel._apply_model, 4, "transformer_options"),
    WrappersMP.OUTER_SAMPLE: (comfy.samplers.CFGGuider.outer_sample, 1, "sigmas"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("node", ["TACAPatchModel", "TACAAttentionReport"])
def test_an_outer_wrapper_calls_by_name(folder, apply_taca, pack, kind, outer, node):
    """Ours take their arguments by core's names too; inside the window and outside of it."""
    function, expected, name = OUTER[outer]
    model, calls = apply_taca(tiny.load(folder, kind)), []
    node = SamplerCustomAdvanced if node == "TACAPatchModel" else pack[node]
    more = {} if node is SamplerCustomAdvanced else {"words": "x=1"}
    named = around(model, outer, by_name(function, calls))
    results = [run(node, m, kind, **more)[0]["samples"] for m in (named, model)]
    assert torch.equal(*results)
    assert len(calls) == expected
    assert all(name in each for each in calls)


def test_the_report_keeps_the_guiders_own_options(folder, apply_taca, pack):
    """They may be others than its model's: guiders of other packs have them so."""
    seen = []

    def look(executor, *args, **kwargs):
        seen.append(args[5].get("of_the_guider"))
        return executor(*args, **kwargs)

    def halved(func, *args, **kwargs):
        return 0.5 * func(*args, **kwargs)

    model = inner_wrapper(apply_taca(tiny.load(folder, "flux")), look)
    guider = BasicGuider.execute(model, tiny.conditioning("flux", 7)).result[0]
    plain = copy.copy(guider)
    own = guider.model_options = comfy.model_patcher.create_model_options_clone(model.model_options)
    options = own.setdefault("transformer_options", {})
    options |= {"of_the_guider": 7, "optimized_attention_override": halved}
    entries, patcher = dict(options), guider.model_patcher

    def sampled(node, guider, **more):
        return node.execute(
            Noise_RandomNoise(3),
            guider,
            KSamplerSelect.execute("euler").result[0],
            sigmas_of(model, 4),
            {"samples": torch.zeros(1, 16, 16, 16)},
            **more,
        ).result[0]["samples"]

    result = sampled(pack["TACAAttentionReport"], guider, words="")
    assert seen == [7] * 4
    assert torch.equal(result, sampled(SamplerCustomAdvanced, guider))
    assert not torch.equal(result, sampled(SamplerCustomAdvanced, plain))
    assert guider.model_options is own
    assert own["transformer_options"] == entries
    assert guider.model_patcher is patcher


# Settings that nodes make


@pytest.mark.parametrize("has_lora", [False, True])
def test_sweep_at_gamma_1(folder, apply_taca, pack, load_lora, has_lora):
    """With a LoRA gamma 1 is the LoRA alone, and the threshold is the LoRA's."""
    model = tiny.load(folder, "flux")
    if has_lora:
        model = load_lora(model, random_lora(model))
    models, labels, *_ = pack["TACASweep"].execute(model, "1, 1.2", "970, 400").result
    rest = ["gamma 1.2, t >= 970", "gamma 1.2, t >= 400"]
    if not has_lora:
        assert labels == ["gamma 1 (plain)", *rest]
        assert torch.equal(sample(models[0], "flux"), sample(model, "flux"))
        return
    assert labels == [f"gamma 1 (LoRA alone), t >= {t}" for t in (970, 400)] + rest
    pictures = [sample(m, "flux") for m in models]
    for i, threshold in enumerate((970.0, 400.0)):
        assert torch.equal(pictures[i], sample(apply_taca(model, 1.0, threshold), "flux"))
    assert not torch.equal(*pictures[:2])


# Devices, precision, threads


def mixed_call(model, kind):
    """One call whose rows are inside the window, outside, and inside, at t >= 900."""
    x, cond = tiny.latent(8, 8, batch=3), tiny.conditioning(kind, 9, batch=3)[0]
    extra = {"y": cond[1]["pooled_output"]}
    if kind == "flux":
        extra["guidance"] = torch.full((3,), 3.5)
    comfy.model_management.load_models_gpu([model])
    model.pre_run()
    try:
        return call(model, x, torch.tensor([0.95, 0.5, 0.99]), cond[0], extra)
    finally:
        model.cleanup()


@pytest.mark.parametrize("kind", KINDS)
def test_devices_that_cannot_copy_without_waiting(folder, apply_taca, load_lora, kind, monkeypatch):
    """Core knows them: gamma, and which rows are inside, are moved by its rule alone."""
    for path in TACA.glob("*.py"):
        assert not re.search(r"non_blocking\s*=|\.cuda\(", path.read_text()), path
    model = tiny.load(folder, kind)
    model = load_lora(apply_taca(model, 1.2, 900.0), random_lora(model))
    expected, moved = mixed_call(model, kind), set()
    cast = comfy.model_management.cast_to_device

    def watched(tensor, device, dtype, *args, **kwargs):
        if Path(sys._getframe(1).f_code.co_filename).parent == TACA:
            moved.add((tensor.dtype, dtype))
        return cast(tensor, device, dtype, *args, **kwargs)

    monkeypatch.setattr(comfy.model_management, "cast_to_device", watched)
    monkeypatch.setattr(
        comfy.model_management, "device_supports_non_blocking", lambda device: False
    )
    assert torch.equal(mixed_call(model, kind), expected)
    assert moved == {(torch.float32, torch.float32), (torch.bool, torch.bool)}


HUGE = {  # tensors that are finite in float16, and the outputs that they make are not
    "lora": {"lora_up.weight": (64, 2), "lora_down.weight": (2, tiny.HIDDEN)},
    "difference": {"diff": (64, tiny.HIDDEN)},
    "bias": {"diff_b": (64,)},
}


def huge_lora(kind):
    """For the last layer, whose outputs are added to no others."""
    key = "diffusion_model.final_layer.linear"
    return {f"{key}.{name}": torch.full(shape, 6e4) for name, shape in HUGE[kind].items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", HUGE)
def test_an_overflow_stays_inside_the_window_of_a_model(folder, apply_taca, load_lora, kind, what):
    """In one call with rows of both sides of it, on a float16 model: 0 times infinity is NaN."""
    model = tiny.load(folder, kind, dtype=torch.float16)
    model.set_model_compute_dtype(torch.float16)
    model = apply_taca(model, 1.0, 900.0)
    plain, ours = (mixed_call(m, kind) for m in (model, load_lora(model, huge_lora(what), 4.0)))
    assert plain.isfinite().all()
    assert not ours[::2].isfinite().any()
    assert torch.equal(ours[1], plain[1])


def test_no_call_is_lost_between_threads(caplog):
    """One thread a device, all of which note their calls in one run."""
    events, times = module("events").Events(), 4000
    ran = {acted: module("block").Trace(None, True, True, acted) for acted in (True, False)}
    start = threading.Barrier(8)
    events.begin_call([0], [0.0])

    def work():
        start.wait()
        for i in range(times):
            seen = [[ran[True]], [ran[False]], [module("block").Trace(None)]][i % 3]
            events.end_call(seen, 0.0, events.begin_call([0], [0.0]), torch.nn.Identity())

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(8)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    finally:
        sys.setswitchinterval(interval)
    kinds = events.acted, events.elsewhere, events.cached
    assert [len(kind) for kind in kinds] == [8 * len(range(i, times, 3)) for i in range(3)]


# Attention that is called without options


# Compilation that fails


def warnings_in(caplog):
    return caplog.text.count("cannot be compiled in one piece")


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
def test_an_error_of_inductor_runs_uncompiled(folder, apply_taca, caplog, whole):
    model, failed = load(folder, "flux", whole), []

    def backend(graph, inputs):
        if not failed:  # the first is with TACA
            failed.append(True)
            raise InductorError(RuntimeError("no C++ compiler"), None)
        return graph.forward

    settings = {"steps": 4, "text": (7, 7)}
    plain, ours = (sample(m, "flux", **settings) for m in (model, apply_taca(model)))
    result = sample(apply_taca(compiled(model, whole, backend)), "flux", **settings)
    torch.testing.assert_close(result, ours, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain, ours, atol=1e-2)
    assert failed
    assert warnings_in(caplog) == 1
    assert "no C++ compiler" in caplog.text
    assert counters["stats"]["unique_graphs"]  # of the steps outside
    assert not installed_on(model)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("whole", [True, False])
def test_a_kernel_is_traced_in_vain_once(folder, apply_taca, untraceable, caplog, kind, whole):
    """Not again at the next prompt; and wrappers inside ours run once a step, also then."""
    calls = []

    def count(executor, *args, **kwargs):
        calls.append(True)
        return executor(*args, **kwargs)

    model = load(folder, kind, whole)
    patched = inner_wrapper(apply_taca(compiled(model, whole)), count)
    settings = {"steps": 4, "text": (7, 7), "cfg": 1.0}
    expected = sample(apply_taca(model), kind, **settings)
    caplog.clear()
    frames = []
    for _ in range(3):
        result = sample(patched, kind, **settings)
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
        frames.append(counters["frames"]["total"])
    assert frames[0] > 0
    assert frames[1:] == frames[:1] * 2, "traced again"
    assert warnings_in(caplog) == 3, "each run says that it is slower"
    assert len(calls) == 3 * 4


# What it costs


def python_calls(model, kind, positive=None):
    """Python calls of the pack in one call of the model inside the window, not the run's first."""
    counts = []

    def record(apply_model, arguments):
        counts.append(Counter())

        def profile(frame, event, argument):
            if event == "call" and Path(frame.f_code.co_filename).parent == TACA:
                counts[-1][frame.f_code.co_name] += 1

        before = sys.getprofile()
        sys.setprofile(profile)
        try:
            return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])
        finally:
            sys.setprofile(before)

    model = model.clone()
    model.set_model_unet_function_wrapper(record)
    sample(model, kind, steps=3, cfg=1.0, positive=positive)
    assert counts[-1]
    return counts[-1]


@pytest.mark.parametrize(("kind", "count"), [("flux", 3), ("sd3", 1)])
def test_what_acting_in_a_block_costs(folder, apply_taca, pack, kind, count):
    """Against blocks that TACA Options leaves out, and that still show where their tokens are."""
    model, first = tiny.load(folder, kind), {"flux": "double 0", "sd3": "joint 1"}[kind]
    limited = (
        pack["TACAPatchModel"]
        .execute(model, 1.2, 0.0, None, pack["TACAOptions"].execute(False, first).result[0])
        .result[0]
    )
    counts = [python_calls(m, kind) for m in (apply_taca(model, 1.2, 0.0), limited)]
    added = counts[0].total() - counts[1].total()
    assert 0 < added <= 12 * count, (counts, added)


@pytest.mark.parametrize(
    ("kind", "blocks", "index", "limit"),
    [
        ("flux", "double_blocks", 1, 12),
        ("flux", "single_blocks", 1, 12),
        ("sd3", "joint_blocks", 1, 12),
        ("sd3", "joint_blocks", 0, 12),
    ],  # with attn2
)
def test_the_cost_of_a_block(folder, apply_taca, kind, blocks, index, limit):
    """All of it: a model with one block less shows it. A further attention adds two calls."""
    counts = []
    for less in (False, True):
        model = tiny.load(folder, kind)
        if less:
            del getattr(model.model.diffusion_model, blocks)[index]
        counts.append(python_calls(apply_taca(model, 1.2, 0.0), kind))
    of_block = counts[0] - counts[1]
    assert 4 <= of_block.total() <= limit, dict(of_block)


WORDS = {
    "positive": {"weights": [1.0, 1.5, *[1.0] * 5]},
    "negative": {"weights": [1.0, -1.0, *[1.0] * 5]},
    "mirrored": {"weights": [1.0, -1.0, *[1.0] * 5], "about_mean": True},
    "avoided": {"weights": [*[1.0] * 5, -1.5, -1.5], "num_avoided": 2},
}


@pytest.mark.parametrize(
    ("kind", "blocks", "index", "limit"),
    [
        ("flux", "double_blocks", 1, 12),
        ("flux", "single_blocks", 1, 12),
        ("sd3", "joint_blocks", 1, 12),
        ("sd3", "joint_blocks", 0, 13),  # with attn2
    ],
)
@pytest.mark.parametrize("words", WORDS)
def test_the_cost_of_words_in_a_block(folder, apply_taca, kind, blocks, index, limit, words):
    """All of it, with gamma: what words add to logits is made once for all blocks of a call."""
    counts = []
    for less in (False, True):
        model = tiny.load(folder, kind)
        if less:
            del getattr(model.model.diffusion_model, blocks)[index]
        positive = weighed(tiny.conditioning(kind, 7), **WORDS[words])
        counts.append(python_calls(apply_taca(model, 1.2, 0.0), kind, positive))
    of_block = counts[0] - counts[1]
    assert 4 <= of_block.total() <= limit, dict(of_block)


@pytest.mark.parametrize("kind", KINDS)
def test_the_cost_of_a_lora_layer(folder, apply_taca, load_lora, kind):
    model = tiny.load(folder, kind)
    state = random_lora(model, only="blocks")
    layers = sum(name.endswith("lora_up.weight") for name in state)
    plain = apply_taca(model, 1.2, 0.0)
    counts = [python_calls(m, kind) for m in (load_lora(plain, state), plain)]
    added = counts[0] - counts[1]
    assert layers >= 10
    assert 2 * layers <= added.total() <= 4 * layers, dict(added)
