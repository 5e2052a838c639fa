"""TACA Prompt Check as the judge of a run: with a text encoder that one has, and nothing else.

It is not the benchmarks' own evaluator, and its numbers are not those of their papers. GenEval 2's
questions are asked as its file has them; the prompts of the others as a whole.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from .plan import Category, Plan, Problem, setting, write

RESULT = "prompt_check.json"
TITLE = "Prompt Check, not the benchmark's own"
PLAIN = "{} Please answer yes or no."
RIGHT = '{} Is "{}" the right answer? Please answer yes or no.'


def judge(out: Path, encoder: Path, kind: str) -> None:
    """Judge a run that is drawn; what this encoder has judged before is kept."""
    plan = Plan.read(out)
    if missing := plan.missing(out):
        raise Problem(f"{len(missing)} pictures are missing: draw them before they are judged.")
    if not encoder.is_file():
        raise Problem(f"There is no encoder {encoder}.")
    import comfyui  # sets up ComfyUI in this process
    import torch

    import comfy.sd  # isort: skip

    [module] = comfyui.parts("judge")
    try:
        how = comfy.sd.CLIPType[kind.upper()]
        judge = module.Judge(comfy.sd.load_clip([str(encoder)], clip_type=how))
    except KeyError as error:
        raise Problem(f"ComfyUI has no text encoder type {kind}.") from error
    except ValueError as error:
        raise Problem(str(error)) from error
    judge.load()
    about = [TITLE, judge.family.name, encoder.name, encoder.stat().st_size]
    for category in plan.categories:
        asked = [questions(category, i, module.QUESTION) for i in range(len(category.prompts))]
        for gamma in plan.gammas:
            file = out / category.folder(gamma) / RESULT
            if _is_current(file, about, out, category, gamma):
                continue
            found = {}
            for i, unit in enumerate(tqdm(category.units(gamma), file.parent.name, leave=False)):
                own = asked[i // len(category.seeds)]
                with Image.open(out / unit.path) as image:
                    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
                with torch.inference_mode():
                    answers = judge.ask(torch.from_numpy(pixels)[None], [text for text, _ in own])
                found[unit.path] = [
                    p if is_yes else 1 - p for p, (_, is_yes) in zip(answers, own, strict=True)
                ]
            content = {"about": about, "pictures": found}
            write(out, f"{category.folder(gamma)}/{RESULT}", json.dumps(content, indent=1).encode())
    print(f"Judged by {encoder.name}.", file=sys.stderr)


def questions(category: Category, index: int, whole: str) -> list[tuple[str, bool]]:
    """What is asked about a prompt's pictures, and whether yes is the right answer."""
    pairs = category.metadata[index].get("vqa_list") if category.metadata else None
    if not pairs:
        return [(whole.format(category.prompts[index]), True)]
    asked = []
    for question, answer in pairs:
        if (word := answer.strip().lower()) in ("yes", "no"):
            asked.append((PLAIN.format(question), word == "yes"))
        else:
            asked.append((RIGHT.format(question, answer), True))
    return asked


def _is_current(file: Path, about: list[Any], out: Path, category: Category, gamma: float) -> bool:
    try:
        is_own = json.loads(file.read_text("utf-8"))["about"] == about
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return is_own and not _is_older(file, out, category, gamma)


def _is_older(file: Path, out: Path, category: Category, gamma: float) -> bool:
    pictures = [out / unit.path for unit in category.units(gamma)]
    return any(p.exists() and p.stat().st_mtime > file.stat().st_mtime for p in pictures)


def read(out: Path, plan: Plan) -> tuple[dict[str, dict[str, list[float]]], list[Any] | None]:
    """Scores as those of the evaluators, by category; and what judged them, if anything did.

    A picture's score is the geometric mean of its answers. Raises `Problem` for files that are
    older than the pictures, of other pictures, or by several encoders.
    """
    scores: dict[str, dict[str, list[float]]] = {}
    judges = []
    for category in plan.categories:
        for gamma in plan.gammas:
            file = out / category.folder(gamma) / RESULT
            if not file.exists():
                continue
            try:
                content = json.loads(file.read_text("utf-8"))
                judges.append(content["about"])
                answers = [content["pictures"][unit.path] for unit in category.units(gamma)]
                values = [float(np.prod(each)) ** (1 / len(each)) for each in answers]
            except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
                raise Problem(f"{file} is not of this run: let --judge run again.") from error
            if _is_older(file, out, category, gamma):
                raise Problem(f"{file} is older than the pictures: let --judge run again.")
            count = len(category.seeds)
            means = [fmean(values[i : i + count]) for i in range(0, len(values), count)]
            scores.setdefault(category.name, {})[setting(gamma)] = means
    if any(each != judges[0] for each in judges):
        raise Problem("Several encoders have judged this run: let --judge run again with one.")
    return scores, judges[0] if judges else None
