"""Training inside the window (Eq. 13), by ComfyUI's own trainer.

    E_{x0, t >= t_thresh} || v - v_theta(x_t, t, text, gamma(t)) ||^2

The trainer draws a timestep as ``model_sampling.percent_to_sigma(uniform)`` and, to save memory,
may compute the model again in the backward pass, when the call is over. So here alone something
outlives a call: the blocks' forwards, for as long as the model is loaded.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import comfy.model_management
import torch
from comfy.patcher_extension import PatcherInjection
from torch import nn

from .families import family_of
from .lora import Wrap
from .options import NO_OPTIONS
from .patch import TRAINING_KEY, located_blocks, resolve, settings_of, timestep, training_forward
from .schedule import Schedule

DRAWS = 2**14
"""How finely the trainer's uniform draw over all timesteps is divided."""


def training_window(model: Any) -> Any:
    """A clone of a model with TACA, which core's trainer trains inside the window, with TACA.

    Parameters
    ----------
    model : comfy.model_patcher.ModelPatcher
        With TACA; left as it is.

    Raises
    ------
    ValueError
        If the model has no TACA, or its window no timestep that the trainer would draw, or none
        without a run; or if TACA cannot act on such a model in training.
    """
    settings = settings_of(model)
    if settings is None:
        raise ValueError(
            "TACA Training Window trains inside the window of TACA, and this model has none: put "
            "TACA Patch Model before it."
        )
    family = family_of(model.get_model_object("diffusion_model"))
    if family.attention or family.kept_keys:
        # Of the first, nothing would tell the blocks of TACA when the backward pass computes them
        # again; the second's keys would be those of a LoRA that was trained on since.
        why = "keeps the keys of its text" if family.kept_keys else "hands its attention no options"
        raise ValueError(
            f"TACA cannot act on {family.name} in training, for this model {why}. To train it "
            f"without TACA, take TACA Patch Model and TACA Training Window out."
        )
    patched = model.clone()
    sampling = _inside_window(model.get_model_object("model_sampling"), settings.schedule)
    patched.add_object_patch("model_sampling", sampling)
    patched.set_injections(TRAINING_KEY, [PatcherInjection(_install, _remove)])
    return patched


def _inside_window(model_sampling: Any, schedule: Schedule) -> Any:
    """A model sampling whose draws, in training, are those of the original inside the window."""
    percents = (torch.arange(DRAWS) + 0.5) / DRAWS
    sigmas = torch.tensor([model_sampling.percent_to_sigma(p) for p in percents.tolist()])
    resolved = resolve(schedule, model_sampling)
    inside = percents[resolved.contains(timestep(model_sampling, sigmas))].tolist()
    if not inside:
        raise ValueError(
            f"The TACA window {schedule.window} holds no timestep to train on: widen it."
        )
    original = model_sampling.percent_to_sigma

    def percent_to_sigma(percent: float) -> float:
        if comfy.model_management.in_training:
            percent = inside[min(int(percent * len(inside)), len(inside) - 1)]
        return original(percent)

    sampling = copy.copy(model_sampling)
    sampling.percent_to_sigma = percent_to_sigma
    sampling.taca_percent_to_sigma = original
    return sampling


def _install(patcher: Any) -> None:
    """When the model is loaded."""
    for block, wrap in _forwards(patcher):
        before = block.__dict__.get("forward")
        block.forward = wrap(block.forward)
        block.__dict__[TRAINING_KEY] = (before, block.forward)


def _remove(patcher: Any) -> None:
    """When it is unloaded. What another put over ours in the meantime stays."""
    for block, _ in _forwards(patcher):
        before, ours = block.__dict__.pop(TRAINING_KEY, (None, None))
        if ours is not None and block.__dict__.get("forward") is ours:
            del block.forward
            if before is not None:
                block.forward = before


def _forwards(patcher: Any) -> list[tuple[nn.Module, Wrap]]:
    settings = settings_of(patcher)
    options = settings.options if settings else NO_OPTIONS
    return [
        (block, partial(training_forward, locate=locate))
        for block, locate in located_blocks(patcher.model.diffusion_model, options).items()
    ]
