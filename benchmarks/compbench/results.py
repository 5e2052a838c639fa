"""The official evaluators: the commands that run them, and what they found, beside the paper's.

Nothing of them is here: T2I-CompBench (github.com/Karine-Huang/T2I-CompBench) and GenEval
(github.com/djghosh13/geneval) are the user's to install.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
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
_COMPLEX_VAL = "e23a7dfb80d4a4ee7c5aef7cfe2cfc26e061870b6f094c90441558b0281c5872"
"""SHA-256 of complex_val.txt's prompts, by which 3_in_1.py goes whatever was drawn."""


@dataclass(frozen=True)
class Evaluator:
    """How T2I-CompBench judges a category.

    Attributes
    ----------
    result : str
        Its file, in the category's folder.
    names : str, optional
        A file beside it that tells the pictures it saw, with their paths or without.
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
BASELINE = "baseline"
Scores = dict[str, dict[str, list[float]]]
"""Column -> setting -> score of each picture, in order. GenEval has a column for each tag."""


def commands(out: Path, plan: Plan) -> list[str]:
    """What to type to have a complete run judged, one line each."""
    lines = []
    for category in plan.categories:
        evaluator = EVALUATORS.get(category.name)
        if category.name == "complex":
            if len(category.seeds) != 10:
                lines.append(
                    f"# 3_in_1.py is wrong but with 10 images per prompt, not "
                    f"{len(category.seeds)}."
                )
            if _digest("\n".join(category.prompts).encode()) != _COMPLEX_VAL:
                lines.append(
                    "# 3_in_1.py goes by its own complex_val.txt, and these are other prompts, or "
                    "in another order: give it --data_path with yours, as complex_val.txt, beside "
                    "copies of its complex_val_spatial.txt and complex_val_action.txt."
                )
        if not category.metadata and not evaluator:
            lines.append(f"# {category.name} is no category of T2I-CompBench.")
            continue
        for gamma in plan.gammas:
            folder = shlex.quote(str((out / category.folder(gamma)).resolve()))
            todo = _GENEVAL if category.metadata else evaluator.commands
            lines += [command.format(folder) for command in todo]
    return lines


def read(out: Path, plan: Plan) -> tuple[Scores, list[str]]:
    """Read the evaluators' files.

    Returns
    -------
    scores : dict
    missing : list of str
        Result files that are not there yet.

    Raises
    ------
    Problem
        If one is not of this run's pictures at its setting: all of them, each once.
    """
    scores: Scores = {}
    missing = []
    for category in plan.categories:
        evaluator = EVALUATORS.get(category.name)
        if not category.metadata and not evaluator:
            continue
        files = {}
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
                _check_age(file, folder / "samples")
                if len(set(values)) > 1:
                    files[file] = _digest(file.read_bytes())
                scores.setdefault(category.name, {})[setting(gamma)] = values
        _check_copies(files)
    return scores, missing


def add_baseline(scores: Scores, plan: Plan, out: Path, base: Plan) -> list[str]:
    """Add the results of another run's gamma 1, as the setting ``baseline``.

    Returns
    -------
    list of str
        Its result files that are not there yet.

    Raises
    ------
    Problem
        If it is of other prompts or seeds, and cannot be paired.
    """
    if 1.0 not in base.gammas:
        raise Problem(f"The baseline {out} has no pictures at gamma 1.")
    theirs = {category.name: category for category in base.categories}
    if other := [c.name for c in plan.categories if theirs.get(c.name) != c]:
        raise Problem(
            f"The baseline {out} was not drawn with the same prompts and seeds of "
            f"{', '.join(other)}: the two cannot be paired."
        )
    only = Plan(base.workflow, (1.0,), plan.categories)
    found, missing = read(out, only)
    for column, by_setting in found.items():
        if column in scores:
            scores[column][BASELINE] = by_setting[setting(1)]
    return missing


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _load(file: Path, by_line: bool = False) -> Any:
    try:
        text = file.read_text("utf-8")
        return [json.loads(line) for line in text.splitlines()] if by_line else json.loads(text)
    except (OSError, ValueError) as error:
        raise Problem(f"{file} cannot be read: {error}") from error


def _paths(category: Category, gamma: float) -> list[str]:
    """The pictures' paths in the output folder, in order."""
    return [unit.path for i in range(len(category.prompts)) for unit in category.units(i, gamma)]


def _tail(path: str, like: str) -> str:
    """As much of the end of a path as another has; the whole of a mere name."""
    return "/".join(path.replace("\\", "/").split("/")[-1 - like.count("/") :])


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
            f"{file} is not of this run's pictures at this setting: "
            f"{len(strange) or 'some twice'} {', '.join(strange[:3])}; let the evaluator run on "
            f"the folder itself, or on a copy whose path ends as its own."
        )


def _t2i(file: Path, category: Category, gamma: float) -> list[float]:
    """``[{"question_id": 0, "answer": "0.6900"}, ...]``, a number for each picture."""
    try:
        found = {int(entry["question_id"]): float(entry["answer"]) for entry in _load(file)}
        numbers = [int(entry["question_id"]) for entry in _load(file)]
    except (KeyError, TypeError, ValueError) as error:
        raise Problem(f"{file} is not a vqa_result.json: {error!r}") from error
    _all_once(file, numbers, range(len(_paths(category, gamma))))
    if wrong := [number for number, score in found.items() if not -1 <= score <= 1]:
        raise Problem(f"{file}: the score of {wrong[0]} is {found[wrong[0]]}")
    return [found[number] for number in sorted(found)]


def _check_names(file: Path, category: Category, gamma: float) -> None:
    """Whether the evaluator saw these pictures, by what it wrote down itself."""
    if file.exists():
        paths = _paths(category, gamma)
        try:
            seen = [_tail(entry["image"], paths[0]) for entry in _load(file)]
        except (KeyError, TypeError, AttributeError) as error:
            raise Problem(f"{file} names no pictures: {error!r}") from error
        if all("/" not in name for name in seen):
            paths = [path.rpartition("/")[2] for path in paths]
        _all_once(file, seen, paths)


def _check_age(file: Path, samples: Path) -> None:
    """Refuse a result that is older than the pictures."""
    times = [entry.stat().st_mtime for entry in os.scandir(samples)] if samples.is_dir() else []
    if file.stat().st_mtime < max(times, default=0.0):
        raise Problem(
            f"{file} is older than the pictures: let the evaluator run again. (If copying has "
            f"changed the times, and only then: touch the file.)"
        )


def _check_copies(files: dict[Path, str]) -> None:
    """Refuse one result for two settings: most of these files name no pictures."""
    first: dict[str, Path] = {}
    for file, digest in files.items():
        if digest in first:
            raise Problem(
                f"{file} and {first[digest]} are the same to the byte, so one is a copy: let the "
                f"evaluator run again. (If both are right, as can be with few pictures, a space "
                f"at the end of one says so.)"
            )
        first[digest] = file


def _geneval(file: Path, category: Category, gamma: float) -> dict[str, list[float]]:
    """One line a picture, in any order."""
    paths = _paths(category, gamma)
    try:
        entries = _load(file, by_line=True)
        seen = [_tail(entry["filename"], paths[0]) for entry in entries]
        _all_once(file, seen, paths)
        found = dict(zip(seen, entries, strict=True))
        scores: dict[str, list[float]] = {}
        for i, path in enumerate(paths):
            metadata, entry = category.metadata[i // len(category.seeds)], found[path]
            if (entry["prompt"], entry["tag"]) != (metadata["prompt"], metadata["tag"]):
                raise Problem(f"{file}: {path} was judged for another prompt")
            if not isinstance(entry["correct"], bool):
                raise Problem(f"{file}: {path} is neither correct nor not")
            scores.setdefault(metadata["tag"], []).append(float(entry["correct"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise Problem(f"{file} is not GenEval's results.jsonl: {error!r}") from error
    return scores


def table(scores: Scores, plan: Plan) -> str:
    """Markdown: T2I-CompBench beside the paper's, and GenEval.

    A difference to the baseline, or else to gamma 1, is paired over the pictures, and has its 95 %
    confidence interval over the prompts.
    """
    images = {category.name: len(category.seeds) for category in plan.categories}
    columns = [name for name in EVALUATORS if name in scores]
    tags = [name for name in scores if name not in EVALUATORS]
    tags.sort(key=lambda tag: GENEVAL_TAGS.index(tag) if tag in GENEVAL_TAGS else len(GENEVAL_TAGS))
    settings = [setting(gamma) for gamma in plan.gammas]
    plain = setting(1)
    if any(BASELINE in by_setting for by_setting in scores.values()):
        plain, settings = BASELINE, [BASELINE, *settings]
    parts = []
    if columns:
        rows = [
            [name, *(_cell([scores[c]], name, plain, images[c]) for c in columns)]
            for name in settings
        ]
        for model, values in PAPER.items():
            known = {c: f"{v:.4f}" for c, v in zip(PAPER_COLUMNS, values, strict=True)}
            rows.append([f"paper: {model}", *(known.get(c, "") for c in columns)])
        parts.append(_markdown(["T2I-CompBench", *columns], rows))
    if tags:
        each, every = [[scores[tag]] for tag in tags], [scores[tag] for tag in tags]
        rows = [
            [name, *(_cell(some, name, plain, images[GENEVAL]) for some in (*each, every))]
            for name in settings
        ]
        parts.append(_markdown(["GenEval", *tags, "overall"], rows))
    if any(name in by_setting for by_setting in scores.values() for name in settings[1:]):
        parts.append(f"In brackets: the difference to {plain}, with its 95 % interval.")
    return "\n\n".join(parts)


def _cell(columns: list[dict[str, list[float]]], name: str, plain: str, images: int) -> str:
    """A mean over columns, each counting the same, and its difference to the plain setting's."""
    if not all(name in column for column in columns):
        return ""
    text = f"{statistics.fmean(statistics.fmean(column[name]) for column in columns):.4f}"
    if name == plain or not all(plain in column for column in columns):
        return text
    means, variances = [], []
    for column in columns:
        paired = [b - a for a, b in zip(column[plain], column[name], strict=True)]
        prompts = [statistics.fmean(paired[i : i + images]) for i in range(0, len(paired), images)]
        if len(prompts) < 2:
            return text
        means.append(statistics.fmean(prompts))
        variances.append(statistics.variance(prompts) / len(prompts))
    half = 1.96 * math.sqrt(sum(variances)) / len(columns)
    return f"{text} ({statistics.fmean(means):+.4f} ± {half:.4f})"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
