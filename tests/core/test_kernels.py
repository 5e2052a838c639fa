"""Attention kernels that other nodes put into ComfyUI's one slot, beside TACA, in either order.

Stand-ins, each with the behaviour of one that exists: KJNodes' SageAttention, and core's Model
Attention Backend and Model Sparse Attention, which came after 0.30.
"""

import functools
import inspect

import pytest
import torch
from comfy.ldm.modules.attention import attention_sub_quad
from comfy.patcher_extension import CallbacksMP

from support import families, tiny
from support.families import named
from support.family_runs import dense as dense_family
from support.family_runs import sample as sample_family
from support.reference import SIZE, TEXT, attending, dense, dense_override, image_tokens
from support.tiny import KINDS, installed_on, sample

SLOT = "optimized_attention_override"


def orders(apply_taca, node, model, *settings):
    """The node behind the TACA node, and before it."""
    return node(apply_taca(model, *settings)), apply_taca(node(model), *settings)


def in_int8(x):
    """Rounded to 127 steps, in blocks of eight tokens."""
    blocks = [(block, block.abs().amax((-1, -2), keepdim=True) / 127) for block in x.split(8, 2)]
    return torch.cat([(block / step).round() * step for block, step in blocks], 2)


class Sage:
    """As KJNodes' Patch Sage Attention: the slot gets a kernel that asks for nobody else's, makes
    q and k int8, block by block, K without its mean, and makes its layout by views."""

    def __init__(self):
        self.used = []

    def __call__(
        self,
        func,
        q,
        k,
        v,
        heads,
        mask=None,
        attn_precision=None,
        skip_reshape=False,
        skip_output_reshape=False,
        **kwargs,
    ):
        if not skip_reshape:
            q, k, v = (x.view(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q, k, v))
        self.used.append((q.shape[2], k.shape[2]))
        q, k = in_int8(q), in_int8(k - k.mean(2, keepdim=True))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("kind", KINDS)
def test_sage(folder, apply_taca, kind):
    """As far from the dense run as its plain run is from plain attention; in all steps."""
    model, settings = tiny.load(folder, kind), {"steps": 3, "text": (TEXT, TEXT), "cfg": 1.0}
    plain, expected = (sample(dense(model, gamma), kind, **settings) for gamma in (1.0, 1.4))
    own_error = (sample(attending(model, Sage()), kind, **settings) - plain).norm()
    assert 0 < own_error < 0.1 * (expected - plain).norm()
    results = []
    for order in (0, 1):
        sage = Sage()
        ours = orders(apply_taca, lambda m, sage=sage: attending(m, sage), model, 1.4, 0.0)[order]
        results.append(sample(ours, kind, **settings))
        assert (results[-1] - expected).norm() < 2 * own_error
        joint = {(64, 64 + TEXT), (TEXT, 64 + TEXT)}
        assert set(sage.used) == joint | ({(64, 64)} if kind == "sd3" else set())
    assert torch.equal(*results)
    assert not installed_on(model)


class Backend:
    """As core's Model Attention Backend: the slot gets one of core's own attention functions,
    which may also take tensors in containers, each of which can be emptied once."""

    def __init__(self):
        self.used, self.from_containers = 0, 0

    def __call__(self, func, *args, **kwargs):
        self.used += 1
        assert kwargs["_inside_attn_wrapper"]  # or core's function would ask the slot again
        return attention_sub_quad(*args, **kwargs)

    def container_function(self, q, k, v, *args, **kwargs):
        self.from_containers += 1
        return attention_sub_quad(q.take(), k.take(), v.take(), *args, **kwargs)


@pytest.mark.parametrize("kind", KINDS)
def test_model_attention_backend(folder, apply_taca, kind):
    model, settings = tiny.load(folder, kind), {"steps": 3, "text": (TEXT, TEXT)}
    expected = sample(dense(model), kind, **settings)
    for order in (0, 1):
        backend = Backend()
        choose = lambda m, backend=backend: attending(m, backend)  # noqa: E731
        result = sample(orders(apply_taca, choose, model, 1.4, 0.0)[order], kind, **settings)
        torch.testing.assert_close(result, expected, atol=2e-3, rtol=2e-3)
        assert backend.used


class Container:
    def __init__(self, tensor):
        self.tensor = tensor

    def take(self):
        tensor, self.tensor = self.tensor, None
        return tensor


def coming(kernel, preferred):
    """As a later core's attention: called with containers, as 0.33 calls MiniMax-H3's, and with the
    attention that a model's file prefers."""

    def attention(q, k, v, heads, transformer_options, **kwargs):
        kwargs |= {"transformer_options": transformer_options, "_inside_attn_wrapper": True}
        is_contained = not isinstance(q, torch.Tensor)
        containers = [each if is_contained else Container(each) for each in (q, k, v)]
        override = transformer_options.get(SLOT)
        if hasattr(override, "container_function"):
            return override.container_function(*containers, heads, **kwargs)
        tensors = [container.take() for container in containers]
        if override is not None:
            return override(kernel, *tensors, heads, **kwargs)
        return preferred(*tensors, heads, **kwargs)

    return attention


@pytest.mark.parametrize("case", named("MiniMax-H3"), ids=str)
def test_containers_and_a_preferred_attention(case, folder, apply_taca, monkeypatch):
    """Inside the window TACA is in the slot: it gets tensors, and the file's preference gives way
    to what the user chose or, without, to core's own attention. Outside all is as it was."""
    minimax = pytest.importorskip("comfy.ldm.minimax.model", reason="this ComfyUI has no MiniMax")
    model = families.load(case, folder, monkeypatch)
    kernel, calls = minimax.optimized_attention, []

    def preferred(*args, **kwargs):
        calls.append("preferred")
        return kernel(*args, **kwargs)

    monkeypatch.setattr(minimax, "optimized_attention", coming(kernel, preferred))
    expected, plain = (sample_family(dense_family(model, case, g), case) for g in (1.4, 1.0))
    effect = (expected - plain).abs().max()

    def close(m, to):
        return (sample_family(m, case) - to).abs().max() < 2e-3 * effect

    calls.clear()
    assert close(model, plain)
    others = len(calls)  # the joint attention and, before the run, that of the text alone
    assert others > case.joint
    calls.clear()
    assert close(apply_taca(model, 1.4), expected)
    assert len(calls) == others - case.joint
    for order in (0, 1):
        backend = Backend()
        choose = lambda m, backend=backend: attending(m, backend)  # noqa: E731
        assert close(orders(apply_taca, choose, model, 1.4)[order], expected)
        assert (backend.used, backend.from_containers) == (2 * case.joint, 0)
        backend.used = backend.from_containers = 0
        assert close(orders(apply_taca, choose, model, 1.0)[order], plain)
        assert (backend.used, backend.from_containers) == (0, case.joint)


class Sparse:
    """As core's Model Sparse Attention: from some sigma on it answers calls that have as many
    queries as keys; all others it leaves to whoever was in the slot before. It takes its place in
    the slot at each step anew."""

    def __init__(self, start=99.0):
        self.start, self.installed, self.used = start, set(), []

    def install(self, options):
        previous = options.get(SLOT)
        if previous in self.installed:
            return

        def override(func, q, k, v, heads, mask=None, skip_reshape=False, **kwargs):
            kwargs |= {"mask": mask, "skip_reshape": skip_reshape}
            sigma = kwargs["transformer_options"]["sigmas"][0]
            if mask is not None or q.shape != k.shape or sigma > self.start:
                return (func if previous is None else previous)(
                    *([] if previous is None else [func]), q, k, v, heads, **kwargs
                )
            self.used.append(float(sigma))
            few = slice(None, None, 2)
            k, v = (x[:, :, few] if skip_reshape else x[:, few] for x in (k, v))
            return func(q, k, v, heads, **kwargs)

        self.installed.add(override)
        options[SLOT] = override

    def apply(self, model):
        if "model_options" not in inspect.signature(model.prepare_state).parameters:
            pytest.skip("this ComfyUI does not tell such a node a step's options")
        model = model.clone()
        self.install(model.model_options.setdefault("transformer_options", {}))
        model.add_callback_with_key(
            CallbacksMP.ON_PREPARE_STATE,
            "sparse",
            lambda patcher, timestep, model_options: self.install(
                model_options["transformer_options"]
            ),
        )
        return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [99.0, 0.9], ids=["from the first step", "behind the window"])
@pytest.mark.parametrize("backend", [None, Backend])
def test_sparse_attention_that_knows_its_limits(folder, apply_taca, kind, start, backend):
    """Inside the window joint attention is dense and exact; image-only attention, and every step
    outside, is sparse as it would be without TACA."""
    model, settings = tiny.load(folder, kind), {"steps": 8, "text": (TEXT, TEXT)}
    if backend is not None:
        model = attending(model, backend())
    length, alone = TEXT + image_tokens(torch.empty(1, 16, *SIZE)), Sparse(start)
    inner = dense_override(1.4, TEXT, length)

    def expected(func, q, k, v, heads, **kwargs):
        joint = q.shape[2 if kwargs.get("skip_reshape") else 1] == length
        if joint and kwargs["transformer_options"]["sigmas"][0] >= 0.97:
            return inner(func, q, k, v, heads, **kwargs).to(q.dtype)
        return theirs(func, q, k, v, heads, **kwargs)

    slot = {}
    alone.install(slot)
    theirs = slot[SLOT]
    dense_run = sample(attending(model, expected), kind, **settings)
    plain = sample(Sparse(start).apply(model), kind, **settings)
    assert (plain - dense_run).abs().max() > 0.1
    for order in (0, 1):
        sparse = Sparse(start)
        ours = orders(apply_taca, sparse.apply, model, 1.4)[order]
        result = sample(ours, kind, **settings)
        torch.testing.assert_close(result, dense_run, atol=2e-3, rtol=2e-3)
        assert sparse.used == alone.used
        assert min(sparse.used) < 0.4
    assert not installed_on(model)


def as_many_as_keys(func, q, k, v, heads, skip_reshape=False, **kwargs):
    """A kernel that takes as many queries as keys for granted, and says nothing."""
    dim = 2 if skip_reshape else 1
    missing = k.shape[dim] - q.shape[dim]
    q = torch.cat([q, *[q.narrow(dim, 0, 1)] * missing], dim)
    return func(q, k, v, heads, skip_reshape=skip_reshape, **kwargs)


def demanding(func, q, k, v, heads, **kwargs):
    if q.shape != k.shape:
        raise ValueError("sparse attention needs as many queries as keys")
    return func(q, k, v, heads, **kwargs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (demanding, "as many queries as keys"),
        (as_many_as_keys, r"TACA .* answers \d+ queries with \d+ .* take out the node"),
    ],
)
def test_sparse_attention_that_does_not(folder, apply_taca, kind, kernel, message):
    """It cannot take split queries: the run stops with an error, nothing is left behind."""
    model = tiny.load(folder, kind)
    plain = sample(model, kind, steps=2)
    for ours in orders(apply_taca, lambda m: attending(m, kernel), model):
        with pytest.raises(ValueError, match=message):
            sample(ours, kind, steps=2)
        assert not installed_on(model)
    assert torch.equal(sample(model, kind, steps=2), plain)


@pytest.mark.parametrize("case", named("MiniMax-H3"), ids=str)
@pytest.mark.parametrize("start", [1.0, 0.95, 0.85])
def test_sparse_attention_that_goes_round_the_slot(
    case, folder, apply_taca, monkeypatch, caplog, start
):
    """As core's of MiniMax-H3, which hands each block an attention of its own from some sigma on:
    an error if that is all of the window, a warning if some of it, and nothing behind it."""
    pytest.importorskip("comfy.ldm.minimax.model", reason="this ComfyUI has no MiniMax")
    model = families.load(case, folder, monkeypatch).clone()

    def block_patch(args, extra, attention):
        sigma = args["transformer_options"]["sigmas"][0]
        with monkeypatch.context() as m:
            if sigma <= start:
                m.setattr(attention, "forward", lambda x, *_, **__: attention.out_proj(x))
            return extra["original_block"](args)

    for i, block in enumerate(model.model.diffusion_model.blocks):
        patch = functools.partial(block_patch, attention=block.attn)
        model.set_model_patch_replace(patch, "dit", "double_block", i)
    ours = apply_taca(model, 1.4, 900.0)
    if start == 1.0:
        with pytest.raises(RuntimeError, match="TACA was bypassed in"):
            sample_family(ours, case, steps=4)
        return
    sample_family(ours, case, steps=4)
    warnings = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == (start > 0.9)
    assert all("in 1 calls inside the window" in w for w in warnings)
