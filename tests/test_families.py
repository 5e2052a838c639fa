"""TACA on every family, against dense float64 attention in the same model."""

import importlib
import sys

import families
import pytest
import torch
from reference import dense_attention

import nodes

FAMILIES = sys.modules["taca_pack.taca.families"].FAMILIES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


@pytest.fixture(params=families.CASES, ids=str)
def case(request):
    """Each family that this ComfyUI has."""
    module, _, name = request.param.transformer.partition(":")
    try:
        found = hasattr(importlib.import_module(f"comfy.ldm.{module}"), name)
    except ImportError:
        found = False
    if not found:
        pytest.skip(f"this ComfyUI has no {request.param.name}")
    return request.param


def sample(model, case, steps=1, cfg=1.0, seed=3):
    """A run through core's KSampler function."""
    positive, negative = families.conditioning(case), families.conditioning(case, seed=5)
    empty = {"samples": torch.zeros(1, *case.latent)}
    return nodes.common_ksampler(
        model, seed, steps, cfg, "euler", "simple", positive, negative, empty
    )[0]["samples"]  # fmt: skip


def dense(model, case, gamma, calls=None):
    """The model with dense attention in place of every kernel, and Eq. 10 in the joint ones."""
    kinds = [kind for kind, length in case.spans for _ in range(length)]
    is_image, is_text = (
        torch.tensor([kind == wanted for kind in kinds]) for wanted in ("image", "text")
    )
    adjusted = torch.where(is_image[:, None] & is_text[None, :], gamma, 1.0).double()

    def override(func, q, k, v, heads, mask=None, skip_reshape=False, skip_output_reshape=False,
                 **kwargs):  # fmt: skip
        if not skip_reshape:
            q, k, v = (x.flatten(2).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        joint = q.shape[2] == k.shape[2] == len(kinds)
        if joint and calls is not None:
            calls.append(len(kinds))
        if mask is not None and mask.ndim == 3:
            mask = mask[:, None]
        out = dense_attention(q, k, v, adjusted if joint else 1.0, mask).to(q.dtype)
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    model = model.clone()
    options = model.model_options.setdefault("transformer_options", {})
    options["optimized_attention_override"] = override
    return model


def test_equals_dense(case, folder, apply_taca, monkeypatch):
    """Exact, with masks and references, text before the image or behind it."""
    model = families.load(case, folder, monkeypatch)
    calls = []
    expected = sample(dense(model, case, 1.4, calls), case)
    assert len(calls) == case.joint
    plain = sample(dense(model, case, 1.0), case)
    ours = sample(apply_taca(model, 1.4), case)
    error, effect = (ours - expected).abs().max(), (plain - expected).abs().max()
    assert error < 2e-3 * effect
    assert not any("forward" in m.__dict__ for m in model.model.modules())


def test_off_is_bit_identical(case, folder, apply_taca, monkeypatch):
    model = families.load(case, folder, monkeypatch)
    assert torch.equal(sample(apply_taca(model, 1.0), case), sample(model, case))
    two = {"steps": 2, "cfg": 3.0}
    assert not torch.equal(sample(apply_taca(model, 1.4), case, **two), sample(model, case, **two))


def test_every_family_has_a_case():
    names = {case.transformer.partition(":")[2] for case in families.CASES}
    elsewhere = {"Flux", "MMDiT"}  # test_model.py
    missing = [f.name for f in FAMILIES if not set(f.models) & (names | elsewhere)]
    assert not missing
