"""FID and CLIP score on MS-COCO, for those who have its pictures and captions.

The published figures of U-ViT are the FID of 30,000 pictures of 256 x 256, each of a random caption
of val2014, to val2014 itself. Three commands repeat that on any model of ComfyUI's:

1. ``python dev.py run benchmarks/coco.py prompts --captions captions_val2014.json --out coco.txt``
   writes the captions.
2. ``python dev.py run benchmarks/compbench --prompts coco.txt --images 1 --workflow uvit.json
   --gamma-at 8.cfg --gammas 2 --out samples --servers http://127.0.0.1:8188`` draws one picture of
   each; stopped, it goes on with the same command. ``--gamma-at`` names what to compare: the
   sampler's CFG here, or TACA's gamma where it is left out.
3. ``python dev.py run benchmarks/coco.py score --run samples --real val2014`` judges each setting.
   It needs torchmetrics (``pip install '.[coco]'``), and fetches the weights of Inception and CLIP.

The real pictures are cut to a square in the middle and brought to the size of the drawn ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compbench.plan import Plan, Problem, setting
from PIL import Image, ImageOps
from reporting import interval
from torch import Tensor

COUNT = 30_000
CLIP = "openai/clip-vit-large-patch14"
PICTURES = (".jpg", ".jpeg", ".png", ".webp")
INSTALL = "coco.py score needs torchmetrics: pip install '.[coco]' in this repository's folder"


def choose(captions: list[str], count: int, seed: int) -> list[str]:
    """Random captions, of those that can be part of a file's name, in one line each."""
    told = [" ".join(caption.split()) for caption in captions]
    usable = [t for t in told if t and t.isprintable() and not {"/", "_"} & {*t} and len(t) < 200]
    if len(usable) < count:
        raise Problem(f"There are {len(usable)} usable captions, and --count asks for {count}.")
    return np.random.default_rng(seed).choice(usable, count, replace=False).tolist()


def read_coco(file: Path) -> list[str]:
    """The captions of a file of COCO's, such as captions_val2014.json."""
    try:
        return [a["caption"] for a in json.loads(file.read_text("utf-8"))["annotations"]]
    except (ValueError, KeyError, TypeError) as error:
        expected = "captions, such as captions_val2014.json"
        told = f"{type(error).__name__}: {error}"
        raise Problem(f"{file} is not a file of COCO's {expected} ({told}).") from error


def batches(files: list[Path], size: int, count: int, crop: bool) -> Iterator[Tensor]:
    """Pictures as ``(count, 3, size, size)`` of bytes."""
    for start in range(0, len(files), count):
        pixels = []
        for file in files[start : start + count]:
            with Image.open(file) as picture:
                picture = picture.convert("RGB")
            if crop:
                picture = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
            elif picture.size != (size, size):
                raise Problem(f"{file.name} is {picture.size}, and the first one {size} x {size}.")
            pixels.append(np.asarray(picture))
        yield torch.from_numpy(np.stack(pixels)).movedim(-1, 1)


def fids_of(
    real: list[Path], settings: list[list[Path]], device: str, count: int, feature: Any = 2048
) -> Iterator[float]:
    """FID of each setting's pictures, by torchmetrics; ``feature`` as it takes it."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    with Image.open(settings[0][0]) as picture:
        size = picture.width
    how = {"reset_real_features": False, "input_img_size": (3, size, size)}
    fid = FrechetInceptionDistance(feature=feature, **how).to(device)
    for pixels in batches(real, size, count, crop=True):
        fid.update(pixels.to(device), real=True)
    for drawn in settings:
        for pixels in batches(drawn, size, count, crop=False):
            fid.update(pixels.to(device), real=False)
        yield fid.compute().item()
        fid.reset()  # but for the real ones


def clip_score_of(
    drawn: list[Path], captions: list[str], device: str, count: int, model: Any, processor: Any
) -> tuple[float, float]:
    """100 times CLIP's cosine of picture and caption: the mean, and half its 95 % interval.

    By transformers alone: torchmetrics 1.9 cannot use a CLIP of transformers 5.
    """
    cosines: list[float] = []
    most = {"truncation": True, "max_length": model.config.text_config.max_position_embeddings}
    for start in range(0, len(drawn), count):
        pictures = [Image.open(file).convert("RGB") for file in drawn[start : start + count]]
        given = {"text": captions[start : start + count], "images": pictures}
        out = model(**processor(**given, return_tensors="pt", padding=True, **most).to(device))
        cosines += torch.cosine_similarity(out.image_embeds, out.text_embeds).tolist()
    return interval(100 * np.array(cosines))


@torch.inference_mode()
def score(options: argparse.Namespace) -> None:
    """Judge the drawn pictures of each setting."""
    from transformers import CLIPModel, CLIPProcessor

    plan = Plan.read(options.run)
    real = sorted(file for file in options.real.iterdir() if file.suffix.lower() in PICTURES)
    if len(real) < 2:
        raise Problem(f"{options.real} has {len(real)} pictures: name a folder with all of them.")
    units = [[u for c in plan.categories for u in c.units(gamma)] for gamma in plan.gammas]
    drawn = [[options.run / unit.path for unit in each] for each in units]
    if missing := [file for each in drawn for file in each if not file.exists()]:
        raise Problem(f"{len(missing)} pictures are not drawn yet: {missing[0]}. Draw them first.")
    fids = fids_of(real, drawn, options.device, options.batch)
    if len(drawn[0]) != COUNT:
        print(f"FID falls with their number: compare it with that of {len(drawn[0])} others only.")
    for gamma, files, fid in zip(plan.gammas, drawn, fids, strict=True):
        said = f"of {len(files)} drawn pictures to {len(real)} real ones"
        print(f"{setting(gamma)}: FID {fid:.2f} {said}", flush=True)
    model = CLIPModel.from_pretrained(options.clip).eval().to(options.device)
    processor = CLIPProcessor.from_pretrained(options.clip)
    for gamma, files, own in zip(plan.gammas, drawn, units, strict=True):
        told = [unit.prompt for unit in own]
        mean, half = clip_score_of(files, told, options.device, options.batch, model, processor)
        print(f"{setting(gamma)}: CLIP score {mean:.2f} ± {half:.2f} ({options.clip})")


def options_of(arguments: list[str]) -> argparse.Namespace:
    """What the command line asks for."""
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shown)
    commands = parser.add_subparsers(dest="command", required=True)
    prompts = commands.add_parser("prompts", help="write captions to draw")
    prompts.add_argument("--captions", type=Path, required=True, metavar="JSON", help="COCO's")
    prompts.add_argument("--count", type=int, default=COUNT)
    prompts.add_argument("--seed", type=int, default=0)
    prompts.add_argument("--out", type=Path, required=True, metavar="TXT")
    judge = commands.add_parser("score", help="FID and CLIP score of pictures drawn")
    judge.add_argument("--run", type=Path, required=True, metavar="DIR", help="compbench's --out")
    judge.add_argument("--real", type=Path, required=True, metavar="DIR")
    judge.add_argument("--clip", default=CLIP, metavar="NAME")
    judge.add_argument("--batch", type=int, default=50)
    judge.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def main() -> None:
    options = options_of(sys.argv[1:])
    try:
        if options.command == "score":
            score(options)
        else:
            chosen = choose(read_coco(options.captions), options.count, options.seed)
            options.out.write_text("\n".join(chosen) + "\n", "utf-8")
            print(f"{len(chosen)} captions in {options.out}")
    except ModuleNotFoundError as error:
        sys.exit(f"{INSTALL} ({error})")
    except (Problem, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
