"""TACA Schedule: when TACA acts and how strongly, as one socket."""

from dataclasses import Field, fields
from typing import Any

from comfy_api.latest import io

from ..taca.schedule import GAMMA, WINDOWS, Schedule

TACASchedule = io.Custom("TACA_SCHEDULE")


def gamma_input() -> io.Input:
    """The gamma widget, alike on every node that has one."""
    return io.Float.Input(
        "gamma",
        default=GAMMA,
        min=0.0,
        max=10.0,
        step=0.01,
        tooltip=(
            "How strongly the picture listens to the words while TACA acts: the attention logits "
            "of image towards text are multiplied by it. The paper uses 1.2; 1 changes nothing; "
            "above 1.5 pictures tend to break."
        ),
    )


def float_input(setting: "Field[float]") -> io.Input:
    """The widget of one number of a window."""
    return io.Float.Input(setting.name, default=setting.default, **setting.metadata)


class TACAScheduleNode(io.ComfyNode):
    """gamma and a window -> TACA_SCHEDULE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TACASchedule",
            display_name="TACA Schedule",
            category="TACA",
            description=(
                "Says when TACA acts and how strongly. Connect it to TACA Patch Model, where it "
                "replaces the two widgets."
            ),
            search_aliases=["taca", "gamma schedule", "attention temperature", "timestep window"],
            inputs=[
                gamma_input(),
                io.DynamicCombo.Input(
                    "window",
                    options=[
                        io.DynamicCombo.Option(name, [float_input(f) for f in fields(window)])
                        for name, window in WINDOWS.items()
                    ],
                    tooltip="How you want to say which steps TACA acts on.",
                ),
            ],
            outputs=[TACASchedule.Output("schedule", tooltip="gamma over the timesteps.")],
        )

    @classmethod
    def execute(cls, gamma: float, window: dict[str, Any]) -> io.NodeOutput:
        settings = dict(window)
        kind = WINDOWS[settings.pop("window")]
        return io.NodeOutput(Schedule(gamma, kind(**settings)))


NODES = [TACAScheduleNode]
