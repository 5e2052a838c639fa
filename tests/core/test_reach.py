"""How an override reaches attention that is handed no options: methods of any kind."""

import functools
import sys
from types import MethodType

import comfy.ldm.modules.attention
import pytest
import torch

reach = sys.modules["taca_pack.taca.reach"]


def kernel(q, k, v, heads, mask=None, **kwargs):
    return q + k + v + heads


optimized_attention = comfy.ldm.modules.attention.wrap_attn(kernel)


class KeywordOnly:
    def forward(self, q, k, v, *, heads=3, scale=2.0):
        return scale * optimized_attention(q, k, v, heads)


def closing_over(scale):
    class Closing:
        def forward(self, q, k, v, heads=3):
            return scale * optimized_attention(q, k, v, heads)

    return Closing()


def override(other, func, q, k, v, heads, **kwargs):
    """Which one sees: it attends, and adds 100."""
    assert other is None
    assert func is kernel
    return func(q, k, v, heads) + 100


@pytest.mark.parametrize("owner", [KeywordOnly(), closing_over(2.0)], ids=["keyword", "closure"])
@pytest.mark.parametrize("more", [{}, {"heads": 5}])
def test_globals_of_any_method(owner, more):
    """What it closes over and its defaults are the copy's too; its own module stays as it is."""
    q, k, v = torch.randn(3, 1, 4, 6)
    through = reach.through_globals
    plain = owner.forward(q, k, v, **more)
    forward, args, kwargs = through(owner.forward, (q, k, v), more, override)
    torch.testing.assert_close(forward(*args, **kwargs), plain + 200)
    assert torch.equal(owner.forward(q, k, v, **more), plain)


class Block:
    """Which is handed its options by position, and by name."""

    def forward(self, q, k, v, transformer_options=None, heads=3):
        return optimized_attention(q, k, v, heads, transformer_options=transformer_options)

    def by_name_alone(self, q, k, v, *more, transformer_options=None, heads=3):
        return optimized_attention(q, k, v, heads, transformer_options=transformer_options)


@pytest.mark.parametrize(
    ("name", "more", "named"),
    [
        ("forward", ({"of_a_pack": 7},), {}),
        ("forward", (None, 4), {}),
        ("forward", (), {"transformer_options": {"of_a_pack": 7}}),
        ("forward", (), {"heads": 4}),
        ("by_name_alone", (0, 0), {"heads": 4}),
    ],
)
def test_options_by_position(name, more, named):
    """Wherever they stand, and also where there are none; the call's own stay as they are."""
    q, k, v = torch.randn(3, 1, 4, 6)
    forward = getattr(Block(), name)
    before = [dict(each) if isinstance(each, dict) else each for each in more]
    attend, args, kwargs = reach.through_options(forward, (q, k, v, *more), named, override)
    torch.testing.assert_close(attend(*args, **kwargs), forward(q, k, v, *more, **named) + 100)
    assert [*more] == before
    if more and isinstance(more[0], dict):
        assert args[3]["of_a_pack"] == 7


class Callable:
    def __call__(self, owner, q, k, v):
        return optimized_attention(q, k, v, 3)


def decorated(function):
    """As another pack might, with a function of a module that knows no attention."""
    return torch.no_grad()(function)


@pytest.mark.parametrize(
    "function",
    [functools.partial(KeywordOnly.forward), Callable(), decorated(KeywordOnly.forward)],
    ids=["partial", "callable", "decorated"],
)
def test_globals_of_what_is_no_plain_method(function):
    """It is called as it is, and a run then says that TACA changed nothing."""
    forward, (q, k, v) = MethodType(function, KeywordOnly()), torch.randn(3, 1, 4, 6)
    called = reach.through_globals(forward, (q, k, v), {}, override)
    assert called[0] is forward
    assert torch.equal(called[0](*called[1], **called[2]), forward(q, k, v))
