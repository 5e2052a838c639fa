"""A picture in a node, and text under it."""

import re
from typing import Any

from comfy_api.latest import ui
from comfy_execution.utils import get_executing_context
from PIL import Image
from torch import Tensor

from .pictures import to_tensor


def show_text(text: str) -> None:
    """Show a text under the node that is running, which its ``ui`` alone does not do."""
    context = get_executing_context()
    if context:
        from server import PromptServer

        # The page folds spaces; those as wide as a digit keep columns apart.
        wide = re.sub(" {2,}", lambda spaces: "\u2007" * len(spaces[0]), text)
        PromptServer.instance.send_progress_text(wide, context.node_id)


def show(picture: Image.Image, text: str, node: Any) -> tuple[Tensor, dict[str, Any]]:
    """Show both in a node that is running: the picture as an IMAGE, and the node's ``ui``."""
    show_text(text)
    image = to_tensor(picture)
    shown = ui.PreviewImage(image, cls=node).as_dict()
    return image, {**shown, **ui.PreviewText(text).as_dict()}
