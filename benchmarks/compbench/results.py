"""The official evaluators: the commands that run them, and what they found, beside the paper's.

Nothing of them is here: T2I-CompBench (github.com/Karine-Huang/T2I-CompBench) and GenEval
(github.com/djghosh13/geneval) are the user's to install.
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .plan import GENEVAL, Category, Plan, Problem, setting

_BLIP = "(cd $T2I_COMPBENCH/BLIPvqa_eval && python BLIP_vqa.py --out_dir={})"
_2D = "(cd $T2I_COMPBENCH/UniDet_eval && python 2D_spatial_eval.py --outpath={})"
_CLIP = "(cd $T2I_COMPBENCH && python CLIPScore_eval/CLIP_similarity.py --outpath={})"
_COMPLEX = " --complex=True)"  # of the two that know it


@dataclass(frozen=True)
class Evaluator:
    """How T2I-CompBench judges a category.

    Attributes
    ----------
    result : str
        Its file, in the category's folder.
    names : str, optional
        A file beside it that tells the pictures it saw.
    """

    commands: tuple[str, ...]
    result: str
    names: str | None = None


_ATTRIBUTE = Evaluator(
    (_BLIP,), "annotation_blip/vqa_result.json", "annotation1_blip/vqa_test.json"
)
_DETECTION = "labels/annotation_obj_detection_2d"
EVALUATORS = {
    "color": _ATTRIBUTE,
    "shape": _ATTRIBUTE,
    "texture": _ATTRIBUTE,
    "spatial": Evaluator((_2D,), f"{_DETECTION}/vqa_result.json", f"{_DETECTION}/mapping.json"),
    "3d_spatial": Evaluator(
        ("(cd $T2I_COMPBENCH/UniDet_eval && python 3D_spatial_eval.py --outpath={})",),
        "labels/annotation_obj_detection_3d/vqa_result.json",
    ),
    "numeracy": Evaluator(
        ("(cd $T2I_COMPBENCH/UniDet_eval && python numeracy_eval.py --outpath={})",),
        "annotation_num/vqa_result.json",
    ),
    "non_spatial": Evaluator((_CLIP,), "annotation_clip/vqa_result.json"),
    "complex": Evaluator(
        (
            _BLIP,
            _2D.replace(")", _COMPLEX),
            _CLIP.replace(")", _COMPLEX),
            "(cd $T2I_COMPBENCH/3_in_1_eval && python 3_in_1.py --outpath={})",
        ),
        "annotation_3_in_1/vqa_result.json",
    ),
}
GENEVAL_RESULT = "results.jsonl"
GENEVAL_TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
_GENEVAL = (
    "python $GENEVAL/evaluation/evaluate_images.py {0} --outfile {0}/results.jsonl "
    '--model-path "$GENEVAL_DETECTOR"',
    "python $GENEVAL/evaluation/summary_scores.py {0}/results.jsonl",
)
PAPER_COLUMNS = ("color", "shape", "texture", "spatial", "non_spatial", "complex")
PAPER = {
    "FLUX.1-dev": (0.7678, 0.5064, 0.6756, 0.2066, 0.3035, 0.4359),
    "FLUX.1-dev, TACA, r = 64": (0.7843, 0.5362, 0.6872, 0.2405, 0.3041, 0.4494),
    "FLUX.1-dev, TACA, r = 16": (0.7842, 0.5347, 0.6814, 0.2321, 0.3046, 0.4479),
    "SD3.5-Medium": (0.7890, 0.5770, 0.7328, 0.2087, 0.3104, 0.4441),
    "SD3.5-Medium, TACA, r = 64": (0.8074, 0.5938, 0.7522, 0.2678, 0.3106, 0.4470),
    "SD3.5-Medium, TACA, r = 16": (0.7984, 0.5834, 0.7467, 0.2374, 0.3111, 0.4505),
}
"""T2I-CompBench scores with the LoRA of rank r (arXiv 2506.07986, Table 1)."""


def commands(out: Path, plan: Plan) -> list[str]:
    """What to type to have a complete run judged, one line each."""
    lines = []
    for category in plan.categories:
        evaluator = EVALUATORS.get(category.name)
        if category.name == "complex" and len(category.seeds) != 10:
            lines.append(
                f"# 3_in_1.py is wrong but with 10 images per prompt, not {len(category.seeds)}."
            )
        if not category.metadata and not evaluator:
            lines.append(f"# {category.name} is no category of T2I-CompBench.")
            continue
        for gamma in plan.gammas:
            folder = shlex.quote(str((out / category.folder(gamma)).resolve()))
            todo = _GENEVAL if category.metadata else evaluator.commands
            lines += [command.format(folder) for command in todo]
    return lines


def read(out: Path, plan: Plan) -> tuple[dict[str, dict[str, list[float]]], list[str]]:
    """Read the evaluators' files.

    Returns
    -------
    scores : dict
        Column -> setting -> score of each picture, in order. GenEval has a column for each tag.
    missing : list of str
        Result files that are not there yet.

    Raises
    ------
    Problem
        If one is not of this run's pictures: all of them, each once.
    """
    scores: dict[str, dict[str, list[float]]] = {}
    missing = []
    for category in plan.categories:
        evaluator = EVALUATORS.get(category.name)
        if not category.metadata and not evaluator:
            continue
        for gamma in plan.gammas:
            folder = out / category.folder(gamma)
            file = folder / (GENEVAL_RESULT if category.metadata else evaluator.result)
            if not file.exists():
                missing.append(str(file))
            elif category.metadata:
                for tag, values in _geneval(file, category, gamma).items():
                    scores.setdefault(tag, {})[setting(gamma)] = values
            else:
                values = _t2i(file, category, gamma)
                if evaluator.names and category.name != "complex":
                    _check_names(folder / evaluator.names, category, gamma)
                scores.setdefault(category.name, {})[setting(gamma)] = values
    return scores, missing


def _load(file: Path, by_line: bool = False) -> Any:
    try:
        text = file.read_text("utf-8")
        return [json.loads(line) for line in text.splitlines()] if by_line else json.loads(text)
    except (OSError, ValueError) as error:
        raise Problem(f"{file} cannot be read: {error}") from error


def _names(category: Category, gamma: float) -> list[str]:
    """The pictures' paths in the category's folder, in order."""
    start = len(category.folder(gamma)) + 1
    return [
        unit.path[start:] for i in range(len(category.prompts)) for unit in category.units(i, gamma)
    ]


def _all_once(file: Path, found: Iterable[Any], wanted: Iterable[Any]) -> None:
    found, wanted = list(found), list(wanted)
    if len(found) != len(wanted):
        raise Problem(
            f"{file} has {len(found)} results for {len(wanted)} pictures: let the "
            f"evaluator run again, on the complete set."
        )
    if set(found) != set(wanted):
        strange = sorted(map(str, set(found) - set(wanted)))
        raise Problem(
            f"{file} is not of this run's pictures: {len(strange) or 'some twice'} "
            f"{', '.join(strange[:3])}"
        )


def _t2i(file: Path, category: Category, gamma: float) -> list[float]:
    """``[{"question_id": 0, "answer": "0.6900"}, ...]``, a number for each picture."""
    try:
        found = {int(entry["question_id"]): float(entry["answer"]) for entry in _load(file)}
        numbers = [int(entry["question_id"]) for entry in _load(file)]
    except (KeyError, TypeError, ValueError) as error:
        raise Problem(f"{file} is not a vqa_result.json: {error!r}") from error
    _all_once(file, numbers, range(len(_names(category, gamma))))
    if wrong := [number for number, score in found.items() if not -1 <= score <= 1]:
        raise Problem(f"{file}: the score of {wrong[0]} is {found[wrong[0]]}")
    return [found[number] for number in sorted(found)]


def _check_names(file: Path, category: Category, gamma: float) -> None:
    """Whether the evaluator saw these pictures, by the names that it wrote down itself."""
    if file.exists():
        try:
            seen = [entry["image"].replace("\\", "/").rpartition("/")[2] for entry in _load(file)]
        except (KeyError, TypeError, AttributeError) as error:
            raise Problem(f"{file} names no pictures: {error!r}") from error
        _all_once(file, seen, [name.rpartition("/")[2] for name in _names(category, gamma)])


def _geneval(file: Path, category: Category, gamma: float) -> dict[str, list[float]]:
    """One line a picture, in any order."""
    found = {}
    try:
        entries = _load(file, by_line=True)
        for entry in entries:
            name = "/".join(entry["filename"].replace("\\", "/").split("/")[-3:])
            if not isinstance(entry["correct"], bool):
                raise Problem(f"{file}: {name} is neither correct nor not")
            found[name] = entry
        names = _names(category, gamma)
        _all_once(
            file,
            ["/".join(e["filename"].replace("\\", "/").split("/")[-3:]) for e in entries],
            names,
        )
        scores: dict[str, list[float]] = {}
        for i, name in enumerate(names):
            metadata, entry = category.metadata[i // len(category.seeds)], found[name]
            if (entry["prompt"], entry["tag"]) != (metadata["prompt"], metadata["tag"]):
                raise Problem(f"{file}: {name} was judged for another prompt")
            scores.setdefault(metadata["tag"], []).append(float(entry["correct"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise Problem(f"{file} is not GenEval's results.jsonl: {error!r}") from error
    return scores


def table(scores: dict[str, dict[str, list[float]]], plan: Plan) -> str:
    """Markdown: T2I-CompBench beside the paper's, and GenEval.

    A difference to gamma 1 is paired over the pictures, and has its 95 % confidence interval over
    the prompts.
    """
    images = {category.name: len(category.seeds) for category in plan.categories}
    columns = [name for name in EVALUATORS if name in scores]
    tags = [name for name in scores if name not in EVALUATORS]
    tags.sort(key=lambda tag: GENEVAL_TAGS.index(tag) if tag in GENEVAL_TAGS else len(GENEVAL_TAGS))
    settings = [setting(gamma) for gamma in plan.gammas]
    parts = []
    if columns:
        rows = [[name, *(_cell(scores[c], name, images[c]) for c in columns)] for name in settings]
        for model, values in PAPER.items():
            known = {c: f"{v:.4f}" for c, v in zip(PAPER_COLUMNS, values, strict=True)}
            rows.append([f"paper: {model}", *(known.get(c, "") for c in columns)])
        parts.append(_markdown(["T2I-CompBench", *columns], rows))
    if tags:
        rows = []
        for name in settings:
            means = [statistics.fmean(scores[tag][name]) for tag in tags if name in scores[tag]]
            overall = f"{statistics.fmean(means):.4f}" if len(means) == len(tags) else ""
            cells = (_cell(scores[tag], name, images[GENEVAL]) for tag in tags)
            rows.append([name, *cells, overall])
        parts.append(_markdown(["GenEval", *tags, "overall"], rows))
    return "\n\n".join(parts)


def _cell(scores: dict[str, list[float]], name: str, images: int) -> str:
    """A mean, and its difference to gamma 1."""
    if name not in scores:
        return ""
    text, plain = f"{statistics.fmean(scores[name]):.4f}", scores.get(setting(1))
    if plain is None or name == setting(1):
        return text
    paired = [b - a for a, b in zip(plain, scores[name], strict=True)]
    prompts = [statistics.fmean(paired[i : i + images]) for i in range(0, len(paired), images)]
    if len(prompts) < 2:
        return text
    half = 1.96 * statistics.stdev(prompts) / math.sqrt(len(prompts))
    return f"{text} ({statistics.fmean(prompts):+.4f} ± {half:.4f})"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
