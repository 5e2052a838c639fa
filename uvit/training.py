"""Training of a U-ViT as published: noise prediction, AdamW, warm-up, averaged weights. Pure torch.

The loss is E || eps - network(signal_t x_0 + noise_t eps, t, text) ||^2, with t uniform in 1 ...
1000 and eps standard normal.

A checkpoint is a safetensors file: the averaged weights under their own names, so that it loads as
a U-ViT, and besides them, under ``training.``, what it takes to resume.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import UViTConfig
from .data import TOLERANCE, Data
from .diffusion import TIMESTEPS, noise_levels
from .files import METADATA_KEY, TRAINING_PREFIX, metadata_of, read_config
from .network import UViT

log = logging.getLogger("uvit")

BETAS, WEIGHT_DECAY = (0.9, 0.9), 0.03
"""AdamW's, in the published training."""
MOMENTS = "exp_avg", "exp_avg_sq"
"""AdamW's state of a weight, besides the step."""
DIVERGED = (
    "Train U-ViT: the {} became NaN or infinite at step {}: lower the learning rate, or raise the "
    "warm-up, and begin with a new checkpoint."
)
UNREADABLE = SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError
"""What reading a damaged checkpoint, or another file, may raise."""


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults are the published values.

    Parameters
    ----------
    batch_size : int
        Pictures per step, drawn with replacement.
    learning_rate : float
        AdamW's, after the warm-up.
    warm_up : int
        Steps in which the learning rate rises linearly from 0.
    ema : float
        Decay of the weights' average per step; less in the first steps.
    p_uncond : float
        Share of pictures that get the empty prompt, for classifier-free guidance.
    bf16 : bool
        Whether the network computes in bfloat16; weights are float32 in any case.
    seed : int
        Of the first weights and of every step's draws.
    """

    batch_size: int = 256
    learning_rate: float = 2e-4
    warm_up: int = 5000
    ema: float = 0.9999
    p_uncond: float = 0.1
    bf16: bool = True
    seed: int = 0


class Training:
    """A training that resumes from its checkpoint.

    Parameters
    ----------
    config : UViTConfig
        Of the network.
    recipe : Recipe
    data : Data
    path : Path
        Of the checkpoint. If it exists, the training resumes from it.
    device
        Where to compute.

    Raises ValueError if the checkpoint is of another network, recipe or data, or cannot be read.
    """

    def __init__(
        self,
        config: UViTConfig,
        recipe: Recipe,
        data: Data,
        path: Path,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.recipe, self.data = config, recipe, data
        self.path, self.device = path, torch.device(device)
        generator = torch.Generator().manual_seed(recipe.seed)
        self.network = UViT(config).initialise(generator).to(self.device)
        self.weights = dict(self.network.named_parameters())
        self.average = {name: w.detach().clone() for name, w in self.weights.items()}
        self.optimiser = torch.optim.AdamW(
            self.weights.values(), betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
        )
        self.levels = noise_levels(self.device)
        self.step = 0
        self.losses: list[float] = []
        if path.exists():
            self._resume()

    def run(
        self, steps: int, checkpoint_every: int, after_step: Callable[[Training], None]
    ) -> None:
        """Train up to a number of steps.

        Parameters
        ----------
        steps : int
            In all, those before a resumption included.
        checkpoint_every : int
            Steps between two checkpoints. The last step, and one in which ``after_step`` raises,
            have one too.
        after_step : callable
            What it raises, such as ComfyUI's interrupt, ends the training.

        Raises RuntimeError if the training diverged; the last checkpoint stays as it is.
        """
        while self.step < steps:
            loss = self._train_step(self.step + 1)
            if not math.isfinite(loss):
                raise RuntimeError(DIVERGED.format("loss", self.step + 1))
            self.step += 1
            self.losses.append(loss)
            try:
                after_step(self)
            except BaseException:  # ComfyUI's interrupt is no Exception
                self.save()
                raise
            if self.step % checkpoint_every == 0 or self.step == steps:
                self.save()

    def _train_step(self, step: int) -> float:
        """One step of the weights and of their average; returns the loss."""
        recipe = self.recipe
        for group in self.optimiser.param_groups:
            warmed = min(1.0, step / recipe.warm_up) if recipe.warm_up else 1.0
            group["lr"] = recipe.learning_rate * warmed
        x, noise, t, context = self._batch(step)
        signal, share = (level[t - 1][:, None, None, None] for level in self.levels)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.bf16):
            predicted = self.network(signal * x + share * noise, t, context)
        loss = (predicted.float() - noise).square().mean()
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        # Follow the weights fast at first, so that the average of a short training is not stale.
        decay = min(recipe.ema, step / (step + 10))
        with torch.no_grad():
            for name, weight in self.weights.items():
                self.average[name].lerp_(weight, 1 - decay)
        return loss.item()

    def _batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents, noise, timesteps and text of a step."""
        data, count = self.data, self.recipe.batch_size
        # A generator per step, on the CPU: the same draws on any device, and after a resumption.
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + step)
        chosen = torch.randint(len(data.latents), (count,), generator=generator)
        t = torch.randint(1, TIMESTEPS + 1, (count,), generator=generator)
        is_empty = torch.rand(count, generator=generator) < self.recipe.p_uncond
        x = data.latents[chosen]
        noise = torch.randn(x.shape, generator=generator)
        context = torch.where(is_empty[:, None, None], data.empty, data.context[chosen])
        device = self.device
        return x.to(device), noise.to(device), t.to(device), context.to(device)

    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights, by name, as a U-ViT's file has them."""
        return {**self.network.state_dict(), **self.average}

    def save(self) -> None:
        """Write the checkpoint, completely or not at all.

        Raises RuntimeError if the training diverged.
        """
        if not all(bool(weight.isfinite().all()) for weight in self.average.values()):
            # The loss shows it a step later.
            raise RuntimeError(DIVERGED.format("network", self.step))
        state = self.averaged()
        for name, weight in self.weights.items():
            state[f"{TRAINING_PREFIX}weights.{name}"] = weight.detach()
            for moment in MOMENTS:
                if moment in self.optimiser.state[weight]:
                    value = self.optimiser.state[weight][moment]
                    state[f"{TRAINING_PREFIX}{moment}.{name}"] = value
        state[f"{TRAINING_PREFIX}losses"] = torch.tensor(self.losses)
        for name, samples in self.data.samples().items():
            state[f"{TRAINING_PREFIX}data.{name}"] = samples
        scale, recipe = self.data.latent_scale, asdict(self.recipe)
        metadata = metadata_of(self.config, scale, step=self.step, recipe=recipe)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        save_file({k: w.cpu().contiguous() for k, w in state.items()}, new, metadata)
        new.replace(self.path)

    def _resume(self) -> None:
        """Resume from the checkpoint; raises ValueError if it is not of this training."""
        advice = "give another name for the checkpoint, or take this file away."
        try:
            with safe_open(self.path, "pt", device=str(self.device)) as file:
                description = json.loads(file.metadata()[METADATA_KEY])
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                network = {k: w for k, w in state.items() if not k.startswith(TRAINING_PREFIX)}
                config, _ = read_config(network, file.metadata(), self.path.name)
            differences = self._differences(description, config, state)
            if not differences:
                self._take_over(description["step"], state)
        except UNREADABLE as error:
            raise ValueError(
                f"{self.path.name} is not a checkpoint that this training can resume from "
                f"({type(error).__name__}: {error}): {advice}"
            ) from error
        if differences:
            raise ValueError(
                f"{self.path.name} was trained differently: {'; '.join(differences)}. To resume, "
                f"give the same settings and data; to start over, {advice}"
            )

    def _take_over(self, step: int, state: dict[str, Tensor]) -> None:
        """The step, losses, weights, their average and AdamW's moments of a checkpoint."""
        self.step, self.losses = step, state[f"{TRAINING_PREFIX}losses"].tolist()
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(state[f"{TRAINING_PREFIX}weights.{name}"])
                self.average[name].copy_(state[name])
                if step:
                    moments = {m: state[f"{TRAINING_PREFIX}{m}.{name}"] for m in MOMENTS}
                    count = torch.tensor(float(step), device=self.device)
                    self.optimiser.state[weight] = {"step": count, **moments}

    def _differences(
        self, description: dict[str, Any], config: UViTConfig, state: dict[str, Tensor]
    ) -> list[str]:
        """The settings and data that differ from a checkpoint's, in words."""
        differences = []
        part = f"{TRAINING_PREFIX}data."
        samples = {k.removeprefix(part): v.cpu() for k, v in state.items() if k.startswith(part)}
        if samples:
            differences += self.data.differences(samples)
        else:
            log.warning(
                f"{self.path.name} is of an earlier version: whether it was trained on these "
                f"pictures is not checked."
            )
        recipe = description["recipe"]
        differences += [
            f"{key} {recipe.get(key)}, now {value}"
            for key, value in asdict(self.recipe).items()
            if recipe.get(key) != value
        ]
        old_scale, scale = description["latent_scale"], self.data.latent_scale
        if not math.isclose(old_scale, scale, rel_tol=TOLERANCE):
            differences.append(f"latent_scale {old_scale}, now {scale}")
        now = asdict(self.config)
        network = [
            f"{key} {old}, now {now[key]}" for key, old in asdict(config).items() if old != now[key]
        ]
        if network:
            differences.append(f"another network ({', '.join(network)})")
        return differences
