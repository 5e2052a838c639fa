"""A workflow's API form, with places for the prompt, the seed and gamma."""

from __future__ import annotations

import copy
import io
import json
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from .plan import Problem, Unit

MARK = "{prompt}"
_TEXTS = ("text", "prompt", "value")
_SEEDS = ("seed", "noise_seed")
_PICTURES = ("images", "image")
_TACA = "TACAPatchModel"
_OF_TACA = (_TACA, "TACASchedule", "TACAOptions")
Graph = dict[str, Any]
Place = tuple[str, str]
"""Node id and name of an input; on the command line ``NODE.INPUT``."""


@dataclass(frozen=True)
class Workflow:
    """What draws one picture.

    Attributes
    ----------
    graph : dict
        Node id -> class_type and inputs, with ``{prompt}`` where the prompt goes.
    gamma : Place, optional
        None in a workflow without TACA, which draws gamma 1 alone.
    output : str
        The node whose picture is taken.
    """

    graph: Graph
    prompt: tuple[Place, ...]
    seed: Place
    gamma: Place | None
    output: str

    def filled(self, unit: Unit) -> Graph:
        """The graph of one picture."""
        graph = copy.deepcopy(self.graph)
        for node, name in self.prompt:
            inputs = graph[node]["inputs"]
            inputs[name] = inputs[name].replace(MARK, unit.prompt)
        graph[self.seed[0]]["inputs"][self.seed[1]] = unit.seed
        if self.gamma:
            graph[self.gamma[0]]["inputs"][self.gamma[1]] = unit.gamma
        # ComfyUI counts up over a folder. Servers that share one would overwrite one another.
        inputs = graph[self.output]["inputs"]
        if "filename_prefix" in inputs:
            name = uuid.uuid4().hex
            inputs["filename_prefix"] = f"compbench/{name[:2]}/{name}"
        return graph

    def drew(self, picture: bytes, unit: Unit) -> bool:
        """Whether a PNG is this unit's, by the graph that ComfyUI writes into it; True if none."""
        try:
            with Image.open(io.BytesIO(picture)) as image:
                drawn = json.loads(image.info["prompt"])
            wanted = self.filled(unit)
            return all(
                drawn[node]["inputs"][name] == wanted[node]["inputs"][name]
                for node, name in filter(None, (*self.prompt, self.seed, self.gamma))
            )
        except (OSError, ValueError, KeyError, TypeError):
            return True  # what is wrong with a file, `store` says

    def json(self) -> dict[str, Any]:
        """All of it, as it comes back from a file."""
        return json.loads(json.dumps(asdict(self)))


def loras(workflow: dict[str, Any]) -> list[str]:
    """The nodes of a workflow's JSON that load LoRAs."""
    return sorted({c["class_type"] for c in workflow["graph"].values() if _is_lora(c)})


def differences(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """In which values two workflows' JSON differ, beside TACA's, LoRAs' and those filled in."""
    found = []
    for workflow in (mine, theirs):
        graph = workflow["graph"]
        found.append({
            f"{content['class_type']}.{name} {value!r}"
            for node, content in graph.items()
            if node != workflow["output"]
            and not (content["class_type"] in _OF_TACA or _is_lora(content))
            for name, value in content["inputs"].items()
            if value is not None and not _is_link(graph, value)
        })  # fmt: skip
    return sorted(found[0] ^ found[1])


def _is_lora(content: dict[str, Any]) -> bool:
    return "lora" in content["class_type"].lower()


def read_workflow(
    file: Path,
    prompt: str | None = None,
    seed: str | None = None,
    gamma: str | None = None,
    output: str | None = None,
    plain: bool = False,
) -> Workflow:
    """Read a workflow and find its places, where they are not named.

    Parameters
    ----------
    file : Path
        The API form.
    prompt, seed, gamma : str, optional
        ``NODE.INPUT``. By default the prompt goes where the workflow has ``{prompt}``, else into
        the one text before a sampler's or guider's positive; the seed and TACA's gamma into the
        only ones there are, or the primitives that they come from.
    output : str, optional
        Node id. Whatever this node does not need is left out of the graph. By default the only one
        that shows a picture, or the only one of them behind a gamma.
    plain : bool
        Whether there need be no gamma, since gamma 1 alone is drawn.

    Raises
    ------
    Problem
        If it is another file, or a place is missing or in doubt.
    """
    graph = _read(file)
    output = _output(graph, output)
    graph = copy.deepcopy(_needed(graph, output))
    places = {
        "prompt": [_named(graph, prompt)] if prompt else _prompts(graph),
        "seed": [_named(graph, seed)] if seed else _literals(graph, graph, _SEEDS, (int,)),
        "gamma": [_named(graph, gamma)] if gamma else _gammas(graph),
    }
    without = plain and all(c["class_type"] != _TACA for c in graph.values())
    for what, found in places.items():
        marked = what == "prompt" and _marked(graph)
        if len(found) != 1 and not marked and not (what == "gamma" and without):
            raise Problem(_doubt(what, found, graph))
    for node, name in places["prompt"]:
        inputs = graph[node]["inputs"]
        if not isinstance(inputs[name], str) or MARK not in inputs[name]:
            inputs[name] = MARK
    for node, name in (*places["seed"], *places["gamma"]):
        graph[node]["inputs"][name] = None
    inputs = graph[output]["inputs"]
    if "filename_prefix" in inputs:
        inputs["filename_prefix"] = None
    gammas = places["gamma"] or [None]
    return Workflow(graph, tuple(places["prompt"]), places["seed"][0], gammas[0], output)


def _read(file: Path) -> Graph:
    try:
        graph = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise Problem(f"Cannot read the workflow {file}: {error}") from error
    if isinstance(graph, dict) and isinstance(graph.get("nodes"), list):
        raise Problem(
            f"{file} is what ComfyUI's page saves. Open it there and export the API form "
            f"(menu: File, Export (API))."
        )
    nodes = graph.values() if isinstance(graph, dict) else [None]
    if not all(isinstance(n, dict) and {"class_type", "inputs"} <= n.keys() for n in nodes):
        raise Problem(f"{file} is not a workflow in ComfyUI's API form.")
    return graph


def _is_link(graph: Graph, value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and value[0] in graph


def _upstream(graph: Graph, start: Iterable[str], without: str | None = None) -> set[str]:
    """These nodes and all that they need, not counting inputs of one name."""
    found: set[str] = set()
    todo = list(start)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            inputs = graph[node]["inputs"].items()
            todo += [v[0] for name, v in inputs if name != without and _is_link(graph, v)]
    return found


def _needed(graph: Graph, output: str) -> Graph:
    """The part of a graph that one node needs."""
    kept = _upstream(graph, [output])
    return {node: content for node, content in graph.items() if node in kept}


def _output(graph: Graph, named: str | None) -> str:
    """The node whose picture is taken: the one that gets a picture and feeds no other."""
    if named is not None:
        if named not in graph:
            raise Problem(f"The workflow has no node {named}; it has {', '.join(graph)}.")
        return named
    feeding = {
        value[0]
        for content in graph.values()
        for value in content["inputs"].values()
        if _is_link(graph, value)
    }
    found = [
        node
        for node, content in graph.items()
        if node not in feeding
        and any(_is_link(graph, content["inputs"].get(name)) for name in _PICTURES)
    ]
    if len(found) > 1:  # without and with TACA, side by side
        behind = [node for node in found if _gammas(_needed(graph, node))]
        found = behind if len(behind) == 1 else found
    if len(found) == 1:
        return found[0]
    raise Problem(_doubt("output", [(node, "") for node in found], graph))


def _named(graph: Graph, text: str) -> Place:
    node, _, name = text.partition(".")
    if node not in graph or name not in graph[node]["inputs"]:
        known = [
            f"{n}.{i}"
            for n, c in graph.items()
            for i, v in c["inputs"].items()
            if not _is_link(graph, v)
        ]
        raise Problem(f"The workflow's picture needs no input {text}. It has {', '.join(known)}.")
    node, name = _source(graph, (node, name))
    if _is_link(graph, graph[node]["inputs"][name]):
        raise Problem(f"{text} is connected to another node: name that node's input.")
    return node, name


def _literals(
    graph: Graph, nodes: Iterable[str], names: Iterable[str], kinds: tuple[type, ...]
) -> list[Place]:
    """The inputs of these names that hold a value of these kinds, or the primitives they come from.

    A primitive that feeds several is one place.
    """
    found = {}
    for node in graph:
        for name in graph[node]["inputs"] if node in nodes else ():
            place = _source(graph, (node, name)) if name in names else None
            value = graph[place[0]]["inputs"][place[1]] if place else None
            if isinstance(value, kinds) and not isinstance(value, bool):
                found[place] = None
    return list(found)


def _source(graph: Graph, place: Place) -> Place:
    """Where an input's value is written: there, or in a primitive (PrimitiveInt and its kin)."""
    value = graph[place[0]]["inputs"][place[1]]
    if not _is_link(graph, value):
        return place
    origin = graph[value[0]]
    is_primitive = origin["class_type"].startswith("Primitive") and "value" in origin["inputs"]
    return _source(graph, (value[0], "value")) if is_primitive else place


def _marked(graph: Graph) -> list[Place]:
    return [
        (node, name)
        for node, content in graph.items()
        for name, value in content["inputs"].items()
        if isinstance(value, str) and MARK in value
    ]


def _prompts(graph: Graph) -> list[Place]:
    if marked := _marked(graph):
        return marked
    inputs = [content["inputs"] for content in graph.values()]
    guiders = [c["inputs"] for c in graph.values() if "Guider" in c["class_type"]]
    starts = [i["positive"] for i in inputs if "positive" in i]
    starts = starts or [i["conditioning"] for i in guiders if "conditioning" in i]
    starts = [link[0] for link in starts if _is_link(graph, link)]
    return _literals(graph, _upstream(graph, starts, without="negative"), _TEXTS, (str,))


def _gammas(graph: Graph) -> list[Place]:
    found = []
    for node, content in graph.items():
        if content["class_type"].startswith("TACA") and not _is_link(
            graph,
            content["inputs"].get("schedule"),  # it replaces the node's own gamma
        ):
            found += _literals(graph, [node], ["gamma"], (int, float))
    return list(dict.fromkeys(found))


def _doubt(what: str, found: list[Place], graph: Graph) -> str:
    """A place that is missing or in doubt, and what to do."""
    where = ", ".join(
        f"{node}{'.' * bool(name)}{name} ({graph[node]['class_type']})" for node, name in found
    )
    have = f"has {len(found)} places for it: {where}" if found else "has no place for it"
    out = {
        "prompt": f"Write {MARK} where it goes, or name the place with --prompt-at NODE.INPUT.",
        "seed": "Name the place with --seed-at NODE.INPUT.",
        "gamma": "It needs a TACA Patch Model; name the place with --gamma-at NODE.INPUT. "
        "(--gammas 1 draws a workflow without one.)",
        "output": "Name the node that saves the picture with --output NODE.",
    }[what]
    return f"The workflow's {what}: it {have}. {out}"
