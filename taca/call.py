"""One call of the model: what is installed for its length."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import comfy.model_management
import torch
from comfy.ldm.modules import attention
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor
from torch import Tensor, nn

from .after_lora import expect_blocks
from .arguments import CallArguments
from .block import Trace, joint_forward, taca_override
from .kernels import for_masks
from .reach import OVERRIDE
from .run import Run
from .schedule import ResolvedSchedule
from .swap import Forward, Swap, swapped
from .timesteps import resolve, timesteps
from .training import adjust_training_call
from .word_weights import WordWeights


def adjust_call(run: Run, executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Tensor:
    """ComfyUI's APPLY_MODEL wrapper: TACA, its LoRAs and word weights, for the rows they act on."""
    base_model = executor.class_obj
    call = CallArguments.of(*args, **kwargs)
    schedule = run.schedule or resolve(run.config.schedule, base_model.model_sampling)
    if comfy.model_management.in_training:
        return adjust_training_call(run, schedule, executor, call)
    # The only time in a call that the host waits for the device: everything else is decided from
    # these numbers. Outside the window nothing more is done, but in the first call after a LoRA's.
    t = timesteps(base_model.model_sampling, call.t)
    inside = [bool(schedule.contains(each)) for each in t]
    uuids = call.transformer_options.get("uuids", ())
    is_first = run.schedule is not None and run.events.begin_call(uuids, t)
    model = base_model.diffusion_model
    words = run.words.of_call(call, t, model) if run.words is not None else None
    if not any(inside) and words is None:
        with expect_blocks(run, base_model, call):
            return executor(*args, **kwargs)
    gamma = gamma_of_call(run, schedule, call, t, model) if any(inside) else None
    sites, traces = run.sites_of(base_model), list[Trace]()
    lora_swaps = sites.lora_swaps if any(inside) else ()
    if run.schedule is not None and any(inside) and gamma is None and not lora_swaps:
        run.events.unchanged.append(None)
    swaps = block_swaps(run, base_model, call, gamma, words, traces)
    if not swaps and not lora_swaps:
        return executor(*args, **kwargs)
    sites.lora_trace.called = sites.lora_trace.attended = False
    kernel = call.transformer_options.get(OVERRIDE) or attention.optimized_attention
    run.fallback.guard(executor, kernel)
    if all(inside):
        swaps += lora_swaps
    elif lora_swaps:  # of the model itself, inside all other wrappers, so that they see one call
        rows = to_device(torch.tensor(inside), call.t.device)
        executor.original = in_some_rows(executor.original, lora_swaps, rows)
    if lora_swaps and run.schedule is not None:
        run.lora_calls.update(uuids)
    ends = nullcontext() if any(inside) else expect_blocks(run, base_model, call)
    with ends, swapped(swaps):
        result = executor(*args, **kwargs)
    if run.schedule is None:  # outside any run
        return result
    if gamma is not None:
        run.events.end_call(traces, max(t), is_first, model)
    elif lora_swaps:  # where gamma is 1, what its layers did
        run.events.end_call([sites.lora_trace], max(t), is_first, model)
    if words is not None:
        run.word_events.end_call(traces, max(t), is_first, model)
    return result


def control_swaps(run: Run, patcher: ModelPatcher) -> list[Swap]:
    """The ControlNets of a run with LoRAs, and wraps of what ComfyUI asks before the model."""
    entries = run.prompts.entries() if run.prompts else ()
    controls = {id(each["control"]): each["control"] for _, each in entries if "control" in each}
    return [
        (each, "get_control", partial(control_forward, run=run, patcher=patcher, control=each))
        for each in controls.values()
    ]


def control_forward(get_control: Forward, run: Run, patcher: ModelPatcher, control: Any) -> Forward:
    """A ControlNet's ``get_control``.

    If it runs layers of the model, as Qwen-Image Fun's, they have the LoRAs inside the window.
    """

    def taca_control(x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        swaps: Sequence[Swap] = ()
        if run.schedule is not None and _runs_layers(control):
            times = timesteps(patcher.get_model_object("model_sampling"), t)
            inside = all(map(run.schedule.contains, times))
            swaps = run.sites_of(patcher.model).lora_swaps if inside else ()
        with swapped(swaps):
            return get_control(x, t, *args, **kwargs)

    return taca_control


def _runs_layers(control: Any) -> bool:
    """Whether a ControlNet, or one of those chained before it, was handed the model."""
    while control is not None and "base_model" not in getattr(control, "extra_args", ()):
        control = getattr(control, "previous_controlnet", None)
    return control is not None


def in_some_rows(model: Forward, swaps: Sequence[Swap], rows: Tensor) -> Forward:
    """A model's call with the swaps in some rows, bool ``(b,)``: once with and once without them.

    A layer cannot do so itself: some get tokens of the rows in another order, or only their weight.
    """

    def twice(*args: Any, **kwargs: Any) -> Tensor:
        with swapped(swaps):
            inside = model(*args, **kwargs)
        outside = model(*args, **kwargs)
        return torch.where(rows.view(-1, *(1,) * (inside.ndim - 1)), inside, outside)

    return twice


def block_swaps(
    run: Run,
    base_model: BaseModel,
    call: CallArguments,
    gamma: Tensor | None,
    words: WordWeights | None,
    traces: list[Trace],
) -> list[Swap]:
    """The blocks to swap in a call, and wraps of their forwards, which add to ``traces``."""
    if gamma is None and words is None:
        return []
    sites, state, instead = run.sites_of(base_model), call.initial_state(), None
    blocks = sites.blocks if words is None else sites.all_blocks
    if words is not None:
        like = call.x.new_empty((), dtype=base_model.get_dtype_inference())
        instead = for_masks(call.transformer_options, like, run.takes_masks)
        if words.avoided is not None:
            blocks = [*blocks, *sites.refiners]
    adjusting = partial(taca_override, gamma, words, instead)
    plain = partial(taca_override, None, words, instead)
    swaps: list[Swap] = []
    for block in blocks:
        override = adjusting if block.module in sites.adjusted else plain
        wrap = partial(joint_forward, block=block, state=state, override=override, traces=traces)
        swaps.append((block.module, "forward", wrap))
    return swaps


def gamma_of_call(
    run: Run, schedule: ResolvedSchedule, call: CallArguments, t: list[float], model: nn.Module
) -> Tensor | None:
    """Gamma of each row ``(b,)``, or of each row and text token ``(b, t)``; None if all are 1.

    The first axis is 1 if all rows have the same gamma, so that no graph depends on the batch size.
    """
    gamma = schedule.gamma_at(torch.tensor(t, dtype=torch.float64))
    gamma = run.config.options.limit(gamma, call, model, run.prompts)
    if not bool((gamma != 1).any()):
        return None
    gamma = gamma[:1] if bool((gamma == gamma[:1]).all()) else gamma
    return to_device(gamma, call.t.device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Moved by core's function, which knows the devices that cannot copy asynchronously."""
    return comfy.model_management.cast_to_device(tensor, device, tensor.dtype)
