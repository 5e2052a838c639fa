"""Plots and labelled sheets, by Pillow: ComfyUI brings it, and nothing larger."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

INK, PAPER, GRID = "#1b1f24", "#ffffff", "#d8dee4"
COLOURS = ("#c2410c", "#1d4ed8", "#15803d", "#7e22ce", "#b45309", "#0e7490")


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font."""
    return ImageFont.load_default(size)


def to_tensor(picture: Image.Image) -> Tensor:
    """An IMAGE, ``(1, H, W, 3)`` in 0..1."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)[None]


def to_picture(image: Tensor) -> Image.Image:
    """A picture of an IMAGE's ``(H, W, 3)``."""
    return Image.fromarray(
        (image[..., :3].cpu().float().clamp(0, 1).numpy() * 255 + 0.5).astype(np.uint8)
    )


class Axes:
    """A rectangle of a picture, with data coordinates.

    Parameters
    ----------
    picture : Image
        Drawn on.
    box : tuple of int
        Left, top, right and bottom of the plotting area, in pixels.
    x, y : tuple of float
        The data at its left and right, at its bottom and top.
    """

    def __init__(self, picture: Image.Image, box: tuple[int, int, int, int],
                 x: tuple[float, float], y: tuple[float, float]) -> None:  # fmt: skip
        self.draw, self.box, self.x, self.y = ImageDraw.Draw(picture), box, x, y

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The pixel of a point."""
        left, top, right, bottom = self.box
        along = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        up = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1)
        return left + along * (right - left), bottom - up * (bottom - top)

    def frame(self, x_label: str, y_label: str, y_ticks: Sequence[float],
              x_ticks: dict[float, str]) -> None:  # fmt: skip
        """Grid, ticks and labels."""
        left, top, right, bottom = self.box
        for tick in y_ticks:
            _, at = self.at(self.x[0], tick)
            self.draw.line((left, at, right, at), fill=GRID)
            self.draw.text((left - 8, at), f"{tick:.4g}", fill=INK, font=font(13), anchor="rm")
        for tick, name in x_ticks.items():
            at, _ = self.at(tick, self.y[0])
            self.draw.text((at, bottom + 6), name, fill=INK, font=font(13), anchor="mt")
        self.draw.rectangle(self.box, outline=INK)
        self.draw.text(
            ((left + right) / 2, bottom + 26), x_label, fill=INK, font=font(14), anchor="mt"
        )
        self.draw.text((left, top - 8), y_label, fill=INK, font=font(14), anchor="lb")

    def line(self, points: Sequence[tuple[float, float]], colour: str, dots: bool = False) -> None:
        """A line through points."""
        pixels = [self.at(*point) for point in points]
        self.draw.line(pixels, fill=colour, width=2)
        if dots:
            for x, y in pixels:
                self.draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)

    def band(self, low: float, high: float, colour: str) -> None:
        """A vertical band between two x."""
        _, top, _, bottom = self.box
        self.draw.rectangle((self.at(low, 0)[0], top, self.at(high, 0)[0], bottom), fill=colour)

    def steps(self, values: Sequence[float], colour: str) -> None:
        """A line that holds the i-th value from i - 0.5 to i + 0.5, counted from 1."""
        points = [(i + at, value) for i, value in enumerate(values, 1) for at in (-0.5, 0.5)]
        self.draw.line([self.at(*point) for point in points], fill=colour, width=2)


def ticks(names: Sequence[str], most: int = 16) -> dict[float, str]:
    """Names at 1, 2, 3 ..., thinned out."""
    step = max(1, -(-len(names) // most))
    return {float(i + 1): names[i] for i in range(0, len(names), step)}


def round_up(value: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** np.floor(np.log10(max(value, 1e-9)))
    return float(next(power * m for m in (1, 2, 5, 10) if power * m >= value * (1 - 1e-9)))


def sheet(pictures: Sequence[Image.Image], labels: Sequence[str], columns: int,
          title: str = "") -> Image.Image:  # fmt: skip
    """Pictures in rows, each under its label; all in cells of the largest one's size."""
    width, height = (max(getattr(p, side) for p in pictures) for side in ("width", "height"))
    size = max(14, min(28, width // 20))
    lines = [_wrapped(label, width, size) for label in labels]
    head = (size + 4) * max(text.count("\n") + 1 for text in lines) + 8
    top, gap = (size + 20 if title else 8), 8
    rows = -(-len(pictures) // columns)
    page = Image.new(
        "RGB", (columns * (width + gap) + gap, top + rows * (height + head + gap)), PAPER
    )
    draw = ImageDraw.Draw(page)
    if title:
        draw.text((gap, 8), title, fill=INK, font=font(size + 2))
    for i, (picture, label) in enumerate(zip(pictures, lines, strict=True)):
        left = gap + i % columns * (width + gap)
        above = top + i // columns * (height + head + gap)
        draw.multiline_text((left, above), label, fill=INK, font=font(size))
        page.paste(picture, (left, above + head))
    return page


def stack(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures over each other, as wide as the widest."""
    page = Image.new(
        "RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), PAPER
    )
    above = 0
    for picture in pictures:
        page.paste(picture, (0, above))
        above += picture.height
    return page


def columns(lines: Sequence[str], width: int, rows: int = 14) -> Image.Image:
    """A table's lines, the first of which heads every column of so many rows; cells by spaces."""
    head, *body = [line.split() for line in lines]
    cell, height, size = 56, 18, 13
    count = max(1, -(-len(body) // rows))
    across = max(width, count * (len(head) + 1) * cell)
    page = Image.new("RGB", (across, (min(len(body), rows) + 2) * height), PAPER)
    draw = ImageDraw.Draw(page)
    for i in range(count):
        left = 20 + i * (len(head) + 1) * cell
        for row, cells in enumerate([head, *body[i * rows : (i + 1) * rows]]):
            for j, text in enumerate(cells):
                at = (left + (j + 1) * cell, 4 + row * height)
                draw.text(at, text, fill=INK, font=font(size), anchor="rt")
    return page


def _wrapped(text: str, width: int, size: int) -> str:
    """The text in lines of at most this many pixels."""
    measure, lines = font(size), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and measure.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def heat(values: Tensor) -> Image.Image:
    """A picture of values in 0..1, ``(H, W)``: black, red, yellow, white."""
    channels = [(3 * values.float() - i).clamp(0, 1) for i in range(3)]
    return to_picture(torch.stack(channels, -1))
