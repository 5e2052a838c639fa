"""Conditionings with word weights: ``(blue scarf:1.5)``, ``(fog:0)``, ``(pillows:-1)``."""

import inspect
import logging
import re
from dataclasses import replace
from functools import partial
from typing import Any

import comfy.conds
import comfy.hooks
import torch
from comfy.patcher_extension import WrappersMP
from comfy.sd import CLIP

from .patch import run_with_taca
from .prompt_tokens import PromptTokens, Table
from .run import PATCH_KEY
from .weighted_text import WeightedText, read
from .words import WORDS_KEY, Words

Conditioning = list[list[Any]]
"""ComfyUI's: a list of ``[text (b, num_text, channels), dictionary]``."""

AVOID_STRENGTH = 2.0
"""Measured in docs/words.md: 1 has little effect, 4 harms pictures."""

log = logging.getLogger("taca")

NO_WEIGHTS = (
    "TACA: the words of a prompt would not weigh. A node that calls the model with a prompt of its "
    "own, as Perp-Neg does, needs one without weights (PerpNegGuider does not). Where any_model is "
    "off, turn it on, or put the TACA node before the sampler (with gamma 1 it does nothing else)."
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
                f"{len(words.weights)} with this CLIP. Connect the CLIP and the text that made it, "
                f"directly behind the node that encodes the text: others add tokens (Apply Style "
                f"Model, Concat). The words of TextEncodeZImageOmni with pictures cannot be told."
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
