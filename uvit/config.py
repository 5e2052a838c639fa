"""The shape of a U-ViT, and which of its blocks see the text."""

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
        Number of blocks, odd: as many before the middle one as after it. Channels of a token, a
        multiple of 64.
    channels, side, patch : int
        Channels of the latents, their height and width, and the height and width of a token.
    text_tokens, text_width : int
        Tokens of the encoded prompt, and their channels.
    image_blocks : int
        Number of blocks at each end that do not see the text: the paper's v. 0 is early fusion.
    caption_blocks : int, optional
        Blocks of the text alone, before it joins: the paper's c. With a number the network is that
        of the paper's author; with None, that of the published checkpoints.
    conditioning : str
        ``"concatenation"``, or ``"cross-attention"`` from image to text: in the image's own softmax
        if ``caption_blocks`` is a number, in a separate one if it is None.

    Raises ValueError if there is no such U-ViT.
    """

    blocks: int = 13
    width: int = 512
    channels: int = 4
    side: int = 32
    patch: int = 2
    text_tokens: int = PUBLISHED_TEXT_TOKENS
    text_width: int = 768
    image_blocks: int = 0
    caption_blocks: int | None = None
    conditioning: Conditioning = "concatenation"

    def __post_init__(self) -> None:
        for name in ("width", "channels", "side", "patch", "text_tokens", "text_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"A U-ViT's {name} is at least 1, not {getattr(self, name)}.")
        if self.blocks < 1 or self.blocks % 2 == 0:
            raise ValueError(f"A U-ViT has an odd number of blocks, not {self.blocks}.")
        if not 0 <= self.image_blocks <= self.blocks // 2:
            raise ValueError(
                f"A U-ViT of {self.blocks} blocks has at most {self.blocks // 2} at each end "
                f"that do not see the text, not {self.image_blocks}."
            )
        if self.caption_blocks is not None and (self.caption_blocks < 0 or self.blocks < 3):
            raise ValueError(
                f"A U-ViT whose text has blocks of its own has at least 0 of them and 3 others, "
                f"not {self.caption_blocks} and {self.blocks}."
            )
        if self.width % HEAD_WIDTH:
            raise ValueError(f"A U-ViT's width is a multiple of {HEAD_WIDTH}, not {self.width}.")
        if self.side % self.patch:
            raise ValueError(f"Patches of {self.patch} do not fill a latent of {self.side}.")
        if self.conditioning not in ("concatenation", "cross-attention"):
            raise ValueError(f"There is no conditioning by {self.conditioning}.")

    @property
    def is_published(self) -> bool:
        """Whether parameters have the names and the order of the published checkpoints."""
        return self.caption_blocks is None

    @property
    def image_tokens(self) -> int:
        """Number of patches of a latent."""
        return (self.side // self.patch) ** 2


def outside(blocks: int, count: int) -> int:
    """How many blocks lie at each end, outside the ``count`` central ones.

    Raises ValueError if the count is even, or not in 1 ... ``blocks``.
    """
    if count % 2 == 0 or not 1 <= count <= blocks:
        raise ValueError(
            f"The central blocks are an odd number of the {blocks} there are, not {count}."
        )
    return (blocks - count) // 2
