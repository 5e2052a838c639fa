"""TACA Options: limits that the paper does not have, as one socket."""

from typing import Any

from comfy_api.latest import io

from ..taca.options import Options
from ..taca.prompt_tokens import prompt_tokens, tokens_of
from .ui.schema import schema

TACAOptionsSocket = io.Custom("TACA_OPTIONS")


class TACAOptions(io.ComfyNode):
    """Limits of gamma -> TACA_OPTIONS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "TACAOptions",
            inputs=[
                io.Boolean.Input("positive_only", default=False),
                io.String.Input("blocks", default=""),
                io.Clip.Input("clip", optional=True),
                io.String.Input("prompt", optional=True, force_input=True),
            ],
            outputs=[TACAOptionsSocket.Output("options")],
            search_aliases=["taca", "positive only", "block range", "padding tokens"],
        )

    @classmethod
    def execute(
        cls, positive_only: bool, blocks: str, clip: Any = None, prompt: str | None = None
    ) -> io.NodeOutput:
        if (clip is None) != (prompt is None):
            raise ValueError(
                "TACA Options needs both clip and prompt to tell the prompt's tokens from padding: "
                "connect the other one too, or neither."
            )
        tokens = None if clip is None else prompt_tokens(tokens_of(clip, prompt or ""))
        return io.NodeOutput(Options(positive_only, blocks, tokens))


NODES = [TACAOptions]
