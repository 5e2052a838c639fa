"""What happened in a run, counted at its calls.

A call inside the window *acted* if TACA attended in each block with text that ran, and in one at
least. It was *answered by a cache* if no block ran, and *attended elsewhere* if the attention of a
block that ran never reached TACA.
"""

import inspect
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .block import Trace
from .families import uncompiled

log = logging.getLogger("taca")

Say = Callable[[str], None]
"""Shows the user a sentence under the node that it is about."""


def silent(text: str) -> None:
    """Show nothing: for models that were patched without a node."""


def step_at(steps: list[float], t: float) -> int:
    """The index of the step that a timestep belongs to; each begins at its t in ``steps``."""
    sign = -1 if steps and steps[0] >= steps[-1] else 1
    bound = sign * t + 1e-6 * abs(t) + 1e-9
    # A restart passes a t twice: take the step that begins nearest, and the last of equal ones.
    begun = ((sign * each, i) for i, each in enumerate(steps) if sign * each < bound)
    return max(begun, default=(0.0, 0))[1]


@dataclass
class Events:
    """The calls of one run. Lists are appended to from a thread for each device."""

    steps: list[float] = field(default_factory=list)  # t at which each step begins
    called: set[Any] = field(default_factory=set)  # the conditionings of the calls so far
    called_at: list[float] = field(default_factory=list)  # t of each row of these calls
    last_t: float = math.nan  # the highest t of the last call
    # For each step whose callback came: t of the call before it.
    ended: list[float] = field(default_factory=list)
    # For each call that acted: how many steps had ended, and its t.
    acted: list[tuple[int, float]] = field(default_factory=list)
    cached: list[None] = field(default_factory=list)  # calls that a cache answered
    idle: list[None] = field(default_factory=list)  # calls in which no block met text
    unchanged: list[None] = field(default_factory=list)  # calls with gamma 1 and no LoRA
    elsewhere: list[tuple[int, int, str]] = field(default_factory=list)  # blocks, of how many, who

    def begin_call(self, conditionings: Iterable[Any], t: list[float]) -> bool:
        """Whether this is the first call with these, in the first step: no cache can answer it."""
        self.called_at.extend(t)
        self.last_t = max(t)
        key = tuple(conditionings)
        is_first = key not in self.called and not self.ended
        self.called.add(key)
        return is_first

    def counted(self, callback: Callable[..., Any] | None) -> Callable[..., Any]:
        """A sampler's callback, which also counts the steps that ended."""

        def taca_callback(*args: Any, **kwargs: Any) -> Any:
            self.ended.append(self.last_t)
            return callback(*args, **kwargs) if callback else None

        return taca_callback

    def end_call(self, traces: list[Trace], t: float, is_first: bool, model: nn.Module) -> None:
        """Record what a call inside the window did, by what its blocks did, or its LoRAs' layers.

        Raises RuntimeError if TACA was bypassed in the first call.
        """
        missed = [block for block in traces if block.ran and not block.attended]
        no_block_ran = bool(traces) and not any(block.called for block in traces)
        if missed:
            count = sum(block.ran for block in traces)
            self.elsewhere.append((len(missed), count, _origin(missed[0].forward)))
        elif no_block_ran:
            self.cached.append(None)
        elif any(block.attended for block in traces):
            self.acted.append((len(self.ended), t))
        else:
            self.idle.append(None)
        if is_first and missed:
            blocks, count, who = self.elsewhere[-1]
            raise RuntimeError(
                f"TACA was bypassed in {blocks} of {count} blocks of {type(model).__name__}: they "
                f"run {who}, whose attention TACA does not reach. Take out the node that put it "
                f"there, or the TACA node."
            )
        if is_first and no_block_ran:
            part = "block" if traces[0].forward else "layer of the TACA LoRA"
            raise RuntimeError(
                f"TACA was bypassed: no {part} of {type(model).__name__} ran inside the window. "
                f"{replacement(model)} Take out the node that did this, or the TACA node."
            )

    def step_of(self, before: int, t: float) -> int:
        """The step, from 0, of a call at t, before which so many steps had ended."""
        ended = len(self.ended)
        if not ended:  # a sampler that tells of no step
            return step_at(self.steps, t)
        if ended != len(self.steps):  # one that chooses its own, as dpm_fast and dpm_adaptive do
            return min(before, ended - 1)
        # A sampler that calls the model again in a step does so after the step's callback; one
        # that tells the model another sigma than its own is still in its own step, which its last
        # call before a callback begins.
        if self.ended[before : before + 1] == [t]:
            return before
        return step_at(self.steps[: before + 1], t)

    def counts(self) -> tuple[int, int]:
        """Steps in which a call acted, and steps of the run."""
        acted = {self.step_of(*each) for each in self.acted}
        return len(acted), len(self.ended) or len(self.steps)

    def report(self, what: str, where: str) -> str:
        """Log what happened in a run that has ended; returns what to show of it under a node.

        Raises RuntimeError if TACA was bypassed in every call inside the window.
        """
        (count, total), bypass = self.counts(), ""
        if self.elsewhere:
            blocks, of, who = max(self.elsewhere)
            bypassed = f"in {len(self.elsewhere)} calls inside the window {blocks} of {of} blocks"
            if not count:
                raise RuntimeError(
                    f"TACA changed nothing: {bypassed} ran {who}, whose attention TACA does not "
                    f"reach. Start that node after the TACA window ends, or take it out."
                )
            bypass = (
                f"{bypassed} ran {who}, without TACA. Start that node after the TACA window ends."
            )
            log.warning("TACA: %s", bypass)
        advice = f" A cache answered {len(self.cached)} calls in the window." if self.cached else ""
        if not count and self.idle:
            advice += (
                f" In {len(self.idle)} calls in the window no block that gets TACA ran with text: "
                f"TACA Options may choose blocks that another node leaves out."
            )
        if not count and self.unchanged:
            advice += (
                f" In {len(self.unchanged)} calls in the window there was nothing to do: gamma is "
                f"1, or the prompt that TACA Options limits it to was not in them."
            )
        if not count and not advice:
            # Some samplers pass the model a t other than their steps'.
            advice = " The model was not called."
            if self.called_at:
                at = f"{max(self.called_at):.0f} to {min(self.called_at):.0f}"
                advice = (
                    f" No step was inside the window: the model was called at t = {at}. Widen the "
                    f"window, or use more steps."
                )
        level = logging.INFO if count else logging.WARNING
        log.log(level, "TACA: %s acted on %d of %d steps, %s.%s", what, count, total, where, advice)
        said = f"{what} acted on {count} of {total} steps.{advice}"
        return f"{said}\nWarning: {bypass}" if bypass else said


def _origin(forward: Any) -> str:
    """Name and module of a function, without decorators around it."""
    function = inspect.unwrap(getattr(forward, "func", forward))
    function = getattr(function, "__func__", function)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{name} ({getattr(function, '__module__', None) or 'unknown module'})"


def replacement(model: nn.Module) -> str:
    """What a pack has put in place of a model's own functions, as a sentence."""
    own = uncompiled(model).__dict__.items()
    functions = [value for name, value in own if callable(value) and not name.startswith("_")]
    if not functions:
        return "Its own forward did not call them."
    return f"It runs {_origin(functions[0])} in place of its own."
