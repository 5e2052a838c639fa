"""The TACA LoRA: loaded for the steps in which TACA acts, and trained for them."""

import math
from typing import Any

import folder_paths
from comfy_api.latest import io
from comfy_execution.graph_utils import is_link
from comfy_execution.utils import get_executing_context

from ..taca.lora_file import read_lora
from ..taca.lora_fit import fit_lora
from ..taca.patch import patch_lora
from ..taca.run import config_of
from ..taca.training import training_window
from .ui.schema import schema
from .ui.text import NodeText, queued_graph


class LoadTACALoRA(io.ComfyNode):
    """A LoRA for the steps in which TACA acts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "LoadTACALoRA",
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input("lora_name", options=folder_paths.get_filename_list("loras")),
                io.Float.Input("strength", default=1.0, min=-10.0, max=10.0, step=0.01),
            ],
            outputs=[io.Model.Output()],
            search_aliases=["taca", "taca lora", "lora loader", "lora schedule", "lora timestep"],
            not_idempotent=True,  # see NodeText
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> bool:
        """Run again where TACA was taken out, for the error to be at this node."""
        return lacks_taca()

    @classmethod
    def execute(cls, model: Any, lora_name: str, strength: float) -> io.NodeOutput:
        if strength == 0:
            return io.NodeOutput(model)
        if not math.isfinite(strength):
            raise ValueError(f"Load TACA LoRA's strength must be a number, not {strength}.")
        if config_of(model) is None and lacks_taca():
            raise ValueError(
                "Load TACA LoRA acts inside the window of TACA, which this model does not get: add "
                "the TACA node before or after it. For a LoRA that is on in every step use "
                "Load LoRA."
            )
        state = read_lora(folder_paths.get_full_path_or_raise("loras", lora_name))
        lora = fit_lora(state, model.model, lora_name, strength)
        lora.say = NodeText()
        return io.NodeOutput(patch_lora(model, lora))


def lacks_taca() -> bool:
    """Whether no node downstream of the running one puts TACA on a model, in the queued graph."""
    graph, context = queued_graph(), get_executing_context()
    if context is None or context.node_id not in graph:
        return False  # unknown: another node called this one
    downstream, todo = set[str](), {context.node_id}
    while todo:
        downstream |= todo
        todo = {
            node
            for node, each in graph.items()
            if any(is_link(value) and value[0] in downstream for value in each["inputs"].values())
        } - downstream
    kinds = {graph[node]["class_type"] for node in downstream}
    return not kinds & {"TACAPatchModel", "TACASweep"}


class TACATrainingWindow(io.ComfyNode):
    """The paper's training of the LoRA, on ComfyUI's own trainer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "TACATrainingWindow",
            inputs=[io.Model.Input("model")],
            outputs=[io.Model.Output()],
            search_aliases=["taca", "train taca lora", "timestep range training"],
            category="TACA/research",
        )

    @classmethod
    def execute(cls, model: Any) -> io.NodeOutput:
        return io.NodeOutput(training_window(model))
