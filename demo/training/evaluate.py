"""Measure the demo's model on the held-out captions, through ComfyUI's own loader and sampler.

``python demo/training/evaluate.py --comfyui DIR`` prints a table and stores it in the model's card,
``demo/models/taca_demo.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parent.parent))

import world

DEMO = Path(world.__file__).parent


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", type=Path, default=os.environ.get("COMFYUI_PATH"))
    parser.add_argument("--models", type=Path, default=DEMO / "models")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--cfg", type=float, default=3.0)
    parser.add_argument("--scheduler", default="simple")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of the first seed here")
    arguments = parser.parse_args()
    if arguments.comfyui is None:
        parser.error("name ComfyUI's folder with --comfyui or COMFYUI_PATH")
    return arguments


def sample(arguments: argparse.Namespace, captions: list[str]) -> np.ndarray:
    """Draw every caption once per seed: pictures of shape ``(seeds, captions, 64, 64, 3)``."""
    sys.path.append(str(arguments.comfyui))
    from comfy.cli_args import args

    args.cpu = True
    from subject import Subject

    subject = Subject(arguments.models / "taca_demo", arguments.models.parent / "taca_demo")
    how = arguments.cfg, arguments.steps, arguments.scheduler
    drawn = [subject.draw(subject.model, captions, seed, *how) for seed in arguments.seeds]
    return np.stack(drawn)


def main() -> None:
    """Sample, judge, print and store."""
    arguments = parse_arguments()
    captions = world.captions("held-out")
    pictures = sample(arguments, captions)
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
            **{key: getattr(arguments, key) for key in ("scheduler", "steps", "cfg", "seeds")},
        },
    }
    card_path.write_text(json.dumps(card, indent=1) + "\n")

    if arguments.sheet:
        rows = pictures[0][: len(captions) // 17 * 17].reshape(-1, 17, world.SIZE, world.SIZE, 3)
        sheet = np.concatenate(np.concatenate(rows, axis=1), axis=1)
        Image.fromarray((sheet * 255).round().astype(np.uint8)).save(arguments.sheet)


if __name__ == "__main__":
    main()
