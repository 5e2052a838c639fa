"""torch.compile as core's TorchCompileModel and KJNodes' nodes apply it.

ComfyUI compiles with a filter that drops every guard on ``transformer_options``; what a patch
changes there is frozen at the first trace. Dynamo alone, without a backend, shows it.
"""

import comfy.ldm.flux.math
import comfy.ldm.modules.attention
import comfy.ldm.modules.diffusionmodules.mmdit
import comfy.utils
import pytest
import tiny
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from test_model import KINDS, installed_on, sample
from torch._dynamo.utils import counters


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def compiled(model, whole, backend="eager"):
    """As TorchCompileModel does for a whole model, and KJNodes for each block."""
    transformer = model.model.diffusion_model
    lists = [
        n for n in ("double_blocks", "single_blocks", "joint_blocks") if hasattr(transformer, n)
    ]
    keys = ["diffusion_model"] if whole else [
        f"diffusion_model.{n}.{i}" for n in lists for i in range(2)
    ]  # fmt: skip
    model = model.clone()
    set_torch_compile_wrapper(
        model, backend=backend, options={"guard_filter_fn": skip_torch_compile_dict}, keys=keys
    )
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("whole", [True, False])
def test_both_orders_on_and_off(folder, apply_taca, kind, whole):
    """Compile before or after TACA, with and without it, in one process: never a stale result."""
    model = tiny.load(folder, kind)
    plain, ours = (sample(m, kind, steps=6, text=(7, 7)) for m in (model, apply_taca(model)))
    fast = compiled(model, whole)
    for m, expected in [
        (apply_taca(fast), ours),
        (fast, plain),
        (compiled(apply_taca(model), whole), ours),
        (apply_taca(fast), ours),
        (fast, plain),
    ]:
        result = sample(m, kind, steps=6, text=(7, 7))
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain, ours, atol=1e-2)
    assert not counters["graph_break"]
    assert not installed_on(model)


@pytest.mark.parametrize("kind", KINDS)
def test_two_graphs_a_shape_and_none_for_gamma(folder, apply_taca, kind):
    fast = compiled(tiny.load(folder, kind), whole=True)

    def graphs(gamma, text):
        sample(apply_taca(fast, gamma), kind, steps=6, text=(text, text))
        return counters["stats"]["unique_graphs"]

    assert graphs(1.2, 7) == 2
    assert graphs(1.3, 7) == 2
    dynamic = graphs(1.2, 9)  # dynamo makes the length dynamic: two more graphs, for all lengths
    assert dynamic == 4
    assert graphs(1.4, 12) == dynamic


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("whole", [True, False])
def test_a_kernel_that_breaks_the_graph(folder, apply_taca, kind, whole, monkeypatch, caplog):
    """With e.g. SageAttention the graph breaks and is compiled in pieces, without guards: those
    with TACA must never be taken for the plain model's."""
    untraceable = torch.compiler.disable(comfy.ldm.modules.attention.attention_pytorch.__wrapped__)

    def attention(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False,
                  skip_output_reshape=False, **kwargs):  # fmt: skip
        return untraceable(q, k, v, heads, mask=mask, skip_reshape=skip_reshape,
                           skip_output_reshape=skip_output_reshape)  # fmt: skip

    attention = comfy.ldm.modules.attention.wrap_attn(attention)
    for module in (comfy.ldm.flux.math, comfy.ldm.modules.diffusionmodules.mmdit):
        monkeypatch.setattr(module, "optimized_attention", attention)
    model = tiny.load(folder, kind)
    plain, ours = (sample(m, kind, steps=6, text=(7, 7)) for m in (model, apply_taca(model)))
    fast = compiled(model, whole)
    caplog.clear()
    for m, expected in [(apply_taca(fast), ours), (fast, plain)] * 2:
        result = sample(m, kind, steps=6, text=(7, 7))
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
    assert "cannot be compiled in one piece" in caplog.text
    assert not installed_on(model)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_inductor(folder, apply_taca, kind):
    """The compiler users have, on the whole model."""
    model = tiny.load(folder, kind)
    plain, ours = (sample(m, kind, steps=6, text=(7, 7)) for m in (model, apply_taca(model)))
    fast = compiled(model, whole=True, backend="inductor")
    for m, expected in [(apply_taca(fast), ours), (fast, plain)]:
        result = sample(m, kind, steps=6, text=(7, 7))
        torch.testing.assert_close(result, expected, atol=2e-3, rtol=2e-3)
