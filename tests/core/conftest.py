"""Fixtures of the tests on models."""

import itertools
import sys

import comfy.ldm.flux.math
import comfy.ldm.modules.attention
import comfy.ldm.modules.diffusionmodules.mmdit
import folder_paths
import pytest
import torch
from comfy_execution.utils import CurrentNodeContext
from safetensors.torch import save_file
from torch._dynamo.utils import counters

from support import families


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def loras(tmp_path, monkeypatch):
    """An empty loras folder, as ComfyUI knows it."""
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors", ".pt"})
    )
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


@pytest.fixture
def load_lora(pack, loras):
    """``model, state or name -> model`` through the node Load TACA LoRA."""

    def load(model, lora, strength=1.0):
        name = lora
        if isinstance(lora, dict):
            name = f"{id(lora)}.safetensors"
            save_file({k: v.contiguous() for k, v in lora.items()}, loras / name)
        return pack["LoadTACALoRA"].execute(model, name, strength).result[0]

    return load


@pytest.fixture
def run_in_page(monkeypatch):
    """``node, inputs -> its first output, the text under it``, each run in a prompt of its own."""
    shown: list[str] = []
    text = sys.modules["taca_pack.nodes.ui.text"]
    monkeypatch.setattr(text, "show_text", lambda text, node_id=None: shown.append(text))
    prompts = itertools.count()

    def run(node, *inputs):
        shown.clear()
        with CurrentNodeContext(f"prompt {next(prompts)}", "1"):
            output = node.execute(*inputs).result[0]
        return output, "".join(shown)

    return run


@pytest.fixture(params=families.CASES, ids=str)
def case(request, record_property):
    """Each family that this ComfyUI has; for ``support/family_table.py``, by its name."""
    if not families.exists(request.param):
        pytest.skip(f"this ComfyUI has no {request.param.name}")
    record_property("model", request.param.name)
    return request.param


@pytest.fixture
def untraceable(monkeypatch):
    """An attention kernel that breaks the graph, as SageAttention does."""
    attend = torch.compiler.disable(comfy.ldm.modules.attention.attention_pytorch.__wrapped__)

    def attention(
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
        return attend(
            q,
            k,
            v,
            heads,
            mask=mask,
            skip_reshape=skip_reshape,
            skip_output_reshape=skip_output_reshape,
        )

    attention = comfy.ldm.modules.attention.wrap_attn(attention)
    for each in (comfy.ldm.flux.math, comfy.ldm.modules.diffusionmodules.mmdit):
        monkeypatch.setattr(each, "optimized_attention", attention)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
