"""Which conditioning each row of a call belongs to."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import CallArguments


def conditionings_of(
    guider: Any, num_tokens: int | None, encode: Callable[[], Tensor] | None
) -> frozenset[Any] | None:
    """The uuids of a prompt's conditionings; None if there is at most one positive conditioning.

    Among several with ``num_tokens`` tokens, those that equal what ``encode`` returns; without it
    the first.

    Raises ValueError if none is the prompt's.
    """
    positive = getattr(guider, "original_conds", {}).get("positive", ())
    texts = {cond["uuid"]: cond.get("cross_attn") for cond in positive if "uuid" in cond}
    if len(texts) < 2:
        return None
    fitting = {
        uuid: text
        for uuid, text in texts.items()
        if num_tokens is None or (text is not None and text.shape[1] == num_tokens)
    }
    if encode is not None and len(fitting) > 1:
        own = encode()
        fitting = {uuid: text for uuid, text in fitting.items() if _is_alike(own, text)}
    elif fitting:
        return frozenset([next(iter(fitting))])
    if not fitting:
        raise ValueError(
            f"TACA: none of the {len(texts)} combined conditionings is of this prompt. Connect the "
            f"CLIP and the prompt that made one of them."
        )
    return frozenset(fitting)


def _is_alike(own: Tensor, text: Tensor | None) -> bool:
    """Whether they differ by rounding alone."""
    if text is None or own.shape != text.shape:
        return False
    own, text = own.double().cpu(), text.double().cpu()
    return bool((own - text).norm() <= 1e-3 * own.norm())


Entry = dict[str, Any]
"""ComfyUI's dictionary of one conditioning in a run."""


class Prompts(NamedTuple):
    """The prompts of one run, as its guider has them."""

    guider: Any
    batch: int  # of the run's latents
    limited: frozenset[Any] | None = None  # uuids of the conditionings that TACA Options limits

    def entries(self) -> list[tuple[str, Entry]]:
        """Each conditioning of the run, with the guider's name for its role, such as "positive"."""
        return [(name, each) for name, entries in self.guider.conds.items() for each in entries]

    def of_rows(self, call: CallArguments) -> list[list[tuple[str, Entry]]]:
        """The conditioning of each row of a call, or all candidates for it.

        ComfyUI tells the conditioning of each chunk of the batch. If another node has reordered the
        rows, or made conditionings of its own, they are recognised by their text.
        """
        entries, texts = self.entries(), call.c_crossattn
        told = call.transformer_options.get("uuids", ())
        rows = [None] * len(call.t) if texts is None else texts
        if len(call.t) != len(told) * self.batch:
            return [[each for each in entries if _has_text(row, each[1])] for row in rows]
        found = []
        for i, row in enumerate(rows):
            named = [each for each in entries if each[1]["uuid"] == told[i // self.batch]]
            own = [each for each in named if _has_text(row, each[1])]
            if len(own) != 1 or len(named) != 1:
                # A row with another prompt's text is of that prompt; one with nobody's, as named.
                alike = own or [each for each in entries if _has_text(row, each[1])]
                own = [self._original(each) for each in alike] or named or [ANOTHER]
            found.append(own)
        return found

    def _original(self, copied: tuple[str, Entry]) -> tuple[str, Entry]:
        """The conditioning that an entry has its text from.

        If one prompt has an area that another lacks, ComfyUI adds a copy of the entry to the other,
        with the other's text.
        """
        name, entry = copied
        given = getattr(self.guider, "original_conds", {}).get(name, ())
        own = {each["uuid"] for each in given}
        text = entry["model_conds"].get("c_crossattn")
        for each in self.guider.conds[name]:
            if each["uuid"] in own and each["model_conds"].get("c_crossattn") is text:
                return name, each
        return copied

    def positive(self, uuids: frozenset[Any] | None = None) -> list[Entry]:
        """The positive conditionings, or those of them with these uuids."""
        entries = (each for name, each in self.entries() if name == "positive")
        return [each for each in entries if uuids is None or each["uuid"] in uuids]

    def repeats(self, call: CallArguments, uuids: frozenset[Any] | None) -> int:
        """How many times a call repeats the text of these conditionings.

        To join texts of two lengths, ComfyUI repeats each of them.
        """
        own = [each["model_conds"].get("c_crossattn") for each in self.positive(uuids)]
        if call.c_crossattn is None or not own or own[0] is None:
            return 1
        return max(1, call.c_crossattn.shape[1] // max(1, own[0].cond.shape[1]))


ANOTHER: tuple[str, Entry] = ("", {"model_conds": {}})
"""A conditioning that a node has added itself, such as Perp-Neg's empty one."""


def positive_rows(
    call: CallArguments, prompts: Prompts | None, uuids: frozenset[Any] | None = None
) -> Tensor:
    """Which rows of a call are the positive prompt's, bool ``(b,)``.

    With ``uuids`` only those of these conditionings. Outside a run the first prompt counts as
    positive, as in core's CFG.

    Raises ValueError if another node has made this undecidable.
    """
    if prompts is None:
        chunks = call.transformer_options.get("cond_or_uncond") or [0]
        positive = torch.tensor([chunk == 0 for chunk in chunks])
        return positive.repeat_interleave(len(call.t) // len(chunks))
    if "positive" not in prompts.guider.conds:
        name = type(prompts.guider).__name__
        raise ValueError(
            f"TACA cannot tell which prompt of {name} is the positive one. Take another guider, or "
            f"TACA Options and the report out."
        )
    rows = [
        {name == "positive" and (uuids is None or each["uuid"] in uuids) for name, each in entries}
        for entries in prompts.of_rows(call)
    ]
    if any(len(row) != 1 for row in rows):
        raise ValueError(UNTOLD.format("the positive prompt's", "TACA Options and the report"))
    return torch.tensor([row == {True} for row in rows])


UNTOLD = (
    "TACA cannot tell which rows of the batch are {}: another node has changed the batch, or a "
    "prompt with an area has the text of another prompt. Take out that node, give one of these "
    "texts another comma, or take out {}."
)


def _has_text(row: Tensor | None, entry: Entry) -> bool:
    """Whether a row ``(num_text, channels)``, None for no text, holds a conditioning's text.

    To join texts of two lengths, ComfyUI repeats each of them.
    """
    text = entry["model_conds"].get("c_crossattn")
    if row is None or text is None:
        return row is text
    repeats = row.shape[0] // max(1, text.cond.shape[1])
    return any(torch.equal(row, one.repeat(repeats, 1)) for one in text.cond.to(row))
