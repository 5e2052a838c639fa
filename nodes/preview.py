"""TACA Schedule Preview: what a schedule does in a run, before the run."""

from collections.abc import Sequence
from typing import Any

from comfy.sample import fix_empty_latent_channels
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..taca.lora import loras_of
from ..taca.options import NO_OPTIONS
from ..taca.patch import count_blocks
from ..taca.run import config_of
from ..taca.schedule import PAPER_TOKENS, FittedWindow, Schedule
from ..taca.timesteps import resolve, size_in_tokens, timesteps_tensor
from .patch import TACASchedule
from .ui import pictures
from .ui.plots import COLOURS, Axes, ticks
from .ui.schema import schema
from .ui.text import show


class TACASchedulePreview(io.ComfyNode):
    """SIGMAS, a model and a schedule -> a plot and a table, in the node."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "TACASchedulePreview",
            inputs=[
                io.Sigmas.Input("sigmas"),
                io.Model.Input("model"),
                TACASchedule.Input("schedule", optional=True),
                io.Latent.Input("latent_image", optional=True),
            ],
            outputs=[io.Image.Output("plot"), io.String.Output("table")],
            search_aliases=["taca", "show schedule", "plot gamma", "plot sigmas"],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        sigmas: Tensor,
        model: Any,
        schedule: Schedule | None = None,
        latent_image: dict[str, Tensor] | None = None,
    ) -> io.NodeOutput:
        config = config_of(model)
        chosen = schedule or (config.schedule if config else None)
        if chosen is None:
            raise ValueError(
                "TACA Schedule Preview has no schedule: connect TACA Schedule, or a model from "
                "the TACA node."
            )
        if len(sigmas) < 2:
            raise ValueError(
                "TACA Schedule Preview got sigmas without a step: a denoise of 0, or an empty "
                "part of Split Sigmas?"
            )
        count_blocks(model, NO_OPTIONS)  # an error where TACA cannot act at all
        model_sampling = model.get_model_object("model_sampling")
        size = float(PAPER_TOKENS)
        if latent_image is not None:
            # As core's samplers do: an empty one may be for another model's autoencoder.
            ratio = latent_image.get("downscale_ratio_spacial")
            samples = fix_empty_latent_channels(model, latent_image["samples"], ratio)
            size = size_in_tokens(model.model.latent_format, samples.shape)
        resolved = resolve(chosen, model_sampling, sigmas, size)
        t = timesteps_tensor(model_sampling, sigmas)[:-1]
        gamma, inside = resolved.gamma_at(t).tolist(), resolved.contains(t).tolist()
        picture = plot(gamma, inside, sigmas[:-1].tolist(), f"gamma at {chosen.window}")
        lines = [f"TACA acts on {sum(inside)} of {len(inside)} steps."]
        lines += advice(inside, chosen.gamma)
        if isinstance(chosen.window, FittedWindow) and latent_image is None:
            lines.append(ASSUMED)
        said = "\n".join(lines)
        header, rows = table(t.tolist(), gamma, inside, bool(loras_of(model)))
        drawn = pictures.stack([picture, pictures.table(header, rows, picture.width)])
        [image], shown = show([drawn], said, cls)
        text = "\n".join([said, "", *map("  ".join, [header, *rows])])
        return io.NodeOutput(image, text, ui=shown)


ASSUMED = "This is for a picture of 1024 x 1024: connect latent_image for another size."


def advice(inside: Sequence[bool], gamma: float) -> list[str]:
    """What to know before a run, in sentences; ``inside`` says which steps are in the window."""
    steps, count = len(inside), sum(inside)
    if not count:
        return [
            "No step is inside the window, so the picture is the plain model's: lower the "
            "threshold, raise the end, or use more steps."
        ]
    if gamma == 1:
        return ["gamma is 1: attention stays as it is, only a TACA LoRA acts."]
    if count / steps < 0.25:
        return []
    if count == 1:
        return ["That single step is a quarter of the run or more: keep gamma low."]
    return ["That is a quarter of the run or more, the paper's a tenth: expect artifacts."]


def table(
    t: list[float], gamma: list[float], inside: list[bool], lora: bool
) -> tuple[list[str], list[list[str]]]:
    """Step, t, gamma and, where the model has one, whether its TACA LoRA is on; under a header."""
    header = ["step", "      t", " gamma", "LoRA"]
    rows = [
        [f"{i:4}", f"{at:7.1f}", f"{value:6.3f}", "  on" if acts else " off"]
        for i, (at, value, acts) in enumerate(zip(t, gamma, inside, strict=True), 1)
    ]
    columns = 4 if lora else 3
    return header[:columns], [row[:columns] for row in rows]


def plot(gamma: list[float], inside: list[bool], sigmas: list[float], title: str) -> Image.Image:
    """Gamma above, sigma below, over the steps; the window shaded."""
    picture = pictures.blank(720, 480)
    steps = len(gamma)
    low, high = min(1.0, *gamma), max(1.0, *gamma)
    margin = max(0.05, 0.15 * (high - low))
    x = (0.5, steps + 0.5)
    marks = ticks([str(i + 1) for i in range(steps)])
    upper = Axes(picture, (70, 40, 690, 200), x, (low - margin, high + margin))
    lower = Axes(picture, (70, 270, 690, 420), x, (0.0, max(sigmas) * 1.05))
    for axes in (upper, lower):
        for i, acts in enumerate(inside, 1):
            if acts:
                axes.band(i - 0.5, i + 0.5, "#fde8d7")
    upper.frame("", title, sorted({low, 1.0, high}), marks)
    lower.frame("step", "sigma", [0, max(sigmas) / 2, max(sigmas)], marks)
    upper.steps(gamma, COLOURS[0])
    lower.line(list(enumerate(sigmas, 1)), COLOURS[1], dots=True)
    return picture
