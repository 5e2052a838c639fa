"""torch.compile: blocks with TACA are compiled in one graph, or not at all.

A kernel that torch.compile cannot trace breaks the graph, and the rest is compiled in pieces.
ComfyUI compiles without guards on ``transformer_options``, so a piece compiled with TACA's override
would later run in the plain model, or the other way round.
"""

import logging
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from comfy.patcher_extension import WrapperExecutor
from torch import nn

log = logging.getLogger("taca")

frame_callback: Callable[[], Any] = lambda: True  # noqa: E731
"""What dynamo does with the frames of this thread; None if it does nothing.

Before 2.13 torch returns a reference that is not counted, so there it is not called.
"""
if torch.__version__ >= "2.13":
    frame_callback = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", frame_callback)


UNTRACEABLE = (
    "TACA: this model's blocks cannot be compiled in one piece (often: an attention kernel that "
    "torch.compile cannot trace). Steps inside the window run uncompiled. (%s)"
)


class Fallback:
    """Continues a run uncompiled, in calls with TACA, if its model does not compile in one graph.

    ``untraceable`` maps the names of attention kernels that cannot be traced to the reasons. It is
    kept with the patched model, so that tracing is not tried again at every prompt.
    """

    def __init__(self, untraceable: dict[str, str]) -> None:
        self.untraceable, self.eager = untraceable, False

    def guard(self, executor: WrapperExecutor, kernel: Any) -> None:
        """Guard one call.

        Only the model itself, inside all other wrappers, runs again after a failure, so caches see
        one call.
        """
        model, name = executor.original, kernel_name(kernel)

        def guarded(*args: Any, **kwargs: Any) -> Any:
            if "torch._dynamo" not in sys.modules:
                return model(*args, **kwargs)
            reason = self.untraceable.get(name, "")
            if not self.eager and not reason:
                exc = torch._dynamo.exc
                at_limit = getattr(exc, "FailOnRecompileLimitHit", exc.TorchDynamoException)
                try:
                    return model(*args, **kwargs)
                except (exc.TorchDynamoException, at_limit) as error:
                    reason = str(error).strip().partition("\n")[0]
                    if isinstance(error, exc.Unsupported):
                        self.untraceable[name] = reason
            if not self.eager:
                log.warning(UNTRACEABLE, reason)
                self.eager = True
            with uncompiled_calls:
                return model(*args, **kwargs)

        executor.original = guarded


def kernel_name(kernel: Any) -> str:
    """A kernel's name, which identifies it: packs may make it anew in every call."""
    function = getattr(kernel, "func", kernel)  # of a partial
    return getattr(function, "__qualname__", type(function).__qualname__)


class _Uncompiled(AbstractContextManager[None]):
    """Context of calls that run uncompiled, on any number of threads (one for each device).

    torch's stance is global to all threads: the first one sets it, the last one resets it.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._stance = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside and "torch._dynamo" in sys.modules:
                self._stance.enter_context(torch.compiler.set_stance("force_eager"))
            self._inside += 1

    def __exit__(self, *error: Any) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._stance.close()


uncompiled_calls = _Uncompiled()


def is_compiled(diffusion_model: nn.Module, wrappers: Mapping[str, Any]) -> bool:
    """Whether a model is compiled, by ``wrappers`` around its calls or in parts of it."""
    modules = diffusion_model.modules()
    return "torch.compile" in wrappers or any(hasattr(each, "_orig_mod") for each in modules)


def check_compiler(diffusion_model: nn.Module, wrappers: Mapping[str, Any]) -> None:
    """Raise RuntimeError for a compiled model on a torch that lacks what ``block.py`` needs."""
    if is_compiled(diffusion_model, wrappers) and not hasattr(
        torch._dynamo, "error_on_graph_break"
    ):
        raise RuntimeError(
            f"TACA on a compiled model needs a later torch than {torch.__version__} (2.13 is "
            f"tested). Update torch, or take out the node that compiles the model."
        )
