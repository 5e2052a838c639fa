"""Training of a U-ViT as published: noise prediction, AdamW, warm-up, averaged weights. Pure torch.

    E_{x0, ε, t} || ε - ε_θ(signal_t x0 + noise_t ε, t, text) ||²,   t uniform in 1 ... 1000

A checkpoint is a safetensors file: the averaged weights under their own names, so that it loads as
a U-ViT, and beside them, under ``training.``, what it takes to go on.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import METADATA_KEY, TRAINING, metadata_of
from .network import TIMESTEPS, Sizes, UViT, noise_levels

log = logging.getLogger("uvit")

BETAS, WEIGHT_DECAY = (0.9, 0.9), 0.03  # of the published training


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults are the published values.

    Parameters
    ----------
    batch_size : int
        Pictures a step, drawn anew in every step.
    learning_rate : float
        Of AdamW, after the warm-up.
    warm_up : int
        Steps in which the learning rate rises from 0.
    ema : float
        How much of the average stays in a step; less in the first steps.
    p_uncond : float
        Share of pictures that get the empty prompt, for classifier-free guidance.
    bf16 : bool
        Whether the network computes in bfloat16; weights are float32 in any case.
    seed : int
        Of the first weights and of every draw.
    """

    batch_size: int = 256
    learning_rate: float = 2e-4
    warm_up: int = 5000
    ema: float = 0.9999
    p_uncond: float = 0.1
    bf16: bool = True
    seed: int = 0


@dataclass
class Data:
    """What to train on.

    Parameters
    ----------
    latents : Tensor
        As the network knows them, ``(pictures, channels, side, side)``.
    context : Tensor
        Encoded captions in the same order, ``(pictures, text_tokens, text_width)``.
    empty : Tensor
        The encoded empty prompt, ``(1, text_tokens, text_width)``.
    latent_scale : float
        What the latents were multiplied with, to be kept in the file.
    """

    latents: Tensor
    context: Tensor
    empty: Tensor
    latent_scale: float

    def sketch(self) -> dict[str, list[float]]:
        """A few numbers of each part, by which ``differences`` knows it again.

        Not a hash of its bits: pictures encoded anew on another GPU differ in the last ones.
        """
        drawn = torch.Generator().manual_seed(0)
        numbers = {}
        for name in PARTS:
            x = getattr(self, name).flatten(1)
            x = x[:1] if x.stride(0) == 0 else x  # one caption of all pictures: no copies of it
            rows, columns = (torch.randn(4, n, generator=drawn) for n in x.shape)
            size = x.norm().item()
            along = ((rows @ x) * columns).sum(1) / (size or 1.0)
            numbers[name] = [*getattr(self, name).shape, size, *along.tolist()]
        return numbers


PARTS = {
    "latents": "other pictures", "context": "other captions", "empty": "another empty prompt",
}  # fmt: skip


def differences(there: dict[str, list[float]], here: dict[str, list[float]]) -> list[str]:
    """Which parts two sketches tell apart, in words."""
    return [
        words for name, words in PARTS.items()
        if len(there[name]) != len(here[name]) or not all(
            math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-3)
            for a, b in zip(there[name], here[name], strict=True)
        )
    ]  # fmt: skip


class Training:
    """A training that goes on where it was left.

    Parameters
    ----------
    sizes : Sizes
        Of the network.
    recipe : Recipe
    data : Data
    path : Path
        Of the checkpoint. If there is one, the training goes on from it.
    device
        Where to compute.

    Raises
    ------
    ValueError
        If the checkpoint is of another network, recipe or data, or cannot be read.
    """

    def __init__(
        self, sizes: Sizes, recipe: Recipe, data: Data, path: Path, device: Any = "cpu"
    ) -> None:
        self.sizes, self.recipe, self.data = sizes, recipe, data
        self.path, self.device = path, torch.device(device)
        self.sketch = data.sketch()
        generator = torch.Generator().manual_seed(recipe.seed)
        self.network = UViT(sizes).initialise(generator).to(self.device)
        self.weights = dict(self.network.named_parameters())
        self.average = {name: w.detach().clone() for name, w in self.weights.items()}
        self.optimiser = torch.optim.AdamW(
            self.weights.values(), recipe.learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY,
            fused=True,
        )  # fmt: skip
        self.levels = noise_levels(self.device)
        self.step = 0
        self.losses: list[float] = []
        if path.exists():
            self._resume()

    def run(self, steps: int, every: int, watch: Callable[[Training], None]) -> None:
        """Train up to a number of steps.

        Parameters
        ----------
        steps : int
            In all, those before a resumption included.
        every : int
            Steps between two checkpoints. There is one at the end too, and where ``watch`` raises.
        watch : callable
            Called after every step. What it raises ends the training.

        Raises
        ------
        RuntimeError
            If the training diverged; the last checkpoint stays as it is.
        """
        while self.step < steps:
            loss = self._train_step(self.step + 1)
            if not math.isfinite(loss):
                raise RuntimeError(
                    f"The loss is no number any more at step {self.step + 1}: lower the learning "
                    f"rate, or raise the warm-up, and begin with a new checkpoint."
                )
            self.step += 1
            self.losses.append(loss)
            try:
                watch(self)
            except BaseException:  # as ComfyUI's interrupt is
                self.save()
                raise
            if self.step % every == 0 or self.step == steps:
                self.save()

    def _train_step(self, step: int) -> float:
        recipe, data = self.recipe, self.data
        # A step's own generator, on the CPU: the same draws on any device, and when resumed.
        drawn = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        chosen = torch.randint(len(data.latents), (recipe.batch_size,), generator=drawn)
        t = torch.randint(1, TIMESTEPS + 1, (recipe.batch_size,), generator=drawn)
        is_empty = torch.rand(recipe.batch_size, generator=drawn) < recipe.p_uncond
        x = data.latents[chosen]
        noise = torch.randn(x.shape, generator=drawn)
        context = torch.where(is_empty[:, None, None], data.empty, data.context[chosen])
        x, noise, t, context = (z.to(self.device) for z in (x, noise, t, context))

        for group in self.optimiser.param_groups:
            warm = min(1.0, step / recipe.warm_up) if recipe.warm_up else 1.0
            group["lr"] = recipe.learning_rate * warm
        signal, share = (level[t - 1][:, None, None, None] for level in self.levels)
        reduced = torch.autocast(self.device.type, torch.bfloat16) if recipe.bf16 else nullcontext()
        with reduced:
            predicted = self.network(signal * x + share * noise, t, context)
        loss = (predicted.float() - noise).square().mean()
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        # A young average follows fast, so that a short training has one too.
        decay = min(recipe.ema, step / (step + 10))
        with torch.no_grad():
            for name, weight in self.weights.items():
                self.average[name].lerp_(weight, 1 - decay)
        return loss.item()

    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights, by name, as a U-ViT's file has them."""
        return {**self.network.state_dict(), **self.average}

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        tensors = {name: w.detach() for name, w in self.weights.items()}
        state = dict(self.averaged())
        state |= {f"{TRAINING}weights.{name}": w for name, w in tensors.items()}
        for name, weight in self.weights.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment in self.optimiser.state[weight]:
                    state[f"{TRAINING}{moment}.{name}"] = self.optimiser.state[weight][moment]
        state[f"{TRAINING}losses"] = torch.tensor(self.losses)
        metadata = metadata_of(
            self.sizes, self.data.latent_scale, step=self.step, recipe=asdict(self.recipe),
            data=self.sketch,
        )  # fmt: skip
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        save_file({k: w.cpu().contiguous() for k, w in state.items()}, new, metadata)
        new.replace(self.path)

    def _resume(self) -> None:
        way_out = "give another name for the checkpoint, or take this file away."
        try:
            with safe_open(self.path, "pt", device=str(self.device)) as file:
                said = json.loads(file.metadata()[METADATA_KEY])
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            recipe, self.step = said["recipe"], said["step"]
            was = {name: state.pop(f"{TRAINING}weights.{name}") for name in self.weights}
            average = {name: state.pop(name) for name in self.weights}
            moments = {
                (moment, name): state.pop(f"{TRAINING}{moment}.{name}")
                for moment in ("exp_avg", "exp_avg_sq") if self.step for name in self.weights
            }  # fmt: skip
            self.losses = state[f"{TRAINING}losses"].tolist()
            other = differences(said["data"], self.sketch) if "data" in said else []
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.path.name} is not a checkpoint that this training can go on from "
                f"({type(error).__name__}: {error}): {way_out}"
            ) from error
        if "data" not in said:
            log.warning(
                f"{self.path.name} is of an earlier version and does not say what it was trained "
                f"on: the training goes on with these pictures."
            )
        other += [
            f"{key} {recipe.get(key)} there and {value} here"
            for key, value in asdict(self.recipe).items()
            if recipe.get(key) != value
        ]
        scale, was_scale = self.data.latent_scale, said["latent_scale"]
        if not math.isclose(scale, was_scale, rel_tol=1e-3):  # as pictures encoded anew differ
            other.append(f"latent_scale {was_scale} there and {scale} here")
        fused = [self.sizes.first, self.sizes.last]
        if (said["fused_blocks"], said["conditioning"]) != (fused, self.sizes.conditioning) or any(
            was[name].shape != weight.shape for name, weight in self.weights.items()
        ):
            other.append("another network")
        if other:
            raise ValueError(
                f"{self.path.name} was trained otherwise: {'; '.join(other)}. To go on, give the "
                f"same settings and data; to begin anew, {way_out}"
            )
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(was[name])
                self.average[name].copy_(average[name])
                if self.step:
                    self.optimiser.state[weight] = {
                        "step": torch.tensor(float(self.step), device=self.device),
                        **{m: moments[m, name] for m in ("exp_avg", "exp_avg_sq")},
                    }
