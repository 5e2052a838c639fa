"""The benchmarks' harness: interleaved rounds, their spread, memory, results, tables and plots."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import textwrap
import time
import timeit
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reporting import RESULTS, subplots
from scipy.stats import bootstrap
from torch.utils.benchmark import Timer

SCHEMA = 2  # of the files in RESULTS
STEPS, STEPS_INSIDE = 30, 3
SLOW_ROUNDS = 3

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""On a CPU that is shared with other work, the process's own time says more: ``--clock cpu``."""
clock = CLOCKS["wall"]
deadline = float("inf")
"""By ``time.monotonic``: rounds that would begin later are left out, but for the first."""

# Measuring


def parse(parser: argparse.ArgumentParser, rounds: str, usual: str = "wall") -> Any:
    """The command line, with the options that all scripts have; sets the clock."""
    global clock
    parser.add_argument("--rounds", type=int, help=rounds)
    parser.add_argument("--clock", choices=CLOCKS, default=usual)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder")
    options = parser.parse_args()
    clock = CLOCKS[options.clock]
    return options


def parse_cases(parser: argparse.ArgumentParser, dtypes: Iterable[str]) -> Any:
    """Of scripts whose cases have a size, a batch and a dtype; with what these are by default."""
    parser.add_argument("--sizes", type=int, nargs="+", help="1024 on a GPU, 512 on a CPU")
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    usual, on_gpu = "bfloat16 on a GPU, float32 on a CPU", torch.cuda.is_available()
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, help=usual)
    options = parse(parser, "50 on a GPU, 7 on a CPU")
    on_gpu = getattr(options, "device", "cuda" if on_gpu else "cpu").startswith("cuda")
    options.sizes = options.sizes or [1024 if on_gpu else 512]
    options.dtypes = options.dtypes or ["bfloat16" if on_gpu else "float32"]
    options.rounds = options.rounds or (50 if on_gpu else 7)
    return options


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """How long one call takes; on a GPU of three in a row, which keep it busy as sampling does."""
    if device.type == "cuda":  # torch's timer warms up with two calls, and waits for the GPU
        return Timer("call()", globals={"call": function}).timeit(3).mean
    return timeit.Timer(function, timer=clock).timeit(1)


def interleaved(
    measure: Callable[[str], Any],
    names: Sequence[str],
    rounds: int,
    label: str,
    slow: Collection[str] = (),
    warm_up: bool = True,
) -> dict[str, list[Any]]:
    """What ``measure`` gives for each name once a round, in a new order each.

    Those that are slow run in the first ``SLOW_ROUNDS`` rounds only; to warm up, each runs once.
    """
    found: dict[str, list[Any]] = {name: [] for name in names}
    shuffle = np.random.default_rng(0)
    for name in names if warm_up else ():
        measure(name)
    for index in range(rounds):
        if index and time.monotonic() > deadline:
            break
        print(f"\r{label}: round {index + 1}/{rounds} ", end="", file=sys.stderr, flush=True)
        for name in shuffle.permutation(names).tolist():
            if name not in slow or index < SLOW_ROUNDS:
                found[name].append(measure(name))
    print(file=sys.stderr)
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and 10-90 % range; the median's 95 % interval and standard error, by bootstrap."""
    p10, median, p90 = np.quantile(values, (0.1, 0.5, 0.9)).tolist()
    found = {"median": median, "p10": p10, "p90": p90, "low": median, "high": median, "error": 0.0}
    if len(values) > 1:
        drawn = bootstrap((values,), np.median, n_resamples=2000, method="percentile", rng=0)
        low, high = map(float, drawn.confidence_interval)
        found |= {"low": low, "high": high, "error": float(drawn.standard_error)}
    return found


def summary(own: list[float], plain: list[float]) -> dict[str, Any]:
    """Times of one method beside plain's of the same rounds."""
    pairs = list(zip(own, plain, strict=False))
    ratio, extra = spread([a / b for a, b in pairs]), spread([a - b for a, b in pairs])
    found = {"rounds": len(own), "median_s": float(np.median(own)), "ratio": ratio["median"]}
    found |= {"ratio_p10": ratio["p10"], "ratio_p90": ratio["p90"], "extra_s": extra["median"]}
    times = [float(f"{each:.5g}") for each in own]
    return found | {"extra_error_s": extra["error"], "times_s": times}


def summaries(times: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """``summary`` of each method; ``"plain"`` is among them."""
    return {name: summary(own, times["plain"]) for name, own in times.items()}


def ratios(row: dict[str, Any]) -> list[float]:
    """10 %, 50 % and 90 % of a ``summary``'s ratio."""
    return [row[key] for key in ("ratio_p10", "ratio", "ratio_p90")]


def picture(inside: dict[str, Any], outside: dict[str, Any] | None = None) -> list[float]:
    """``ratios`` of a whole picture, of those of a step inside the window and one outside.

    Outside a step is by default as long as a plain one, for not one operation differs there
    (``tests/core/test_performance.py``), and a measured one only adds the machine's noise.
    """
    steps = zip(ratios(inside), ratios(outside) if outside else [1.0] * 3, strict=True)
    return [(STEPS_INSIDE * one + (STEPS - STEPS_INSIDE) * rest) / STEPS for one, rest in steps]


def peak_mib(function: Callable[[], Any], device: torch.device) -> float:
    """Peak memory that one call allocates, above weights and inputs; called before, at least once.

    On a CPU from the profiler's record of every allocation, so that it is exact.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        function()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    used = np.cumsum([0, *(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))])
    return float(used.max()) / 2**20


# What a result depends on


def machine(device: torch.device) -> str:
    """Name the model of GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found.group(1) if found else platform.processor() or platform.machine()


def slug_of(device: torch.device) -> str:
    """The machine's name for a file."""
    return re.sub(r"[^a-z0-9]+", "-", machine(device).lower()).strip("-")


def environment(device: torch.device, clock_name: str) -> dict[str, Any]:
    return {
        "machine": machine(device),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "clock": "wall" if device.type == "cuda" else clock_name,
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def said(environment: dict[str, Any]) -> str:
    """An environment, in a line."""
    name, threads, clock_name, load, version = (
        environment[key] for key in ("machine", "threads", "clock", "load", "torch")
    )
    plural = "s" * (threads > 1)
    return f"{name}, {threads} thread{plural}, {clock_name} clock, torch {version}, load {load}"


# Tables and plots


def ranged(values: Sequence[float], digits: int = 3, dash: str = "-") -> str:
    """Three numbers in their order, the middle one first."""
    low, middle, high = (f"{value:.{digits}f}" for value in values)
    return f"{middle} ({low}{dash}{high})"


def cell(row: dict[str, Any]) -> str:
    """A ratio and its spread."""
    return ranged(ratios(row))


def peak_cell(peaks: dict[str, float], name: str, digits: int = 0) -> str:
    """Peak memory of a method, and its ratio to plain's."""
    found = peaks.get(name)
    return "" if found is None else f"{found:.{digits}f} ({found / peaks['plain']:.3f}×)"


class Results:
    """One script's results on one machine: a JSON of cases that later runs add to."""

    def __init__(self, kind: str, folder: Path, device: torch.device) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / f"{kind}-{slug_of(device)}.json"
        self.cases = read(self.file) if self.file.exists() else {}

    def add(self, name: str, case: dict[str, Any]) -> None:
        """Keep a case; one of that name is replaced."""
        self.cases[name] = case
        text = json.dumps({"schema": SCHEMA, "cases": self.cases}, indent=1)
        # A line for each list of times; else thousands of lines would hold one number each.
        text = re.sub(r"\[[^][{}]*\]", lambda found: re.sub(r"\s+", " ", found.group()), text)
        self.file.write_text(text + "\n")

    def report(self, title: str, table: Callable[[dict[str, Any]], str]) -> None:
        """Write all cases as Markdown, beside the JSON."""
        parts = [f"# {title}\n"]
        for name, case in self.cases.items():
            parts.append(f"## {name}\n\n{said(case['environment'])}\n\n{table(case)}\n")
        self.file.with_suffix(".md").write_text("\n".join(parts), encoding="utf-8")
        print(f"\nSaved {self.file.name} and the rest of that name in {self.file.parent}")

    def plot(self, labels: dict[str, str]) -> None:
        """Draw the ratios of each case's steps and calls; ``labels`` has the methods' order."""
        timed = {name: case for name, case in self.cases.items() if {"step", "call"} & set(case)}
        if not timed:
            return
        figure, axes = subplots(len(timed), 1, 8, 4)
        for axis, (name, case) in zip(axes.flat, timed.items(), strict=True):
            for kind in [kind for kind in ("step", "call") if kind in case]:
                rows = {labels[m].strip("*"): row for m, row in case[kind].items() if m in labels}
                errorbar(axis, list(rows), list(rows.values()), "x", label=f"one {kind}")
            if axis.get_xlim()[1] > 2:
                axis.set_xscale("log")
                axis.xaxis.set_major_formatter("{x:g}")
                axis.xaxis.set_minor_formatter("{x:.2g}")
            axis.axvline(1, color="black", lw=0.8)
            axis.set_title(textwrap.fill(name, 90), fontsize=9)
            axis.legend(fontsize=8, frameon=False)
            axis.invert_yaxis()
        self.save(figure, said(case["environment"]))

    def save(self, figure: Any, title: str) -> None:
        """Write a plot beside the JSON."""
        figure.suptitle(f"time / plain (median, 10-90 %). {title}", fontsize=10)
        figure.savefig(self.file.with_suffix(".png"), dpi=90)


def read(file: Path) -> dict[str, Any]:
    """The cases of a script's file; raises SystemExit if it is of another schema."""
    held = json.loads(file.read_text())
    if held.get("schema") != SCHEMA:
        raise SystemExit(
            f"{file} is of schema {held.get('schema')}, and this script writes {SCHEMA}: "
            f"move it away or delete it, so that no file holds both."
        )
    return held["cases"]


def errorbar(axis: Any, places: list[Any], rows: list[Any], ratio: str, **style: Any) -> None:
    """Ratios and their spread, on one of the axis' two directions."""
    low, middle, high = np.array([ratios(row) for row in rows]).T
    place = {"x": "y", "y": "x"}[ratio]
    values = {ratio: middle, place: places, f"{ratio}err": [middle - low, high - middle]}
    axis.errorbar(**values, marker="o", ls="", capsize=2, **style)
