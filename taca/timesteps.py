"""The paper's time: t in 0..1000, where 1000 is pure noise."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from comfy.latent_formats import LatentFormat
from comfy.model_patcher import ModelPatcher
from comfy.model_sampling import ModelSamplingDiscreteFlow as ModelSampling
from torch import Tensor

from .schedule import ROUNDING, ResolvedSchedule, Sampling, Schedule

FIRST_PERCENT = 1e-4
"""Where several of core's samplers begin instead of at pure noise, whose logarithm is infinite."""


def timesteps(model_sampling: ModelSampling, sigma: Tensor) -> list[float]:
    """The t of each sigma ``(b,)``: one read, and no operation on the device.

    Computed in float64, so that t has the order of core's sigmas to the last place. A flow model's
    sigma is its share of noise, whatever unit of time the model itself takes. For any other model t
    is the position among its sigmas, from 0 to 999; below the smallest sigma it is negative.
    """
    values = np.asarray(sigma.tolist(), np.float32).astype(np.float64)
    if percent_to_sigma_of(model_sampling)(0.0) <= 1:
        return (1000.0 * values).tolist()
    known = model_sampling.sigmas.cpu().double().log()
    known = torch.cat([known[:1] - 20, known])
    places = [-1.0, *np.linspace(0, 999, len(known) - 1)]
    with np.errstate(divide="ignore"):
        return np.interp(np.log(values), known.numpy(), places).tolist()


def timesteps_tensor(model_sampling: ModelSampling, sigma: Tensor) -> Tensor:
    """``timesteps`` as a float64 tensor ``(b,)`` on the CPU."""
    return torch.tensor(timesteps(model_sampling, sigma), dtype=torch.float64)


def size_in_tokens(latent_format: LatentFormat, shape: Sequence[int]) -> float:
    """The size of latents ``(b, c, ..., height, width)``, in tokens of 16 x 16 pixels."""
    return math.prod(shape[-2:]) * (latent_format.spacial_downscale_ratio / 16) ** 2


def resolve(
    schedule: Schedule,
    model_sampling: ModelSampling,
    sigmas: Tensor | None = None,
    num_image: float | None = None,
) -> ResolvedSchedule:
    """A schedule's gamma(t) for a model's sampling and, in a run, its sigmas.

    ``num_image`` is the size of the run's pictures, as from ``size_in_tokens``.

    Raises ValueError if the window depends on a run and there is none.
    """
    to_sigma = percent_to_sigma_of(model_sampling)

    def percent_to_t(percent: float) -> float:
        return float(timesteps_tensor(model_sampling, torch.tensor(float(to_sigma(percent)))))

    steps = None if sigmas is None else timesteps_tensor(model_sampling, sigmas)
    low, high, share = schedule.window.bounds(Sampling(percent_to_t, steps, num_image))
    if steps is not None and not schedule.window.counts_steps:
        low = min(low, percent_to_t(FIRST_PERCENT) * (1 - ROUNDING))
    return ResolvedSchedule(schedule.gamma, low, high, share)


def resolver(
    patcher: ModelPatcher, sigmas: Tensor | None, shape: Sequence[int]
) -> Callable[[Schedule], ResolvedSchedule]:
    """``resolve`` for a run of a model over these sigmas, from latents of this shape."""
    sampling = patcher.get_model_object("model_sampling")
    size = size_in_tokens(patcher.model.latent_format, shape)
    return partial(resolve, model_sampling=sampling, sigmas=sigmas, num_image=size)


def percent_to_sigma_of(model_sampling: ModelSampling) -> Callable[[float], float]:
    """ComfyUI's percent of the sampling, 0..1, to sigma.

    TACA Training Window replaces percent_to_sigma, and keeps the original here. Another pack's
    sampling may have none, as few nodes ask for it: then it is the share of the model's sigmas.
    """

    def of_sigmas(percent: float) -> float:
        known = [0.0, *model_sampling.sigmas.tolist()]
        return float(np.interp((1 - percent) * (len(known) - 1), range(len(known)), known))

    own = getattr(model_sampling, "percent_to_sigma", of_sigmas)
    return getattr(model_sampling, "taca_percent_to_sigma", own)
