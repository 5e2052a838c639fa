"""The demo's world: two flat shapes in a spatial relation, their captions and a checker.

Pictures are float32 arrays of shape ``(64, 64, 3)`` in [0, 1]; captions are sentences such as
``"a red circle left of a blue square"`` over a closed vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from scipy import ndimage

SIZE = 64
"""Width and height of a picture, in pixels."""
TOKENS = 16
"""Length of an encoded caption, in tokens, padding included."""
GROUND = (0.5, 0.5, 0.5)
COLOURS = {
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.85, 0.1),
    "blue": (0.1, 0.15, 0.9),
    "yellow": (0.95, 0.9, 0.1),
    "magenta": (0.9, 0.1, 0.85),
    "cyan": (0.1, 0.85, 0.9),
}
SHAPES = ("circle", "square", "triangle")
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Relation to the direction (x, y) from the second object to the first; y points down."""
CRITERIA = ("count", "colour", "shape", "relation", "everything")
"""What `check` judges."""
PADDING = "<pad>"
VOCABULARY = (
    PADDING,
    "a",
    *COLOURS,
    *SHAPES,
    *dict.fromkeys(word for relation in RELATIONS for word in relation.split()),
)

TEXTS = {"words": TOKENS, "padded": 64, "phrases": 4}
"""Ways to tell a caption, and their lengths in tokens: a token a word and some padding, as the
demo's model reads it; the same with much more padding; a token a phrase ("a red circle")."""
PHRASES = (
    PADDING,
    *(f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES),
    *RELATIONS,
)

_SPLIT_SEED = 0
_HELD_OUT_SCENES = 102
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


class Item(NamedTuple):
    """One object of a scene."""

    colour: str
    shape: str


class Scene(NamedTuple):
    """What a caption says: ``first`` is `relation` ``second``."""

    first: Item
    relation: str
    second: Item

    def __str__(self) -> str:
        a, b = self.first, self.second
        return f"a {a.colour} {a.shape} {self.relation} a {b.colour} {b.shape}"

    def mirrored(self) -> Scene:
        """Tell the same scene from the other object."""
        return Scene(self.second, _OPPOSITE[self.relation], self.first)


def captions(split: str) -> list[str]:
    """List the captions of one part of the fixed split.

    Every scene has two captions ("A left of B" and "B right of A"); both are in the same part,
    so that a held-out scene was never drawn in training.

    Parameters
    ----------
    split : {"train", "held-out"}

    Returns
    -------
    list of str
        1,020 captions for ``"train"``, 204 for ``"held-out"``.

    Raises
    ------
    ValueError
        If `split` is neither.
    """
    if split not in ("train", "held-out"):
        raise ValueError(f"The split must be 'train' or 'held-out', not {split!r}.")
    items = itertools.starmap(Item, itertools.product(COLOURS, SHAPES))
    scenes = [
        Scene(a, relation, b)
        for a, b in itertools.permutations(items, 2)
        for relation in ("left of", "above")
    ]
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(scenes))
    held_out = order[:_HELD_OUT_SCENES]
    chosen = held_out if split == "held-out" else order[_HELD_OUT_SCENES:]
    return [str(told) for i in sorted(chosen) for told in (scenes[i], scenes[i].mirrored())]


def parse(caption: str) -> Scene:
    """Read a caption.

    Parameters
    ----------
    caption : str
        For example ``"a red circle left of a blue square"``.

    Returns
    -------
    Scene

    Raises
    ------
    ValueError
        If the caption does not have this form, or its two objects are identical.
    """
    words = caption.lower().split()
    relation = " ".join(words[3:-3])
    if len(words) >= 7 and words[0] == words[-3] == "a" and relation in RELATIONS:
        first, second = Item(*words[1:3]), Item(*words[-2:])
        known = all(i.colour in COLOURS and i.shape in SHAPES for i in (first, second))
        if known and first != second:
            return Scene(first, relation, second)
    raise ValueError(
        f"{caption!r} is not of the form 'a COLOUR SHAPE RELATION a COLOUR SHAPE' with two "
        f"different objects, colours {', '.join(COLOURS)}, shapes {', '.join(SHAPES)} and "
        f"relations {', '.join(RELATIONS)}."
    )


def careless(caption: str, dose: float, rng: np.random.Generator, leave_out: bool = False) -> str:
    """A caption in which each colour, shape and the relation is redrawn with probability `dose`.

    A redrawn one is at times the right one. With `leave_out`, colours and shapes are left out
    instead, and the relation stays.
    """

    def redrawn(value: str, values: Iterable[str]) -> str:
        if rng.random() >= dose:
            return value
        return "" if leave_out else str(rng.choice(tuple(values)))

    first, relation, second = parse(caption)
    items = [Item(redrawn(i.colour, COLOURS), redrawn(i.shape, SHAPES)) for i in (first, second)]
    relation = relation if leave_out else redrawn(relation, RELATIONS)
    return " ".join(str(Scene(items[0], relation, items[1])).split())


def encode(caption: str, text: str = "words") -> np.ndarray:
    """Turn a text into token ids; the empty text is all padding.

    Parameters
    ----------
    caption : str
        Any words of the vocabulary, not necessarily a whole caption.
    text : str
        A key of `TEXTS`. As ``"phrases"``, a whole caption or the empty text.

    Returns
    -------
    numpy.ndarray
        int64 of shape ``(TEXTS[text],)``, indices into `VOCABULARY` or `PHRASES`, padded with 0.

    Raises
    ------
    ValueError
        If a word is not in the vocabulary, or there are more than 16 words.
    """
    words = caption.lower().split()
    known = VOCABULARY[1:]
    unknown = [word for word in words if word not in known]
    if unknown:
        raise ValueError(
            f"TACA's demo model does not know {', '.join(map(repr, unknown))}. "
            f"Its whole vocabulary is: {', '.join(known)}."
        )
    if len(words) > TOKENS:
        raise ValueError(f"The text has {len(words)} words; TACA's demo model reads {TOKENS}.")
    ids = [VOCABULARY.index(word) for word in words]
    if text == "phrases" and words:
        scene = parse(caption)
        phrases = (f"a {' '.join(scene.first)}", scene.relation, f"a {' '.join(scene.second)}")
        ids = [PHRASES.index(phrase) for phrase in phrases]
    return np.array(ids + [0] * (TEXTS[text] - len(ids)), dtype=np.int64)


def _distance(shape: str, x: np.ndarray, y: np.ndarray, half: float) -> np.ndarray:
    """Signed distance in pixels to a shape of width and height 2 * half, centred at 0."""
    if shape == "circle":
        return np.hypot(x, y) - half
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - half
    return np.maximum(y - half, (2 * abs(x) - y - half) / 5**0.5)


def render(caption: str, rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    """Draw one picture of a caption, with random sizes and places.

    Parameters
    ----------
    caption : str
    rng : numpy.random.Generator
    size : int
        Width and height in pixels; lengths below are in 64ths of it.

    Returns
    -------
    numpy.ndarray
        float32 of shape ``(size, size, 3)`` in [0, 1].
    """
    scene = parse(caption)
    picture = np.full((size, size, 3), GROUND, dtype=np.float32)
    scale = size / SIZE
    grid = (np.arange(size, dtype=np.float32) + 0.5) / scale
    direction = np.array(RELATIONS[scene.relation])
    for item, side in ((scene.first, 1), (scene.second, -1)):
        half = rng.uniform(10, 13.5)
        # Each object keeps 2 px inside its half of the picture, so the two never touch, and
        # strays at most 8 px across the relation's axis, so the relation is never in doubt.
        slack = np.where(direction != 0, SIZE / 4 - 2 - half, 8)
        centre = SIZE / 2 + side * direction * SIZE / 4 + rng.uniform(-slack, slack)
        distance = _distance(item.shape, grid - centre[0], grid[:, None] - centre[1], half)
        cover = np.clip(0.5 - scale * distance, 0, 1)[..., None]
        picture += cover * (np.array(COLOURS[item.colour], dtype=np.float32) - picture)
    return picture


class _Blob(NamedTuple):
    """A connected region of a picture: its area, and its bounding box's centre, in pixels."""

    area: int
    colour: str | None
    shape: str | None
    centre: np.ndarray


def _see(picture: np.ndarray) -> list[_Blob]:
    """Find the objects of a picture; a colour or shape in doubt is None."""
    labels, _ = ndimage.label(np.linalg.norm(picture - np.array(GROUND), axis=-1) > 0.3)
    palette = np.array(list(COLOURS.values()))
    blobs = []
    for i, (rows, columns) in enumerate(ndimage.find_objects(labels), 1):
        mask = labels[rows, columns] == i
        area = int(mask.sum())
        if area < 16:  # a speck: less than one patch of the codec
            continue
        pixels = picture[rows, columns][mask]
        nearest = np.linalg.norm(pixels[:, None] - palette, axis=-1).argmin(1)
        votes = np.bincount(nearest, minlength=len(palette)) / len(pixels)
        colour = list(COLOURS)[votes.argmax()] if votes.max() > 0.6 else None

        height, width = mask.shape
        x = (np.arange(width) + 0.5) * 2 / width - 1
        y = (np.arange(height)[:, None] + 0.5) * 2 / height - 1
        overlap = {}
        for shape in SHAPES:
            template = _distance(shape, x, y, 1.0) <= 0
            overlap[shape] = (mask & template).sum() / (mask | template).sum()
        shape = max(overlap, key=overlap.get)
        centre = np.array([columns.start + width / 2, rows.start + height / 2])
        blobs.append(_Blob(area, colour, shape if overlap[shape] > 0.75 else None, centre))
    return blobs


def check(picture: np.ndarray, caption: str) -> dict[str, bool]:
    """Judge a picture against its caption.

    The picture must show exactly two objects (connected regions); if there are more, as when
    an object is in pieces, the two largest are judged. Of the two ways to match them with the
    caption's objects, the one with more criteria right counts.

    Parameters
    ----------
    picture : numpy.ndarray
        Shape ``(64, 64, 3)``, in [0, 1]; a larger one is averaged down to that.
    caption : str

    Returns
    -------
    dict
        ``"count"`` (two objects), ``"colour"`` and ``"shape"`` (both objects'), ``"relation"``
        and ``"everything"`` (all of these) to bool. Fewer than two objects fail them all.
    """
    scene = parse(caption)
    scale = len(picture) // SIZE
    picture = picture.reshape(SIZE, scale, SIZE, scale, 3).mean((1, 3))
    blobs = _see(np.clip(picture, 0, 1))
    if len(blobs) < 2:
        return dict.fromkeys(CRITERIA, False)
    pair = sorted(blobs, key=lambda blob: blob.area)[-2:]
    results = []
    for first, second in (pair, pair[::-1]):
        offset = first.centre - second.centre
        axis = abs(offset).argmax()
        step = [0, 0]
        step[axis] = int(np.sign(offset[axis]))
        result = {
            "count": len(blobs) == 2,
            "colour": (first.colour, second.colour) == (scene.first.colour, scene.second.colour),
            "shape": (first.shape, second.shape) == (scene.first.shape, scene.second.shape),
            "relation": tuple(step) == RELATIONS[scene.relation],
        }
        results.append({**result, "everything": all(result.values())})
    return max(results, key=lambda result: sum(result.values()))
