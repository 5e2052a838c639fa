"""One server through a long day: prompts in random order, then workflows that are broken anyhow.

``TACA_FUZZ=10000`` sets how many broken workflows are sent (300 otherwise), and then 200 prompts
are run instead of 40, each equal to what a fresh server of its own draws. What was counted is
logged: ``-o log_cli=true --log-cli-level=INFO``.
"""

import copy
import hashlib
import io
import json
import logging
import math
import os
import random
import time
import urllib.error
import urllib.request
from collections import Counter
from unittest import mock

import comfy_server
import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from support.fuzz import many
from support.servers import DEMO_MODEL, LORA, add_tiny_clip, on_the_demo_model, save_lora
from support.workflow import DEMO, ONE_THREAD, USERS, WIDGETS, api_form, read

log = logging.getLogger(__name__)
FUZZ = int(os.environ.get("TACA_FUZZ", "0"))
PROMPTS = 200 if FUZZ else 40
GROWTH = 24  # MiB a server may hold more at the end than after a quarter of its prompts


@pytest.fixture(scope="module")
def serving(tmp_path_factory):
    """A context of a fresh server."""

    def serve():
        folder = tmp_path_factory.mktemp("server")
        loras = folder / "base/output/loras"
        loras.mkdir(parents=True)
        save_lora(loras / LORA)
        add_tiny_clip(folder / "base")
        return comfy_server.serving(folder / "base", folder / "log")

    with mock.patch.dict(os.environ, ONE_THREAD):
        yield serve


@pytest.fixture(scope="module")
def server(serving):
    with serving() as running:
        yield running


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def prompt(kind, seed, width):
    """One of five workflows: the model through other nodes each time."""
    graph = {
        "file": node("UNETLoader", unet_name=DEMO_MODEL, weight_dtype="default"),
        "taca": node("TACAPatchModel", model=["file", 0], gamma=1.5, timestep_threshold=900.0),
        "schedule": node(
            "TACASchedule",
            gamma=1.8,
            window="percent",
            **{"window.start_percent": 0.0, "window.end_percent": 0.5, "window.shape": "cosine"},
        ),
        "options": node("TACAOptions", positive_only=True, blocks="joint 0-2"),
        "limited": node(
            "TACAPatchModel",
            model=["file", 0],
            gamma=1.5,
            timestep_threshold=900.0,
            schedule=["schedule", 0],
            options=["options", 0],
        ),
        "lora": node("LoadTACALoRA", model=["taca", 0], lora_name=LORA, strength=1.0),
        "sweep": node("TACASweep", model=["file", 0], gammas="1, 1.5", timestep_thresholds="900"),
    }
    model = {"plain": "file", "options": "limited"}.get(kind, kind)
    graph |= {
        "positive": node("TACADemoTextEncode", text="a red circle left of a blue square"),
        "negative": node("TACADemoTextEncode", text=""),
        "latent": node("EmptySD3LatentImage", width=width, height=128, batch_size=1),
        "sample": node(
            "KSampler",
            model=[model, 0],
            seed=seed,
            steps=5,
            cfg=3.0,
            denoise=1.0,
            sampler_name="euler",
            scheduler="simple",
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["latent", 0],
        ),
        "decode": node("TACADemoDecode", upscale=1, samples=["sample", 0]),
        "show": node("PreviewImage", images=["decode", 0]),
    }
    return graph


DISTINCT = [
    (kind, seed, width)
    for seed, width in ((1, 128), (2, 96))
    for kind in ("plain", "taca", "lora", "options", "sweep")
]


def drawn(server, *which):
    """A digest of the pictures of a prompt."""
    images = server.run(prompt(*which))["show"]["images"]
    pixels = [np.asarray(Image.open(io.BytesIO(server.picture(image)))) for image in images]
    assert all(picture.std() > 10 for picture in pixels)
    return hashlib.sha256(b"".join(picture.tobytes() for picture in pixels)).hexdigest()


def memory_of(server):
    """MiB that a server's process holds."""
    port = server.address.rpartition(":")[2]
    [process] = [p for p in psutil.Process().children() if port in p.cmdline()]
    return process.memory_info().rss / 2**20


def test_many_prompts(server, serving):
    """Five workflows with two seeds and sizes in random order: each as the first time, and none
    that changes what another draws; memory is flat."""
    order = random.Random(0)  # noqa: S311
    expected = {which: drawn(server, *which) for which in DISTINCT}
    assert len(set(expected.values())) == len(DISTINCT)
    held = {}
    for i in range(len(DISTINCT), PROMPTS):
        which = order.choice(DISTINCT)
        assert drawn(server, *which) == expected[which], f"{which}, prompt {i}"
        held[i + 1] = memory_of(server)
    log.info("MiB after prompts: %s", {i: round(m) for i, m in held.items() if i % 10 == 0})
    assert held[PROMPTS] - held[PROMPTS // 2 if PROMPTS < 100 else PROMPTS // 4] < GROWTH
    if FUZZ:
        for which in DISTINCT:
            with serving() as fresh:
                assert drawn(fresh, *which) == expected[which]


ODD = [
    None,
    True,
    "",
    "nan",
    "x" * 5000,
    "\ud83d",
    "1, 1.2",
    "a=1=2",
    "double 0-99",
    [],
    {},
    ["file"],
    ["file", 99],
    ["nobody", 0],
    [["file", 0]],
    0,
    -1,
    1e308,
    2**70,
    0.5,
    math.nan,
    -math.inf,
    "timestep",
    "percent",
    "drawn",
    "../../file",
    "first steps",
    [1, 2, 3],
    {"a": 1},
]
MORE = ["schedule", "options", "words", "window", "window.steps", "window.curve", "clip", "prompt"]


def is_ours(kind):
    """Whether a type of node is of this pack, and not the demo's."""
    return "TACA" in str(kind) and "Demo" not in kind


def checked(kind, info):
    """The inputs of a type of node at which ComfyUI looks at links; whether they are sockets."""
    groups = info.get(kind, {"input": {}})["input"]
    specs = {n: spec for g in ("required", "optional") for n, spec in groups.get(g, {}).items()}
    return {
        name: (type(kind) is str and kind not in WIDGETS)
        or bool(more and more[0].get("forceInput"))
        for name, (kind, *more) in specs.items()
        if "DYNAMIC" not in kind
    }


def broken(graph, chance, info):
    """A graph in API format with one to three things wrong, anywhere; values of our nodes only,
    for of others some would take hours.

    Left out is what ends ComfyUI's own worker, or what no page can send: a link where ComfyUI does
    not look for one (in a widget, or in an input that the node does not have), and a value where
    there can only be a link.
    """
    graph = copy.deepcopy(graph)
    for _ in range(chance.randint(1, 3)):
        ours = [i for i, n in graph.items() if is_ours(n.get("class_type"))] or list(graph)
        name = chance.choice(ours if chance.random() < 0.7 else list(graph))
        inputs = graph[name]["inputs"]
        links = [(n, i) for n in graph for i, v in graph[n]["inputs"].items() if type(v) is list]
        what = chance.randrange(9)
        if what == 0 and inputs:
            inputs.pop(chance.choice(list(inputs)))
        elif what in (1, 2) and inputs and name in ours:
            inputs[chance.choice(list(inputs))] = chance.choice(ODD)
        elif what == 3 and inputs:
            inputs[chance.choice(list(inputs))] = [chance.choice(list(graph)), chance.randrange(3)]
        elif what == 4 and len(graph) > 1:
            del graph[name]
        elif what == 5:
            types = [n.get("class_type") for n in graph.values()]
            graph[name]["class_type"] = chance.choice([*types, "TACAPatch", None])
        elif what == 6 and links:
            (a, i), (b, j) = chance.choice(links), chance.choice(links)
            graph[a]["inputs"][i], graph[b]["inputs"][j] = (
                graph[b]["inputs"].get(j),
                graph[a]["inputs"].get(i),
            )
        elif what == 7:
            inputs[chance.choice(MORE)] = chance.choice(ODD)
        elif name in ours:
            graph[name].pop(chance.choice(["inputs", "class_type"]), None)
            graph[name].setdefault("inputs", {})
    for each in graph.values():
        is_socket = checked(each.get("class_type"), info)
        for name, value in list(each["inputs"].items()):
            is_link = type(value) is list
            if (is_link and name not in is_socket) or (not is_link and is_socket.get(name)):
                del each["inputs"][name]
    return graph


def outcome(server, graph):
    """What becomes of a graph: "refused" by ComfyUI with what it says, "drawn", or the event of
    the node that failed."""
    body = json.dumps({"prompt": graph}).encode("utf-8", "surrogatepass")
    request = urllib.request.Request(f"{server.address}/prompt", body)  # noqa: S310
    try:
        with server._opener.open(request, timeout=600) as reply:
            answer = json.load(reply)
    except urllib.error.HTTPError as error:
        if error.code != 400:
            raise
        return "refused", json.load(error)
    deadline = time.monotonic() + 600
    while not (history := server.get(f"/history/{answer['prompt_id']}")):
        assert time.monotonic() < deadline, graph
        time.sleep(0.005)
    [entry] = history.values()
    errors = [e for kind, e in entry["status"]["messages"] if kind == "execution_error"]
    return ("failed", errors[0]) if errors else ("drawn", entry["outputs"])


def test_broken_workflows(server):
    """Every workflow of the pack with something wrong: a picture, ComfyUI's refusal, or an error
    that says what to do; none of the pack's own that came as a surprise."""
    info = server.get("/object_info")
    graphs = [
        on_the_demo_model(api_form(read(path), info), info)
        for path in [*USERS, *DEMO]
        if "train" not in path.stem
    ]
    for graph in graphs:
        for each in graph.values():
            for name, value in (("steps", 1), ("width", 64), ("height", 64), ("batch_size", 1)):
                if name in each["inputs"]:
                    each["inputs"][name] = value
    before = [drawn(server, *which) for which in DISTINCT[:5]]
    counts, said, surprises = Counter(), Counter(), []

    @many(FUZZ or 300)
    @given(chance=st.randoms(use_true_random=False))
    def send(chance):
        graph = broken(chance.choice(graphs), chance, info)
        what, event = outcome(server, graph)
        counts[what] += 1
        if what == "refused":
            assert event["error"]["message"]
        if what == "failed":
            message = event["exception_message"]
            said[f"{event['node_type']}: {event['exception_type']}: {message[:150].strip()}"] += 1
            pack = ("comfyui-taca/taca", "comfyui-taca/nodes")
            frames = event["traceback"] if is_ours(event["node_type"]) else event["traceback"][-1:]
            ours = any(folder in frame for folder in pack for frame in frames)
            if (ours or "missing" in message) and "TACA" not in message:
                surprises.append((graph, message, "".join(event["traceback"])))

    send()
    lines = [f"{count} {line}" for line, count in said.most_common()]
    log.info("\n".join([str(dict(counts)), *lines]))
    assert not surprises, surprises[0]
    assert min(counts["refused"], counts["failed"], counts["drawn"]) > 0
    assert [drawn(server, *which) for which in DISTINCT[:5]] == before
