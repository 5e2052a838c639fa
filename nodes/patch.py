"""TACA on a model: what to do in which steps, and what limits it."""

import re
from dataclasses import fields
from functools import partial
from typing import Any

from comfy_api.latest import io

from ..taca.options import NO_OPTIONS, Options
from ..taca.patch import patch_model
from ..taca.prompt_tokens import PromptTokens, text_of
from ..taca.run import config_of
from ..taca.schedule import GAMMA, WINDOWS, Schedule, TimestepWindow
from ..taca.weighted_text import read
from .ui.schema import schema
from .ui.text import NodeText, queued_graph

TACASchedule = io.Custom("TACA_SCHEDULE")
TACAOptionsSocket = io.Custom("TACA_OPTIONS")


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
                "prompt following",
                "follow prompt",
                "prompt adherence",
                "attention",
                "attention temperature",
                "temperature adjusted cross-modal attention",
                "text image alignment",
                "gamma",
                "提示词",
            ],
            not_idempotent=True,  # see NodeText
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
        warnings = []
        if (before := config_of(model)) is not None:
            said = f"gamma {before.schedule.gamma:g} at {before.schedule.window}"
            warnings.append(f"This replaces the TACA node before it ({said}): only one acts.")
        if chosen.gamma > 1.5:
            warnings.append(f"Above gamma 1.5 pictures tend to break; the paper uses {GAMMA}.")
        from_schedule = f"gamma {chosen.gamma:g} at {chosen.window}, from TACA Schedule"
        plan = from_schedule if schedule else ""
        say = NodeText(*warnings, plan=plan, more=ordinary_loras)
        return io.NodeOutput(patch_model(model, chosen, options or NO_OPTIONS, say))


def ordinary_loras() -> list[str]:
    """Warnings of TACA LoRAs that other nodes load for all steps; recognised by their names."""
    loaded = [
        (each["class_type"], each["inputs"].get("lora_name"))
        for each in queued_graph().values()
        if each["inputs"].get("strength_model") != 0
    ]
    return [
        f"{name} acts in all steps, in {kind}. Load TACA LoRA keeps it inside the window."
        for kind, name in loaded
        if kind != "LoadTACALoRA" and isinstance(name, str) and TACA_LORA.search(name)
    ]


TACA_LORA = re.compile(
    r"(?<![a-z])taca(?![a-z])|(flux-dev|sd-?3\.?5-medium)-lora-rank-(16|64)", re.IGNORECASE
)


def gamma_input() -> io.Input:
    """The gamma widget, the same on every node that has one."""
    return io.Float.Input("gamma", default=GAMMA, min=0.0, max=10.0, step=0.01)


def widget(setting: Any) -> io.Input:
    """The widget of one setting of a window."""
    name, default, limits = setting.name, setting.default, setting.metadata
    if "options" in limits:
        return io.Combo.Input(name, default=default, **limits)
    if isinstance(default, tuple):
        return io.Curve.Input(name, default=list(default), socketless=False)
    kind = io.Int if isinstance(default, int) else io.Float
    return kind.Input(name, default=default, **limits)


def windows() -> list[io.DynamicCombo.Option]:
    """The kinds of windows that this ComfyUI has widgets for."""
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


class TACAOptions(io.ComfyNode):
    """Limits of gamma -> TACA_OPTIONS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "TACAOptions",
            inputs=[
                io.Boolean.Input("positive_only", default=False),
                io.String.Input("blocks", default="", placeholder="double 0-9, single 0-18"),
                io.Clip.Input("clip", optional=True),
                io.String.Input("prompt", optional=True, force_input=True),
                io.Boolean.Input("prompt_only", default=False, optional=True),
            ],
            outputs=[TACAOptionsSocket.Output("options")],
            search_aliases=["taca", "positive only", "block range", "padding tokens"],
        )

    @classmethod
    def execute(
        cls,
        positive_only: bool,
        blocks: str,
        clip: Any = None,
        prompt: str | None = None,
        prompt_only: bool = False,
    ) -> io.NodeOutput:
        if (clip is None) != (prompt is None):
            raise ValueError(
                "TACA Options needs both clip and prompt to tell the prompt's tokens from padding: "
                "connect the other one too, or neither."
            )
        if clip is None:
            return io.NodeOutput(Options(positive_only, blocks, prompt_only=prompt_only))
        prompt = prompt or ""
        tokens = PromptTokens.of(clip, prompt)
        text, encode = read(clip, prompt).text, partial(text_of, clip, prompt)
        return io.NodeOutput(Options(positive_only, blocks, tokens.own(), text, encode=encode))
