"""TACA Training Window: MODEL -> MODEL that core's trainer trains inside the window, with TACA."""

from typing import Any

from comfy_api.latest import io

from ..taca.training import training_window


class TACATrainingWindow(io.ComfyNode):
    """The paper's training of the LoRA, on ComfyUI's own trainer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TACATrainingWindow",
            display_name="TACA Training Window",
            category="TACA",
            description=(
                "Makes ComfyUI's Train LoRA train a TACA LoRA: only at the timesteps in which TACA "
                "acts, and with TACA on. Put it between TACA Patch Model, which says when and how "
                "strongly, and Train LoRA; load the result with Load TACA LoRA."
            ),
            search_aliases=["taca", "train taca lora", "timestep range training"],
            inputs=[io.Model.Input("model", tooltip="A model from TACA Patch Model.")],
            outputs=[io.Model.Output(tooltip="The model for Train LoRA. It samples as before.")],
        )

    @classmethod
    def execute(cls, model: Any) -> io.NodeOutput:
        return io.NodeOutput(training_window(model))


NODES = [TACATrainingWindow]
