"""How a U-ViT is described by its file: by the shapes of its weights and by metadata."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from .config import PUBLISHED_TEXT_TOKENS, UViTConfig

METADATA_KEY = "uvit"
TRAINING_PREFIX = "training."
"""Prefix of the keys of what a checkpoint holds, besides the averaged weights, to resume from."""
PUBLISHED_LATENT_SCALE = 0.23010
"""The published U-ViT reads latents of Stable Diffusion's VAE times this, not the 0.18215 of Stable
Diffusion 1."""

_REMEDY = "Download it again, or take the file that Save U-ViT wrote."
_NDIM = {
    "pos_embed": 3,
    "patch_embed.proj.weight": 4,
    "context_embed.weight": 2,
    "decoder_pred.weight": 2,
}
"""Axes of the weights that every U-ViT for text has."""
_BLOCK_KEY = re.compile(r"(|.*\.)mid_block\.(norm1|attn|norm2|mlp)\.")
_AVERAGED = re.compile(r"(.*[._])?ema[._].*")
"""Prefixes of averaged weights, where a file holds those beside the others."""
DESCRIBED = "text_tokens", "latent_scale"
"""What the weights do not tell: in a file's metadata, or as tensors where ComfyUI's own nodes saved
the model, which write no metadata of others."""


def metadata_of(config: UViTConfig, latent_scale: float, **more: Any) -> dict[str, str]:
    """Metadata for a safetensors file: what ``read_config`` cannot tell from the weights.

    The network reads latents multiplied by ``latent_scale``. ``more`` is anything else to keep, as
    JSON, such as the steps of the training.
    """
    description = {"text_tokens": config.text_tokens, "latent_scale": latent_scale, **more}
    return {"format": "pt", METADATA_KEY: json.dumps(description)}


def weights_of(state: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """The weights of the U-ViT in a file's content, by their own names.

    They may be in dictionaries or under a prefix, as training scripts and ComfyUI write them. Of
    two sets of weights that is taken which ``ema`` names as averaged.

    Raises ValueError if it does not show which of several sets to take.
    """
    tensors = {k: w for k, w in _flat(state) if not k.startswith(TRAINING_PREFIX)}
    prefixes = sorted(each for each in _prefixes(tensors) if f"{each}pos_embed" in tensors)
    averaged = [prefix for prefix in prefixes if _AVERAGED.fullmatch(prefix)]
    if prefixes in ([], [""]):
        return tensors
    if len(prefixes) > 1 and len(averaged) != 1:
        raise ValueError(
            f"{name} holds several U-ViTs, under {', '.join(p or 'no prefix' for p in prefixes)}: "
            f"save the one to load in a file of its own."
        )
    prefix = prefixes[0] if len(prefixes) == 1 else averaged[0]
    return {k.removeprefix(prefix): w for k, w in tensors.items() if k.startswith(prefix)}


def _prefixes(state: Iterable[str]) -> set[str]:
    """What stands before the names of middle blocks of a U-ViT's kind."""
    return {found[1] for key in state if (found := _BLOCK_KEY.match(key))}


def _flat(state: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in dictionaries in one another; names are joined by dots."""
    for key, value in state.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")


def read_config(
    state: Mapping[str, Tensor], metadata: Mapping[str, str] | None, name: str
) -> tuple[UViTConfig, float]:
    """The config and the latent scale of a U-ViT's weights.

    ``state`` has the weights by their published names, and may have ``DESCRIBED``; ``metadata`` is
    the safetensors file's. Without both text has CLIP's 77 tokens, and the latent scale is the
    published one. ``name`` is the file's, for messages.

    Raises ValueError if these are not all the weights of a U-ViT, or do not fit together.
    """
    _check_kind(state, name)
    text_tokens, latent_scale = _read_description(state, metadata, name)
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    positions = state["pos_embed"].shape[1]
    image_tokens = positions - 1 - text_tokens
    grid = math.isqrt(max(image_tokens, 0))
    if grid < 1 or grid**2 != image_tokens:
        raise ValueError(
            f"{name} has {positions} positions, which are not those of a time, {text_tokens} text "
            f"tokens and a square image. The metadata that Save U-ViT writes would say how long "
            f"its text is: save it with that node."
        )
    blocks = _blocks_of(state, name)
    try:
        config = UViTConfig(
            **blocks,
            width=width,
            channels=channels,
            side=grid * patch,
            patch=patch,
            text_tokens=text_tokens,
            text_width=state["context_embed.weight"].shape[1],
        )
    except ValueError as error:
        raise ValueError(f"{name} is not a complete U-ViT: {error} {_REMEDY}") from error
    return config, latent_scale


def check_weights(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], name: str) -> None:
    """Raise a ValueError for weights of other names, shapes or types, or of NaN or infinity."""
    common = expected.keys() & state.keys()
    floats = {key for key in common if expected[key].is_floating_point()}
    problems = {
        "lacks": expected.keys() - state.keys(),
        "has, beside a U-ViT's weights,": state.keys() - expected.keys(),
        "has in another shape": {k for k in common if state[k].shape != expected[k].shape},
        "has in a type that is not floating-point": {
            k for k in floats if not state[k].is_floating_point()
        },
        "has NaN or infinity in": {
            k
            for k in common
            if state[k].is_floating_point() and not state[k].float().isfinite().all()
        },
    }
    for problem, keys in problems.items():
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(
                f"{name} is not a complete U-ViT: it {problem} {', '.join(sorted(keys)[:3])}{more}."
                f" {_REMEDY}"
            )


def _check_kind(state: Mapping[str, Tensor], name: str) -> None:
    """Raise a ValueError if these are the weights of another kind of model."""
    if "" not in _prefixes(state):
        parts = sorted({key.partition(".")[0] for key in state})
        more = " ..." if len(parts) > 6 else ""
        raise ValueError(
            f"{name} is not a U-ViT: it has no mid_block of its kind, but "
            f"{', '.join(parts[:6]) or 'nothing'}{more}. For other models take ComfyUI's Load "
            f"Diffusion Model or Load Checkpoint."
        )
    if "label_emb.weight" in state and "context_embed.weight" not in state:
        raise ValueError(
            f"{name} is a U-ViT that draws classes (label_emb) and reads no text: take one for "
            f"text, such as mscoco_uvit_small.pth."
        )
    for key, ndim in _NDIM.items():
        if key not in state:
            raise ValueError(
                f"{name} is not a complete U-ViT that reads text: it lacks {key}. {_REMEDY}"
            )
        if state[key].ndim != ndim:
            raise ValueError(
                f"{name} is not a complete U-ViT: {key} has {state[key].ndim} axes and not "
                f"{ndim}. {_REMEDY}"
            )


def _read_description(
    state: Mapping[str, Tensor], metadata: Mapping[str, str] | None, name: str
) -> tuple[int, float]:
    """Number of text tokens and latent scale; the published ones where the file does not say."""
    try:
        saved = {key: state[key].item() for key in DESCRIBED if key in state}
        description = saved | json.loads((metadata or {}).get(METADATA_KEY, "{}"))
        text_tokens = int(description.get("text_tokens", PUBLISHED_TEXT_TOKENS))
        latent_scale = float(description.get("latent_scale", PUBLISHED_LATENT_SCALE))
        if not 0 < latent_scale < math.inf:
            raise ValueError(f"a latent scale of {latent_scale}")
    except (ValueError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
        raise ValueError(f"The metadata of {name} cannot be read: {error}. {_REMEDY}") from error
    return text_tokens, latent_scale


def _blocks_of(state: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """How many blocks there are of each kind, and how text joins: fields of a config."""
    captions, outer, inner = (
        _count(state, part, name) for part in ("caption_blocks", "image_blocks", "joint_blocks")
    )
    half, is_cross = outer + inner, "mid_block.attn.q.weight" in state
    is_published = not (captions or half or is_cross)
    if is_published:
        half, is_cross = _count(state, "in_blocks", name), "mid_block.cross.q.weight" in state
        crossed = sum(f"in_blocks.{i}.cross.q.weight" in state for i in range(half))
        outer = half - crossed if is_cross else _outer_of(state, half, name)
    return {
        "blocks": 1 + 2 * half,
        "image_blocks": outer,
        "caption_blocks": None if is_published else captions,
        "conditioning": "cross-attention" if is_cross else "concatenation",
    }


def _outer_of(state: Mapping[str, Tensor], half: int, name: str) -> int:
    """Blocks at each end without text by concatenation; 0 where the file does not say."""
    if "fused_blocks" not in state:
        return 0
    fused = state["fused_blocks"].flatten().tolist()
    for outer in range(half + 1):
        if fused == [outer, 2 * half - outer] and not state["fused_blocks"].is_complex():
            return outer
    raise ValueError(
        f"{name} is not a complete U-ViT: fused_blocks, the first and the last block with text, is "
        f"{fused}, and not the ends of its central blocks. {_REMEDY}"
    )


def _count(state: Mapping[str, Tensor], part: str, name: str) -> int:
    """Number of blocks of a part; raises a ValueError if one is left out."""
    numbers = {key.split(".")[1] for key in state if key.startswith(f"{part}.")}
    for i in range(len(numbers)):
        if str(i) not in numbers:
            raise ValueError(f"{name} is not a complete U-ViT: it lacks {part}.{i}. {_REMEDY}")
    return len(numbers)
