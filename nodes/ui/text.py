"""A picture in a node, and text under it."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from comfy_api.latest import ui
from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context
from PIL import Image
from torch import Tensor

from .pictures import to_tensor


@dataclass
class Told:
    """What nodes have to say in one prompt, by their ids in the page."""

    runs: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    warnings: dict[str, dict[str, None]] = field(default_factory=lambda: defaultdict(dict))


@lru_cache(maxsize=1)
def told_in(prompt: str) -> Told:
    """Of the prompt with this id, until the next one."""
    return Told()


def queued_graph() -> dict[str, Any]:
    """The graph that runs, node id -> class_type and inputs; empty outside ComfyUI's execution."""
    context = get_executing_context()
    return get_progress_state().dynprompt.get_original_prompt() if context else {}


def node_in_page() -> str | None:
    """The id in the page of the running node, or of the node that it is a copy of."""
    context = get_executing_context()
    if context is None:
        return None
    return get_progress_state().dynprompt.get_display_node_id(context.node_id)


def show_text(text: str, node_id: str | None = None) -> None:
    """Show a text under a node, by default the running one; its ``ui`` alone does not do that."""
    if running := node_in_page():
        from server import PromptServer

        # The page collapses spaces, but not those as wide as a digit.
        wide = re.sub(" {2,}", lambda spaces: "\u2007" * len(spaces[0]), text)
        PromptServer.instance.send_progress_text(wide, node_id or running)


class NodeText:
    """The text under the node that is running now: what its runs did, and warnings.

    Before the first run it is ``plan`` and the warnings: ``warnings``, and what ``more`` says of
    the graph that is queued by then. Runs come first, since the page shows only about three lines:
    the last two of a prompt (a first pass and an upscale), or the last of ``total``. A node that
    runs for each of a list has the runs and warnings of all. The node has to be
    ``not_idempotent``, or ComfyUI would give its output, with this text, to another node with the
    same inputs.
    """

    def __init__(
        self,
        *warnings: str,
        plan: str = "",
        total: int | None = None,
        more: Callable[[], Iterable[str]] = tuple,
    ) -> None:
        self.node_id = node_in_page()
        self.warnings, self.total, self.more = warnings, total, more
        self._show([plan] if plan else [])

    def _show(self, lines: list[str]) -> None:
        if self.node_id and (context := get_executing_context()):
            warned = told_in(context.prompt_id).warnings[self.node_id]
            warned.update(dict.fromkeys([*self.warnings, *self.more()]))
            if lines or warned:
                show_text("\n".join([*lines, *warned]), self.node_id)

    def __call__(self, line: str) -> None:
        context = get_executing_context()
        if context and self.node_id:
            added = told_in(context.prompt_id).runs[self.node_id]
            added.append(line)
            last, count = added[-2:], len(added)
            if self.total:
                of = f" of {self.total}" if count <= self.total else ""  # a search takes more
                last = [f"{count}{of}: {line}"]
            elif count > 1:
                last = [f"Run {count - 1}: {last[0]}", f"Run {count}: {line}"]
            self._show(last)


def show(
    pictures: Sequence[Image.Image], text: str, node: Any
) -> tuple[list[Tensor], dict[str, Any]]:
    """Show pictures and a text in a running node; returns the IMAGEs, and the node's ``ui``."""
    show_text(text)
    images = [to_tensor(picture) for picture in pictures]
    shown = [ui.PreviewImage(image, cls=node).as_dict() for image in images]
    previews = {**shown[0], "images": [each for some in shown for each in some["images"]]}
    return images, {**previews, **ui.PreviewText(text).as_dict()}
