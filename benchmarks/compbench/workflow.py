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
    output : str
        The node whose picture is taken.
    """

    graph: Graph
    prompt: tuple[Place, ...]
    seed: Place
    gamma: Place
    output: str

    def filled(self, unit: Unit) -> Graph:
        """The graph of one picture."""
        graph = copy.deepcopy(self.graph)
        for node, name in self.prompt:
            inputs = graph[node]["inputs"]
            inputs[name] = inputs[name].replace(MARK, unit.prompt)
        for (node, name), value in ((self.seed, unit.seed), (self.gamma, unit.gamma)):
            graph[node]["inputs"][name] = value
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
                for node, name in (*self.prompt, self.seed, self.gamma)
            )
        except (OSError, ValueError, KeyError, TypeError):
            return True  # what is wrong with a file, `store` says

    def json(self) -> dict[str, Any]:
        """All of it, as it comes back from a file."""
        return json.loads(json.dumps(asdict(self)))


def read_workflow(
    file: Path,
    prompt: str | None = None,
    seed: str | None = None,
    gamma: str | None = None,
    output: str | None = None,
) -> Workflow:
    """Read a workflow and find its places, where they are not named.

    Parameters
    ----------
    file : Path
        The API form.
    prompt, seed, gamma : str, optional
        ``NODE.INPUT``. By default the prompt goes where the workflow has ``{prompt}``, else into
        the one text before a sampler's or guider's positive; the seed and TACA's gamma into the
        only ones there are.
    output : str, optional
        Node id. Whatever this node does not need is left out of the graph.

    Raises
    ------
    Problem
        If it is another file, or a place is missing or in doubt.
    """
    graph = _read(file)
    output = _output(graph, output)
    kept = _upstream(graph, [output])
    graph = {node: copy.deepcopy(content) for node, content in graph.items() if node in kept}
    places = {
        "prompt": [_named(graph, prompt)] if prompt else _prompts(graph),
        "seed": [_named(graph, seed)] if seed else _literals(graph, graph, _SEEDS, int),
        "gamma": [_named(graph, gamma)] if gamma else _gammas(graph),
    }
    for what, found in places.items():
        if len(found) != 1 and not (what == "prompt" and _marked(graph)):
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
    return Workflow(graph, tuple(places["prompt"]), places["seed"][0], places["gamma"][0], output)


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
    if _is_link(graph, graph[node]["inputs"][name]):
        raise Problem(f"{text} is connected to another node: name that node's input.")
    return node, name


def _literals(graph: Graph, nodes: Iterable[str], names: Iterable[str], kind: type) -> list[Place]:
    """The inputs of these names that hold a value of that kind."""
    return [
        (node, name)
        for node in graph
        if node in nodes
        for name, value in graph[node]["inputs"].items()
        if name in names and isinstance(value, kind) and not isinstance(value, bool)
    ]


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
    return _literals(graph, _upstream(graph, starts, without="negative"), _TEXTS, str)


def _gammas(graph: Graph) -> list[Place]:
    found = []
    for node, content in graph.items():
        if content["class_type"].startswith("TACA") and not _is_link(
            graph,
            content["inputs"].get("schedule"),  # it replaces the node's own gamma
        ):
            found += _literals(graph, [node], ["gamma"], (int, float))  # type: ignore[arg-type]
    return found


def _doubt(what: str, found: list[Place], graph: Graph) -> str:
    """A place that is missing or in doubt, and what to do."""
    where = ", ".join(
        f"{node}{'.' * bool(name)}{name} ({graph[node]['class_type']})" for node, name in found
    )
    have = f"has {len(found)} places for it: {where}" if found else "has no place for it"
    out = {
        "prompt": f"Write {MARK} where it goes, or name the place with --prompt-at NODE.INPUT.",
        "seed": "Name the place with --seed-at NODE.INPUT.",
        "gamma": "It needs a TACA Patch Model; name the place with --gamma-at NODE.INPUT.",
        "output": "Name the node that saves the picture with --output NODE.",
    }[what]
    return f"The workflow's {what}: it {have}. {out}"
