"""What the demo shows: labelled sheets of pictures and the plot of gamma."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

RIGHT, WRONG = "#1a7f37", "#cf222e"
Row = Sequence[tuple[Image.Image, bool]]
"""Pictures, and whether each shows what its caption says."""


def side_by_side(pictures: dict[str, Image.Image], title: str) -> Image.Image:
    """The pictures in a row, each under its label."""
    width, height = next(iter(pictures.values())).size
    page = Image.new("RGB", (len(pictures) * (width + 16) + 16, height + 76), "white")
    draw = ImageDraw.Draw(page)
    draw.text((16, 8), title, fill="black", font_size=18)
    for i, (label, picture) in enumerate(pictures.items()):
        left = 16 + i * (width + 16)
        draw.text((left, 36), label, fill="black", font_size=16)
        page.paste(picture, (left, 60))
    return page


def marked(captions: Sequence[str], rows: dict[str, Row], columns: int = 6) -> Image.Image:
    """Captions with their pictures below, a labelled row each way, marked right or wrong."""
    side, gap, head, foot, margin = 176, 14, 66, 24, 130
    band = head + len(rows) * (side + foot) + gap
    bands = -(-len(captions) // columns)
    shown = min(columns, len(captions))
    page = Image.new("RGB", (margin + shown * (side + gap), bands * band + gap), "white")
    draw = ImageDraw.Draw(page)
    for i, caption in enumerate(captions):
        left, top = margin + i % columns * (side + gap), gap + i // columns * band
        text = textwrap.fill(caption, 22)
        draw.multiline_text((left, top + head - 8), text, fill="black", font_size=16, anchor="ld")
        for j, (label, row) in enumerate(rows.items()):
            above = top + head + j * (side + foot)
            picture, is_right = row[i]
            colour = RIGHT if is_right else WRONG
            page.paste(picture.resize((side, side), Image.Resampling.NEAREST), (left, above))
            draw.rectangle((left, above, left + side - 1, above + side - 1), None, colour, 5)
            mark = "right" if is_right else "wrong"
            draw.text((left + side / 2, above + side + 3), mark, colour, font_size=15, anchor="mt")
            if i % columns == 0:
                draw.text(
                    (margin - 14, above + side / 2), label, "black", font_size=17, anchor="rm"
                )
    return page


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures over each other."""
    width = max(picture.width for picture in pictures)
    page = Image.new("RGB", (width, sum(picture.height for picture in pictures)), "white")
    for i, picture in enumerate(pictures):
        page.paste(picture, (0, sum(above.height for above in pictures[:i])))
    return page


def plot_gamma(path: Path, sigma: list[float], inside: int, gamma: float, threshold: float) -> None:
    """Plot gamma and sigma over the steps, of which the first few are inside the window."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
    steps = range(1, len(sigma) + 1)
    values = [gamma if i < inside else 1.0 for i in range(len(sigma))]
    axis.step(steps, values, where="mid", color="tab:red", label="γ")
    axis.set(xlabel="step", ylabel="γ", title=f"γ = {gamma:g} at t ≥ {threshold:g}")
    other = axis.twinx()
    other.plot(steps, sigma, "o-", markersize=3, color="tab:gray", label="σ")
    other.set(ylabel="σ", ylim=(0, 1.05))
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=120)
