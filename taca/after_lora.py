"""After the window of a TACA LoRA: nothing that it made is used again."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from comfy.model_base import BaseModel
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import Tensor

from .arguments import CallArguments
from .compiler import is_compiled
from .events import replacement
from .families import family_of, uncompiled
from .run import Run
from .timesteps import timesteps


def end_caches(
    run: Run, executor: WrapperExecutor, x: Tensor, timestep: Tensor, model_options: Any, seed: Any
) -> Tensor:
    """ComfyUI's PREDICT_NOISE wrapper of a run with a TACA LoRA.

    What EasyCache and LazyCache keep from calls inside the window is not used after it.
    """
    cache = model_options["transformer_options"].get("easycache")
    if cache is not None and run.schedule is not None:
        sampling = executor.class_obj.model_patcher.get_model_object("model_sampling")
        inside = any(map(run.schedule.contains, timesteps(sampling, timestep)))
        if run.caches_lora and not inside:
            # Without the last output's norm neither of them skips a call; nor does EasyCache
            # without the differences, of prompts that come back later.
            cache.output_prev_norm = None
            getattr(cache, "uuid_cache_diffs", {}).clear()
        run.caches_lora = inside
    return executor(x, timestep, model_options, seed)


@contextmanager
def expect_blocks(run: Run, base_model: BaseModel, call: CallArguments) -> Iterator[None]:
    """Context of a call outside the window; in the first one after a LoRA's, blocks have to run.

    Raises RuntimeError if none did: then a cache answered with what the LoRA had made. A compiled
    model is not looked at.
    """
    uuids = call.transformer_options.get("uuids", ())
    if not run.lora_calls or run.lora_calls.isdisjoint(uuids):
        yield
        return
    run.lora_calls.difference_update(uuids)
    wrappers = call.transformer_options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
    if is_compiled(base_model.diffusion_model, wrappers):  # its blocks would be compiled anew
        yield
        return
    transformer, ran = uncompiled(base_model.diffusion_model), list[None]()
    # Hooks, since no forward is replaced outside the window. Another pack's own forward of a block
    # still calls its layers.
    hooks = [
        module.register_forward_pre_hook(lambda *_: ran.append(None))
        for block in family_of(transformer).joint_blocks(transformer)
        for module in block.module.modules()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if not ran:
        raise RuntimeError(
            f"TACA: no block of {type(transformer).__name__} ran in the first step after the "
            f"window: a cache answered it with what the TACA LoRA had made. "
            f"{replacement(base_model.diffusion_model)} Start that cache after the TACA window "
            f"ends, or take it or Load TACA LoRA out."
        )
