"""The suppression benchmark: its table and plots of any results, and a run of all trainings."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import suppression
import torch
import trainer

from support import ROOT


def made(model, cfg, window, gamma, share, dose=0.35, seed=0):
    """A setting as it is stored, with the first pictures right."""
    right = round(612 * share)
    judged = dict.fromkeys(
        ("everything", "colour", "shape", "relation"), "1" * right + "0" * (612 - right)
    )
    return {
        "model": model,
        "dose": dose,
        "seed": seed,
        "cfg": cfg,
        "gamma": gamma,
        "window": window,
        "pictures": 612,
        "right": right,
        "judged": judged,
    }


LORA = "base0-dose0.35-taca-lora1"
SETTINGS = [
    made("base0-dose0.35", 3.0, "-", 1.0, 1 / 3),
    made(LORA, 3.0, "paper", 1.0, 2 / 3),
    made("base0-dose0.35", 3.0, "paper", 1.2, 2 / 3),
    made("base1-dose0.35", 3.0, "-", 1.0, 2 / 3, seed=1),
    made("base1-dose0.35", 3.0, "paper", 1.2, 1.0, seed=1),
    made("scratch0-dose0.35", 1.0, "all", 1.2, 0.5),
    made("scratch0-dose0.35", 1.0, "-", 1.0, 0.5),
]


@pytest.mark.parametrize("count", range(len(SETTINGS) + 1))
def test_any_results_have_table_and_plots(tmp_path, count):
    """At each moment of a measurement, also where gamma 1 is still to come."""
    some = SETTINGS[:count]
    models = [
        {"name": name, "text_share": [[0.2, 0.4], [0.3, float("nan")]]}
        for name in {s["model"] for s in some} - {LORA}
    ]
    result = {"models": models, "settings": some}
    suppression.plots(result, tmp_path / "plots.png")
    assert (tmp_path / "plots.png").stat().st_size > 1000
    with_plain = count - (count == 6)  # that one has no gamma 1 yet
    assert suppression.table(result).count("\n| ") == with_plain


def test_gain_with_a_lora_is_over_the_model_without():
    result = {"models": [], "settings": SETTINGS}
    (row,) = (row for row in suppression.table(result).splitlines() if LORA in row)
    assert row == f"| {LORA} | 3 | paper | 1 |" + " +33.3 ± 0.0 |" * 4
    bases = [s for s in SETTINGS if s["gamma"] == 1.2 and "-dose" in s["model"]][:2]
    assert np.allclose(suppression.gain_of(result, bases), (100 / 3, 0))


def test_a_training_goes_on_from_a_checkpoint(tmp_path):
    """To the bit; and the checkpoint keeps what running trainings have written."""

    def run(name, *upto):
        for steps in upto:
            torch.manual_seed(0)
            model = torch.nn.Linear(3, 3)
            files = tmp_path / f"{name}.pt", tmp_path / f"{name}.jsonl"
            training = trainer.Trainer(model, [torch.optim.AdamW(model.parameters())], 0.9, *files)
            loss_at = lambda step: model(torch.full((1, 3), float(step))).square().sum()  # noqa: E731, B023
            with torch.enable_grad():
                training.run(steps, lambda step: 0.1 / step, loss_at)
        return torch.load(files[0], weights_only=True)

    stopped, whole = run("stopped", 3, 7), run("whole", 7)
    assert whole.keys() == {"model", "average", "step", "seconds", "optimisers"}
    for part in ("model", "average"):
        assert whole[part].keys() == {"weight", "bias"}
        assert all(torch.equal(whole[part][key], stopped[part][key]) for key in whole[part])
    assert not torch.equal(whole["average"]["weight"], whole["model"]["weight"])


@pytest.mark.slow
def test_every_training_is_measured(tmp_path):
    """Two steps each; no file of the repository is written."""
    page = (ROOT / "docs" / "alignment.md").read_bytes()
    done = subprocess.run(
        [
            sys.executable,
            "benchmarks/suppression.py",
            "--try-out",
            "--work",
            str(tmp_path),
            "--seeds",
            "0",
            "--doses",
            "0.15",
            "--kinds",
            "dose",
            "left-out",
            "lora",
            "scratch",
            "taca-lora",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    assert "not loaded" not in done.stderr
    result = json.loads((tmp_path / "suppression.json").read_text())
    assert [model["name"] for model in result["models"]] == [
        "base0-dose0.15",
        "base0-left-out0.35",
        "base0-lora0.35",
        "scratch0-dose0.35",
        "base0-dose0.35-taca-lora1.2",
        "base0-dose0.35-taca-lora1",
    ]
    assert len({model["weights"] for model in result["models"]}) == 6
    assert len(result["settings"]) == 12
    assert (tmp_path / "suppression.png").exists()
    assert (ROOT / "docs" / "alignment.md").read_bytes() == page
