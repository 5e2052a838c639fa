"""A table of probabilities: the questions, and a shaded number for each picture."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageColor, ImageDraw

from .pictures import INK, PAPER, blank, font, stack
from .plots import COLOURS, GRID

SIZE, LINE, GAP, CELL = 14, 20, 12, 58
QUESTION = 380  # pixels for a question, some 50 letters
COLUMNS = 8  # pictures side by side; more of them go into further tables below
MEAN = "geometric mean"


@dataclass
class Graded:
    """The grades of one text: its rows, and a column for each picture, the mean last."""

    text: str
    rows: Sequence[str]
    names: list[str] = field(default_factory=list)
    columns: list[list[float]] = field(default_factory=list)

    def add(self, name: str, grades: Sequence[float], mean: float) -> None:
        self.names.append(name)
        self.columns.append([*grades, mean])


def page_of(tables: Sequence[Graded], note: str) -> Image.Image:
    """All tables, one below the other, and a note."""
    most = min(COLUMNS, max(len(table.columns) for table in tables))
    width = max(QUESTION + most * CELL, 620) + 2 * GAP
    parts = []
    for table in tables:
        parts.append(_text(table.text, width))
        parts += [_block(table, i, width) for i in range(0, len(table.columns), COLUMNS)]
    return stack([*parts, _text(note, width)])


def _text(text: str, width: int) -> Image.Image:
    lines = textwrap.wrap(text, round((width - 2 * GAP) / SIZE / 0.55))
    page = blank(width, len(lines) * LINE + GAP)
    ImageDraw.Draw(page).multiline_text(
        (GAP, GAP), "\n".join(lines), fill=INK, font=font(SIZE), spacing=LINE - SIZE
    )
    return page


def _block(table: Graded, start: int, width: int) -> Image.Image:
    """The columns from ``start`` on, numbered if there are several, with their names below."""
    columns = table.columns[start : start + COLUMNS]
    numbers = [str(start + i + 1) if len(table.columns) > 1 else "" for i in range(len(columns))]
    named = [f"{n}  {table.names[start + i]}".strip() for i, n in enumerate(numbers)]
    legend = [n for n in named if n and not n.isdigit()]
    questions = [
        textwrap.wrap(row, round(QUESTION / SIZE / 0.55)) or [""] for row in [*table.rows, MEAN]
    ]
    head = LINE if numbers[0] else 0
    height = head + sum(len(some) * LINE for some in questions) + len(legend) * LINE + 2 * GAP
    page = blank(width, height)
    draw = ImageDraw.Draw(page)
    lefts = [GAP + QUESTION + i * CELL for i in range(len(columns))]
    for left, number in zip(lefts, numbers, strict=True):
        draw.text((left + CELL / 2, GAP / 2), number, fill=INK, font=font(SIZE), anchor="ma")
    top = GAP / 2 + head
    for i, some in enumerate(questions):
        bottom = top + len(some) * LINE
        if i == len(table.rows):
            draw.line((GAP, top, lefts[-1] + CELL, top), fill=INK)
        draw.multiline_text(
            (GAP, top + 2), "\n".join(some), fill=INK, font=font(SIZE), spacing=LINE - SIZE
        )
        for left, column in zip(lefts, columns, strict=True):
            draw.rectangle((left, top + 1, left + CELL - 2, bottom - 1), fill=shade(column[i]))
            at = left + CELL / 2 - 1, (top + bottom) / 2
            draw.text(at, f"{column[i]:.2f}", fill=INK, font=font(SIZE), anchor="mm")
        top = bottom
    draw.line((GAP, top, lefts[-1] + CELL, top), fill=GRID)
    for i, line in enumerate(legend):
        draw.text((GAP, top + GAP / 2 + i * LINE), line, fill=INK, font=font(SIZE))
    return page


def shade(grade: float) -> tuple[int, int, int]:
    """Orange at 0, white at a half, blue at 1; ink is legible on all of them."""
    paper = ImageColor.getrgb(PAPER)
    colour = ImageColor.getrgb(COLOURS[grade > 0.5])
    share = 0.45 * abs(2 * grade - 1)
    red, green, blue = (
        round(share * c + (1 - share) * p) for c, p in zip(colour[:3], paper[:3], strict=True)
    )
    return red, green, blue
