"""Measure the demo's model on the held-out captions, through ComfyUI's own loader and sampler.

``python demo/evaluate.py --comfyui DIR`` prints a table and stores it in the model's card,
``demo/models/taca_demo.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import world
from codec import CHANNELS, Codec
from PIL import Image


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", type=Path, default=os.environ.get("COMFYUI_PATH"))
    parser.add_argument("--models", type=Path, default=Path(__file__).parent / "models")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--cfg", type=float, default=3.0)
    parser.add_argument("--scheduler", default="simple")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of the first seed here")
    arguments = parser.parse_args()
    if arguments.comfyui is None:
        parser.error("name ComfyUI's folder with --comfyui or COMFYUI_PATH")
    return arguments


def sample(arguments: argparse.Namespace, codec: Codec, captions: list[str]) -> np.ndarray:
    """Draw every caption once per seed: pictures of shape ``(seeds, captions, 64, 64, 3)``."""
    sys.path.append(str(arguments.comfyui))
    from comfy.cli_args import args

    args.cpu = True
    import comfy.sd

    import nodes

    model = comfy.sd.load_diffusion_model(str(arguments.models / "taca_demo_mmdit.safetensors"))

    def condition(texts: list[str]) -> list:
        tokens = torch.from_numpy(np.stack([world.encode(text) for text in texts]))
        return [[codec.embed(tokens), {"pooled_output": torch.zeros(len(texts), 1)}]]

    side = world.SIZE // 4
    pictures = []
    for seed in arguments.seeds:
        (latent,) = nodes.common_ksampler(
            model,
            seed,
            arguments.steps,
            arguments.cfg,
            "euler",
            arguments.scheduler,
            condition(captions),
            condition([""]),
            {"samples": torch.zeros(len(captions), CHANNELS, side, side)},
        )
        pictures.append(codec.decode(latent["samples"].float()).numpy())
    return np.stack(pictures)


def main() -> None:
    """Sample, judge, print and store."""
    arguments = parse_arguments()
    codec = Codec.load(arguments.models.parent / "taca_demo_codec.safetensors")
    captions = world.captions("held-out")
    pictures = sample(arguments, codec, captions)
    judged = [
        world.check(picture, caption)
        for drawn in pictures
        for picture, caption in zip(drawn, captions, strict=True)
    ]
    count = {key: sum(result[key] for result in judged) for key in world.CRITERIA}
    for key in world.CRITERIA:
        print(f"{key:>10}  {count[key]:4} of {len(judged)}  {count[key] / len(judged):7.2%}")

    card_path = arguments.models / "taca_demo.json"
    card = json.loads(card_path.read_text())
    card["results"] = {
        "captions": "held-out",
        "pictures": len(judged),
        "right": count,
        "percent": {key: round(100 * count[key] / len(judged), 2) for key in world.CRITERIA},
        "sampler": {
            "name": "euler",
            "scheduler": arguments.scheduler,
            "steps": arguments.steps,
            "cfg": arguments.cfg,
            "seeds": arguments.seeds,
        },
    }
    card_path.write_text(json.dumps(card, indent=1) + "\n")

    if arguments.sheet:
        rows = pictures[0][: len(captions) // 17 * 17].reshape(-1, 17, world.SIZE, world.SIZE, 3)
        sheet = np.concatenate(np.concatenate(rows, axis=1), axis=1)
        Image.fromarray((sheet * 255).round().astype(np.uint8)).save(arguments.sheet)


if __name__ == "__main__":
    main()
