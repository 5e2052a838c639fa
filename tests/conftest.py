"""A real ComfyUI in this process: core's loaders and sampler, and the pack loaded as core does.

``dev.py test`` says where ComfyUI is, in COMFYUI_PATH.
"""

import asyncio
import importlib.util
import os
import sys
from pathlib import Path

import pytest

# Servers that tests start inherit it: on shared cores, threads that spin only take time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

ROOT = Path(__file__).resolve().parent.parent
COMFYUI = Path(os.environ["COMFYUI_PATH"])

sys.path.insert(0, str(COMFYUI))

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing(False)

import torch  # noqa: E402
from comfy.cli_args import args as comfy_args  # noqa: E402

if not torch.cuda.is_available():
    comfy_args.cpu = True
    comfy_args.use_pytorch_cross_attention = True

import comfy.samplers  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
torch.set_grad_enabled(False)
torch.set_num_threads(1)  # the models are tiny; on two cores threads would only wait


def load_pack(folder, name):
    """Load a node pack as ComfyUI's ``load_custom_node`` does; returns the module."""
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


PACK = load_pack(ROOT, "taca_pack")


@pytest.fixture(scope="session")
def pack():
    """The pack's nodes, by id."""
    extension = asyncio.run(PACK.comfy_entrypoint())
    nodes = asyncio.run(extension.get_node_list())
    return {node.define_schema().node_id: node for node in nodes}


@pytest.fixture
def apply_taca(pack):
    """``model -> model`` through the node TACA Patch Model."""

    def apply(model, gamma=1.2, timestep_threshold=970.0, schedule=None):
        node = pack["TACAPatchModel"]
        return node.execute(model, gamma, timestep_threshold, schedule).result[0]

    return apply
