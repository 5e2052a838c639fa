"""Models that suppress attention to text, and LoRAs of them: trained on careless captions.

``benchmarks/suppression.py`` trains what is missing of them and measures it; ``docs/alignment.md``
is the recipe. The demo's suppressed model is one of them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import train_lora
from subject import Subject

TRAINING = Path(__file__).resolve().parent
DEMO = TRAINING.parent
KINDS = ("dose", "again", "left-out", "lora", "scratch", "taca-lora")
CLEAN = DEMO / "models" / "taca_demo", DEMO / "taca_demo"
SUPPRESSED = "base0-dose0.35"
COMMITTED = {SUPPRESSED: (DEMO / "models" / "taca_demo_suppressed", DEMO / "taca_demo")}
"""The demo's own model, which the recipe names: it is not trained again."""
ALONE = "-taca-lora"
"""In the name of a model with a TACA LoRA; before it stands that of the model without."""


class Trained(NamedTuple):
    """A model to measure: its files up to the ends of their names, and a LoRA if it has one."""

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
        command = [sys.executable, TRAINING / "train.py", *places, "--threads", 1, *more, *how]
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        subprocess.run([*map(str, command)], check=True, env=environment)
    return folder / name, folder / name


def base(seed: int, options: argparse.Namespace) -> tuple[Path, Path]:
    """A model that follows its text: the demo's, or one of another seed and fewer steps."""
    how = ("--seed", seed, "--steps", 3000, "--precision", "fp32")
    return CLEAN if seed == 0 else train(f"base{seed}", options, *how)


def later(
    seed: int, dose: float, options: argparse.Namespace, leave_out: bool = False, again: int = 0
) -> Trained:
    """A base trained further on careless captions; ``again`` and again with other seeds."""
    name = f"base{seed}-{'left-out' if leave_out else 'dose'}{dose:g}"
    name += f"-again{again}" if again else ""
    if name in COMMITTED:
        return Trained(name, seed, dose, COMMITTED[name])
    model, codec = base(seed, options)
    start = ("--start", f"{model}_mmdit.safetensors", "--start-codec", f"{codec}_codec.safetensors")
    how = ("--steps", 1500, "--lr", 4e-4, "--pool", 20, "--precision", "fp32")
    how = (*how, "--seed", 100 * (1 + again) + seed)
    careless = ("--dose", f"{dose:g}", *["--leave-out"] * leave_out)
    return Trained(name, seed, dose, train(name, options, *start, *how, *careless))


def scratch(options: argparse.Namespace) -> Trained:
    """Careless captions from the start."""
    how = ("--steps", 3000, "--dose", 0.35, "--precision", "fp32", "--seed", 0)
    name = "scratch0-dose0.35"
    return Trained(name, 0, 0.35, train(name, options, *how))


def with_lora(
    name: str, files: tuple[Path, Path], options: argparse.Namespace, **how: Any
) -> Trained:
    """A model with a LoRA by core's trainer, trained if it is not there yet."""
    file = options.work / f"{name}_lora.safetensors"
    if not file.exists():
        how |= {"steps": 2, "pictures": 4} if options.try_out else {}
        train_lora.train(Subject(*files, torch.float32), file, **how)
    return Trained(name, 0, 0.35, files, file)


def trainings(options: argparse.Namespace) -> Iterator[Trained]:
    """Train what is asked for, one after the other."""
    for kind in options.kinds:
        if kind == "dose":
            yield from (later(s, dose, options) for s in options.seeds for dose in options.doses)
        if kind == "again":
            yield from (later(0, 0.35, options, again=again) for again in (1, 2))
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
