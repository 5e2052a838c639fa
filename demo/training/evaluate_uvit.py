"""Judge trained U-ViTs of the demo's world on the held-out captions, and compare their fusions.

``python dev.py run demo/training/evaluate_uvit.py FILES`` compares networks of ``train_uvit.py``
with the first one; ``benchmarks/fusion.md`` says what is asked, and how.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torchmetrics.image.fid import FrechetInceptionDistance

sys.path += [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]

import world
from codec import SCALE, Codec
from train_uvit import (
    CODEC,
    RELATIONS,
    SHAPES,
    SIZE,
    captions_of,
    context_of,
    enlarged,
    noised,
    predicted,
    sample,
)
from trainer import DEVICE, logged, pictures_of, tokens_of

from uvit.files import read_config
from uvit.network import UViT

TOLD = ("colour", "shape", "relation", "all three")
BySeed = dict[int, np.ndarray]  # training seed -> (noises, captions, criteria)


class Colours(torch.nn.Module):
    """The mean colours of 8 x 8 fields: a feature for FID that no network has to be fetched for."""

    num_features = 3 * 8 * 8

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(pictures, 8).flatten(1)


def colour_fid(drawn: np.ndarray, real: np.ndarray) -> float:
    """FID of pictures ``(n, height, width, 3)`` on ``Colours``: no figure of Inception's."""
    fid = FrechetInceptionDistance(Colours())
    for pictures, is_real in ((drawn, False), (real, True)):
        fid.update(torch.from_numpy(pictures).permute(0, 3, 1, 2).float(), is_real)
    return float(fid.compute())


def load(path: Path) -> tuple[UViT, dict[str, Any]]:
    """A trained network and what its file says of it."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    network = UViT(read_config(state, metadata, path.name)[0])
    network.load_state_dict(state)
    return network.to(DEVICE).eval(), json.loads(metadata["uvit"])


def wrong(caption: str) -> list[str]:
    """The caption with the colours, the shapes and the relation wrong."""
    scene = world.parse(caption)

    def exchanged(what: str, every: Sequence[str]) -> str:
        one, other = getattr(scene.first, what), getattr(scene.second, what)
        first, second = other, one
        if one == other:
            first = every[(every.index(one) + 1) % len(every)]
        items = (i._replace(**{what: v}) for i, v in zip(scene[::2], (first, second), strict=True))
        return str(world.Scene(next(items), scene.relation, next(items)))

    [other] = set(RELATIONS) - {scene.relation}
    turned = str(scene._replace(relation=other))
    return [exchanged("colour", list(world.COLOURS)), exchanged("shape", SHAPES), turned]


@torch.no_grad()
def tells(network: UViT, codec: Codec, captions: list[str], draws: int = 16) -> np.ndarray:
    """Whether each caption explains its picture better than wrong ones: ``(captions, TOLD)``."""
    x = SCALE * codec.encode(torch.cat([*pictures_of(captions, 0, SIZE)])).to(DEVICE)
    told = [captions, *zip(*map(wrong, captions), strict=True)]
    contexts = [context_of(codec, tokens_of(each)).to(DEVICE) for each in told]
    drawn = torch.Generator().manual_seed(0)
    loss = torch.zeros(len(contexts), len(captions), device=DEVICE)
    for i in range(draws):
        angle = x.new_full((len(x),), (i + 0.5) / draws * torch.pi / 2)
        z, v = noised(x, torch.randn(x.shape, generator=drawn).to(DEVICE), angle)
        for each, context in zip(loss, contexts, strict=True):
            each += (predicted(network, z, angle, context) - v).square().mean((1, 2, 3))
    right = (loss[0] < loss[1:]).T
    return torch.cat((right, right.all(1, keepdim=True)), 1).cpu().numpy()


def score(options: argparse.Namespace) -> None:
    """Judge networks on the captions that were held out, and compare them with the first."""
    codec, captions = Codec.load(CODEC), captions_of("held-out")[: options.captions]
    asked = {key: getattr(options, key) for key in ("noises", "steps", "cfg")}
    real = np.concatenate([p.numpy() for p in pictures_of(captions * options.noises, 1, SIZE)])
    report: dict[str, Any] = {"captions": len(captions), **asked, "networks": {}, "differences": {}}
    criteria = {"right": world.CRITERIA, "tells": TOLD}
    judged: dict[str, dict[str, BySeed]] = {kind: {} for kind in criteria}
    for path in options.files:
        network, said = load(path)
        name = f"{said['fusion']}, {said['steps']} steps"
        right, drawn = [], []
        for seed in range(options.noises):
            pictures = sample(network, codec, captions, seed, options.steps, options.cfg)
            drawn.append(pictures)
            checks = [world.check(enlarged(p), c) for p, c in zip(pictures, captions, strict=True)]
            right.append([[check[key] for key in world.CRITERIA] for check in checks])
        found = {"right": np.array(right), "tells": tells(network, codec, captions)[None]}
        fid = colour_fid(np.concatenate(drawn), real)
        report["networks"][path.stem] = {"training": said, "colour FID": round(fid, 5)}
        if (log := path.with_suffix(".jsonl")).exists():
            looks = {step: each["right"] for step, each in logged(log).items() if "right" in each}
            report["networks"][path.stem]["right while training"] = looks
        for kind, values in found.items():
            judged[kind].setdefault(name, {})[said["seed"]] = values.astype(float)
            shares = zip(criteria[kind], values.mean((0, 1)).round(4).tolist(), strict=True)
            report["networks"][path.stem][kind] = dict(shares)
        print(path.stem, report["networks"][path.stem], flush=True)
        if options.out:
            options.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    first, *others = judged["right"]
    for name in others:
        seeds = sorted(judged["right"][name].keys() & judged["right"][first].keys())
        if not seeds:
            print(name, "and", first, "have no training seed in common, and are not compared")
            continue
        found = {"seeds": seeds}
        for kind, by_name in judged.items():
            found[kind] = paired(criteria[kind], by_name[name], by_name[first], seeds)
        report["differences"][f"{name}, minus {first}"] = found
        print(name, "minus", first, found)
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


def paired(
    criteria: Sequence[str], ours: BySeed, theirs: BySeed, seeds: list[int], draws: int = 10_000
) -> dict[str, dict[str, Any]]:
    """Differences in points, by criterion: mean, 95 % interval, by training seed."""
    scenes = 100 * np.stack([(ours[seed] - theirs[seed]).mean(0) for seed in seeds])
    rows = bootstrap(scenes, draws).T.round(2), scenes.mean((0, 1)), scenes.mean(1).T.round(2)
    return {
        what: {"mean": round(float(mean), 2), "interval": ends.tolist(), "by_seed": each.tolist()}
        for what, ends, mean, each in zip(criteria, *rows, strict=True)
    }


def bootstrap(values: np.ndarray, draws: int = 10_000) -> np.ndarray:
    """95 % intervals of the mean over ``(trainings, scenes, criteria)``: low and high.

    Trainings are too few for a normal interval; they and the scenes are drawn anew.
    """
    rng = np.random.default_rng(0)
    means = np.empty((draws, values.shape[2]))
    for i in range(draws):
        trainings, scenes = (rng.integers(count, size=count) for count in values.shape[:2])
        means[i] = values[trainings][:, scenes].mean((0, 1))
    return np.quantile(means, (0.025, 0.975), axis=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", help="the first is what others compare with")
    parser.add_argument("--noises", type=int, default=16)
    parser.add_argument("--captions", type=int, help="only so many, to try it out")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--cfg", type=float, default=3.0)
    parser.add_argument("--out", type=Path)
    torch.set_num_threads(1)
    score(parser.parse_args())


if __name__ == "__main__":
    main()
