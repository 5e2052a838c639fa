"""TACA Sweep and TACA Contact Sheet: several settings through the user's own sampler."""

from itertools import chain, zip_longest
from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor

from ..taca.lora import loras_of
from ..taca.patch import patch_model
from ..taca.schedule import TIMESTEP_THRESHOLD, Schedule, TimestepWindow
from .ui import pictures
from .ui.schema import schema
from .ui.text import NodeText


class TACASweep(io.ComfyNode):
    """A model and lists of settings -> a list of models, and their labels."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "TACASweep",
            inputs=[
                io.Model.Input("model"),
                io.String.Input("gammas", default="1, 1.2, 1.4"),
                io.String.Input("timestep_thresholds", default=f"{TIMESTEP_THRESHOLD:g}"),
            ],
            outputs=[
                io.Model.Output("models", is_output_list=True),
                io.String.Output("labels", is_output_list=True),
            ],
            search_aliases=["taca", "compare gamma", "xy plot", "grid", "parameter sweep"],
        )

    @classmethod
    def execute(cls, model: Any, gammas: str, timestep_thresholds: str) -> io.NodeOutput:
        models, labels, say = [], [], NodeText()
        thresholds = numbers("TACA Sweep", "timestep_thresholds", timestep_thresholds)
        has_lora = bool(loras_of(model))
        for gamma in numbers("TACA Sweep", "gammas", gammas):
            # At gamma 1 the threshold matters to a LoRA alone.
            plain = gamma == 1 and not has_lora
            for threshold in thresholds[:1] if plain else thresholds:
                window = TimestepWindow(threshold)
                models.append(patch_model(model, Schedule(gamma, window), say=say))
                note = " (LoRA alone)" if gamma == 1 else ""
                labels.append("gamma 1 (plain)" if plain else f"gamma {gamma:g}{note}, {window}")
        return io.NodeOutput(models, labels)


def numbers(node: str, name: str, text: str) -> list[float]:
    """The numbers of a node's list with commas.

    Raises ValueError if a part is not a number, or there is none.
    """
    try:
        values = [float(part) for part in text.replace(";", ",").split(",") if part.strip()]
    except ValueError as error:
        raise ValueError(
            f"{node}: {name} must be numbers with commas between, such as 1, 1.2; got {text!r}."
        ) from error
    if not values:
        raise ValueError(f"{node}: {name} is empty; write one number or more.")
    return values


class TACAContactSheet(io.ComfyNode):
    """A list of pictures and labels -> one labelled sheet."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "TACAContactSheet",
            inputs=[
                io.Image.Input("images"),
                io.String.Input("labels", force_input=True),
                io.Int.Input("columns", default=0, min=0, max=100),
                io.String.Input("title", default="", optional=True),
            ],
            outputs=[io.Image.Output("sheet")],
            search_aliases=["taca", "image grid", "compare images", "label images"],
            is_input_list=True,
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        images: list[Tensor],
        labels: list[str],
        columns: list[int],
        title: list[str] | None = None,
    ) -> io.NodeOutput:
        if len(labels) not in (1, len(images)):
            raise ValueError(
                f"TACA Contact Sheet has {len(images)} pictures and {len(labels)} labels: connect "
                f"both from the same sweep."
            )
        labels = labels * len(images) if len(labels) == 1 else labels
        batches = [[pictures.to_picture(one) for one in batch] for batch in images]
        cells = [
            [(picture, label) for picture in batch]
            for batch, label in zip(batches, labels, strict=True)
        ]
        if not columns[0]:  # a column for each label
            blank = pictures.blank(*batches[0][0].size)
            rows = zip_longest(*batches, fillvalue=blank)
            cells = [list(zip(row, labels, strict=True)) for row in rows]
        shown, under = zip(*chain.from_iterable(cells), strict=True)
        heading = title[0] if title and title[0] else ""
        page = pictures.sheet(shown, under, columns[0] or len(batches), heading)
        image = pictures.to_tensor(page)
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))
