"""Train a LoRA for a model of the demo's world, by core's trainer; with TACA, inside its window.

``python dev.py run demo/training/train_lora.py MODEL --threshold 953 --out FILE`` writes a LoRA
that ``benchmarks/alignment.py NAME --lora FILE`` tries: gamma alone, LoRA alone, both (the paper's
Table 4, in small). Differences from the paper's recipe (section 4.1): every linear layer and not
the attention alone, alpha 1 and not the rank, the loss on x0 and not on the velocity (as core's
trainer has it), pictures of the demo's world, hundreds of steps and not 10,000.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[2] / "hosting"))

import world
from comfyui import parts
from subject import Subject

OFF = ("quantized_backward", "gradient_checkpointing", "offloading", "bucket_mode", "bypass_mode")
DEFAULTS = dict.fromkeys(OFF, False) | dict.fromkeys(("training_dtype", "lora_dtype"), "fp32")
DEFAULTS |= {"batch_size": 1, "grad_accumulation_steps": 4, "steps": 400, "learning_rate": 1e-4}
DEFAULTS |= {"rank": 16, "algorithm": "LoRA", "optimizer": "AdamW", "loss_function": "MSE"}
DEFAULTS |= {"checkpoint_depth": 1, "existing_lora": "[None]"}


def train(
    subject: Subject,
    file: Path,
    taca: tuple[float, float] | None = None,
    dose: float = 0.0,
    pictures: int = 1000,
    seed: int = 0,
    **settings: float,
) -> None:
    """Write a LoRA of the model, or of the model as TACA Training Window gives it.

    ``taca`` is gamma, and t from which it acts.
    """
    from comfy_extras.nodes_train import TrainLoraNode

    patch, schedule, training = parts("patch", "schedule", "training")
    model = subject.model
    if taca:
        gamma, threshold = taca
        window = schedule.TimestepWindow(threshold)
        model = patch.patch_model(model, schedule.Schedule(gamma, window))
        model = training.training_window(model)
    rng = np.random.default_rng(seed)
    captions = [str(c) for c in rng.choice(world.captions("train"), pictures)]
    drawn = np.stack([world.render(caption, rng, subject.size) for caption in captions])
    latents = subject.codec.encode(torch.from_numpy(drawn))
    if dose:
        captions = [world.careless(caption, dose, rng) for caption in captions]
    known = inspect.signature(TrainLoraNode.execute).parameters  # older trainers have fewer
    settings = {k: v for k, v in {**DEFAULTS, "seed": seed, **settings}.items() if k in known}
    torch.manual_seed(seed)  # the trainer draws weights, pictures and timesteps from here
    lora, losses, _ = TrainLoraNode.execute(
        model=[model],
        latents=[{"samples": one[None]} for one in latents],
        positive=[subject.condition([caption]) for caption in captions],
        **{name: [value] for name, value in settings.items()},
    ).result
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.detach().contiguous().cpu() for key, value in lora.items()}, file)
    first, last = (float(np.mean(part)) for part in (losses["loss"][:50], losses["loss"][-50:]))
    print(f"{file}: mean loss {first:.4f} of the first 50 and {last:.4f} of the last 50.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="without _mmdit.safetensors")
    parser.add_argument("--codec", type=Path, help="without _codec.safetensors; default: MODEL")
    parser.add_argument("--gamma", type=float, default=1.2)
    parser.add_argument("--threshold", type=float, default=970.0, help="the window's least t")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=400, help="of 4 pictures")
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=1e-4, help="the paper's", dest="learning_rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="the LoRA's file")
    more = vars(parser.parse_args())
    files, codec = more.pop("model"), more.pop("codec")
    subject = Subject(files, codec or files, torch.bfloat16)
    train(subject, more.pop("out"), (more.pop("gamma"), more.pop("threshold")), **more)


if __name__ == "__main__":
    main()
