"""A run judged by Prompt Check, with a tiny encoder read from its file."""

import functools
import json
import os

import compbench.__main__ as compbench
import numpy as np
import pytest
import torch
from compbench import judging
from compbench.plan import Plan, read_category
from compbench.workflow import read_workflow
from PIL import Image

from support import tiny_judge
from support.compbench import api_form, draw_all, refuses, write

QUESTIONS = [["How many cups are there?", "four"], ["Are they red?", "Yes"], ["A dog?", "No"]]
ASKED = [
    'How many cups are there? Is "four" the right answer? Please answer yes or no.',
    "Are they red? Please answer yes or no.",
    "A dog? Please answer yes or no.",
]
WHOLE = 'Does this figure show "{}"? Please answer yes or no.'


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Its file, and the CLIP."""
    import comfy.sd

    options = {"qwen25_7b_model_config": tiny_judge.LANGUAGE}
    options["qwen25_7b_class"] = tiny_judge.Encoder
    clip = tiny_judge.TinyJudge().load()[0]
    [file] = clip.patcher.cached_patcher_init[1][0]
    with pytest.MonkeyPatch.context() as patch:
        # Core knows the sizes of the published weights only.
        smaller = functools.partial(comfy.sd.load_clip, model_options=options)
        patch.setattr(comfy.sd, "load_clip", smaller)
        yield file, clip


@pytest.fixture
def run(out, color, geneval, tmp_path):
    entry = {"prompt": "four red cups", "vqa_list": QUESTIONS, "atom_count": 3}
    second = write(tmp_path / "geneval2_data.jsonl", json.dumps(entry))
    categories = [read_category(file, 2) for file in (color, geneval, second)]
    plan = Plan(read_workflow(api_form(tmp_path)), [1.0, 1.2], categories)
    draw_all(out, plan)
    return plan


def test_a_run_is_judged(run, out, encoder, capsys):
    from comfyui import parts

    file, clip = encoder
    line = ["--out", str(out), "--judge", "prompt-check", "--encoder", file, "--read"]
    compbench.main(line)
    judge = parts("judge")[0].Judge(clip)
    judge.load()
    wanted = {}
    for category in run.categories:
        for gamma in run.gammas:
            scores = []
            for unit in category.units(gamma):
                pixels = np.asarray(Image.open(out / unit.path).convert("RGB"), np.float32) / 255
                asked = ASKED if category.name == "geneval2" else [WHOLE.format(unit.prompt)]
                answers = judge.ask(torch.from_numpy(pixels)[None], asked)
                if asked == ASKED:
                    answers[2] = 1 - answers[2]
                scores.append(np.exp(np.log(answers).mean()))
            wanted[category.name, gamma] = np.mean(scores)
    shown = capsys.readouterr().out
    rows = [
        f"| {judging.TITLE} | color | geneval | geneval2 |",
        "| gamma_1 | " + " | ".join(f"{wanted[c.name, 1.0]:.4f}" for c in run.categories) + " |",
    ]
    for row in rows:
        assert row in shown
    assert f"| gamma_1.2 | {wanted['color', 1.2]:.4f} (" in shown
    assert "Qwen2.5-VL, tiny_judge.safetensors" in shown
    assert "paper" not in shown
    assert wanted["color", 1.0] != pytest.approx(wanted["color", 1.2], abs=1e-5)


def test_what_is_judged_is_kept_and_checked(run, out, encoder, monkeypatch):
    line = ["--out", str(out), "--judge", "prompt-check", "--encoder", encoder[0]]
    compbench.main(line)
    files = sorted(out.rglob(judging.RESULT))
    assert len(files) == 6
    written = [file.stat().st_mtime_ns for file in files]
    compbench.main(line)
    assert [file.stat().st_mtime_ns for file in files] == written
    [picture] = [out / unit.path for unit in run.categories[0].units(1.0)][:1]
    later = files[0].stat().st_mtime + 60
    os.utime(picture, (later, later))
    reading = ["--out", str(out), "--read"]
    refuses(reading, "is older than the pictures: let --judge run again")
    os.utime(picture, (1, 1))
    content = json.loads(files[0].read_text())
    files[0].write_text(json.dumps(content | {"about": ["another"]}))
    refuses(reading, "Several encoders have judged this run")
    files[0].write_text(json.dumps(content | {"pictures": {}}))
    refuses(reading, "is not of this run")


def test_what_cannot_be_judged(run, out, encoder, tmp_path):
    line = ["--out", str(out), "--judge", "prompt-check"]
    with pytest.raises(SystemExit):
        compbench.main(line)
    refuses([*line, "--encoder", str(tmp_path / "none")], "There is no encoder")
    refuses([*line, "--encoder", encoder[0], "--encoder-type", "x"], "no text encoder type x")
    (out / run.units()[0].path).unlink()
    refuses([*line, "--encoder", encoder[0]], "1 pictures are missing")
