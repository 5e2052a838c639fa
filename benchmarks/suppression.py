"""Where attention to text is suppressed: models trained on careless captions, and what gamma does.

``python dev.py run benchmarks/suppression.py --seeds 0 --doses 0.35`` trains what is missing under
``--work`` (resumed after a stop), measures it and adds it to ``results/suppression.json``, setting
by setting. ``docs/alignment.md`` is the recipe, and gets the table; ``--table`` does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import alignment
import numpy as np
import torch
import world
from alignment import JUDGED, Setting, Subject, store
from comfyui import load_pack

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "suppression.json"
PAGE = ROOT / "docs" / "alignment.md"
MARKS = "<!-- suppression -->\n", "<!-- /suppression -->\n"
NOISES = (0, 1, 2)
LATER = ("--steps", "1500", "--lr", "4e-4", "--pool", "20", "--precision", "fp32")
WINDOWS = ("paper", "snr", "all")
DEMO = ROOT / "demo"
COMMITTED = {"base0-dose0.35": (DEMO / "models" / "taca_demo_suppressed", DEMO / "taca_demo")}
"""The demo's own model, which the recipe names: it is not trained again."""


def train(name: str, folder: Path, *more: str) -> tuple[Path, Path]:
    """Model and codec by the demo's trainer, if they are not there yet."""
    files = folder / f"{name}_mmdit.safetensors", folder / f"{name}_codec.safetensors"
    if not all(file.exists() for file in files):
        places = ("--name", name, "--models", folder, "--codec", folder, "--work", folder / name)
        command = [sys.executable, ROOT / "demo" / "train.py", *places, "--threads", "1", *more]
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        subprocess.run([*map(str, command)], check=True, env=environment)
    return files


def base(seed: int, folder: Path) -> tuple[Path, Path]:
    """A model that follows its text: the demo's, or one by its recipe with another seed."""
    if seed == 0:
        return DEMO / "models" / "taca_demo_mmdit.safetensors", DEMO / "taca_demo_codec.safetensors"
    return train(f"base{seed}", folder, "--seed", str(seed), "--compile")


def later(seed: int, dose: float, folder: Path, leave_out: bool = False) -> str:
    """Train a base further on careless captions; the name of the model."""
    name = f"base{seed}-{'left-out' if leave_out else 'dose'}{dose:g}"
    if name in COMMITTED:
        alignment.MODELS[name] = COMMITTED[name]
        return name
    model, codec = base(seed, folder)
    start = ("--start", str(model), "--start-codec", str(codec), "--seed", str(100 + seed))
    careless = ("--dose", f"{dose:g}", *(["--leave-out"] if leave_out else []))
    train(name, folder, *LATER, *start, *careless, "--compile")
    alignment.MODELS[name] = (folder / name, folder / name)
    return name


def settings(seed: int) -> list[Setting]:
    """What the recipe asks of a base with this seed, the primary question first."""
    scales = (3.0, 1.0, 2.0, 4.0) if seed == 0 else (3.0, 1.0)
    wanted = []
    for cfg in scales:
        wanted.append(Setting(cfg=cfg))
        wanted += [Setting(gamma, window, cfg) for window in WINDOWS for gamma in (1.2, 1.5)]
    if seed == 0:
        wanted += [
            Setting(gamma, window, cfg)
            for cfg in (3.0, 1.0) for window in WINDOWS for gamma in (0.8, 1.1, 1.3)
        ]  # fmt: skip
    return wanted


def shares(subject: Subject, captions: list[str]) -> list[list[float]]:
    """Share of the image's attention that goes to text at gamma 1 and CFG 1: steps x blocks."""
    module = sys.modules["taca_pack.taca.report"]
    report = module.Report({})
    subject.sample(module.watched(subject.model, report), captions, 0, 1.0)
    return [[round(share, 4) for share in step] for step in report.table()[0].tolist()]


def measure(name: str, seed: int, dose: float, result: dict[str, Any]) -> None:
    """Sample what the results lack of a model, and store after every setting."""
    subject, captions = Subject(name), world.captions("held-out")
    subject.model.set_model_compute_dtype(torch.float32)
    about = {"name": name, "seed": seed, "dose": dose, "weights": subject.sha256}
    known = next((each for each in result["models"] if each["name"] == name), None)
    if known and known["weights"] != subject.sha256:
        sys.exit(f"{RESULT.name} has {name} with other weights: train it anew under another name.")
    if not known:
        result["models"].append({**about, "text_share": shares(subject, captions[::6])})
        store(RESULT, result)
    keys = ("gamma", "window", "cfg")
    done = {tuple(s[key] for key in keys) for s in result["settings"] if s["model"] == name}
    for setting in settings(seed):
        window = "-" if setting.gamma == 1 else setting.window
        if (setting.gamma, window, setting.cfg) in done:
            continue
        start = time.monotonic()
        judged = [one for noise in NOISES for one in subject.judge(setting, noise, captions, None)]
        counts = {what: sum(one[what] for one in judged) for what in JUDGED}
        result["settings"].append({
            "model": name, "dose": dose, "seed": seed, "cfg": setting.cfg, "gamma": setting.gamma,
            "window": window, "pictures": len(judged), "right": counts["everything"], **counts,
            "judged": {what: "".join(str(int(one[what])) for one in judged) for what in JUDGED},
        })  # fmt: skip
        store(RESULT, result)
        print(f"{name} {setting}: {counts}, {time.monotonic() - start:.0f} s", flush=True)


def outcomes(setting: dict[str, Any], what: str) -> np.ndarray:
    """Bool ``(noises, captions)``."""
    return np.array([digit == "1" for digit in setting["judged"][what]]).reshape(len(NOISES), -1)


def table(result: dict[str, Any]) -> str:
    """Points gained over gamma 1, with 95 % intervals by scenes."""
    lines = [
        "| base | dose | CFG | window | gamma | " + " | ".join(JUDGED) + " |",
        "|---" * (5 + len(JUDGED)) + "|",
    ]
    order = ("-", *WINDOWS)
    rows = sorted(
        result["settings"],
        key=lambda s: (s["seed"], s["model"], s["cfg"], order.index(s["window"]), s["gamma"]),
    )
    for s in rows:
        plain = next(
            p for p in rows if (p["model"], p["cfg"], p["gamma"]) == (s["model"], s["cfg"], 1)
        )
        cells = []
        for what in JUDGED:
            mean, half = alignment.paired(outcomes(s, what), outcomes(plain, what))
            share = 100 * outcomes(s, what).mean()
            cells.append(f"{share:.1f} %" if s is plain else f"{mean:+.1f} ± {half:.1f}")
        about = f"| {s['seed']} | {s['dose']:g} | {s['cfg']:g} | {s['window']} | {s['gamma']:g} | "
        lines.append(about + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="bases")
    parser.add_argument("--doses", type=float, nargs="+", default=[0.35, 0.15, 0.0])
    parser.add_argument("--work", type=Path, default=ROOT / ".dev" / "suppression")
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {"models": [], "settings": []}
    if not options.table:
        torch.set_num_threads(1)
        options.work.mkdir(parents=True, exist_ok=True)
        load_pack()
        for seed in options.seeds:
            for dose in options.doses:
                name = later(seed, dose, options.work)
                if not options.train_only:
                    measure(name, seed, dose, result)
    text = table(result)
    print(text)
    before, begin, rest = PAGE.read_text("utf-8").partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    PAGE.write_text(f"{before}{begin}\n{text}\n\n{end}{after}", "utf-8")


if __name__ == "__main__":
    main()
