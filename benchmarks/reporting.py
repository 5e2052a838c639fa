"""Places, judged pictures and their intervals, Markdown tables, plots, and files of results."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DEMO = ROOT / "demo"
SHARED = [str(ROOT / folder) for folder in ("hosting", "demo", "demo/training")]
JUDGED = ("everything", "colour", "shape", "relation")
Judge = Callable[[], dict[str, str]]


def sha256(path: Path) -> str:
    """Of a file that may be larger than memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 24):
            digest.update(part)
    return digest.hexdigest()


def digits(judged: Sequence[dict[str, bool]]) -> dict[str, str]:
    """What the demo's checker says of pictures: by criterion, a digit each that is 1 if right."""
    return {what: "".join(str(int(one[what])) for one in judged) for what in JUDGED}


def outcomes(setting: dict[str, Any], what: str) -> np.ndarray:
    """The ``digits`` of a setting, as an array of bool."""
    return np.array([digit == "1" for digit in setting["judged"][what]])


def judge_missing(path: Path, result: dict[str, Any], wanted: list[tuple[dict, Judge]]) -> None:
    """Judge the settings that a result lacks, and store it after each."""
    known = result["settings"]
    todo = [(s, judge) for s, judge in wanted if not any(s.items() <= k.items() for k in known)]
    for number, (setting, judge) in enumerate(todo, 1):
        start = time.monotonic()
        known.append(setting | {"judged": judge()})
        store(path, result)
        right = {what: outcomes(known[-1], what).sum() for what in JUDGED}
        told = f"{setting}: {right} right, {time.monotonic() - start:.0f} s"
        print(f"{path.stem} {number}/{len(todo)} {told}", flush=True)


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean and half its 95 % interval: normal, over values that are independent of each other."""
    return float(values.mean()), float(1.96 * values.std(ddof=1) / len(values) ** 0.5)


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


def subplots(rows: int, columns: int, width: float, height: float, **options: Any) -> Any:
    """A figure for a file, and its axes, each so many inches large."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    options |= {"figsize": (width * columns, height * rows), "layout": "constrained"}
    return pyplot.subplots(rows, columns, squeeze=False, **options)
