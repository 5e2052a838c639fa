"""Plots, drawn with Pillow."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

from .pictures import INK, font

GRID = "#d8dee4"
COLOURS = "#c2410c", "#1d4ed8"


class Axes:
    """A rectangle of a picture, with data coordinates.

    ``box`` is the left, top, right and bottom of the plotting area in pixels; x and y are the data
    at its left and right, and at its bottom and top.
    """

    def __init__(
        self,
        picture: Image.Image,
        box: tuple[int, int, int, int],
        x: tuple[float, float],
        y: tuple[float, float],
    ) -> None:
        self.draw, self.box, self.x, self.y = ImageDraw.Draw(picture), box, x, y

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The pixel of a point."""
        left, top, right, bottom = self.box
        along = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        up = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1)
        return left + along * (right - left), bottom - up * (bottom - top)

    def text(self, at: tuple[float, float], text: str, anchor: str, size: int = 14) -> None:
        self.draw.text(at, text, fill=INK, font=font(size), anchor=anchor)

    def frame(
        self, x_label: str, y_label: str, y_ticks: Sequence[float], x_ticks: dict[float, str]
    ) -> None:
        """Grid, ticks and labels."""
        left, top, right, bottom = self.box
        for tick in y_ticks:
            _, at = self.at(self.x[0], tick)
            self.draw.line((left, at, right, at), fill=GRID)
            self.text((left - 8, at), f"{tick:.4g}", "rm", 13)
        for tick, name in x_ticks.items():
            self.text((self.at(tick, self.y[0])[0], bottom + 6), name, "mt", 13)
        self.draw.rectangle(self.box, outline=INK)
        self.text(((left + right) / 2, bottom + 26), x_label, "mt")
        self.text((left, top - 8), y_label, "lb")

    def line(self, points: Sequence[tuple[float, float]], colour: str, dots: bool = False) -> None:
        """A line through points."""
        pixels = [self.at(*point) for point in points]
        self.draw.line(pixels, fill=colour, width=2)
        for x, y in pixels if dots else ():
            self.draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)

    def band(self, low: float, high: float, colour: str) -> None:
        """A vertical band from x = ``low`` to ``high``."""
        _, top, _, bottom = self.box
        self.draw.rectangle((self.at(low, 0)[0], top, self.at(high, 0)[0], bottom), fill=colour)

    def steps(self, values: Sequence[float], colour: str) -> None:
        """A step function with the i-th value from i - 0.5 to i + 0.5, i from 1."""
        self.line([(i + at, v) for i, v in enumerate(values, 1) for at in (-0.5, 0.5)], colour)


def ticks(names: Sequence[str], most: int = 16) -> dict[float, str]:
    """Names at 1, 2, 3 ..., thinned out to at most ``most``."""
    step = max(1, -(-len(names) // most))
    return {float(i + 1): names[i] for i in range(0, len(names), step)}


def round_up(value: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(max(value, 1e-9)))
    return next(power * m for m in (1, 2, 5, 10) if power * m >= value * (1 - 1e-9))
