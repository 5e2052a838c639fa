"""Clocks, memory and files of the benchmarks: interleaved rounds, ratios with their spread."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import textwrap
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"
SCHEMA = 2  # of the files in RESULTS
STEPS, STEPS_INSIDE = 30, 3
SLOW_ROUNDS = 3

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""On a CPU that is shared with other work, the process's own time says more: ``--clock cpu``."""
clock = CLOCKS["wall"]


def set_clock(name: str) -> None:
    global clock
    clock = CLOCKS[name]


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """How long one call takes."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        function()  # keeps the GPU busy while the timed call is queued, as in sampling
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    start = clock()
    function()
    return clock() - start


def interleaved(measure: Callable[[str], float], names: list[str], rounds: int, label: str,
                slow: Collection[str] = (), warm_up: bool = True,
                ) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Time every method once per round, in a new order each.

    Parameters
    ----------
    measure : callable
        Name of a method -> seconds.
    names : list of str
        ``"plain"`` among them.
    slow : collection of str
        Those that run in the first ``SLOW_ROUNDS`` rounds only.
    warm_up : bool
        Whether every method runs once before.

    Returns
    -------
    dict
        ``summary`` of each method.
    """
    times: dict[str, list[float]] = {name: [] for name in names}
    shuffle = torch.Generator().manual_seed(0)
    for name in names if warm_up else ():
        measure(name)
    for index in range(rounds):
        print(f"\r{label}: round {index + 1}/{rounds} ", end="", file=sys.stderr, flush=True)
        for i in torch.randperm(len(names), generator=shuffle).tolist():
            if names[i] not in slow or index < SLOW_ROUNDS:
                times[names[i]].append(measure(names[i]))
    print(file=sys.stderr)
    return {name: summary(own, times["plain"]) for name, own in times.items()}


def summary(own: list[float], plain: list[float]) -> dict[str, Any]:
    """Times of one method beside plain's of the same rounds: medians and 10-90 % ranges."""
    pairs = list(zip(own, plain, strict=False))
    low, ratio, high = quantiles([a / b for a, b in pairs])
    extra_low, extra, extra_high = quantiles([a - b for a, b in pairs])
    return {
        "rounds": len(own), "median_s": quantiles(own)[1],
        "ratio": ratio, "ratio_p10": low, "ratio_p90": high,
        "extra_s": extra, "extra_p10_s": extra_low, "extra_p90_s": extra_high,
        "times_s": [float(f"{each:.5g}") for each in own],
    }  # fmt: skip


def quantiles(values: list[float]) -> list[float]:
    """10 %, 50 % and 90 %."""
    return torch.tensor(values).double().quantile(torch.tensor([0.1, 0.5, 0.9]).double()).tolist()


def picture(inside: dict[str, Any], outside: dict[str, Any] | None = None) -> list[float]:
    """Ratio of a whole picture: 10 %, 50 % and 90 %.

    Parameters
    ----------
    inside : dict
        ``summary`` of a step inside the window.
    outside : dict, optional
        That of a step outside; by default as long as a plain step, for not one operation differs
        there (``tests/test_performance.py``), and a measured one only adds the machine's noise.
    """
    wanted = ("ratio_p10", "ratio", "ratio_p90")
    rest = STEPS - STEPS_INSIDE
    return [
        (STEPS_INSIDE * inside[key] + rest * (outside[key] if outside else 1)) / STEPS
        for key in wanted
    ]


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
    used = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        used += event.nbytes()
        peak = max(peak, used)
    return peak / 2**20


def free_bytes(device: torch.device) -> float:
    """Memory that is free; on a CPU asking for more ends the process, instead of raising."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    info = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s*(\d+) kB", info.read_text()) if info.exists() else None
    return 1024 * int(found.group(1)) if found else float("inf")


# Files


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


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def environment(device: torch.device, clock_name: str) -> dict[str, Any]:
    """What a result depends on."""
    return {
        "machine": machine(device),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "clock": "CUDA events" if device.type == "cuda" else clock_name,
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


class Results:
    """One script's results on one machine: a JSON of cases that later runs add to.

    Parameters
    ----------
    kind : str
        First part of the file's name.
    folder : Path
        Of the file.
    device : torch.device
        Whose machine it is.

    Raises
    ------
    SystemExit
        If the file is of another schema.
    """

    def __init__(self, kind: str, folder: Path, device: torch.device) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / f"{kind}-{slug_of(device)}.json"
        self.cases: dict[str, Any] = {}
        if self.file.exists():
            held = json.loads(self.file.read_text())
            if held.get("schema") != SCHEMA:
                raise SystemExit(
                    f"{self.file} is of schema {held.get('schema')}, and this script writes "
                    f"{SCHEMA}: move it away or delete it, so that no file holds both."
                )
            self.cases = held["cases"]

    def add(self, name: str, case: dict[str, Any]) -> None:
        """Keep a case; one of that name is replaced."""
        self.cases[name] = case
        report = {"schema": SCHEMA, "cases": self.cases}
        # A line for each list of times; else thousands of lines would hold one number each.
        text = re.sub(r"\[[^][{}]*\]", lambda found: re.sub(r"\s+", " ", found.group()),
                      json.dumps(report, indent=1))  # fmt: skip
        self.file.write_text(text + "\n")

    def write(self, text: str) -> None:
        """Keep the cases as Markdown, beside the JSON."""
        self.file.with_suffix(".md").write_text(text, encoding="utf-8")
        print(f"\nSaved {self.file.name} and the rest of that name in {self.file.parent}")


def cell(row: dict[str, Any], digits: int = 3) -> str:
    """A ratio and its spread, for a table."""
    low, middle, high = (row[key] for key in ("ratio_p10", "ratio", "ratio_p90"))
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def said(environment: dict[str, Any]) -> str:
    """An environment, in a line."""
    threads = environment["threads"]
    return (
        f"{environment['machine']}, {threads} thread{'s' * (threads > 1)}, "
        f"{environment['clock']} clock, torch {environment['torch']}, load {environment['load']}"
    )


def bars(panels: dict[str, dict[str, dict[str, Any]]], labels: dict[str, str], file: Path,
         title: str) -> None:  # fmt: skip
    """Ratios as bars with their spread, log.

    Parameters
    ----------
    panels : dict
        Title -> kind of time (the first is the darker) -> method -> ``summary``.
    labels : dict
        Of the methods, in their order.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(6 * columns, 3.8 * rows), squeeze=False)
    shades = ("#2a6f97", "#a9d6e5")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (name, kinds) in zip(axes.flat, panels.items(), strict=False):
        methods = [m for m in labels if m != "plain" and any(m in each for each in kinds.values())]
        height = 0.76 / len(kinds)
        top = 1.0
        for i, (kind, found) in enumerate(kinds.items()):
            places = [j + (i - (len(kinds) - 1) / 2) * height for j in range(len(methods))]
            for place, method in zip(places, methods, strict=True):
                if method not in found:
                    continue
                row = found[method]
                low, high = row["ratio"] - row["ratio_p10"], row["ratio_p90"] - row["ratio"]
                axis.barh(place, row["ratio"] - 1, height, left=1, xerr=[[low], [high]],
                          error_kw={"lw": 0.8, "capsize": 2}, color=shades[i],
                          label=kind if method == methods[0] else None)  # fmt: skip
                axis.annotate(f"{row['ratio']:.3f}", (max(row["ratio_p90"], 1), place), (4, 0),
                              textcoords="offset points", va="center", fontsize=8)  # fmt: skip
                top = max(top, row["ratio_p90"])
        axis.set_xscale("log")
        axis.set_xlim(0.9, max(1.3, 1.3 * top))
        ticks = [t for t in (1, 1.1, 1.2, 1.5, 2, 5, 10, 20, 50) if t <= max(1.2, 1.2 * top)]
        ticks = ticks if top < 2 else [t for t in ticks if t == int(t)]
        axis.set_xticks(ticks, [f"{t:g}×" for t in ticks])
        axis.minorticks_off()
        axis.axvline(1, color="black", lw=0.8)
        axis.set_yticks(range(len(methods)), [labels[method] for method in methods])
        axis.set_title(textwrap.fill(name, 56), fontsize=9)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
        if len(kinds) > 1:
            axis.legend(fontsize=8, frameon=False)
    figure.suptitle(f"time / plain (median, 10–90 %; log). {title}", fontsize=10)
    figure.tight_layout()
    figure.savefig(file, dpi=90)
    plt.close(figure)
