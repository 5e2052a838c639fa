"""A real ComfyUI in this process: core's loaders and sampler, and the pack loaded as core does.

``dev.py test`` says where ComfyUI is, in COMFYUI_PATH.
"""

import asyncio
import logging
import os
import sys

# Servers that tests start inherit it: on shared cores, threads that spin only take time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from comfyui import load_pack
from hypothesis import HealthCheck, settings

import comfy.utils  # isort: skip

comfy.utils.set_progress_bar_enabled(False)
torch.set_grad_enabled(False)
# Whatever the machine does beside: no deadline. A failure comes again: the same examples each time.
settings.register_profile(
    "tests",
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("tests")
torch.set_num_threads(1)  # the models are tiny; on two cores threads would only wait

PACK = load_pack()


class Deprecations(logging.Handler):
    """Core logs that a function is deprecated: an error where the pack calls it."""

    def emit(self, record):
        frame = sys._getframe() if "deprecated" in record.getMessage() else None
        while frame is not None:
            if frame.f_globals.get("__name__", "").startswith(PACK.__name__):
                raise DeprecationWarning(record.getMessage())
            frame = frame.f_back


logging.getLogger().addHandler(Deprecations(logging.WARNING))


LONGEST = (
    "test_long_run.py",
    "test_server.py",
    "test_uvit_demo.py",
    "test_compile.py",
    "test_page.py",
    "test_families.py",
)


def pytest_collection_modifyitems(items):
    """The longest files first, so that no worker is left with one of them at the end."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session")
def pack():
    """The pack's nodes, by id."""
    extension = asyncio.run(PACK.comfy_entrypoint())
    nodes = asyncio.run(extension.get_node_list())
    return {node.define_schema().node_id: node for node in nodes}


@pytest.fixture
def apply_taca(pack):
    """``model -> model`` through the TACA node."""

    def apply(model, gamma=1.2, timestep_threshold=970.0, schedule=None):
        node = pack["TACAPatchModel"]
        return node.execute(model, gamma, timestep_threshold, schedule).result[0]

    return apply
