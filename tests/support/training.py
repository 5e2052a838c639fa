"""Core's trainer on tiny models."""

import inspect

import pytest
import torch
from comfy_extras.nodes_train import TrainLoraNode

from support import tiny


def train(
    model,
    kind,
    steps=2,
    batch=1,
    accumulate=1,
    checkpointing=True,
    depth=1,
    optimizer="SGD",
    rate=0.1,
    images=3,
    rank=4,
    bypass=False,
    data=None,
    seed=5,
):
    """Core's trainer on seeded latents and conditionings, or on data: (LoRA tensors, losses)."""
    if data is None:
        latents = [{"samples": tiny.latent(8, 8, seed=i)} for i in range(images)]
        positive = [tiny.conditioning(kind, 7, seed=i) for i in range(images)]
    else:
        latents, positive = data
    settings = {
        "batch_size": batch,
        "steps": steps,
        "grad_accumulation_steps": accumulate,
        "learning_rate": rate,
        "rank": rank,
        "optimizer": optimizer,
        "loss_function": "MSE",
        "seed": seed,
        "training_dtype": "fp32",
        "lora_dtype": "fp32",
        "quantized_backward": False,
        "algorithm": "LoRA",
        "gradient_checkpointing": checkpointing,
        "checkpoint_depth": depth,
        "offloading": False,
        "existing_lora": "[None]",
        "bucket_mode": False,
        "bypass_mode": bypass,
    }
    known = inspect.signature(TrainLoraNode.execute).parameters
    if not (checkpointing and depth == 1) and "checkpoint_depth" not in known:
        pytest.skip("this ComfyUI's trainer has no choice of checkpointing depth")
    if bypass and "bypass_mode" not in known:
        pytest.skip("this ComfyUI's trainer has no bypass mode")
    settings = {name: value for name, value in settings.items() if name in known}
    torch.manual_seed(seed)  # the trainer draws weights, images and timesteps from here
    lora, losses, _ = TrainLoraNode.execute(
        model=[model], latents=latents, positive=positive, **{k: [v] for k, v in settings.items()}
    ).result
    return {k: v.clone() for k, v in lora.items()}, losses["loss"]
