"""Train a TACA LoRA for a model of the alignment series: core's trainer, this pack's window.

``python dev.py run benchmarks/alignment_lora.py MODEL --window snr --out FILE`` writes a LoRA that
``alignment.py MODEL --lora FILE`` tries: gamma alone, LoRA alone, both (the paper's Table 4, in
small). Differences from the paper's recipe (section 4.1): every linear layer and not the attention
alone, alpha 1 and not the rank, the loss on x0 and not on the velocity (as core's trainer has it),
pictures of the demo's world, hundreds of steps and not 10,000.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import alignment
import numpy as np
import torch
import world
from comfyui import load_pack
from safetensors.torch import save_file


def train(subject: alignment.Subject, threshold: float, options: argparse.Namespace) -> Any:
    """LoRA and losses, by TrainLoraNode on the model as TACA Training Window gives it."""
    from comfy_extras.nodes_train import TrainLoraNode

    patch, schedule, _ = load_pack()
    training = sys.modules["taca_pack.taca.training"]
    window = schedule.Schedule(options.gamma, schedule.TimestepWindow(threshold))
    model = training.training_window(patch.patch_model(subject.model, window))
    rng = np.random.default_rng(options.seed)
    captions = [str(c) for c in rng.choice(world.captions("train"), options.pictures)]
    pictures = np.stack([world.render(caption, rng, subject.size) for caption in captions])
    latents = subject.codec.encode(torch.from_numpy(pictures))
    settings = {
        "batch_size": 1, "grad_accumulation_steps": 4, "steps": options.steps,
        "learning_rate": options.lr, "rank": options.rank, "optimizer": "AdamW",
        "loss_function": "MSE", "seed": options.seed, "training_dtype": "fp32",
        "lora_dtype": "fp32", "quantized_backward": False, "algorithm": "LoRA",
        "gradient_checkpointing": False, "checkpoint_depth": 1, "offloading": False,
        "existing_lora": "[None]", "bucket_mode": False, "bypass_mode": False,
    }  # fmt: skip
    torch.manual_seed(options.seed)  # the trainer draws weights, pictures and timesteps from here
    lora, losses, _ = TrainLoraNode.execute(
        model=[model],
        latents=[{"samples": one[None]} for one in latents],
        positive=[subject.condition([caption]) for caption in captions],
        **{name: [value] for name, value in settings.items()},
    ).result
    return lora, losses["loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=alignment.MODELS)
    parser.add_argument("--window", choices=alignment.WINDOWS, default="paper")
    parser.add_argument("--gamma", type=float, default=1.2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=400, help="of 4 pictures")
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=1e-4, help="the paper's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="the LoRA's file")
    options = parser.parse_args()
    load_pack()
    subject = alignment.Subject(options.model)
    threshold = alignment.Setting(window=options.window).threshold(subject.tokens)
    lora, losses = train(subject, threshold, options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.detach().contiguous().cpu() for key, value in lora.items()}, options.out)
    first, last = (float(np.mean(part)) for part in (losses[:50], losses[-50:]))
    print(f"{options.out}: rank {options.rank}, {options.steps} steps inside t >= {threshold:g}; "
          f"mean loss {first:.4f} of the first 50 and {last:.4f} of the last 50.")  # fmt: skip


if __name__ == "__main__":
    main()
