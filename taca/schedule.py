"""When TACA acts and how strongly (arXiv 2506.07986, Eq. 11). Pure torch.

A schedule is two things: the *window*, a set of timesteps, and gamma, what attention does inside
it. At gamma = 1 the window is still there: the TACA LoRA belongs to it.

A kind of window is one dataclass in ``WINDOWS``; the fields' metadata say how its widgets look.
"""

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

GAMMA = 1.2
"""gamma_0 of the paper, for FLUX.1-dev and SD3.5-Medium alike."""

TIMESTEP_THRESHOLD = 970.0
"""t_thresh of the paper, of 0..1000, for both models."""


class Window(Protocol):
    """A set of timesteps."""

    def contains(self, t: Tensor) -> Tensor:
        """Whether each t (0..1000, 1000 = pure noise) is inside: bool, of t's shape."""
        ...


@dataclass(frozen=True)
class TimestepWindow:
    """The paper's window, ``t >= t_thresh`` (Eq. 11).

    Raises
    ------
    ValueError
        If the threshold is not within 0..1000.
    """

    timestep_threshold: float = field(
        default=TIMESTEP_THRESHOLD,
        metadata={
            "min": 0.0,
            "max": 1000.0,
            "step": 1.0,
            "tooltip": (
                "TACA acts while the timestep is at or above this value. 1000 is pure noise, "
                "0 is the finished picture. The paper uses 970, about the first tenth of the "
                "steps; 0 means all steps."
            ),
        },
    )

    def __post_init__(self) -> None:
        if not 0 <= self.timestep_threshold <= 1000:
            raise ValueError(
                f"TACA's timestep_threshold must be between 0 and 1000, "
                f"not {self.timestep_threshold}. The paper uses {TIMESTEP_THRESHOLD:g}."
            )

    def contains(self, t: Tensor) -> Tensor:
        # t is a rounded 1000 * sigma, so a step meant to lie on the threshold may fall short of
        # it by a few units in the last place of float32.
        return t >= self.timestep_threshold * (1 - 4 * torch.finfo(torch.float32).eps)

    def __str__(self) -> str:
        return f"t >= {self.timestep_threshold:g}"


WINDOWS: dict[str, type[TimestepWindow]] = {"timestep": TimestepWindow}
"""Kinds of window by the name that workflows save."""


@dataclass(frozen=True)
class Schedule:
    """gamma over t: gamma_0 inside the window, 1 outside it (Eq. 11).

    Raises
    ------
    ValueError
        If gamma is negative or not finite.
    """

    gamma: float = GAMMA
    window: Window = TimestepWindow()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.gamma) and self.gamma >= 0):
            raise ValueError(
                f"TACA's gamma must be a finite number of at least 0, not {self.gamma}. "
                f"The paper uses {GAMMA}; 1 leaves attention as it is."
            )

    def gamma_at(self, t: Tensor) -> Tensor:
        """gamma(t) of Eq. 11.

        Parameters
        ----------
        t : Tensor
            Timesteps, 0..1000, any shape.

        Returns
        -------
        Tensor
            float32, of t's shape and device.
        """
        gamma = torch.full_like(t, self.gamma, dtype=torch.float32)
        return gamma.where(self.window.contains(t), 1.0)
