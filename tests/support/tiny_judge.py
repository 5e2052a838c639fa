"""A node in place of Load CLIP: Qwen2.5-VL of seeded weights, tiny, read by core from a file.

For a server of the tests, as a pack of its own: it goes into custom_nodes.

Core's classes have the sizes of the published weights written into them. Those of the language
model are set by its own ``model_options``; the tower of pictures, which core does not ask for
sizes, is built smaller in a class that ``model_options`` has a place for. All that computes is
core's.
"""

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import comfy.ops
import comfy.sd
import comfy.text_encoders.qwen_image
import folder_paths
import torch
from comfy.text_encoders import llama, qwen_vl
from safetensors.torch import save_file

VOCABULARY = 152064  # Qwen's ids go to 151668
LANGUAGE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": VOCABULARY,
}
TOWER = {"hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "num_layers": 8}


def smaller():
    """For the length of a with block, core builds the smaller tower."""
    tower = qwen_vl.Qwen2VLVisionTransformer
    within = vars(qwen_vl) | {"Qwen2VLVisionTransformer": lambda **how: tower(**how | TOWER)}
    return patch.object(llama, "qwen_vl", SimpleNamespace(**within))


class Encoder(comfy.text_encoders.qwen_image.Qwen25_7BVLIModel):
    def __init__(self, **options):
        with smaller():
            super().__init__(**options)


def load_file(file, language=LANGUAGE):
    """By core's loader."""
    options = {"qwen25_7b_model_config": language, "qwen25_7b_class": Encoder}
    kind = comfy.sd.CLIPType.QWEN_IMAGE
    return comfy.sd.load_clip([str(file)], clip_type=kind, model_options=options)


class TinyJudge:
    RETURN_TYPES, FUNCTION, CATEGORY = ("CLIP",), "load", "TACA tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def load(self):
        with smaller():
            how = torch.float32, "cpu", comfy.ops.manual_cast
            state = llama.Qwen25_7BVLI(LANGUAGE, *how).state_dict()
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
        generator = torch.Generator().manual_seed(0)
        for name, weight in state.items():
            noise = torch.randn(weight.shape, generator=generator) * weight[0].numel() ** -0.5
            state[name] = 1 + noise if "norm" in name or "ln_q" in name else noise
        file = Path(folder_paths.get_temp_directory(), "tiny_judge.safetensors")
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, file)
        return (load_file(file),)


NODE_CLASS_MAPPINGS = {"TinyJudge": TinyJudge}
