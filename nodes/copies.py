"""Copies of the part of a graph between two nodes, for a node that expands to them."""

from collections.abc import Callable, Iterable
from typing import Any

from comfy_execution.graph_utils import GraphBuilder, is_link

Node = dict[str, Any]
Link = list[Any]


def between(node_of: Callable[[str], Node], source: str, ends: Iterable[Link]) -> list[str]:
    """The ids of the nodes on all paths from one to others, the source first.

    Empty if one of the ends is not reached.
    """
    leads_on = {source: True}

    def visit(node: str) -> bool:
        if node not in leads_on:
            leads_on[node] = False
            links = [each for each in node_of(node)["inputs"].values() if is_link(each)]
            leads_on[node] = any([visit(link[0]) for link in links])
        return leads_on[node]

    reached = [visit(end[0]) for end in ends]
    return [node for node, leads in leads_on.items() if leads] if all(reached) else []


def copy(
    graph: GraphBuilder,
    node_of: Callable[[str], Node],
    nodes: Iterable[str],
    name: str,
    changes: dict[str, Node],
) -> Callable[[Link], Link]:
    """Copy nodes into a graph, with ``changes`` to the inputs of some.

    Returns a function that redirects a link to the copies; links to other nodes stay. A copy shows
    its progress in the node that it was copied from.
    """
    copies = {node: graph.node(node_of(node)["class_type"], f"{name}.{node}") for node in nodes}

    def moved(value: Any) -> Any:
        if is_link(value) and value[0] in copies:
            return copies[value[0]].out(value[1])
        return value

    for node, made in copies.items():
        made.inputs = {key: moved(value) for key, value in node_of(node)["inputs"].items()}
        made.inputs |= changes.get(node, {})
        made.set_override_display_id(node)
    return moved
