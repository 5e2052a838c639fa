"""A trained model of the demo's world, through ComfyUI's own loader and sampler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.sd
import numpy as np
import torch
import world
from codec import CHANNELS, PATCH, Codec
from trainer import tokens_of

import nodes


class Subject:
    """A model, its codec and how it reads a caption; both files by the first part of their names.

    Parameters
    ----------
    files, codec : Path
        Without ``_mmdit.safetensors`` and ``_codec.safetensors``.
    dtype : torch.dtype, optional
        To compute in; ComfyUI's choice if it is not given.
    """

    def __init__(self, files: Path, codec: Path, dtype: torch.dtype | None = None) -> None:
        training = json.loads(files.with_name(f"{files.name}.json").read_text())["training"]
        self.text, self.size = training.get("text", "words"), training.get("size", world.SIZE)
        self.codec = Codec.load(codec.with_name(f"{codec.name}_codec.safetensors"))
        self.path = files.with_name(f"{files.name}_mmdit.safetensors")
        self.model = comfy.sd.load_diffusion_model(str(self.path))
        if dtype:
            self.model.set_model_compute_dtype(dtype)
        self.tokens = (self.size // (2 * PATCH)) ** 2

    def condition(self, captions: list[str]) -> list[Any]:
        """ComfyUI's conditioning of some captions."""
        pooled = {"pooled_output": torch.zeros(len(captions), 1)}
        return [[self.codec.embed(tokens_of(captions, self.text)), pooled]]

    def sample(
        self,
        model: Any,
        captions: list[str],
        seed: int,
        cfg: float,
        steps: int = 28,
        scheduler: str = "simple",
    ) -> torch.Tensor:
        """Latents of the captions, by this model or one made of it."""
        side = self.size // PATCH
        latent = {"samples": torch.zeros(len(captions), CHANNELS, side, side)}
        texts = self.condition(captions), self.condition([""])
        (latent,) = nodes.common_ksampler(
            model, seed, steps, cfg, "euler", scheduler, *texts, latent
        )
        return latent["samples"].float().cpu()

    def draw(self, model: Any, *how: Any) -> np.ndarray:
        """Pictures of what ``sample`` is asked for."""
        return self.codec.decode(self.sample(model, *how)).numpy()
