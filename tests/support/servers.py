"""What a server of the tests is given: files of noise, tiny CLIPs, graphs on the demo's model."""

import importlib
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from support import ROOT

NETWORK = importlib.import_module("taca_pack.uvit.network")
FILES = importlib.import_module("taca_pack.uvit.files")
DEMO_MODEL = "taca_demo_mmdit.safetensors"
LORA = "stand_in.safetensors"
U_VIT = "stand_in_uvit.safetensors"


def save_lora(path):
    """A LoRA of noise for one layer of the demo's model."""
    layer = "joint_blocks.0.x_block.attn.proj"
    with safe_open(ROOT / "demo/models" / DEMO_MODEL, "pt") as model:
        name = next(key for key in model.keys() if key.endswith(f"{layer}.weight"))  # noqa: SIM118
        rows, columns = model.get_slice(name).get_shape()
    torch.manual_seed(0)
    factors = {"lora_up": torch.randn(rows, 4), "lora_down": torch.randn(4, columns)}
    save_file({f"diffusion_model.{layer}.{k}.weight": v / 4 for k, v in factors.items()}, path)


def add_tiny_clip(base):
    """Packs of their own, for a server that is not running yet."""
    (base / "custom_nodes").mkdir(parents=True)
    for pack in ("tiny_clip.py", "tiny_judge.py"):
        shutil.copy(Path(__file__).with_name(pack), base / "custom_nodes")


def save_uvit(path):
    """A U-ViT of noise for the demo's latents and prompts."""
    config = NETWORK.UViTConfig(3, 64, 16, 16, 2, 16, 64)
    torch.manual_seed(0)
    save_file(NETWORK.UViT(config).initialise().state_dict(), path, FILES.metadata_of(config, 1.5))


STAND_INS = {  # what needs files that users fetch, or much time -> the demo's, and what differs;
    # None for what is not connected
    "UNETLoader": ("UNETLoader", {"unet_name": DEMO_MODEL}),
    "CheckpointLoaderSimple": ("UNETLoader", {"unet_name": DEMO_MODEL, "weight_dtype": "default"}),
    "ModelSamplingFlux": ("ModelSamplingSD3", {"shift": 3.0}),
    "ModelSamplingAuraFlow": ("ModelSamplingSD3", {}),
    "TACASweep": ("TACASweep", {"gammas": "1, 1.2", "timestep_thresholds": "970"}),
    "TACATrial": ("TACATrial", {"seeds": "1, 2", "prompts": "a red circle"}),
    "TACAAttentionReport": (
        "TACAAttentionReport",
        {"words": "red=1", "clip": None, "prompt": None, "vae": None},
    ),
    "LoadTACALoRA": ("LoadTACALoRA", {"lora_name": LORA}),
    "CLIPTextEncode": ("TACADemoTextEncode", {"text": "a red circle left of a blue square"}),
    "TACATextEncode": ("TACATextEncode", {"text": "a (red:0) circle left of a blue square"}),
    "DualCLIPLoader": ("TACADemoLoadCLIP", {}),
    "TextEncodeQwenImageEditPlus": ("TACADemoTextEncode", {"text": "a red circle"}),
    "EmptySD3LatentImage": ("EmptySD3LatentImage", {"width": 128, "height": 128}),
    "EmptyFlux2LatentImage": ("EmptySD3LatentImage", {"width": 128, "height": 128}),
    "VAEEncode": ("EmptySD3LatentImage", {"width": 128, "height": 128, "batch_size": 1}),
    "VAEDecode": ("TACADemoDecode", {"upscale": 1}),
    "MakeTrainingDataset": ("TACADemoDataset", {"count": 4, "seed": 0}),
    "TrainLoraNode": ("TrainLoraNode", {"steps": 1, "training_dtype": "fp32"}),
    "EmptyLatentImage": ("EmptySD3LatentImage", {"width": 128, "height": 128}),
    "LoadUViT": ("LoadUViT", {"unet_name": U_VIT}),
    "CLIPLoader": ("TinyCLIP", {}),
    "CLIPVisionLoader": ("TinyCLIPVision", {}),
    "TrainUViT": ("TrainUViT", {"steps": 2, "batch_size": 2, "blocks": 7, "width": 64}),
}


def on_the_demo_model(graph, object_info):
    """A graph in API format with stand-ins; what nothing needs any more is not run."""
    stand_ins = STAND_INS
    if any(node["class_type"] == "TACATextEncode" for node in graph.values()):
        stand_ins = STAND_INS | {"CLIPLoader": ("TACADemoLoadCLIP", {})}
    if any(node["class_type"] == "TACAPromptCheck" for node in graph.values()):
        stand_ins = STAND_INS | {"CLIPLoader": ("TinyJudge", {})}
    for node in graph.values():
        kind, new = stand_ins.get(node["class_type"], (node["class_type"], {}))
        known = {name for group in object_info[kind]["input"].values() for name in group}
        given = node["inputs"].items()  # a nested one is named parent.child
        old = {name: value for name, value in given if name.partition(".")[0] in known}
        inputs = {name: value for name, value in (old | new).items() if value is not None}
        node.update(class_type=kind, inputs=inputs)
    return graph
