"""TACA Patch Model: MODEL -> MODEL that samples with TACA."""

from dataclasses import fields
from typing import Any

from comfy_api.latest import io

from ..taca.options import NO_OPTIONS, Options
from ..taca.patch import patch_model
from ..taca.schedule import Schedule, TimestepWindow
from .options import TACAOptionsSocket
from .schedule import TACASchedule, gamma_input, widget
from .ui.schema import schema


class TACAPatchModel(io.ComfyNode):
    """The paper's attention on a model, inside a window of timesteps."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "TACAPatchModel",
            inputs=[
                io.Model.Input("model"),
                gamma_input(),
                widget(fields(TimestepWindow)[0]),
                TACASchedule.Input("schedule", optional=True),
                TACAOptionsSocket.Input("options", optional=True),
            ],
            outputs=[io.Model.Output()],
            search_aliases=[
                "taca",
                "temperature adjusted cross-modal attention",
                "attention temperature",
                "prompt adherence",
                "text image alignment",
                "gamma",
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        gamma: float,
        timestep_threshold: float,
        schedule: Schedule | None = None,
        options: Options | None = None,
    ) -> io.NodeOutput:
        chosen = schedule or Schedule(gamma, TimestepWindow(timestep_threshold))
        return io.NodeOutput(patch_model(model, chosen, options or NO_OPTIONS))


NODES = [TACAPatchModel]
