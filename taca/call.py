"""One call of the model: what is installed for it, and taken out after it."""

from functools import partial
from typing import Any

import comfy.model_management
import torch
from comfy.ldm.modules import attention
from comfy.patcher_extension import WrapperExecutor
from torch import Tensor, nn

from .arguments import CallArguments
from .block import Seen, joint_forward, taca_override
from .lora_forward import lora_swaps
from .reach import OVERRIDE
from .run import Run
from .swap import Wrap, swapped_forwards
from .timesteps import resolve, timesteps
from .training import adjust_training_call


def adjust_call(run: Run, executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Tensor:
    """ComfyUI's APPLY_MODEL wrapper: TACA and its LoRAs, where a row of the batch is inside."""
    base_model, config = executor.class_obj, run.config
    call = CallArguments.of(*args, **kwargs)
    schedule = run.schedule or resolve(config.schedule, base_model.model_sampling)
    if comfy.model_management.in_training:
        return adjust_training_call(run, schedule, executor, call)
    # The only time in a call that the host waits for the device. Outside the window nothing else
    # is done; inside, all is decided from these numbers.
    t = timesteps(base_model.model_sampling, call.t)
    inside = [bool(schedule.contains(each)) for each in t]
    is_first = run.schedule is not None and run.events.begin_call()
    if not any(inside):
        return executor(*args, **kwargs)
    sites, state = run.sites_of(base_model), call.initial_state()
    seen: list[Seen] = []
    swaps: list[tuple[nn.Module, Wrap]] = []
    model, prompts = base_model.diffusion_model, run.prompts
    gamma = schedule.gamma_at(torch.tensor(t, dtype=torch.float64))
    gamma = config.options.gamma_of_call(gamma, call, model, prompts)
    if bool((gamma != 1).any()):
        # One factor where all rows have the same, so that no graph depends on the batch size.
        gamma = gamma[:1] if bool((gamma == gamma[:1]).all()) else gamma
        gamma = to_device(gamma, call.t.device)
        override = partial(taca_override, gamma)
        for block in sites.blocks:
            wrap = partial(joint_forward, block=block, state=state, override=override, seen=seen)
            swaps.append((block.module, wrap))
    if all(inside):
        swaps += sites.lora_swaps
    else:
        rows = to_device(torch.tensor(inside), call.t.device)
        swaps += lora_swaps(sites.loras, base_model, rows)
    if not swaps:
        return executor(*args, **kwargs)
    kernel = call.transformer_options.get(OVERRIDE) or attention.optimized_attention
    run.fallback.guard(executor, kernel)
    with swapped_forwards(swaps):
        result = executor(*args, **kwargs)
    if run.schedule is not None:
        run.events.end_call(seen, max(t), is_first, base_model.diffusion_model)
    return result


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Moved by core's rule, which knows the devices that cannot copy without waiting."""
    return comfy.model_management.cast_to_device(tensor, device, tensor.dtype)
