"""Core's MultiGPU CFG Split, on the devices "cpu" and "cpu:0"."""

import threading

import comfy.model_management
import pytest
import torch
from comfy.patcher_extension import WrappersMP

try:
    from comfy_extras.nodes_multigpu import MultiGPUCFGSplitNode
except ImportError:
    MultiGPUCFGSplitNode = None

needs_multigpu = pytest.mark.skipif(
    MultiGPUCFGSplitNode is None, reason="this ComfyUI runs on one device"
)
DEVICES = [torch.device("cpu"), torch.device("cpu:0")]


def split(model):
    """The node MultiGPU CFG Split."""
    # Core's node fails where the list still has a model that Python has freed, as tests leave them.
    loaded = comfy.model_management.current_loaded_models
    loaded[:] = [each for each in loaded if each.model is not None]
    return MultiGPUCFGSplitNode.execute(model, 2).result[0]


def watched(model):
    """The model, and a list that gets its calls: (device, its model, thread, part of CFG)."""
    model, calls = model.clone(), []

    def watch(executor, *args, **kwargs):
        base = executor.class_obj
        device = base.current_patcher.load_device
        assert args[-1]["multigpu_thread_device"] == device
        calls.append((device, base, threading.get_ident(), *args[-1]["cond_or_uncond"]))
        return executor(*args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "watch", watch)
    return model, calls
