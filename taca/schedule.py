"""When TACA acts and how strongly (arXiv 2506.07986, Eq. 11). Pure torch.

A schedule is two things: the *window*, a set of timesteps, and gamma, what attention does inside
it. At gamma = 1 the window is still there: the TACA LoRA belongs to it.

A kind of window is one dataclass in ``WINDOWS``; its fields are the node's widgets, and their
metadata say how those look. A schedule is resolved once per run into one gamma(t).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

GAMMA = 1.2
"""gamma_0 of the paper, for FLUX.1-dev and SD3.5-Medium alike."""

TIMESTEP_THRESHOLD = 970.0
"""t_thresh of the paper, of 0..1000, for both models."""

ROUNDING = 4 * torch.finfo(torch.float32).eps
"""t is a rounded 1000 * sigma: a step meant to lie on a bound may miss it by a few last places."""

SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "step": torch.ones_like,
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + torch.cos(math.pi * x)) / 2,
}
"""How gamma - 1 goes from all of it at x = 0, where the window begins, to its end at x = 1."""


@dataclass(frozen=True)
class Sampling:
    """What a run tells a schedule.

    Parameters
    ----------
    percent_to_t : callable
        ComfyUI's percent of the sampling, 0..1, to t, 1000..0.
    steps : Tensor, optional
        t at which each step begins, and at last where the final one ends; absent in training.
    """

    percent_to_t: Callable[[float], float]
    steps: Tensor | None = None


@dataclass(frozen=True)
class Resolved:
    """gamma(t) of one run.

    Parameters
    ----------
    gamma : float
        gamma_0.
    begin, end : float
        The window is ``begin >= t >= end``.
    weight : callable
        Of gamma_0 - 1, 0..1 over x in 0..1 from begin to end.
    """

    gamma: float
    begin: float
    end: float
    weight: Callable[[Tensor], Tensor]

    def contains(self, t: Any) -> Any:
        """Whether each t is inside the window: bool, of t's shape; t is a number or a Tensor."""
        inside = t >= self.end * (1 - ROUNDING)
        # A window that begins with pure noise holds what a sampler's extra noise lifts above it.
        return inside if self.begin >= 999 else inside & (t <= self.begin * (1 + ROUNDING))

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
        x = ((self.begin - t.float()) / max(self.begin - self.end, ROUNDING)).clamp(0, 1)
        # lerp gives gamma_0 itself at weight 1
        gamma = torch.lerp(torch.ones_like(x), torch.full_like(x, self.gamma), self.weight(x))
        return gamma.where(self.contains(t), 1.0)


class Window(Protocol):
    """A set of timesteps, in one of the ways to say it."""

    def resolve(self, gamma: float, sampling: Sampling) -> Resolved:
        """gamma(t) for a run."""
        ...


def _number(default: float, low: float, high: float, step: float, tooltip: str) -> Any:
    """A field that is a number widget."""
    widget = {"min": low, "max": high, "step": step, "tooltip": tooltip}
    return field(default=default, metadata=widget)


def _shape() -> Any:
    """The field that says how gamma goes through the window."""
    return field(
        default="step",
        metadata={
            "options": list(SHAPES),
            "optional": True,  # saved workflows of version 0.1 have none
            "tooltip": (
                "How gamma goes through the window: 'step' holds it (the paper), 'linear' and "
                "'cosine' let it fall to 1 at the window's end."
            ),
        },
    )


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"TACA's {name} must be between {low:g} and {high:g}, not {value}.")


def _check_shape(shape: str) -> None:
    if shape not in SHAPES:
        raise ValueError(f"TACA's shape must be one of {', '.join(SHAPES)}, not {shape!r}.")


@dataclass(frozen=True)
class TimestepWindow:
    """The paper's window, ``t >= t_thresh`` (Eq. 11).

    Raises
    ------
    ValueError
        If the threshold is not within 0..1000.
    """

    timestep_threshold: float = _number(
        TIMESTEP_THRESHOLD, 0.0, 1000.0, 1.0,
        "TACA acts while the timestep is at or above this value. 1000 is pure noise, 0 is the "
        "finished picture. The paper uses 970, about the first tenth of the steps; 0 means all "
        "steps.",
    )  # fmt: skip
    shape: str = _shape()

    def __post_init__(self) -> None:
        _within("timestep_threshold", self.timestep_threshold, 0, 1000)
        _check_shape(self.shape)

    def resolve(self, gamma: float, sampling: Sampling) -> Resolved:
        return Resolved(gamma, 1000.0, self.timestep_threshold, SHAPES[self.shape])

    def __str__(self) -> str:
        return f"t >= {self.timestep_threshold:g}"


@dataclass(frozen=True)
class PercentWindow:
    """From one percentage of the sampling to another, as ComfyUI's nodes say it.

    Raises
    ------
    ValueError
        If they are not within 0..1, or the end is before the start.
    """

    start_percent: float = _number(
        0.0, 0.0, 1.0, 0.001, "TACA begins at this share of the sampling; 0 is its start."
    )
    end_percent: float = _number(
        0.1, 0.0, 1.0, 0.001,
        "TACA ends at this share of the sampling. 0.1 is close to the paper's window for FLUX.1 "
        "and SD3.5.",
    )  # fmt: skip
    shape: str = _shape()

    def __post_init__(self) -> None:
        _within("start_percent", self.start_percent, 0, 1)
        _within("end_percent", self.end_percent, 0, 1)
        if self.end_percent < self.start_percent:
            raise ValueError(
                f"TACA's end_percent ({self.end_percent:g}) lies before its start_percent "
                f"({self.start_percent:g}): swap them."
            )
        _check_shape(self.shape)

    def resolve(self, gamma: float, sampling: Sampling) -> Resolved:
        begin, end = map(sampling.percent_to_t, (self.start_percent, self.end_percent))
        return Resolved(gamma, begin, end, SHAPES[self.shape])

    def __str__(self) -> str:
        return f"{100 * self.start_percent:g}-{100 * self.end_percent:g} %"


@dataclass(frozen=True)
class FirstStepsWindow:
    """The authors' code: the first steps of a run, whatever their timesteps.

    Raises
    ------
    ValueError
        If there is no step, or when resolved without a run (in training).
    """

    steps: int = _number(
        3, 1, 10000, 1,
        "TACA acts in this many first steps of every sampler node. The authors' code uses 3, for "
        "30 steps.",
    )  # fmt: skip
    shape: str = _shape()

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"TACA's steps must be at least 1, not {self.steps}.")
        _check_shape(self.shape)

    def resolve(self, gamma: float, sampling: Sampling) -> Resolved:
        if sampling.steps is None:
            raise ValueError(
                "TACA's window of the first steps needs the steps of a run, and training has none: "
                "choose the window 'timestep' or 'percent' in TACA Schedule."
            )
        # Every call of a step is above the noise that the next step begins with, so that samplers
        # with several calls a step stay right.
        t = sampling.steps.tolist()
        following = t[self.steps] if self.steps < len(t) else -1.0
        end = following * (1 + 3 * ROUNDING) if self.steps < len(t) - 1 else 0.0
        return Resolved(gamma, max(t), end, SHAPES[self.shape])

    def __str__(self) -> str:
        return f"the first {self.steps} steps"


@dataclass(frozen=True)
class CurveWindow:
    """A drawn curve: how much of gamma - 1, 0..1, over the share of the sampling, 0..1.

    The window is from where the curve leaves 0 to where it comes back to it for good.

    Raises
    ------
    ValueError
        If the curve is 0 throughout, or leaves 0..1.
    """

    curve: Any = field(
        default=((0.0, 1.0), (0.05, 1.0), (0.2, 0.0), (1.0, 0.0)),
        metadata={
            "curve": True,
            "tooltip": (
                "Draw when TACA acts, or connect Curve Editor. Left is the start of the sampling, "
                "right its end; at the bottom TACA is off, at the top it acts with all of gamma."
            ),
        },
    )

    def resolve(self, gamma: float, sampling: Sampling) -> Resolved:
        percents = torch.linspace(0, 1, 1025, dtype=torch.float64)
        weights = torch.as_tensor(self.curve.interp_array(percents.numpy())).float()
        if not bool(weights.isfinite().all()) or weights.min() < 0 or weights.max() > 1:
            raise ValueError("TACA's curve must stay between 0 and 1.")
        inside = weights.nonzero().flatten()
        if not len(inside):
            raise ValueError("TACA's curve is 0 throughout, so TACA would never act: draw it up.")
        t = torch.tensor([sampling.percent_to_t(p) for p in percents.tolist()]).float()
        first, last = int(inside[0]), int(inside[-1])
        begin, end = t[first].item(), t[last].item()
        places = (begin - t) / max(begin - end, ROUNDING)

        def weight(x: Tensor) -> Tensor:
            grid, values = places.to(x.device), weights.to(x.device)
            right = torch.searchsorted(grid, x.contiguous()).clamp(1, len(grid) - 1)
            width = (grid[right] - grid[right - 1]).clamp_min(ROUNDING)
            share = ((x - grid[right - 1]) / width).clamp(0, 1)
            return values[right - 1] + share * (values[right] - values[right - 1])

        return Resolved(gamma, begin, end, weight)

    def __str__(self) -> str:
        return "a drawn curve"


WINDOWS: dict[str, type[Any]] = {
    "timestep": TimestepWindow,
    "percent": PercentWindow,
    "first steps": FirstStepsWindow,
    "curve": CurveWindow,
}
"""Kinds of window by the name that workflows save."""


@dataclass(frozen=True)
class Schedule:
    """gamma over t: gamma_0 inside the window, 1 outside it (Eq. 11).

    Raises
    ------
    ValueError
        If gamma is negative, not finite, or beyond 1000.
    """

    gamma: float = GAMMA
    window: Window = TimestepWindow()

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1000:
            raise ValueError(
                f"TACA's gamma must be a finite number from 0 to 1000, not {self.gamma}. "
                f"The paper uses {GAMMA}; 1 leaves attention as it is."
            )

    def resolve(self, sampling: Sampling) -> Resolved:
        """gamma(t) for a run."""
        return self.window.resolve(self.gamma, sampling)
