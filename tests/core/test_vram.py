"""Models and TACA LoRAs where a GPU's memory is short: ComfyUI's own loading, counted on a CPU.

ComfyUI never loads a part of a model on a CPU. Here it takes the CPU for a GPU with as much free
memory as a test says; what it decides, loads and frees is then its own.
"""

import sys

import comfy.model_management as management
import comfy.model_patcher
import pytest
import torch
from comfy.model_patcher import ModelPatcherDynamic
from comfy_extras.nodes_model_merging import ModelMergeSimple
from safetensors.torch import load_file

from support import tiny
from support.loras import random_lora, replaced
from support.tiny import KINDS, sample
from support.uvit import MODEL, write

CPU = torch.device("cpu", 0)  # for ComfyUI another device than the one to which it offloads
lora_module = sys.modules["taca_pack.taca.lora"]


class NoHostBuffer:
    """Pinned memory by comfy-aimdo needs CUDA's library; here none is ever pinned."""

    size = 0

    def __init__(self, *sizes):
        pass


class Gpu:
    """The CPU with some bytes free, of which loaded models take."""

    def __init__(self, free):
        self.size = free

    def free(self, device=None, torch_free_too=False):
        patchers = [m.model for m in management.current_loaded_models if m.model is not None]
        held = {id(patcher.model): patcher.loaded_size() for patcher in patchers}
        free = self.size - sum(held.values())
        return (free, 0) if torch_free_too else free


@pytest.fixture
def gpu(monkeypatch):
    """The pretended GPU; no model is on it."""
    management.unload_all_models()
    found = Gpu(2**40)
    monkeypatch.setattr(management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(management, "get_torch_device", lambda: CPU)
    monkeypatch.setattr(management, "get_free_memory", found.free)
    monkeypatch.setattr(management, "vram_state", management.VRAMState.NORMAL_VRAM)
    monkeypatch.setattr(management, "minimum_inference_memory", lambda: 0)
    monkeypatch.setattr(management, "extra_reserved_memory", lambda: 0)
    monkeypatch.setattr(management, "MIN_WEIGHT_MEMORY_RATIO", 1.0)  # activations take nothing
    yield found
    management.unload_all_models()


@pytest.fixture
def dynamic(gpu, monkeypatch):
    """ComfyUI's dynamic VRAM, as main.py sets it where there is a GPU."""
    monkeypatch.setattr("comfy_aimdo.host_buffer.HostBuffer", NoHostBuffer)
    monkeypatch.setattr(ModelPatcherDynamic, "_vbar_get", lambda self, create=False: None)
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", ModelPatcherDynamic)


def loaded():
    """What is loaded: bytes on the GPU by class of model."""
    entries = management.current_loaded_models
    return {type(m.model.model).__name__: m.model.loaded_size() for m in entries}


@pytest.mark.parametrize("kind", KINDS)
def test_low_vram(folder, apply_taca, load_lora, gpu, kind):
    """With half of the room, and with too little for the LoRA alone, the picture stays, and both
    together hold no more than there is."""
    model = tiny.load(folder, kind)
    state = random_lora(model)
    both = load_lora(apply_taca(model), state)
    expected = sample(both, kind, steps=3)
    whole = loaded()
    assert whole["LoRA"] == sum(v.nbytes for k, v in state.items() if "alpha" not in k)
    for free in (sum(whole.values()) // 2, whole["LoRA"] // 2):
        management.unload_all_models()
        gpu.size = free
        found = sample(both, kind, steps=3)
        held = loaded()
        assert model.model.model_lowvram
        assert sum(held.values()) <= free
        assert held["LoRA"] < whole["LoRA"] or free > whole["LoRA"]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert not replaced(model)


@pytest.mark.parametrize("algorithm", ["lora", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_dynamic_vram(folder, apply_taca, load_lora, dynamic, kind, algorithm):
    """The LoRA comes and goes by ComfyUI's dynamic VRAM, and no other model has to leave for it."""
    model = tiny.load(folder, kind)
    assert model.is_dynamic()
    state = random_lora(model, algorithm)
    both = load_lora(apply_taca(model), state)
    [patcher] = both.get_additional_models_with_key(lora_module.LORA_KEY)
    assert patcher.is_dynamic()
    expected = sample(both, kind, steps=3)
    static = load_lora(apply_taca(model.clone(disable_dynamic=True)), state)
    assert torch.equal(sample(static, kind, steps=3), expected)
    sample(both, kind, steps=1)
    stored = [v for k, v in state.items() if "alpha" not in k]
    assert patcher.loaded_size() == sum(v.nbytes for v in stored)
    assert len(patcher.backup) == len(stored)  # each once
    patcher.partially_unload(patcher.offload_device, 2**40)
    assert patcher.loaded_size() == 0 == len(patcher.backup)
    assert torch.equal(sample(both, kind, steps=3), expected)  # loaded again
    delegate = patcher.clone(disable_dynamic=True)  # as ComfyUI makes one for hooks
    assert not delegate.is_dynamic()
    assert delegate.model is not patcher.model


def test_text_encoders_stay(folder, apply_taca, load_lora, dynamic, gpu):
    """With a TACA LoRA too, memory that dynamic VRAM shares is not taken by unloading."""
    encoder = ModelPatcherDynamic(torch.nn.Linear(512, 512), CPU, torch.device("cpu"))
    model = tiny.load(folder, "flux")
    lora = load_lora(apply_taca(model), random_lora(model))
    for each in (model, lora):
        gpu.size = 2**40
        management.load_models_gpu([encoder])
        held = encoder.loaded_size()
        gpu.size = held  # nothing is free
        sample(each, "flux", steps=1)
        assert encoder.loaded_size() == held > 0


@pytest.mark.parametrize("kind", ["gpu", "dynamic"])
def test_merged_positions_come_and_go(tmp_path, request, kind):
    """Of a U-ViT, which ComfyUI does not patch: merged once a load, and taken back for others."""
    request.getfixturevalue(kind)
    files = [write(tmp_path / f"{seed}.safetensors", seed)[0] for seed in (0, 1)]
    model, other = map(MODEL.load_uvit, files)
    first, second = (load_file(file)["pos_embed"] for file in files)
    merged = ModelMergeSimple().merge(model, other, 0.25)[0]
    for patcher, wanted in ((merged, 0.25), (merged, 0.25), (model, 1.0), (merged, 0.25)):
        management.load_models_gpu([patcher])
        positions = model.model.diffusion_model.pos_embed
        torch.testing.assert_close(positions.data, torch.lerp(second, first, wanted))
    management.unload_all_models()
    if kind == "gpu" or hasattr(merged, "restore_loaded_backups"):  # else before the next load
        assert torch.equal(model.model.diffusion_model.pos_embed, first)
