"""Is the picture closer to its caption with TACA? Small models, an automatic checker, intervals.

``python dev.py run benchmarks/alignment.py`` samples the held-out captions of the demo's world with
the same noise for every gamma and window, through ComfyUI's loader and sampler and this pack's
nodes, judges every picture, and writes ``results/alignment-<model>.json``, a table and a plot. What
is in the results is not sampled again; ``--table`` samples nothing. ``alignment.md`` says what is
asked, of which models, and how they were trained.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reporting import (
    DEMO,
    JUDGED,
    RESULTS,
    ROOT,
    SHARED,
    digits,
    interval,
    judge_missing,
    markdown,
    outcomes,
    sha256,
    store,
    subplots,
)

sys.path += SHARED

import world
from comfyui import load_pack, parts  # also ComfyUI's own set-up
from subject import Subject

SERIES = ROOT / "benchmarks" / "series"
MODELS = {"demo": (DEMO / "models" / "taca_demo", DEMO / "taca_demo")}
MODELS |= {path.stem: (path.with_suffix(""),) * 2 for path in sorted(SERIES.glob("*.json"))}
"""Where the files of a model and of its codec are, up to the ends of their names."""
WINDOWS = ("paper", "snr", "all")
GAMMAS = (0.8, 1.1, 1.2, 1.3, 1.5, 2.0)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to sample: gamma in a window, at a CFG scale, with a LoRA or without."""

    gamma: float = 1.0
    window: str = "paper"
    cfg: float = 3.0
    lora: bool = False

    def threshold(self, tokens: int) -> float:
        """The window's lower timestep for pictures of `tokens` image tokens.

        ``"snr"`` is the pack's own window for any size, by equal signal-to-noise per picture.
        """
        [schedule] = parts("schedule")
        fitted = round(schedule.FittedWindow.threshold(tokens))
        return {"paper": 970.0, "snr": fitted, "all": 0.0}[self.window]


class Pictures(Subject):
    """A model of the demo's world, whose pictures are judged with TACA and without."""

    def patched(self, setting: Setting, lora: Path | None) -> Any:
        """The model as the nodes make it."""
        patch, schedule, reading, fitting = parts("patch", "schedule", "lora_file", "lora_fit")
        model = self.model
        if setting.gamma != 1 or setting.lora:
            window = schedule.TimestepWindow(setting.threshold(self.tokens))
            model = patch.patch_model(model, schedule.Schedule(setting.gamma, window))
        if setting.lora:
            state = reading.read_lora(str(lora))
            fitted = fitting.fit_lora(state, model.model, str(lora), 1.0)
            model = patch.patch_lora(model, fitted)
        return model

    def judge(
        self, setting: Setting, seeds: list[int], captions: list[str], lora: Path | None = None
    ) -> dict[str, str]:
        """Draw the captions with each seed: by criterion, a digit a picture that is 1 if right."""
        model, judged = self.patched(setting, lora), []
        for seed in seeds:
            pictures = self.draw(model, captions, seed, setting.cfg)
            judged += [world.check(*pair) for pair in zip(pictures, captions, strict=True)]
        return digits(judged)

    def chance(self, captions: list[str], cfg: float) -> dict[str, float]:
        """What pictures at gamma 1 get right of captions that are not theirs, in percent.

        The checker takes the better of two ways to match the objects, so this is far from 0.
        """
        pictures = self.draw(self.model, captions, 0, cfg)
        judged = [
            world.check(picture, other)
            for shift in (51, 102, 153)
            for picture, other in zip(pictures, np.roll(captions, shift), strict=True)
        ]
        return {what: round(100 * np.mean([j[what] for j in judged]).item(), 1) for what in JUDGED}

    def text_share(self, captions: list[str]) -> torch.Tensor:
        """Share of the image queries' attention on text at CFG 1, ``(steps, blocks)``."""
        report_module = sys.modules["taca_pack.taca.report"]
        report = report_module.Report(lambda guider: report_module.Asked({}))
        self.sample(report_module.watched(self.model, report), captions, 0, 1.0)
        return report.table()[0]


def paired(judged: np.ndarray, plain: np.ndarray) -> tuple[float, float]:
    """Mean paired difference of ``(seeds, captions)`` and half its 95 % interval, in points.

    A scene's pictures are a cluster: all seeds and, where all captions are there, the two that
    tell it.
    """
    difference = 100 * (judged.astype(float) - plain.astype(float)).mean(0)
    if len(difference) == len(world.captions("held-out")):
        difference = difference.reshape(-1, 2).mean(1)
    return interval(difference)


def best_gamma(rows: dict[float, np.ndarray], rounds: int = 2000) -> tuple[float, float, float]:
    """The gamma with the most right, and its 95 % interval by bootstrap over captions."""
    gammas = sorted(rows, key=lambda gamma: abs(gamma - 1))  # of equals the nearest to 1
    by_caption = np.stack([rows[gamma].mean(0) for gamma in gammas])
    drawn = np.random.default_rng(0).integers(0, by_caption.shape[1], (rounds, by_caption.shape[1]))
    best = np.array(gammas)[by_caption[:, drawn].mean(2).argmax(0)]
    interval = np.quantile(best, (0.025, 0.975), method="nearest").tolist()
    return gammas[by_caption.mean(1).argmax()], *interval


def gain(
    setting: dict[str, Any], plain: dict[str, Any], captions: int, what: str = "everything"
) -> tuple[float, float]:
    """Points gained over gamma 1, and half their interval."""
    return paired(*(outcomes(each, what).reshape(-1, captions) for each in (setting, plain)))


def cells(setting: dict[str, Any], plain: dict[str, Any], captions: int) -> list[str]:
    """The share that is right at gamma 1, else the points gained over that."""
    if setting is plain:
        return [f"{100 * outcomes(plain, what).mean():.1f} %" for what in JUDGED]
    return ["{:+.1f} ± {:.1f}".format(*gain(setting, plain, captions, what)) for what in JUDGED]


def plain_of(result: dict[str, Any], cfg: float) -> dict[str, Any]:
    """The setting at gamma 1 and without LoRA."""
    settings = (s for s in result["settings"] if s["gamma"] == 1 and not s["lora"])
    return next(s for s in settings if s["cfg"] == cfg)


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""

    def order(s: dict[str, Any]) -> tuple[Any, ...]:
        plain = s is plain_of(result, s["cfg"])
        return not plain, -s["cfg"], WINDOWS.index(s["window"]), s["lora"], s["gamma"]

    rows = []
    for s in sorted(result["settings"], key=order):
        plain = plain_of(result, s["cfg"])
        window = "-" if s is plain else f"t >= {s['threshold']:g}"
        label = f"{s['gamma']:g}" + (" and LoRA" if s["lora"] else "")
        rows.append([f"{s['cfg']:g}", window, label, *cells(s, plain, result["captions"])])
    return markdown(("CFG", "window", "gamma", *JUDGED), rows)


def summary(result: dict[str, Any]) -> str:
    """What the table is of, and the best gamma of each window."""
    share = ", ".join(f"{100 * s:.1f}" for s in result["text_share"])
    text, image = result["text_tokens"], result["image_tokens"]
    told = (
        f"{result['model']}: {image} image tokens to {text} of text; {share} % of the image's "
        f"attention on text in blocks 0.. (even: {100 * text / (text + image):.1f} %); "
        f"{len(result['settings'][0]['judged']['everything'])} pictures a setting."
    )
    if "chance" in result:  # results of before have none
        chance = ", ".join(f"{what} {result['chance'][what]:g} %" for what in JUDGED)
        told += f" Of captions that are not theirs those at gamma 1 get right: {chance}."
    for cfg in sorted({s["cfg"] for s in result["settings"]}, reverse=True):
        for window in WINDOWS:
            rows = {
                s["gamma"]: outcomes(s, "everything").reshape(-1, result["captions"])
                for s in result["settings"]
                if s["cfg"] == cfg and not s["lora"] and (s["window"] == window or s["gamma"] == 1)
            }
            if len(rows) > 2:
                best, low, high = best_gamma(rows)
                tried = ", ".join(f"{gamma:g}" for gamma in sorted(rows))
                told += f"\nBest gamma at CFG {cfg:g}, window {window}: {best:g} "
                told += f"({low:g} to {high:g}, of {tried})."
    return told


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Difference to gamma 1 in everything right, over gamma, for each model and window."""
    figure, axes = subplots(1, len(results), 4.2, 3.6, sharey=True)
    for axis, result in zip(axes[0], results, strict=True):
        cfg = max(s["cfg"] for s in result["settings"])
        settings = [s for s in result["settings"] if s["cfg"] == cfg and not s["lora"]]
        for shift, window in enumerate(WINDOWS):
            chosen = [s for s in settings if s["window"] == window and s["gamma"] != 1]
            gains = {
                s["gamma"] + 0.012 * (shift - 1): gain(s, plain_of(result, cfg), result["captions"])
                for s in sorted(chosen, key=lambda s: s["gamma"])
            }
            if chosen:
                label = f"{window}: t >= {chosen[0]['threshold']:g}"
                errorbars(axis, gains, marker="o", label=label)
        image, text = result["image_tokens"], result["text_tokens"]
        axis.set_title(f"{result['model']}: {image} image, {text} text")
        axis.set_xlabel("gamma")
        axis.legend(fontsize=8)
    axes[0][0].set_ylabel("everything right, points to gamma 1")
    figure.savefig(path, dpi=110)


def errorbars(axis: Any, gains: dict[float, tuple[float, float]], **how: Any) -> None:
    """Gains with their intervals over what they depend on, beside the line of no gain."""
    means, halves = np.array([*gains.values()]).reshape(-1, 2).T
    axis.errorbar(list(gains), means, yerr=halves, capsize=3, **how)
    axis.axhline(0, color="black", linewidth=0.8)


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Sample what the results lack and store after every setting."""
    path = options.out / f"alignment-{name}.json"
    captions = world.captions("held-out")[:: options.every]
    subject = Pictures(*MODELS[name], torch.bfloat16)  # as in training
    wanted = [Setting(cfg=cfg) for cfg in options.cfg]
    every = [(cfg, window) for cfg in options.cfg for window in options.windows]
    gammas = [gamma for gamma in options.gammas if gamma != 1]
    wanted += [Setting(gamma, window, cfg) for cfg, window in every for gamma in gammas]
    if options.lora:
        wanted += [Setting(g, window, cfg, lora=True) for cfg, window in every for g in (1.0, 1.2)]
    asked = {"model": name, "captions": len(captions), "seeds": options.seeds}
    asked |= {"sampler": "euler, simple, 28 steps, bfloat16", "image_tokens": subject.tokens}
    asked |= {"text_tokens": world.TEXTS[subject.text], "weights": sha256(subject.path)}
    result: dict[str, Any] = {**asked, "settings": []}
    if path.exists():
        result = json.loads(path.read_text())
        if {key: result[key] for key in asked} != asked:
            sys.exit(f"{path} is of other captions, seeds or weights: move it away, or use --out.")
    lora = sha256(options.lora) if options.lora else None
    if lora and result.setdefault("lora", lora) != lora:
        sys.exit(f"{path} is of another LoRA: move it away, or use --out.")
    load_pack()
    if "text_share" not in result:
        result["text_share"] = subject.text_share(captions[::6]).nanmean(0).tolist()
    if "chance" not in result:
        result["chance"] = subject.chance(captions, options.cfg[0])
    store(path, result)
    todo = [
        (
            dataclasses.asdict(setting) | {"threshold": setting.threshold(subject.tokens)},
            partial(subject.judge, setting, options.seeds, captions, options.lora),
        )
        for setting in wanted
    ]
    judge_missing(path, result, todo)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help=f"of {', '.join(MODELS)}; all if none is named")
    parser.add_argument("--gammas", type=float, nargs="+", default=list(GAMMAS))
    parser.add_argument("--windows", nargs="+", choices=WINDOWS, default=list(WINDOWS))
    parser.add_argument("--cfg", type=float, nargs="+", default=[3.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--every", type=int, default=1, help="every n-th caption only")
    parser.add_argument("--lora", type=Path, help="a TACA LoRA: alone, and with gamma 1.2")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder")
    parser.add_argument("--table", action="store_true", help="of what there is; sample nothing")
    options = parser.parse_args()
    unknown = set(options.models) - set(MODELS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    results = []
    for name in options.models or MODELS:
        path = options.out / f"alignment-{name}.json"
        if options.table and not path.exists():
            continue
        results.append(json.loads(path.read_text()) if options.table else measure(name, options))
        print(f"\n{summary(results[-1])}\n\n{table(results[-1])}\n")
    if not results:
        sys.exit(f"There are no results in {options.out} yet; run without --table.")
    plot(results, options.out / "alignment.png")


if __name__ == "__main__":
    main()
