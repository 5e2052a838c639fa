"""LoRAs on quantised files: the dense run with the weights that the file stands for."""

import json

import comfy.ops
import comfy.sd
import pytest
import torch
from safetensors.torch import load_file, save_file

from support import families, tiny
from support.families import named
from support.family_runs import dense
from support.family_runs import sample as sample_family
from support.loras import (
    core_model,
    in_blocks,
    merged_by_core,
    random_lora,
    replaced,
    with_lora,
)
from support.tiny import KINDS, reference, sample
from support.words import PROMPT, by_reference, dense_words, weighed


def scaled_fp8(weights, layout):
    """Weights in float8 with a scale for each matrix, in one of core's two layouts, and the same
    weights as a plain file would have them."""
    quantised, plain = dict(weights), dict(weights)
    for name in in_blocks(weights):
        weight = weights[f"{name}.weight"]
        scale = weight.abs().amax() / 448
        quantised[f"{name}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
        plain[f"{name}.weight"] = quantised[f"{name}.weight"].float() * scale
        if layout == "scaled_fp8":
            quantised[f"{name}.scale_weight"] = scale
            continue
        quantised[f"{name}.weight_scale"] = scale
        quantised[f"{name}.input_scale"] = torch.tensor(0.05)
        words = json.dumps({"format": "float8_e4m3fn"}).encode()
        quantised[f"{name}.comfy_quant"] = torch.tensor(list(words), dtype=torch.uint8)
    if layout == "scaled_fp8":
        quantised["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    return quantised, plain


class Packed(torch.Tensor):
    """Small integers with the shape of the weight that they stand for, as GGUF packs have it."""

    @classmethod
    def of(cls, weight):
        scale = weight.abs().amax(1, keepdim=True) / 7
        packed = (weight / scale).round().to(torch.int8).flatten()[None].as_subclass(cls)
        packed.scale, packed.shown = scale, weight.shape
        return packed

    @property
    def shape(self):
        return self.shown

    def unpacked(self):
        return self.as_subclass(torch.Tensor).view(self.shown) * self.scale


class PackedOps(comfy.ops.manual_cast):
    """``custom_operations`` as GGUF packs hand them to core's loader."""

    class Linear(comfy.ops.manual_cast.Linear):
        packed = None

        def _load_from_state_dict(self, state, prefix, metadata, strict, missing, *args):
            name = f"{prefix}weight"
            if isinstance(state[name], Packed):
                self.packed = state.pop(name)
                bits = self.packed.as_subclass(torch.Tensor)
                self.weight = torch.nn.Parameter(bits, requires_grad=False)
            super()._load_from_state_dict(state, prefix, metadata, strict, missing, *args)
            if self.packed is not None:
                missing.remove(name)

        def forward(self, x):
            if self.packed is None:
                return super().forward(x)
            return torch.nn.functional.linear(x, self.packed.unpacked(), self.bias)


def gguf(weights):
    """Weights as a GGUF pack hands them to core's loader, and as a plain file would have them."""
    names = [f"{name}.weight" for name in in_blocks(weights)]
    packed = weights | {name: Packed.of(weights[name]) for name in names}
    return packed, weights | {name: packed[name].unpacked() for name in names}


def quantised(weights, layout, path):
    """A model from these weights in a layout, and what a plain file would hold."""
    if layout == "GGUF":
        state, plain = gguf(weights)
        options = {"custom_operations": PackedOps}
        return comfy.sd.load_diffusion_model_state_dict(state, model_options=options), plain
    state, plain = scaled_fp8(weights, layout)
    return core_model(path, state), plain


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["scaled_fp8", "comfy_quant", "GGUF"])
def test_quantised_files(apply_taca, load_lora, kind, layout, tmp_path):
    """Through core's loader and its operations for such files, or a pack's: the dense run with the
    weights that the file stands for, and with a LoRA merged into those."""
    weights = tiny.weights(kind)
    model, plain = quantised(weights, layout, tmp_path / "quantised.safetensors")
    full = core_model(tmp_path / "plain.safetensors", plain)
    lora = random_lora(full, only="blocks")
    merged = core_model(tmp_path / "merged.safetensors", with_lora(plain, lora))
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    run = {"steps": 3, "cfg": 1.0}
    off, on, with_both = (
        reference(m, kind, gamma=gamma, first=3, **run)
        for m, gamma in ((full, 1.0), (full, 1.4), (merged, 1.4))
    )
    ours = apply_taca(model, 1.4, 0.0)
    for m, expected, without in ((ours, on, off), (load_lora(ours, lora), with_both, on)):
        result = sample(m, kind, **run)
        assert (result - expected).abs().max() < 1e-3 * (without - expected).abs().max()
    # Adapters that need the weight itself have core's, but not one that only its module unpacks.
    dora = random_lora(full, "dora", only="blocks")
    if layout == "GGUF":
        for state in (dora, random_lora(full, "OFT", only="blocks")):
            with pytest.raises(ValueError, match=r"needs the weights themselves .* a LoRA without"):
                load_lora(ours, state)
    else:
        expected = sample(apply_taca(merged_by_core(full, dora), 1.4, 0.0), kind, **run)
        result = sample(load_lora(ours, dora), kind, **run)
        torch.testing.assert_close(result, expected, atol=1e-3, rtol=1e-3)
    assert not replaced(model)
    assert all(torch.equal(v, before[k]) for k, v in model.model.state_dict().items())
    names = in_blocks(weights)
    modules = {n.removeprefix("diffusion_model."): m for n, m in model.model.named_modules()}
    kinds = {type(modules[name].weight.data).__name__ for name in names}
    assert kinds == {"Tensor" if layout == "GGUF" else "QuantizedTensor"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["scaled_fp8", "comfy_quant", "GGUF"])
def test_words_on_quantised_files(kind, layout, tmp_path):
    weights = tiny.weights(kind)
    model, plain = quantised(weights, layout, tmp_path / "quantised.safetensors")
    full = core_model(tmp_path / "plain.safetensors", plain)
    run = {"steps": 3, "cfg": 1.0}
    expected = sample(by_reference(full, dense_words({7: PROMPT})), kind, **run)
    effect = (sample(full, kind, **run) - expected).abs().max()
    ours = sample(model, kind, positive=weighed(tiny.conditioning(kind, 7), PROMPT), **run)
    assert (ours - expected).abs().max() < 2e-3 * effect


@pytest.mark.parametrize("case", named("FLUX.2", "Qwen-Image"), ids=str)
@pytest.mark.parametrize("layout", ["scaled_fp8", "comfy_quant"])
def test_quantised_files_of_families(case, apply_taca, load_lora, layout, tmp_path, monkeypatch):
    """As ComfyUI's own templates for these models ask for."""
    for name in ("source", "full"):
        (tmp_path / name).mkdir()
    families.load(case, tmp_path / "source", monkeypatch)
    [file] = (tmp_path / "source").iterdir()
    state, plain = scaled_fp8(load_file(file), layout)
    save_file(state, file)
    save_file(plain, tmp_path / "full" / file.name)
    model, full = (families.load(case, tmp_path / n, monkeypatch) for n in ("source", "full"))
    lora = random_lora(full, only="blocks")
    ours = apply_taca(model, 1.4, 0.0)
    off, on, with_both = (
        sample_family(dense(m, case, gamma), case)
        for m, gamma in ((full, 1.0), (full, 1.4), (merged_by_core(full, lora), 1.4))
    )
    for m, expected, without in ((ours, on, off), (load_lora(ours, lora), with_both, on)):
        result = sample_family(m, case)
        assert (result - expected).abs().max() < 1e-3 * (without - expected).abs().max()
    assert not replaced(model)
