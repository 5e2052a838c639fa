"""Limits of gamma: to the positive prompt, to some blocks, to the prompt's own tokens.

All are off by default, as in the paper. They limit gamma and not the LoRA.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .arguments import CallArguments, Prompts, positive_rows


@dataclass(frozen=True)
class Options:
    """Limits of gamma."""

    positive_only: bool = False  # whether the negative half of CFG stays plain
    blocks: str = ""  # as ``parse_blocks`` reads them; empty for all
    # Share of gamma - 1 for each text token of the positive conditioning: 1 for the prompt's own
    # tokens, 0 for padding.
    prompt: tuple[float, ...] | None = None

    def gamma_of_call(self, gamma: Tensor, call: CallArguments, prompts: Prompts | None) -> Tensor:
        """Gamma of each row of a call ``(b,)``, or of each row and text token ``(b, t)``.

        ``gamma`` is the schedule's, ``(b,)``.

        Raises ValueError if the positive conditioning has other tokens than the prompt.
        """
        if not self.positive_only and self.prompt is None:
            return gamma
        positive = positive_rows(call, prompts).to(gamma.device)
        if self.positive_only:
            gamma = gamma.where(positive, 1.0)
        if self.prompt is None or not bool(positive.any()):
            return gamma
        num_text = 0 if call.c_crossattn is None else call.c_crossattn.shape[1]
        if len(self.prompt) != num_text:
            raise ValueError(
                f"TACA Options: the positive conditioning has {num_text} text tokens, its prompt "
                f"{len(self.prompt)}. Connect the CLIP and the prompt that made the conditioning; "
                f"joined ones and image prompts (Redux) cannot be told apart."
            )
        weights = torch.tensor(self.prompt, device=gamma.device)
        weights = weights.where(positive[:, None], 1.0)
        return torch.lerp(torch.ones_like(weights), gamma[:, None].expand_as(weights), weights)


NO_OPTIONS = Options()
"""The paper's: no limits."""
