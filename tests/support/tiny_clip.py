"""Nodes in place of Load CLIP and Load CLIP Vision: seeded CLIPs of CLIP ViT-L's kind, but tiny.

For a server of the tests, as a pack of its own: it goes into custom_nodes.
"""

from pathlib import Path

import comfy.clip_model
import comfy.clip_vision
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import folder_paths
import torch
from safetensors.torch import save_file

WIDTH = 32
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_positions": 77,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "eos_token_id": 49407,
    "vocab_size": 49408,
}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": WIDTH,
    "image_size": 224,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_channels": 3,
    "num_hidden_layers": 2,
    "patch_size": 56,
    "projection_dim": WIDTH,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


class Encoder(comfy.sd1_clip.SDClipModel):
    def __init__(self, **options):
        super().__init__(**options, textmodel_json_config=TEXT, return_projected_pooled=False)


def seeded(module):
    generator = torch.Generator().manual_seed(0)
    for name, weight in module.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        scale = 1 + 0.1 * noise if "norm" in name and name.endswith("weight") else 0.3 * noise
        weight.data.copy_(scale)
    return module


def text():
    """By core's loader, from a file."""
    model = comfy.clip_model.CLIPTextModel(TEXT, torch.float32, "cpu", comfy.ops.manual_cast)
    file = Path(folder_paths.get_temp_directory(), "tiny_clip.safetensors")
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(seeded(model).state_dict(), file)
    return comfy.sd.load_clip([str(file)], model_options={"clip_l_class": Encoder})


def vision():
    clip_vision = comfy.clip_vision.ClipVisionModel(VISION)
    seeded(clip_vision.model)
    return clip_vision


class TinyCLIP:
    RETURN_TYPES, FUNCTION, CATEGORY = ("CLIP",), "load", "TACA tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def load(self):
        return (text(),)


class TinyCLIPVision(TinyCLIP):
    RETURN_TYPES = ("CLIP_VISION",)

    def load(self):
        return (vision(),)


NODE_CLASS_MAPPINGS = {"TinyCLIP": TinyCLIP, "TinyCLIPVision": TinyCLIPVision}
