"""U-ViT, a transformer with the skips of a U-Net (Bao et al., arXiv 2209.12152). Pure torch.

The text joins the image in all blocks (early fusion) or in some in the middle (intermediate
fusion, after the abstract of Hu, Jia and Rostami, arXiv 2403.16530; what it leaves open, such as
how many blocks, is a parameter here). It joins by concatenation, one sequence ``[time | text |
image]`` with one softmax, or by cross-attention, image to text. Early fusion by concatenation is
the published U-ViT, under the names its checkpoints have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

Conditioning = Literal["concatenation", "cross-attention"]
Attention = Callable[..., Tensor]
"""``(q, k, v, heads, transformer_options=...) -> output``, all ``(B, tokens, width)``."""

HEAD_WIDTH = 64  # of every published U-ViT
MLP_RATIO = 4
TIMESTEPS = 1000
PUBLISHED_TEXT_TOKENS = 77  # CLIP's


@dataclass(frozen=True)
class Sizes:
    """The shape of a U-ViT.

    Parameters
    ----------
    blocks, width : int
        Number of blocks, odd: half of them before the middle one, half after. Width of a token,
        a multiple of 64.
    channels, side, patch : int
        Of the latents: channels, height and width, height and width of the patch that is a token.
    text_tokens, text_width : int
        Of the encoded prompt.
    first, last : int, optional
        The blocks that text and image share, counted from 0; all where not given.
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
        """Whether all blocks share text and image."""
        return (self.first, self.last) == (0, self.blocks - 1)

    @property
    def image_tokens(self) -> int:
        """Patches of a latent."""
        return (self.side // self.patch) ** 2


def central(blocks: int, count: int) -> tuple[int, int]:
    """First and last of the ``count`` central blocks."""
    if count % 2 == 0 or not 1 <= count <= blocks:
        raise ValueError(
            f"The central blocks are an odd number of the {blocks} there are, not {count}."
        )
    return (blocks - count) // 2, (blocks + count) // 2 - 1


def plain_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, **_: Any) -> Tensor:
    """Torch's own attention, for where ComfyUI's is not."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def timestep_embedding(t: Tensor, width: int, max_period: float = 10000) -> Tensor:
    """Cosines, then sines, of ``t`` ``(B,)`` at falling frequencies: ``(B, width)``."""
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t[:, None].float() * torch.exp(-math.log(max_period) * steps / half)
    return torch.cat((angles.cos(), angles.sin()), 1)


class SelfAttention(nn.Module):
    """Among the tokens of one sequence."""

    def __init__(self, width: int, attention: Attention, layers: Any, **kind: Any) -> None:
        super().__init__()
        self.heads, self.attention = width // HEAD_WIDTH, attention
        self.qkv = layers.Linear(width, 3 * width, bias=False, **kind)
        self.proj = layers.Linear(width, width, **kind)

    def forward(self, x: Tensor, options: Mapping[str, Any] | None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(self.attention(q, k, v, self.heads, transformer_options=options))


class CrossAttention(nn.Module):
    """From the image to the text."""

    def __init__(self, width: int, attention: Attention, layers: Any, **kind: Any) -> None:
        super().__init__()
        self.heads, self.attention = width // HEAD_WIDTH, attention
        self.q = layers.Linear(width, width, bias=False, **kind)
        self.kv = layers.Linear(width, 2 * width, bias=False, **kind)
        self.proj = layers.Linear(width, width, **kind)

    def forward(self, x: Tensor, text: Tensor, options: Mapping[str, Any] | None) -> Tensor:
        k, v = self.kv(text).chunk(2, -1)
        return self.proj(self.attention(self.q(x), k, v, self.heads, transformer_options=options))


class MLP(nn.Module):
    """Each token by itself."""

    def __init__(self, width: int, layers: Any, **kind: Any) -> None:
        super().__init__()
        self.fc1 = layers.Linear(width, MLP_RATIO * width, **kind)
        self.fc2 = layers.Linear(MLP_RATIO * width, width, **kind)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block, some with a skip, some with cross-attention."""

    def __init__(
        self, width: int, skip: bool, cross: bool, attention: Attention, layers: Any, **kind: Any
    ) -> None:
        super().__init__()
        self.skip_linear = layers.Linear(2 * width, width, **kind) if skip else None
        self.norm1 = layers.LayerNorm(width, **kind)
        self.attn = SelfAttention(width, attention, layers, **kind)
        self.norm_cross = layers.LayerNorm(width, **kind) if cross else None
        self.cross = CrossAttention(width, attention, layers, **kind) if cross else None
        self.norm2 = layers.LayerNorm(width, **kind)
        self.mlp = MLP(width, layers, **kind)

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        skip: Tensor | None = None,
        transformer_options: Mapping[str, Any] | None = None,
    ) -> Tensor:
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat((x, skip), -1))
        x = x + self.attn(self.norm1(x), transformer_options)
        if self.cross is not None and self.norm_cross is not None:
            x = x + self.cross(self.norm_cross(x), text, transformer_options)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Latents ``(B, channels, side, side)`` to tokens ``(B, image tokens, width)``."""

    def __init__(self, sizes: Sizes, layers: Any, **kind: Any) -> None:
        super().__init__()
        self.proj = layers.Conv2d(
            sizes.channels, sizes.width, sizes.patch, stride=sizes.patch, **kind
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class UViT(nn.Module):
    """The network: predicts the noise in latents.

    Parameters
    ----------
    sizes : Sizes
        Its shape, fusion and conditioning.
    attention : callable
        What computes the softmax.
    layers : module
        Where Linear, Conv2d and LayerNorm come from: ``torch.nn``, or ComfyUI's ``operations``.
    device, dtype
        Of the weights.
    """

    def __init__(
        self,
        sizes: Sizes,
        attention: Attention = plain_attention,
        layers: Any = nn,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kind = {"device": device, "dtype": dtype}
        self.sizes = sizes
        half = sizes.blocks // 2
        shared = range(sizes.first, sizes.last + 1)

        def block(i: int) -> Block:
            cross = sizes.conditioning == "cross-attention" and i in shared
            return Block(sizes.width, i > half, cross, attention, layers, **kind)

        tokens = 1 + sizes.text_tokens + sizes.image_tokens
        self.patch_embed = PatchEmbed(sizes, layers, **kind)
        self.context_embed = layers.Linear(sizes.text_width, sizes.width, **kind)
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, sizes.width, **kind))
        self.in_blocks = nn.ModuleList(block(i) for i in range(half))
        self.mid_block = block(half)
        self.out_blocks = nn.ModuleList(block(half + 1 + i) for i in range(half))
        self.norm = layers.LayerNorm(sizes.width, **kind)
        self.decoder_pred = layers.Linear(sizes.width, sizes.channels * sizes.patch**2, **kind)
        self.final_layer = layers.Conv2d(sizes.channels, sizes.channels, 3, padding=1, **kind)
        if sizes.conditioning == "concatenation" and not sizes.is_early:
            # Nothing else in a file would say so, and the weights fit early fusion too.
            shared_blocks = torch.tensor([sizes.first, sizes.last], device=device)
            self.register_buffer("fused_blocks", shared_blocks)

    @property
    def blocks(self) -> list[Block]:
        """All blocks, from the first to the last."""
        return cast(list[Block], [*self.in_blocks, self.mid_block, *self.out_blocks])

    @property
    def joint_blocks(self) -> list[Block] | None:
        """The blocks with one softmax over text and image; none with cross-attention."""
        if self.sizes.conditioning == "cross-attention":
            return None
        return self.blocks[self.sizes.first : self.sizes.last + 1]

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> UViT:
        """Draw new weights as the published code does; returns the network."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                bound = module.weight[0].numel() ** -0.5
                nn.init.uniform_(module.weight, -bound, bound, generator=generator)
                nn.init.uniform_(cast(Tensor, module.bias), -bound, bound, generator=generator)
        nn.init.trunc_normal_(self.pos_embed, std=0.02, generator=generator)
        return self

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        transformer_options: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Predict the noise.

        Parameters
        ----------
        x : Tensor
            Noisy latents, ``(B, channels, side, side)``.
        t : Tensor
            Timesteps ``(B,)``, 1 to 1000.
        context : Tensor
            Encoded prompts, ``(B, text_tokens, text_width)``.
        transformer_options : dict, optional
            What ComfyUI hands to attention.

        Returns
        -------
        Tensor
            Of the shape of ``x``.

        Raises
        ------
        ValueError
            If latents or prompts are of another size than the network's.
        """
        sizes = self.sizes
        sizes_of_call(sizes, x, context)
        pos = self.pos_embed.to(x).split((1, sizes.text_tokens, sizes.image_tokens), 1)
        time = timestep_embedding(t, sizes.width).to(x)[:, None] + pos[0]
        text = self.context_embed(context) + pos[1]
        image = self.patch_embed(x) + pos[2]
        concatenates = sizes.conditioning == "concatenation"
        half = len(self.in_blocks)

        tokens = torch.cat((time, image), 1)
        skips: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if concatenates and i == sizes.first:
                tokens = join_text(tokens, text)
            skip = match_text(skips.pop(), tokens, sizes) if i > half else None
            tokens = block(tokens, text, skip, transformer_options=transformer_options)
            if i < half:
                skips.append(tokens)
            if concatenates and i == sizes.last:
                tokens = drop_text(tokens, sizes)

        patches = self.decoder_pred(self.norm(tokens[:, 1:]))
        grid, patch = sizes.side // sizes.patch, sizes.patch
        patches = patches.unflatten(2, (patch, patch, -1)).unflatten(1, (grid, grid))
        return self.final_layer(patches.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3))


def join_text(tokens: Tensor, text: Tensor) -> Tensor:
    """``[time | image]`` to ``[time | text | image]``."""
    return torch.cat((tokens[:, :1], text, tokens[:, 1:]), 1)


def drop_text(tokens: Tensor, sizes: Sizes) -> Tensor:
    """``[time | text | image]`` to ``[time | image]``."""
    return torch.cat((tokens[:, :1], tokens[:, 1 + sizes.text_tokens :]), 1)


def match_text(skip: Tensor, tokens: Tensor, sizes: Sizes) -> Tensor:
    """A skip with the tokens it is to join: without text, or with zeros where text had no skip.

    Where the shared blocks lie evenly around the middle one, skips match as they are.
    """
    if skip.shape[1] > tokens.shape[1]:
        return drop_text(skip, sizes)
    if skip.shape[1] < tokens.shape[1]:
        return join_text(skip, skip.new_zeros(len(skip), sizes.text_tokens, sizes.width))
    return skip


def sizes_of_call(sizes: Sizes, x: Tensor, context: Tensor) -> None:
    """Refuse latents and prompts that do not fit the network."""
    if tuple(x.shape[1:]) != (sizes.channels, sizes.side, sizes.side):
        raise ValueError(
            f"This U-ViT draws latents of {sizes.channels} channels, {sizes.side} x {sizes.side} "
            f"(with Stable Diffusion's VAE {8 * sizes.side} x {8 * sizes.side} pixels), not "
            f"{' x '.join(map(str, x.shape[1:]))}."
        )
    if tuple(context.shape[1:]) != (sizes.text_tokens, sizes.text_width):
        raise ValueError(
            f"This U-ViT reads prompts of {sizes.text_tokens} tokens of {sizes.text_width} "
            f"channels, not {context.shape[1]} of {context.shape[2]}: take the text encoder it "
            f"was trained with, and a shorter prompt if there are too many."
        )


PUBLISHED_SCHEDULE = (0.00085, 0.0120)


def noise_levels(device: Any = None) -> tuple[Tensor, Tensor]:
    """Shares of signal and of noise at t = 1 ... 1000, each ``(1000,)``, of the published schedule.

    x_t = signal_t x_0 + noise_t ε, with signal_t² = Π (1 - β), β = linspace(√.00085, √.0120)².
    """
    start, end = PUBLISHED_SCHEDULE
    betas = torch.linspace(start**0.5, end**0.5, TIMESTEPS, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)
    return kept.sqrt().float().to(device), (1 - kept).sqrt().float().to(device)
