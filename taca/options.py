"""Where else TACA may be limited: to the positive prompt, to some blocks, to the prompt's tokens.

All off by default, for the paper has none of it. They limit gamma and not the LoRA.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Options:
    """Limits of gamma.

    Parameters
    ----------
    positive_only : bool
        Whether the negative prompt's half of CFG stays plain.
    blocks : str
        Ranges of blocks such as ``"double 0-9, single 0-18"``; empty for all.
    prompt : tuple of float, optional
        For each text token of the positive conditioning, how much of gamma - 1 it gets: 0 for
        padding, 1 for the prompt's own.
    """

    positive_only: bool = False
    blocks: str = ""
    prompt: tuple[float, ...] | None = None

    def gamma_of_rows(self, gamma: Tensor, cond_or_uncond: Sequence[int], text: int) -> Tensor:
        """Gamma for each row of a call, or for each row and text token.

        Parameters
        ----------
        gamma : Tensor
            ``(B,)``, from the schedule.
        cond_or_uncond : sequence of int
            The call's chunks, of B / chunks rows each: 0 positive, 1 negative.
        text : int
            Text tokens of this call's conditioning.

        Returns
        -------
        Tensor
            ``(B,)`` or ``(B, text)``.

        Raises
        ------
        ValueError
            If the positive conditioning has other tokens than the prompt.
        """
        if not self.positive_only and self.prompt is None:
            return gamma
        chunks = list(cond_or_uncond) or [0]
        positive = torch.tensor(
            [chunk == 0 for chunk in chunks for _ in range(len(gamma) // len(chunks))],
            device=gamma.device,
        )
        if self.positive_only:
            gamma = gamma.where(positive, 1.0)
        if self.prompt is None or not bool(positive.any()):
            return gamma
        if len(self.prompt) != text:
            raise ValueError(
                f"TACA Options: the positive conditioning has {text} text tokens, the prompt given "
                f"to TACA Options {len(self.prompt)}. Give it the same prompt and CLIP; joined "
                f"conditionings and image prompts (Redux) cannot be told apart."
            )
        weights = torch.tensor(self.prompt, device=gamma.device)
        weights = weights.where(positive[:, None], 1.0)
        return torch.lerp(torch.ones_like(weights), gamma[:, None].expand_as(weights), weights)


NO_OPTIONS = Options()
"""The paper's: no limits."""


def parse_blocks(text: str, has: dict[str, int]) -> set[tuple[str, int]]:
    """The blocks that a line of text names.

    Parameters
    ----------
    text : str
        ``"double 0-9, single 0-18"``, ``"single"`` or ``"joint 3"``; empty for all.
    has : dict
        The model's lists of blocks and their lengths, by name, ``{"double_blocks": 19}``.

    Returns
    -------
    set
        Of (name of the list, index).

    Raises
    ------
    ValueError
        If it is no such line, or the model has no such blocks; says what the model has.
    """
    if not text.strip():
        return {(name, i) for name, count in has.items() for i in range(count)}
    known = ", ".join(f"{short(name)} 0-{count - 1}" for name, count in has.items() if count)
    chosen = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([a-z_]+)\s*(?:(\d+)\s*(?:-\s*(\d+))?)?\s*", part.lower())
        if not match:
            raise ValueError(
                f"TACA Options cannot read the blocks {part.strip()!r}. Write them like this: "
                f"'double 0-9, single 0-18'. This model has {known}."
            )
        word, first, last = match.groups()
        name = next((n for n in has if word in (n, short(n))), None)
        if name is None:
            raise ValueError(f"TACA Options: this model has no {word!r} blocks; it has {known}.")
        low = int(first) if first else 0
        high = int(last) if last else low if first else has[name] - 1
        if not low <= high < has[name]:
            raise ValueError(
                f"TACA Options: {part.strip()!r} is not within this model's blocks, {known}. "
                f"(A cache that puts all blocks into one leaves no choice of blocks.)"
            )
        chosen |= {(name, i) for i in range(low, high + 1)}
    return chosen


def short(name: str) -> str:
    """``double`` for ``double_blocks``, ``layers`` for ``language_model.layers``."""
    return name.rpartition(".")[2].partition("_")[0]


def prompt_tokens(parts: Sequence[Sequence[Sequence[int]]]) -> tuple[float, ...]:
    """1 for each token of a prompt, 0 for its padding.

    Parameters
    ----------
    parts : sequence
        Of the conditioning's consecutive parts, each the token ids of the encoders whose outputs
        lie over each other in it (CLIP-L and -G in SD3).
    """
    weights: list[float] = []
    for encoders in parts:
        length = max(len(ids) for ids in encoders)
        own = max(_without_padding(ids) for ids in encoders)
        weights += [1.0] * own + [0.0] * (length - own)
    return tuple(weights)


def find_words(words: str, prompt: Sequence[Sequence[Sequence[int]]],
               tokenize: Callable[[str], Sequence[Sequence[Sequence[int]]]] | None,
               ) -> dict[str, list[int]]:  # fmt: skip
    """The numbers of the text tokens of words.

    Parameters
    ----------
    words : str
        ``"red circle, blue"``; or by number, from 0: ``"circle=2, red=4-5"``.
    prompt : sequence
        The prompt's token ids, as for ``prompt_tokens``.
    tokenize : callable, optional
        Text -> token ids in the same form, without padding.

    Raises
    ------
    ValueError
        If a word is not in the prompt, or there is no tokenizer to find it with.
    """
    found: dict[str, list[int]] = {}
    for part in filter(None, (word.strip() for word in words.split(","))):
        name, by_number, numbers = part.partition("=")
        if by_number:
            match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+))?\s*", numbers)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if last < first:
                raise ValueError(
                    f"TACA cannot read {part!r}: write a word, or word=2, or word=2-3."
                )
            found[name.strip()] = list(range(first, last + 1))
            continue
        if tokenize is None:
            raise ValueError(
                f"TACA needs clip and prompt to find the word {part!r}; or give the numbers of its "
                f"text tokens: word=2 or word=2-3."
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
    has_start = len(own) > 2 and own[0] > 40000  # CLIP's start and end are its highest numbers
    return own[1:-1] if has_start else own[:-1]


def _without_padding(ids: Sequence[int]) -> int:
    """How many tokens come before the padding: zeros, or repetitions of the end token."""
    end = len(ids)
    while end > 1 and ids[end - 1] == ids[-1] and ids[end - 2] == ids[-1]:
        end -= 1
    return end - 1 if ids[-1] == 0 else end
