"""How an attention override reaches the attention of a block.

ComfyUI's attention function looks for an override in the ``transformer_options`` that it is called
with. Nearly all blocks get those; the families that do not need another way.
"""

import inspect
from collections.abc import Callable
from functools import partial
from inspect import Parameter
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor

from .swap import Args, Forward, Kwargs

ATTENTION = "optimized_attention"
OVERRIDE = f"{ATTENTION}_override"
OPTIONS = "transformer_options"

Override = Callable[..., Tensor]
"""``(other, func, q, k, v, heads, ...)``: ComfyUI's override, preceded by the one before it."""

Call = tuple[Forward, Args, Kwargs]
Reach = Callable[[Forward, Args, Kwargs, Override], Call]
"""Changes the call of a block so that its attention runs through the override. An override that is
there already becomes ``other``, and still attends."""


def through_options(forward: Forward, args: Args, kwargs: Kwargs, override: Override) -> Call:
    """A block that takes ``transformer_options``; the call's own dictionary is not changed.

    A forward that does not take them, from another pack, is left alone.
    """
    if OPTIONS not in kwargs:
        parameters = inspect.signature(forward).parameters
        kinds = [p.kind for p in parameters.values()]
        at = [*parameters].index(OPTIONS) if OPTIONS in parameters else len(args)
        if at < len(args) and kinds[at] is Parameter.POSITIONAL_OR_KEYWORD:
            options = _with(override, {OPTIONS: args[at]})
            return forward, (*args[:at], options, *args[at + 1 :]), kwargs
        ours = getattr(forward, "chains_overrides", False)  # whatever it looks like
        if OPTIONS not in parameters and Parameter.VAR_KEYWORD not in kinds and not ours:
            return forward, args, kwargs
    options = kwargs.get(OPTIONS) or {}  # without _with, to save a call in every block
    return (
        forward,
        args,
        {**kwargs, OPTIONS: {**options, OVERRIDE: partial(override, options.get(OVERRIDE))}},
    )


def through_handed_attention(position: int, name: str, *factories: str) -> Reach:
    """A block that takes, as this argument, an attention function that is closed over the options.

    The one of core's ``factories`` that made it makes it again with other options. This works under
    torch.compile.

    The reach raises RuntimeError if none of them made it.
    """

    def reach(forward: Forward, args: Args, kwargs: Kwargs, override: Override) -> Call:
        attention = kwargs[name] if name in kwargs else args[position]
        code = getattr(attention, "__code__", None)
        for each in factories:
            factory = code and attention.__globals__.get(each)
            if factory is None or code is None or code not in factory.__code__.co_consts:
                continue
            cells = zip(code.co_freevars, attention.__closure__, strict=True)
            held = {variable: cell.cell_contents for variable, cell in cells}
            ours = factory(**{**held, OPTIONS: _with(override, held)})
            if name in kwargs:
                return forward, args, {**kwargs, name: ours}
            return forward, (*args[:position], ours, *args[position + 1 :]), kwargs
        raise RuntimeError(
            "TACA does not know the attention that this model's blocks are handed: another node "
            "has wrapped it. Take that node out, or the TACA node."
        )

    return reach


def through_globals(forward: Forward, args: Args, kwargs: Kwargs, override: Override) -> Call:
    """Ernie-Image's attention, which calls core's attention function without any options.

    A copy of the method calls that function with options; its module is not changed. torch.compile
    cannot trace this. A forward that is not a plain method is left alone, unless it is one of ours,
    which chains the override in its options.
    """
    function = getattr(forward, "__func__", None)
    if getattr(forward, "chains_overrides", False):
        return through_options(forward, args, kwargs, override)
    if not isinstance(function, FunctionType) or ATTENTION not in function.__code__.co_names:
        return forward, args, kwargs
    if OPTIONS in function.__code__.co_varnames:  # a later core
        return through_options(forward, args, kwargs, override)
    names = function.__globals__
    attend = partial(names[ATTENTION], transformer_options=_with(override, kwargs))
    names = {**names, ATTENTION: attend}
    copy = FunctionType(function.__code__, names, None, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    kwargs = {name: value for name, value in kwargs.items() if name != OPTIONS}
    return MethodType(copy, forward.__self__), args, kwargs  # type: ignore[attr-defined]


def _with(override: Override, held: Kwargs) -> dict[str, Any]:
    """The ``transformer_options`` among these variables, with this override."""
    options = held.get(OPTIONS) or {}
    return {**options, OVERRIDE: partial(override, options.get(OVERRIDE))}
