"""TACA Patch Model: MODEL -> MODEL that samples with TACA."""

from dataclasses import fields
from typing import Any

from comfy_api.latest import io

from ..taca.options import NO_OPTIONS, Options
from ..taca.patch import patch_model
from ..taca.schedule import Schedule, TimestepWindow
from .options import TACAOptionsSocket
from .schedule import TACASchedule, gamma_input, widget


class TACAPatchModel(io.ComfyNode):
    """The paper's attention on a model, inside a window of timesteps."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TACAPatchModel",
            display_name="TACA Patch Model",
            category="TACA",
            description=(
                "Makes pictures follow the prompt more closely: in the first steps, the image "
                "tokens pay more attention to the text tokens (TACA, ICCV 2025). Put it between "
                "the model loader and the sampler; it works with any sampler and costs no time. "
                "For FLUX, SD3.5, Qwen-Image, Z-Image and every other model that attends to text "
                "and image together."
            ),
            search_aliases=[
                "taca",
                "temperature adjusted cross-modal attention",
                "attention temperature",
                "prompt adherence",
                "text image alignment",
                "gamma",
            ],
            inputs=[
                io.Model.Input("model", tooltip="FLUX, SD3.5, Qwen-Image, Z-Image, Chroma ..."),
                gamma_input(),
                widget(fields(TimestepWindow)[0]),
                TACASchedule.Input(
                    "schedule",
                    optional=True,
                    tooltip="From TACA Schedule; when connected, it replaces the two widgets.",
                ),
                TACAOptionsSocket.Input(
                    "options",
                    optional=True,
                    tooltip="From TACA Options, for experiments: limits where gamma acts.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with TACA; the input stays as it was.")],
        )

    @classmethod
    def execute(cls, model: Any, gamma: float, timestep_threshold: float,
                schedule: Schedule | None = None,
                options: Options | None = None) -> io.NodeOutput:  # fmt: skip
        chosen = schedule or Schedule(gamma, TimestepWindow(timestep_threshold))
        return io.NodeOutput(patch_model(model, chosen, options or NO_OPTIONS))


NODES = [TACAPatchModel]
