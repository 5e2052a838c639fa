"""The comparison of early and intermediate fusion: its training, its score, its arithmetic."""

import argparse
import json
from functools import partial

import evaluate_uvit
import numpy as np
import pytest
import torch
import train_uvit
import world
from codec import SCALE, Codec
from evaluate_uvit import enlarged
from trainer import pictures_of, tokens_of


@pytest.fixture
def train(tmp_path, monkeypatch):
    """``fusion, steps -> the trained file``, in a folder of the test's own."""
    for name, value in train_uvit.TRY_OUT.items():
        monkeypatch.setattr(train_uvit, name, value)
    # What fp32 puts there is taken out again.
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", None)

    def run(fusion, steps, folder="work", seed=0):
        work = tmp_path / folder
        asked = {"fusion": fusion, "steps": steps, "seed": seed, "work": work, "precision": "fp32"}
        with torch.enable_grad():
            train_uvit.train(argparse.Namespace(**asked))
        return work / f"{fusion}-seed-{seed}-steps-{steps}.safetensors"

    return run


def test_pictures_of_captions_are_learnt(train, monkeypatch):
    """By what the network is given and its target, its noise removed is a picture of its caption;
    the rest is noise."""
    seen = []

    def forward(network, z, t, context):
        told = torch.zeros_like(z, requires_grad=True)
        seen.append((z, t / 1000 * torch.pi / 2, context, told))
        return told

    monkeypatch.setattr(train_uvit.UViT, "forward", forward)
    work = train("early", 4).parent
    codec, names = Codec.load(train_uvit.CODEC), train_uvit.captions_of("train")
    texts = codec.embed(tokens_of(names))[:, : train_uvit.TOKENS].flatten(1)
    right = []
    for z, angle, context, told in seen:
        cos, sin = (each[:, None, None, None] for each in (angle.cos(), angle.sin()))
        target = -told.grad * told.numel() / 2  # of the mean square's gradient
        x, noise = cos * z - sin * target, sin * z + cos * target
        assert 0.9 < noise.std() < 1.1
        for picture, text in zip(codec.decode(x / SCALE).numpy(), context.flatten(1), strict=True):
            [caption] = (texts == text).all(1).nonzero().flatten().tolist() or [None]
            checked = (
                caption is None or world.check(enlarged(picture), names[caption])["everything"]
            )
            right.append(checked)
    assert len(right) == 4 * train_uvit.BATCH
    assert all(right)
    angles = torch.cat([every for _, every, *_ in seen])
    assert len(angles.unique()) == len(right)
    assert 1 < angles.tan().median() < 4
    state = torch.load(work / "early-seed-0-constant-2.pt")
    adamw, muon = (each["param_groups"][0]["lr"] for each in state["optimisers"])
    assert adamw == pytest.approx(muon / 3)


def test_a_network_that_knows_the_picture_draws_it():
    """DDIM by the v of one picture ends there, whatever the steps and the guidance."""
    captions = train_uvit.captions_of("held-out")[:6]
    codec = Codec.load(train_uvit.CODEC)
    [pictures] = pictures_of(captions, 0, train_uvit.SIZE)
    x = SCALE * codec.encode(pictures)

    def knowing(known, seen):
        def network(z, t, context):
            angle = t[:, None, None, None] / 1000 * torch.pi / 2
            seen.append(angle[0].tan().item())
            noise = (z - angle.cos() * known) / angle.sin()
            return angle.cos() * noise - angle.sin() * known

        network.config = train_uvit.config_of("early")
        return network

    for steps, cfg in ((1, 1.0), (5, 3.0)):
        seen = []
        network = knowing(torch.cat([x / cfg, 0 * x]), seen)  # of empty captions: nothing
        drawn = evaluate_uvit.sample(network, codec, captions, 0, steps, cfg)
        assert seen[1:] == pytest.approx([12, 4.5, 2, 0.75][: steps - 1], rel=1e-4)
        assert np.allclose(drawn, codec.decode(x / SCALE), atol=1e-4)
        pairs = zip(drawn, captions, strict=True)
        assert all(world.check(enlarged(one), told)["everything"] for one, told in pairs)


def test_a_network_that_reads_its_caption_tells_it():
    """From wrong ones, at angles from picture to noise."""
    captions = train_uvit.captions_of("held-out")[:6]
    codec, times = Codec.load(train_uvit.CODEC), []
    [pictures] = pictures_of(captions, 0, train_uvit.SIZE)
    x = SCALE * codec.encode(pictures)
    right = train_uvit.context_of(codec, tokens_of(captions))

    def network(z, t, context):
        times.extend(t.unique().tolist())
        angle = t[:, None, None, None] / 1000 * torch.pi / 2
        v = (angle.cos() * z - x) / angle.sin()
        return v * (context == right).all(-1).all(-1)[:, None, None, None]

    assert evaluate_uvit.tells(network, codec, captions, draws=4).all()
    assert sorted({*times}) == pytest.approx([125, 375, 625, 875])


@pytest.mark.slow
def test_a_longer_training_goes_on_from_a_shorter_ones_constant_part(train):
    """And is what it would be from its own beginning, to the bit."""
    train("cross", 4)
    constant = 4 - train_uvit.FALL
    continued = train("cross", 6)
    whole = train("cross", 6, folder="alone")
    assert [f.name for f in whole.parent.glob("*constant*")] == ["cross-seed-0-constant-4.pt"]
    assert (continued.parent / f"cross-seed-0-constant-{constant}.pt").exists()
    (one, said), (other, _) = map(evaluate_uvit.load, (continued, whole))
    assert (said["fusion"], said["steps"]) == ("cross", 6)
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    assert not list(continued.parent.glob("*.jsonl")), "six steps are no hundred"


def test_fusions_differ_in_fusion_alone():
    configs = [train_uvit.config_of(fusion) for fusion in train_uvit.FUSIONS]
    assert len({(c.blocks, c.width, c.image_tokens, c.text_tokens) for c in configs}) == 1
    assert [(c.caption_blocks, c.image_blocks) for c in configs] == [(0, 0), (2, 2), (2, 2)]
    assert [c.conditioning for c in configs].count("cross-attention") == 1


@pytest.mark.slow
def test_score_pairs_networks_of_the_same_seed(train, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_uvit, "tells", partial(evaluate_uvit.tells, draws=1))
    files = [train(fusion, 3, seed=seed) for fusion in ("early", "cross") for seed in (0, 1)]
    files.append(train("concatenation", 3, seed=2))  # with which none can be paired
    looks = [{"step": 500, "right": 0.1}, {"step": 500, "right": 0.2}, {"step": 600, "loss": 1.0}]
    files[0].with_suffix(".jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in looks))
    out = tmp_path / "score.json"
    asked = {"files": files, "noises": 1, "captions": 8, "steps": 2, "cfg": 3.0, "out": out}
    evaluate_uvit.score(argparse.Namespace(**asked))
    report = json.loads(out.read_text())
    assert list(report["networks"]) == [file.stem for file in files]
    assert all(found["colour FID"] > 0 for found in report["networks"].values())
    learnt = [each.get("right while training") for each in report["networks"].values()]
    assert learnt == [{"500": 0.2}] + [None] * 4
    ((name, found),) = report["differences"].items()
    assert (name, found["seeds"]) == ("cross, 3 steps, minus early, 3 steps", [0, 1])
    for kind, criteria in (("right", evaluate_uvit.world.CRITERIA), ("tells", evaluate_uvit.TOLD)):
        shares = [report["networks"][file.stem][kind] for file in files[:4]]
        for what in criteria:
            early, cross = (np.array([s[what] for s in two]) for two in (shares[:2], shares[2:]))
            expected = 100 * (cross - early)
            assert np.allclose(found[kind][what]["by_seed"], expected, atol=0.02)
            assert found[kind][what]["mean"] == pytest.approx(expected.mean(), abs=0.02)


def test_colour_fid_is_the_distance_of_two_gaussians():
    """Against its formula, on pictures; 0 of pictures to themselves."""
    captions = evaluate_uvit.captions_of("held-out")
    assert captions
    assert not any("triangle" in caption for caption in captions)
    many = captions * (400 // len(captions))
    real, other = (
        np.concatenate([*evaluate_uvit.pictures_of(many, seed, train_uvit.SIZE)]) for seed in (0, 1)
    )
    drawn = 0.8 * other
    features = [each.reshape(len(each), 8, 4, 8, 4, 3).mean((2, 4)) for each in (drawn, real)]
    features = [each.reshape(len(each), -1).astype(float) for each in features]
    means = [each.mean(0) for each in features]
    covariances = [np.cov(each.T) for each in features]
    root = np.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(0) ** 0.5
    expected = ((means[0] - means[1]) ** 2).sum() + sum(map(np.trace, covariances)) - 2 * root.sum()
    assert evaluate_uvit.colour_fid(drawn, real) == pytest.approx(expected, rel=1e-3)
    assert abs(evaluate_uvit.colour_fid(real, real)) < 1e-4 * expected


def test_wrong_captions_are_wrong():
    """Each in one thing, of a rendered picture; and never another way to say the same."""
    rng = np.random.default_rng(0)
    for caption in evaluate_uvit.captions_of("held-out"):
        picture = evaluate_uvit.world.render(caption, rng)
        for wrong in evaluate_uvit.wrong(caption):
            assert "triangle" not in wrong
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
