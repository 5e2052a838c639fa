"""Load TACA LoRA on every family: what core merges, inside the window."""

import comfy.sd
import pytest
import torch
from safetensors.torch import save_file
from test_families import case, families, sample  # noqa: F401
from test_lora import loras, random_lora  # noqa: F401


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


def test_equals_the_merged_lora(case, folder, pack, apply_taca, loras, monkeypatch):  # noqa: F811
    """On every linear layer of the model, in the keys that core's own trainer writes."""
    model = families.load(case, folder, monkeypatch)
    state = random_lora(model, rank=2)
    # MiniMax-H3 refines the text before the run, where no window is.
    state = {k: v for k, v in state.items() if v.ndim < 3 and not (
        "MiniMax" in case.name and ("refiner" in k or "condition_proj" in k))}  # fmt: skip
    save_file(state, loras / "lora.safetensors")
    ours = pack["LoadTACALoRA"].execute(apply_taca(model, 1.0), "lora.safetensors", 0.5).result[0]
    merged = comfy.sd.load_lora_for_models(model, None, dict(state), 0.5, 0)[0]
    plain, expected, result = (sample(m, case) for m in (model, merged, ours))
    effect = (expected - plain).abs().max()
    assert effect > 1e-4
    assert (result - expected).abs().max() < 5e-3 * effect
    assert torch.equal(sample(model, case), plain)
