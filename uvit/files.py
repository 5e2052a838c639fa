"""What a file of a U-ViT says about it: all in its keys and metadata, nothing is asked."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .network import PUBLISHED_TEXT_TOKENS, Sizes

METADATA_KEY = "uvit"
TRAINING = "training."
"""Begins the keys of what a checkpoint has beside the averaged weights, to go on training."""
PUBLISHED_LATENT_SCALE = 0.23010
"""Latents of Stable Diffusion's VAE times this are what the published U-ViT knows. (The scale of
Stable Diffusion 1 is another, 0.18215.)"""

_AGAIN = "Download it again, or take the file that Save U-ViT wrote."
_READ_HERE = {
    "pos_embed": 3, "patch_embed.proj.weight": 4, "context_embed.weight": 2,
    "decoder_pred.weight": 2,
}  # fmt: skip
_OF_A_BLOCK = re.compile(
    r"(in_blocks\.\d+|mid_block|out_blocks\.\d+)\.(norm1|attn|norm2|mlp|skip_linear)\."
)


def metadata_of(sizes: Sizes, latent_scale: float, **more: Any) -> dict[str, str]:
    """Metadata for a safetensors file, for ``read_sizes``: what keys cannot say, and for people.

    Parameters
    ----------
    sizes : Sizes
    latent_scale : float
        What latents are multiplied with on their way into the network.
    more
        What else is worth knowing, such as the steps of the training.
    """
    said = {
        "text_tokens": sizes.text_tokens,
        "latent_scale": latent_scale,
        "conditioning": sizes.conditioning,
        "fused_blocks": [sizes.first, sizes.last],
        **more,
    }
    return {"format": "pt", METADATA_KEY: json.dumps(said)}


def read_sizes(
    state: Mapping[str, Tensor], metadata: Mapping[str, str] | None, name: str
) -> tuple[Sizes, float]:
    """The sizes and the latent scale of a U-ViT's weights.

    Parameters
    ----------
    state : dict
        The weights, by their published names.
    metadata : dict, optional
        Of a safetensors file. Without, text is CLIP's 77 tokens, and the latent scale is the
        published one.
    name : str
        Of the file, for messages.

    Raises
    ------
    ValueError
        If these are not all weights of a U-ViT, or do not fit together.
    """
    if not any(_OF_A_BLOCK.match(key) for key in state):
        parts = sorted({key.partition(".")[0] for key in state})
        more = " ..." if len(parts) > 6 else ""
        raise ValueError(
            f"{name} is not a U-ViT: it has no in_blocks, mid_block and out_blocks, but "
            f"{', '.join(parts[:6]) or 'nothing'}{more}. For other models take ComfyUI's Load "
            f"Diffusion Model or Load Checkpoint."
        )
    if "label_emb.weight" in state and "context_embed.weight" not in state:
        raise ValueError(
            f"{name} is a U-ViT that draws classes (label_emb) and reads no text: take one for "
            f"text, such as mscoco_uvit_small.pth."
        )
    for key, axes in _READ_HERE.items():
        if key not in state:
            raise ValueError(
                f"{name} is not a whole U-ViT that reads text: it lacks {key}. {_AGAIN}"
            )
        if state[key].ndim != axes:
            raise ValueError(
                f"{name} is not a whole U-ViT: {key} has {state[key].ndim} axes and not {axes}. "
                f"{_AGAIN}"
            )
    try:
        said = json.loads((metadata or {}).get(METADATA_KEY, "{}"))
        text_tokens = int(said.get("text_tokens", PUBLISHED_TEXT_TOKENS))
        latent_scale = float(said.get("latent_scale", PUBLISHED_LATENT_SCALE))
        if not 0 < latent_scale < math.inf:
            raise ValueError(f"a latent scale of {latent_scale}")
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"The metadata of {name} cannot be read: {error}. {_AGAIN}") from error

    width, channels, patch = (state["patch_embed.proj.weight"].shape[i] for i in (0, 1, 2))
    image_tokens = state["pos_embed"].shape[1] - 1 - text_tokens
    grid = math.isqrt(max(image_tokens, 0))
    if grid < 1 or grid**2 != image_tokens:
        raise ValueError(
            f"{name} has {state['pos_embed'].shape[1]} positions, which are not those of a time, "
            f"{text_tokens} text tokens and a square image. The metadata that Save U-ViT writes "
            f"would say how long its text is: save it with that node."
        )
    blocks = 1 + _count(state, "in_blocks", name) + _count(state, "out_blocks", name)
    with_cross = [i for i in range(blocks) if f"{_block(i, blocks)}.cross.q.weight" in state]
    if with_cross:
        fused = with_cross[0], with_cross[-1]
    else:
        fused = tuple(state["fused_blocks"].flatten().tolist()) if "fused_blocks" in state else (
            0, blocks - 1,
        )  # fmt: skip
        if len(fused) != 2 or not all(float(block).is_integer() for block in fused):
            raise ValueError(
                f"{name} is not a whole U-ViT: fused_blocks, the first and the last block with "
                f"text, is {fused}. {_AGAIN}"
            )
    try:
        sizes = Sizes(
            blocks=blocks,
            width=width,
            channels=channels,
            side=grid * patch,
            patch=patch,
            text_tokens=text_tokens,
            text_width=state["context_embed.weight"].shape[1],
            first=fused[0],
            last=fused[1],
            conditioning="cross-attention" if with_cross else "concatenation",
        )
    except ValueError as error:
        raise ValueError(f"{name} is not a whole U-ViT: {error} {_AGAIN}") from error
    return sizes, latent_scale


def check_weights(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], name: str) -> None:
    """Refuse weights that are not, one for one, those of the network built for them."""
    missing = sorted(expected.keys() - state.keys())
    unknown = sorted(state.keys() - expected.keys())
    other = sorted(
        key for key in expected.keys() & state.keys() if state[key].shape != expected[key].shape
    )
    whole = sorted(
        key for key, value in expected.items()
        if value.is_floating_point() and key in state and not state[key].is_floating_point()
    )  # fmt: skip
    for what, keys in (
        ("lacks", missing), ("has, beside a U-ViT's weights,", unknown),
        ("has in another shape", other), ("has not as numbers with a fraction", whole),
    ):  # fmt: skip
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(
                f"{name} is not a whole U-ViT: it {what} {', '.join(keys[:3])}{more}. {_AGAIN}"
            )


def _count(state: Mapping[str, Tensor], part: str, name: str) -> int:
    """How many blocks a part has, by their numbers; none may be left out."""
    matches = [re.match(rf"{part}\.(\d+)\.", key) for key in state]
    numbers = {int(found[1]) for found in matches if found}
    for i in range(len(numbers)):
        if i not in numbers:
            raise ValueError(f"{name} is not a whole U-ViT: it lacks {part}.{i}. {_AGAIN}")
    return len(numbers)


def _block(i: int, blocks: int) -> str:
    """The name of block i in the keys."""
    half = blocks // 2
    if i == half:
        return "mid_block"
    return f"in_blocks.{i}" if i < half else f"out_blocks.{i - half - 1}"
