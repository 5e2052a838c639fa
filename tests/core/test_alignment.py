"""The alignment benchmark: its arithmetic, its checker, and a short run on the demo's model."""

import json
import os
import subprocess
import sys

import alignment
import numpy as np
import pytest
import world

from support import ROOT

SCRIPT = ROOT / "benchmarks" / "alignment.py"


@pytest.mark.parametrize("size", [64, 128])
def test_checker_is_right_on_rendered_pictures(size):
    """At least 99.5 % at both of the benchmark's sizes, and a changed caption is caught."""
    rng = np.random.default_rng(size)
    captions = world.captions("held-out") + world.captions("train")[::15]
    pictures = [world.render(caption, rng, size) for caption in captions]
    right = [world.check(*pair)["everything"] for pair in zip(pictures, captions, strict=True)]
    assert np.mean(right) >= 0.995
    wrong = {
        "relation": lambda s: s._replace(first=s.second, second=s.first),
        "colour": lambda s: s._replace(first=s.first._replace(colour=other(s, "colour"))),
        "shape": lambda s: s._replace(second=s.second._replace(shape=other(s, "shape"))),
    }
    for what, change in wrong.items():
        told = [str(change(world.parse(caption))) for caption in captions]
        pairs = [p for p in zip(pictures, told, strict=True) if valid(p[1])]
        judged = [world.check(*pair) for pair in pairs]
        assert not any(one["everything"] for one in judged)
        if what != "relation":  # exchanged objects may be matched the other way round
            assert not any(one[what] for one in judged)


def other(scene, what):
    """A colour or shape that neither object has, so that no matching can be right."""
    all_of = world.COLOURS if what == "colour" else world.SHAPES
    used = {getattr(scene.first, what), getattr(scene.second, what)}
    return next(one for one in all_of if one not in used)


def valid(caption):
    try:
        world.parse(caption)
    except ValueError:
        return False
    return True


def test_texts_differ_in_their_tokens_only():
    caption = "a red circle left of a blue square"
    assert [len(world.encode(caption, text)) for text in world.TEXTS] == [16, 64, 4]
    words, padded, phrases = (world.encode(caption, text) for text in world.TEXTS)
    assert (padded[:16] == words).all()
    assert not padded[16:].any()
    assert [world.PHRASES[i] for i in phrases] == [
        "a red circle",
        "left of",
        "a blue square",
        world.PADDING,
    ]
    every = {tuple(world.encode(c, "phrases")) for c in world.captions("train")}
    assert len(every) == len(world.captions("train"))


def test_window_of_equal_signal_to_noise():
    """At FLUX's number of tokens it is the paper's; at 256, where sigma's odds are a quarter."""
    snr = alignment.Setting(window="snr")
    assert snr.threshold(4096) == 970
    assert snr.threshold(256) == 890
    assert alignment.Setting(window="paper").threshold(256) == 970
    assert alignment.Setting(window="all").threshold(256) == 0


def test_paired_interval():
    """It covers the truth as often as it says, where a caption's pictures go together."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        hard = rng.random(204)  # a caption is hard for both settings and all seeds
        plain = rng.random((3, 204)) > hard
        better = plain | (rng.random((3, 204)) < 0.1)
        mean, half = alignment.paired(better, plain)
        hits += abs(mean - 100 * 0.1 * hard.mean()) < half
    assert 0.91 < hits / 400 < 0.99
    assert alignment.paired(plain, plain) == (0, 0)


def test_best_gamma():
    rng = np.random.default_rng(0)
    right = {
        1.0: rng.random((2, 204)) < 0.5,
        1.2: rng.random((2, 204)) < 0.9,
        2.0: rng.random((2, 204)) < 0.1,
    }
    assert alignment.best_gamma(right) == (1.2, 1.2, 1.2)
    same = {gamma: rng.random((2, 204)) < 0.5 for gamma in (0.8, 1.0, 1.2, 1.5, 2.0)}
    _, low, high = alignment.best_gamma(same)
    assert low < high, "nothing is known of a gamma that does nothing"


@pytest.mark.slow
def test_a_short_run(tmp_path):
    """gamma 2 over all steps ruins the demo's pictures; what is stored is not sampled again."""

    def run(*arguments):
        command = [
            sys.executable,
            str(SCRIPT),
            "demo",
            "--every",
            "17",
            "--windows",
            "all",
            "--out",
            str(tmp_path),
            *arguments,
        ]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )

    done = run("--gammas", "2", "--seeds", "0")
    assert done.returncode == 0, done.stderr
    assert "2/2" in done.stdout
    result = json.loads((tmp_path / "alignment-demo.json").read_text())
    plain, broken = ([int(d) for d in s["judged"]["everything"]] for s in result["settings"])
    assert len(plain) == len(broken) == 12
    assert sum(plain) >= 9 > 3 >= sum(broken)
    assert all(0 < share < 1 for share in result["text_share"])
    assert (tmp_path / "alignment.png").stat().st_size > 1000
    again = run("--gammas", "2", "--seeds", "0")
    assert "1/" not in again.stdout
    assert "| 3 | t >= 0 | 2 |" in again.stdout
    assert json.loads((tmp_path / "alignment-demo.json").read_text()) == result
    refused = run("--gammas", "2", "--seeds", "0", "1")
    assert refused.returncode != 0
    assert "other captions, seeds or weights" in refused.stderr
