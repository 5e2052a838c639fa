"""TACA Training Window: MODEL -> MODEL that core's trainer trains inside the window, with TACA."""

from typing import Any

from comfy_api.latest import io

from ..taca.training import training_window
from .ui.schema import schema


class TACATrainingWindow(io.ComfyNode):
    """The paper's training of the LoRA, on ComfyUI's own trainer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "TACATrainingWindow",
            inputs=[io.Model.Input("model")],
            outputs=[io.Model.Output()],
            search_aliases=["taca", "train taca lora", "timestep range training"],
        )

    @classmethod
    def execute(cls, model: Any) -> io.NodeOutput:
        return io.NodeOutput(training_window(model))


NODES = [TACATrainingWindow]
