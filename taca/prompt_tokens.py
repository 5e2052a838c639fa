"""Which tokens of a conditioning are the prompt's own, and which belong to a word."""

import re
from collections.abc import Callable, Sequence

from comfy.sd import CLIP

from .families import FAMILIES

Parts = Sequence[Sequence[Sequence[int]]]


def tokens_of(clip: CLIP, prompt: str) -> list[list[list[int]]]:
    """The token ids of a prompt, in the consecutive parts of its conditioning.

    ComfyUI's own tokenizer makes them; see ``prompt_tokens`` for the form.

    Raises ValueError if the CLIP is not that of a family whose conditioning is known.
    """
    tokenized = {
        name: [token for chunk in chunks for token, *_ in chunk]
        for name, chunks in clip.tokenize(prompt).items()
    }
    for family in FAMILIES:
        names = [name for part in family.text for name in part]
        # FLUX's pooled CLIP-L is tokenized too, and has no part in the text tokens.
        if names and set(names) <= set(tokenized) <= {*names, "l"}:
            return [[tokenized[name] for name in part] for part in family.text]
    known = "; ".join(family.name for family in FAMILIES if family.text)
    raise ValueError(
        f"TACA cannot tell the tokens of this CLIP ({', '.join(tokenized)}) apart; it can for "
        f"{known}. Leave clip and prompt open."
    )


def prompt_tokens(parts: Parts) -> tuple[float, ...]:
    """1 for each token of a prompt, 0 for its padding.

    ``parts`` are the conditioning's consecutive parts: each the token ids of the encoders whose
    embeddings are concatenated along channels (CLIP-L and CLIP-G in SD3).
    """
    weights: list[float] = []
    for encoders in parts:
        length = max(len(ids) for ids in encoders)
        own = max(_without_padding(ids) for ids in encoders)
        weights += [1.0] * own + [0.0] * (length - own)
    return tuple(weights)


def find_words(
    words: str, prompt: Parts, tokenize: Callable[[str], Parts] | None
) -> dict[str, list[int]]:
    """The token indices of each word.

    ``words`` are like ``"red circle, blue"``, or by token index, from 0: ``"circle=2, red=4-5"``.
    ``prompt`` is the prompt's token ids, as for ``prompt_tokens``; ``tokenize`` turns a text into
    its own token ids in the same form.

    Raises ValueError if a word is not in the prompt, or there is no tokenizer to find it with.
    """
    found: dict[str, list[int]] = {}
    for part in filter(None, (word.strip() for word in words.split(","))):
        name, by_number, numbers = part.partition("=")
        if by_number:
            match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+))?\s*", numbers)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if last < first:
                raise ValueError(f"TACA cannot read {part!r}: write a word, word=2 or word=2-3.")
            found[name.strip()] = list(range(first, last + 1))
            continue
        if tokenize is None:
            raise ValueError(
                f"TACA needs clip and prompt to find {part!r}; or give its token indices: word=2-3."
            )
        places: list[int] = []
        offset = 0
        for encoders, own in zip(prompt, tokenize(part), strict=True):
            for ids, word in zip(encoders, own, strict=True):
                starts = range(len(ids) - len(word) + 1) if word else ()
                for start in (i for i in starts if list(ids[i : i + len(word)]) == list(word)):
                    places += range(offset + start, offset + start + len(word))
            offset += max(map(len, encoders))
        if not places:
            raise ValueError(f"TACA does not find {part!r} in the prompt: write it as it is there.")
        found[part] = sorted(set(places))
    return found


def without_ends(ids: Sequence[int]) -> list[int]:
    """A text's own tokens: without start, end and padding."""
    own = list(ids[: _without_padding(ids)])
    has_start = len(own) > 2 and own[0] > 40000  # CLIP: start and end have its highest ids
    return own[1:-1] if has_start else own[:-1]


def _without_padding(ids: Sequence[int]) -> int:
    """How many tokens come before the padding: zeros, or repetitions of the end token."""
    end = len(ids)
    while end > 1 and ids[end - 1] == ids[-1] and ids[end - 2] == ids[-1]:
        end -= 1
    return end - 1 if ids[-1] == 0 else end
