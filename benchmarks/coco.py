"""FID and CLIP score on MS-COCO, for those who have its pictures and captions.

The published figures of U-ViT are the FID of 30,000 pictures of 256 x 256, each of a random caption
of val2014, to val2014 itself. Three commands repeat that on any model of ComfyUI's:

1. ``python dev.py run benchmarks/coco.py prompts --captions captions_val2014.json --out coco.txt``
   writes the captions.
2. ``python dev.py run benchmarks/compbench --prompts coco.txt --images 1 --workflow uvit.json
   --gamma-at 8.cfg --gammas 2 --out samples --servers http://127.0.0.1:8188`` draws one picture of
   each; stopped, it goes on with the same command. ``--gamma-at`` names what to compare: the
   sampler's CFG here, or TACA's gamma where it is left out.
3. ``python dev.py run benchmarks/coco.py score --captions coco.txt --real val2014 --drawn
   samples/gamma-2/coco/samples`` judges them. It needs torchmetrics (``pip install '.[coco]'``),
   and fetches the weights of Inception and CLIP.

A picture is known by the number its name ends with: that of its caption, counted from 0. The real
ones are cut to a square in the middle and brought to the size of the drawn ones.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from reporting import interval
from torch import Tensor

COUNT = 30_000
CLIP = "openai/clip-vit-large-patch14"
PICTURES = (".jpg", ".jpeg", ".png", ".webp")
INSTALL = "coco.py score needs torchmetrics: pip install '.[coco]' in this repository's folder"


class Problem(Exception):
    """What keeps the scores from being right, in words that name the way out."""


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


def files_in(folder: Path) -> list[Path]:
    """The pictures of a folder."""
    files = sorted(p for p in folder.glob("*") if p.suffix.lower() in PICTURES)
    if len(files) < 2:
        raise Problem(f"{folder} has {len(files)} pictures: name a folder with all of them.")
    return files


def in_order(files: list[Path], captions: list[str]) -> list[Path]:
    """The drawn pictures in the order of their captions, one for each."""
    numbered: dict[int, Path] = {}
    for file in files:
        number = re.search(r"(\d+)$", file.stem)
        if not number:
            raise Problem(f"{file.name} does not end with the number of its caption.")
        other = numbered.setdefault(int(number[1]), file)
        if other != file:
            raise Problem(f"{other.name} and {file.name} are both of caption {int(number[1])}.")
    alone = set(range(len(captions))) ^ numbered.keys()
    if alone:
        raise Problem(
            f"{len(captions)} captions and {len(numbered)} drawn pictures, caption {min(alone)} "
            f"without the other: draw the rest, or give the captions they were drawn of."
        )
    return [numbered[i] for i in range(len(captions))]


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


def fid_of(
    real: list[Path], drawn: list[Path], device: str, count: int, feature: Any = 2048
) -> float:
    """FID by torchmetrics; ``feature`` as it takes it, a layer of Inception or a module."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    with Image.open(drawn[0]) as picture:
        size = picture.width
    fid = FrechetInceptionDistance(feature=feature, input_img_size=(3, size, size)).to(device)
    for files, is_real in ((real, True), (drawn, False)):
        for pixels in batches(files, size, count, crop=is_real):
            fid.update(pixels.to(device), real=is_real)
    return fid.compute().item()


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
    """Judge the drawn pictures."""
    from transformers import CLIPModel, CLIPProcessor

    captions = options.captions.read_text("utf-8").splitlines()
    real, drawn = files_in(options.real), in_order(files_in(options.drawn), captions)
    fid = fid_of(real, drawn, options.device, options.batch)
    print(f"FID {fid:.2f} of {len(drawn)} drawn pictures to {len(real)} real ones", flush=True)
    if len(drawn) != COUNT:
        print(f"It falls with their number: compare it with that of {len(drawn)} others only.")
    model = CLIPModel.from_pretrained(options.clip).eval().to(options.device)
    processor = CLIPProcessor.from_pretrained(options.clip)
    mean, half = clip_score_of(drawn, captions, options.device, options.batch, model, processor)
    print(f"CLIP score {mean:.2f} ± {half:.2f} ({options.clip})")


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
    judge.add_argument("--real", type=Path, required=True, metavar="DIR")
    judge.add_argument("--drawn", type=Path, required=True, metavar="DIR")
    judge.add_argument("--captions", type=Path, required=True, metavar="TXT", help="by prompts")
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
