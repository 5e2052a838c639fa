"""What a search found: in words, as intervals, and as one sheet with its pictures."""

import math
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw

from ...taca.search import Finding, Search
from . import pictures
from .plots import COLOURS, Axes, round_up

WIDTH = 1200
ROW = 26
LEFT, RIGHT = 440, 960
"""The plot's edges in pixels, between the settings' names and the numbers."""


def verdict(found: Finding, labels: Sequence[str]) -> str:
    """Whether there is a better setting, in a sentence or two."""
    best, first = labels[found.best], labels[0]
    known = math.isfinite(found.high)
    interval = f"95 % interval {found.low:+.3g} to {found.high:+.3g}"
    by = f"{found.difference:+.3g} ({interval if known else 'too few pictures for an interval'})"
    if found.winner is None:
        return f"No difference found. The best of the others, {best}, is {by} beside {first}."
    if found.winner == 0:
        return f"{first} is better than the best of the others: {best} is {by}."
    return f"{best} is better than {first}: {by}."


def cost(drawn: int, whole: int) -> str:
    """A sentence on how many pictures a search took, and how many a full comparison would."""
    return f"{drawn} pictures drawn; every setting on every seed and prompt would be {whole}."


def intervals(found: Finding, search: Search, labels: Sequence[str], unit: str) -> Image.Image:
    """A plot of the settings' differences to the first, best first; for the best, its interval."""
    order = search.ranking
    ends = [each for each in (found.low, found.high) if math.isfinite(each)]
    values = [0.0, *ends, *(difference for difference, _ in search.differences.values())]
    reach = round_up(max(map(abs, values)))
    low, high = min(0.0, *values), max(0.0, *values)
    margin = 0.05 * (high - low) or reach
    page = pictures.blank(WIDTH, 70 + ROW * len(order))
    bottom = 30 + ROW * len(order)
    axes = Axes(
        page, (LEFT, 30, RIGHT, bottom), (low - margin, high + margin), (len(order) + 0.5, 0.5)
    )
    marks = [mark for mark in (-reach, -reach / 2, 0.0, reach / 2, reach) if low <= mark <= high]
    axes.frame("difference in score", "", [], {mark: f"{mark:+.3g}" for mark in marks})
    zero = axes.at(0, 0)[0]
    axes.draw.line((zero, 30, zero, bottom), fill=pictures.INK)
    axes.text((LEFT - 8, 22), f"beside {labels[0]}", "rb")
    axes.text((RIGHT + 8, 22), "difference, over", "lb")
    for row, setting in enumerate(order, 1):
        difference, units = search.differences[setting]
        colour = COLOURS[setting != found.best]
        if setting == found.best:
            axes.line([(end, row) for end in ends], colour)
        axes.line([(difference, row)] * 2, colour, dots=True)
        y = axes.at(0, row)[1]
        axes.text((LEFT - 8, y), textwrap.shorten(labels[setting], 60), "rm")
        axes.text((RIGHT + 8, y), f"{difference:+.3g}, {units} {unit}", "lm")
    return page


def sheet(
    text: str, chart: Image.Image, shown: Sequence[tuple[Image.Image, str]], columns: int
) -> Image.Image:
    """Text, intervals and pictures with their labels on one page."""
    lines = [line for part in text.splitlines() for line in textwrap.wrap(part, 135)]
    head = pictures.blank(WIDTH, 20 + 22 * len(lines))
    ImageDraw.Draw(head).multiline_text(
        (12, 10), "\n".join(lines), fill=pictures.INK, font=pictures.font(17), spacing=5
    )
    if not shown:
        return pictures.stack([head, chart])
    for picture, _ in shown:
        picture.thumbnail((WIDTH // 3 - 8, WIDTH))
    images, labels = [picture for picture, _ in shown], [label for _, label in shown]
    return pictures.stack([head, chart, pictures.sheet(images, labels, columns)])
