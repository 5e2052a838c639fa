"""The official evaluators: the commands that run them, and what they found, beside the paper's."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from statistics import fmean, variance
from typing import Any

from PIL import Image
from reporting import markdown

from . import judging
from .plan import GENEVAL, GENEVAL_2, Category, Plan, Problem, setting

_BLIP = "(cd $T2I_COMPBENCH/BLIPvqa_eval && python BLIP_vqa.py --out_dir={})"
_2D = "(cd $T2I_COMPBENCH/UniDet_eval && python 2D_spatial_eval.py --outpath={})"
_3D = "(cd $T2I_COMPBENCH/UniDet_eval && python 3D_spatial_eval.py --outpath={})"
_NUMERACY = "(cd $T2I_COMPBENCH/UniDet_eval && python numeracy_eval.py --outpath={})"
_CLIP = "(cd $T2I_COMPBENCH && python CLIPScore_eval/CLIP_similarity.py --outpath={})"
_3_IN_1 = "(cd $T2I_COMPBENCH/3_in_1_eval && python 3_in_1.py --outpath={})"
_COMPLEX = [_BLIP, *(c.replace("{}", "{} --complex=True") for c in (_2D, _CLIP)), _3_IN_1]
_GENEVAL = [
    "python $GENEVAL/evaluation/evaluate_images.py {0} --outfile {0}/results.jsonl "
    '--model-path "$GENEVAL_DETECTOR"',
    "python $GENEVAL/evaluation/summary_scores.py {0}/results.jsonl",
]
_OF_2D, _OF_3D = (f"labels/annotation_obj_detection_{d}d" for d in (2, 3))
_OF_BLIP = "annotation_blip/vqa_result.json", "annotation1_blip/vqa_test.json"
EVALUATORS: dict[str, tuple[list[str], str, str | None]] = {
    **dict.fromkeys(("color", "shape", "texture"), ([_BLIP], *_OF_BLIP)),
    "spatial": ([_2D], f"{_OF_2D}/vqa_result.json", f"{_OF_2D}/mapping.json"),
    "3d_spatial": ([_3D], f"{_OF_3D}/vqa_result.json", None),
    "numeracy": ([_NUMERACY], "annotation_num/vqa_result.json", None),
    "non_spatial": ([_CLIP], "annotation_clip/vqa_result.json", None),
    "complex": (_COMPLEX, "annotation_3_in_1/vqa_result.json", None),
    GENEVAL: (_GENEVAL, "results.jsonl", None),
}
"""Category -> commands, the file of results, and the one that names the pictures seen, if any."""
_NONE: tuple[list[str], str, str | None] = ([], "", None)
GENEVAL_TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
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
"""Column -> setting -> mean score of each prompt, in order. GenEval has a column for each tag."""


def commands(out: Path, plan: Plan) -> list[str]:
    """What to type to have a complete run judged, one line each."""
    lines = []
    for category in plan.categories:
        if category.name == GENEVAL_2:
            lines.append(
                "# geneval2: --judge prompt-check asks its questions; Soft-TIFA is its own."
            )
        elif category.name not in EVALUATORS:
            lines.append(f"# {category.name} is no category of T2I-CompBench.")
        if category.name == "complex":
            lines.append("# 3_in_1.py takes 10 images per prompt, and goes by its own prompts.")
        for gamma in plan.gammas:
            folder = shlex.quote(str((out / category.folder(gamma)).resolve()))
            todo = EVALUATORS.get(category.name, _NONE)[0]
            lines += [command.format(folder) for command in todo]
    return lines


def report(out: Path, baseline: Path | None = None) -> str:
    """The evaluators' results in words; a `Problem` if there are none, or wrong ones."""
    plan = Plan.read(out)
    scores, missing = read(out, plan)
    checked, judge = judging.read(out, plan)
    notes = []
    if baseline:
        base = Plan.read(baseline)
        _check_pairs(out, plan, baseline, base)
        theirs_plan = Plan(base.workflow, [1.0], plan.categories)
        theirs, theirs_missing = read(baseline, theirs_plan)
        missing += theirs_missing
        for column in theirs.keys() & scores.keys():
            scores[column][BASELINE] = theirs[column][setting(1)]
        if checked and (found := judging.read(baseline, theirs_plan)) and found[1] == judge:
            for column, of_column in found[0].items():
                checked.setdefault(column, {})[BASELINE] = of_column[setting(1)]
        if beside := plan.workflow.differences(base.workflow):
            notes.append(f"The workflows differ in more than TACA and LoRAs: {', '.join(beside)}")
    elif nodes := plan.workflow.loras():
        why = f"{setting(1)} is with the LoRA of {', '.join(nodes)}, not the plain model"
        notes.append(f"{why}: draw that too (--gammas 1), and name its folder with --baseline.")
    if not (scores or checked):
        raise Problem("\n".join(["No evaluator has been run. They are:", *commands(out, plan)]))
    if missing and scores:
        notes.append("Not there yet:\n" + "\n".join(missing))
    tables = [table(scores, plan)] if scores else []
    if judge:
        title, *by = judge
        notes.insert(0, f"{title}: {', '.join(map(str, by))} bytes.")
        tables.append(table({}, plan, {title: checked}))
    return "\n\n".join([*tables, *notes])


def _check_pairs(out: Path, plan: Plan, baseline: Path, base: Plan) -> None:
    """Refuse a baseline that cannot be compared picture by picture."""
    if 1.0 not in base.gammas:
        raise Problem(f"The baseline {baseline} has no pictures at gamma 1.")
    if other := [c.name for c in plan.categories if c not in base.categories]:
        raise Problem(f"{baseline} has not the same prompts and seeds of {', '.join(other)}.")
    first = [out / plan.units()[0].path, baseline / base.units()[0].path]
    if len(sizes := {Image.open(picture).size for picture in first if picture.exists()}) > 1:
        raise Problem(f"The pictures in {out} and {baseline} are of other sizes: {sorted(sizes)}.")


def read(out: Path, plan: Plan) -> tuple[Scores, list[str]]:
    """Scores, and the result files that are not there yet; wrong ones are a `Problem`."""
    scores: Scores = {}
    missing = []
    for category in plan.categories:
        _, result, names = EVALUATORS.get(category.name, _NONE)
        contents: dict[bytes, Path] = {}
        for gamma in plan.gammas if result else ():
            file = out / category.folder(gamma) / result
            if not file.exists():
                missing.append(str(file))
                continue
            try:
                found = (_geneval if category.metadata else _t2i)(file, category, gamma)
                if names and (seen := out / category.folder(gamma) / names).exists():
                    images = [entry["image"] for entry in json.loads(seen.read_text("utf-8"))]
                    _by_path(seen, images, category, gamma)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise Problem(f"{file} is not what its evaluator writes: {error!r}") from error
            pictures = [out / unit.path for unit in category.units(gamma)]
            if any(p.exists() and p.stat().st_mtime > file.stat().st_mtime for p in pictures):
                raise Problem(f"{file} is older than the pictures: let the evaluator run again.")
            # Most of these files name no pictures. Two may be the same if all scores are alike.
            is_telling = any(len(set(values)) > 1 for values in found.values())
            if is_telling and (first := contents.setdefault(file.read_bytes(), file)) != file:
                why = f"{file} is {first} to the byte, so one is a copy: run the evaluator again."
                raise Problem(f"{why} (If both are right, a space at the end of one says so.)")
            for column, values in found.items():
                scores.setdefault(column, {})[setting(gamma)] = values
    return scores, missing


def _check_all_once(file: Path, found: list[Any], wanted: list[Any]) -> None:
    if len(found) != len(wanted):
        why = f"{file} has {len(found)} results for {len(wanted)} pictures"
    elif strange := set(found) - set(wanted) or set(wanted) - set(found):
        why = f"{file} is not of this run's pictures at this setting: {min(map(str, strange))}"
    else:
        return
    raise Problem(f"{why}. Let the evaluator run on this folder.")


def _by_path(file: Path, images: list[str], category: Category, gamma: float) -> list[int]:
    """Which of a file's entries is each picture's, by the ends of their paths or the bare names."""
    paths = [unit.path for unit in category.units(gamma)]
    is_bare = not category.metadata and all("/" not in image for image in images)
    parts = 1 if is_bare else paths[0].count("/") + 1
    wanted, seen = (
        ["/".join(path.replace("\\", "/").split("/")[-parts:]) for path in some]
        for some in (paths, images)
    )
    _check_all_once(file, seen, wanted)
    entry = {path: i for i, path in enumerate(seen)}
    return [entry[path] for path in wanted]


def _t2i(file: Path, category: Category, gamma: float) -> dict[str, list[float]]:
    """``[{"question_id": 0, "answer": "0.6900"}, ...]``, a number for each picture."""
    entries = json.loads(file.read_text("utf-8"))
    found = [(int(entry["question_id"]), float(entry["answer"])) for entry in entries]
    count = len(category.prompts) * (images := len(category.seeds))
    _check_all_once(file, [number for number, _ in found], list(range(count)))
    scores = [score for _, score in sorted(found)]
    if wrong := [i for i, score in enumerate(scores) if not -1 <= score <= 1]:
        raise Problem(f"{file}: the score of {wrong[0]} is {scores[wrong[0]]}")
    return {category.name: [fmean(scores[i : i + images]) for i in range(0, count, images)]}


def _geneval(file: Path, category: Category, gamma: float) -> dict[str, list[float]]:
    """One line a picture, in any order."""
    entries = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    order = _by_path(file, [entry["filename"] for entry in entries], category, gamma)
    scores: dict[str, list[float]] = {}
    for i, metadata in enumerate(category.metadata or ()):
        own = [entries[k] for k in order[i * len(category.seeds) :][: len(category.seeds)]]
        for entry in own:
            if (entry["prompt"], entry["tag"]) != (metadata["prompt"], metadata["tag"]):
                raise Problem(f"{file}: {entry['filename']} was judged for another prompt")
            if not isinstance(entry["correct"], bool):
                raise Problem(f"{file}: {entry['filename']} is neither correct nor not")
        scores.setdefault(metadata["tag"], []).append(fmean(entry["correct"] for entry in own))
    return scores


def table(scores: Scores, plan: Plan, others: dict[str, Scores] | None = None) -> str:
    """Markdown: T2I-CompBench beside the paper's, and GenEval; differences are paired by prompt.

    ``others`` are of other evaluators, by title.
    """
    others = others or {}
    names, plain = [setting(gamma) for gamma in plan.gammas], setting(1)
    every = [by_setting for some in (scores, *others.values()) for by_setting in some.values()]
    if any(BASELINE in by_setting for by_setting in every):
        names, plain = [BASELINE, *names], BASELINE
    columns = [name for name in EVALUATORS if name in scores]
    tags = [tag for tag in GENEVAL_TAGS if tag in scores]
    tags += sorted(scores.keys() - {*columns, *tags})
    parts = []
    if columns:
        rows = [[name, *(_cell([scores[c]], name, plain) for c in columns)] for name in names]
        for model, values in PAPER.items():
            known = dict(zip(PAPER_COLUMNS, values, strict=True))
            cells = [f"{known[c]:.4f}" if c in known else "" for c in columns]
            rows.append([f"paper: {model}", *cells])
        parts.append(markdown(["T2I-CompBench", *columns], rows))
    if tags:
        groups = [[scores[tag]] for tag in tags] + [[scores[tag] for tag in tags]]
        rows = [[name, *(_cell(group, name, plain) for group in groups)] for name in names]
        parts.append(markdown(["GenEval", *tags, "overall"], rows))
    for title, some in others.items():
        rows = [[name, *(_cell([some[c]], name, plain) for c in some)] for name in names]
        parts.append(markdown([title, *some], rows))
    if len(names) > 1:
        parts.append(f"In brackets: the difference to {plain}, with its 95 % interval.")
    return "\n\n".join(parts)


def _cell(columns: list[dict[str, list[float]]], name: str, plain: str) -> str:
    """A mean over columns, each counting the same, and its difference to the plain setting's."""
    if not all(name in column for column in columns):
        return ""
    text = f"{fmean(fmean(column[name]) for column in columns):.4f}"
    if name == plain or not all(plain in c and len(c[plain]) > 1 for c in columns):
        return text
    differences = [[b - a for a, b in zip(c[plain], c[name], strict=True)] for c in columns]
    half = 1.96 * sum(variance(d) / len(d) for d in differences) ** 0.5 / len(columns)
    return f"{text} ({fmean(map(fmean, differences)):+.4f} ± {half:.4f})"
