"""Conditionings with word weights: ``(blue scarf:1.5)``, ``(fog:0)``, ``(pillows:-1)``."""

import inspect
import logging
import re
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import comfy.conds
import comfy.hooks
import torch
from comfy.patcher_extension import WrappersMP
from comfy.sd import CLIP
from comfy.sd1_clip import escape_important, token_weights, unescape_important

from .patch import run_with_taca
from .prompt_tokens import PromptTokens, Table
from .run import PATCH_KEY
from .words import WORDS_KEY, Words

Conditioning = list[list[Any]]
"""ComfyUI's: a list of ``[text (b, num_text, channels), dictionary]``."""

AVOID_STRENGTH = 2.0
"""Measured in docs/words.md: 1 has little effect, 4 harms pictures."""

LARGEST = 1000.0
"""The largest absolute weight: the attention's exponentials have to stay finite."""

log = logging.getLogger("taca")

# A number at the end of brackets, with the signs of any keyboard.
_LIKE_A_WEIGHT = re.compile(
    r"[:\uff1a](\s*[-+\u2010-\u2015\u2212\uff0b\uff0d]?\s*[\d.,\uff0c\uff0e\u066b]*\d\s*%?\s*)[)\uff09]"
)
_IN_EMBEDDING = re.compile(r"(?:^|\s)embedding:\S*$")


NO_WEIGHTS = (
    "TACA: the words of a prompt would not weigh. A node that calls the model with a prompt of its "
    "own, as Perp-Neg does, needs one without weights. Where any_model is off, put the TACA node "
    "before the sampler (with gamma 1 it does nothing else)."
)


class WeighHook(comfy.hooks.TransformerOptionsHook):
    """Adds the weights' wrapper to whatever model a conditioning is sampled with.

    It registers nothing, so ComfyUI removes it from the conditioning again, and positive and
    negative stay in one batch (``share_hooks``). A model with TACA needs no such wrapper.
    """

    def add_hook_patches(
        self, model: Any, model_options: dict[str, Any], target_dict: Any, registered: Any
    ) -> bool:
        wrappers = model_options["transformer_options"].setdefault("wrappers", {})
        outer = wrappers.setdefault(WrappersMP.OUTER_SAMPLE, {})
        outer.setdefault(PATCH_KEY, [partial(run_with_taca, None)])
        return False

    def on_apply_hooks(self, model: Any, transformer_options: dict[str, Any]) -> None:
        """Raise RuntimeError: no guider has removed it, so no run knows of the conditioning."""
        raise RuntimeError(NO_WEIGHTS)


class NeedsTaca(comfy.conds.CONDRegular):
    """Part of a conditioning without the hook; a run of a model with TACA removes it.

    Anywhere else ComfyUI processes it like the text, and that raises RuntimeError.
    """

    def process_cond(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(NO_WEIGHTS)


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


def encode(
    clip: CLIP,
    text: str,
    avoid: str = "",
    avoid_strength: float = AVOID_STRENGTH,
    any_model: bool = True,
    **how: Any,
) -> Conditioning:
    """The conditioning of a prompt without its brackets, with the weights that they give.

    ``avoid`` is text that image queries subtract and the prompt's own text does not attend to.
    ``any_model`` is as for ``attach``; ``how`` are further fields of ``Words``.

    Raises ValueError if the CLIP hides its tokens, or has none for a word with a weight.
    """
    parsed, avoided = read(clip, text), read(clip, avoid)
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(parsed.text))
    words = words_of(clip, parsed, **how)
    if avoided.text.strip():
        conditioning, words = avoiding(clip, conditioning, words, avoided, avoid_strength)
    return attach(conditioning, words, any_model=any_model)


def words_of(clip: CLIP, parsed: WeightedText, **how: Any) -> Words:
    """The weights of a prompt's tokens; errors as ``encode``."""
    for warning in parsed.warnings:
        log.warning(warning)
    prompt = PromptTokens.of(clip, parsed.text)
    phrases = tuple((parsed.text[start:end].strip(), w) for start, end, w in parsed.phrases)
    places = tuple(tuple(prompt.covering(start, end)) for start, end, _ in parsed.phrases)
    for (phrase, _), (start, end, _) in zip(phrases, parsed.phrases, strict=True):
        if not prompt.knows(start, end):
            raise ValueError(
                f"TACA cannot weigh {phrase!r}: the text encoder does not know it, or cut it off. "
                f"Choose another word, or a shorter prompt."
            )
    beside = {name: _of_tokens(table, parsed) for name, table in prompt.beside.items()}
    weights = _of_tokens(prompt.table, parsed)
    return Words(prompt, weights, phrases, places, beside=beside, **how)


def _of_tokens(table: Table, parsed: WeightedText) -> tuple[float, ...]:
    """The weight of each token of a conditioning: the mean of its characters' weights."""
    weights = []
    for tokens in table:
        lost = {i for t in tokens if t.is_unknown for i in range(t.start, t.end)}
        known = [t for t in tokens if t.start < t.end and not t.is_unknown]
        spans = [[i for i in range(t.start, t.end) if i not in lost] for t in known]
        written = [[i for i in span if not parsed.text[i].isspace()] or span for span in spans]
        own = [parsed.weights[i] for span in written for i in span]
        # Where all weights are equal, exactly that weight, without rounding.
        weights.append(own[0] if len({*own}) == 1 else sum(own) / len(own) if own else 1.0)
    return tuple(weights)


def avoiding(
    clip: CLIP, conditioning: Conditioning, words: Words, parsed: WeightedText, strength: float
) -> tuple[Conditioning, Words]:
    """A conditioning with the tokens of another prompt appended, to be subtracted.

    Raises ValueError if the encoder does not know all of it, gives the model more than the text, or
    if a weight in it is negative.
    """
    others = clip.encode_from_tokens_scheduled(clip.tokenize(parsed.text))
    avoided = words_of(clip, parsed)
    if min(avoided.weights) < 0:
        raise ValueError(
            "TACA: what is to be avoided has no negative weights; that would ask for it."
        )
    table = avoided.prompt.table
    chosen = [i for i, each in enumerate(table) if any(t.start < t.end for t in each)]
    written = [each.span() for each in re.finditer(r"\S+", parsed.text)]
    is_known = all(avoided.prompt.knows(*span) for span in written)
    if not is_known or any(token.is_unknown for each in table for token in each):
        raise ValueError(
            f"TACA cannot avoid {parsed.text!r}: the text encoder does not know all of it, or cut "
            f"it off. Choose other words, or fewer."
        )
    joined = []
    for (text, extras), (other, _) in zip(conditioning, others, strict=True):
        for name, value in extras.items():
            if name.startswith("conditioning_") and value is not None:
                raise ValueError(
                    f"TACA cannot avoid words with this text encoder, which gives the model "
                    f"{name} beside the text. Use a negative prompt."
                )
        other = other[:, chosen]
        extras = dict(extras)
        if extras.get("attention_mask") is not None:
            mask = extras["attention_mask"]
            extras["attention_mask"] = torch.cat([mask, mask.new_ones(other.shape[:2])], 1)
        joined.append([torch.cat([text, other], 1), extras])
    phrases = (*words.phrases, (f"avoid {parsed.text}", -strength))
    weights = (*words.weights, *(-strength * avoided.weights[i] for i in chosen))
    return joined, replace(words, weights=weights, phrases=phrases, num_avoided=len(chosen))


def attach(
    conditioning: Conditioning, words: Words, clip: CLIP | None = None, any_model: bool = True
) -> Conditioning:
    """A conditioning that carries its words, and their weights to the model.

    A conditioning may have more tokens than the words if its CLIP takes pictures, whose tokens come
    before those of the text.
    With ``any_model`` a hook takes the weights to any model, for which ComfyUI gives up dynamic
    VRAM; otherwise the model has to have TACA.

    Raises ValueError if the numbers of tokens of conditioning and words differ.
    """
    carrying = []
    for text, extras in conditioning:
        extras = _without_hook(extras)  # of the words that it had before
        more = text.shape[1] - len(words.weights)
        if more < 0 or (more and not sees_pictures(clip)):
            raise ValueError(
                f"TACA: this conditioning has {text.shape[1]} text tokens, and the text has "
                f"{len(words.weights)} with this CLIP. Connect the CLIP and the text that made it."
            )
        beside = {n: w for n, w in words.beside.items() if isinstance(extras.get(n), torch.Tensor)}
        if any(extras[name].shape[-2] != len(weights) for name, weights in beside.items()):
            raise ValueError(
                "TACA: the encoders of this conditioning were given different texts, so the "
                "weights would be on the wrong words. Give all of them the text with the weights, "
                "there without brackets."
            )
        carrying.append([text, {**extras, WORDS_KEY: words.behind(more)}])
        waiting = extras.get("model_conds", {})
        if WORDS_KEY in waiting:  # of the words that it had before
            carrying[-1][1]["model_conds"] = {n: c for n, c in waiting.items() if n != WORDS_KEY}
    if not words.has_weights:
        return carrying
    if not any_model:
        for _, extras in carrying:
            guard = {WORDS_KEY: NeedsTaca(torch.zeros(1))}
            extras["model_conds"] = {**extras.get("model_conds", {}), **guard}
        return carrying
    hooks = comfy.hooks.HookGroup()
    hooks.add(WeighHook())
    return comfy.hooks.set_hooks_for_conditioning(carrying, hooks)


def _without_hook(extras: dict[str, Any]) -> dict[str, Any]:
    """The dictionary of a conditioning without what ``attach`` may have put among its hooks."""
    given = extras.get("hooks") or comfy.hooks.HookGroup()
    hooks = given.clone()
    for hook in given.hooks:
        if isinstance(hook, WeighHook):
            hooks.remove(hook)
    if len(hooks) == len(given):
        return extras
    rest = {name: each for name, each in extras.items() if name != "hooks"}
    return rest | ({"hooks": hooks} if len(hooks) else {})


def sees_pictures(clip: CLIP | None) -> bool:
    """Whether a CLIP takes pictures beside the text."""
    tokenize = getattr(getattr(clip, "tokenizer", None), "tokenize_with_weights", None)
    names = set(inspect.signature(tokenize).parameters) if tokenize else set[str]()
    return bool(names & {"images", "image_embeds"})
