"""The demo's linear codec and frozen text table: what a VAE and a text encoder are to SD3."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

PATCH = 4
"""Width and height in pixels of the patch that becomes one latent position."""
CHANNELS = 16
"""Latent channels, as in SD3."""
AGAIN = "Get the demo again (git checkout demo), or train it with demo/training/train.py."
# ComfyUI shifts and scales SD3's latents on their way into the model and back on their way out
# (comfy.latent_formats.SD3). The codec's latents are those outside the model, like a VAE's.
SCALE, SHIFT = 1.5305, 0.0609


def to_model(latents: torch.Tensor) -> torch.Tensor:
    """Shift and scale latents as ComfyUI does before they enter an SD3 model."""
    return (latents - SHIFT) * SCALE


def from_model(latents: torch.Tensor) -> torch.Tensor:
    """Undo `to_model`, as ComfyUI does with what its sampler returns."""
    return latents / SCALE + SHIFT


def _patches(pictures: torch.Tensor) -> torch.Tensor:
    """(n, h, w, 3) pictures to (n, h / 4, w / 4, 48) patches in [-1, 1]."""
    n, h, w, c = pictures.shape
    grid = pictures.reshape(n, h // PATCH, PATCH, w // PATCH, PATCH, c)
    return grid.permute(0, 1, 3, 2, 4, 5).flatten(3) * 2 - 1


class Codec:
    """Principal components of 4×4-pixel patches, and a frozen random text table.

    Parameters
    ----------
    mean : torch.Tensor
        Mean patch, shape ``(48,)``.
    encoder, decoder : torch.Tensor
        Shapes ``(48, 16)`` and ``(16, 48)``: from patch to latent channels and back.
    words : torch.Tensor
        One row per word of the vocabulary, shape ``(words, 64)``; row 0 is the padding.
    positions : torch.Tensor
        One row per token position, shape ``(16, 64)``.
    """

    def __init__(
        self,
        mean: torch.Tensor,
        encoder: torch.Tensor,
        decoder: torch.Tensor,
        words: torch.Tensor,
        positions: torch.Tensor,
    ) -> None:
        self.mean, self.encoder, self.decoder = mean, encoder, decoder
        self.words, self.positions = words, positions

    @classmethod
    def fit(
        cls, pictures: torch.Tensor, words: int, tokens: int, width: int = 64, seed: int = 0
    ) -> Codec:
        """Fit the principal components to pictures and draw the text table.

        Channels are scaled by the fourth root of their variance, half-way to whitening: the
        fine channels are neither drowned in the sampler's noise nor as loud as the colours.

        Parameters
        ----------
        pictures : torch.Tensor
            Shape ``(n, height, width, 3)``, in [0, 1].
        words, tokens, width : int
            Size of the vocabulary, of an encoded text, and of one token's vector.
        seed : int
            Of the text table.

        Returns
        -------
        Codec
        """
        patches = _patches(pictures).flatten(0, 2).double()
        mean = patches.mean(0)
        variance, axes = torch.linalg.eigh((patches - mean).T.cov())
        variance, axes = variance.flip(0)[:CHANNELS], axes.flip(1)[:, :CHANNELS]
        scale = variance**-0.25 / variance.sqrt().mean().sqrt()
        generator = torch.Generator().manual_seed(seed)
        return cls(
            mean.float(),
            (axes * scale).float().contiguous(),
            (axes / scale).T.float().contiguous(),
            torch.randn(words, width, generator=generator),
            torch.randn(tokens, width, generator=generator),
        )

    @classmethod
    def load(cls, path: str | Path) -> Codec:
        """Read a codec from a safetensors file.

        Raises
        ------
        ValueError
            If it is damaged, or no codec.
        """
        try:
            codec = cls(**load_file(path))
        except (SafetensorError, OSError, TypeError) as error:
            raise ValueError(f"{path} is no codec of the TACA demo: {error}. {AGAIN}") from error
        patch, width = 3 * PATCH**2, codec.words.shape[-1:]
        wanted = {
            "mean": (patch,),
            "encoder": (patch, CHANNELS),
            "decoder": (CHANNELS, patch),
            "words": (*codec.words.shape[:1], *width),
            "positions": (*codec.positions.shape[:1], *width),
        }
        for name, shape in wanted.items():
            tensor = getattr(codec, name)
            if tensor.shape != shape or not tensor.is_floating_point() or not tensor.numel():
                found = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
                raise ValueError(f"{path} is no codec of the TACA demo: {name} is {found}. {AGAIN}")
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"{path} is damaged: {name} is not finite. {AGAIN}")
        return codec

    def save(self, path: str | Path) -> None:
        """Write the codec to a safetensors file."""
        save_file(vars(self), path)

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Encode pictures.

        Parameters
        ----------
        pictures : torch.Tensor
            Shape ``(n, height, width, 3)``, in [0, 1], sides a multiple of 4.

        Returns
        -------
        torch.Tensor
            Latents of shape ``(n, 16, height / 4, width / 4)``.
        """
        latents = (_patches(pictures) - self.mean) @ self.encoder
        return from_model(latents.movedim(-1, 1))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents of shape ``(n, 16, h, w)`` to pictures ``(n, 4h, 4w, 3)`` in [0, 1]."""
        n, _, h, w = latents.shape
        patches = to_model(latents).movedim(1, -1) @ self.decoder + self.mean
        grid = patches.reshape(n, h, w, PATCH, PATCH, 3).permute(0, 1, 3, 2, 4, 5)
        return ((grid.reshape(n, h * PATCH, w * PATCH, 3) + 1) / 2).clamp(0, 1)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Look up token ids of shape ``(n, 16)``: vectors of shape ``(n, 16, 64)``."""
        return self.words[tokens] + self.positions
