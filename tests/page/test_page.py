"""Every workflow in ComfyUI's real page; screenshots go to .dev/screenshots."""

import io
import os
from itertools import combinations
from unittest import mock

import numpy as np
import pytest
import world
from comfy_server import serving
from PIL import Image

from support.page import SCREENSHOTS, browsing, chromium
from support.workflow import (
    APP,
    DEMO,
    ONE_THREAD,
    ROOT,
    USERS,
    api_form,
    place_files,
    problems_of,
    read,
)

FEW = "\n".join(world.captions("held-out")[:6])  # of a search of minutes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not chromium(), reason="no Chromium: install one, or name it in the variable CHROMIUM"
    ),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    models = place_files(folder / "base", map(read, USERS))
    with (
        mock.patch.dict(os.environ, ONE_THREAD),
        serving(folder / "base", folder / "log", models) as running,
    ):
        yield running


@pytest.fixture(scope="module")
def object_info(server):
    return server.get("/object_info")


@pytest.fixture(scope="module", params=[False, True], ids=["LiteGraph", "Nodes 2.0"])
def page(request, server):
    with browsing(server, request.param) as page:
        assert page.errors == []
        yield page


def overlapping(boxes, gap=8):
    """Pairs of nodes with less than a gap between them."""
    return [
        (one, other)
        for (one, a), (other, b) in combinations(boxes.items(), 2)
        if all(a[i] < b[i + 2] + gap and b[i] < a[i + 2] + gap for i in (0, 1))
    ]


@pytest.mark.parametrize(
    "path",
    [path for path in [*DEMO, *USERS] if not path.name.endswith(APP)],
    ids=lambda path: path.stem,
)
def test_workflow_in_the_page(path, page, server, object_info):
    """It opens with all its nodes and values, none on another; the demo's run and are shown."""
    workflow = read(path)
    page.open(workflow)
    assert page.marked() == []
    assert overlapping(page.boxes()) == []
    sent = page.api_form()
    for node in sent.values():
        del node["_meta"]
    assert sent == api_form(workflow, object_info)
    if path in DEMO:
        page.shorten({"TrainUViT": ("steps", 4), "TACATrial": ("prompts", FEW)})
        run = page.run()
        assert run["status"]["status_str"] == "success", run["status"]["messages"]
        page.wait_for(run["outputs"])
        for image in (i for output in run["outputs"].values() for i in output.get("images", ())):
            picture = Image.open(io.BytesIO(server.picture(image))).convert("RGB")
            # In one colour at least: green on grey is as bright as the grey.
            assert np.asarray(picture).std((0, 1)).max() > 10, f"{image['filename']} is blank"
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.draw().save(SCREENSHOTS / f"{path.stem}{' 2.0' * page.nodes_2}.png")
    assert overlapping(page.boxes()) == [], "after a run, with what nodes show"
    assert page.errors == []


@pytest.mark.parametrize(
    "values",
    [
        [1.3, "timestep", 940],  # saved before there were shapes
        [1.3, "timestep", 940, "linear"],
        [1.3, "percent", 0.1, 0.4, "cosine"],
        [1.3, "first steps", 5, "linear"],
        [1.3, "curve", {"interpolation": "linear", "points": [[0, 1], [1, 0]]}],
    ],
    ids=lambda values: values[1],
)
def test_nested_widgets_keep_their_values(values, page, object_info):
    """TACA Schedule's window brings widgets of its own."""
    output = {"name": "schedule", "type": "TACA_SCHEDULE", "links": []}
    node = {
        "id": 1,
        "type": "TACASchedule",
        "pos": [0, 0],
        "size": [400, 200],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [],
        "outputs": [output],
        "properties": {},
        "widgets_values": values,
    }
    page.open(
        {
            "version": 0.4,
            "last_node_id": 1,
            "last_link_id": 0,
            "nodes": [node],
            "links": [],
            "groups": [],
            "config": {},
            "extra": {},
        }
    )
    saved, sent = page.saved(), page.api_form()
    assert saved["nodes"][0]["widgets_values"][: len(values)] == values
    assert problems_of(saved, object_info) == []
    assert sent["1"]["inputs"] == api_form(saved, object_info)["1"]["inputs"]
    assert page.errors == []


def test_the_main_node_is_found_first(page):
    """By its name, and by what users call what it does."""
    for text in ("taca", "prompt following", "follow prompt", "prompt adherence", "提示词"):
        assert page.found(text)[0] == "TACAPatchModel", text
    assert "TACAPatchModel" in page.found("attention")
    for text in ("prompt weights", "提示词权重"):
        assert page.found(text)[0] == "TACATextEncode", text


def test_nodes_say_what_a_run_did(page):
    """Under the node itself: what acted, with a warning; a LoRA without TACA fails there."""
    workflow = read(ROOT / "demo/workflows/01_With_and_without_TACA.json")
    node = next(n for n in workflow["nodes"] if n["type"] == "TACAPatchModel")
    runs = (1.2, 970, 3, ""), (1.6, 1000, 1, "Above gamma 1.5 pictures tend to break")
    for gamma, threshold, steps, warning in runs:
        node["widgets_values"] = [gamma, threshold]
        page.open(workflow)
        page.shorten({"PrimitiveInt": ("value", 70 + 2 * steps + page.nodes_2)})
        page.run()
        said = f"gamma {gamma:g} at t >= {threshold:g} acted on {steps} of 28 steps."
        text = page.text_under(node["id"], said)
        assert text.startswith(said)
        assert warning in text
    lora = {**node, "type": "LoadTACALoRA", "widgets_values": ["taca_demo_lora.safetensors", 1]}
    lora["inputs"] = [each for each in node["inputs"] if each["name"] == "model"]
    workflow["nodes"][workflow["nodes"].index(node)] = lora
    page.open(workflow)
    [failed] = [
        message for kind, message in page.run()["status"]["messages"] if kind == "execution_error"
    ]
    assert failed["node_type"] == "LoadTACALoRA"
    assert "add the TACA node" in failed["exception_message"]
