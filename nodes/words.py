"""Prompts whose words weigh in the attention of the model."""

import logging
from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ..taca.conditioning import AVOID_STRENGTH, attach, encode, words_of
from ..taca.same_text import check_text
from ..taca.schedule import Schedule
from ..taca.weighted_text import parse, read
from .patch import TACASchedule
from .sweep import parsed
from .ui.schema import schema
from .ui.text import NodeText

log = logging.getLogger("taca")

NEGATIVES = {"subtract": False, "mirror about the mean": True}
"""What a negative weight does: its name in the widget -> ``Words.about_mean``."""


def how_inputs() -> list[io.Input]:
    """When weights act, on what, and how negative ones do; the same on both nodes."""
    return [
        io.Combo.Input("negatives", [*NEGATIVES], optional=True, advanced=True),
        TACASchedule.Input("schedule", optional=True),
        io.Boolean.Input("any_model", default=True, optional=True, advanced=True),
    ]


class TACATextEncode(io.ComfyNode):
    """CLIP Text Encode, with weights that act in the attention."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "TACATextEncode",
            inputs=[
                io.Clip.Input("clip"),
                io.String.Input("text", multiline=True, dynamic_prompts=True),
                io.String.Input("avoid", default="", optional=True),
                io.Float.Input(
                    "avoid_strength",
                    default=AVOID_STRENGTH,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    advanced=True,
                ),
                *how_inputs(),
            ],
            outputs=[io.Conditioning.Output()],
            search_aliases=[
                "taca",
                "prompt weights",
                "提示词权重",
                "word weights",
                "emphasis",
                "negative prompt cfg 1",
                "clip text encode",
            ],
            not_idempotent=True,  # see NodeText
        )

    @classmethod
    def execute(
        cls,
        clip: Any,
        text: str,
        avoid: str = "",
        avoid_strength: float = AVOID_STRENGTH,
        negatives: str = "subtract",
        schedule: Schedule | None = None,
        any_model: bool = True,
    ) -> io.NodeOutput:
        say = NodeText(*parse(text).warnings, *parse(avoid).warnings)
        how = {"about_mean": NEGATIVES[negatives], "schedule": schedule, "say": say}
        return io.NodeOutput(encode(clip, text, avoid, avoid_strength, any_model, **how))


class TACAWeighWords(io.ComfyNode):
    """Weights for a conditioning from any other node."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "TACAWeighWords",
            inputs=[
                io.Conditioning.Input("conditioning"),
                io.Clip.Input("clip"),
                io.String.Input("text", multiline=True, dynamic_prompts=True),
                *how_inputs(),
            ],
            outputs=[io.Conditioning.Output()],
            search_aliases=["taca", "prompt weights", "word weights", "emphasis"],
            not_idempotent=True,  # see NodeText
        )

    @classmethod
    def execute(
        cls,
        conditioning: Any,
        clip: Any,
        text: str,
        negatives: str = "subtract",
        schedule: Schedule | None = None,
        any_model: bool = True,
    ) -> io.NodeOutput:
        parsed = read(clip, text)
        words = words_of(clip, parsed, about_mean=NEGATIVES[negatives], schedule=schedule)
        warnings = check_text(conditioning, clip, words)
        for warning in warnings:
            log.warning(warning)
        words = replace(words, say=NodeText(*parsed.warnings, *warnings))
        return io.NodeOutput(attach(conditioning, words, clip, any_model))


class TACAWordSweep(io.ComfyNode):
    """A prompt with one weight left open, and a list of weights -> conditionings and labels."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "TACAWordSweep",
            inputs=[
                io.Clip.Input("clip"),
                io.String.Input("text", multiline=True, default="a (red:w) circle"),
                io.String.Input("weights", default="-1, 0, 0.5, 1, 2, 4"),
            ],
            outputs=[
                io.Conditioning.Output("conditionings", is_output_list=True),
                io.String.Output("labels", is_output_list=True),
            ],
            search_aliases=["taca", "word weights", "xy plot", "grid", "parameter sweep"],
            not_idempotent=True,  # see NodeText
        )

    @classmethod
    def execute(cls, clip: Any, text: str, weights: str) -> io.NodeOutput:
        if ":w)" not in text:
            raise ValueError(
                "TACA Word Sweep has no weight to change: write w in its place, as in (red:w)."
            )
        values = parsed("TACA Word Sweep", "weights", weights, float)
        texts = [text.replace(":w)", f":{value})") for value in values]
        labels = [f"w = {value:g}" for value in values]
        read_texts = [parse(each) for each in texts]
        # A run in which all weights are 1 says nothing.
        weighing = sum(any(weight != 1 for weight in each.weights) for each in read_texts)
        say = NodeText(*read_texts[0].warnings, total=weighing)
        return io.NodeOutput([encode(clip, each, say=say) for each in texts], labels)
