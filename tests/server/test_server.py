"""The nodes and the workflows in a real ComfyUI server."""

import io
import json
import os
import re
from unittest import mock
from urllib.parse import quote

import numpy as np
import pytest
import run
import world
from comfy_server import serving
from PIL import Image

from support.servers import (
    DEMO_MODEL,
    LORA,
    U_VIT,
    add_tiny_clip,
    on_the_demo_model,
    save_lora,
    save_uvit,
)
from support.workflow import (
    APP,
    BLUEPRINT,
    DEMO,
    NOTES,
    ONE_THREAD,
    ROOT,
    USERS,
    api_form,
    blueprint_of,
    nodes_of,
    problems_of,
    read,
    source_of,
)

SCHEMA = ROOT / "tests/schema.json"
DOCS = "/extensions/comfyui-taca/docs"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    for kind, name, save in (("loras", LORA, save_lora), ("diffusion_models", U_VIT, save_uvit)):
        (folder / "base/output" / kind).mkdir(parents=True)
        save(folder / "base/output" / kind / name)
    add_tiny_clip(folder / "base")
    with (
        mock.patch.dict(os.environ, ONE_THREAD),
        serving(folder / "base", folder / "log") as running,
    ):
        yield running


@pytest.fixture(scope="module")
def object_info(server):
    return server.get("/object_info")


def test_schema_is_the_one_shared_workflows_rely_on(object_info):
    """Ids, sockets, types and defaults; to change them on purpose, delete schema.json and run."""
    ours = {n: info for n, info in object_info.items() if "TACA" in n or n.endswith("UViT")}
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


def are_files(value):
    return isinstance(value, list) and all(str(v).endswith(".safetensors") for v in value)


def strip(value):
    """Without tooltips, which may change, and without the files that happen to be there."""
    if isinstance(value, dict):
        return {k: strip(v) for k, v in value.items() if k != "tooltip" and not are_files(v)}
    return [strip(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("path", [*DEMO, *USERS], ids=lambda path: path.stem)
def test_workflow_is_right(path, object_info):
    """It can be read, says what it is for, and where its nodes and models come from."""
    workflow = read(path)
    assert problems_of(workflow, object_info) == []
    [note] = [node for node in workflow["nodes"] if node["type"] in NOTES]
    text = note["widgets_values"][0]
    assert re.match("# .+: .+", text), "the model, and what is done with it: the card's words"
    assert "`" not in text, "Nodes 2.0 draws them in a colour that cannot be read"
    for node in nodes_of(workflow):
        saved = node["properties"]
        source = source_of(node, object_info[node["type"]], saved.get("ver"))
        assert {key: saved.get(key) for key in source} == source
        for model in source.get("models", ()):
            assert f"- {model['directory']}: [{model['name']}]({model['url']})" in text
    assert path.with_suffix(".jpg").exists()


def with_schedule():
    """The SD3.5 workflow with a TACA Schedule, and its nodes by type."""
    workflow = read(ROOT / "workflows/02_SD3.5-Medium_with_and_without_TACA.json")
    nodes = {node["type"]: node for node in workflow["nodes"]}
    socket = next(s for s in nodes["TACAPatchModel"]["inputs"] if s["name"] == "schedule")
    socket["link"] = 1000
    nodes["TACASchedule"] = {
        "id": 1000,
        "type": "TACASchedule",
        "pos": [0, 5000],
        "size": [300, 100],
        "inputs": [],
        "outputs": [{"name": "schedule", "type": "TACA_SCHEDULE", "links": [1000]}],
        "widgets_values": [1.2, "timestep", 970, "step"],
    }
    target = nodes["TACAPatchModel"]
    slot = target["inputs"].index(socket)
    workflow["nodes"].append(nodes["TACASchedule"])
    workflow["links"].append([1000, 1000, 0, target["id"], slot, "TACA_SCHEDULE"])
    return workflow, nodes


def values(kind, *new):
    """A change of the first widgets of a node."""
    return lambda nodes: nodes[kind]["widgets_values"].__setitem__(slice(len(new)), new)


BREAKS = {
    "scheduler is 'norml'": values("KSampler", 42, "fixed", 30, 7, "euler", "norml"),
    "sampler_name is 'normal'": values("KSampler", 42, "fixed", 30, 7, "normal", "euler"),
    "steps is 7.5": values("KSampler", 42, "fixed", 7.5, 30),
    "None is 30": values("KSampler", 42, 30),  # the seed's control left out
    "denoise is None": lambda nodes: nodes["KSampler"]["widgets_values"].pop(),
    "None is 1": lambda nodes: nodes["KSampler"]["widgets_values"].append(1),
    "gamma is 11": values("TACAPatchModel", 11),
    "gamma is True": values("TACAPatchModel", True),
    "window is 'drawn'": values("TACASchedule", 1.2, "drawn"),
    "window.timestep_threshold is None": lambda nodes: nodes["TACASchedule"].update(
        widgets_values=[1.2, "timestep"]
    ),
    "window.timestep_threshold is 1001": values("TACASchedule", 1.2, "timestep", 1001),
    "no node TACAPatch": lambda nodes: nodes["TACAPatchModel"].update(type="TACAPatch"),
    "no input modell": lambda nodes: nodes["TACAPatchModel"]["inputs"][0].update(name="modell"),
    "model is not connected": lambda nodes: nodes["KSampler"]["inputs"][0].update(link=None),
    "joins CLIP and TACA_SCHEDULE": lambda nodes: nodes["TACASchedule"]["outputs"][0].update(
        type="CLIP"
    ),
    "hangs": lambda nodes: nodes["VAEDecode"]["inputs"].pop(),
    "overlap": lambda nodes: nodes["VAEDecode"].update(pos=nodes["KSampler"]["pos"]),
    "sticks out of": lambda nodes: nodes["KSampler"]["size"].__setitem__(1, 2000),
}


@pytest.mark.parametrize("problem", BREAKS)
def test_broken_workflow_is_seen(problem, object_info):
    workflow, nodes = with_schedule()
    assert problems_of(workflow, object_info) == []
    BREAKS[problem](nodes)
    assert problem in "\n".join(problems_of(workflow, object_info))


SAID = {  # by workflows that say something about a run; a sweep shows one sheet
    "15_FLUX.1-dev_attention_report": "Where TACA acts, text gets",
    "14_FLUX.1-dev_on_which_steps": "TACA acts on 3 of 30 steps.",
    "12_FLUX.1-dev_sweep": "",
    "13_FLUX.1-dev_sweep_with_CLIP_scores": "",
    "23_FLUX.1-dev_sweep_with_Prompt_Check": "2 pictures, ",
    "24_FLUX.1-dev_evidence": '"winner"',
    "25_SD3.5-Medium_evidence": '"winner"',
}
FIRST = ROOT / "demo/workflows/01_With_and_without_TACA.json"
GRAPHS = [path for path in [*USERS, FIRST] if not path.name.endswith(APP)]


def pictures_of(server, outputs):
    """What each node put out."""
    return [
        [
            np.asarray(Image.open(io.BytesIO(server.picture(image))).convert("RGB"), np.float32)
            for image in output.get("images", ())
        ]
        for output in outputs.values()
    ]


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_workflow_runs(path, server, object_info):
    """The users' on the demo's model, its own as it is; with TACA the picture is another."""
    graph = api_form(read(path), object_info)
    if path in USERS:
        graph = on_the_demo_model(graph, object_info)
    outputs = server.run(graph)
    shown = pictures_of(server, outputs)
    pictures = [picture for each in shown for picture in each]
    # A second pass starts from grey: the demo's model has nothing that encodes pictures.
    enough = any if "upscale" in path.stem else all
    assert enough(picture.std() > 10 for picture in pictures)
    if path.stem in SAID:
        texts = [text for output in outputs.values() for text in output.get("text", ())]
        assert pictures
        assert all(SAID[path.stem] in text for text in texts)
        assert bool(texts) == bool(SAID[path.stem])
    elif path.stem == "27_U-ViT_training":
        assert pictures, "a plot of the loss"
        assert any(name.startswith("uvit_0") for name in server.get("/models/diffusion_models"))
    elif path.stem == "26_U-ViT_sampling":
        assert pictures
    elif "train" in path.stem:
        assert any(name.startswith("taca_flux1") for name in server.get("/models/loras"))
    elif "Recipe" in path.stem:
        patch = next(n for n in graph.values() if n["class_type"] == "TACAPatchModel")
        patch["inputs"]["gamma"] = 1.0
        patch["inputs"].pop("schedule", None)
        plain = [picture for each in pictures_of(server, server.run(graph)) for picture in each]
        assert any(np.abs(a - b).max() > 1 for a, b in zip(pictures, plain, strict=True))
    else:
        plain, taca = filter(None, shown)
        assert np.abs(np.stack(plain) - np.stack(taca)).max() > 1
        [compared] = [output for output in outputs.values() if "a_images" in output]
        assert len(compared["a_images"]) == len(compared["b_images"]) == len(plain)


@pytest.mark.parametrize(
    ("name", "judge", "shown"),
    [
        ("13_FLUX.1-dev_sweep_with_CLIP_scores", "TACAAlignmentScore", "CLIP {:.4f}"),
        ("23_FLUX.1-dev_sweep_with_Prompt_Check", "TACAPromptCheck", "check {:.3f}"),
    ],
)
def test_scores_stand_behind_the_labels_of_a_sweep(name, judge, shown, server, object_info):
    """The workflow's own, from Sweep to Score to the sheet: one for each picture, in its place."""
    path = ROOT / f"workflows/{name}.json"
    graph = on_the_demo_model(api_form(read(path), object_info), object_info)
    by_class = {content["class_type"]: node for node, content in graph.items()}
    sheet, score = by_class["TACAContactSheet"], by_class[judge]
    assert graph[sheet]["inputs"]["labels"] == [score, 1]
    for output in (0, 1):
        graph[f"see {output}"] = {"class_type": "PreviewAny", "inputs": {"source": [score, output]}}
    outputs = server.run(graph)
    numbers, labels = (outputs[f"see {output}"]["text"] for output in (0, 1))
    assert len(numbers) == len(set(numbers)) == 2
    for number, label, gamma in zip(numbers, labels, ("1", "1.2"), strict=True):
        assert re.fullmatch(rf"gamma {gamma}\b.*: {shown.format(float(number))}", label), label
    assert outputs[by_class["SaveImage"]]["images"]


def test_the_demo_draws_the_prompt(server, tmp_path):
    """The demo's own graph over HTTP: the checker finds the prompted shapes in both pictures."""
    prompt = "a red circle left of a blue square"
    graph = run.graph_of(run.options_of(["--out", str(tmp_path), "--prompt", prompt]))
    graph["model"]["inputs"]["unet_name"] = DEMO_MODEL  # the clean one, which draws it right anyway
    progress = []
    outputs = server.run(graph, lambda *event: progress.append(event))
    assert progress[-1][1:] == (28, 28)
    pictures = {}
    for name in ("plain", "taca"):
        data = server.picture(outputs[name]["images"][0])
        picture = Image.open(io.BytesIO(data)).convert("RGB").resize((64, 64), Image.NEAREST)
        pictures[name] = np.asarray(picture, np.float32) / 255
        verdict = world.check(pictures[name], prompt)
        assert verdict["everything"], (name, verdict)
    assert np.abs(pictures["plain"] - pictures["taca"]).max() > 1 / 255


def test_schedule_node_replaces_the_widgets(server):
    """Through the API as a saved workflow has it, its nested widget named parent.child."""
    prompt = ["--prompt", "a red circle left of a blue square"]
    graph = run.graph_of(run.options_of([*prompt, "--gamma", "1.7", "--threshold", "0"]))
    graph["schedule"] = run.node(
        "TACASchedule", gamma=1.2, window="timestep", **{"window.timestep_threshold": 970.0}
    )
    expected = server.run(run.graph_of(run.options_of(prompt)))
    graph["taca_model"]["inputs"]["schedule"] = ["schedule", 0]
    given = server.run(graph)
    a, b = (server.picture(o["taca"]["images"][0]) for o in (expected, given))
    assert np.array_equal(*(np.asarray(Image.open(io.BytesIO(x))) for x in (a, b)))


def test_bad_input_is_an_error_at_the_node(server):
    graph = run.graph_of(run.options_of(["--captions", "1"]))
    graph["taca_model"]["inputs"]["gamma"] = float("nan")
    with pytest.raises(RuntimeError, match=r"gamma"):
        server.run(graph)


def test_blueprint_is_listed_and_right(server):
    """Every node exists; every socket is one it has, in the page's order; every link holds."""
    assert blueprint_of(server)[1]["data"] == BLUEPRINT.read_text("utf-8")
    info = server.get("/object_info")
    blueprint = read(BLUEPRINT)
    [outer], [inner] = blueprint["nodes"], blueprint["definitions"]["subgraphs"]
    assert outer["type"] == inner["id"]
    assert [i["name"] for i in outer["inputs"]] == [i["name"] for i in inner["inputs"]]
    nodes = {node["id"]: node for node in inner["nodes"]}
    for node in nodes.values():
        about = info[node["type"]]
        known = {n: spec for group in about["input"].values() for n, spec in group.items()}
        sockets = [socket for socket in node["inputs"] if "widget" not in socket]
        assert node["inputs"][: len(sockets)] == sockets, "the page puts widgets last"
        for socket in node["inputs"]:
            kind = known[socket["name"]][0]
            assert socket["type"] == ("COMBO" if isinstance(kind, list) else kind)
        required = about["input"]["required"]
        assert required.keys() <= {socket["name"] for socket in node["inputs"]}
        assert [output["type"] for output in node["outputs"]] == about["output"]
    for link in inner["links"]:
        if link["origin_id"] == -10:
            start = inner["inputs"][link["origin_slot"]]
            assert link["id"] in start["linkIds"]
        else:
            start = nodes[link["origin_id"]]["outputs"][link["origin_slot"]]
            assert link["id"] in start["links"]
        if link["target_id"] == -20:
            end = inner["outputs"][link["target_slot"]]
            assert end["linkIds"] == [link["id"]]
        else:
            end = nodes[link["target_id"]]["inputs"][link["target_slot"]]
            assert end["link"] == link["id"]
        assert start["type"] == link["type"] == end["type"]


def test_help_and_translations_are_served(server, pack):
    translations = server.get("/i18n")
    for language in ("en", "zh"):
        assert translations[language]["nodeDefs"].keys() >= pack.keys()
    for name in pack:
        for file in (f"{name}.md", f"{name}/zh.md"):
            page = server._read(f"{DOCS}/{file}").decode()
            for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page):
                assert server._read(f"{DOCS}/{quote(picture)}")
