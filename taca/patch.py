"""TACA on a ComfyUI model: the wrappers that a clone gets, and what they do around a run.

The path of gamma, one module a stage:

    nodes/patch.py  the widgets are read                                   -> Schedule
    patch.py        the model is cloned and gets two keyed wrappers        -> TacaConfig
    patch.py        once a run: gamma over t is resolved                   -> ResolvedSchedule, Run
    call.py         once a call: gamma of each row; forwards are swapped   -> Tensor (b,)
    block.py        a block: its attention gets an override
    attention.py    Eq. 10

The path of a word weight, which joins that of gamma in the call:

    conditioning.py  the prompt is parsed; its tokens are found (prompt_tokens.py)  -> Words
    words.py         once a run: the words of its conditionings; once a call: its rows'
                                                            -> RunWords; WordWeights (b, t)
    word_weights.py  biases of the logits, signs of the values

The path of a TACA LoRA:

    lora_file.py     the file is read: tensors under ComfyUI's names
    lora_fit.py      they are fitted to the model                          -> LoRA
    patch.py         it becomes an additional model of the clone
    lora_forward.py  once a call: what its deltas (lora.py) change is swapped
"""

import itertools
import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import comfy.model_management
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrapperExecutor, WrappersMP
from torch import Tensor

from .after_lora import end_caches
from .arguments import run_arguments, with_callback
from .call import adjust_call, control_swaps
from .compiler import check_compiler
from .events import Say, silent
from .families import family_of, uncompiled
from .lora import LORA_KEY, LoRA, loras_of, patcher_of
from .options import NO_OPTIONS, Options
from .prompt_calls import Prompts
from .run import PATCH_KEY, Run, TacaConfig, config_of
from .schedule import NEVER, Schedule
from .swap import swapped
from .timesteps import resolver, timesteps_tensor
from .words import WORDS_KEY, RunWords, hide_avoided, share_hooks

log = logging.getLogger("taca")


def patch_model(
    model: ModelPatcher, schedule: Schedule, options: Options = NO_OPTIONS, say: Say = silent
) -> ModelPatcher:
    """A clone of the model that samples with TACA, replacing the TACA that it may have.

    At the end of each run ``say`` is called with what it did.

    Raises ValueError if the model has no joint attention that TACA can reach, or no such blocks.
    """
    count_blocks(model, options)
    config = TacaConfig(schedule, options, say=say)
    patched = model.clone()
    set_wrapper(patched, WrappersMP.OUTER_SAMPLE, PATCH_KEY, partial(run_with_taca, config))
    set_wrapper(patched, WrappersMP.APPLY_MODEL, PATCH_KEY, partial(adjust_call, Run(config)))
    patched.remove_callbacks_with_key(CallbacksMP.ON_PREPARE_STATE, PATCH_KEY)
    check = partial(require_own_options, config)
    patched.add_callback_with_key(CallbacksMP.ON_PREPARE_STATE, PATCH_KEY, check)
    return patched


def require_own_options(
    config: TacaConfig, patcher: ModelPatcher, timestep: Tensor, options: Any = None
) -> None:
    """ComfyUI's ON_PREPARE_STATE callback: check that a patched model gets its own options.

    Raises RuntimeError if it does not, since then its TACA would not act.
    """
    inner = (options or {}).get("transformer_options", {})
    if "sample_sigmas" not in inner:  # in training, a pack's own call, or before ComfyUI 0.26
        return
    wrappers = inner.get("wrappers", {})
    ours = wrappers.get(WrappersMP.APPLY_MODEL, {}).get(PATCH_KEY)
    if not ours or ours[0].args[0].config != config:
        raise RuntimeError(
            "TACA does not act on this model, since its guider runs it with another model's "
            "options. Dual Model CFG Guider takes those of its first model for both: put the TACA "
            "node with the same settings before that one, or before neither."
        )


def patch_lora(model: ModelPatcher, lora: LoRA) -> ModelPatcher:
    """A clone of the model with a LoRA that is active inside its TACA window, and only there.

    The model has TACA, or gets it later. Several LoRAs add up.

    Raises ValueError if the LoRA would outlast its window, in keys that ComfyUI caches.
    """
    family = family_of(model.get_model_object("diffusion_model"))
    if family.caches_text_keys:
        raise ValueError(
            f"TACA cannot keep a LoRA inside its window on {family.name}, since ComfyUI caches the "
            f"keys of this model's text. Take out Load TACA LoRA."
        )
    early = tuple(f"diffusion_model.{part}." for part in family.before_run)
    names = lora.module_names
    idle = sum(f"{n}.".startswith(early) or n.endswith(family.past_hooks) for n in names)
    if idle:
        log.warning(
            "TACA: %d of the %d modules of %s have no effect: %s runs them before the first step, "
            "or never asks for their weights.",
            idle,
            len(names),
            lora.name,
            family.name,
        )
    # Of this patcher: a node may have set a dtype other than the loaded model's.
    dtype = model.get_model_object("manual_cast_dtype") or model.model.get_dtype()
    for delta in itertools.chain(*lora.deltas):
        delta.cast(dtype)
    patched = model.clone()
    others = patched.get_additional_models_with_key(LORA_KEY)
    patched.set_additional_models(LORA_KEY, [*others, patcher_of(lora)])
    set_wrapper(patched, WrappersMP.OUTER_SAMPLE, LORA_KEY, require_taca)
    return patched


def set_wrapper(patcher: ModelPatcher, kind: str, key: str, wrapper: Any) -> None:
    """Add a wrapper, replacing any with the same key."""
    patcher.remove_wrappers_with_key(kind, key)
    patcher.add_wrapper_with_key(kind, key, wrapper)


def run_with_taca(
    config: TacaConfig | None, executor: WrapperExecutor, *args: Any, **kwargs: Any
) -> Tensor:
    """ComfyUI's OUTER_SAMPLE wrapper: gamma and words of this run, and a report of what they did.

    Without a config the model has no TACA, and only words weigh.
    """
    guider, given = executor.class_obj, run_arguments(args, kwargs)
    patcher, training = guider.model_patcher, comfy.model_management.in_training
    if training and config is None:
        log.warning("TACA: word weights do not act in training.")
        return executor(*args, **kwargs)
    run = begin_run(config, guider, given)
    install(run, guider)
    what, where = said_of(run.config, patcher)
    if training:
        log.info("TACA: %s trains in %s.", what, where)
        return executor(*args, **kwargs)
    words = run.words
    if words is not None:
        warn_of_lost_vram(patcher)
    args, kwargs = with_callback(args, kwargs, run.events.counted(given.get("callback")))
    try:
        with swapped(control_swaps(run, patcher) if loras_of(patcher) else ()):
            result = executor(*args, **kwargs)
    finally:
        # Otherwise the guider and its models would live until the garbage collector runs.
        run.prompts = run.words = None
    if config is not None:
        said = run.events.report(what, where)
        for say in (config.say, *(lora.say for lora in loras_of(patcher))):
            say(said)
    if words is not None:
        said = run.word_events.report(f"weights of {words}", where)
        said = "\n".join([said, *words.notes])
        for each in words.schedules:
            each.say(said)
    return result


def begin_run(config: TacaConfig | None, guider: Any, given: Mapping[str, Any]) -> Run:
    """The state of a run with these arguments.

    Raises ValueError if the window needs steps and training has none, or if the prompt of TACA
    Options is not among the run's.
    """
    patcher, training = guider.model_patcher, comfy.model_management.in_training
    sigmas = None if training else given["sigmas"]
    resolved = resolver(patcher, sigmas, given["latent_shapes"][0])
    run = Run(config or TacaConfig(Schedule(1.0)), resolved(config.schedule) if config else NEVER)
    limited = run.config.options.conditionings(guider)
    run.prompts = Prompts(guider, len(given["noise"]), limited)
    if not training:
        run.words = RunWords.of(run.prompts, resolved)
        t = timesteps_tensor(patcher.get_model_object("model_sampling"), given["sigmas"]).tolist()
        run.events.steps = run.word_events.steps = t[:-1]
        run.word_events.ended, run.word_events.called_at = run.events.ended, run.events.called_at
    return run


def install(run: Run, guider: Any) -> None:
    """Hand a run to its calls: in the guider's options and conditionings, its own copies.

    Raises RuntimeError as ``check_compiler``.
    """
    patcher, prompts = guider.model_patcher, run.prompts
    wrappers = guider.model_options["transformer_options"]["wrappers"]
    of_calls = wrappers.setdefault(WrappersMP.APPLY_MODEL, {})
    check_compiler(patcher.model.diffusion_model, of_calls)
    # The run reaches its calls in their wrapper, not as an entry of transformer_options: a compiled
    # model fails without the entries that it was compiled with.
    of_calls[PATCH_KEY] = [partial(adjust_call, run)]
    if loras_of(patcher):  # around LazyCache
        ours = {LORA_KEY: [partial(end_caches, run)]}
        others = wrappers.get(WrappersMP.PREDICT_NOISE, {})
        wrappers[WrappersMP.PREDICT_NOISE] = ours | others
    for _, entry in prompts.entries() if prompts else ():  # words weigh: ``NeedsTaca`` may go
        entry["model_conds"] = {n: c for n, c in entry["model_conds"].items() if n != WORDS_KEY}
        # ComfyUI leaves None where the weights' hook was the only one, and fails to read it.
        if entry.get("hooks", ()) is None:
            del entry["hooks"]
    if prompts and not comfy.model_management.in_training:
        hide_avoided(prompts)
    if run.words:
        share_hooks(run.words.prompts)


def warn_of_lost_vram(patcher: ModelPatcher) -> None:
    """Warn of a run without dynamic VRAM, on a clone that ComfyUI made of the model for a hook."""
    if patcher.parent is not None and patcher.parent.is_dynamic() and not patcher.is_dynamic():
        log.warning(
            "TACA: ComfyUI gave up dynamic VRAM for this model, for the hook of its word weights. "
            "To keep it, turn any_model off where the words are encoded, and put the TACA node "
            "before the sampler (with gamma 1 it does nothing else)."
        )


def said_of(config: TacaConfig, patcher: ModelPatcher) -> tuple[str, str]:
    """What acts, and where: two parts of the line that a run logs."""
    name, num_blocks = count_blocks(patcher, config.options)
    loras = "".join(f", with {lora.name} at {lora.strength:g}" for lora in loras_of(patcher))
    schedule = config.schedule
    where = f"{num_blocks} joint blocks of {name}{loras}"
    return f"gamma {schedule.gamma:g} at {schedule.window}", where


def count_blocks(patcher: ModelPatcher, options: Options) -> tuple[str, int]:
    """The family of a model and the number of its joint blocks; errors as ``patch_model``."""
    transformer = uncompiled(patcher.get_model_object("diffusion_model"))
    # This patcher's own, even while the model is loaded with a class from another clone.
    own_class = patcher.get_model_object("diffusion_model.__class__")
    patched = own_class is not type(patcher.model.diffusion_model)
    family = family_of(transformer, own_class if patched else None)
    return family.name, len(list(family.joint_blocks(transformer, options.blocks)))


def require_taca(executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Tensor:
    """ComfyUI's OUTER_SAMPLE wrapper of a model with a TACA LoRA.

    Raises RuntimeError if the model has no TACA, keeps keys between steps, or is being trained.
    """
    patcher = executor.class_obj.model_patcher
    names = ", ".join(lora.name for lora in loras_of(patcher))
    if config_of(patcher) is None:
        raise RuntimeError(
            f"The TACA LoRA {names} acts inside the window of TACA, which this model lacks: add "
            f"the TACA node. For a LoRA that is on in every step use Load LoRA."
        )
    patches = executor.class_obj.model_options["transformer_options"].get("patches", {})
    if any(type(each).__name__ == "KV_Attn_Input" for each in patches.get("attn1_patch", ())):
        raise RuntimeError(
            f"Flux KV Cache keeps keys of the references from the first step on, and the TACA LoRA "
            f"{names} would stay in them outside its window. Take out one of the two."
        )
    if comfy.model_management.in_training:
        raise RuntimeError(
            f"A model with the TACA LoRA {names} cannot be trained: take Load TACA LoRA out. To "
            f"train a LoRA further, choose it as the trainer's existing_lora."
        )
    return executor(*args, **kwargs)
