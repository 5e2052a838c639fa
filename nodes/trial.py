"""TACA Trial: the first node of a search, which hands out one setting, seed and prompt."""

import json
from dataclasses import dataclass
from typing import Any

from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from .sweep import lines, seeds_in
from .ui.schema import schema

TRIAL = "TACA Trial"
Pair = tuple[int, int]
"""A prompt and a seed, by their indices."""
SEED_STRIDE = 1000
"""Added to the seeds from one prompt to the next."""


@dataclass(frozen=True)
class Trials:
    """What a search compares, from TACA Trial."""

    labels: tuple[str, ...]
    seeds: tuple[int, ...]
    prompts: tuple[str, ...]

    def seed_of(self, pair: Pair) -> int:
        """The sampler's seed.

        Prompts differ in it: with one noise for all of them, the result might hold for it alone.
        """
        prompt, seed = pair
        # No sampler takes a larger one.
        return (self.seeds[seed] + SEED_STRIDE * prompt) % 2**64


TACATrials = io.Custom("TACA_TRIALS")


class TACATrial(io.ComfyNode):
    """Settings, seeds and prompts -> one of each; TACA Find Setting has copies give the others."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "TACATrial",
            inputs=[
                io.Model.Input("models", optional=True),
                io.Conditioning.Input("conditionings", optional=True),
                io.String.Input("labels", optional=True, force_input=True),
                io.String.Input("seeds", default="1, 2, 3, 4, 5, 6, 7, 8"),
                io.String.Input("prompts", default="", multiline=True),
                io.Int.Input("setting", default=1, min=1, max=10_000),
            ],
            outputs=[
                io.Model.Output("model", is_output_list=True),
                io.Conditioning.Output("conditioning", is_output_list=True),
                io.Int.Output("seed"),
                io.String.Output("prompt"),
                io.String.Output("label", is_output_list=True),
                TACATrials.Output("trials"),
            ],
            search_aliases=["taca", "search settings", "best gamma", "loop", "optimize"],
            is_input_list=True,
            accept_all_inputs=True,  # "search" and "left", in TACA Find Setting's copies
        )

    @classmethod
    def execute(
        cls,
        seeds: list[str],
        prompts: list[str],
        setting: list[int],
        models: list[Any] | None = None,
        conditionings: list[Any] | None = None,
        labels: list[str] | None = None,
        search: list[dict[str, Any]] | None = None,
        left: list[str] | None = None,
    ) -> io.NodeOutput:
        """Only TACA Find Setting's copies of this node have the last two inputs."""
        lists = [each for each in (models, conditionings) if each is not None]
        labels, numbers, texts = checked(lists, labels, seeds, prompts)
        if search:
            chosen, pair = settings_of(left, len(labels)), tuple(search[0]["pair"])
        elif setting[0] > len(labels):
            raise ValueError(
                f"{TRIAL} has {len(labels)} settings, and none of number {setting[0]}."
            )
        else:
            chosen, pair = [setting[0] - 1], (0, 0)
        drawn = [
            [each[i if len(each) > 1 else 0] for i in chosen]
            if each
            else [ExecutionBlocker(f"{TRIAL} has no {name}: connect them.")]
            for name, each in (("models", models), ("conditionings", conditionings))
        ]
        trials = Trials(tuple(labels), tuple(numbers), tuple(texts))
        named = [labels[i] for i in chosen]
        return io.NodeOutput(*drawn, trials.seed_of(pair), texts[pair[0]], named, trials)


def checked(
    lists: list[list[Any]], labels: list[str] | None, seeds: list[str], prompts: list[str]
) -> tuple[list[str], list[int], list[str]]:
    """The labels, seeds and prompts of TACA Trial.

    Raises ValueError if they do not fit together, or something would count twice.
    """
    if not lists:
        raise ValueError(f"{TRIAL} has no settings: connect models, or conditionings.")
    count = max(map(len, lists))
    if any(len(each) not in (1, count) for each in lists):
        raise ValueError(f"{TRIAL} needs as many conditionings as models, or one for all.")
    if len({tuple(id(each[i % len(each)]) for each in lists) for i in range(count)}) < count:
        raise ValueError(
            f"{TRIAL} has the same setting more than once: leave the seeds and prompts of TACA "
            f"Sweep empty, and write them here."
        )
    labels = labels or [f"setting {i + 1}" for i in range(count)]
    if len(labels) != count:
        raise ValueError(
            f"{TRIAL} has {count} settings and {len(labels)} labels: connect both from the same "
            f"sweep."
        )
    numbers = seeds_in(TRIAL, ", ".join(seeds))
    texts = lines("\n".join(prompts)) or [""]
    for what, values in (("seed", numbers), ("prompt", texts)):
        if len(set(values)) < len(values):
            raise ValueError(f"{TRIAL} has the same {what} twice, which would count as two.")
    return labels, numbers, texts


def settings_of(left: list[str] | None, count: int) -> list[int]:
    """The settings that remain after a round, by its record; before the first round, all."""
    return json.loads(left[0])["left"] if left else [*range(count)]
