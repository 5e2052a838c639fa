"""TACA Schedule Preview: what a schedule does in a run, before the run."""

from __future__ import annotations

import re
from typing import Any

from comfy_api.latest import io, ui
from comfy_execution.utils import get_executing_context
from PIL import Image
from torch import Tensor

from ..taca.patch import loras_of, resolve, settings_of, timestep
from ..taca.schedule import Schedule
from . import drawing
from .schedule import TACASchedule


class TACASchedulePreview(io.ComfyNode):
    """SIGMAS, a model and a schedule -> a plot and a table, in the node."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TACASchedulePreview",
            display_name="TACA Schedule Preview",
            category="TACA",
            description=(
                "Shows on which steps TACA will act and with which gamma, as a plot and a table, "
                "without sampling anything; and says when a window holds no step, or too many."
            ),
            search_aliases=["taca", "show schedule", "plot gamma", "plot sigmas"],
            inputs=[
                io.Sigmas.Input(
                    "sigmas", tooltip="The run's sigmas, for example from Basic Scheduler."
                ),
                io.Model.Input("model", tooltip="The model that will be sampled."),
                TACASchedule.Input(
                    "schedule",
                    optional=True,
                    tooltip="From TACA Schedule; left open, that of the model's TACA Patch Model.",
                ),
            ],
            outputs=[
                io.Image.Output("plot", tooltip="gamma and sigma over the steps."),
                io.String.Output("table", tooltip="Step, t, gamma, and whether a LoRA is on."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, sigmas: Tensor, model: Any, schedule: Schedule | None = None) -> io.NodeOutput:
        settings = settings_of(model)
        if schedule is None and settings is None:
            raise ValueError(
                "TACA Schedule Preview has no schedule: connect TACA Schedule, or a model from "
                "TACA Patch Model."
            )
        chosen = schedule or settings.schedule
        if len(sigmas) < 2:
            raise ValueError(
                "TACA Schedule Preview got sigmas without a step: a denoise of 0, or an empty "
                "part of Split Sigmas?"
            )
        model_sampling = model.get_model_object("model_sampling")
        resolved = resolve(chosen, model_sampling, sigmas)
        t = timestep(model_sampling, sigmas.float())[:-1]
        gamma, inside = resolved.gamma_at(t).tolist(), resolved.contains(t).tolist()
        picture = plot(gamma, inside, sigmas[:-1].tolist(), f"gamma at {chosen.window}")
        lines = table(t.tolist(), gamma, inside, bool(loras_of(model)))
        advice = advise(inside, chosen.gamma)
        text = "\n".join([*advice, "", *lines])
        page = drawing.stack([picture, drawing.columns(lines, picture.width)])
        image = drawing.to_tensor(page)
        words = " ".join(advice)
        say(words)
        shown = {**ui.PreviewImage(image, cls=cls).as_dict(), **ui.PreviewText(words).as_dict()}
        return io.NodeOutput(image, text, ui=shown)


def say(text: str) -> None:
    """Show a text in the node that is running, which its ``ui`` alone does not do."""
    context = get_executing_context()
    if context:
        from server import PromptServer

        # The page folds spaces; those as wide as a digit keep columns apart.
        wide = re.sub(" {2,}", lambda spaces: "\u2007" * len(spaces[0]), text)
        PromptServer.instance.send_progress_text(wide, context.node_id)


def advise(inside: list[bool], gamma: float) -> list[str]:
    """What to know about a window of these steps, in sentences."""
    steps, count = len(inside), sum(inside)
    lines = [f"TACA acts on {count} of {steps} steps."]
    if not count:
        lines.append(
            "No step is inside the window, so the picture is the plain model's: lower the "
            "threshold, raise the end, or use more steps."
        )
    elif count >= max(2, steps / 4):
        lines.append(
            "That is a quarter of the run or more; the paper's is a tenth. Expect stronger changes "
            "and artifacts, or narrow the window."
        )
    elif count / steps >= 0.25:
        lines.append(
            f"With {steps} steps a single one is a quarter of the run or more: keep gamma low, or "
            f"use more steps."
        )
    if gamma == 1:
        lines.append("gamma is 1: attention stays as it is, only a TACA LoRA acts.")
    return lines


def table(t: list[float], gamma: list[float], inside: list[bool], lora: bool) -> list[str]:
    """Lines of step, t, gamma and, where the model has one, whether its TACA LoRA is on."""
    lines = ["step        t    gamma" + ("   LoRA" if lora else "")]
    for i, (at, value, acts) in enumerate(zip(t, gamma, inside, strict=True), 1):
        state = ("     on" if acts else "    off") if lora else ""
        lines.append(f"{i:4}  {at:7.1f}   {value:6.3f}{state}")
    return lines


def plot(gamma: list[float], inside: list[bool], sigmas: list[float], title: str) -> Image.Image:
    """Gamma above, sigma below, over the steps; the window shaded."""
    picture = Image.new("RGB", (720, 480), drawing.PAPER)
    steps = len(gamma)
    low, high = min(1.0, *gamma), max(1.0, *gamma)
    margin = max(0.05, 0.15 * (high - low))
    x = (0.5, steps + 0.5)
    marks = drawing.ticks([str(i + 1) for i in range(steps)])
    places = list(range(1, steps + 1))
    upper = drawing.Axes(picture, (70, 40, 690, 200), x, (low - margin, high + margin))
    lower = drawing.Axes(picture, (70, 270, 690, 420), x, (0.0, max(sigmas) * 1.05))
    for axes in (upper, lower):
        for i, acts in zip(places, inside, strict=True):
            if acts:
                axes.band(i - 0.5, i + 0.5, "#fde8d7")
    upper.frame("", title, sorted({low, 1.0, high}), marks)
    lower.frame("step", "sigma", [0, max(sigmas) / 2, max(sigmas)], marks)
    upper.steps(gamma, drawing.COLOURS[0])
    lower.line(list(zip(places, sigmas, strict=True)), drawing.COLOURS[1], dots=True)
    return picture


NODES = [TACASchedulePreview]
