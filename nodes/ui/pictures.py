"""Pictures and labelled sheets of them, drawn with Pillow, which ComfyUI requires."""

import textwrap
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

INK, PAPER = "#1b1f24", "#ffffff"
font = cache(ImageFont.load_default)
"""Pillow's default font, by size."""


def blank(width: int, height: int) -> Image.Image:
    """An empty page."""
    return Image.new("RGB", (width, height), PAPER)


def to_tensor(picture: Image.Image) -> Tensor:
    """An IMAGE, ``(1, H, W, 3)`` in 0..1."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)[None]


def to_picture(image: Tensor) -> Image.Image:
    """A picture from one image of an IMAGE, ``(H, W, channels)``."""
    pixels = in_rgb(image).cpu().float().clamp(0, 1).numpy() * 255 + 0.5
    return Image.fromarray(pixels.astype(np.uint8))


def in_rgb(image: Tensor) -> Tensor:
    """An IMAGE without transparency, and a grey one in three channels: ``(..., H, W, 3)``."""
    colours = image[..., : 3 if image.shape[-1] >= 3 else 1]
    return colours.expand(*image.shape[:-1], 3)


def require_pictures(node: str, batches: Sequence[Tensor]) -> None:
    """Raise ValueError if a node's batches of IMAGE have no pictures, or pixels without a value."""
    if not batches or not all(len(batch) for batch in batches):
        raise ValueError(f"{node} has no picture to look at: the batch is empty.")
    for i, picture in enumerate((each for batch in batches for each in batch), 1):
        if not bool(picture.isfinite().all()):
            raise ValueError(
                f"{node}: picture {i} has pixels that are no numbers (NaN), as where a model or "
                f"VAE overflows in fp16. Run that one in bf16 or fp32."
            )


def heat(values: Tensor) -> Image.Image:
    """A picture of values in 0..1, ``(H, W)``: black, red, yellow, white."""
    return to_picture(torch.stack([3 * values.float() - i for i in range(3)], -1))


def stack(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures, one below the other, as wide as the widest."""
    page = blank(max(p.width for p in pictures), sum(p.height for p in pictures))
    for i, picture in enumerate(pictures):
        page.paste(picture, (0, sum(p.height for p in pictures[:i])))
    return page


def table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> Image.Image:
    """Rows of cells under a header, in as many columns as fit into ``width`` pixels.

    A picture, since ComfyUI's new nodes do not keep the line breaks of a text.
    """
    size, gap = 14, 24
    cells = [header, *rows]
    wide = [max(font(size).getlength(row[i]) for row in cells) for i in range(len(header))]
    block = sum(wide) + gap * len(wide)
    columns = max(1, min(len(rows), int((width - gap) // block)))
    height = -(-len(rows) // columns)
    page = blank(width, (height + 2) * (size + 6))
    draw = ImageDraw.Draw(page)
    for column in range(columns):
        some = rows[column * height : (column + 1) * height]
        for line, row in enumerate([header, *some] if some else []):
            right, y = column * block, (line + 0.5) * (size + 6)
            for cell, own in zip(row, wide, strict=True):
                right += gap + own
                draw.text((right, y), cell, fill=INK, font=font(size), anchor="ra")
    return page


def sheet(
    pictures: Sequence[Image.Image], labels: Sequence[str], columns: int, title: str = ""
) -> Image.Image:
    """Pictures in rows, each below its label, in cells of the largest size."""
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    size, gap = max(14, min(28, width // 20)), 8
    labels = [textwrap.fill(label, max(8, round(width / size / 0.55))) for label in labels]
    head = (size + 4) * max(text.count("\n") + 1 for text in labels) + gap
    top, rows = (size + 20 if title else gap), -(-len(pictures) // columns)
    page = blank(columns * (width + gap) + gap, top + rows * (height + head + gap))
    draw = ImageDraw.Draw(page)
    draw.text((gap, gap), title, fill=INK, font=font(size + 2))
    for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        left = gap + i % columns * (width + gap)
        above = top + i // columns * (height + head + gap)
        draw.multiline_text((left, above), label, fill=INK, font=font(size))
        page.paste(picture, (left, above + head))
    return page
