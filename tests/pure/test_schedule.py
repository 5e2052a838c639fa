"""Eq. 11 and its window."""

import math
import sys

import comfy.latent_formats
import comfy.model_sampling
import pytest
import torch
from comfy.k_diffusion.sampling import offset_first_sigma_for_snr
from comfy.model_sampling import V_PREDICTION
from comfy.samplers import calculate_sigmas
from comfy_extras.nodes_custom_sampler import FlipSigmas
from hypothesis import given
from hypothesis import strategies as st

from support.versions import needs_curves

schedule = sys.modules["taca_pack.taca.schedule"]
timesteps = sys.modules["taca_pack.taca.timesteps"]
timesteps_tensor = timesteps.timesteps_tensor
Schedule, TimestepWindow = schedule.Schedule, schedule.TimestepWindow
resolve = sys.modules["taca_pack.taca.timesteps"].resolve
try:
    from comfy_api.input import CurveInput
except ImportError:  # ComfyUI before 0.20.1
    CurveInput = None


@given(
    gamma=st.floats(0, 10),
    threshold=st.floats(0, 1000, width=32),
    t=st.lists(st.floats(0, 1000, width=32), min_size=1, max_size=5),
)
def test_gamma_inside_one_outside(gamma, threshold, t):
    result = resolve(Schedule(gamma, TimestepWindow(threshold)), sampling("sd3")).gamma_at(
        torch.tensor(t)
    )
    assert result.dtype == torch.float32
    for value, at in zip(result.tolist(), t, strict=True):
        if at >= threshold:
            assert value == torch.tensor(gamma).item()
        elif at < threshold * (1 - 1e-6):
            assert value == 1


@given(thousandths=st.integers(1, 1000))
def test_a_step_on_the_threshold_is_inside(thousandths):
    """sigma = threshold / 1000, rounded as a sampler rounds it, is inside; the next is not."""
    sigma = torch.tensor([thousandths, thousandths - 1], dtype=torch.float32) / 1000
    inside = resolve(Schedule(1.2, TimestepWindow(float(thousandths))), sampling("sd3")).contains(
        sigma * 1000
    )
    assert inside.tolist() == [True, False]


def sampling(kind, prediction=comfy.model_sampling.CONST):
    if kind == "discrete":  # as U-ViT and CogVideoX
        base, prediction = comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS
        return type("Sampling", (base, prediction), {})()
    base = {
        "flux": comfy.model_sampling.ModelSamplingFlux,
        "sd3": comfy.model_sampling.ModelSamplingDiscreteFlow,
    }[kind]
    made = type("Sampling", (base, prediction), {})()
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
    gamma = resolve(Schedule(), model_sampling).gamma_at(
        timesteps_tensor(model_sampling, sigmas[:-1])
    )
    assert int((gamma != 1).sum()) == at_970


def test_time_is_1000_sigma_for_flow_models_whatever_their_own_unit():
    model_sampling = sampling("sd3")
    model_sampling.set_parameters(shift=3.0, multiplier=1.0)  # as AuraFlow and schnell have it
    sigma = torch.tensor([0.25, 1.0])
    assert timesteps_tensor(model_sampling, sigma).tolist() == [250.0, 1000.0]


def test_time_of_other_models_is_their_own():
    model_sampling = type(
        "Sampling", (comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS), {}
    )()
    assert timesteps_tensor(model_sampling, model_sampling.sigmas[[0, 999]]).tolist() == [0, 999]


@pytest.mark.parametrize("gamma", [math.nan, math.inf, -math.inf, -0.1])
def test_bad_gamma_is_refused(gamma):
    with pytest.raises(ValueError, match="gamma must be a finite number"):
        Schedule(gamma)


@pytest.mark.parametrize("threshold", [math.nan, -1, 1001, math.inf])
def test_bad_threshold_is_refused(threshold):
    with pytest.raises(ValueError, match="between 0 and 1000"):
        TimestepWindow(threshold)


@pytest.mark.parametrize("kind", ["flux", "sd3"])
@pytest.mark.parametrize("shape", ["step", "linear", "cosine"])
def test_percent_is_comfyuis(kind, shape):
    """The steps between core's own sigmas of the two percentages, and gamma falling over them."""
    model_sampling = sampling(kind)
    sigmas = calculate_sigmas(model_sampling, "simple", 40)[:-1]
    plan = resolve(Schedule(1.4, schedule.PercentWindow(0.1, 0.5, shape)), model_sampling)
    t = timesteps_tensor(model_sampling, sigmas)
    high, low = (model_sampling.percent_to_sigma(p) for p in (0.1, 0.5))
    inside = (sigmas <= high) & (sigmas >= low)
    assert plan.contains(t).equal(inside)
    gamma = plan.gamma_at(t)
    assert (gamma[~inside] == 1).all()
    x = (high - sigmas[inside]) / (high - low)
    share = {"step": 1 + 0 * x, "linear": 1 - x, "cosine": (1 + (math.pi * x).cos()) / 2}[shape]
    torch.testing.assert_close(gamma[inside], 1 + 0.4 * share, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["flux", "sd3", "discrete"])
@pytest.mark.parametrize("scheduler", ["simple", "normal", "beta"])
def test_percent_is_comfyuis_to_the_last_place(kind, scheduler):
    """Bounds of which most lie between two steps, and some on one: core's rule."""
    model_sampling = sampling(kind)
    sigmas = calculate_sigmas(model_sampling, scheduler, 28)[:-1]
    t = timesteps_tensor(model_sampling, sigmas)
    wrong = []
    for percent in (i / 1000 for i in range(5, 1001, 5)):
        bound = model_sampling.percent_to_sigma(percent)
        for window, inside in (
            ((percent, 1.0), sigmas <= bound),
            ((0.0, percent), sigmas >= bound),
        ):
            plan = resolve(Schedule(1.2, schedule.PercentWindow(*window)), model_sampling, sigmas)
            wrong += [window] if not plan.contains(t).equal(inside) else []
    assert not wrong


def test_a_percent_window_after_the_first_step():
    model_sampling = sampling("flux")
    plan = resolve(Schedule(1.2, schedule.PercentWindow(0.001, 0.003)), model_sampling)
    assert not plan.contains(timesteps_tensor(model_sampling, torch.ones(1))).any()


@pytest.mark.parametrize("kind", ["flux", "sd3", "discrete"])
@pytest.mark.parametrize("shape", ["step", "linear"])
@pytest.mark.parametrize(("window", "bounds"), [("timestep", (1000.0,)), ("percent", (0.0, 0.0))])
def test_pure_noise_is_what_a_sampler_begins_with(kind, shape, window, bounds):
    """Several of core's samplers call the model at t = 999.97 first, for a finite logarithm."""
    model_sampling = sampling(kind)
    sigmas = calculate_sigmas(model_sampling, "simple", 20)
    called = offset_first_sigma_for_snr(sigmas, model_sampling)
    plan = resolve(Schedule(1.4, schedule.WINDOWS[window](*bounds, shape)), model_sampling, sigmas)
    for each in (sigmas, called):
        t = timesteps_tensor(model_sampling, each[:2])
        assert plan.contains(t).tolist() == [True, False]
        assert plan.gamma_at(t).tolist() == [torch.tensor(1.4).item(), 1.0]


@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_flow_is_told_by_its_noise(kind):
    """Unsampling packs give a model a flow sampling that is not core's CONST."""

    class Inverse:
        """Predicts the other way."""

    sigmas = torch.tensor([1.0, 0.97, 0.5])
    assert timesteps_tensor(sampling(kind, Inverse), sigmas).tolist() == pytest.approx(
        [1000, 970, 500]
    )


@given(
    steps=st.integers(1, 30),
    first=st.integers(1, 35),
    kind=st.sampled_from(["flux", "sd3", "discrete"]),
    scheduler=st.sampled_from(["simple", "karras"]),
)
def test_first_steps_of_a_run_from_picture_to_noise(steps, first, kind, scheduler):
    """As core's FlipSigmas makes it, for unsampling."""
    model_sampling = sampling(kind)
    sigmas = FlipSigmas.execute(calculate_sigmas(model_sampling, scheduler, steps)).result[0]
    plan = resolve(Schedule(1.2, schedule.FirstStepsWindow(first)), model_sampling, sigmas)
    for i in range(steps):
        calls = torch.stack([sigmas[i], (sigmas[i] + sigmas[i + 1]) / 2])
        assert plan.contains(timesteps_tensor(model_sampling, calls)).tolist() == [i < first] * 2


@pytest.mark.parametrize("flip", [False, True])
def test_gamma_falls_in_the_order_of_the_run(flip):
    model_sampling = sampling("flux")
    sigmas = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.125])
    sigmas = sigmas.flip(0) if flip else sigmas
    plan = resolve(Schedule(1.4, schedule.FirstStepsWindow(2, "linear")), model_sampling, sigmas)
    gamma = plan.gamma_at(timesteps_tensor(model_sampling, sigmas)).tolist()
    halfway = 1.4 - 0.4 * float((sigmas[1] - sigmas[0]) / (sigmas[2] - sigmas[0]))
    assert gamma == pytest.approx([1.4, halfway, 1, 1, 1], abs=1e-5)


@given(steps=st.integers(1, 30), first=st.integers(1, 35), kind=st.sampled_from(["flux", "sd3"]))
def test_first_steps_are_the_authors(steps, first, kind):
    """Every call above the noise of the following step is inside: several calls a step too."""
    model_sampling = sampling(kind)
    sigmas = calculate_sigmas(model_sampling, "simple", steps)
    plan = resolve(Schedule(1.2, schedule.FirstStepsWindow(first)), model_sampling, sigmas)
    for i in range(steps):
        calls = torch.stack([sigmas[i], (sigmas[i] + sigmas[i + 1]) / 2])
        assert plan.contains(timesteps_tensor(model_sampling, calls)).tolist() == [i < first] * 2


@pytest.mark.parametrize(
    ("sigmas", "first", "inside"),
    [
        ([1, 1, 0.8, 0.5, 0], 1, 2),
        ([1, 0.8, 0.8, 0.8, 0.5, 0], 2, 4),
        ([0, 0, 0.3, 0.6, 1], 1, 2),
        ([0, 0.3, 0.3, 0.6, 1], 2, 3),
        ([0.5, 0.5, 0.5], 1, 2),
        ([1, 0.8, 0.6, 0.9, 0.5, 0], 3, 4),  # a restart
        ([1, 0.8, 1, 0.5, 0], 2, 3),
    ],
)
def test_first_steps_of_sigmas_that_come_again(sigmas, first, inside):
    """All of the first steps, and of the later ones those that have as much noise."""
    model_sampling, sigmas = sampling("flux"), torch.tensor(sigmas, dtype=torch.float32)
    plan = resolve(Schedule(1.2, schedule.FirstStepsWindow(first)), model_sampling, sigmas)
    steps = plan.contains(timesteps_tensor(model_sampling, sigmas[:-1])).tolist()
    assert steps == [i < inside for i in range(len(steps))]


def test_first_steps_hold_no_step_that_is_almost_at_pure_noise():
    """Steps so close together that a sampler's first call is allowed to lie as low."""
    zsnr = type("Sampling", (comfy.model_sampling.ModelSamplingDiscrete, V_PREDICTION), {})
    for model_sampling, sigmas in (
        (zsnr(zsnr=True), [4518.76, 4405.79, 10.0, 0.0]),  # of core's linear_quadratic
        (sampling("flux"), [1.2, 1.0, 0.8, 0.0]),
    ):
        sigmas = torch.tensor(sigmas)
        plan = resolve(Schedule(1.2, schedule.FirstStepsWindow(1)), model_sampling, sigmas)
        inside = plan.contains(timesteps_tensor(model_sampling, sigmas[:-1])).tolist()
        assert inside == [True, False, False]


def test_threshold_0_is_every_step():
    """Also from a picture without noise, below a discrete model's smallest sigma."""
    model_sampling, sigmas = sampling("discrete"), torch.tensor([0.0, 0.02, 5.0, 14.6])
    plan = resolve(Schedule(1.2, TimestepWindow(0.0)), model_sampling, sigmas)
    assert plan.contains(timesteps_tensor(model_sampling, sigmas)).all()


class FlowOfAnotherPack(comfy.model_sampling.CONST, torch.nn.Module):
    """What core's schedulers and samplers ask for, and no percent_to_sigma."""

    def __init__(self):
        super().__init__()
        self.register_buffer("sigmas", torch.linspace(0.001, 1, 1000))

    sigma_min = property(lambda self: self.sigmas[0])
    sigma_max = property(lambda self: self.sigmas[-1])


@pytest.mark.parametrize(
    ("window", "inside"),
    [
        (TimestepWindow(800.0), 3),
        (schedule.PercentWindow(0.0, 0.3), 4),
        (schedule.FirstStepsWindow(2), 2),
        (schedule.FittedWindow(), 1),
    ],
    ids=str,
)
def test_a_sampling_without_percents(window, inside):
    """Its percent is the share of its sigmas."""
    model_sampling, sigmas = FlowOfAnotherPack(), torch.linspace(1, 0, 11)
    plan = resolve(Schedule(1.2, window), model_sampling, sigmas, 4096.0)
    acted = plan.contains(timesteps_tensor(model_sampling, sigmas[:-1])).tolist()
    assert acted == [i < inside for i in range(10)]


def test_the_curve_of_the_widget():
    """Where a workflow brings none: all of gamma in the first 5 %, then falling to 20 %."""
    model_sampling = sampling("flux")
    plan = resolve(Schedule(2.0, schedule.CurveWindow()), model_sampling)
    sigmas = [model_sampling.percent_to_sigma(p) for p in (0.02, 0.125, 0.25)]
    gamma = plan.gamma_at(timesteps_tensor(model_sampling, torch.tensor(sigmas))).tolist()
    assert gamma == pytest.approx([2.0, 1.5, 1.0], abs=2e-3)


def test_first_steps_need_a_run():
    """Training has none, nor has a call of the model by a node."""
    with pytest.raises(ValueError, match="training has none, nor has a node that calls the model"):
        resolve(Schedule(1.2, schedule.FirstStepsWindow(3)), sampling("flux"))


@needs_curves
@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_a_drawn_curve(kind):
    curve = CurveInput.from_raw(
        {"points": [[0, 1], [0.2, 0.5], [0.4, 0], [1, 0]], "interpolation": "linear"}
    )
    model_sampling = sampling(kind)
    plan = resolve(Schedule(1.4, schedule.CurveWindow(curve)), model_sampling)
    for percent in (0.0, 0.05, 0.1, 0.2, 0.25, 0.3, 0.39, 0.41, 0.5, 0.9):
        t = timesteps_tensor(
            model_sampling, torch.tensor([model_sampling.percent_to_sigma(percent)])
        )
        expected = 1 + 0.4 * curve.interp(percent)
        assert plan.gamma_at(t.float()).item() == pytest.approx(expected, abs=2e-3)
        assert bool(plan.contains(t.float())) == (percent < 0.4)


@needs_curves
@pytest.mark.parametrize(("low", "high", "says"), [(0, 0, "0 throughout"), (0, 1.5, "between 0")])
def test_a_bad_curve_is_refused(low, high, says):
    curve = CurveInput.from_raw([[0, high], [1, low]])
    with pytest.raises(ValueError, match=says):
        resolve(Schedule(1.2, schedule.CurveWindow(curve)), sampling("flux"))


@pytest.mark.parametrize(
    ("window", "values", "says"),
    [
        ("TimestepWindow", (1001.0,), "between 0 and 1000"),
        ("TimestepWindow", (900.0, "round"), "step, linear, cosine"),
        ("PercentWindow", (0.5, 0.2), "swap them"),
        ("PercentWindow", (-0.1, 0.2), "start_percent"),
        ("PercentWindow", (0.1, float("nan")), "end_percent"),
        ("FirstStepsWindow", (0,), "between 1 and 10000"),
    ],
)
def test_bad_windows_are_refused(window, values, says):
    with pytest.raises(ValueError, match=says):
        getattr(schedule, window)(*values)


# --- the paper's window for any size --------------------------------------------------------------


@pytest.mark.parametrize(
    ("latent_format", "shape", "expected"),
    [
        ("Flux", (1, 16, 128, 128), 970.0),  # 1024 x 1024, the paper's
        ("Flux", (2, 16, 64, 64), 941.748),
        ("SD3", (1, 16, 256, 256), 984.772),
        ("SD3", (1, 16, 96, 160), 969.047),  # 768 x 1280
        ("Flux2", (1, 128, 64, 64), 970.0),  # 16 pixels a latent
        ("Wan21", (1, 16, 5, 64, 64), 941.748),  # of a film each frame
    ],
)
def test_as_much_of_a_picture_is_hidden(latent_format, shape, expected):
    """Sigma over 1 - sigma goes as the root of the picture's tokens; 16 pixels a side each."""
    number = timesteps.size_in_tokens(getattr(comfy.latent_formats, latent_format)(), shape)
    window = schedule.FittedWindow()
    sigmas = torch.linspace(1, 0, 2001)
    inside = resolve(Schedule(1.2, window), sampling("sd3"), sigmas, number).contains(1000 * sigmas)
    assert abs(float(1000 * sigmas[inside].min()) - expected) < 0.5
    assert abs(window.threshold(number) - expected) < 1e-3


@pytest.mark.parametrize("begin", [1.0, 0.9, 0.4])
def test_never_less_than_one_step(begin):
    """A run that begins late, as image to image does, has its first step inside."""
    sigmas = torch.tensor([begin, begin - 0.2, 0.0])
    plan = resolve(Schedule(1.2, schedule.FittedWindow()), sampling("sd3"), sigmas, 4096.0)
    assert plan.contains(1000 * sigmas).tolist() == [True, False, False]


def test_never_less_than_one_step_of_unsampling():
    """The end of the last step is no step."""
    sigmas = torch.tensor([0, 0.3, 0.6, 0.8, 1.0])
    plan = resolve(Schedule(1.2, schedule.FittedWindow()), sampling("flux"), sigmas, 4096.0)
    t = timesteps_tensor(sampling("flux"), sigmas[:-1])
    assert plan.contains(t).tolist() == [False, False, False, True]


def test_without_a_run_no_size_is_known():
    with pytest.raises(ValueError, match="training has none"):
        resolve(Schedule(1.2, schedule.FittedWindow()), sampling("sd3"))
