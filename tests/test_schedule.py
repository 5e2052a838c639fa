"""Eq. 11 and its window."""

import math
import sys

import comfy.model_sampling
import pytest
import torch
from comfy.samplers import calculate_sigmas
from hypothesis import given
from hypothesis import strategies as st

schedule = sys.modules["taca_pack.taca.schedule"]
timestep = sys.modules["taca_pack.taca.patch"].timestep
Schedule, TimestepWindow = schedule.Schedule, schedule.TimestepWindow


@given(
    gamma=st.floats(0, 10),
    threshold=st.floats(0, 1000, width=32),
    t=st.lists(st.floats(0, 1000, width=32), min_size=1, max_size=5),
)
def test_gamma_inside_one_outside(gamma, threshold, t):
    result = Schedule(gamma, TimestepWindow(threshold)).gamma_at(torch.tensor(t))
    assert result.dtype == torch.float32
    for value, at in zip(result.tolist(), t, strict=True):
        if at >= threshold:
            assert value == pytest.approx(gamma, rel=1e-6)
        elif at < threshold * (1 - 1e-6):
            assert value == 1


@given(thousandths=st.integers(1, 1000))
def test_a_step_on_the_threshold_is_inside(thousandths):
    """sigma = threshold / 1000, rounded as a sampler rounds it, is inside; the next is not."""
    sigma = torch.tensor([thousandths, thousandths - 1], dtype=torch.float32) / 1000
    inside = TimestepWindow(float(thousandths)).contains(sigma * 1000)
    assert inside.tolist() == [True, False]


def sampling(kind):
    base = {"flux": comfy.model_sampling.ModelSamplingFlux,
            "sd3": comfy.model_sampling.ModelSamplingDiscreteFlow}[kind]  # fmt: skip
    made = type("Sampling", (base, comfy.model_sampling.CONST), {})()
    made.set_parameters(shift=1.15 if kind == "flux" else 3.0)
    return made


@pytest.mark.parametrize("kind", ["flux", "sd3"])
@pytest.mark.parametrize(
    ("steps", "at_970"), [(20, 2), (25, 3), (28, 3), (30, 3), (40, 4), (50, 5)]
)
def test_steps_of_the_papers_window(kind, steps, at_970):
    """The paper's t >= 970 is the authors' first 3 of 30 steps, through core's own scheduler."""
    model_sampling = sampling(kind)
    sigmas = calculate_sigmas(model_sampling, "simple", steps)
    gamma = Schedule().gamma_at(timestep(model_sampling, sigmas[:-1]))
    assert int((gamma != 1).sum()) == at_970


def test_time_is_1000_sigma_for_flow_models_whatever_their_own_unit():
    model_sampling = sampling("sd3")
    model_sampling.set_parameters(shift=3.0, multiplier=1.0)  # as AuraFlow and schnell have it
    sigma = torch.tensor([0.25, 1.0])
    assert timestep(model_sampling, sigma).tolist() == [250.0, 1000.0]


def test_time_of_other_models_is_their_own():
    model_sampling = type(
        "Sampling", (comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS), {}
    )()
    assert timestep(model_sampling, model_sampling.sigmas[[0, 999]]).tolist() == [0, 999]


@pytest.mark.parametrize("gamma", [math.nan, math.inf, -math.inf, -0.1])
def test_bad_gamma_is_refused(gamma):
    with pytest.raises(ValueError, match="gamma must be a finite number"):
        Schedule(gamma)


@pytest.mark.parametrize("threshold", [math.nan, -1, 1001, math.inf])
def test_bad_threshold_is_refused(threshold):
    with pytest.raises(ValueError, match="between 0 and 1000"):
        TimestepWindow(threshold)
