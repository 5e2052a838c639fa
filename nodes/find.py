"""TACA Trial and TACA Find Setting: the best of several settings, by any number.

Between the two lie the user's own nodes, from a sampler to a judge. TACA Find Setting expands to
copies of them, one for each seed of each prompt, which draws it with the settings that are left:
after each round of the search a copy of TACA Find Setting itself says which. So ComfyUI's own
executor draws, shows progress, can be interrupted, and keeps what each copy gave in its cache: a
search that was interrupted goes on there. All copies are made at once, for ComfyUI may drop what a
run has not asked for yet.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

import comfy.utils
import numpy as np
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker, GraphBuilder

from ..taca.search import Finding, Search, units_of
from .copies import Link, between, copy
from .sweep import parsed
from .ui import pictures
from .ui.finding import cost, intervals, sheet, verdict
from .ui.schema import schema
from .ui.text import show_text

TRIAL, FIND = "TACA Trial", "TACA Find Setting"
ROWS = 6
"""Of pictures on the sheet; its columns are the baseline, the best and the one after it."""
COLUMNS = 3
Pair = tuple[int, int]
"""A prompt and a seed, by their numbers."""
APART = 1000
"""Between the seeds of one prompt and of the next."""


@dataclass(frozen=True)
class Trials:
    """What a search compares, from TACA Trial."""

    labels: tuple[str, ...]
    seeds: tuple[int, ...]
    prompts: tuple[str, ...]

    def seed_of(self, pair: Pair) -> int:
        """The sampler's: with the same noise for all prompts, what is found might be its doing."""
        prompt, seed = pair
        return self.seeds[seed] + APART * prompt


TACATrials = io.Custom("TACA_TRIALS")


class TACATrial(io.ComfyNode):
    """Settings, seeds and prompts -> one of each; TACA Find Setting asks for the others."""

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
            accept_all_inputs=True,  # what TACA Find Setting asks a copy for, in "search"
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
        """The last two are TACA Find Setting's, in its copies of this node."""
        lists = [each for each in (models, conditionings) if each is not None]
        labels, numbers, lines = checked(lists, labels, seeds, prompts)
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
        trials = Trials(tuple(labels), tuple(numbers), tuple(lines))
        named = [labels[i] for i in chosen]
        return io.NodeOutput(*drawn, trials.seed_of(pair), lines[pair[0]], named, trials)


def checked(
    lists: list[list[Any]], labels: list[str] | None, seeds: list[str], prompts: list[str]
) -> tuple[list[str], list[int], list[str]]:
    """The labels, seeds and prompts of TACA Trial.

    Raises ValueError if they do not fit each other, or something would count twice.
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
    numbers = parsed(TRIAL, "seeds", ", ".join(seeds), int)
    lines = [line.strip() for line in "\n".join(prompts).splitlines() if line.strip()] or [""]
    for what, values in (("seed", numbers), ("prompt", lines)):
        if len(set(values)) < len(values):
            raise ValueError(f"{TRIAL} has the same {what} twice, which would count as two.")
    return labels, numbers, lines


def settings_of(left: list[str] | None, count: int) -> list[int]:
    """The settings that the record of a round leaves for the next; all in the first."""
    return json.loads(left[0])["left"] if left else [*range(count)]


class TACAFindSetting(io.ComfyNode):
    """A number for each picture of TACA Trial -> the setting with the largest, if there is one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "TACAFindSetting",
            inputs=[
                TACATrials.Input("trials"),
                io.MultiType.Input(
                    "score", [io.Float, io.Int, io.Boolean], lazy=True, raw_link=True
                ),
                io.Image.Input("image", lazy=True, raw_link=True, optional=True),
            ],
            outputs=[
                io.Image.Output("sheet"),
                io.Int.Output("setting"),
                io.String.Output("label"),
                io.String.Output("record"),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            search_aliases=[
                "taca",
                "best gamma",
                "best setting",
                "successive halving",
                "parameter search",
                "optimize",
            ],
            is_input_list=True,
            is_output_node=True,
            enable_expand=True,
            accept_all_inputs=True,  # the scores of the rounds before, in the copies of itself
        )

    @classmethod
    def execute(
        cls,
        trials: list[Trials],
        score: list[Link],
        image: list[Link] | None = None,
        search: list[dict[str, Any]] | None = None,
        given: list[Any] | None = None,
        left: list[str] | None = None,
        **drawn: list[Any],
    ) -> io.NodeOutput:
        """The graph's own node expands to copies, which have the last four inputs.

        One takes the scores of a prompt and seed, ``given``; one the records of these in a round,
        ``drawn``; ``left`` is the record of the round before.
        """
        compared = trials[0]
        if search and given:
            return kept(given, search[0], settings_of(left, len(compared.labels)))
        units = units_of(len(compared.prompts), len(compared.seeds))
        search_ = Search(len(compared.labels), len(units))
        if not drawn:
            ends = {"score": score[0]} | ({"image": image[0]} if image else {})
            return expand(cls.hidden, compared, search_, ends)
        rows = json.loads(left[0])["scores"] if left else []
        rows += [
            row
            for key, record in drawn.items()
            if key[:5] == "score"
            for row in json.loads(record[0])
        ]
        judged = dict[Pair, dict[int, float]]()
        for prompt, seed, setting, value in rows:
            judged.setdefault((prompt, seed), {})[setting] = value
        while search_.todo:
            new = [pair for unit in search_.todo.units for pair in units[unit]]
            if new[0] not in judged:
                record = json.dumps({"left": search_.alive, "scores": rows})
                return io.NodeOutput(None, None, None, record)
            by_pair = [[judged[pair][setting] for pair in new] for setting in search_.alive]
            shape = len(search_.alive), len(search_.todo.units), -1
            search_.add(np.reshape(by_pair, shape).mean(-1))
        found = search_.finding()
        count, whole = (len(units[0]) * each for each in search_.pictures())
        text = f"{verdict(found, compared.labels)}\n{cost(count, whole)}"
        unit = "prompts" if len(compared.prompts) == len(units) else "pictures"
        chart = intervals(found, search_, compared.labels, unit)
        shown = shown_of(compared, search_, judged, drawn)
        page = pictures.to_tensor(sheet(text, chart, shown, min(COLUMNS, search_.settings)))
        show_text(text)
        winner = found.winner or 0
        record = json.dumps(record_of(compared, found) | {"scores": rows})
        preview = ui.PreviewImage(page, cls=cls)
        return io.NodeOutput(page, winner + 1, compared.labels[winner], record, ui=preview)


def socket(name: str, pair: Pair) -> str:
    """The input of TACA Find Setting for what came out of one prompt and seed."""
    return f"{name}_{pair[0]}_{pair[1]}"


def as_numbers(given: list[Any], count: int) -> list[float]:
    """The judge's numbers for so many pictures; ValueError if they are not."""
    if len(given) != count:
        raise ValueError(
            f"{FIND} got {len(given)} scores for {count} pictures: between {TRIAL} and the score "
            f"there may be no node that makes one of several."
        )
    numbers = [float(each) for each in given]
    if not np.isfinite(numbers).all():
        raise ValueError(f"{FIND} got a score that is not a finite number: {numbers}.")
    return numbers


def kept(given: list[Any], asked: dict[str, Any], settings: list[int]) -> io.NodeOutput:
    """The record of one prompt and seed; shows in the user's node how far the search is."""
    numbers = as_numbers(given, len(settings))
    node, done, total = asked["node"], asked["done"], asked["total"]
    comfy.utils.ProgressBar(total, node_id=node).update_absolute(done)
    show_text(f"{done} of {total} pictures; {len(settings)} settings left", node)
    rows = [[*asked["pair"], *each] for each in zip(settings, numbers, strict=True)]
    return io.NodeOutput(None, None, None, json.dumps(rows))


def expand(hidden: Any, compared: Trials, search: Search, ends: dict[str, Link]) -> io.NodeOutput:
    """All copies that a search may need: of the user's nodes, and of itself."""
    node_of, own = hidden.dynprompt.get_node, hidden.unique_id
    trial = node_of(own)["inputs"]["trials"][0]
    nodes = between(node_of, trial, ends.values())
    if not nodes or node_of(trial)["class_type"] != "TACATrial":
        raise ValueError(
            f"{FIND}: {' and '.join(ends)} must come from the pictures of the {TRIAL} that it is "
            f"connected to."
        )
    units = units_of(len(compared.prompts), len(compared.seeds))
    graph, images = GraphBuilder(), dict[str, Link]()
    inputs, left = node_of(own)["inputs"], dict[str, Link]()
    done, total = 0, search.pictures()[0] * len(units[0])
    for number, each in enumerate(search.plan):
        scores = dict[str, Link]()
        for pair in (pair for unit in each.units for pair in units[unit]):
            done += each.settings + 1
            asked = {"node": own, "pair": pair, "done": done, "total": total}
            name, mine = f"{pair[0]}_{pair[1]}", {"search": {"pair": pair}} | left
            moved = copy(graph, node_of, nodes, name, {trial: mine})
            given = {"search": asked, "given": moved(ends["score"])} | left
            record = graph.node("TACAFindSetting", f"{name}.score", **inputs, **given)
            scores[socket("score", pair)] = record.out(3)
            if "image" in ends and not number and len(images) < ROWS:
                images[socket("image", pair)] = moved(ends["image"])
        shown = images if number == len(search.plan) - 1 else {}
        judge = graph.node("TACAFindSetting", str(number), **inputs, **scores, **shown, **left)
        left = {"left": judge.out(3)}
    return io.NodeOutput(*(judge.out(i) for i in range(4)), expand=graph.finalize())


def shown_of(
    compared: Trials, search: Search, scores: dict[Pair, dict[int, float]], drawn: dict[str, Any]
) -> list[tuple[Any, str]]:
    """The first pictures of the baseline and the best settings, with what is written above them."""
    names = compared.labels
    rank = sorted(search.differences, key=lambda i: search.differences[i][::-1], reverse=True)
    shown = []
    for pair, judged in list(scores.items())[:ROWS]:
        images = drawn.get(socket("image", pair), [])
        if len(images) != len(judged):
            continue
        by_setting = dict(zip(judged, images, strict=True))
        for column, setting in enumerate([0, *rank][:COLUMNS]):
            about = f"{names[setting]}: {judged[setting]:.3g}"
            if not column:
                about = f"{compared.prompts[pair[0]]} (seed {compared.seed_of(pair)}). {about}"
            shown.append((pictures.to_picture(by_setting[setting][0]), about))
    return shown


def record_of(compared: Trials, found: Finding) -> dict[str, Any]:
    """What was found, in numbers; settings by their places, counted from 0."""
    return {
        "settings": list(compared.labels),
        "prompts": len(compared.prompts),
        "seeds": list(compared.seeds),
        "best": found.best,
        "difference": found.difference,
        "interval": [found.low, found.high] if math.isfinite(found.high) else None,
        "winner": found.winner,
    }
