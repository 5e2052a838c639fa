"""One server through a long day: prompts in random order, then workflows that are broken anyhow.

``TACA_PROMPTS=1000`` sets how many prompts are run (40 otherwise), and then each is also equal to
what a fresh server of its own draws. ``TACA_FUZZ=10000`` sets how many broken workflows are sent
(300 otherwise). What was counted is logged: ``-o log_cli=true --log-cli-level=INFO``.
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
from scipy.stats import theilslopes

from support.fuzz import many
from support.servers import (
    DEMO_MODEL,
    LORA,
    U_VIT,
    add_tiny_clip,
    on_the_demo_model,
    save_lora,
    save_uvit,
)
from support.workflow import DEMO, ONE_THREAD, USERS, WIDGETS, api_form, read

log = logging.getLogger(__name__)
pytestmark = pytest.mark.slow
FUZZ = int(os.environ.get("TACA_FUZZ", "0"))
LONG = "TACA_PROMPTS" in os.environ
PROMPTS = int(os.environ.get("TACA_PROMPTS", "40"))
SETTLED = min(100, PROMPTS * 3 // 5)  # prompts; at 100 a server holds what it needs
GROWTH = 24 if LONG else 96  # MiB a server may hold more at the end than then


@pytest.fixture(scope="module")
def serving(tmp_path_factory):
    """A context of a fresh server."""

    def serve():
        folder = tmp_path_factory.mktemp("server")
        output = folder / "base/output"
        for kind, name, save in (
            ("loras", LORA, save_lora),
            ("diffusion_models", U_VIT, save_uvit),
        ):
            (output / kind).mkdir(parents=True)
            save(output / kind / name)
        add_tiny_clip(folder / "base")
        return comfy_server.serving(folder / "base", folder / "log")

    with mock.patch.dict(os.environ, ONE_THREAD):
        yield serve


@pytest.fixture(scope="module")
def server(serving):
    with serving() as running:
        yield running


MODELS = (DEMO_MODEL, "taca_demo_suppressed_mmdit.safetensors")
OTHER_LORA = "taca_demo_lora.safetensors"


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def prompt(kind, file, seed, width):
    """A workflow: a model through other nodes for each kind."""
    text = "a red circle left of a blue square"
    width = 128 if kind == "U-ViT" else width  # the one that it knows
    sampler, steps, cfg = "euler", 5, 3.0
    graph = {
        "plain": node("UNETLoader", unet_name=file, weight_dtype="default"),
        "taca": node("TACAPatchModel", model=["plain", 0], gamma=1.5, timestep_threshold=900.0),
        "schedule": node(
            "TACASchedule",
            gamma=1.8,
            window="percent",
            **{"window.start_percent": 0.0, "window.end_percent": 0.5, "window.shape": "cosine"},
        ),
        "limits": node("TACAOptions", positive_only=True, blocks="joint 0-2"),
        "options": node(
            "TACAPatchModel",
            model=["plain", 0],
            gamma=1.5,
            timestep_threshold=900.0,
            schedule=["schedule", 0],
            options=["limits", 0],
        ),
        "lora": node("LoadTACALoRA", model=["taca", 0], lora_name=LORA, strength=1.0),
        "two LoRAs": node(
            "LoraLoaderModelOnly", model=["lora", 0], lora_name=OTHER_LORA, strength_model=1.0
        ),
        "sweep": node("TACASweep", model=["plain", 0], gammas="1, 1.5", timestep_thresholds="900"),
        "U-ViT": node("LoadUViT", unet_name=U_VIT),
    }
    model = [kind if kind in graph else "taca", 0]
    graph |= {
        "positive": node("TACADemoTextEncode", text=text),
        "negative": node("TACADemoTextEncode", text=""),
        "latent": node("EmptySD3LatentImage", width=width, height=128, batch_size=1),
        "decode": node("TACADemoDecode", upscale=1, samples=["sample", 0]),
        "show": node("PreviewImage", images=["decode", 0]),
    }
    if kind == "words":
        graph |= {
            "clip": node("TACADemoLoadCLIP"),
            "positive": node(
                "TACATextEncode",
                clip=["clip", 0],
                text="a (red:0) circle left of a (blue:1.5) square",
                avoid="a yellow circle",
            ),
        }
    conds = {"positive": ["positive", 0], "negative": ["negative", 0]}
    if kind == "report":
        graph |= {
            "guider": node("CFGGuider", model=model, cfg=cfg, **conds),
            "noise": node("RandomNoise", noise_seed=seed),
            "sampler": node("KSamplerSelect", sampler_name=sampler),
            "sigmas": node(
                "BasicScheduler", model=model, scheduler="simple", steps=steps, denoise=1.0
            ),
            "sample": node(
                "TACAAttentionReport",
                **{name: [name, 0] for name in ("guider", "noise", "sampler", "sigmas")},
                latent_image=["latent", 0],
                words="red=1, square=7",
            ),
        }
    else:
        graph["sample"] = node(
            "KSampler",
            model=model,
            seed=seed,
            steps=steps,
            cfg=1.0 if kind == "CFG 1" else cfg,
            denoise=1.0,
            sampler_name="dpmpp_2s_ancestral" if kind == "ancestral" else sampler,
            scheduler="simple",
            latent_image=["latent", 0],
            **conds,
        )
    return graph


KINDS = (
    *("plain", "taca", "lora", "options", "sweep"),
    *("two LoRAs", "words", "report", "CFG 1", "ancestral", "U-ViT"),
)
DISTINCT = [
    (kind, MODELS[(i + seed) % 2], seed, width)
    for seed, width in ((1, 128), (2, 96))
    for i, kind in enumerate(KINDS)
]


def drawn(server, *which):
    """A digest of the pictures of a prompt."""
    outputs = server.run(prompt(*which)).values()
    images = [image for output in outputs for image in output.get("images", ())]
    pixels = [np.asarray(Image.open(io.BytesIO(server.picture(image)))) for image in images]
    assert pixels
    assert all(picture.std() > 10 for picture in pixels)
    return hashlib.sha256(b"".join(picture.tobytes() for picture in pixels)).hexdigest()


def fail(server, *which):
    """The same, with a text of another width that ends the first call of the model."""
    graph = prompt(*which) | {
        "tiny": node("TinyCLIP"),
        "positive": node("CLIPTextEncode", clip=["tiny", 0], text="a red circle"),
    }
    with pytest.raises(comfy_server.Failed, match=r"shape|reads prompts"):
        server.run(graph)


def process_of(server):
    port = server.address.rpartition(":")[2]
    [process] = [p for p in psutil.Process().children() if port in p.cmdline()]
    return process


def cpu_seconds(process):
    return sum(process.cpu_times()[:2])


def forget(server):
    """Have ComfyUI drop what it keeps of its last 10,000 prompts, some 25 KiB for each."""
    body = json.dumps({"clear": True}).encode()
    server._opener.open(urllib.request.Request(f"{server.address}/history", body)).close()  # noqa: S310


def log_slope(what, values, at):
    slope, _, low, high = theilslopes(values, np.asarray(at) / 100)
    log.info("%s in 100 prompts: %+.2f, 95 %% from %+.2f to %+.2f", what, slope, low, high)


def test_many_prompts(server, serving):
    """Workflows with two models, seeds and sizes in random order, some after one that fails: each
    as the first time, and none that changes what another draws; memory is flat.

    No workflow comes twice in a row: ComfyUI would not run the second.
    """
    order = random.Random(0)  # noqa: S311
    expected = {which: drawn(server, *which) for which in DISTINCT}
    assert len(set(expected.values())) == len(DISTINCT)
    process, which = process_of(server), DISTINCT[-1]
    held, seconds = {}, {}
    for i in range(len(DISTINCT) + 1, PROMPTS + 1):
        which = order.choice([other for other in DISTINCT if other != which])
        if i % 5 == 0:
            fail(server, *which)
        start = cpu_seconds(process)
        assert drawn(server, *which) == expected[which], f"{which}, prompt {i}"
        seconds[i] = which, cpu_seconds(process) - start
        forget(server)
        held[i] = process.memory_info().rss / 2**20
    log.info("MiB after prompts: %s", {i: round(held[i]) for i in held if i % (PROMPTS // 20) == 0})
    if LONG:
        late = range(SETTLED, PROMPTS + 1)
        log_slope("MiB", [held[i] for i in late], late)
        usual = {d: np.median([t for which, t in seconds.values() if which == d]) for d in DISTINCT}
        percent = [100 * seconds[i][1] / usual[seconds[i][0]] for i in late]
        log_slope("% of a kind's CPU time", percent, late)
    assert held[PROMPTS] - held[SETTLED] < GROWTH
    for which in DISTINCT if LONG else ():
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
