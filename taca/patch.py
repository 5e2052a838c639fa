"""TACA on a ComfyUI model: the wrappers that a clone gets, and what they do around a run.

The path of gamma, one module a stage:

    patch.py      the model is cloned and gets two keyed wrappers        Schedule -> TacaConfig
    patch.py      once a run: gamma over t is resolved                   -> ResolvedSchedule, Run
    call.py       once a call: gamma of each row; forwards are swapped   -> Tensor (b,)
    block.py      a block: its attention gets an override
    attention.py  Eq. 10
"""

import logging
from functools import partial
from typing import Any

import comfy.model_management
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import Tensor

from .call import adjust_call
from .compiler import check_compiler
from .families import family_of, uncompiled
from .lora import LORA_KEY, LoRA, loras_of, patcher_of
from .options import NO_OPTIONS, Options
from .run import KEY, Run, TacaConfig, config_of
from .schedule import ResolvedSchedule, Schedule, advice
from .timesteps import resolve, timestep

log = logging.getLogger("taca")


def patch_model(
    model: ModelPatcher, schedule: Schedule, options: Options = NO_OPTIONS
) -> ModelPatcher:
    """A clone of the model that samples with TACA, in place of the TACA that it may have.

    Raises ValueError if the model has no joint attention that TACA can reach, or no such blocks.
    """
    count_blocks(model, options)
    config = TacaConfig(schedule, options)
    patched = model.clone()
    set_wrapper(patched, WrappersMP.OUTER_SAMPLE, KEY, partial(watch_run, config))
    set_wrapper(patched, WrappersMP.APPLY_MODEL, KEY, partial(adjust_call, Run(config)))
    return patched


def patch_lora(model: ModelPatcher, lora: LoRA) -> ModelPatcher:
    """A clone of the model with a LoRA that is active inside its TACA window, and only there.

    The model has TACA, or gets it later. Several LoRAs add up.

    Raises ValueError if what the LoRA does inside the window would stay in the model outside.
    """
    family = family_of(model.get_model_object("diffusion_model"))
    if family.caches_text_keys:
        raise ValueError(
            f"TACA cannot keep a LoRA inside its window on {family.name}, since ComfyUI caches the "
            f"keys of this model's text. Take out Load TACA LoRA."
        )
    early = tuple(f"diffusion_model.{part}." for part in family.before_run)
    idle = sum(f"{name}.".startswith(early) for name in lora.module_names)
    if idle:
        log.warning(
            "TACA: %d of the %d modules of %s have no effect: %s runs them before the first step.",
            *(idle, len(lora.module_names), lora.name, family.name),
        )
    patched = model.clone()
    others = patched.get_additional_models_with_key(LORA_KEY)
    patched.set_additional_models(LORA_KEY, [*others, patcher_of(lora)])
    set_wrapper(patched, WrappersMP.OUTER_SAMPLE, LORA_KEY, require_taca)
    return patched


def set_wrapper(patcher: ModelPatcher, kind: str, key: str, wrapper: Any) -> None:
    """Add a wrapper in place of the one by its key."""
    patcher.remove_wrappers_with_key(kind, key)
    patcher.add_wrapper_with_key(kind, key, wrapper)


def watch_run(config: TacaConfig, executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Tensor:
    """ComfyUI's OUTER_SAMPLE wrapper: say what TACA will do, and make sure that it did it."""
    guider = executor.class_obj
    patcher = guider.model_patcher
    # As ``outer_sample(noise, latent_image, sampler, sigmas, ...)``.
    sigmas = kwargs["sigmas"] if "sigmas" in kwargs else args[3]
    sigmas = None if comfy.model_management.in_training else sigmas
    schedule = resolve(config.schedule, patcher.get_model_object("model_sampling"), sigmas)
    run = Run(config, schedule, config.options.conditionings(guider))
    log_plan(config, schedule, patcher, sigmas)
    wrappers = guider.model_options["transformer_options"]["wrappers"][WrappersMP.APPLY_MODEL]
    check_compiler(patcher.model.diffusion_model, wrappers)
    # The run reaches its calls in their wrapper, not as an entry of transformer_options: what
    # torch.compile made of a model fails without the entries it was made with. The guider's
    # options are this run's own copy.
    wrappers[KEY] = [partial(adjust_call, run)]
    result = executor(*args, **kwargs)
    check_run(run, type(patcher.model).__name__)
    return result


def log_plan(
    config: TacaConfig, resolved: ResolvedSchedule, patcher: ModelPatcher, sigmas: Tensor | None
) -> None:
    """One line a run: gamma, how many steps are inside the window, how many blocks."""
    name, num_blocks = count_blocks(patcher, config.options)
    gamma, window, acts, level = resolved.gamma, config.schedule.window, "trains", logging.INFO
    hints: list[str] = []
    if sigmas is not None:
        t = timestep(patcher.get_model_object("model_sampling"), sigmas[:-1])
        inside = resolved.contains(t).tolist()
        acts, hints = f"acts on {sum(inside)} of {len(inside)} steps", advice(inside, gamma)
        level = logging.INFO if any(inside) else logging.WARNING
    loras = "".join(f", with {lora.name} at {lora.strength:g}" for lora in loras_of(patcher))
    said = f"TACA: gamma {gamma:g} at {window} {acts}, {num_blocks} joint blocks of {name}{loras}."
    log.log(level, "%s", " ".join([said, *hints]))


def check_run(run: Run, model_name: str) -> None:
    """Raise RuntimeError if joint blocks ran inside the window, and no attention reached TACA."""
    missed = sum(ran and not attended for ran, attended in run.calls)
    if missed and not any(attended for _, attended in run.calls):
        raise RuntimeError(
            f"TACA changed nothing: no attention of {model_name} reached it inside the window. "
            f"Another node probably replaced that attention: remove it, or TACA Patch Model."
        )
    if missed:
        log.warning(
            "TACA: in %d calls inside the window another node attended in the model's place, "
            "without TACA. Start that node after the TACA window ends.",
            missed,
        )


def count_blocks(patcher: ModelPatcher, options: Options) -> tuple[str, int]:
    """The family of a model and the number of its joint blocks; errors as ``patch_model``."""
    transformer = uncompiled(patcher.get_model_object("diffusion_model"))
    family = family_of(transformer)
    return family.name, len(list(family.joint_blocks(transformer, options.blocks)))


def require_taca(executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Tensor:
    """ComfyUI's OUTER_SAMPLE wrapper of a model with a TACA LoRA.

    Raises RuntimeError if the model has no TACA, or is being trained.
    """
    patcher = executor.class_obj.model_patcher
    names = ", ".join(lora.name for lora in loras_of(patcher))
    if config_of(patcher) is None:
        raise RuntimeError(
            f"The TACA LoRA {names} acts inside the window of TACA, which this model lacks: add "
            f"TACA Patch Model. For a LoRA that is on in every step use Load LoRA."
        )
    if comfy.model_management.in_training:
        raise RuntimeError(
            f"A model with the TACA LoRA {names} cannot be trained: take Load TACA LoRA out. To "
            f"train a LoRA further, choose it as the trainer's existing_lora."
        )
    return executor(*args, **kwargs)
