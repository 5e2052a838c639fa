"""TACA for ComfyUI: temperature-adjusted cross-modal attention (arXiv 2506.07986)."""

from comfy_api.latest import ComfyExtension, io

from .nodes import NODES
from .uvit.nodes import NODES as UVIT_NODES

WEB_DIRECTORY = "./web"  # the help pages


class TACAExtension(ComfyExtension):
    """What ComfyUI asks the pack for."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [*NODES, *UVIT_NODES]


async def comfy_entrypoint() -> TACAExtension:
    """Called by ComfyUI when it loads the pack."""
    return TACAExtension()
