"""The shape of a U-ViT, and which of its blocks see the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Conditioning = Literal["concatenation", "cross-attention"]

HEAD_WIDTH = 64
"""Channels of an attention head, in every published U-ViT."""
PUBLISHED_TEXT_TOKENS = 77
"""CLIP's context length."""


@dataclass(frozen=True)
class UViTConfig:
    """The shape of a U-ViT. The defaults are those of the published small one.

    Parameters
    ----------
    blocks, width : int
        Number of blocks, odd: half of them before the middle one, half after. Channels of a token,
        a multiple of 64.
    channels, side, patch : int
        Of the latents: channels, height and width, height and width of the patch that is a token.
    text_tokens, text_width : int
        Of the encoded prompt.
    first, last : int, optional
        First and last of the blocks that see the text, counted from 0; all blocks by default.
    conditioning : str
        ``"concatenation"`` or ``"cross-attention"``.

    Raises
    ------
    ValueError
        If there is no such U-ViT.
    """

    blocks: int = 13
    width: int = 512
    channels: int = 4
    side: int = 32
    patch: int = 2
    text_tokens: int = PUBLISHED_TEXT_TOKENS
    text_width: int = 768
    first: int = 0
    last: int = -1
    conditioning: Conditioning = "concatenation"

    def __post_init__(self) -> None:
        if self.last == -1:
            object.__setattr__(self, "last", self.blocks - 1)
        for name in ("width", "channels", "side", "patch", "text_tokens", "text_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"A U-ViT's {name} is at least 1, not {getattr(self, name)}.")
        if self.blocks < 1 or self.blocks % 2 == 0:
            raise ValueError(f"A U-ViT has an odd number of blocks, not {self.blocks}.")
        if not 0 <= self.first <= self.last < self.blocks:
            raise ValueError(
                f"Text cannot join in blocks {self.first} to {self.last} of {self.blocks}: they "
                f"are counted from 0 to {self.blocks - 1}."
            )
        if self.width % HEAD_WIDTH:
            raise ValueError(f"A U-ViT's width is a multiple of {HEAD_WIDTH}, not {self.width}.")
        if self.side % self.patch:
            raise ValueError(f"Patches of {self.patch} do not fill a latent of {self.side}.")
        if self.conditioning not in ("concatenation", "cross-attention"):
            raise ValueError(f"There is no conditioning by {self.conditioning}.")

    @property
    def is_early(self) -> bool:
        """Whether all blocks see the text."""
        return (self.first, self.last) == (0, self.blocks - 1)

    @property
    def image_tokens(self) -> int:
        """Number of patches of a latent."""
        return (self.side // self.patch) ** 2


def central(blocks: int, count: int) -> tuple[int, int]:
    """First and last of the ``count`` central blocks.

    Raises
    ------
    ValueError
        If the count is even, or not in 1 ... ``blocks``.
    """
    if count % 2 == 0 or not 1 <= count <= blocks:
        raise ValueError(
            f"The central blocks are an odd number of the {blocks} there are, not {count}."
        )
    return (blocks - count) // 2, (blocks + count) // 2 - 1
