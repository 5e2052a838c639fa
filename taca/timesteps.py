"""The paper's time: t in 0..1000, where 1000 is pure noise."""

import comfy.model_sampling
import torch
from comfy.model_sampling import ModelSamplingDiscreteFlow as ModelSampling
from torch import Tensor

from .schedule import ResolvedSchedule, Schedule


def timestep(model_sampling: ModelSampling, sigma: Tensor) -> Tensor:
    """The t of each sigma, in sigma's shape.

    A flow model's sigma is its share of noise, whatever unit of time the model itself is given.
    """
    if isinstance(model_sampling, comfy.model_sampling.CONST):
        return sigma * 1000.0
    return model_sampling.timestep(sigma)


def timesteps(model_sampling: ModelSampling, sigma: Tensor) -> list[float]:
    """The same as numbers: one read, and no operation on the device."""
    if isinstance(model_sampling, comfy.model_sampling.CONST):
        return [1000.0 * each for each in sigma.tolist()]
    return timestep(model_sampling, sigma.cpu()).tolist()


def resolve(
    schedule: Schedule, model_sampling: ModelSampling, sigmas: Tensor | None = None
) -> ResolvedSchedule:
    """A schedule's gamma(t) for a model's sampling and the sigmas of a run, if it is one."""
    # TACA Training Window replaces percent_to_sigma, and keeps the original here.
    to_sigma = getattr(model_sampling, "taca_percent_to_sigma", model_sampling.percent_to_sigma)

    def percent_to_t(percent: float) -> float:
        return float(timestep(model_sampling, torch.tensor([to_sigma(percent)]).float()))

    steps = None if sigmas is None else timestep(model_sampling, sigmas)
    return ResolvedSchedule(schedule.gamma, *schedule.window.bounds(percent_to_t, steps))
