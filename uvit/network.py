"""U-ViT, a transformer with the skips of a U-Net (Bao et al., arXiv 2209.12152). Pure torch.

All blocks see the text (early fusion), or only those in the middle (intermediate fusion, Hu, Jia
and Rostami, arXiv 2403.16530), where it may come through blocks of its own. A block's sequence is
``[image | time | text]``, in one softmax. By concatenation the text takes part; by cross-attention
it is keys only, and stays what its own blocks made of it. Parameters have the names of the paper's
code, or those of the published checkpoints. Those are early fusion by concatenation; with their
names text may join in the middle too, or by a cross-attention besides the image's attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from .config import HEAD_WIDTH, UViTConfig

Attend = Callable[..., Tensor]
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


class Attention(nn.Module):
    """Attention of tokens to each other, or with ``cross`` to the keys that they are given."""

    def __init__(self, width: int, cross: bool, attend: Attend, layers: Any, **kind: Any) -> None:
        super().__init__()
        self.heads, self.attend, self.is_cross = width // HEAD_WIDTH, attend, cross
        if cross:
            self.q = layers.Linear(width, width, bias=False, **kind)
            self.kv = layers.Linear(width, 2 * width, bias=False, **kind)
        else:
            self.qkv = layers.Linear(width, 3 * width, bias=False, **kind)
        self.proj = layers.Linear(width, width, **kind)

    def forward(self, x: Tensor, keys: Tensor, options: Mapping[str, Any] | None) -> Tensor:
        projected = (
            (self.q(x), *self.kv(keys).chunk(2, -1)) if self.is_cross else self.qkv(x).chunk(3, -1)
        )
        return self.proj(self.attend(*projected, self.heads, transformer_options=options))


class MLP(nn.Module):
    """Two layers, applied to each token by itself."""

    def __init__(self, width: int, layers: Any, **kind: Any) -> None:
        super().__init__()
        self.fc1 = layers.Linear(width, MLP_RATIO * width, **kind)
        self.fc2 = layers.Linear(MLP_RATIO * width, width, **kind)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block, optionally with a skip connection.

    With ``keys`` its tokens attend, in one softmax, to themselves and to the text that it is given;
    with ``apart`` they attend to that text in a second attention.
    """

    def __init__(
        self,
        width: int,
        skip: bool,
        keys: bool,
        apart: bool,
        attend: Attend,
        layers: Any,
        **kind: Any,
    ) -> None:
        super().__init__()
        self.skip_linear = layers.Linear(2 * width, width, **kind) if skip else None
        self.norm1 = layers.LayerNorm(width, **kind)
        self.attn = Attention(width, keys, attend, layers, **kind)
        self.norm_cross = layers.LayerNorm(width, **kind) if apart else None
        self.cross = Attention(width, True, attend, layers, **kind) if apart else None
        self.norm2 = layers.LayerNorm(width, **kind)
        self.mlp = MLP(width, layers, **kind)

    def forward(
        self,
        x: Tensor,
        text: Tensor | None = None,
        skip: Tensor | None = None,
        transformer_options: Mapping[str, Any] | None = None,
    ) -> Tensor:
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat((x, skip), -1))
        keys = normed = self.norm1(x)
        if self.attn.is_cross and text is not None:
            keys = torch.cat((normed, self.norm1(text)), 1)
        x = x + self.attn(normed, keys, transformer_options)
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
    attend : callable
        See ``Attend``.
    layers : module
        Has Linear, Conv2d and LayerNorm: ``torch.nn``, or ComfyUI's ``operations``.
    device, dtype
        Of the weights.
    """

    def __init__(
        self,
        config: UViTConfig,
        attend: Attend = plain_attention,
        layers: Any = nn,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        self.patch_size = config.patch
        outer = config.image_blocks
        inner = config.blocks // 2 - outer
        is_cross, published = config.conditioning == "cross-attention", config.is_published

        def blocks(count: int, skip: bool = False, joint: bool = True) -> list[Block]:
            keys, apart = is_cross and not published, is_cross and published and joint
            how = config.width, skip, keys, apart, attend, layers
            return [Block(*how, **kind) for _ in range(count)]

        tokens = 1 + config.text_tokens + config.image_tokens
        self.patch_embed = PatchEmbed(config, layers, **kind)
        self.context_embed = layers.Linear(config.text_width, config.width, **kind)
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, config.width, **kind))
        before = blocks(outer, joint=False), blocks(inner)
        after = blocks(inner, skip=True), blocks(outer, skip=True, joint=False)
        if published:
            self.in_blocks = nn.ModuleList([*before[0], *before[1]])
            self.mid_block = blocks(1)[0]
            self.out_blocks = nn.ModuleList([*after[0], *after[1]])
        else:
            self.image_blocks, self.joint_blocks = map(nn.ModuleList, before)
            self.mid_block = blocks(1)[0]
            self.joint_skip_blocks, self.image_skip_blocks = map(nn.ModuleList, after)
        self.caption_blocks = nn.ModuleList(blocks(config.caption_blocks or 0))
        self.norm = layers.LayerNorm(config.width, **kind)
        self.decoder_pred = layers.Linear(config.width, config.channels * config.patch**2, **kind)
        self.final_layer = layers.Conv2d(config.channels, config.channels, 3, padding=1, **kind)
        if published and outer and not is_cross:
            # The other weights are those of early fusion: without it a file would be ambiguous.
            fused_blocks = torch.tensor([outer, config.blocks - 1 - outer], device=device)
            self.register_buffer("fused_blocks", fused_blocks)

    @property
    def blocks(self) -> list[Block]:
        """All blocks of the image, from the first to the last."""
        if self.config.is_published:
            found = *self.in_blocks, self.mid_block, *self.out_blocks
        else:
            before, after = (*self.image_blocks, *self.joint_blocks), self.joint_skip_blocks
            found = *before, self.mid_block, *after, *self.image_skip_blocks
        return cast(list[Block], list(found))

    @property
    def joint(self) -> list[Block] | None:
        """The blocks with text and image in one softmax; None if the text has one of its own."""
        config = self.config
        if config.is_published and config.conditioning == "cross-attention":
            return None
        return self.blocks[config.image_blocks : config.blocks - config.image_blocks]

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

        Raises ValueError if latents or prompts do not have the network's sizes.
        """
        config = self.config
        check_inputs(config, x, context)
        length = {"image": config.image_tokens, "time": 1, "text": config.text_tokens}
        order = ("time", "text", "image") if config.is_published else ("image", "time", "text")
        positions = self.pos_embed.to(x).split([length[kind] for kind in order], 1)
        pos = dict(zip(order, positions, strict=True))
        time = timestep_embedding(t, config.width).to(x)[:, None] + pos["time"]
        tokens = torch.cat((self.patch_embed(x) + pos["image"], time), 1)
        text = self.context_embed(context) + pos["text"]
        for block in self.caption_blocks:
            text = block(text, transformer_options=transformer_options)

        concatenates = config.conditioning == "concatenation"
        joins, leaves = config.image_blocks, config.blocks - config.image_blocks
        skips: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i == joins and concatenates:
                tokens = torch.cat((tokens, text), 1)
            elif i == leaves:
                tokens = tokens[:, : 1 + config.image_tokens]
            keys = text if joins <= i < leaves and not concatenates else None
            skip = skips.pop() if i > config.blocks // 2 else None
            tokens = block(tokens, keys, skip, transformer_options=transformer_options)
            if i < config.blocks // 2:
                skips.append(tokens)

        patches = self.decoder_pred(self.norm(tokens[:, : config.image_tokens]))
        grid, patch = config.side // config.patch, config.patch
        patches = patches.unflatten(2, (patch, patch, -1)).unflatten(1, (grid, grid))
        return self.final_layer(patches.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3))


def check_inputs(config: UViTConfig, x: Tensor, context: Tensor) -> None:
    """Raise a ValueError for latents or prompts that do not have the network's sizes."""
    side = config.side
    if tuple(x.shape[1:]) != (config.channels, side, side):
        pixels = f" ({8 * side} x {8 * side} pixels)" if config.channels == 4 else ""
        raise ValueError(
            f"This U-ViT draws latents of {config.channels} channels, {side} x {side}{pixels}, "
            f"not {' x '.join(map(str, x.shape[1:]))}, and no area of a picture by itself."
        )
    if tuple(context.shape[1:]) != (config.text_tokens, config.text_width):
        raise ValueError(
            f"This U-ViT reads prompts of {config.text_tokens} tokens of {config.text_width} "
            f"channels, not {context.shape[1]} of {context.shape[2]}: take the text encoder it "
            f"was trained with. Where there are too many tokens, write a shorter prompt, without "
            f"words to avoid, and take out Conditioning (Concat)."
        )
