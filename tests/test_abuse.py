"""Odd inputs, and runs that stop at any moment: a right result, or an error a user can act on.

``TACA_FUZZ=10000`` sets how many inputs are tried (300 otherwise); a twentieth of them are sampled,
and a twentieth as many runs are interrupted.
"""

import math
import os
import random

import comfy.model_management
import comfy.samplers
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from reference import dense_override
from test_lora import random_lora, replaced
from test_model import KINDS, sample

CASES = int(os.environ.get("TACA_FUZZ", "300"))
SAMPLED = max(15, CASES // 20)

ANY = st.floats() | st.floats(0, 10) | st.sampled_from([0.0, 1.0, 1.2, -1.0, math.nan, math.inf])
WINDOW = st.one_of(
    st.fixed_dictionaries(
        {"window": st.just("timestep"), "timestep_threshold": ANY | st.floats(0, 1000)},
        optional={"shape": st.sampled_from(["step", "linear", "cosine", "round", ""])},
    ),
    st.fixed_dictionaries(
        {"window": st.just("percent"), "start_percent": ANY | st.floats(0, 1),
         "end_percent": ANY | st.floats(0, 1)},
        optional={"shape": st.sampled_from(["step", "linear", "cosine"])},
    ),
    st.fixed_dictionaries(
        {"window": st.just("first steps"), "steps": st.integers(-3, 12)},
        optional={"shape": st.sampled_from(["step", "linear", "cosine"])},
    ),
)  # fmt: skip
BLOCKS = st.text(max_size=20) | st.from_regex(
    r"(double|single|joint) [0-3](-[0-3])?(, (double|single|joint) [0-3])?", fullmatch=True
)
GOOD_GAMMA = st.floats(0, 3)
GOOD_WINDOW = st.one_of(
    st.fixed_dictionaries(
        {"window": st.just("timestep"), "timestep_threshold": st.floats(0, 1000),
         "shape": st.sampled_from(["step", "linear", "cosine"])}
    ),
    st.builds(
        lambda a, b, shape: {"window": "percent", "start_percent": min(a, b),
                             "end_percent": max(a, b), "shape": shape},
        st.floats(0, 1), st.floats(0, 1), st.sampled_from(["step", "linear", "cosine"]),
    ),
    st.fixed_dictionaries(
        {"window": st.just("first steps"), "steps": st.integers(1, 5),
         "shape": st.sampled_from(["step", "linear", "cosine"])}
    ),
)  # fmt: skip


def many(count):
    return settings(max_examples=count, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny.load(folder, kind) for kind in KINDS}


@seed(1)
@many(CASES)
@given(kind=st.sampled_from(KINDS), gamma=ANY, window=WINDOW, positive=st.booleans(), blocks=BLOCKS,
       gammas=st.text(max_size=12))  # fmt: skip
def test_any_input(pack, models, kind, gamma, window, positive, blocks, gammas):
    """Through the nodes: a patched model, or an error that begins with what is wrong."""
    model = models[kind]
    try:
        schedule = pack["TACASchedule"].execute(gamma, dict(window)).result[0]
        options = pack["TACAOptions"].execute(positive, blocks).result[0]
        patched = pack["TACAPatchModel"].execute(model, 1.2, 970.0, schedule, options).result[0]
        sigmas = comfy.samplers.calculate_sigmas(
            model.get_model_object("model_sampling"), "simple", 4
        )
        pack["TACASchedulePreview"].execute(sigmas, patched)
        pack["TACASweep"].execute(model, gammas, "970")
    except ValueError as error:
        assert "TACA" in str(error)  # noqa: PT017
        assert len(str(error)) > 30  # noqa: PT017
    assert not replaced(model)


@pytest.mark.parametrize("window", [None, {}, {"window": None}, {"window": "soon"}])
def test_a_schedule_without_a_window(pack, window):
    """ComfyUI lets a workflow through that has none."""
    with pytest.raises(ValueError, match="TACA Schedule has no window: choose one of timestep"):
        pack["TACASchedule"].execute(1.2, window)


def gamma_at(window, gamma, sigma, sigmas, sampling):
    """gamma of a step, from the words of the window and not from the pack."""
    t, high = 1000 * sigma, 1000.0
    if window["window"] == "timestep":
        low = window["timestep_threshold"]
    elif window["window"] == "percent":
        high, low = (1000 * sampling.percent_to_sigma(window[p])
                     for p in ("start_percent", "end_percent"))  # fmt: skip
    else:
        n = window["steps"]
        high, low = 1000 * sigmas[0], 1000 * sigmas[n] + 5e-3 if n < len(sigmas) - 1 else 0.0
    if not low - 1e-3 <= t <= high + 1e-3:
        return 1.0
    x = min(max((high - t) / max(high - low, 1e-9), 0.0), 1.0)
    share = {"step": 1.0, "linear": 1 - x, "cosine": (1 + math.cos(math.pi * x)) / 2}
    return 1 + (gamma - 1) * share[window["shape"]]


@seed(2)
@many(SAMPLED)
@given(kind=st.sampled_from(KINDS), gamma=GOOD_GAMMA, window=GOOD_WINDOW, text=st.integers(1, 30),
       steps=st.integers(1, 4), size=st.sampled_from([(8, 8), (6, 10), (7, 9)]))  # fmt: skip
def test_any_setting_sampled(pack, models, kind, gamma, window, text, steps, size):
    """The run is the dense one with the gamma that the window's words give each step."""
    model = models[kind]
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", steps).tolist()
    tokens = text + math.ceil(size[0] / 2) * math.ceil(size[1] / 2)
    gammas = [gamma_at(window, gamma, s, sigmas, sampling) for s in sigmas[:-1]]

    def override(func, q, k, v, heads, transformer_options=None, **kwargs):
        step = min(range(steps), key=lambda i: abs(sigmas[i] - transformer_options["sigmas"][0]))
        inner = dense_override(gammas[step], text, tokens)
        return inner(func, q, k, v, heads, **kwargs).to(q.dtype)

    dense = model.clone()
    dense.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = (
        override
    )
    schedule = pack["TACASchedule"].execute(gamma, dict(window)).result[0]
    patched = pack["TACAPatchModel"].execute(model, 1.2, 970.0, schedule).result[0]
    run = {"steps": steps, "cfg": 1.0, "size": size, "positive": tiny.conditioning(kind, text)}
    ours, expected = sample(patched, kind, **run), sample(dense, kind, **run)
    assert (ours - expected).norm() < 5e-3 * expected.norm()
    assert not replaced(model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "error",
    [comfy.model_management.InterruptProcessingException, comfy.model_management.OOM_EXCEPTION,
     KeyboardInterrupt],
)  # fmt: skip
def test_stopped_at_any_moment(pack, models, kind, error):
    """In any attention of any step, with TACA, its LoRA or the report: the plain model's bits."""
    model = models[kind]
    fails = model.clone()
    plain = sample(model, kind, steps=3)
    countdown = [0]

    def failing(func, q, k, v, heads, **kwargs):
        countdown[0] -= 1
        if countdown[0] == 0:
            raise error("stopped") if error is not KeyboardInterrupt else error
        return func(q, k, v, heads, **kwargs)

    fails.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = (
        failing
    )
    taca = pack["TACAPatchModel"].execute(fails, 1.2, 900.0).result[0]
    lora = pack["LoadTACALoRA"]
    fit, patch = lora.execute.__globals__["fit_lora"], lora.execute.__globals__["patch_lora"]
    both = patch(taca, fit(random_lora(model, "full"), model.model, "lora", 1.0))
    chance = random.Random(0)  # noqa: S311
    for _ in range(max(10, SAMPLED // 6)):
        countdown[0] = chance.randint(1, 20)
        with pytest.raises(error):
            sample(chance.choice([taca, both]), kind, steps=3)
        assert not replaced(model)
    assert torch.equal(sample(model, kind, steps=3), plain)
    comfy.model_management.unload_all_models()
    assert torch.equal(sample(model, kind, steps=3), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_file_cut_anywhere(tmp_path, pack, models, kind):
    """Cut at any place, or with any byte changed, is an error or a LoRA."""
    from safetensors.torch import save_file

    read = pack["LoadTACALoRA"].execute.__globals__["read_lora"]
    fit = pack["LoadTACALoRA"].execute.__globals__["fit_lora"]
    path = tmp_path / "lora.safetensors"
    save_file(random_lora(models[kind], only="blocks.0"), path)
    data = path.read_bytes()
    chance = random.Random(1)  # noqa: S311
    for _ in range(max(30, SAMPLED)):
        broken = bytearray(data)
        if chance.random() < 0.5:
            broken = broken[: chance.randrange(len(data))]
        else:
            broken[chance.randrange(min(2000, len(data)))] = chance.randrange(256)
        path.write_bytes(broken)
        try:
            fit(read(str(path)), models[kind].model, path.name, 1.0)
        except ValueError as error:
            assert "lora.safetensors" in str(error)  # noqa: PT017
    assert not replaced(models[kind])
