"""Limits of gamma: to the positive prompt, to some blocks, to the prompt's own tokens.

All are off by default, as in the paper. They limit gamma, not the LoRA.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import CallArguments
from .families import family_of, uncompiled
from .prompt_calls import Prompts, conditionings_of, positive_rows
from .words import WORDS_KEY, carrying, own_tokens


@dataclass(frozen=True)
class Options:
    """Limits of gamma."""

    positive_only: bool = False  # whether the negative half of CFG stays plain
    blocks: str = ""  # as ``parse_blocks`` reads them; empty for all
    # Share of gamma - 1 for each text token of the positive conditioning: 1 for the prompt's own
    # tokens, 0 for padding.
    prompt: tuple[float, ...] | None = None
    text: str | None = None  # that prompt, without the weights of words
    prompt_only: bool = False  # the same, for prompts whose conditionings carry their tokens
    # Encodes the prompt again, to find its conditioning among several.
    encode: Callable[[], Tensor] | None = field(default=None, compare=False)

    def conditionings(self, guider: Any) -> frozenset[Any] | None:
        """The conditionings of the prompt, as ``conditionings_of``; errors as there."""
        if self.prompt is None:
            return None
        own = carrying(getattr(guider, "original_conds", {}).get("positive", ()), self.text)
        if own:
            return frozenset(each["uuid"] for each in own)
        return conditionings_of(guider, len(self.prompt), self.encode)

    def limit(
        self, gamma: Tensor, call: CallArguments, transformer: nn.Module, prompts: Prompts | None
    ) -> Tensor:
        """The schedule's gamma of each row of a call, ``(b,)``, within these limits.

        Returns gamma of each row ``(b,)``, or of each row and text token ``(b, t)``.

        Raises ValueError if the positive conditioning does not have the prompt's tokens.
        """
        if not self.positive_only and self.prompt is None and not self.prompt_only:
            return gamma
        positive = positive_rows(call, prompts).to(gamma.device)
        if self.positive_only:
            gamma = gamma.where(positive, 1.0)
        for shares, uuids in self._prompt_shares(prompts):
            rows = positive_rows(call, prompts, uuids).to(gamma.device)
            if bool(rows.any()):
                # A call may hold the prompt several times over, one behind the other.
                repeated = shares * (prompts.repeats(call, uuids) if prompts else 1)
                gamma = _limited(gamma, rows, repeated, call, uncompiled(transformer))
        return gamma

    def _prompt_shares(
        self, prompts: Prompts | None
    ) -> list[tuple[tuple[float, ...], frozenset[Any] | None]]:
        """For each prompt that limits gamma: its tokens' shares, its conditionings' uuids.

        Raises ValueError if no positive conditioning carries its tokens.
        """
        positive = prompts.positive() if prompts else []
        found = carrying(positive, self.text)
        if self.prompt is not None and not found:
            return [(self.prompt, prompts.limited if prompts else None)]
        if self.prompt is None:
            if not self.prompt_only or prompts is None:
                return []
            found = [each for each in positive if WORDS_KEY in each]
        if not found:
            raise ValueError(
                "TACA Options cannot tell the prompt's own tokens: encode the positive prompt with "
                "TACA Text Encode, connect clip and prompt, or switch prompt_only off."
            )
        return [(own_tokens(each), frozenset([each["uuid"]])) for each in found]


def _limited(
    gamma: Tensor,
    rows: Tensor,
    prompt: tuple[float, ...],
    call: CallArguments,
    transformer: nn.Module,
) -> Tensor:
    """Gamma of each row and text token ``(b, t)``, with a prompt's shares in its rows."""
    extra = family_of(transformer).extra_text_of(transformer, len(prompt), call)
    shares = torch.tensor(extra.with_prompt(prompt)).to(gamma.device).where(rows[:, None], 1.0)
    gamma = gamma[:, None] if gamma.ndim == 1 else gamma
    return torch.lerp(torch.ones_like(shares), gamma.expand_as(shares), shares)


NO_OPTIONS = Options()
"""As in the paper: no limits."""
