"""Schemas of nodes, with their texts from ``locales/en/nodeDefs.json``."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from comfy_api.latest import io

LOCALES = Path(__file__).resolve().parents[2] / "locales"


@cache
def english() -> dict[str, Any]:
    """The English texts of all nodes, by node id, as ComfyUI's page reads them."""
    return json.loads((LOCALES / "en" / "nodeDefs.json").read_text("utf-8"))


def schema(
    node_id: str,
    inputs: list[io.Input],
    outputs: list[io.Output],
    search_aliases: list[str],
    category: str = "TACA",
    **more: Any,
) -> io.Schema:
    """A node's schema with the name, description and tooltips of the English locale.

    All other arguments are ``io.Schema``'s.
    """
    texts = english()[node_id]
    _add_tooltips(inputs, texts["inputs"])
    for i, socket in enumerate(outputs):
        socket.tooltip = texts["outputs"][str(i)]["tooltip"]
    return io.Schema(
        node_id=node_id,
        display_name=texts["display_name"],
        category=category,
        description=texts["description"],
        search_aliases=search_aliases,
        inputs=inputs,
        outputs=outputs,
        **more,
    )


def _add_tooltips(inputs: list[io.Input], texts: dict[str, Any], parent: str = "") -> None:
    """In the locale ``_`` joins the ids of an input and of one that depends on its choice."""
    for socket in inputs:
        socket.tooltip = texts[parent + socket.id]["tooltip"]
        for option in getattr(socket, "options", None) or []:
            _add_tooltips(getattr(option, "inputs", []), texts, f"{parent}{socket.id}_")
