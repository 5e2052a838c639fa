"""The statistics of a search for the best setting: successive halving, and a permutation test.

A search compares settings with the first one, the baseline, on *units*: prompts or seeds on which
all settings are judged, each by one number, the larger the better. It proceeds in rounds
(successive halving: Jamieson and Talwalkar 2016, arXiv 1502.07943): after each round the better
half of the settings stays, and the next round has as many units as all rounds before it together.

One setting is left at the end. It was chosen because it looked best, so its difference to the
baseline is biased upwards, and the usual interval would be too narrow. So the whole search is
repeated on scores whose settings are shuffled within each unit. If all settings are equally good,
those searches are as likely as the real one, halving included, so the chance to find a difference
where there is none is 5 %, whatever the distribution of the scores (a permutation test). The
interval is the studentised difference, with the 95 % point of the shuffled searches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
SHUFFLED = 1999
"""Searches on shuffled settings: with the real one, 2,000."""
FIRST_UNITS = 4
"""No setting is dropped after fewer units."""
UNITS_BY_PROMPT = 6
"""From this many prompts on, the prompt is the unit: fewer could never show a difference."""

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Round:
    """The number of its settings besides the baseline, and the units that are new in it."""

    settings: int
    units: range


def rounds(settings: int, units: int) -> list[Round]:
    """The rounds of a search among this many settings, not counting the baseline."""
    halvings = math.ceil(math.log2(settings))
    while halvings and units / 2**halvings < FIRST_UNITS:
        halvings -= 1
    ends = [0, *(math.ceil(units / 2 ** (halvings - i)) for i in range(halvings + 1))]
    return [
        Round(math.ceil(settings / 2**i), range(ends[i], ends[i + 1])) for i in range(halvings + 1)
    ]


def units_of(prompts: int, seeds: int) -> list[list[tuple[int, int]]]:
    """The units of a search, each a list of pairs: the indices of a prompt and of a seed.

    From ``UNITS_BY_PROMPT`` prompts on, a unit is a prompt with all its seeds, since pictures of
    one prompt resemble each other. With fewer it is one prompt with one seed, and the result holds
    for these prompts only.
    """
    if prompts >= UNITS_BY_PROMPT:
        return [[(prompt, seed) for seed in range(seeds)] for prompt in range(prompts)]
    return [[(prompt, seed)] for seed in range(seeds) for prompt in range(prompts)]


@dataclass(frozen=True)
class Finding:
    """The setting that looked best, by its index, and its difference to the baseline.

    ``is_significant`` says whether the interval excludes 0.
    """

    best: int
    difference: float
    low: float
    high: float
    is_significant: bool

    @property
    def winner(self) -> int | None:
        """The better of the two, the best setting or the baseline; None if neither is."""
        if not self.is_significant:
            return None
        return self.best if self.difference > 0 else 0


@dataclass
class Search:
    """A search among settings 0, the baseline, to ``settings`` - 1, on ``units`` units.

    Raises ValueError if there is nothing to compare, or fewer than two units.
    """

    settings: int
    units: int
    plan: list[Round] = field(init=False)
    alive: list[int] = field(init=False)
    """The settings of the next round, the baseline first; at the end the baseline and the best."""
    differences: dict[int, tuple[float, int]] = field(default_factory=dict, init=False)
    """For each setting its mean difference to the baseline, and over how many units."""

    def __post_init__(self) -> None:
        if self.settings < 2:
            raise ValueError("a search needs two settings or more")
        if self.units < 2:
            raise ValueError("a search needs two units or more: more seeds, or more prompts")
        self.plan = rounds(self.settings - 1, self.units)
        self.alive = list(range(self.settings))
        self._blocks: list[Scores] = []

    @property
    def todo(self) -> Round | None:
        """The next round; None at the end."""
        return self.plan[len(self._blocks)] if len(self._blocks) < len(self.plan) else None

    def add(self, scores: ArrayLike) -> None:
        """The scores of the next round, ``(settings alive, its units)``.

        Raises ValueError if one of them is not a finite number.
        """
        block = np.asarray(scores, dtype=np.float64)
        if self.todo is None or block.shape != (len(self.alive), len(self.todo.units)):
            raise ValueError(f"scores of the wrong shape: {block.shape}")
        if not np.isfinite(block).all():
            raise ValueError("a score is not a finite number")
        self._blocks.append(block)
        order, total, _, units = self._halved([each[None] for each in self._blocks])
        self.differences |= {
            setting: (float(each) / units, units)
            for setting, each in zip(self.alive[1:], total[0], strict=True)
        }
        stay = self.todo.settings if self.todo else 1
        self.alive = [0, *(self.alive[1 + i] for i in order[0, :stay])]

    @property
    def ranking(self) -> list[int]:
        """The settings besides the baseline, the best first; what was dropped early comes last."""

        def place(setting: int) -> tuple[bool, int, float]:
            difference, units = self.differences[setting]
            return setting != self.alive[1], -units, -difference

        return sorted(self.differences, key=place)

    def pictures(self) -> tuple[int, int]:
        """Numbers of scores: those the search takes, and those of all settings on all units."""
        taken = sum((each.settings + 1) * len(each.units) for each in self.plan)
        return taken, self.settings * self.units

    def finding(self, shuffled: int = SHUFFLED, seed: int = 0) -> Finding:
        """The result of a search that has ended."""
        real = self._statistic([block[None] for block in self._blocks])
        statistic, mean, error = (float(each[0]) for each in real)
        random = np.random.default_rng(seed)
        sizes = np.abs(self._statistic([_shuffled(random, shuffled, b) for b in self._blocks])[0])
        limit = np.sort(sizes)[math.ceil(CONFIDENCE * (shuffled + 1)) - 1]
        is_significant = bool(abs(statistic) > limit)
        half = limit * error if error else 0.0
        if not is_significant:
            # Rounding errors must not exclude 0, and differences that are all equal do not tell how
            # much others could vary.
            half = max(half, abs(mean)) if error else math.inf
        return Finding(self.alive[1], mean, mean - half, mean + half, is_significant)

    def _statistic(self, blocks: Sequence[Scores]) -> tuple[Scores, Scores, Scores]:
        """Of the setting that each search ends with: difference / error, difference, error.

        Each is ``(searches,)``.
        """
        order, total, square, units = self._halved(blocks)
        mean, of_squares = (
            np.take_along_axis(each, order[:, :1], 1)[:, 0] / units for each in (total, square)
        )
        variance: Scores = of_squares - mean**2
        variance[variance < 1e-12 * of_squares] = 0  # rounding errors alone
        error: Scores = np.sqrt(variance / (units - 1))
        with np.errstate(divide="ignore", invalid="ignore"):
            statistic = np.where(mean == 0, 0.0, mean / error)
        return statistic.round(9), mean, error

    def _halved(self, blocks: Sequence[Scores]) -> tuple[NDArray[np.intp], Scores, Scores, int]:
        """The rounds of many searches at once.

        ``blocks`` are the scores of each round, ``(searches, settings, units)``: the baseline
        first, then the settings in the order of the round before. Returns the order after the last
        round, best first, as indices of its rows; the sums of the rows' differences to the
        baseline, and of their squares; and the number of units.
        """
        total = square = np.zeros(())
        scale = units = 0
        for block, following in zip_longest(blocks, self.plan[1 : len(blocks)]):
            difference = block[:, 1:] - block[:, :1]
            total, square = total + difference.sum(-1), square + (difference**2).sum(-1)
            units += block.shape[-1]
            # Sums that differ by rounding errors alone are equal, whatever the scores' scale.
            scale = max(scale, np.ptp(block, axis=1).max())
            order = np.argsort(-np.round(total / (scale or 1), 9), axis=1, kind="stable")
            if following:
                stay = order[:, : following.settings]
                total, square = (np.take_along_axis(each, stay, 1) for each in (total, square))
        return order, total, square, units


def _shuffled(random: np.random.Generator, searches: int, block: Scores) -> Scores:
    """A round's scores with the settings in random order, drawn anew for each unit and search."""
    order = random.random((searches, *block.shape), dtype=np.float32).argsort(axis=1)
    return np.take_along_axis(block[None], order, 1)
