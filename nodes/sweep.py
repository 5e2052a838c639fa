"""TACA Sweep and TACA Contact Sheet: several settings through the user's own sampler."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui
from PIL import Image
from torch import Tensor

from ..taca.patch import patch_model
from ..taca.schedule import TIMESTEP_THRESHOLD, Schedule, TimestepWindow
from . import drawing


class TACASweep(io.ComfyNode):
    """A model and lists of settings -> a list of models, and their labels."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TACASweep",
            display_name="TACA Sweep",
            category="TACA",
            description=(
                "Makes one model for each gamma and window, so that the nodes behind it, your own "
                "sampler among them, run once for each with the same seed. TACA Contact Sheet "
                "joins the pictures."
            ),
            search_aliases=["taca", "compare gamma", "xy plot", "grid", "parameter sweep"],
            inputs=[
                io.Model.Input("model", tooltip="The model to compare; its own TACA is replaced."),
                io.String.Input(
                    "gammas",
                    default="1, 1.2, 1.4",
                    tooltip="Values of gamma, with commas between. 1 is the plain model.",
                ),
                io.String.Input(
                    "timestep_thresholds",
                    default=f"{TIMESTEP_THRESHOLD:g}",
                    tooltip=(
                        "Values of the timestep threshold, 0 to 1000, with commas between. Every "
                        "gamma is tried with every threshold."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output("models", is_output_list=True, tooltip="One for each setting."),
                io.String.Output("labels", is_output_list=True, tooltip="What each setting is."),
            ],
        )

    @classmethod
    def execute(cls, model: Any, gammas: str, timestep_thresholds: str) -> io.NodeOutput:
        models, labels = [], []
        thresholds = numbers("timestep_thresholds", timestep_thresholds)
        for gamma in numbers("gammas", gammas):
            # gamma 1 is the plain model at any threshold
            for threshold in thresholds[:1] if gamma == 1 else thresholds:
                window = TimestepWindow(threshold)
                models.append(patch_model(model, Schedule(gamma, window)))
                labels.append("gamma 1 (plain)" if gamma == 1 else f"gamma {gamma:g}, {window}")
        return io.NodeOutput(models, labels)


def numbers(name: str, text: str) -> list[float]:
    """The numbers of a list with commas.

    Raises
    ------
    ValueError
        If one is no number, or there is none.
    """
    try:
        values = [float(part) for part in text.replace(";", ",").split(",") if part.strip()]
    except ValueError as error:
        raise ValueError(
            f"TACA Sweep: {name} must be numbers with commas between, such as 1, 1.2; got {text!r}."
        ) from error
    if not values:
        raise ValueError(f"TACA Sweep: {name} is empty; write one number or more.")
    return values


class TACAContactSheet(io.ComfyNode):
    """A list of pictures and labels -> one labelled sheet."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TACAContactSheet",
            display_name="TACA Contact Sheet",
            category="TACA",
            description="Puts the pictures of a sweep on one sheet, each under its label.",
            search_aliases=["taca", "image grid", "compare images", "label images"],
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="The pictures, one or more for each label."),
                io.String.Input("labels", force_input=True, tooltip="From TACA Sweep."),
                io.Int.Input(
                    "columns",
                    default=0,
                    min=0,
                    max=100,
                    tooltip="Pictures in a row; 0 puts one label's pictures in a column.",
                ),
                io.String.Input("title", default="", optional=True, tooltip="Above the sheet."),
            ],
            outputs=[io.Image.Output("sheet", tooltip="The sheet, to save or to show.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, images: list[Tensor], labels: list[str], columns: list[int],
                title: list[str] | None = None) -> io.NodeOutput:  # fmt: skip
        if len(labels) not in (1, len(images)):
            raise ValueError(
                f"TACA Contact Sheet has {len(images)} pictures and {len(labels)} labels: connect "
                f"both from the same sweep."
            )
        labels = labels * len(images) if len(labels) == 1 else labels
        batches = [[drawing.to_picture(one) for one in batch] for batch in images]
        if columns[0]:
            pictures = [picture for batch in batches for picture in batch]
            under = [label for label, batch in zip(labels, batches, strict=True) for _ in batch]
        else:  # a column for each label
            rows = max(map(len, batches))
            pictures, under = [], []
            for row in range(rows):
                for label, batch in zip(labels, batches, strict=True):
                    blank = Image.new("RGB", batch[0].size, drawing.PAPER)
                    pictures.append(batch[row] if row < len(batch) else blank)
                    under.append(label)
        page = drawing.sheet(
            pictures, under, columns[0] or len(batches), title[0] if title and title[0] else ""
        )
        image = drawing.to_tensor(page)
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))


NODES = [TACASweep, TACAContactSheet]
