"""What evaluators leave, read, compared and checked."""

import json
import os
import shutil
from dataclasses import asdict, replace

import compbench.__main__ as compbench
import numpy as np
import pytest
from compbench import results
from compbench.plan import Category, Plan, read_category
from PIL import Image

from support.compbench import BENCH, COW, NO_WORKFLOW, refuses, write, write_json


def write_scores(file, scores):
    """BLIP's answers are texts, the others' are numbers."""
    answers = [f"{s:.4f}" if "blip" in str(file) else round(s, 4) for s in scores]
    write_json(file, [{"question_id": i, "answer": a} for i, a in enumerate(answers)])


@pytest.fixture
def judged(out, geneval):
    """A run of every category, without its pictures, and what the evaluators would leave."""
    names = ["color", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex"]
    categories = [Category(name, ["a cup", "a pot", "a pan"], [42, 43]) for name in names]
    plan = Plan(NO_WORKFLOW, [1.0, 1.2], [*categories, read_category(geneval, 2)])
    plan.begin(out)
    for gamma in plan.gammas:
        for category in categories:
            folder, (_, result, seen) = category.folder(gamma), results.EVALUATORS[category.name]
            write_scores(out / folder / result, [0.1 * (i + gamma) for i in range(6)])
            if seen:  # with paths, or by that of spatial without
                paths = [f"x/{unit.path}" for unit in category.units(gamma)]
                names = [path.rpartition("/")[2] for path in paths]
                files = names if category.name == "spatial" else paths
                write_json(out / folder / seen, [{"image": file} for file in files])
        # As pandas writes it: slashes are escaped, the order is the folder's.
        lines = []
        for unit in plan.categories[-1].units(gamma):
            about = BENCH if unit.prompt == BENCH["prompt"] else COW
            is_right = about == BENCH or unit.seed == 43
            entry = about | {"filename": f"/else/{unit.path}", "correct": is_right}
            lines.insert(0, json.dumps(entry).replace("/", "\\/"))
        write(out / plan.categories[-1].folder(gamma) / "results.jsonl", "\n".join(lines) + "\n")
    return out, plan


@pytest.fixture
def reading(out):
    return ["--read", "--out", str(out)]


def test_results_are_read(judged, reading, capsys):
    compbench.main(reading)
    table = capsys.readouterr().out
    for row in (
        "T2I-CompBench | color | spatial | 3d_spatial | numeracy | non_spatial | complex |",
        "gamma_1 | 0.3500 | 0.3500 |",
        "gamma_1.2 | 0.3700 (+0.0200 ± 0.0000) |",
        "paper: SD3.5-Medium, TACA, r = 64 | 0.8074 | 0.2678 |  |  | 0.3106 | 0.4470 |",
        "GenEval | single_object | colors | overall |",
        "gamma_1 | 1.0000 | 0.5000 | 0.7500 |",
    ):
        assert f"| {row}" in table


@pytest.mark.parametrize(
    "name", ["spatial", "3d_spatial", "numeracy", "non_spatial", "complex", "color", "geneval"]
)
def test_results_of_another_setting_are_refused(judged, reading, name):
    """gamma 1's, copied to 1.2, would read as no difference at all."""
    out, _ = judged
    shutil.copytree(out / "gamma_1" / name, out / "gamma_1.2" / name, dirs_exist_ok=True)
    named = "not of this run's pictures at this setting: gamma_1/"
    refuses(reading, named if name in ("color", "geneval") else "to the byte, so one is a copy")


def test_results_that_are_older_than_the_pictures(judged, reading):
    old = judged[0] / "gamma_1/numeracy/annotation_num/vqa_result.json"
    os.utime(write(judged[0] / "gamma_1/numeracy/samples/a cup_000000.png", ""), (9e8, 9e8))
    os.utime(old, (9e8 - 1, 9e8 - 1))
    refuses(reading, f"{old} is older than the pictures")


def save(plan, out):
    write_json(out / "run.json", asdict(plan))


@pytest.fixture
def baseline(judged, tmp_path):
    """A run of the plain workflow, judged."""
    out, plan = judged
    plain = tmp_path / "plain"
    shutil.copytree(out, plain)
    save(replace(plan, gammas=[1.0]), plain)
    write_scores(plain / "gamma_1/color/annotation_blip/vqa_result.json", np.arange(6) / 10)
    return plain


def test_baseline(judged, reading, baseline, capsys):
    """Differences are to another run's gamma 1; the workflow's own is with its LoRA."""
    out, plan = judged
    nodes = {"LoadTACALoRA": {"strength": 1.0}, "KSampler": {"steps": 30, "seed": None}}
    graph = {kind: {"class_type": kind, "inputs": inputs} for kind, inputs in nodes.items()}
    save(replace(plan, workflow=replace(NO_WORKFLOW, graph=graph)), out)
    compbench.main(reading)
    printed = capsys.readouterr().out
    assert "gamma_1 is with the LoRA of LoadTACALoRA, not the plain model" in printed
    assert "| gamma_1.2 | 0.3700 (+0.0200 ± 0.0000) |" in printed
    compbench.main([*reading, "--baseline", str(baseline)])
    printed = capsys.readouterr().out
    for row in (
        "| baseline | 0.2500 | 0.3500 |",
        "| gamma_1 | 0.3500 (+0.1000 ± 0.0000) | 0.3500 (+0.0000 ± 0.0000) |",
        "| gamma_1.2 | 0.3700 (+0.1200 ± 0.0000) |",
        "| baseline | 1.0000 | 0.5000 | 0.7500 |",  # GenEval
        "In brackets: the difference to baseline",
        "differ in more than TACA and LoRAs: KSampler.steps 30",
    ):
        assert row in printed


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"prompts": ["a cup", "a pan", "a pot"]}, "same prompts and seeds of color"),
        ({"seeds": [43, 42]}, "same prompts and seeds of color"),
        ({"gammas": [1.2]}, "no pictures at gamma 1"),
        ({}, r"of other sizes: \[\(64, 64\), \(128, 128\)\]"),
    ],
)
def test_baselines_that_are_not_of_the_same_pictures(judged, reading, baseline, change, why):
    out, plan = judged
    gammas = change.pop("gammas", [1.0])
    categories = [replace(plan.categories[0], **change), *plan.categories[1:]]
    save(replace(plan, gammas=gammas, categories=categories), baseline)
    for folder, size in ((out, 128), (baseline, 64)):
        place = write(folder / plan.units()[0].path, "")
        Image.new("RGB", (size, size)).save(place)
        os.utime(place, (0, 0))
    refuses([*reading, "--baseline", str(baseline)], why)


def test_interval():
    """Paired, over prompts; GenEval's tags count the same, however many prompts they have."""
    plain = {"colors": [0.5, 0.0], "position": [0.0, 0.5, 1.0], "color": [0.1, 0.4, 0.2]}
    taca = {"colors": [1.0, 0.5], "position": [0.5, 0.5, 0.5], "color": [0.15, 0.7, 0.2]}
    scores = {column: {"gamma_1": plain[column], "gamma_1.2": taca[column]} for column in plain}
    table = results.table(scores, Plan(NO_WORKFLOW, [1.0, 1.2], []))
    for columns in (["color"], ["colors", "position"]):
        differences = [np.subtract(taca[column], plain[column]) for column in columns]
        score = np.mean([np.mean(taca[column]) for column in columns])
        mean = np.mean([np.mean(d) for d in differences])
        half = 1.96 * np.sqrt(sum(np.var(d, ddof=1) / len(d) for d in differences)) / len(columns)
        assert f"| {score:.4f} ({mean:+.4f} ± {half:.4f}) |" in table


OTHER, NOT_ITS = "not of this run's pictures", "not what its evaluator writes"


BLIP = "color/annotation_blip/vqa_result.json"
SEEN = "color/annotation1_blip/vqa_test.json"
SPATIAL = "spatial/labels/annotation_obj_detection_2d/mapping.json"
LINES = "geneval/results.jsonl"


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        (BLIP, lambda e: e[:-1], "5 results for 6 pictures"),
        (BLIP, lambda e: [*e[:-1], e[0]], OTHER),
        (BLIP, lambda e: [{**e[0], "answer": "nan"}, *e[1:]], "the score of 0 is nan"),
        (BLIP, lambda e: [{**e[0], "answer": "71.1"}, *e[1:]], "the score of 0 is 71.1"),
        (BLIP, lambda e: [{"question_id": 0}, *e[1:]], NOT_ITS),
        (BLIP, lambda e: "x", NOT_ITS),
        (SEEN, lambda e: [{"image": "gamma_1/color/samples/a cat_000000.png"}, *e[1:]], OTHER),
        (SPATIAL, lambda e: [{"image": "a cat_000000.png"}, *e[1:]], OTHER),
        (LINES, lambda e: e[:-1], "3 results for 4 pictures"),
        (LINES, lambda e: [*e[:-1], e[0]], OTHER),
        (LINES, lambda e: [{**e[0], "prompt": "a cat"}, *e[1:]], "for another prompt"),
        (LINES, lambda e: [{**e[0], "filename": "x/00007/samples/0000.png"}, *e[1:]], OTHER),
        (LINES, lambda e: [{**e[0], "correct": 0.5}, *e[1:]], "neither correct nor not"),
        (LINES, lambda e: [{"prompt": "x"}, *e[1:]], NOT_ITS),
    ],
)
def test_wrong_results_are_refused(judged, reading, name, change, why):
    file = judged[0] / "gamma_1.2" / name
    if name == LINES:
        entries = change([json.loads(line) for line in file.read_text().splitlines()])
        write(file, "\n".join(map(json.dumps, entries)))
    else:
        write_json(file, change(json.loads(file.read_text())))
    refuses(reading, why)


def test_results_that_are_not_there(judged, reading, capsys):
    """Some; and all, when the commands are printed, with the paths that the scripts take."""
    out, _ = judged
    gone = out / "gamma_1/complex/annotation_3_in_1/vqa_result.json"
    gone.unlink()
    compbench.main(reading)
    printed = capsys.readouterr().out
    assert f"Not there yet:\n{gone}" in printed
    assert "| gamma_1 | 0.3500 | 0.3500 | 0.3500 | 0.3500 | 0.3500 |  |" in printed
    for file in out.rglob("*result*.json*"):
        file.unlink()
    lines = refuses(reading, "No evaluator has been run")
    place = (out / "gamma_1/complex").resolve()
    for command in (
        f"BLIP_vqa.py --out_dir={place})",
        f"2D_spatial_eval.py --outpath={place} --complex=True)",
        f"CLIP_similarity.py --outpath={place} --complex=True)",
        f"3_in_1.py --outpath={place})",
        f"2D_spatial_eval.py --outpath={place.parent / 'spatial'})",
    ):
        assert command in lines


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ("", "--prompts and the --workflow"),
        ("--prompts a --workflow b", "either --servers or --ray"),
        ("--prompts a --workflow b --servers u --gammas 1 1.0", "twice"),
        ("--check --baseline y", "goes with --read"),
    ],
)
def test_command_line(more, why, capsys):
    with pytest.raises(SystemExit):
        compbench.main(["--out", "x", *more.split()])
    assert why in capsys.readouterr().err
