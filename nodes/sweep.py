"""TACA Sweep and TACA Contact Sheet: several settings through the user's own sampler."""

import unicodedata
from collections.abc import Callable, Sequence
from itertools import chain, product, zip_longest
from typing import Any, TypeVar

from comfy_api.latest import io, ui
from torch import Tensor

from ..taca.lora import loras_of
from ..taca.patch import patch_model
from ..taca.schedule import TIMESTEP_THRESHOLD, PercentWindow, Schedule, TimestepWindow
from .ui import pictures
from .ui.schema import schema
from .ui.text import NodeText

T = TypeVar("T")


class TACASweep(io.ComfyNode):
    """A model and lists of settings -> lists of models, labels, prompts and seeds."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "TACASweep",
            inputs=[
                io.Model.Input("model"),
                io.String.Input("gammas", default="1, 1.2, 1.4"),
                io.String.Input("timestep_thresholds", default=f"{TIMESTEP_THRESHOLD:g}"),
                io.String.Input("seeds", default="", placeholder="1, 2, 3", optional=True),
                io.String.Input("prompts", default="", multiline=True, optional=True),
            ],
            outputs=[
                io.Model.Output("models", is_output_list=True),
                io.String.Output("labels", is_output_list=True),
                io.Int.Output("seeds", is_output_list=True),
                io.String.Output("prompts", is_output_list=True),
            ],
            search_aliases=["taca", "compare gamma", "xy plot", "grid", "parameter sweep"],
            not_idempotent=True,  # see NodeText
        )

    @classmethod
    def execute(
        cls, model: Any, gammas: str, timestep_thresholds: str, seeds: str = "", prompts: str = ""
    ) -> io.NodeOutput:
        name, chosen = "TACA Sweep", []
        windows = [
            PercentWindow(0, number / 100) if in_percent else TimestepWindow(number)
            for number, in_percent in parsed(
                name, "timestep_thresholds", timestep_thresholds, with_unit
            )
        ]
        has_lora = bool(loras_of(model))
        for gamma in parsed(name, "gammas", gammas, float):
            # At gamma 1 the window matters to a LoRA alone.
            plain = gamma == 1 and not has_lora
            for window in windows[:1] if plain else windows:
                note = " (LoRA alone)" if gamma == 1 else ""
                label = "gamma 1 (plain)" if plain else f"gamma {gamma:g}{note}, {window}"
                chosen.append((Schedule(gamma, window), label))
        given = seeds_in(name, seeds) if seeds.strip() else []
        seed_label = "seed {}" if given else ""
        texts = lines(prompts)
        say = NodeText(total=len(chosen) * max(1, len(given)) * max(1, len(texts)))
        patched = [(patch_model(model, schedule, say=say), label) for schedule, label in chosen]
        rows = [
            (own, ", ".join(filter(None, (label, seed_label.format(seed), text))), seed, text)
            for seed, text in product(given or [0], texts or [""])
            for own, label in patched
        ]
        return io.NodeOutput(*map(list, zip(*rows, strict=True)))


def lines(text: str) -> list[str]:
    """The lines of a widget that are not empty, without white space around them."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def with_unit(text: str) -> tuple[float, bool]:
    """A number, and whether it is in percent: 970, or 10% for the first tenth of the sampling."""
    return float(text.removesuffix("%")), text.endswith("%")


def parsed(node: str, name: str, text: str, read: Callable[[str], T]) -> list[T]:
    """The entries of a node's comma-separated list, each read by ``read``.

    Raises ValueError if one cannot be read, or there is none.
    """
    # What a Chinese keyboard writes: commas, digits and percent signs as wide as its letters.
    plain = unicodedata.normalize("NFKC", text).translate({ord(mark): "," for mark in ";\u3001"})
    try:
        values = [read(part.strip()) for part in plain.split(",") if part.strip()]
    except ValueError as error:
        raise ValueError(
            f"{node}: {name} must be numbers with commas between, such as 1, 1.2; got {text!r}."
        ) from error
    if not values:
        raise ValueError(f"{node}: {name} is empty; write one number or more.")
    return values


def seeds_in(node: str, text: str) -> list[int]:
    """Seeds from a list; errors as ``parsed``, and ValueError for one that no sampler takes."""
    seeds = parsed(node, "seeds", text, int)
    if not all(-(2**63) <= seed < 2**64 for seed in seeds):  # PyTorch takes negative ones too
        raise ValueError(f"{node}: seeds must be numbers from 0 to {2**64 - 1}; got {text!r}.")
    return seeds


class TACAContactSheet(io.ComfyNode):
    """A list of pictures and labels -> one labelled sheet."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "TACAContactSheet",
            inputs=[
                io.Image.Input("images"),
                io.String.Input("labels", force_input=True, optional=True),
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
        labels: list[str] | None = None,
        columns: Sequence[int] = (0,),
        title: list[str] | None = None,
    ) -> io.NodeOutput:
        labels = labels or [""]  # a bypassed sweep gives none
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
