"""From the inputs of Train U-ViT to a training."""

import re
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor

from ..taca.words import WORDS_KEY
from .config import UViTConfig, outside
from .data import Data
from .files import PUBLISHED_LATENT_SCALE
from .training import Recipe, Training


def training_of(
    latents: list[io.Latent.Type],
    positive: list[io.Conditioning.Type],
    negative: list[io.Conditioning.Type],
    settings: dict[str, Any],
) -> Training:
    """The training that the inputs of Train U-ViT describe, resumed if it has a checkpoint.

    Raises ValueError if the inputs do not fit together, or the checkpoint does not fit them.
    """
    images, context, empty = data_of(latents, positive, negative)
    config = config_of(settings, images, context)
    recipe = Recipe(
        batch_size=settings["batch_size"],
        learning_rate=settings["learning_rate"],
        warm_up=settings["warm_up"],
        ema=settings["ema"],
        p_uncond=settings["p_uncond"],
        bf16=settings["precision"] == "bf16",
        seed=settings["seed"],
    )
    path = checkpoint_path(settings["checkpoint"])
    # Stable Diffusion's VAE gets the published scale; others a standard deviation of 1.
    published = config.channels == 4
    scale = PUBLISHED_LATENT_SCALE if published else round(1 / images.std().item(), 4)
    data = Data(images * scale, context, empty, scale)
    comfy.model_management.unload_all_models()
    device = comfy.model_management.get_torch_device()
    training = Training(config, recipe, data, path, device)
    if training.step > settings["steps"]:
        raise ValueError(
            f"Train U-ViT: {path.name} has {training.step} steps already: ask for more than that, "
            f"or give another name for the checkpoint."
        )
    return training


def config_of(settings: dict[str, Any], images: Tensor, context: Tensor) -> UViTConfig:
    """The network that the settings describe, for these latents and captions."""
    blocks, joined = settings["blocks"], settings["text_blocks"]
    captions = None
    if settings["fusion"] == "two streams":
        outer, captions = settings["image_blocks"], settings["caption_blocks"]
    elif settings["fusion"] == "early":
        outer = outside(blocks, blocks)
    elif joined > blocks:
        raise ValueError(
            f"Train U-ViT: text_blocks is {joined}, and the network has {blocks} blocks. Take at "
            f"most {blocks}, or more blocks."
        )
    else:
        outer = outside(blocks, joined)
    return UViTConfig(
        blocks=blocks,
        width=settings["width"],
        channels=images.shape[1],
        side=images.shape[2],
        text_tokens=context.shape[1],
        text_width=context.shape[2],
        image_blocks=outer,
        caption_blocks=captions,
        conditioning=settings["conditioning"],
    )


def checkpoint_path(name: str) -> Path:
    """The checkpoint of this name in ComfyUI's output folder."""
    name = name.strip()
    if not re.fullmatch(r"[\w\- ]+", name):
        raise ValueError(
            f"Train U-ViT: {name!r} is no name for a checkpoint; take letters, digits, - and _."
        )
    return Path(folder_paths.get_output_directory(), "uvit", f"{name}.safetensors")


def data_of(
    latents: list[io.Latent.Type],
    positive: list[io.Conditioning.Type],
    negative: list[io.Conditioning.Type],
) -> tuple[Tensor, Tensor, Tensor]:
    """Unscaled latents, captions and the empty prompt of datasets, with the shapes of ``Data``."""
    samples = [latent["samples"] for latent in latents]
    shapes = {("nested",) if s.is_nested else tuple(s.shape[1:]) for s in samples}
    if len(shapes) > 1 or any(len(s) != 3 or s[1] != s[2] for s in shapes):
        found = ", ".join(sorted(" x ".join(map(str, shape)) for shape in shapes))
        raise ValueError(
            f"Train U-ViT takes square pictures of one size; these latents are {found}. Resize and "
            f"crop the pictures before you encode them."
        )
    images = _joined("pictures", samples)
    if images.shape[-1] % 2:
        raise ValueError(
            f"Train U-ViT puts 2 x 2 latents into a token, and these are {images.shape[-1]} "
            f"wide: with Stable Diffusion's VAE pictures must be a multiple of 16 wide."
        )
    if bool((images == images[0, 0, 0, 0]).all()):
        raise ValueError(
            "Train U-ViT: all numbers of the latents are equal, as in an empty latent. Connect "
            "pictures that a VAE has encoded."
        )
    captions = [text for conditioning in positive for text, _ in conditioning]
    empty = [text for conditioning in negative for text, _ in conditioning]
    lengths = {tuple(text.shape[1:]) for text in (*captions, *empty)}
    if len(lengths) > 1:
        found = ", ".join(sorted(f"{tokens} x {width}" for tokens, width in lengths))
        raise ValueError(
            f"Train U-ViT takes prompts of one length, the empty one too; these are {found} "
            f"(tokens x channels). Shorten the captions to CLIP's 77 tokens."
        )
    context, nothing = _joined("captions", captions), _joined("empty prompts", empty)
    if not torch.equal(nothing, nothing[:1].expand_as(nothing)):
        raise ValueError(
            f"Train U-ViT takes one empty prompt, and negative has {len(nothing)} different ones: "
            f"connect that of an empty text alone."
        )
    if len(context) == 1:
        context = context.expand(len(images), -1, -1)
    if len(context) != len(images):
        raise ValueError(
            f"Train U-ViT got {len(images)} pictures and {len(context)} captions: each picture "
            f"needs its own, in the same order."
        )
    return images, context, nothing[:1]


def has_weights(conditionings: list[io.Conditioning.Type]) -> bool:
    """Whether a prompt has word weights."""
    entries = [extras for conditioning in conditionings for _, extras in conditioning]
    return any(WORDS_KEY in each and each[WORDS_KEY].has_weights for each in entries)


def _joined(what: str, parts: list[Tensor]) -> Tensor:
    """All rows in float32 on the CPU; raises ValueError if there are none, or not all finite."""
    if not sum(map(len, parts)):
        raise ValueError(f"Train U-ViT got no {what}: connect at least one.")
    joined = torch.cat(parts).float().cpu().clone()
    broken = (~joined.flatten(1).isfinite().all(1)).nonzero().flatten() + 1
    if len(broken):
        raise ValueError(
            f"Train U-ViT: of {len(joined)} {what} {len(broken)} hold NaN or infinity, the first "
            f"is number {int(broken[0])}. Encode them again; a VAE that overflows in half "
            f"precision does not with ComfyUI's --fp32-vae."
        )
    return joined
