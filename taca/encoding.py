"""ComfyUI's own tokenizers and encoders, run on a prompt to see which token goes where.

The tokenizers' ids keep the characters they stand for. The encoders get token numbers in place of
embeddings, so that their own code shows what is joined, padded and cut off.
"""

import copy
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import comfy.model_management
import torch
from comfy.sd1_clip import SDTokenizer
from torch import Tensor, nn

Chunks = list[list[Any]]
"""A tokenizer's output: chunks of ``(id, weight, ...)``; in place of an id can be an embedding."""

WHOLE = {"skip_special_tokens": False}


class TokenId(int):
    """A token id, with the range of characters of its string that it stands for."""

    string: int  # index of the string among those that its tokenizer was given
    start: int
    end: int
    is_unknown: bool
    dropped: list[int]  # characters in it, or next to it, that have no token


class OffsetTokenizer:
    """The tokenizer inside one of ComfyUI's, whose ids are ``TokenId`` with character offsets."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.strings: list[str] = []
        self.ids: list[TokenId] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[TokenId]]:
        ids = list(self.tokenizer(text, **kwargs)["input_ids"])
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        spans, dropped = self._spans(text, ids, kwargs)
        return {"input_ids": self.recorded(text, ids, spans, unknown, dropped)}

    def encode(self, text: str, **kwargs: Any) -> list[TokenId]:
        """Like SentencePiece's processor, inside core's SPieceTokenizer."""
        ids = list(self.tokenizer.encode(text, **kwargs))
        alone = {"add_bos": False, "add_eos": False}
        try:
            told = self.tokenizer.encode(text, out_type="offset_mapping", **alone)
            own, offsets = told["ids"], list(told["offsets"])
        except ValueError:  # before SentencePiece 0.2.3
            pieces = self.tokenizer.encode(text, out_type="immutable_proto", **alone).pieces
            own = [piece.id for piece in pieces]
            offsets = [(piece.begin, piece.end) for piece in pieces]
        for i in reversed(range(len(own) - 1)):  # only a character's last byte has its offsets
            if self.tokenizer.is_byte(own[i]) and offsets[i][0] == offsets[i][1]:
                offsets[i] = offsets[i + 1]
        return self.recorded(text, ids, _within(ids, own, offsets), self.tokenizer.unk_id())

    def recorded(
        self,
        text: str,
        ids: list[int],
        spans: Sequence[tuple[int, int]],
        unknown: int | None,
        dropped: Sequence[int] = (),
    ) -> list[TokenId]:
        self.ids = []
        for each, (start, end) in zip(ids, spans, strict=True):
            token = TokenId(each)
            token.string, token.start, token.end = len(self.strings), start, end
            token.is_unknown, token.dropped = each == unknown, []
            self.ids.append(token)
        own = [token for token in self.ids if token.start < token.end]
        for i in dropped if own else ():
            next((token for token in own if token.end > i), own[-1]).dropped.append(i)
        self.strings.append(text)
        return self.ids

    def _spans(
        self, text: str, ids: list[int], kwargs: Any
    ) -> tuple[Sequence[tuple[int, int]], Sequence[int]]:
        """The characters of each id, and those that have none."""
        written = [i for i, c in enumerate(text) if not c.isspace()]
        # Without accents, joiners and the like, which normalisers join to others or take out.
        plain = [i for i in written if unicodedata.category(text[i])[0] not in "CM"]
        told: Sequence[tuple[int, int]] = [(0, 0)] * len(ids)
        if getattr(self.tokenizer, "is_fast", False):
            told = self.tokenizer(text, return_offsets_mapping=True, **kwargs)["offset_mapping"]
            if {*plain} <= {i for span in told for i in range(*span)}:
                return told, ()
        # It gives no offsets, or wrong ones, as transformers 5 does for HunyuanVideo's: decode.
        tries: tuple[list[int], ...]
        try:
            tries = (list(self.tokenizer(text, add_special_tokens=False)["input_ids"]),)
        except TypeError:  # a tokenizer of core's own, which may begin with a token of its own
            tries = (ids, ids[1:])
        for own in tries:
            decoded = (self.tokenizer.decode(own[:i], **WHOLE) for i in range(len(own) + 1))
            parts = ["".join(part.split()) for part in decoded]
            # It may drop characters that it does not know, as HunyuanVideo's does then.
            known = {*parts[-1].lower()}
            kept = [i for i in written if {*text[i].lower()} <= known]
            if parts[-1].lower() == "".join(text[i] for i in kept).lower():
                break
        else:
            return told, ()
        ends = [len(part.rstrip("\ufffd")) for part in parts]
        silent = {i for i, each in enumerate(own) if not self.tokenizer.decode([each], **WHOLE)}
        spans = [(0, 0)] * (len(own) + 1)
        for i in reversed(range(len(own))):
            if ends[i + 1] > ends[i]:
                spans[i] = kept[ends[i]], kept[ends[i + 1] - 1] + 1
            elif parts[i + 1].endswith("\ufffd") or i in silent:  # a character's first bytes
                spans[i] = spans[i + 1]
        return _within(ids, own, spans), sorted({*plain} - {*kept})


def _within(ids: list[int], own: list[int], spans: Sequence[tuple[int, int]]) -> list[Any]:
    """Spans for all ids, from those of the text's own ids; start and end tokens get (0, 0)."""
    start = int(ids[:1] != own[:1])
    return [*[(0, 0)] * start, *spans[: len(own)], *[(0, 0)] * len(ids)][: len(ids)]


def tokenized(clip: Any, text: str) -> tuple[dict[str, Chunks], dict[str, SDTokenizer]]:
    """A CLIP's tokens of a text, by encoder; and its tokenizers, which recorded the offsets."""
    frame = copy.copy(clip.tokenizer)
    within = {"": frame} if isinstance(frame, SDTokenizer) else vars(frame)
    parts = {name: copy.copy(p) for name, p in within.items() if isinstance(p, SDTokenizer)}
    for name, part in parts.items():
        inner = part.tokenizer
        if hasattr(getattr(inner, "tokenizer", None), "encode_as_ids"):
            part.tokenizer = copy.copy(inner)
            part.tokenizer.tokenizer = part.offsets = OffsetTokenizer(inner.tokenizer)
        else:
            part.tokenizer = part.offsets = OffsetTokenizer(inner)
        if name:
            setattr(frame, name, part)
    asked = copy.copy(clip)
    asked.tokenizer = parts.get("", frame)
    tokens = asked.tokenize(text)
    tokens = tokens if isinstance(tokens, dict) else {"": tokens}
    of = {name: parts[name if name in parts else f"clip_{name}"] for name in tokens}
    for name, part in of.items():  # Lens makes plain integers of its tokenizer's ids
        ids = part.offsets.ids
        for chunk in tokens[name]:
            if ids and type(chunk[0][0]) is int and [t[0] for t in chunk] == ids[: len(chunk)]:
                chunk[:] = [(new, *rest) for new, (_, *rest) in zip(ids, chunk, strict=False)]
    return tokens, of


def padding_of(chunk: Sequence[Any], tokenizer: SDTokenizer) -> list[bool]:
    """Which ids of a chunk are padding; if the end token has the same id, the first is not."""
    plain = [type(each) is int for each in chunk]
    filled = [p and each == tokenizer.pad_token for p, each in zip(plain, chunk, strict=True)]
    if tokenizer.pad_token == tokenizer.end_token and any(filled):
        last = max((i for i, fills in enumerate(filled) if not fills), default=-1)
        filled[min(last + 1, len(chunk) - 1)] = False
    return filled


def embeddings_in(text: str, tokenizer: SDTokenizer, chunks: Chunks) -> dict[int, Sequence[int]]:
    """The characters of a textual inversion's name, by the ``id()`` of each of its vectors."""
    word = rf"{re.escape(tokenizer.embedding_identifier)}([^\s()]+?)"
    pattern = rf"(?<![^\s()])(?<!\\[()]){word}(?=:[^\s():]*\)|[\s()]|$)"
    has_any = tokenizer.embedding_directory is not None
    names = []
    for name in re.finditer(pattern, text) if has_any else ():
        embedding, *_, rest = tokenizer._try_get_embedding(name[1])
        if embedding is not None:  # what is left is read as text, such as a comma
            names.append(range(name.start(), name.end() - len("".join(rest.split()))))
    found = iter(names)
    places: dict[int, Sequence[int]] = {}
    last, at = None, range(0)
    for vector in (each for chunk in chunks for each, *_ in chunk if isinstance(each, Tensor)):
        file = vector.untyped_storage().data_ptr()  # one for each time that a name was read
        if file != last:
            at, last = next(found, range(0)), file
        places[id(vector)] = at
    return places


class IndexEncoder(nn.Module):
    """Replaces an encoder: its output has each token's index in place of an embedding.

    The index is passed in place of the token's weight: chunks of ``(id, index)``.
    """

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        layer = getattr(encoder, "layer", "last")
        self.layers = len(layer) if isinstance(layer, list) else 2 if layer == "all" else 0
        self.cut = getattr(encoder, "txt_offset", 0)  # Lens's encoder cuts off its template itself
        self.has_mask = getattr(encoder, "return_attention_masks", True)
        self.width = 1
        if hasattr(encoder.transformer, "get_input_embeddings"):
            self.width = encoder.transformer.get_input_embeddings().weight.shape[-1]

    def encode_token_weights(self, chunks: Chunks) -> tuple[Any, ...]:
        numbers: list[int] = []
        for chunk in chunks:
            # Another encoder's embeddings are left out, and the chunk is padded at its end.
            fit = [n for each, n in chunk if not self._is_anothers(each)]
            numbers += [*fit, *[0] * (len(chunk) - len(fit))]
        device = comfy.model_management.intermediate_device()
        out = torch.tensor(numbers[self.cut :], dtype=torch.float32, device=device)[None, :, None]
        mask, pooled = torch.ones(out.shape[:2], device=device), torch.zeros(1, 1, device=device)
        if self.layers:
            out = out[:, None].expand(-1, self.layers, -1, -1)
        else:
            out = out.expand(-1, -1, self.width)
        return (out, pooled, {"attention_mask": mask})[: 3 if self.has_mask else 2]

    def _is_anothers(self, each: Any) -> bool:
        return isinstance(each, Tensor) and each.shape[-1] != self.width


def encoded(encoder: nn.Module, numbered: dict[str, Chunks]) -> dict[str, list[list[int]]]:
    """For each token of a conditioning the numbers of the tokens that an encoder makes it of.

    By the conditioning's name: "" is the text itself; the others are HiDream-I1's Llama and ByT5.
    """
    more: dict[str, Any] = {}
    if "" in numbered:  # the encoder itself, without a frame
        out = IndexEncoder(encoder).encode_token_weights(numbered[""])[0]
    else:
        probe: Any = copy.copy(encoder)
        within = encoder._modules.items()
        numbering = {n: IndexEncoder(m) for n, m in within if hasattr(m, "encode_token_weights")}
        if not numbering:  # HiDream-O1's text is encoded in the model
            return {"": [[n] for chunks in numbered.values() for c in chunks for _, n in c]}
        probe.__dict__["_modules"] = numbering
        out, _, *extras = probe.encode_token_weights(numbered)
        more = extras[0] if extras else {}
    tensors = {name: each for name, each in more.items() if name.startswith("conditioning_")}
    rows = {"": out[0], **{name: each.flatten(0, -3)[0] for name, each in tensors.items()}}
    return {
        name: [[int(n) for n in row.unique() if n] for row in each.cpu()]
        for name, each in rows.items()
    }
