"""Where the models of the workflows are to be had from, and what App Mode shows."""

import importlib.util
import json
from pathlib import Path

import pytest

from support.workflow import (
    APP,
    DEMO,
    MODELS,
    PUBLISHED,
    USERS,
    VISION,
    app_form,
    nodes_of,
    read,
)

ELSEWHERE = "mscoco_uvit_small.pth"  # on Google Drive, from where the page fetches nothing
RENAMED = "clip_vision_l.safetensors"  # whose publisher calls it otherwise


def loaded():
    """Each file that a user's workflow loads, and the folder its loader looks in."""
    for path in USERS:
        for node in nodes_of(read(path)):
            names = [s["name"] for s in node.get("inputs", []) if s.get("widget")]
            for name, value in zip(names, node.get("widgets_values", []), strict=False):
                if name in MODELS:
                    yield value, "clip_vision" if node["type"] == VISION else MODELS[name]


def test_every_model_has_its_folder_and_address():
    files = set(loaded())
    assert {(name, folder) for name, (folder, _) in PUBLISHED.items()} == {
        each for each in files if each[0] != ELSEWHERE
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_address_is_one_the_page_downloads_from(name):
    """It fetches safetensors from Hugging Face, and a browser saves them under their own name."""
    _, url = PUBLISHED[name]
    assert url.startswith("https://huggingface.co/")
    assert "/resolve/main/" in url
    assert name.endswith(".safetensors")
    assert url.endswith(f"/{name}") == (name != RENAMED)


def test_models_are_where_cores_templates_have_them():
    """Those of them that are in a template of ComfyUI's own."""
    package = importlib.util.find_spec("comfyui_workflow_templates_json")
    if package is None:
        pytest.skip("ComfyUI's templates are not installed: comfyui-workflow-templates-json")
    core = {}

    def collect(found):
        if isinstance(found, dict):
            if {"name", "url", "directory"} <= found.keys():
                place = found["directory"], found["url"].partition("?")[0]
                core.setdefault(found["name"], set()).add(place)
            for each in found.values():
                collect(each)
        elif isinstance(found, list):
            for each in found:
                collect(each)

    for path in Path(package.submodule_search_locations[0], "templates").glob("*.json"):
        collect(json.loads(path.read_text("utf-8")))
    shared = PUBLISHED.keys() & core.keys()
    assert len(shared) >= 15
    for name in shared:
        assert tuple(PUBLISHED[name]) in core[name]


@pytest.mark.parametrize(
    "path", [p for p in [*USERS, *DEMO] if p.name.endswith(APP)], ids=lambda path: path.stem
)
def test_app_shows_widgets_and_pictures_of_its_workflow(path):
    app = read(path)
    assert app == app_form(read(path.with_name(path.name.replace(APP, ".json"))))
    nodes = {node["id"]: node for node in app["nodes"]}
    shown = app["extra"]["linearData"]
    for node, widget in shown["inputs"]:
        assert widget in [s["widget"]["name"] for s in nodes[node]["inputs"] if s.get("widget")]
    assert {"ImageCompare", "SaveImage"} == {nodes[node]["type"] for node in shown["outputs"]}
