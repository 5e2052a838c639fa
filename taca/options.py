"""Limits of gamma: to the positive prompt, to some blocks, to the prompt's own tokens.

All are off by default, as in the paper. They limit gamma and not the LoRA.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import CallArguments
from .families import family_of, uncompiled
from .prompt_calls import Prompts, conditionings_of, positive_rows


@dataclass(frozen=True)
class Options:
    """Limits of gamma."""

    positive_only: bool = False  # whether the negative half of CFG stays plain
    blocks: str = ""  # as ``parse_blocks`` reads them; empty for all
    # Share of gamma - 1 for each text token of the positive conditioning: 1 for the prompt's own
    # tokens, 0 for padding.
    prompt: tuple[float, ...] | None = None
    # Makes the prompt's conditioning again, to find it among several.
    encode: Callable[[], Tensor] | None = field(default=None, compare=False)

    def conditionings(self, guider: Any) -> frozenset[Any] | None:
        """Those of the prompt, as ``conditionings_of``; errors as there."""
        if self.prompt is None:
            return None
        return conditionings_of(guider, len(self.prompt), self.encode)

    def gamma_of_call(
        self, gamma: Tensor, call: CallArguments, transformer: nn.Module, prompts: Prompts | None
    ) -> Tensor:
        """Gamma of each row of a call ``(b,)``, or of each row and text token ``(b, t)``.

        ``gamma`` is the schedule's, ``(b,)``.

        Raises ValueError if the positive conditioning has other tokens than the prompt.
        """
        if not self.positive_only and self.prompt is None:
            return gamma
        positive = positive_rows(call, prompts).to(gamma.device)
        if self.positive_only:
            gamma = gamma.where(positive, 1.0)
        if self.prompt is None:
            return gamma
        limited = prompts.limited if prompts else None
        rows = positive_rows(call, prompts, limited).to(gamma.device)
        if not bool(rows.any()):
            return gamma
        transformer = uncompiled(transformer)
        family = family_of(transformer)
        prompt = self.prompt * (prompts.repeats(call, limited) if prompts else 1)
        weights = torch.tensor(family.text_weights(transformer, prompt, call)[0])
        weights = weights.to(gamma.device).where(rows[:, None], 1.0)
        return torch.lerp(torch.ones_like(weights), gamma[:, None].expand_as(weights), weights)


NO_OPTIONS = Options()
"""The paper's: no limits."""
