"""Whether a search finds what is there, and nothing where nothing is.

``python dev.py run benchmarks/search.py`` repeats the search of *TACA Find Setting* many times, on
scores drawn at random and on the demo's pictures that ``suppression.py`` had judged, and writes
``results/search.json`` and the tables of ``docs/search.md``. No picture is drawn.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from reporting import RESULTS, ROOT, SHARED, markdown, outcomes, store, write_between

sys.path += SHARED

from careless import SUPPRESSED
from comfyui import parts

(search_module,) = parts("search")
RECORD = RESULTS / "search.json"
PAGE = ROOT / "docs" / "search.md"
Draw = Callable[[np.random.Generator, int, int], np.ndarray]


def normal(random: np.random.Generator, settings: int, units: int) -> np.ndarray:
    """Scores of as much spread between units as within them."""
    return random.normal(size=(1, units)) + random.normal(size=(settings, units))


def skewed(random: np.random.Generator, settings: int, units: int) -> np.ndarray:
    """Exponential scores, whose scale differs from unit to unit."""
    return np.exp(random.normal(size=(1, units))) * random.exponential(size=(settings, units))


def right_or_wrong(random: np.random.Generator, settings: int, units: int) -> np.ndarray:
    """1 or 0, with another chance in each unit."""
    return (random.random((settings, units)) < random.random((1, units))).astype(float)


SCORES: dict[str, Draw] = {"normal": normal, "skewed": skewed, "right or wrong": right_or_wrong}
KINDS = (
    ("normal", 9, 48),
    ("skewed", 9, 48),
    ("right or wrong", 9, 48),
    ("normal", 2, 24),
    ("normal", 5, 16),
)
"""Scores, settings with the baseline, and units."""


def searched(scores: np.ndarray, seed: int = 0) -> tuple[Any, Any]:
    """A search, and its finding, where ``(settings, units)`` is what it would see."""
    search = search_module.Search(*scores.shape)
    while search.todo:
        search.add(scores[np.ix_(search.alive, search.todo.units)])
    return search, search.finding(seed=seed)


def nothing(count: int, settings: int, units: int, draw: Draw) -> float:
    """Share of searches among settings that are all the same that tell two apart."""
    random = np.random.default_rng(0)
    found = [searched(draw(random, settings, units), i)[1] for i in range(count)]
    return sum(each.winner is not None for each in found) / count


def covered(count: int, settings: int, units: int, effect: float) -> float:
    """Share of intervals that hold the true difference, where one setting is better by so much."""
    random = np.random.default_rng(1)
    truth = np.zeros(settings)
    truth[1] = effect
    inside = 0.0
    for i in range(count):
        found = searched(normal(random, settings, units) + truth[:, None], i)[1]
        inside += float(found.low <= truth[found.best] <= found.high)
    return inside / count


def recorded() -> tuple[list[str], np.ndarray]:
    """The whole grid on the suppressed model at CFG 3: labels and ``(settings, seeds, captions)``.

    1 is a picture that shows all that its caption says.
    """
    result = json.loads((RESULTS / "suppression.json").read_text("utf-8"))
    own = [s for s in result["settings"] if (s["model"], s["cfg"]) == (SUPPRESSED, 3)]
    own.sort(key=lambda s: (s["gamma"] != 1, s["gamma"], s["window"]))
    labels = [f"gamma {s['gamma']:g}, {s['window']}" for s in own]
    return labels, np.stack([outcomes(s, "everything").reshape(3, -1) for s in own]).astype(float)


def replayed(count: int, units: int, scores: np.ndarray) -> dict[str, Any]:
    """Searches on some of the recorded captions, beside the whole grid on the same ones."""
    random = np.random.default_rng(2)
    whole = scores.mean((1, 2))
    chosen, of_grid, told = [], [], 0
    for i in range(count):
        captions = random.permutation(scores.shape[2])[:units]
        some = scores[:, random.integers(scores.shape[1]), captions]
        search, found = searched(some, i)
        chosen.append(found.best)
        of_grid.append(1 + int(some[1:].mean(1).argmax()))
        told += found.winner == found.best
    taken, all_ = search.pictures()
    return {
        "units": units,
        "searches": count,
        "pictures": taken,
        "grid": all_,
        "same as grid": float(np.mean(np.equal(chosen, of_grid))),
        "told apart": told / count,
        "gain": 100 * float(np.mean(whole[chosen]) - whole[0]),
        "gain of grid": 100 * float(np.mean(whole[of_grid]) - whole[0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=5000, help="searches where nothing is")
    parser.add_argument("--others", type=int, default=1000, help="searches of each other kind")
    parser.add_argument("--table", action="store_true", help="of the results there are")
    options = parser.parse_args()
    if not options.table:
        result: dict[str, Any] = {"nothing": [], "covered": []}
        for name, settings, units in KINDS:
            share = nothing(options.count, settings, units, SCORES[name])
            about = {"scores": name, "settings": settings, "units": units, "share": share}
            about["searches"] = options.count
            result["nothing"].append(about)
            print(about, flush=True)
        for effect in (0.0, 0.3, 0.6, 1.0):
            share = covered(options.others, 9, 48, effect)
            about = {"effect": effect, "share": share, "searches": options.others}
            result["covered"].append(about)
            print(result["covered"][-1], flush=True)
        labels, scores = recorded()
        result["settings"] = labels
        result["replayed"] = [replayed(options.others, n, scores) for n in (24, 48, 96, 192)]
        store(RECORD, result)
    result = json.loads(RECORD.read_text("utf-8"))
    rows = [
        (r["scores"], r["settings"], r["units"], r["searches"], f"{100 * r['share']:.1f} %")
        for r in result["nothing"]
    ]
    first = markdown(("scores", "settings", "units", "searches", "a winner"), rows)
    rows = [
        (f"{r['effect']:g}", r["searches"], f"{100 * r['share']:.1f} %") for r in result["covered"]
    ]
    second = markdown(
        ("true difference, in spreads of a picture", "searches", "inside the interval"), rows
    )
    rows = [
        (
            r["units"],
            r["searches"],
            r["pictures"],
            f"{r['grid']} ({100 * r['pictures'] / r['grid']:.0f} %)",
            f"{100 * r['same as grid']:.0f} %",
            f"{100 * r['told apart']:.0f} %",
            f"{r['gain']:+.1f}",
            f"{r['gain of grid']:+.1f}",
        )
        for r in result["replayed"]
    ]
    head = ("captions", "searches", "pictures of a search", "of the whole grid", "the grid's best")
    third = markdown((*head, "told apart", "points gained", "by the grid's best"), rows)
    for name, text in (("nothing", first), ("covered", second), ("replayed", third)):
        write_between(PAGE, name, f"\n{text}\n\n")


if __name__ == "__main__":
    main()
