"""Where attention to text is suppressed: models trained on careless captions, and what gamma does.

``python dev.py run benchmarks/suppression.py --seeds 0 --doses 0.35`` trains what is missing under
``--work`` (resumed after a stop), measures it and adds it to ``results/suppression.json``, setting
by setting. ``docs/alignment.md`` is the recipe, and gets table and plots; ``--table`` does nothing
else. ``--kinds`` names the other trainings of base 0.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import alignment
import comfy.sd
import comfy.utils
import numpy as np
import torch
import world
from alignment import WINDOWS, Pictures, Setting
from careless import ALONE, KINDS, SUPPRESSED, Trained, trainings
from comfyui import load_pack
from reporting import (
    JUDGED,
    RESULTS,
    ROOT,
    judge_missing,
    markdown,
    outcomes,
    sha256,
    store,
    subplots,
    write_between,
)

RECORD = RESULTS / "suppression.json"
PAGE = ROOT / "docs" / "alignment.md"
NOISES = [0, 1, 2]


def settings(model: Trained) -> list[Setting]:
    """What the recipe asks of a model, the primary question first."""
    if ALONE in model.name:
        asked = [(cfg, window) for cfg in (3.0, 1.0) for window in WINDOWS]
        return [Setting(g, window, cfg, lora=True) for cfg, window in asked for g in (1.0, 1.2)]
    more = model.name.startswith("base0-dose") and "again" not in model.name
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
    weights = sha256(lora or subject.path)
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
    wanted = []
    for setting in settings(model)[: 2 if options.try_out else options.first]:
        window = "-" if setting.gamma == 1 and not setting.lora else setting.window
        about = {"model": name, "dose": model.dose, "seed": model.seed, "cfg": setting.cfg}
        about |= {"gamma": setting.gamma, "window": window}
        wanted.append((about, partial(subject.judge, setting, NOISES, captions, taca_lora)))
    judge_missing(options.record, result, wanted)


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
            rows.append([*about, *alignment.cells(s, plain, captions_of(s))])
    return markdown(("model", "CFG", "window", "gamma", *JUDGED), rows)


def plots(result: dict[str, Any], path: Path) -> None:
    """Gain over dose and over the text's share, and right pictures over calls of the model."""
    figure, ((over_dose, over_share, over_calls),) = subplots(1, 3, 5, 4.2)
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
    over_dose.set(xlim=(-0.03, 0.43), xlabel="dose (mean of the trainings; CFG 3)", ylabel=points)
    over_share.set(xlabel="attention on text at gamma 1, % (a model each; CFG 3)", ylabel=points)
    over_calls.set(xlabel=f"calls of the model ({SUPPRESSED})", ylabel="everything right, %")
    over_calls.set(xlim=(20, 76), xticks=(28, 56))
    over_calls.legend(fontsize=8)  # the same colours in all
    figure.savefig(path, dpi=90)


def captions_of(setting: dict[str, Any]) -> int:
    """Of how many captions its pictures are."""
    return len(setting["judged"]["everything"]) // len(NOISES)


def gain_of(result: dict[str, Any], settings: list[dict[str, Any]]) -> tuple[float, float]:
    """Points gained in the mean of some models, and half the interval over scenes."""
    shape = -1, captions_of(settings[0])
    both = ((s, plain_of(result, s)) for s in settings)
    rows = [[outcomes(s, "everything").reshape(shape) for s in pair] for pair in both]
    return alignment.paired(*(np.concatenate(each) for each in zip(*rows, strict=True)))


def calls(axis: Any, settings: list[dict[str, Any]], place: int, **how: Any) -> None:
    """Right pictures over calls: 28 steps, of two calls each unless CFG is 1."""
    right = {s["cfg"]: 100 * outcomes(s, "everything").mean() for s in settings}
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
