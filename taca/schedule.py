"""When TACA acts and how strongly (arXiv 2506.07986, Eq. 11).

A schedule is two things: the *window*, a set of timesteps, and gamma, the factor of the logits
inside it. At gamma = 1 the window still matters: the TACA LoRA is active inside it.

A kind of window is one dataclass in ``WINDOWS``; its fields are the node's widgets, and their
metadata the widgets' limits; what users read of them stands in ``locales/``. A schedule is resolved
once per run into one gamma(t).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

GAMMA = 1.2
"""gamma_0 of the paper, for FLUX.1-dev and SD3.5-Medium alike."""

TIMESTEP_THRESHOLD = 970.0
"""t_thresh of the paper, of 0..1000, for both models."""

PAPER_TOKENS = 4096
"""Image tokens of the paper's pictures, 1024 pixels a side."""

ROUNDING = 4 * torch.finfo(torch.float32).eps
"""Sigmas are rounded: a step meant to lie on a bound may miss it by a few last places."""

WITHOUT_RUN = (
    "training has none, nor has a node that calls the model by itself: choose the window "
    "'timestep' or 'percent' in TACA Schedule."
)
"""What to do about it; ends a message."""

SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "step": torch.ones_like,
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + torch.cos(math.pi * x)) / 2,
}
"""Share of gamma_0 - 1 over x, which goes from 0 where the window begins to 1 where it ends."""


class Sampling(NamedTuple):
    """How a model is sampled; outside a run only ``percent_to_t`` is known."""

    percent_to_t: Callable[[float], float]  # ComfyUI's percent of the sampling, 0..1, to t
    steps: Tensor | None = None  # the t at which each step begins, and where the last one ends
    num_image: float | None = None  # size of the pictures, in tokens of 16 x 16 pixels


Share = Callable[[Tensor], Tensor]
"""t -> share of gamma_0 - 1."""

Bounds = tuple[float, float, Share]
"""``low``, ``high`` and ``share`` of a ``ResolvedSchedule``."""


@dataclass(frozen=True)
class ResolvedSchedule:
    """gamma(t) of one run."""

    gamma: float  # gamma_0
    low: float  # the window is low <= t <= high
    high: float  # infinite if it includes what a sampler's extra noise lifts above its first step
    share: Share

    def contains(self, t: Any) -> Any:
        """Whether each t is inside the window: bool, of t's shape; t is a number or a Tensor."""
        return (t >= self.low) & (t <= self.high)

    def gamma_at(self, t: Tensor) -> Tensor:
        """gamma(t) of Eq. 11 for timesteps 0..1000: float32, of t's shape and device."""
        share = self.share_at(t)
        # lerp gives gamma_0 itself at share 1
        return torch.lerp(torch.ones_like(share), torch.full_like(share, self.gamma), share)

    def share_at(self, t: Tensor) -> Tensor:
        """The share of gamma_0 - 1 at timesteps: float32, of t's shape; 0 outside the window."""
        return self.share(t).float().where(self.contains(t), 0.0)


NEVER = ResolvedSchedule(1.0, math.inf, -math.inf, torch.zeros_like)
"""An empty window."""


def falling(shape: str, begin: float, end: float) -> Share:
    """The share as a shape over t, from ``begin`` to ``end``."""
    return lambda t: SHAPES[shape](((begin - t) / ((begin - end) or math.inf)).clamp(0, 1))


def setting(default: Any, low: float, high: float, step: float) -> Any:
    """A field that is a number widget."""
    return field(default=default, metadata={"min": low, "max": high, "step": step})


def shape_setting() -> Any:
    """A field for the shape of gamma in the window; workflows of version 0.1 have none."""
    return field(default="step", metadata={"options": list(SHAPES), "optional": True})


class Window:
    """A set of timesteps; each subclass is one way to specify it.

    Raises ValueError if a setting is outside its limits.
    """

    counts_steps: ClassVar[bool] = False
    """Whether it is of steps. In a run all others include a first call at t = 999.97."""

    def __post_init__(self) -> None:
        for each in fields(self):  # type: ignore[arg-type]
            value, limits = getattr(self, each.name), each.metadata
            if "min" in limits and not limits["min"] <= value <= limits["max"]:
                allowed = f"between {limits['min']:g} and {limits['max']:g}"
            elif value not in limits.get("options", [value]):
                allowed = f"one of {', '.join(limits['options'])}"
            else:
                continue
            raise ValueError(f"TACA's {each.name} must be {allowed}, not {value!r}.")

    def bounds(self, sampling: Sampling) -> Bounds:
        """The bounds of the window, in a run or outside one.

        Raises ValueError if they depend on a run and there is none.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class TimestepWindow(Window):
    """The paper's window, ``t >= t_thresh`` (Eq. 11)."""

    timestep_threshold: float = setting(TIMESTEP_THRESHOLD, 0.0, 1000.0, 1.0)
    shape: str = shape_setting()

    def bounds(self, sampling: Sampling) -> Bounds:
        low = self.timestep_threshold
        # Below a discrete model's smallest sigma t is negative, and 0 means every step.
        bound = low * (1 - ROUNDING) or -math.inf
        return bound, math.inf, falling(self.shape, 1000.0, low)

    def __str__(self) -> str:
        return f"t >= {self.timestep_threshold:g}"


@dataclass(frozen=True)
class PercentWindow(Window):
    """From one percentage of the sampling to another, as in ComfyUI's nodes."""

    start_percent: float = setting(0.0, 0.0, 1.0, 0.001)
    end_percent: float = setting(0.1, 0.0, 1.0, 0.001)
    shape: str = shape_setting()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.end_percent < self.start_percent:
            raise ValueError(
                f"TACA's end_percent ({self.end_percent:g}) lies before its start_percent "
                f"({self.start_percent:g}): swap them."
            )

    def bounds(self, sampling: Sampling) -> Bounds:
        begin, end = map(sampling.percent_to_t, (self.start_percent, self.end_percent))
        # Closed at both ends and without tolerance, like the percentages of core's nodes.
        return end, begin if self.start_percent else math.inf, falling(self.shape, begin, end)

    def __str__(self) -> str:
        return f"{100 * self.start_percent:g}-{100 * self.end_percent:g} %"


@dataclass(frozen=True)
class FirstStepsWindow(Window):
    """The authors' code: the first steps of a run, whatever their timesteps."""

    counts_steps = True
    steps: int = setting(3, 1, 10000, 1)
    shape: str = shape_setting()

    def bounds(self, sampling: Sampling) -> Bounds:
        if sampling.steps is None:
            raise ValueError(
                f"TACA's window of the first steps needs the steps of a run, and {WITHOUT_RUN}"
            )
        t = sampling.steps.tolist()
        first, later = t[: self.steps], t[self.steps : -1]
        low, high, end = -math.inf, math.inf, t[-1]
        # Every call of a step is on the near side of where the next step begins, so samplers with
        # several calls a step stay right. A later step with as much noise as the first ones cannot
        # be distinguished from them: a repeated sigma, a restart.
        if t[0] > t[-1]:
            if past := [each for each in later if each < min(first)]:
                end = max(past)
                low = end + 3000 * ROUNDING
        elif past := [each for each in later if each > max(first)]:
            end = min(past)
            high = end - 3000 * ROUNDING
        return low, high, falling(self.shape, t[0], end)

    def __str__(self) -> str:
        return f"the first {self.steps} steps"


@dataclass(frozen=True)
class FittedWindow(Window):
    """The paper's window for pictures of any size, and at least the first step of a run.

    It ends where the noise hides as much of a picture as at t_thresh with the paper's size. A mean
    over n tokens has 1 / sqrt(n) of the noise, so sigma / (1 - sigma) there goes as sqrt(n).
    """

    shape: str = shape_setting()

    def bounds(self, sampling: Sampling) -> Bounds:
        if sampling.steps is None or sampling.num_image is None:
            raise ValueError(f"TACA's window for any size needs a run, and {WITHOUT_RUN}")
        low = self.threshold(sampling.num_image) * (1 - ROUNDING)
        low = min(low, max(sampling.steps[:-1].tolist(), default=low))
        return low, math.inf, falling(self.shape, 1000.0, low)

    @staticmethod
    def threshold(num_image: float) -> float:
        """The t, 0..1000, at which the window ends: 970 for 4,096 tokens, 942 for 1,024."""
        odds = TIMESTEP_THRESHOLD / (1000 - TIMESTEP_THRESHOLD)
        odds *= math.sqrt(num_image / PAPER_TOKENS)
        return 1000 * odds / (1 + odds)

    def __str__(self) -> str:
        return "the paper's window for this size"


@dataclass(frozen=True)
class CurveWindow(Window):
    """A drawn curve: share of gamma - 1, 0..1, over the share of the sampling, 0..1.

    The window goes from where the curve leaves 0 to where it finally returns to it.

    Raises ValueError if the curve is 0 throughout, or leaves 0..1.
    """

    curve: Any = ((0.0, 1.0), (0.05, 1.0), (0.2, 0.0), (1.0, 0.0))

    def __post_init__(self) -> None:
        self.weights()

    def weights(self) -> Tensor:
        """The curve at 1025 evenly spaced shares of the sampling, ``(1025,)``; errors as above."""
        x = np.linspace(0, 1, 1025)
        if isinstance(self.curve, tuple):  # the widget's default
            xp, fp = zip(*self.curve, strict=True)
            values = np.interp(x, xp, fp)
        else:
            values = self.curve.interp_array(x)
        weights = torch.as_tensor(values).float()
        if not bool(weights.isfinite().all()) or weights.min() < 0 or weights.max() > 1:
            raise ValueError("TACA's curve must stay between 0 and 1.")
        if not bool(weights.any()):
            raise ValueError("TACA's curve is 0 throughout, so TACA would never act: draw it up.")
        return weights

    def bounds(self, sampling: Sampling) -> Bounds:
        weights = self.weights()
        inside = weights.nonzero().flatten()
        percents = np.linspace(0, 1, len(weights)).tolist()
        t = np.array([sampling.percent_to_t(p) for p in percents])
        first, last = int(inside[0]), int(inside[-1])

        def share(x: Tensor) -> Tensor:
            return torch.as_tensor(np.interp(-x.cpu().numpy(), -t, weights)).to(x)

        return t[last], t[first] if first else math.inf, share

    def __str__(self) -> str:
        return "a drawn curve"


WINDOWS: dict[str, type[Any]] = {
    "timestep": TimestepWindow,
    "percent": PercentWindow,
    "first steps": FirstStepsWindow,
    "paper, any size": FittedWindow,
    "curve": CurveWindow,
}
"""Kinds of window by the name that workflows save."""


@dataclass(frozen=True)
class Schedule:
    """gamma over t: gamma_0 inside the window, 1 outside it (Eq. 11).

    Raises ValueError if gamma is negative, not finite, or beyond 1000.
    """

    gamma: float = GAMMA
    window: Window = field(default_factory=TimestepWindow)

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1000:
            raise ValueError(
                f"TACA's gamma must be a finite number from 0 to 1000, not {self.gamma}. "
                f"The paper uses {GAMMA}; 1 leaves attention as it is."
            )
