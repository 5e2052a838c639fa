"""TACA Schedule: when TACA acts and how strongly, as one socket."""

from dataclasses import fields
from typing import Any

from comfy_api.latest import io

from ..taca.schedule import GAMMA, WINDOWS, Schedule
from .ui.schema import schema

TACASchedule = io.Custom("TACA_SCHEDULE")


def gamma_input() -> io.Input:
    """The gamma widget, alike on every node that has one."""
    return io.Float.Input("gamma", default=GAMMA, min=0.0, max=10.0, step=0.01)


def widget(setting: Any) -> io.Input:
    """The widget of one setting of a window."""
    name, default, look = setting.name, setting.default, setting.metadata
    if "options" in look:
        return io.Combo.Input(name, default=default, **look)
    if isinstance(default, tuple):
        return io.Curve.Input(name, default=list(default), socketless=False)
    kind = io.Int if isinstance(default, int) else io.Float
    return kind.Input(name, default=default, **look)


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
        return schema(
            "TACASchedule",
            inputs=[gamma_input(), io.DynamicCombo.Input("window", options=windows())],
            outputs=[TACASchedule.Output("schedule")],
            search_aliases=["taca", "gamma schedule", "attention temperature", "timestep window"],
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
