"""U-ViT, a transformer with the skips of a U-Net (Bao et al., arXiv 2209.12152). Pure torch.

All blocks see the text (early fusion), or only some in the middle (intermediate fusion, after the
abstract of Hu, Jia and Rostami, arXiv 2403.16530, which leaves their number open). They see it by
concatenation, one sequence ``[time | text | image]`` with one softmax, or by cross-attention from
image to text. Early fusion by concatenation is the published U-ViT; parameters have the names of
its checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from .config import HEAD_WIDTH, UViTConfig

Attention = Callable[..., Tensor]
"""``(q, k, v, heads, transformer_options=...) -> output``; tensors are ``(B, tokens, width)``."""

MLP_RATIO = 4


def plain_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, **_: Any) -> Tensor:
    """PyTorch's own attention, for use without ComfyUI."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def timestep_embedding(t: Tensor, width: int, max_period: float = 10000) -> Tensor:
    """Cosines, then sines, of ``t`` ``(B,)`` at falling frequencies: ``(B, width)``."""
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t[:, None].float() * torch.exp(-math.log(max_period) * steps / half)
    return torch.cat((angles.cos(), angles.sin()), 1)


class SelfAttention(nn.Module):
    """Attention among the tokens of one sequence."""

    def __init__(self, width: int, attention: Attention, layers: Any, **kind: Any) -> None:
        super().__init__()
        self.heads, self.attention = width // HEAD_WIDTH, attention
        self.qkv = layers.Linear(width, 3 * width, bias=False, **kind)
        self.proj = layers.Linear(width, width, **kind)

    def forward(self, x: Tensor, options: Mapping[str, Any] | None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(self.attention(q, k, v, self.heads, transformer_options=options))


class CrossAttention(nn.Module):
    """Attention from the image to the text."""

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
    """Two layers, applied to each token by itself."""

    def __init__(self, width: int, layers: Any, **kind: Any) -> None:
        super().__init__()
        self.fc1 = layers.Linear(width, MLP_RATIO * width, **kind)
        self.fc2 = layers.Linear(MLP_RATIO * width, width, **kind)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block, optionally with a skip connection and cross-attention."""

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

    def __init__(self, config: UViTConfig, layers: Any, **kind: Any) -> None:
        super().__init__()
        self.proj = layers.Conv2d(
            config.channels, config.width, config.patch, stride=config.patch, **kind
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class UViT(nn.Module):
    """The network: predicts the noise in latents.

    Parameters
    ----------
    config : UViTConfig
    attention : callable
        See ``Attention``.
    layers : module
        Has Linear, Conv2d and LayerNorm: ``torch.nn``, or ComfyUI's ``operations``.
    device, dtype
        Of the weights.
    """

    def __init__(
        self,
        config: UViTConfig,
        attention: Attention = plain_attention,
        layers: Any = nn,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        self.patch_size = config.patch
        half = config.blocks // 2
        fused = range(config.first, config.last + 1)

        def block(i: int) -> Block:
            cross = config.conditioning == "cross-attention" and i in fused
            return Block(config.width, i > half, cross, attention, layers, **kind)

        tokens = 1 + config.text_tokens + config.image_tokens
        self.patch_embed = PatchEmbed(config, layers, **kind)
        self.context_embed = layers.Linear(config.text_width, config.width, **kind)
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, config.width, **kind))
        self.in_blocks = nn.ModuleList(block(i) for i in range(half))
        self.mid_block = block(half)
        self.out_blocks = nn.ModuleList(block(half + 1 + i) for i in range(half))
        self.norm = layers.LayerNorm(config.width, **kind)
        self.decoder_pred = layers.Linear(config.width, config.channels * config.patch**2, **kind)
        self.final_layer = layers.Conv2d(config.channels, config.channels, 3, padding=1, **kind)
        if config.conditioning == "concatenation" and not config.is_early:
            # The other weights are those of early fusion: without it a file would be ambiguous.
            fused_blocks = torch.tensor([config.first, config.last], device=device)
            self.register_buffer("fused_blocks", fused_blocks)

    @property
    def blocks(self) -> list[Block]:
        """All blocks, from the first to the last."""
        return cast(list[Block], [*self.in_blocks, self.mid_block, *self.out_blocks])

    @property
    def joint_blocks(self) -> list[Block] | None:
        """The blocks with one softmax over text and image; None with cross-attention."""
        if self.config.conditioning == "cross-attention":
            return None
        return self.blocks[self.config.first : self.config.last + 1]

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
            ComfyUI's, for ``attention``.

        Returns
        -------
        Tensor
            Of the shape of ``x``.

        Raises
        ------
        ValueError
            If latents or prompts do not have the network's sizes.
        """
        config = self.config
        check_inputs(config, x, context)
        pos = self.pos_embed.to(x).split((1, config.text_tokens, config.image_tokens), 1)
        time = timestep_embedding(t, config.width).to(x)[:, None] + pos[0]
        text = self.context_embed(context) + pos[1]
        image = self.patch_embed(x) + pos[2]
        concatenates = config.conditioning == "concatenation"
        half = len(self.in_blocks)

        tokens = torch.cat((time, image), 1)
        skips: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if concatenates and i == config.first:
                tokens = join_text(tokens, text)
            skip = match_text(skips.pop(), tokens, config) if i > half else None
            tokens = block(tokens, text, skip, transformer_options=transformer_options)
            if i < half:
                skips.append(tokens)
            if concatenates and i == config.last:
                tokens = drop_text(tokens, config)

        patches = self.decoder_pred(self.norm(tokens[:, 1:]))
        grid, patch = config.side // config.patch, config.patch
        patches = patches.unflatten(2, (patch, patch, -1)).unflatten(1, (grid, grid))
        return self.final_layer(patches.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3))


def join_text(tokens: Tensor, text: Tensor) -> Tensor:
    """``[time | image]`` to ``[time | text | image]``."""
    return torch.cat((tokens[:, :1], text, tokens[:, 1:]), 1)


def drop_text(tokens: Tensor, config: UViTConfig) -> Tensor:
    """``[time | text | image]`` to ``[time | image]``."""
    return torch.cat((tokens[:, :1], tokens[:, 1 + config.text_tokens :]), 1)


def match_text(skip: Tensor, tokens: Tensor, config: UViTConfig) -> Tensor:
    """A skip with text exactly where ``tokens`` has it: dropped, or zeros if it had none.

    Where the fused blocks lie symmetrically around the middle one, skips match as they are.
    """
    if skip.shape[1] > tokens.shape[1]:
        return drop_text(skip, config)
    if skip.shape[1] < tokens.shape[1]:
        return join_text(skip, skip.new_zeros(len(skip), config.text_tokens, config.width))
    return skip


def check_inputs(config: UViTConfig, x: Tensor, context: Tensor) -> None:
    """Raise a ValueError for latents or prompts that do not have the network's sizes."""
    side = config.side
    if tuple(x.shape[1:]) != (config.channels, side, side):
        raise ValueError(
            f"This U-ViT draws latents of {config.channels} channels, {side} x {side} (with Stable "
            f"Diffusion's VAE {8 * side} x {8 * side} pixels), not "
            f"{' x '.join(map(str, x.shape[1:]))}."
        )
    if tuple(context.shape[1:]) != (config.text_tokens, config.text_width):
        raise ValueError(
            f"This U-ViT reads prompts of {config.text_tokens} tokens of {config.text_width} "
            f"channels, not {context.shape[1]} of {context.shape[2]}: take the text encoder it "
            f"was trained with, and a shorter prompt if there are too many."
        )
