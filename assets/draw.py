"""Draw the registry's icon and banner: ``python dev.py run assets/draw.py``; the workflows' cards.

Words on the left, a picture's tokens on the right, and the attention that joins them: the brighter
a token, the more it listens to a word.
"""

from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
NIGHT, WORD, COLD, HOT = "#14181f", "#f4a261", (38, 70, 110), (120, 200, 255)
FINE = 4  # drawn this many times larger, then made smaller


def tokens(draw: ImageDraw.ImageDraw, left: float, top: float, size: float) -> None:
    """Three words, a grid of four by four tokens, and the lines between, in a square."""
    unit = size / 16
    words = [
        (left + 0.5 * unit, top + y * unit, width * unit)
        for y, width in ((4, 4.2), (7.25, 3.2), (10.5, 3.8))
    ]
    for i, (x, y, width) in enumerate(words):
        for row in range(4):
            start = (x + width, y + 0.75 * unit)
            end = (left + 8 * unit, top + (2.5 + 3 * row) * unit)
            near = abs(row - 1.5 * i) < 1
            line = (244, 162, 97) if near else (70, 66, 64)
            draw.line((*start, *end), fill=line, width=round((0.3 if near else 0.12) * unit))
    for row in range(4):
        for column in range(4):
            x, y = left + (7 + 2.25 * column) * unit, top + (1.5 + 3 * row) * unit
            heat = max(0.0, 1 - 0.28 * column - 0.12 * (row % 2))
            colour = tuple(round(c + heat * (h - c)) for c, h in zip(COLD, HOT, strict=True))
            draw.rounded_rectangle((x, y, x + 1.9 * unit, y + 2.4 * unit), 0.45 * unit, colour)
    for x, y, width in words:
        draw.rounded_rectangle((x, y, x + width, y + 1.5 * unit), 0.75 * unit, WORD)


def icon() -> Image.Image:
    """400 x 400."""
    picture = Image.new("RGB", (400 * FINE, 400 * FINE), NIGHT)
    tokens(ImageDraw.Draw(picture), 24 * FINE, 36 * FINE, 352 * FINE)
    return picture.resize((400, 400), Image.Resampling.LANCZOS)


def banner() -> Image.Image:
    """1260 x 540, the registry's 21:9."""
    picture = Image.new("RGB", (1260 * FINE, 540 * FINE), NIGHT)
    draw = ImageDraw.Draw(picture)
    tokens(draw, 760 * FINE, 90 * FINE, 400 * FINE)
    for text, y, size, colour in (
        ("TACA", 150, 150, "white"),
        ("Pictures that follow the prompt", 325, 38, WORD),
        ("FLUX.1 and SD3.5 in ComfyUI", 380, 30, "#9fb3c8"),
    ):
        font = ImageFont.load_default(size * FINE)
        draw.text((90 * FINE, y * FINE), text, fill=colour, font=font)
    return picture.resize((1260, 540), Image.Resampling.LANCZOS)


def card(model: str, deed: str) -> Image.Image:
    """What a workflow does and with which model, 512 x 512, to be read at 400 and less."""
    picture = Image.new("RGB", (512 * FINE, 512 * FINE), NIGHT)
    draw = ImageDraw.Draw(picture)
    tokens(draw, 266 * FINE, 282 * FINE, 230 * FINE)
    top = 40 * FINE
    for text, size, colour in ((model, 50, WORD), (deed[0].upper() + deed[1:], 44, "white")):
        font = ImageFont.load_default(size * FINE)
        for line in lines_of(text, lambda words: font.getlength(words) <= 448 * FINE):  # noqa: B023
            draw.text((32 * FINE, top), line, fill=colour, font=font)
            top += round(1.25 * size) * FINE
        top += 12 * FINE
    return picture.resize((512, 512), Image.Resampling.LANCZOS)


def lines_of(text: str, fits: Callable[[str], bool]) -> list[str]:
    """A text in lines that fit."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        lines[-1:] = [longer] if fits(longer) else [lines[-1], word]
    return lines


if __name__ == "__main__":
    icon().save(HERE / "icon.png", optimize=True)
    banner().save(HERE / "banner.png", optimize=True)
