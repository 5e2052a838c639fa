"""Load TACA LoRA: MODEL -> MODEL whose LoRA is on inside the TACA window, and only there."""

import math
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..taca.lora import fit_lora, read_lora
from ..taca.patch import patch_lora


class LoadTACALoRA(io.ComfyNode):
    """A LoRA for the steps in which TACA acts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadTACALoRA",
            display_name="Load TACA LoRA",
            category="TACA",
            description=(
                "Loads the small LoRA that repairs the artifacts TACA can leave. It is active in "
                "the steps in which TACA acts and in no other, and no weight of the model is "
                "changed. Put it before or after TACA Patch Model, which it needs. On its own it "
                "does nothing for how closely a picture follows the prompt."
            ),
            search_aliases=["taca", "taca lora", "lora loader", "lora schedule", "lora timestep"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the LoRA was trained for."),
                io.Combo.Input(
                    "lora_name",
                    options=folder_paths.get_filename_list("loras"),
                    tooltip=(
                        "A safetensors file in models/loras: the paper's (FLUX.1-dev and "
                        "SD3.5-Medium, r = 16 or 64), or one you trained with TACA Training Window."
                    ),
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="How strongly the LoRA acts. The paper uses 1; 0 leaves it out.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with the LoRA; the input stays.")],
        )

    @classmethod
    def execute(cls, model: Any, lora_name: str, strength: float) -> io.NodeOutput:
        if strength == 0:
            return io.NodeOutput(model)
        if not math.isfinite(strength):
            raise ValueError(f"Load TACA LoRA's strength must be a number, not {strength}.")
        state = read_lora(folder_paths.get_full_path_or_raise("loras", lora_name))
        return io.NodeOutput(patch_lora(model, fit_lora(state, model.model, lora_name, strength)))


NODES = [LoadTACALoRA]
