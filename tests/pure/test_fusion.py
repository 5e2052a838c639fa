"""The comparison of early and intermediate fusion: its training, its score, its arithmetic."""

import argparse
import json
from functools import partial

import evaluate_uvit
import numpy as np
import pytest
import torch
import train_uvit


@pytest.fixture
def train(tmp_path, monkeypatch):
    """``shared, steps -> the trained file``, in a folder of the test's own."""
    for name, value in {"FALL": 2, "WARMUP": 2, "BATCH": 4, "POOL": 1}.items():
        monkeypatch.setattr(train_uvit, name, value)

    def run(shared, steps, folder="work", seed=0):
        work = tmp_path / folder
        with torch.enable_grad():
            train_uvit.train(argparse.Namespace(shared=shared, steps=steps, seed=seed, work=work))
        return work / f"shared-{shared}-seed-{seed}-steps-{steps}.safetensors"

    return run


def test_a_longer_training_goes_on_from_a_shorter_ones_constant_part(train):
    """And is what it would be from its own beginning, to the bit."""
    train(3, 4)
    constant = 4 - train_uvit.FALL
    continued = train(3, 6)
    whole = train(3, 6, folder="alone")
    assert [f.name for f in whole.parent.glob("*constant*")] == ["shared-3-seed-0-constant-4.pt"]
    assert (continued.parent / f"shared-3-seed-0-constant-{constant}.pt").exists()
    (one, said), (other, _) = map(evaluate_uvit.load, (continued, whole))
    assert (said["shared"], said["steps"]) == (3, 6)
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    first = (continued.parent / "shared-3-seed-0-steps-6.jsonl").exists()
    assert not first, "six steps are no hundred, of which there would be a line"


@pytest.mark.slow
def test_score_pairs_networks_of_the_same_seed(train, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_uvit, "tells", partial(evaluate_uvit.tells, draws=1))
    files = [train(shared, 3, seed=seed) for shared in (7, 3) for seed in (0, 1)]
    out = tmp_path / "score.json"
    evaluate_uvit.score(argparse.Namespace(files=files, noises=1, ddim_steps=2, cfg=3.0, out=out))
    report = json.loads(out.read_text())
    assert list(report["networks"]) == [file.stem for file in files]
    ((name, found),) = report["differences"].items()
    assert (name, found["seeds"]) == ("central 3, 3 steps, minus early, 3 steps", [0, 1])
    for kind, criteria in (("right", evaluate_uvit.world.CRITERIA), ("tells", evaluate_uvit.TOLD)):
        shares = [report["networks"][file.stem][kind] for file in files]
        for what in criteria:
            early, central = (np.array([s[what] for s in two]) for two in (shares[:2], shares[2:]))
            expected = 100 * (central - early)
            assert np.allclose(found[kind][what]["by_seed"], expected, atol=0.02)
            assert found[kind][what]["mean"] == pytest.approx(expected.mean(), abs=0.02)


def test_wrong_captions_are_wrong():
    """Each in one thing, of a rendered picture; and never another way to say the same."""
    rng = np.random.default_rng(0)
    for caption in evaluate_uvit.world.captions("held-out"):
        picture = evaluate_uvit.world.render(caption, rng)
        for wrong in evaluate_uvit.wrong(caption):
            assert not evaluate_uvit.world.check(picture, wrong)["everything"]


def test_interval_covers_the_truth_where_seeds_differ():
    """As often as three seeds allow, which is less than it says; far more often than without."""
    rng = np.random.default_rng(0)
    hits = {"seeds": 0, "scenes": 0}
    for _ in range(40):
        of_seed = 0.1 + 0.05 * rng.standard_normal((6, 1, 1, 1))
        ours = of_seed + 0.3 * rng.standard_normal((6, 1, 204, 1))
        plain = dict(enumerate(np.zeros_like(ours)))
        seeds = list(plain)
        low, high = evaluate_uvit.paired(("x",), dict(enumerate(ours)), plain, seeds, 200)["x"][
            "interval"
        ]
        hits["seeds"] += low <= 10 <= high
        mean = {0: ours.mean(0)}
        alone = evaluate_uvit.paired(("x",), mean, plain, [0], 200)["x"]["interval"]
        hits["scenes"] += alone[0] <= 10 <= alone[1]
    assert hits["seeds"] / 40 > 0.8 > hits["scenes"] / 40 + 0.05
