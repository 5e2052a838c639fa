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
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comfyui import load_pack  # also ComfyUI's own set-up

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent / "demo"
sys.path.append(str(DEMO))

import comfy.sd  # noqa: E402
import world  # noqa: E402
from codec import CHANNELS, PATCH, Codec  # noqa: E402

sys.path.insert(0, os.environ["COMFYUI_PATH"])
import nodes as core  # noqa: E402

MODELS = {
    "demo": (DEMO / "models" / "taca_demo", DEMO / "taca_demo"),
    **{
        path.name.removesuffix("_mmdit.safetensors"): (HERE / "series" / name,) * 2
        for path in sorted((HERE / "series").glob("*_mmdit.safetensors"))
        for name in [path.name.removesuffix("_mmdit.safetensors")]
    },
}
WINDOWS = ("paper", "snr", "all")
GAMMAS = (0.8, 1.1, 1.2, 1.3, 1.5, 2.0)
FLUX_TOKENS = 4096  # of the paper's 1024 x 1024 pictures
JUDGED = ("everything", "colour", "shape", "relation")
TOKEN = 2 * PATCH  # pixels to the side of an image token


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to sample: gamma in a window, at a CFG scale, with a LoRA or without."""

    gamma: float = 1.0
    window: str = "paper"
    cfg: float = 3.0
    lora: bool = False

    def threshold(self, tokens: int) -> float:
        """The window's lower timestep for pictures of `tokens` image tokens.

        ``"snr"``: where sigma / (1 - sigma), the noise against the picture, is as large *per
        picture* as at the paper's 970 with FLUX's tokens. Averaging over n tokens lowers the noise
        by the square root of n.
        """
        odds = 0.97 / 0.03 * (tokens / FLUX_TOKENS) ** 0.5
        return {"paper": 970.0, "snr": round(1000 * odds / (1 + odds)), "all": 0.0}[self.window]


def sha256(path: Path) -> str:
    """What tells a file from another."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Subject:
    """A model of the series, its codec and how it reads a caption."""

    def __init__(self, name: str) -> None:
        files, codec = MODELS[name]
        self.card = json.loads(files.with_name(f"{files.name}.json").read_text())
        training = self.card["training"]
        self.text, self.size = training.get("text", "words"), training.get("size", world.SIZE)
        self.tokens = (self.size // TOKEN) ** 2
        self.codec = Codec.load(codec.with_name(f"{codec.name}_codec.safetensors"))
        path = files.with_name(f"{files.name}_mmdit.safetensors")
        self.sha256 = sha256(path)
        self.model = comfy.sd.load_diffusion_model(str(path))
        self.model.set_model_compute_dtype(torch.bfloat16)  # as in training

    def condition(self, captions: list[str]) -> list[Any]:
        """ComfyUI's conditioning of some captions."""
        ids = torch.from_numpy(np.stack([world.encode(one, self.text) for one in captions]))
        return [[self.codec.embed(ids), {"pooled_output": torch.zeros(len(captions), 1)}]]

    def sample(self, model: Any, captions: list[str], seed: int, cfg: float) -> torch.Tensor:
        """Latents of the captions, by the demo's sampler."""
        side = self.size // PATCH
        latent = {"samples": torch.zeros(len(captions), CHANNELS, side, side)}
        (latent,) = core.common_ksampler(
            model, seed, 28, cfg, "euler", "simple", self.condition(captions),
            self.condition([""]), latent,
        )  # fmt: skip
        return latent["samples"].float().cpu()

    def patched(self, setting: Setting, lora: Path | None) -> Any:
        """The model as the nodes make it."""
        patch, schedule, lora_module = load_pack()
        model = self.model
        if setting.gamma != 1 or setting.lora:
            window = schedule.TimestepWindow(setting.threshold(self.tokens))
            model = patch.patch_model(model, schedule.Schedule(setting.gamma, window))
        if setting.lora:
            state = lora_module.read_lora(str(lora))
            fitted = lora_module.fit_lora(state, model.model, str(lora), 1.0)
            model = patch.patch_lora(model, fitted)
        return model

    def judge(self, setting: Setting, seed: int, captions: list[str],
              lora: Path | None) -> list[dict[str, bool]]:  # fmt: skip
        """Sample and check the captions once."""
        pictures = self.draw(setting, seed, captions, lora)
        return [world.check(*pair) for pair in zip(pictures, captions, strict=True)]

    def draw(self, setting: Setting, seed: int, captions: list[str],
             lora: Path | None) -> np.ndarray:  # fmt: skip
        """Pictures of the captions."""
        latents = self.sample(self.patched(setting, lora), captions, seed, setting.cfg)
        return self.codec.decode(latents).numpy()

    def chance(self, captions: list[str], cfg: float) -> dict[str, float]:
        """What pictures at gamma 1 get right of captions that are not theirs, in percent.

        The checker takes the better of two ways to match the objects, so this is far from 0.
        """
        pictures = self.draw(Setting(cfg=cfg), 0, captions, None)
        judged = [
            world.check(picture, other)
            for shift in (51, 102, 153)
            for picture, other in zip(pictures, np.roll(captions, shift), strict=True)
        ]
        return {what: round(100 * float(np.mean([j[what] for j in judged])), 1) for what in JUDGED}

    def text_share(self, captions: list[str]) -> list[float]:
        """Share of the image queries' attention on text, by block, averaged over a run at CFG 1."""
        report_module = sys.modules["taca_pack.taca.report"]
        report = report_module.Report({})
        self.sample(report_module.watched(self.model, report), captions, 0, 1.0)
        return report.table()[0].nanmean(0).tolist()


def paired(judged: np.ndarray, plain: np.ndarray) -> tuple[float, float]:
    """Mean paired difference and half its 95 % interval, in points.

    Parameters
    ----------
    judged, plain : numpy.ndarray
        Bool, ``(seeds, captions)``: right or wrong, with TACA and without. A scene's pictures are
        a cluster: all seeds and, where all captions are there, the two that tell it.
    """
    difference = 100 * (judged.astype(float) - plain.astype(float)).mean(0)
    if len(difference) == len(world.captions("held-out")):
        difference = difference.reshape(-1, 2).mean(1)
    return difference.mean(), 1.96 * difference.std(ddof=1) / len(difference) ** 0.5


def best_gamma(rows: dict[float, np.ndarray], rounds: int = 2000) -> tuple[float, float, float]:
    """The gamma with the most right, and its 95 % interval by bootstrap over captions."""
    gammas = sorted(rows)
    by_caption = np.stack([rows[gamma].mean(0) for gamma in gammas])
    drawn = np.random.default_rng(0).integers(0, by_caption.shape[1], (rounds, by_caption.shape[1]))
    best = np.array(gammas)[by_caption[:, drawn].mean(2).argmax(0)]
    means = by_caption.mean(1)
    whole = min((g for g, m in zip(gammas, means, strict=True) if m == means.max()),
                key=lambda gamma: abs(gamma - 1))  # fmt: skip
    return whole, *np.quantile(best, (0.025, 0.975), method="nearest").tolist()


def outcomes(result: dict[str, Any], setting: dict[str, Any], what: str) -> np.ndarray:
    """``(seeds, captions)`` of what is stored as text."""
    flat = np.array([digit == "1" for digit in setting["judged"][what]])
    return flat.reshape(-1, result["captions"])


def plain_of(result: dict[str, Any], setting: dict[str, Any]) -> dict[str, Any]:
    """The same sampling at gamma 1 and without LoRA."""
    return next(
        s for s in result["settings"]
        if s["gamma"] == 1 and not s["lora"] and s["cfg"] == setting["cfg"]
    )  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "| CFG | window | gamma | " + " | ".join(JUDGED) + " |", "|---" * (3 + len(JUDGED)) + "|",
    ]  # fmt: skip
    key = lambda s: (-s["cfg"], WINDOWS.index(s["window"]), s["lora"], s["gamma"])  # noqa: E731
    plain_first = sorted(result["settings"], key=lambda s: (s is not plain_of(result, s), key(s)))
    for s in plain_first:
        plain, cells = plain_of(result, s), []
        for what in JUDGED:
            own = outcomes(result, s, what)
            if s is plain:
                cells.append(f"{100 * own.mean():.1f} %")
            else:
                mean, half = paired(own, outcomes(result, plain, what))
                cells.append(f"{mean:+.1f} ± {half:.1f}")
        window = "-" if s is plain else f"t >= {s['threshold']:g}"
        label = f"{s['gamma']:g}" + (" and LoRA" if s["lora"] else "")
        lines.append(f"| {s['cfg']:g} | {window} | {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(result: dict[str, Any]) -> str:
    """What the table is of, and the best gamma of each window."""
    share = ", ".join(f"{100 * s:.1f}" for s in result["text_share"])
    count = len(result["settings"][0]["judged"][JUDGED[0]])
    by_chance = ""
    if "chance" in result:  # results of before have none
        chance = ", ".join(f"{what} {result['chance'][what]:g} %" for what in JUDGED)
        by_chance = f" Of captions that are not theirs those at gamma 1 get right: {chance}."
    lines = [
        f"{result['model']}: {result['image_tokens']} image tokens to {result['text_tokens']} of "
        f"text; {share} % of the image's attention on text in blocks 0.. (even: "
        f"{100 * result['text_tokens'] / (result['text_tokens'] + result['image_tokens']):.1f} %); "
        f"{count} pictures a setting.{by_chance}"
    ]
    for cfg in sorted({s["cfg"] for s in result["settings"]}, reverse=True):
        for window in WINDOWS:
            rows = {
                s["gamma"]: outcomes(result, s, "everything")
                for s in result["settings"]
                if s["cfg"] == cfg and not s["lora"] and (s["window"] == window or s["gamma"] == 1)
            }
            if len(rows) > 2:
                best, low, high = best_gamma(rows)
                lines.append(
                    f"Best gamma at CFG {cfg:g}, window {window}: {best:g} ({low:g} to {high:g}, "
                    f"of {', '.join(f'{gamma:g}' for gamma in sorted(rows))})."
                )
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Difference to gamma 1 in everything right, over gamma, for each model and window."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(results), figsize=(4.2 * len(results), 3.6), sharey=True, squeeze=False
    )
    for axis, result in zip(axes[0], results, strict=True):
        cfg = max(s["cfg"] for s in result["settings"])
        for shift, window in enumerate(WINDOWS):
            chosen = [
                s for s in result["settings"]
                if (s["cfg"], s["window"], s["lora"]) == (cfg, window, False) and s["gamma"] != 1
            ]  # fmt: skip
            chosen.sort(key=lambda s: s["gamma"])
            if not chosen:
                continue
            pairs = [
                paired(outcomes(result, s, "everything"),
                       outcomes(result, plain_of(result, s), "everything"))
                for s in chosen
            ]  # fmt: skip
            axis.errorbar(
                [s["gamma"] + 0.012 * (shift - 1) for s in chosen], [p[0] for p in pairs],
                yerr=[p[1] for p in pairs], marker="o", capsize=3,
                label=f"{window}: t >= {chosen[0]['threshold']:g}",
            )  # fmt: skip
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_title(
            f"{result['model']}: {result['image_tokens']} image, {result['text_tokens']} text"
        )
        axis.set_xlabel("gamma")
        axis.legend(fontsize=8)
    axes[0][0].set_ylabel("everything right, points to gamma 1")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def store(path: Path, result: dict[str, Any]) -> None:
    """Write the result, whole or not at all."""
    path.with_suffix(".new").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".new").replace(path)


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Sample what the results lack and store after every setting."""
    path = options.out / f"alignment-{name}.json"
    captions = world.captions("held-out")[:: options.every]
    subject = Subject(name)
    wanted = [Setting(cfg=cfg) for cfg in options.cfg]
    wanted += [
        Setting(gamma, window, cfg)
        for cfg in options.cfg for window in options.windows for gamma in options.gammas
        if gamma != 1
    ]  # fmt: skip
    if options.lora:
        wanted += [
            Setting(gamma, window, cfg, lora=True)
            for cfg in options.cfg for window in options.windows for gamma in (1.0, 1.2)
        ]  # fmt: skip
    asked = {
        "model": name, "captions": len(captions), "seeds": options.seeds,
        "sampler": "euler, simple, 28 steps, bfloat16", "image_tokens": subject.tokens,
        "text_tokens": world.TEXTS[subject.text], "weights": subject.sha256,
    }  # fmt: skip
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
        result["text_share"] = subject.text_share(captions[::6])
    if "chance" not in result:
        result["chance"] = subject.chance(captions, options.cfg[0])
    store(path, result)
    done = {Setting(s["gamma"], s["window"], s["cfg"], s["lora"]) for s in result["settings"]}
    todo = [setting for setting in wanted if setting not in done]
    for number, setting in enumerate(todo, 1):
        start = time.monotonic()
        judged = [
            one for seed in options.seeds
            for one in subject.judge(setting, seed, captions, options.lora)
        ]  # fmt: skip
        stored = dataclasses.asdict(setting) | {"threshold": setting.threshold(subject.tokens)}
        stored["judged"] = {
            what: "".join(str(int(one[what])) for one in judged) for what in JUDGED
        }  # fmt: skip
        result["settings"].append(stored)
        store(path, result)
        right = sum(one["everything"] for one in judged)
        print(f"{name} {number}/{len(todo)} {setting}: {right} of {len(judged)} right, "
              f"{time.monotonic() - start:.0f} s", flush=True)  # fmt: skip
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
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder")
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
