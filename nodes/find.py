"""TACA Find Setting: the best of TACA Trial's settings, by any number.

Between the two lie the user's own nodes, from a sampler to a judge. TACA Find Setting expands to
copies of them, one for each seed of each prompt, which draw it with the settings that are left:
after each round of the search a copy of TACA Find Setting itself says which those are. So ComfyUI's
own executor draws, shows progress, can be interrupted, and caches the results: a search that was
interrupted resumes from them. All copies are made at once, since ComfyUI may drop from its cache
what a run has not requested yet.
"""

import json
import math
from typing import Any

import comfy.utils
import numpy as np
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import GraphBuilder, is_link

from ..taca.search import Finding, Search, units_of
from .copies import Link, between, copy
from .trial import TRIAL, Pair, TACATrials, Trials, settings_of
from .ui import pictures
from .ui.finding import cost, intervals, sheet, verdict
from .ui.schema import schema
from .ui.text import show_text

FIND = "TACA Find Setting"
ROWS = 6
"""Rows of pictures on the sheet; the columns are the baseline, the best and the second best."""
COLUMNS = 3


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
        """The user's node expands to copies of itself, which alone have the last four inputs.

        There are two kinds of copies. One takes the scores of a prompt and a seed, ``given``; the
        other the records of all these in a round, ``drawn``. ``left`` is the record of the round
        before.
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
        for name, scores in drawn.items():
            if name.startswith("score"):
                rows += json.loads(scores[0])
        judged = dict[Pair, dict[int, float]]()
        for prompt, seed, setting, value in rows:
            judged.setdefault((prompt, seed), {})[setting] = value
        if not advance(search_, units, judged):
            record = json.dumps({"left": search_.alive, "scores": rows})
            return io.NodeOutput(None, None, None, record)
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


def advance(search: Search, units: list[list[Pair]], judged: dict[Pair, dict[int, float]]) -> bool:
    """Add the rounds whose scores are there to a search; returns whether it is finished."""
    while search.todo:
        pairs = [pair for unit in search.todo.units for pair in units[unit]]
        if pairs[0] not in judged:
            return False
        by_pair = [[judged[pair][setting] for pair in pairs] for setting in search.alive]
        shape = len(search.alive), len(search.todo.units), -1
        search.add(np.reshape(by_pair, shape).mean(-1))
    return True


def socket(name: str, pair: Pair) -> str:
    """The name of TACA Find Setting's input for the result of one prompt and seed."""
    return f"{name}_{pair[0]}_{pair[1]}"


def as_numbers(given: list[Any], count: int) -> list[float]:
    """The judge's scores for ``count`` pictures.

    Raises ValueError if there are more or fewer, or one is not finite.
    """
    if len(given) != count:
        raise ValueError(
            f"{FIND} got {len(given)} scores for {count} pictures. Take out the node between "
            f"{TRIAL} and the score that changes their number, for instance by joining them."
        )
    try:
        numbers = [float(each) for each in given]
    except (TypeError, ValueError, RuntimeError):  # the last of a tensor of several
        numbers = [math.nan]
    if not np.isfinite(numbers).all():
        raise ValueError(f"{FIND} got a score that is not a finite number: {given!s:.200}.")
    return numbers


def kept(given: list[Any], search: dict[str, Any], settings: list[int]) -> io.NodeOutput:
    """The record of one prompt and seed; the user's node shows the progress of the search."""
    numbers = as_numbers(given, len(settings))
    node, done, total = search["node"], search["done"], search["total"]
    comfy.utils.ProgressBar(total, node_id=node).update_absolute(done)
    show_text(f"{done} of {total} pictures; {len(settings)} settings left", node)
    rows = [[*search["pair"], *each] for each in zip(settings, numbers, strict=True)]
    return io.NodeOutput(None, None, None, json.dumps(rows))


def expand(hidden: Any, compared: Trials, search: Search, ends: dict[str, Link]) -> io.NodeOutput:
    """All copies that a search may need: of the user's nodes, and of TACA Find Setting.

    Raises ValueError if score or image are typed in, or not of the pictures of its TACA Trial.
    """
    for name, end in ends.items():
        if not is_link(end):
            raise ValueError(f"{FIND}: {name} must be connected to a node that judges or draws.")
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
            progress = {"node": own, "pair": pair, "done": done, "total": total}
            name, mine = f"{pair[0]}_{pair[1]}", {"search": {"pair": pair}} | left
            moved = copy(graph, node_of, nodes, name, {trial: mine})
            given = {"search": progress, "given": moved(ends["score"])} | left
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
    """The first pictures of the baseline and of the best settings, with their captions."""
    names = compared.labels
    shown = []
    for pair, judged in list(scores.items())[:ROWS]:
        images = drawn.get(socket("image", pair), [])
        if len(images) != len(judged):
            continue
        by_setting = dict(zip(judged, images, strict=True))
        for column, setting in enumerate([0, *search.ranking][:COLUMNS]):
            about = f"{names[setting]}: {judged[setting]:.3g}"
            if not column:
                about = f"{compared.prompts[pair[0]]} (seed {compared.seed_of(pair)}). {about}"
            shown.append((pictures.to_picture(by_setting[setting][0]), about))
    return shown


def record_of(compared: Trials, found: Finding) -> dict[str, Any]:
    """The finding as JSON has it; settings by their indices, from 0."""
    return {
        "settings": list(compared.labels),
        "prompts": len(compared.prompts),
        "seeds": list(compared.seeds),
        "best": found.best,
        "difference": found.difference,
        "interval": [found.low, found.high] if math.isfinite(found.high) else None,
        "winner": found.winner,
    }
