"""Which token of a conditioning stands for which characters of its prompt."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from comfy.sd import CLIP
from torch import Tensor

from .encoding import (
    Chunks,
    TokenId,
    embeddings_in,
    encoded,
    padding_of,
    tokenized,
)
from .locator import MARK, Locator


class Token(NamedTuple):
    """A token of one encoder, and the characters of the prompt it stands for."""

    encoder: str  # as ComfyUI's tokenizer calls it
    start: int
    end: int  # as start where it stands for none, as those of a template
    is_padding: bool
    is_unknown: bool  # whether it stands for whatever its tokenizer has no token for


Table = tuple[tuple[Token, ...], ...]


@dataclass(frozen=True)
class PromptTokens:
    """A prompt, and the tokens of the conditioning that a CLIP makes of it."""

    text: str
    # For each token of the conditioning those of the encoders whose embeddings are joined in it,
    # as CLIP-L's and CLIP-G's in SD3; none where an encoder only filled up. A character without a
    # token gets one here that is unknown.
    table: Table
    # The same of what the conditioning holds beside its text, by its name there.
    beside: Mapping[str, Table] = field(default_factory=dict)

    @classmethod
    def of(cls, clip: CLIP, text: str) -> "PromptTokens":
        """The tokens of a prompt.

        Raises ValueError if the CLIP does not show its tokenizer and its encoder.
        """
        encoder: Any = getattr(clip, "cond_stage_model", None)
        if not hasattr(clip, "tokenizer") or not hasattr(encoder, "encode_token_weights"):
            raise ValueError(
                f"TACA cannot tell the tokens of this CLIP ({type(clip).__name__}): it hides its "
                f"tokenizer or encoder. Take one of ComfyUI's loaders, or leave clip and prompt "
                f"open."
            )
        frames = tokenized(clip, MARK)[1]
        chunks_of, parts = tokenized(clip, text)
        tokens: list[tuple[Token, ...]] = [(Token("", 0, 0, True, False),)]
        numbered: dict[str, Chunks] = {}
        for name, chunks in chunks_of.items():
            part, numbered[name] = parts[name], []
            strings = frames[name].offsets.strings if name in frames else []
            locator = Locator(text, next((s for s in strings if MARK in s), MARK))
            places = [locator.locate(string) for string in part.offsets.strings]
            spans_of = embeddings_in(text, part, chunks)
            for ids in ([each for each, *_ in chunk] for chunk in chunks):
                numbered[name].append([(each, len(tokens) + i) for i, each in enumerate(ids)])
                for each, is_padding in zip(ids, padding_of(ids, part), strict=True):
                    at: Sequence[int] = spans_of.get(id(each), ())
                    is_unknown, lost = False, []
                    if isinstance(each, TokenId):
                        within = places[each.string]
                        at = [i for i in within[each.start : each.end] if i is not None]
                        lost = [i for i in map(within.__getitem__, each.dropped) if i is not None]
                        is_unknown = each.is_unknown
                    span = (min(at), max(at) + 1) if at else (0, 0)
                    token = Token(name, *span, is_padding, is_unknown)
                    tokens.append((token, *(Token(name, i, i + 1, False, True) for i in lost)))
        tables = {
            name: tuple(tuple(t for n in row for t in tokens[n]) for row in rows)
            for name, rows in encoded(encoder, numbered).items()
        }
        return cls(text, tables.pop(""), tables)

    def own(self) -> tuple[float, ...]:
        """1 for each token of the prompt, its start, end and template; 0 for padding."""
        return tuple(float(any(not t.is_padding for t in tokens)) for tokens in self.table)

    def covering(self, start: int, end: int) -> list[int]:
        """The tokens of these characters; none of an encoder that does not know them all."""
        return _covering(self.table, start, end)

    def knows(self, start: int, end: int) -> bool:
        """Whether any encoder has tokens for these characters."""
        return any(_covering(each, start, end) for each in (self.table, *self.beside.values()))

    def word(self, word: str) -> list[int]:
        """The tokens of a word or phrase, wherever it stands in the prompt.

        Raises ValueError if it is not in the prompt, or the encoders have no token for it.
        """
        # Some scripts put nothing between words.
        letter = r"[^\W_\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"
        pattern = r"\s+".join(map(re.escape, word.split()))
        before = rf"(?<!{letter})" if re.match(letter, word) else ""
        behind = rf"(?!{letter})" if re.match(letter, word[-1]) else ""
        finds = re.finditer(f"{before}{pattern}{behind}", self.text)
        matches = [each for each in finds if _is_whole(self.text, *each.span())]
        if not matches:
            raise ValueError(f"TACA does not find {word!r} in the prompt: write it as it is there.")
        found = sorted({i for match in matches for i in self.covering(*match.span())})
        if not found:
            raise ValueError(
                f"TACA finds no token of {word!r}: the text encoder does not know it, or cut it "
                f"off. Choose another word."
            )
        return found


def _is_whole(text: str, start: int, end: int) -> bool:
    """Whether no accent and no joined emoji belongs to what stands here."""
    before, behind = text[start - 1 : start], text[end : end + 1]
    is_accented = unicodedata.category(behind or " ")[0] == "M" and behind != "\ufe0f"
    return not is_accented and "\u200d" not in (before, behind)


def _covering(table: Table, start: int, end: int) -> list[int]:
    found = [
        (i, token)
        for i, tokens in enumerate(table)
        for token in tokens
        if token.start < end and start < token.end
    ]
    ignorant = {token.encoder for _, token in found if token.is_unknown}
    return sorted({i for i, token in found if token.encoder not in ignorant})


def text_of(clip: CLIP, text: str) -> Tensor:
    """The tensor of a conditioning ``(b, num_text, channels)``, as CLIP Text Encode makes it."""
    return clip.encode_from_tokens(clip.tokenize(text))


def find_words(words: str, prompt: PromptTokens | None) -> Mapping[str, list[int]]:
    """The token indices of each word.

    ``words`` are like ``"red circle, blue"``, or by token index, from 0: ``"circle=2, red=4-5"``.

    Raises ValueError if a word is not in the prompt, or there is no prompt to find it in.
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
        elif prompt is None:
            raise ValueError(
                f"TACA needs clip and prompt to find {part!r}; or give its token indices: word=2-3."
            )
        else:
            found[part] = prompt.word(part)
    return found
