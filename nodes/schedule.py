"""TACA Schedule: when TACA acts and how strongly, as one socket."""

from __future__ import annotations

from dataclasses import fields
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


def widget(setting: Any) -> io.Input:
    """The widget of one setting of a window."""
    look = dict(setting.metadata)
    if look.pop("curve", False):
        return io.Curve.Input(setting.name, default=list(setting.default), socketless=False, **look)
    if "options" in look:
        return io.Combo.Input(setting.name, default=setting.default, **look)
    kind = io.Int if isinstance(setting.default, int) else io.Float
    return kind.Input(setting.name, default=setting.default, **look)


def windows() -> list[io.DynamicCombo.Option]:
    """Every kind of window that this ComfyUI has the widgets for."""
    return [
        io.DynamicCombo.Option(name, [widget(setting) for setting in fields(window)])
        for name, window in WINDOWS.items()
        if name != "curve" or hasattr(io, "Curve")
    ]


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
                    options=windows(),
                    tooltip=(
                        "How you want to say when TACA acts: by the timestep (the paper), by "
                        "percent of the sampling (ComfyUI), by the first steps (the authors' "
                        "code), or by a curve you draw in Curve Editor."
                    ),
                ),
            ],
            outputs=[TACASchedule.Output("schedule", tooltip="gamma over the timesteps.")],
        )

    @classmethod
    def execute(cls, gamma: float, window: dict[str, Any] | None = None) -> io.NodeOutput:
        settings = {name: value for name, value in (window or {}).items() if value is not None}
        kind = WINDOWS.get(settings.pop("window", None))
        if kind is None:  # ComfyUI lets such a workflow through
            raise ValueError(f"TACA Schedule has no window: choose one of {', '.join(WINDOWS)}.")
        if "curve" in settings:
            from comfy_api.input import CurveInput

            settings["curve"] = CurveInput.from_raw(settings["curve"])
        return io.NodeOutput(Schedule(gamma, kind(**settings)))


NODES = [TACAScheduleNode]
