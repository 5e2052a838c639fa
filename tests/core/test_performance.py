"""What TACA costs, by counting: operations, bytes, waits of the host, graphs. Nothing is timed.

Each call of the model in a real run is recorded between core's sampler and core's model, with all
that the nodes install, and compared with the same call of the plain model.
"""

import sys
from collections import Counter

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from support import tiny
from support.compiling import compiled, load
from support.tiny import KINDS, sample

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
schedule = sys.modules["taca_pack.taca.schedule"]
BLOCKS = {"flux": 4, "sd3": 2}
STEPS = {"steps": 6, "cfg": 1.0}  # of which the first is inside the window
READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__")


class Recorded(TorchDispatchMode):
    """Every operation of one call, what it wrote in bytes, and how much attention it was."""

    def __init__(self):
        super().__init__()
        self.operations, self.attention, self.written, self.reads = [], [], 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        outputs = [x for x in _tensors(result) if not x.dtype.is_complex]
        inputs = [x for x in _tensors((args, kwargs or {}))]
        shapes = tuple((tuple(x.shape), x.dtype) for x in (*inputs, *outputs))
        name = func.overloadpacket.__name__
        self.operations.append((str(func), shapes))
        if "scaled_dot_product" in name:
            q, k = args[:2]
            self.attention.append((q.shape[-2], k.shape[-2]))
        elif not name.startswith(("empty", "new_empty")):
            before = {x.untyped_storage().data_ptr() for x in inputs}
            mutates = func._schema.is_mutable
            self.written += sum(
                x.numel() * x.element_size()
                for x in outputs
                if mutates or x.untyped_storage().data_ptr() not in before
            )
        self.reads += name == "_local_scalar_dense"
        return result


def _tensors(tree):
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


class OnDevice(torch.Tensor):
    """A tensor that counts when the host asks for its values, as it would wait for a GPU's.

    So do all tensors that are computed with it.
    """

    asked = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in READS:
            OnDevice.asked += 1
            args = [x.as_subclass(torch.Tensor) if isinstance(x, OnDevice) else x for x in args]
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})


def recorded(model, kind, **settings):
    """Each call of a run."""
    calls = []

    def record(apply_model, call):
        with Recorded() as one:
            result = apply_model(call["input"], call["timestep"], **call["c"])
        calls.append(one)
        return result

    model = model.clone()
    model.set_model_unet_function_wrapper(record)
    sample(model, kind, **(STEPS | settings))
    return calls


def waits(model, kind, **settings):
    """How often the host asked for a value, in each call of a run."""
    calls = []

    def count(apply_model, call):
        OnDevice.asked = 0
        t = call["timestep"].clone().as_subclass(OnDevice)
        result = apply_model(call["input"], t, **call["c"])
        calls.append(OnDevice.asked)
        return result.as_subclass(torch.Tensor)

    model = model.clone()
    model.set_model_unet_function_wrapper(count)
    sample(model, kind, **(STEPS | settings))
    return calls


@pytest.fixture
def with_lora(folder, load_lora):
    """``model -> model`` with a LoRA of rank 2 on every linear layer of the blocks."""

    def add(model, dtype=torch.float32):
        generator, state = torch.manual_seed(0), {}
        for name, module in model.model.named_modules():
            if "blocks" in name and hasattr(module, "in_features"):
                for part, shape in (
                    ("up", (module.out_features, 2)),
                    ("down", (2, module.in_features)),
                ):
                    weight = torch.randn(shape, generator=generator) * 0.1
                    state[f"{name}.lora_{part}.weight"] = weight.to(dtype)
        return load_lora(model, state)

    return add


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [False, True])
def test_outside_the_window_nothing_is_done(folder, apply_taca, with_lora, kind, lora):
    """The plain model's operations in its order, on the same shapes, and not one more."""
    model = tiny.load(folder, kind)
    plain = recorded(model, kind)
    ours = recorded(apply_taca(with_lora(model) if lora else model), kind)
    assert len(plain) == len(ours) == STEPS["steps"]
    assert plain[0].operations == plain[1].operations
    assert ours[0].operations != plain[0].operations
    for one, other in zip(ours[1:], plain[1:], strict=True):
        assert one.operations == other.operations


@pytest.mark.parametrize("kind", KINDS)
def test_inside_the_window_two_attentions_and_one_copy_of_k(folder, apply_taca, kind):
    """Two calls for a joint attention, of together its size; K at most once, and the outputs."""
    model = tiny.load(folder, kind)
    text, length = 20, 20 + 64
    plain, ours = (
        recorded(m, kind, text=(text, text), batch=2)[0] for m in (model, apply_taca(model))
    )
    joint = plain.attention.count((length, length))
    assert joint == BLOCKS[kind]
    assert len(ours.attention) <= len(plain.attention) + joint
    assert _products(ours) == _products(plain)
    token = 2 * tiny.HIDDEN * 4 * joint  # bytes of one, in all blocks
    copied, scaled, outputs = length * token, text * token, length * token
    assert ours.written - plain.written <= copied + scaled + outputs + 200
    extra = Counter(name for name, _ in ours.operations)
    extra.subtract(name for name, _ in plain.operations)
    a_block = {"flux": 14, "sd3": 24}[kind]  # SD3's heads are apart in the attention call only
    assert sum((+extra).values()) <= a_block * joint + 20, extra
    assert not -extra


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_adds_two_products_a_layer_and_no_copy(folder, apply_taca, with_lora, kind):
    """To the layer's own output; all else are views."""
    model = tiny.load(folder, kind)
    layers = sum(
        "blocks" in name and hasattr(module, "in_features")
        for name, module in model.model.named_modules()
    )
    with torch.inference_mode():
        ours, both = (recorded(apply_taca(m), kind)[0] for m in (model, with_lora(model)))
    extra = Counter(name.split(".")[1] for name, _ in both.operations)
    extra.subtract(name.split(".")[1] for name, _ in ours.operations)
    views = {"flatten": 1, "view": 1, "numpy_T": 1}
    assert +extra == {name: n * layers for name, n in (views | {"linear": 1, "addmm_": 1}).items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_no_call_casts_a_lora(folder, apply_taca, with_lora, kind, dtypes):
    """A file of any dtype is cast once, to what a node has set the model to compute in."""
    file, compute = (getattr(torch, name) for name in dtypes)
    model = apply_taca(tiny.load(folder, kind, dtype=torch.bfloat16))
    model.set_model_compute_dtype(compute)
    casts = [
        Counter(shapes for name, shapes in recorded(each, kind)[0].operations if "_to_copy" in name)
        for each in (model, with_lora(model, file))
    ]
    assert casts[0] == casts[1]
    assert casts[0]


def _products(call):
    """Query x key products of all attention."""
    return sum(queries * keys for queries, keys in call.attention)


@pytest.mark.parametrize("kind", KINDS)
def test_the_host_waits_once_a_call(folder, apply_taca, with_lora, kind):
    """For the timestep; inside the window as outside it, and with any number of blocks."""
    model = tiny.load(folder, kind)
    for patched in (apply_taca(model), apply_taca(with_lora(model))):
        plain, ours = waits(model, kind), waits(patched, kind)
        assert [b - a for a, b in zip(plain, ours, strict=True)] == [1] * STEPS["steps"]
        calls = recorded(model, kind), recorded(patched, kind)
        # What is decided on the host itself, from the gammas of the rows.
        assert calls[1][0].reads - calls[0][0].reads <= 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_for_gamma_ramp_lora_and_size(folder, apply_taca, with_lora, kind):
    """Two graphs a size, plain and inside, for every gamma; one more with a LoRA."""
    fast = compiled(load(folder, kind), whole=True)
    ramp = schedule.Schedule(1.3, schedule.TimestepWindow(500.0, "linear"))

    def graphs(m, **settings):
        sample(m, kind, **(STEPS | {"text": (7, 7)} | settings))
        assert not counters["graph_break"]
        return counters["stats"]["unique_graphs"]

    assert graphs(apply_taca(fast)) == 2
    assert graphs(apply_taca(fast, schedule=ramp)) == 2
    if kind == "flux":
        assert graphs(apply_taca(fast, 1.1), size=(16, 24)) == 4
    else:
        assert graphs(apply_taca(with_lora(fast))) == 3
        assert graphs(apply_taca(with_lora(fast), schedule=ramp)) == 3
