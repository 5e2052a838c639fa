"""Modules that run another ``forward`` for the length of one call."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

from torch import nn

Forward = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]
Wrap = Callable[[Forward], Forward]
"""A module's forward -> what runs in its place."""


looks_like = partial(wraps, assigned=("__name__", "__qualname__"), updated=())
"""Decorator: gives a function the name and signature of a forward, which other packs inspect.

Attributes are not copied, since torch.compile keeps its own there.
"""


@contextmanager
def swapped_forwards(swaps: Iterable[tuple[nn.Module, Wrap]]) -> Iterator[None]:
    """Run wrapped forwards inside this context; what was there before is restored.

    ``forward`` is replaced, not an entry of ``transformer_options``: ComfyUI compiles models
    without guards on those, so a compiled model would keep what they held at its first call.
    """
    swapped = []
    try:
        for module, wrap in swaps:
            forward = wrap(module.forward)
            swapped.append((module, module.__dict__.get("forward")))
            # Setting the attribute would first search the parameters for that name.
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, own in reversed(swapped):
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own
