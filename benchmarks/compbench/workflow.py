"""A workflow's API form, with places for the prompt, the seed and gamma."""

from __future__ import annotations

import copy
import json
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

MARK = "{prompt}"
_TEXTS = ("text", "prompt", "value")
_SEEDS = ("seed", "noise_seed")
_TACA = "TACAPatchModel"
_OF_TACA = (_TACA, "TACASchedule", "TACAOptions")
_HELP = {
    "prompt": f"Write {MARK} where it goes, or name the place with --prompt-at NODE.INPUT.",
    "seed": "Name the place with --seed-at NODE.INPUT.",
    "gamma": "It needs a TACA node; name the place with --gamma-at NODE.INPUT. "
    "(--gammas 1 draws a workflow without one.)",
    "output": "Name the node that saves the picture with --output NODE.",
}
Graph = dict[str, Any]
Place = str  # NODE.INPUT, as on the command line


class Problem(Exception):
    """What keeps a run from its result, in words that name the way out."""


class Unit(NamedTuple):
    """One picture; its path is in the output folder, with ``/``."""

    path: str
    prompt: str
    seed: int
    gamma: float


@dataclass
class Workflow:
    """What draws one picture; without TACA it draws gamma 1 alone, and has no place for gamma."""

    graph: Graph
    prompt: list[Place]
    seed: Place
    gamma: Place | None
    output: str

    def filled(self, unit: Unit) -> Graph:
        """The graph of one picture."""
        graph = copy.deepcopy(self.graph)
        for place in self.prompt:
            _set(graph, place, _value(graph, place).replace(MARK, unit.prompt))
        _set(graph, self.seed, unit.seed)
        if self.gamma:
            _set(graph, self.gamma, unit.gamma)
        # ComfyUI counts up over a folder. Servers that share one would overwrite one another.
        if (prefix := f"{self.output}.filename_prefix") in _places(graph):
            name = uuid.uuid4().hex
            _set(graph, prefix, f"compbench/{name[:2]}/{name}")
        return graph

    def asks_for(self, unit: Unit, graph: Graph) -> bool:
        """Whether a graph, as ComfyUI writes it into a picture, is that of this unit."""
        wanted = self.filled(unit)
        places = filter(None, (*self.prompt, self.seed, self.gamma))
        return all(_value(graph, place) == _value(wanted, place) for place in places)

    def loras(self) -> list[str]:
        """The nodes that load LoRAs."""
        kinds = {content["class_type"] for content in self.graph.values()}
        return sorted(kind for kind in kinds if "lora" in kind.lower())

    def differences(self, other: Workflow) -> list[str]:
        """In which values two differ, beside TACA's, LoRAs' and those filled in."""
        return sorted(self._values() ^ other._values())

    def _values(self) -> set[str]:
        return {
            f"{content['class_type']}.{name} {value!r}"
            for node, content in self.graph.items()
            if node != self.output and content["class_type"] not in (*_OF_TACA, *self.loras())
            for name, value in content["inputs"].items()
            if value is not None and not _is_link(self.graph, value)
        }


def read_workflow(
    file: Path,
    prompt: Place | None = None,
    seed: Place | None = None,
    gamma: Place | None = None,
    output: str | None = None,
    is_plain: bool = False,
) -> Workflow:
    """Read an API form and find its places, where they are not named.

    One that is missing or in doubt is a `Problem`. A plain workflow, for gamma 1 alone, need not
    have a gamma.
    """
    graph = _read(file)
    output = _output(graph, output)
    graph = _needed(graph, output)
    prompts = [_named(graph, prompt)] if prompt else _marked(graph)
    prompts = prompts or [_only("prompt", _prompts(graph), graph)]
    seeds = [_named(graph, seed)] if seed else _literals(graph, graph, _SEEDS, int)
    seed = _only("seed", seeds, graph)
    if gamma or not is_plain or any(c["class_type"] == _TACA for c in graph.values()):
        gamma = _only("gamma", [_named(graph, gamma)] if gamma else _gammas(graph), graph)
    for place in prompts:
        if MARK not in str(_value(graph, place)):
            _set(graph, place, MARK)
    # What is filled in does not count where two runs are compared.
    for place in {seed, gamma, f"{output}.filename_prefix"} & {*_places(graph)}:
        _set(graph, place, None)
    return Workflow(graph, prompts, seed, gamma, output)


def _read(file: Path) -> Graph:
    try:
        graph = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise Problem(f"Cannot read the workflow {file}: {error}") from error
    nodes = graph.values() if isinstance(graph, dict) else [None]
    if not all(isinstance(n, dict) and {"class_type", "inputs"} <= n.keys() for n in nodes):
        raise Problem(
            f"{file} is not a workflow in ComfyUI's API form. Open it in ComfyUI's page and export "
            f"that (menu: File, Export (API))."
        )
    return graph


def _value(graph: Graph, place: Place) -> Any:
    node, _, name = place.partition(".")
    return graph[node]["inputs"][name]


def _set(graph: Graph, place: Place, value: Any) -> None:
    node, _, name = place.partition(".")
    graph[node]["inputs"][name] = value


def _places(graph: Graph) -> list[Place]:
    return [f"{node}.{name}" for node in graph for name in graph[node]["inputs"]]


def _is_link(graph: Graph, value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and value[0] in graph


def _needed(graph: Graph, *nodes: str, without: str | None = None) -> Graph:
    """These nodes and all that they need, not counting inputs of one name; in the graph's order."""
    found: set[str] = set()
    todo = list(nodes)
    while todo:
        if (node := todo.pop()) not in found:
            found.add(node)
            inputs = graph[node]["inputs"].items()
            todo += [v[0] for name, v in inputs if name != without and _is_link(graph, v)]
    return {node: content for node, content in graph.items() if node in found}


def _output(graph: Graph, named: str | None) -> str:
    """The node whose picture is taken: the one that gets a picture and feeds no other."""
    if named in graph:
        return named
    if named:
        raise Problem(f"The workflow has no node {named}; it has {', '.join(graph)}.")
    values = [_value(graph, place) for place in _places(graph)]
    ends = graph.keys() - {value[0] for value in values if _is_link(graph, value)}
    pictures = [p for p in _places(graph) if p.endswith((".images", ".image"))]
    nodes = [p.partition(".")[0] for p in pictures if _is_link(graph, _value(graph, p))]
    found = [node for node in dict.fromkeys(nodes) if node in ends]
    behind = [node for node in found if _gammas(_needed(graph, node))]
    # Of two side by side, without and with TACA, the latter.
    return _only("output", behind if len(behind) == 1 else found, graph)


def _named(graph: Graph, place: Place) -> Place:
    if place not in _places(graph):
        raise Problem(f"The picture needs no input {place}. It needs {', '.join(_places(graph))}.")
    source = _source(graph, place)
    if _is_link(graph, _value(graph, source)):
        raise Problem(f"{place} is connected to another node: name that node's input.")
    return source


def _source(graph: Graph, place: Place) -> Place:
    """Where an input's value is written: there, or in a primitive (PrimitiveInt and its kin)."""
    value = _value(graph, place)
    if not _is_link(graph, value):
        return place
    origin = graph[value[0]]
    is_primitive = origin["class_type"].startswith("Primitive") and "value" in origin["inputs"]
    return _source(graph, f"{value[0]}.value") if is_primitive else place


def _literals(
    graph: Graph, nodes: Iterable[str], names: Iterable[str], *kinds: type
) -> list[Place]:
    """The inputs of these names that hold such a value, or the primitives they come from, once."""
    inputs = [(node, name) for node in nodes for name in graph[node]["inputs"] if name in names]
    found = dict.fromkeys(_source(graph, f"{node}.{name}") for node, name in inputs)
    return [place for place in found if type(_value(graph, place)) in kinds]


def _marked(graph: Graph) -> list[Place]:
    values = [(place, _value(graph, place)) for place in _places(graph)]
    return [place for place, text in values if isinstance(text, str) and MARK in text]


def _prompts(graph: Graph) -> list[Place]:
    """The text before a sampler's positive, or a guider's."""
    inputs = [content["inputs"] for content in graph.values()]
    guiders = [c["inputs"] for c in graph.values() if "Guider" in c["class_type"]]
    starts = [i["positive"] for i in inputs if "positive" in i]
    starts = starts or [i["conditioning"] for i in guiders if "conditioning" in i]
    nodes = [link[0] for link in starts if _is_link(graph, link)]
    return _literals(graph, _needed(graph, *nodes, without="negative"), _TEXTS, str)


def _gammas(graph: Graph) -> list[Place]:
    """Those of TACA's nodes, but where a schedule replaces the node's own."""
    taca = {node: c["inputs"] for node, c in graph.items() if c["class_type"].startswith("TACA")}
    nodes = [node for node, inputs in taca.items() if not _is_link(graph, inputs.get("schedule"))]
    return _literals(graph, nodes, ["gamma"], int, float)


def _only(what: str, found: list[str], graph: Graph) -> str:
    """The one place or node that was found; if there is not one, what to do."""
    if len(found) == 1:
        return found[0]
    where = ", ".join(f"{f} ({graph[f.partition('.')[0]]['class_type']})" for f in found)
    have = f"has {len(found)} places for it: {where}" if found else "has no place for it"
    raise Problem(f"The workflow's {what}: it {have}. {_HELP[what]}")
