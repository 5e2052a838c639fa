"""The nodes and the workflows in a real ComfyUI server."""

import importlib.util
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

SCHEMA = Path(__file__).parent / "schema.json"
WORKFLOWS = sorted(
    [*(ROOT / "workflows").glob("*.json"), *(ROOT / "demo/workflows").glob("*.json")]
)


def load(name):
    """A module of the demo by path; its scripts import one another as scripts do."""
    sys.path.append(str(ROOT / "demo"))
    spec = importlib.util.spec_from_file_location(f"demo_{name}", ROOT / "demo" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    with load("comfy_server").serving(folder / "base", folder / "log") as running:
        yield running


@pytest.fixture(scope="module")
def object_info(server):
    return server.get("/object_info")


def test_schema_is_the_one_shared_workflows_rely_on(object_info):
    """Ids, sockets, types and defaults; to change them on purpose, delete schema.json and run."""
    ours = {name: info for name, info in object_info.items() if name.startswith("TACA")}
    kept = {
        name: {
            "display_name": info["display_name"],
            "input": {
                group: {socket: strip(spec) for socket, spec in sockets.items()}
                for group, sockets in info["input"].items()
            },
            "input_order": info["input_order"],
            "output": info["output"],
        }
        for name, info in ours.items()
        if "Demo" not in name
    }
    if not SCHEMA.exists() and not os.environ.get("CI"):
        SCHEMA.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    assert kept == json.loads(SCHEMA.read_text())


def strip(value):
    """Without tooltips, which may change."""
    if isinstance(value, dict):
        return {key: strip(v) for key, v in value.items() if key != "tooltip"}
    return [strip(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_fits_the_nodes(path, object_info):
    """Every node exists, every link joins sockets that exist and agree, every picture is there."""
    workflow = json.loads(path.read_text())
    by_id = {node["id"]: node for node in workflow["nodes"]}
    for node in workflow["nodes"]:
        if node["type"] in ("MarkdownNote", "Note", "PrimitiveNode"):
            continue
        info = object_info[node["type"]]
        known = {name for group in info["input"].values() for name in group}
        for socket in node.get("inputs", []):
            assert socket["name"].split(".")[0] in known, (node["type"], socket["name"])
        assert [o["type"] for o in node.get("outputs", [])] == info["output"], node["type"]
    for _, source, slot, target, socket, kind in workflow["links"]:
        assert by_id[source]["outputs"][slot]["type"] == kind
        assert by_id[target]["inputs"][socket]["type"] in (kind, "*") or kind == "COMBO"
    assert path.with_suffix(".jpg").exists()


def test_the_demo_draws_the_prompt(server, tmp_path, monkeypatch):
    """The demo's own graph over HTTP: the checker finds the prompted shapes in both pictures."""
    run, world = load("run"), load("world")
    options = ["run.py", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", options)
    graph = run.graph_of(run.options_of(options[1:]))
    progress = []
    outputs = server.run(graph, lambda *event: progress.append(event))
    assert progress[-1][1:] == (28, 28)
    pictures = {}
    for name in ("plain", "taca"):
        data = server.picture(outputs[name]["images"][0])
        picture = Image.open(io.BytesIO(data)).convert("RGB").resize((64, 64), Image.NEAREST)
        pictures[name] = np.asarray(picture, np.float32) / 255
        verdict = world.check(pictures[name], "a red circle left of a blue square")
        assert verdict["everything"], (name, verdict)
    assert np.abs(pictures["plain"] - pictures["taca"]).max() > 1 / 255


def test_schedule_node_replaces_the_widgets(server):
    """Through the API as a saved workflow has it, its nested widget named parent.child."""
    run = load("run")
    graph = run.graph_of(run.options_of(["--gamma", "1.7", "--threshold", "0"]))
    graph["schedule"] = run.node("TACASchedule", gamma=1.2, window="timestep",
                                 **{"window.timestep_threshold": 970.0})  # fmt: skip
    expected = server.run(run.graph_of(run.options_of([])))
    graph["taca_model"]["inputs"]["schedule"] = ["schedule", 0]
    given = server.run(graph)
    a, b = (server.picture(o["taca"]["images"][0]) for o in (expected, given))
    assert np.array_equal(*(np.asarray(Image.open(io.BytesIO(x))) for x in (a, b)))


def test_bad_input_is_an_error_at_the_node(server):
    run = load("run")
    graph = run.graph_of(run.options_of([]))
    graph["taca_model"]["inputs"]["gamma"] = float("nan")
    with pytest.raises(RuntimeError, match=r"gamma"):
        server.run(graph)
