"""Places, intervals, Markdown tables, and the files that hold results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DEMO = ROOT / "demo"
SHARED = [str(ROOT / folder) for folder in ("hosting", "demo", "demo/training")]


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean and half its 95 % interval: normal, over values that are independent of each other."""
    return float(values.mean()), float(1.96 * values.std(ddof=1) / len(values) ** 0.5)


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


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table."""
    first, *rest = (f"| {' | '.join(map(str, row))} |" for row in (head, *rows))
    return "\n".join([first, f"|{'---|' * len(head)}", *rest])


def write_between(page: Path, name: str, text: str) -> None:
    """Put a text between the marks of that name in a page; SystemExit without them."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    before, first, rest = page.read_text("utf-8").partition(begin)
    _, last, after = rest.partition(end)
    if not (first and last):
        raise SystemExit(f"{page.name} has no marks {begin.strip()} and {end.strip()}.")
    page.write_text(f"{before}{begin}{text}{end}{after}", "utf-8")


def store(path: Path, result: dict[str, Any]) -> None:
    """Write a result, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".new").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    path.with_suffix(".new").replace(path)


def pyplot() -> Any:
    """Matplotlib, for files."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    return plt
