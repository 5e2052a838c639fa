"""The word weights of a prompt, as its conditioning carries them and as a call needs them."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from .arguments import CallArguments
from .events import Say, silent
from .families import family_of, uncompiled
from .layouts import ExtraText
from .prompt_calls import UNTOLD, Prompts
from .prompt_tokens import PromptTokens
from .schedule import ResolvedSchedule, Schedule
from .word_weights import WordWeights

log = logging.getLogger("taca")

WORDS_KEY = "taca_words"
"""The key of the words in a conditioning's dictionary, which ComfyUI's nodes pass on."""


@dataclass(frozen=True, eq=False)
class Words:
    """The tokens of a conditioning, and their weights."""

    prompt: PromptTokens
    weights: tuple[float, ...]  # of each token of the conditioning
    phrases: tuple[tuple[str, float], ...]  # those with a weight, and what to avoid; for messages
    places: tuple[
        tuple[int, ...], ...
    ] = ()  # for each phrase with a weight the indices of its tokens
    # Weights for what the conditioning holds besides its text, by its name there.
    beside: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    num_avoided: int = 0  # number of its last tokens that are to be avoided
    about_mean: bool = False  # whether negative weights mirror about the prompt's mean value
    schedule: Schedule | None = None  # weights act in its window; None for the whole run
    say: Say = silent

    @property
    def has_weights(self) -> bool:
        """Whether any token has a weight other than 1."""
        return bool(self.num_avoided) or any(weight != 1 for weight in self.weights)

    def behind(self, count: int) -> "Words":
        """The same words after ``count`` tokens of pictures, which have weight 1."""
        if not count:
            return self
        prompt = replace(self.prompt, table=(((),) * count) + self.prompt.table)
        places = tuple(tuple(count + i for i in each) for each in self.places)
        weights = (1.0,) * count + self.weights
        return replace(self, prompt=prompt, weights=weights, places=places)

    def weighed_tokens(self) -> dict[str, list[int]]:
        """For each phrase with a weight the indices of its tokens, in all its places."""
        found: dict[str, list[int]] = {}
        for (phrase, _), places in zip(self.phrases, self.places, strict=False):
            found.setdefault(phrase, []).extend(places)
        return {phrase: places for phrase, places in found.items() if places}

    def weighted_beside(self, name: str, share: float, count: int) -> list["Weighted"]:
        """Weights of the ``count`` tokens that the model takes from an output besides the text.

        HiDream-I1 takes Llama's tokens twice: those of the last layer, and those of each block's.
        """
        own = [Weighted(1 + share * (weight - 1)) for weight in self.beside.get(name, ())]
        return own * (count // len(own)) if own and count % len(own) == 0 else [PLAIN] * count

    def weighted(self, share: float) -> list["Weighted"]:
        """The weights of its tokens: those written at share 1, all 1 at share 0."""
        num_own = len(self.weights) - self.num_avoided
        centre = self.prompt.own() if self.about_mean else [0.0] * num_own
        own = [
            Weighted(1 + share * (weight - 1), each)
            for weight, each in zip(self.weights[:num_own], centre, strict=True)
        ]
        return own + [Weighted(share * w, 0.0, True) for w in self.weights[num_own:]]


def own_tokens(entry: dict[str, Any]) -> tuple[float, ...]:
    """1 for each token of a conditioning that is its prompt's own, 0 for padding.

    Tokens to avoid, and those that another node has appended, count as the prompt's.
    """
    own = entry[WORDS_KEY].prompt.own()
    return (*own, *[1.0] * (entry["cross_attn"].shape[1] - len(own)))


def carrying(entries: Iterable[dict[str, Any]], text: str | None) -> list[dict[str, Any]]:
    """The conditionings that carry the tokens of a text, which is without weights; none of None."""
    return [each for each in entries if WORDS_KEY in each and each[WORDS_KEY].prompt.text == text]


def hide_avoided(prompts: Prompts) -> None:
    """Give the ControlNets of a run their text without the tokens to avoid.

    ComfyUI may add the ControlNet of one prompt to the others, when the run has begun.
    """
    entries = [entry for _, entry in prompts.entries()]
    if not any("control" in entry for entry in entries):
        return
    for entry in entries:
        words = entry.get(WORDS_KEY)
        if words and words.num_avoided:
            end = len(words.weights)
            text = entry["cross_attn"]
            parts = text[:, : end - words.num_avoided], text[:, end:]
            entry.setdefault("cross_attn_controlnet", torch.cat(parts, 1))


def share_hooks(prompts: Prompts) -> None:
    """One group for conditionings of the same hooks, of which ComfyUI makes one call.

    ``attach`` gave a conditioning a group of its own, and its hook is gone from there by now.
    """
    groups: dict[Any, Any] = {}
    for _, entry in prompts.entries():
        if hooks := entry.get("hooks"):
            key = tuple((hook, hook.hook_keyframe) for hook in hooks.hooks)
            entry["hooks"] = groups.setdefault(key, hooks)


class Weighted(NamedTuple):
    """The weight of one text token of a call."""

    weight: float = 1.0
    centre: float = 0.0  # how much it counts in the prompt's mean value
    is_avoided: bool = False


PLAIN = Weighted()


class Row(NamedTuple):
    """The words of one row of a call."""

    words: Words | None
    length: int  # of its conditioning, in tokens
    filled: int  # number of them that ComfyUI put in front of the encoder's
    share: float  # of the weights, at its timestep


@dataclass
class RunWords:
    """The words of one run: those of its conditionings that have weights."""

    prompts: Prompts
    schedules: dict[Words, ResolvedSchedule | None]
    zeroed: frozenset[Any]  # entries that Zero Out emptied but for their words, by name and uuid
    tensors: dict[Any, WordWeights] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # tokens that weigh otherwise than written

    @classmethod
    def of(
        cls, prompts: Prompts, resolve: Callable[[Schedule], ResolvedSchedule]
    ) -> "RunWords | None":
        """The words of a run; None if none has a weight. ``resolve`` resolves a schedule for it."""
        weighing = [
            (n, each)
            for n, each in prompts.entries()
            if WORDS_KEY in each and each[WORDS_KEY].has_weights
        ]
        zeroed = frozenset(
            (name, each["uuid"])
            for name, each in weighing
            if each.get("cross_attn") is not None and not bool(each["cross_attn"].any())
        )
        schedules = {
            each[WORDS_KEY]: resolve(each[WORDS_KEY].schedule) if each[WORDS_KEY].schedule else None
            for name, each in weighing
            if (name, each["uuid"]) not in zeroed
        }
        return cls(prompts, schedules, zeroed) if schedules else None

    def __str__(self) -> str:
        phrases = {phrase for words in self.schedules for phrase in words.phrases}
        return ", ".join(f"{text!r} {weight:g}" for text, weight in sorted(phrases))

    def of_call(
        self, call: CallArguments, t: list[float], transformer: nn.Module
    ) -> WordWeights | None:
        """The weights of the rows of a call at timesteps t; None if all are 1.

        Raises ValueError if the prompt of a row is unknown, or its text has other tokens.
        """
        rows = list(self._rows(call, t))
        if not any(row.words and (row.share or row.words.num_avoided) for row in rows):
            return None
        transformer = uncompiled(transformer)
        family = family_of(transformer)
        if family.mixes_text and any(row.words and row.words.num_avoided for row in rows):
            raise ValueError(
                f"TACA cannot avoid words on {family.name}: its text attends to itself before it "
                f"meets the picture. Leave avoid empty; give a word of the prompt a negative "
                f"weight, or use a negative prompt."
            )
        num_text = call.num_text
        extra = family.extra_text_of(transformer, num_text, call)
        sizes = num_text, len(extra.before), len(extra.after), extra.dropped
        key = (*rows, sizes, call.t.device)
        if key not in self.tensors:
            made = [_of_row(row, num_text, extra) for row in rows]
            notes = [note for row in rows for note in _notes(row, extra)]
            for note in dict.fromkeys(notes):
                if note not in self.notes:
                    self.notes.append(note)
                    log.warning("TACA: %s", note)
            self.tensors[key] = _stacked(made, call.t.device)
        return replace(self.tensors[key], shared={})  # of this call alone

    def _rows(self, call: CallArguments, t: list[float]) -> Iterator[Row]:
        for entries, each in zip(self.prompts.of_rows(call), t, strict=True):
            found = {(self._of(name, entry), *_lengths(entry)) for name, entry in entries}
            if len(found) != 1:
                raise ValueError(UNTOLD.format("which prompt's", "the word weights"))
            words, length, filled = found.pop()
            schedule = self.schedules[words] if words else None
            share = (
                1.0
                if schedule is None
                else float(schedule.share_at(torch.tensor(each, dtype=torch.float64)))
            )
            yield Row(words, length, filled, share)

    def _of(self, name: str, entry: dict[str, Any]) -> Words | None:
        """The words of a conditioning, if they have weights."""
        words = entry.get(WORDS_KEY)
        weighs = words in self.schedules and (name, entry["uuid"]) not in self.zeroed
        return words if weighs else None


def _lengths(entry: dict[str, Any]) -> tuple[int, int]:
    """Token counts of a conditioning: as the model gets it, and of that not from its encoder."""
    text, encoded = entry["model_conds"].get("c_crossattn"), entry.get("cross_attn")
    length = 0 if text is None else text.cond.shape[1]
    return length, 0 if encoded is None else length - encoded.shape[1]


def _of_row(row: Row, num_text: int, extra: ExtraText) -> list[Weighted]:
    """The weights of the text tokens of one row; ``num_text`` counts the call's conditioning."""
    tokens = [PLAIN] * num_text
    if row.words is not None:
        own = row.words.weighted(row.share)
        appended = row.length - row.filled - len(own)
        if appended < 0 or row.filled < 0:
            raise ValueError(
                f"TACA: the word weights are for {len(own)} text tokens, and this conditioning has "
                f"{row.length - row.filled}: another node has cut it."
            )
        # ComfyUI pads in front, Conditioning (Concat) appends. To join texts of two lengths,
        # ComfyUI repeats each of them.
        tokens = [PLAIN] * row.filled + own + [PLAIN] * appended
        tokens *= num_text // row.length
    before, after = ([PLAIN] * len(each) for each in (extra.before, extra.after))
    if row.words is not None and extra.source:
        before, after = (
            row.words.weighted_beside(extra.source, row.share, len(each))
            for each in (before, after)
        )
    if any(tokens[i].is_avoided for i in extra.dropped if i < num_text):
        raise ValueError("TACA: this model cuts off what is to be avoided: write a shorter prompt.")
    return before + [tokens[i] for i in extra.kept(num_text)] + after


def _notes(row: Row, extra: ExtraText) -> Iterator[str]:
    """What the user has to know of a row's tokens that weigh otherwise than written."""
    if row.words is None:
        return
    weights = dict(enumerate(row.words.weights, row.filled))
    if any(weights.get(i % row.length, 1) != 1 for i in extra.dropped):
        yield "The model cuts off words that weigh. Write a shorter prompt."
    appended = row.length - row.filled - len(row.words.weights)
    if appended:
        yield f"{appended} text tokens that another node appended weigh 1."


def _stacked(rows: list[list[Weighted]], device: torch.device) -> WordWeights:
    """The weights of a call; one row if all are equal, so that no graph depends on their number."""
    if all(row == rows[0] for row in rows):
        rows = rows[:1]
    weights, centre, avoided = (
        torch.tensor([[token[i] for token in row] for row in rows]) for i in range(3)
    )
    centre /= centre.sum(1, keepdim=True).clamp_min(1e-9)
    is_negative = weights < 0
    subtracts = bool(is_negative.any())
    return WordWeights(
        weights.to(device),
        is_negative.to(device) if subtracts else None,
        centre.to(device) if subtracts and bool(centre.any()) else None,
        avoided.to(device) if bool(avoided.any()) else None,
    )
