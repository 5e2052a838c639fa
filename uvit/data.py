"""What a U-ViT is trained on, and how a checkpoint recognises it. Pure torch."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLES = 64
"""Numbers that a checkpoint keeps of each picture and each caption."""
TOLERANCE = 2e-3
"""Relative difference up to which data count as the same: encoded again on another GPU, a picture
is not bit-identical."""
PARTS = {
    "latents": "other pictures",
    "context": "other captions",
    "empty": "another empty prompt",
}
"""Fields of ``Data``, and what messages call them where they differ."""


@dataclass
class Data:
    """What to train on; all tensors are float32, on the CPU.

    Parameters
    ----------
    latents : Tensor
        As the network reads them, ``(pictures, channels, side, side)``.
    context : Tensor
        Encoded captions in the same order, ``(pictures, text_tokens, text_width)``.
    empty : Tensor
        The encoded empty prompt, ``(1, text_tokens, text_width)``.
    latent_scale : float
        The latents have been multiplied by it; the file keeps it.
    """

    latents: Tensor
    context: Tensor
    empty: Tensor
    latent_scale: float

    def samples(self) -> dict[str, Tensor]:
        """Evenly spaced numbers of each picture, each caption and the empty prompt, by part."""
        samples = {}
        for name in PARTS:
            rows = getattr(self, name).flatten(1)
            samples[name] = rows[:, torch.arange(SAMPLES) * (rows.shape[1] - 1) // (SAMPLES - 1)]
        return samples

    def differences(self, samples: Mapping[str, Tensor]) -> list[str]:
        """The parts that differ from a checkpoint's samples, in words."""
        return [
            PARTS[name] for name, ours in self.samples().items() if not _same(ours, samples[name])
        ]


def _same(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape:
        return False
    return bool(((ours - theirs).norm(dim=1) <= TOLERANCE * ours.norm(dim=1)).all())
