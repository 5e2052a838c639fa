"""Training inside the window (Eq. 13), by ComfyUI's own trainer.

    E_{x0, t >= t_thresh} || v - v_theta(x_t, t, text, gamma(t)) ||^2

The trainer draws a timestep as ``model_sampling.percent_to_sigma(uniform)`` and, to save memory,
may recompute the model in the backward pass, after the call. So here alone something outlives a
call: a hook on each block, for as long as the model is loaded. What it does is in the call's own
options, which core keeps for the backward pass; nothing is compiled in training.
"""

import copy
from functools import partial

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.model_sampling import ModelSamplingDiscreteFlow as ModelSampling
from comfy.patcher_extension import PatcherInjection, WrapperExecutor
from torch import Tensor, nn

from .arguments import CallArguments
from .block import Trace, taca_override
from .families import JointBlock, family_of, uncompiled
from .options import NO_OPTIONS
from .reach import through_options
from .run import PATCH_KEY, Run, config_of
from .schedule import ResolvedSchedule, Schedule
from .spans import num_tokens
from .swap import Args, Kwargs
from .timesteps import percent_to_sigma_of, resolve, timesteps_tensor

TRAINING_KEY = "taca_training"

DRAWS = 2**14
"""Number of equal parts into which the trainer's uniform draw over all timesteps is divided."""


def training_window(model: ModelPatcher) -> ModelPatcher:
    """A clone of a model with TACA that core's trainer trains with TACA, inside its window only.

    Raises ValueError if the model has no TACA, if its window holds no timestep to draw or needs a
    run, or if TACA cannot act on such a model in training.
    """
    config = config_of(model)
    if config is None:
        raise ValueError(
            "TACA Training Window needs a model with TACA: put the TACA node before it."
        )
    family = family_of(model.get_model_object("diffusion_model"))
    if family.reach is not through_options:
        # Its blocks would run without TACA when the backward pass recomputes them.
        keeps = family.caches_text_keys
        why = "keeps the keys of its text" if keeps else "hands its attention no options"
        raise ValueError(
            f"TACA cannot act on {family.name} in training, since this model {why}. To train it "
            f"without TACA, take the TACA node and TACA Training Window out."
        )
    patched = model.clone()
    sampling = _inside_window(model.get_model_object("model_sampling"), config.schedule)
    patched.add_object_patch("model_sampling", sampling)
    patched.set_injections(TRAINING_KEY, [PatcherInjection(_install, _remove)])
    return patched


def adjust_training_call(
    run: Run, schedule: ResolvedSchedule, executor: WrapperExecutor, call: CallArguments
) -> Tensor:
    """One call of a model in training, whose blocks ``training_window`` prepared.

    Raises RuntimeError if they were not prepared, or a timestep outside the window was drawn.
    """
    base_model = executor.class_obj
    if TRAINING_KEY not in base_model.current_patcher.injections:
        raise RuntimeError(
            "The trainer would train this model with TACA at all timesteps: put TACA Training "
            "Window between the TACA node and the trainer, or take the TACA node out."
        )
    t = timesteps_tensor(base_model.model_sampling, call.t)
    if not bool(schedule.contains(t).all()):
        raise RuntimeError(
            "The trainer drew a timestep outside the TACA window: put TACA Training Window last, "
            "after every node that changes the model's sampling."
        )
    state = call.initial_state()
    gamma = schedule.gamma_at(t).to(call.t.device)
    model = base_model.diffusion_model
    gamma = run.config.options.limit(gamma, call, model, run.prompts)
    adjustment = (state, partial(taca_override, gamma, None, None))
    options = {**call.transformer_options, PATCH_KEY: adjustment}
    return executor(*call[:5], options, **call.others)


def _inside_window(model_sampling: ModelSampling, schedule: Schedule) -> ModelSampling:
    """A model sampling whose draws, in training, are limited to the window.

    Raises ValueError if the window holds no timestep.
    """
    original = percent_to_sigma_of(model_sampling)
    percents = (torch.arange(DRAWS) + 0.5) / DRAWS
    sigmas = torch.tensor([original(p) for p in percents.tolist()])
    resolved = resolve(schedule, model_sampling)
    inside = percents[resolved.contains(timesteps_tensor(model_sampling, sigmas))].tolist()
    if not inside:
        raise ValueError(
            f"TACA's window {schedule.window} holds no timestep to train on: widen it."
        )

    def percent_to_sigma(percent: float) -> float:
        if comfy.model_management.in_training:
            percent = inside[min(int(percent * len(inside)), len(inside) - 1)]
        return original(percent)

    sampling = copy.copy(model_sampling)
    sampling.percent_to_sigma = percent_to_sigma
    sampling.taca_percent_to_sigma = original
    return sampling


def _adjust_block(
    block: JointBlock, module: nn.Module, args: Args, kwargs: Kwargs
) -> tuple[Args, Kwargs] | None:
    """Hook before a block: an override in its options, if TACA acts in this call."""
    adjustment = (kwargs.get("transformer_options") or {}).get(PATCH_KEY)
    if adjustment is None:
        return None
    state, override = adjustment
    layout = block.locate(args, kwargs, state)
    if not layout:
        return None
    override = partial(override, Trace(module.forward), layout, num_tokens(layout))
    return through_options(module.forward, args, kwargs, override)[1:]


def _install(patcher: ModelPatcher) -> None:
    """Run when the model is loaded, which may happen twice before it is unloaded."""
    _remove(patcher)
    for block in _blocks(patcher):
        hook = partial(_adjust_block, block)
        handle = block.module.register_forward_pre_hook(hook, with_kwargs=True)
        block.module.__dict__[TRAINING_KEY] = handle


def _remove(patcher: ModelPatcher) -> None:
    """Run when it is unloaded."""
    for block in _blocks(patcher):
        handle = block.module.__dict__.pop(TRAINING_KEY, None)
        if handle is not None:
            handle.remove()


def _blocks(patcher: ModelPatcher) -> list[JointBlock]:
    config = config_of(patcher)
    transformer = uncompiled(patcher.model.diffusion_model)
    options = config.options if config else NO_OPTIONS
    return family_of(transformer).observed_blocks(transformer, options.blocks)
