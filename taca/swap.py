"""Modules that run another ``forward`` for the length of one call."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

from torch import nn

Forward = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]
Wrap = Callable[[Any], Any]
"""A module's forward, or another attribute -> what is in its place."""

Swap = tuple[nn.Module, str, Wrap]
"""A module, the name of an attribute, and a wrap of it."""


looks_like = partial(wraps, assigned=("__name__", "__qualname__"), updated=())
"""Decorator: gives a function the name and signature of a forward, which other packs inspect.

Attributes are not copied, since torch.compile keeps its own there.
"""


@contextmanager
def swapped(swaps: Iterable[Swap]) -> Iterator[None]:
    """Modules with wrapped forwards or other attributes inside this context; then as before.

    ``forward`` is replaced, not an entry of ``transformer_options``: ComfyUI compiles models
    without guards on those, so a compiled model would keep what they held at its first call.
    """
    before = []
    try:
        for module, name, wrap in swaps:
            wrapped = wrap(getattr(module, name))
            before.append((module.__dict__, name, module.__dict__.get(name)))
            # Setting the attribute would first search the parameters for that name.
            module.__dict__[name] = wrapped
        yield
    finally:
        for attributes, name, own in reversed(before):
            if own is None:
                attributes.pop(name, None)
            else:
                attributes[name] = own
