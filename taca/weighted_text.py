"""Weights in the text of a prompt, by ComfyUI's own rules: ``(blue scarf:1.5)``, ``(fog:0)``."""

import re
from typing import NamedTuple

from comfy.sd import CLIP
from comfy.sd1_clip import escape_important, token_weights, unescape_important

LARGEST = 1000.0
"""The largest absolute weight: the attention's exponentials have to stay finite."""

# A number at the end of brackets, with the signs of any keyboard.
_LIKE_A_WEIGHT = re.compile(
    r"[:\uff1a](\s*[-+\u2010-\u2015\u2212\uff0b\uff0d]?\s*[\d.,\uff0c\uff0e\u066b]*\d\s*%?\s*)[)\uff09]"
)
_IN_EMBEDDING = re.compile(r"(?:^|\s)embedding:\S*$")


class WeightedText(NamedTuple):
    """A prompt without the brackets of its weights."""

    text: str  # as the text encoder takes it: a literal bracket has a backslash before it, or none
    weights: tuple[float, ...]  # of each character
    phrases: tuple[tuple[int, int, float], ...]  # start, end and weight of each with a weight
    warnings: tuple[str, ...] = ()  # about text that looks like a weight and is none


def read(clip: CLIP, text: str) -> WeightedText:
    """``parse`` for a CLIP: some, as LongCat-Image's, take a backslash before a bracket as text.

    Raises ValueError as ``parse``, and if there is no CLIP.
    """
    if clip is None:
        raise ValueError(
            "TACA: the clip input is empty, since the checkpoint holds no text encoder. Take one "
            "from Load CLIP."
        )
    parsed = parse(text)
    if "\\" not in parsed.text or clip.tokenize(r"\(") == clip.tokenize("("):
        return parsed
    return parse(text, "")


def parse(text: str, escape: str = "\\") -> WeightedText:
    """Read the weights of a prompt by ComfyUI's own rules; ``escape`` marks brackets that are text.

    Raises ValueError if a weight is not a number, or too large.
    """
    escaped, plain, phrases = escape_important(text), "", []
    weights: list[float] = []
    warnings = [
        f"TACA: {found[0]!r} is no weight and is taken as text. Write weights as in (word:1.5)."
        for found in _LIKE_A_WEIGHT.finditer(escaped)
        if not _is_weight(escaped, found)
    ]
    for segment, weight in token_weights(escaped, 1.0):
        if lone := re.search("[()].{,30}", segment):
            warnings.append(
                f"TACA: a bracket has no partner at {unescape_important(lone[0])!r}, so it and "
                f"weights behind it are text. Write \\( or \\) for a bracket that you mean."
            )
        segment = re.sub("[()]", lambda bracket: escape + bracket[0], unescape_important(segment))
        if not abs(weight) <= LARGEST:
            raise ValueError(
                f"TACA: the weight of {segment!r} must be a number between -{LARGEST:g} and "
                f"{LARGEST:g}, not {weight}."
            )
        # ComfyUI reads each piece by itself: an embedding's name ends with it, and begins a word.
        glued = _IN_EMBEDDING.search(plain) and not re.match(r",*(?:\s|$)", segment)
        if glued or (segment.startswith("embedding:") and plain and not plain[-1].isspace()):
            plain, weights = plain + " ", [*weights, 1.0]
        if weight != 1 and segment.strip():
            phrases.append((len(plain), len(plain) + len(segment), weight))
        weights += [weight] * len(segment)
        plain += segment
    return WeightedText(plain, tuple(weights), tuple(phrases), tuple(warnings))


def _is_weight(text: str, found: re.Match[str]) -> bool:
    """Whether ComfyUI reads as a weight what looks like one."""
    try:
        float(found[1])
    except ValueError:
        return False
    return found[0][0] == ":" and found[0][-1] == ")" and not text.endswith("(", 0, found.start())
