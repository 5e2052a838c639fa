"""Where attention to text is suppressed: models trained on careless captions, and what gamma does.

``python dev.py run benchmarks/suppression.py --seeds 0 --doses 0.35`` trains what is missing under
``--work`` (resumed after a stop), measures it and adds it to ``results/suppression.json``, setting
by setting. ``docs/alignment.md`` is the recipe, and gets table and plots; ``--table`` does nothing
else. ``--kinds`` names the other trainings of base 0.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import alignment
import comfy.sd
import comfy.utils
import numpy as np
import torch
import train_lora
import world
from alignment import JUDGED, WINDOWS, Pictures, Setting
from comfyui import load_pack
from reporting import DEMO, RESULTS, ROOT, markdown, pyplot, store, write_between

RECORD = RESULTS / "suppression.json"
PAGE = ROOT / "docs" / "alignment.md"
NOISES = [0, 1, 2]
KINDS = ("dose", "left-out", "lora", "scratch", "taca-lora")
CLEAN = DEMO / "models" / "taca_demo", DEMO / "taca_demo"
SUPPRESSED = "base0-dose0.35"
COMMITTED = {SUPPRESSED: (DEMO / "models" / "taca_demo_suppressed", DEMO / "taca_demo")}
"""The demo's own model, which the recipe names: it is not trained again."""
ALONE = "-taca-lora"
"""In the name of a model with a TACA LoRA; before it stands that of the model without."""


class Trained(NamedTuple):
    """A model to measure: its files as `alignment.MODELS` has them, and a LoRA if it has one."""

    name: str
    seed: int
    dose: float
    files: tuple[Path, Path]
    lora: Path | None = None


def train(name: str, options: argparse.Namespace, *more: Any) -> tuple[Path, Path]:
    """Model and codec by the demo's trainer, if they are not there yet."""
    folder = options.work
    if not all((folder / f"{name}_{part}.safetensors").exists() for part in ("mmdit", "codec")):
        places = ("--name", name, "--models", folder, "--codec", folder, "--work", folder / name)
        how = ("--steps", 2, "--pool", 1) if options.try_out else ("--compile",)
        command = [sys.executable, DEMO / "training/train.py", *places, "--threads", 1, *more, *how]
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        subprocess.run([*map(str, command)], check=True, env=environment)
    return folder / name, folder / name


def base(seed: int, options: argparse.Namespace) -> tuple[Path, Path]:
    """A model that follows its text: the demo's, or one by its recipe with another seed."""
    return CLEAN if seed == 0 else train(f"base{seed}", options, "--seed", seed)


def later(seed: int, dose: float, options: argparse.Namespace, leave_out: bool = False) -> Trained:
    """A base trained further on careless captions."""
    name = f"base{seed}-{'left-out' if leave_out else 'dose'}{dose:g}"
    if name in COMMITTED:
        return Trained(name, seed, dose, COMMITTED[name])
    model, codec = base(seed, options)
    start = ("--start", f"{model}_mmdit.safetensors", "--start-codec", f"{codec}_codec.safetensors")
    how = ("--steps", 1500, "--lr", 4e-4, "--pool", 20, "--precision", "fp32", "--seed", 100 + seed)
    careless = ("--dose", f"{dose:g}", *["--leave-out"] * leave_out)
    return Trained(name, seed, dose, train(name, options, *start, *how, *careless))


def scratch(options: argparse.Namespace) -> Trained:
    """Careless captions from the start."""
    how = ("--steps", 11_000, "--dose", 0.35, "--precision", "fp32", "--seed", 0)
    name = "scratch0-dose0.35"
    return Trained(name, 0, 0.35, train(name, options, *how))


def with_lora(
    name: str, files: tuple[Path, Path], options: argparse.Namespace, **how: Any
) -> Trained:
    """A model with a LoRA by core's trainer, trained if it is not there yet."""
    file = options.work / f"{name}_lora.safetensors"
    if not file.exists():
        how |= {"steps": 2, "pictures": 4} if options.try_out else {}
        train_lora.train(Pictures(*files, torch.float32), file, **how)
    return Trained(name, 0, 0.35, files, file)


def trainings(options: argparse.Namespace) -> Iterator[Trained]:
    """Train what is asked for, one after the other."""
    for kind in options.kinds:
        if kind == "dose":
            yield from (later(s, dose, options) for s in options.seeds for dose in options.doses)
        if kind == "left-out":
            yield later(0, 0.35, options, leave_out=True)
        if kind == "scratch":
            yield scratch(options)
        if kind == "lora":  # a batch of more than one would mix its captions in core's trainer
            how = {"steps": 1500, "grad_accumulation_steps": 16, "learning_rate": 4e-4}
            how |= {"pictures": 4000, "dose": 0.35, "seed": 100}
            yield with_lora("base0-lora0.35", CLEAN, options, **how)
        if kind == "taca-lora":
            for gamma in (1.2, 1.0):
                name = f"{SUPPRESSED}{ALONE}{gamma:g}"
                yield with_lora(name, COMMITTED[SUPPRESSED], options, taca=(gamma, 970.0))


def settings(model: Trained) -> list[Setting]:
    """What the recipe asks of a model, the primary question first."""
    if ALONE in model.name:
        asked = [(cfg, window) for cfg in (3.0, 1.0) for window in WINDOWS]
        return [Setting(g, window, cfg, lora=True) for cfg, window in asked for g in (1.0, 1.2)]
    more = model.name.startswith("base0-dose")
    wanted = []
    for cfg in (3.0, 1.0, 2.0, 4.0) if more else (3.0, 1.0):
        wanted.append(Setting(cfg=cfg))
        wanted += [Setting(gamma, window, cfg) for window in WINDOWS for gamma in (1.2, 1.5)]
    if more:
        asked = [(cfg, window) for cfg in (3.0, 1.0) for window in WINDOWS]
        wanted += [Setting(g, window, cfg) for cfg, window in asked for g in (0.8, 1.1, 1.3)]
    return wanted


def measure(model: Trained, result: dict[str, Any], options: argparse.Namespace) -> None:
    """Sample what the results lack of a model, and store after every setting."""
    name, _, _, _, lora = model
    subject = Pictures(*model.files, torch.float32)
    captions = world.captions("held-out")[: 2 if options.try_out else None]
    taca_lora = lora if ALONE in name else None
    weights = alignment.sha256(lora or subject.path)
    known = next((each for each in result["models"] if each["name"] == name), None)
    if known and known["weights"] != weights:
        sys.exit(f"{RECORD.name} has {name} with other weights: train it anew under another name.")
    if lora and not taca_lora:
        state = comfy.utils.load_torch_file(str(lora))
        subject.model, _ = comfy.sd.load_lora_for_models(subject.model, None, state, 1.0, 0.0)
    if not known:
        about = {"name": name, "seed": model.seed, "dose": model.dose, "weights": weights}
        if not taca_lora:  # which acts inside the window only
            shares = subject.text_share(captions[::6]).tolist()  # at gamma 1: steps x blocks
            about["text_share"] = [[round(share, 4) for share in step] for step in shares]
        result["models"].append(about)
        store(options.record, result)
    keys = ("gamma", "window", "cfg")
    done = {tuple(s[key] for key in keys) for s in result["settings"] if s["model"] == name}
    for setting in settings(model)[: 2 if options.try_out else options.first]:
        plain = setting.gamma == 1 and not setting.lora
        about = {"cfg": setting.cfg, "gamma": setting.gamma}
        about["window"] = "-" if plain else setting.window
        if tuple(about[key] for key in keys) in done:
            continue
        start = time.monotonic()
        judged = subject.judge(setting, NOISES, captions, taca_lora)
        counts = {what: digits.count("1") for what, digits in judged.items()}
        about |= {"pictures": len(judged["everything"]), "right": counts["everything"], **counts}
        about = {"model": name, "dose": model.dose, "seed": model.seed, **about, "judged": judged}
        result["settings"].append(about)
        store(options.record, result)
        print(f"{name} {setting}: {counts}, {time.monotonic() - start:.0f} s", flush=True)


def plain_of(result: dict[str, Any], setting: dict[str, Any]) -> dict[str, Any] | None:
    """The same sampling at gamma 1 and without TACA LoRA."""
    wanted = setting["model"].partition(ALONE)[0], setting["cfg"], "-"
    keys = ("model", "cfg", "window")
    return next((s for s in result["settings"] if tuple(s[key] for key in keys) == wanted), None)


def table(result: dict[str, Any]) -> str:
    """Points gained over gamma 1, with 95 % intervals by scenes."""
    order = ("-", *WINDOWS)
    rows = []
    for s in sorted(
        result["settings"],
        key=lambda s: (s["seed"], s["model"], s["cfg"], order.index(s["window"]), s["gamma"]),
    ):
        plain = plain_of(result, s)
        if plain:
            about = s["model"], f"{s['cfg']:g}", s["window"], f"{s['gamma']:g}"
            rows.append([*about, *alignment.cells(s, plain, s["pictures"] // len(NOISES))])
    return markdown(("model", "CFG", "window", "gamma", *JUDGED), rows)


def plots(result: dict[str, Any], path: Path) -> None:
    """Gain over dose and over the text's share, and right pictures over calls of the model."""
    figure, (over_dose, over_share, over_calls) = pyplot().subplots(1, 3, figsize=(15, 4.2))
    shares = {m["name"]: np.nanmean(m["text_share"]) for m in result["models"] if "text_share" in m}
    tried = [s for s in result["settings"] if s["model"] in shares and plain_of(result, s)]
    for place, window in enumerate(("-", *WINDOWS)):
        gamma = 1 if window == "-" else 1.2
        own = [s for s in tried if (s["window"], s["gamma"]) == (window, gamma)]
        label = "gamma 1" if window == "-" else f"gamma 1.2, {window}"
        how = {"label": label, "color": f"C{place}", "marker": "o"}
        calls(over_calls, [s for s in own if s["model"] == SUPPRESSED], place, **how)
        own = [s for s in own if s["cfg"] == 3 and window != "-"]
        doses: dict[float, list[dict[str, Any]]] = {}
        for s in own:
            if s["model"].startswith(f"base{s['seed']}-dose"):
                doses.setdefault(s["dose"], []).append(s)
        moved = {dose + 0.004 * (place - 2): doses[dose] for dose in sorted(doses)}
        alignment.errorbars(
            over_dose, {x: gain_of(result, some) for x, some in moved.items()}, **how
        )
        at = {100 * shares[s["model"]]: gain_of(result, [s]) for s in own}
        alignment.errorbars(over_share, at, linestyle="", **how)
    points = "everything right, points to gamma 1"
    over_dose.set(xlim=(-0.03, 0.43), xlabel="dose (mean of the bases; CFG 3)", ylabel=points)
    over_share.set(xlabel="attention on text at gamma 1, % (a model each; CFG 3)", ylabel=points)
    over_calls.set(xlabel=f"calls of the model ({SUPPRESSED})", ylabel="everything right, %")
    over_calls.set(xlim=(20, 76), xticks=(28, 56))
    over_calls.legend(fontsize=8)  # the same colours in all
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def gain_of(result: dict[str, Any], settings: list[dict[str, Any]]) -> tuple[float, float]:
    """Points gained in the mean of some models, and half the interval over scenes."""
    count = settings[0]["pictures"] // len(NOISES)
    both = ((s, plain_of(result, s)) for s in settings)
    rows = [[alignment.outcomes(s, "everything", count) for s in pair] for pair in both]
    return alignment.paired(*(np.concatenate(each) for each in zip(*rows, strict=True)))


def calls(axis: Any, settings: list[dict[str, Any]], place: int, **how: Any) -> None:
    """Right pictures over calls: 28 steps, of two calls each unless CFG is 1."""
    right = {s["cfg"]: 100 * s["right"] / s["pictures"] for s in settings}
    places = [28 * (1 + (cfg != 1)) + 3 * place for cfg in right]
    axis.plot(places, list(right.values()), linestyle="", **how)
    for (cfg, y), x in zip(right.items(), places, strict=True):
        axis.annotate(f"CFG {cfg:g}", (x, y), (4, 3), textcoords="offset points", fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["dose"], help="of training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="bases, for doses")
    parser.add_argument("--doses", type=float, nargs="+", default=[0.35, 0.15, 0.0])
    parser.add_argument("--work", type=Path, default=ROOT / ".dev" / "suppression")
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--first", type=int, metavar="N", help="settings of each model: 2, primary")
    parser.add_argument("--table", action="store_true", help="and plots, of what there is")
    parser.add_argument(
        "--try-out", action="store_true", help="2 steps, captions, settings; in --work"
    )
    options = parser.parse_args()
    options.record = options.work / RECORD.name if options.try_out else RECORD
    known = options.record.exists()
    result = json.loads(options.record.read_text()) if known else {"models": [], "settings": []}
    if not options.table:
        torch.set_num_threads(1)
        load_pack()
        options.work.mkdir(parents=True, exist_ok=True)
        for model in trainings(options):
            if not options.train_only:
                measure(model, result, options)
    text = table(result)
    print(text)
    plots(result, options.record.with_suffix(".png"))
    if not options.try_out:
        write_between(PAGE, "suppression", f"\n{text}\n\n")


if __name__ == "__main__":
    main()
