"""TACA Trial and TACA Find Setting in a real ComfyUI server, on the demo's model and checker."""

import importlib
import io
import json
import os
from http.client import HTTPConnection
from unittest import mock

import numpy as np
import pytest
import world
from comfy_server import Failed, serving
from PIL import Image

from support.workflow import ONE_THREAD

search = importlib.import_module("taca_pack.taca.search")
CAPTIONS = world.captions("held-out")[::24][:8]
MODEL = "taca_demo_suppressed_mmdit.safetensors"

JUDGES = """
class Mean:
    RETURN_TYPES, FUNCTION, CATEGORY = ("FLOAT",), "judge", "TACA tests"
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",), "times": ("FLOAT", {"default": 1.0})}}
    def judge(self, image, times):
        return (float(image.mean()) * float(times),)

class MeanOfAll(Mean):
    INPUT_IS_LIST = True
    def judge(self, image, times):
        return (sum(float(each.mean()) for each in image),)

class Word(Mean):
    def judge(self, image, times):
        return ("good",)

class Nothing(Mean):
    def judge(self, image, times):
        return (None,)

NODE_CLASS_MAPPINGS = {"Mean": Mean, "MeanOfAll": MeanOfAll, "Word": Word, "Nothing": Nothing}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    (folder / "base/custom_nodes").mkdir(parents=True)
    (folder / "base/custom_nodes/judges.py").write_text(JUDGES)
    with (
        mock.patch.dict(os.environ, ONE_THREAD),
        serving(folder / "base", folder / "log") as running,
    ):
        yield running


def graph_of(first_seed, captions=CAPTIONS, seeds=1, steps=2, **changes):
    """The demo's workflow in API form; a search of 32 pictures of two steps, not drawn before."""
    numbers = ", ".join(str(first_seed + i) for i in range(seeds))
    graph = {
        "model": ("UNETLoader", {"unet_name": MODEL, "weight_dtype": "default"}),
        "sweep": (
            "TACASweep",
            {"model": ["model", 0], "gammas": "1, 1.2, 1.5", "timestep_thresholds": "970, 0"},
        ),
        "trial": (
            "TACATrial",
            {"models": ["sweep", 0], "labels": ["sweep", 1], "seeds": numbers, "setting": 1}
            | {"prompts": "\n".join(captions)},
        ),
        "positive": ("TACADemoTextEncode", {"text": ["trial", 3]}),
        "negative": ("TACADemoTextEncode", {"text": ""}),
        "latent": ("EmptySD3LatentImage", {"width": 128, "height": 128, "batch_size": 1}),
        "sample": (
            "KSampler",
            {"model": ["trial", 0], "positive": ["positive", 0], "negative": ["negative", 0]}
            | {"latent_image": ["latent", 0], "seed": ["trial", 2], "steps": steps, "cfg": 3.0}
            | {"sampler_name": "euler", "scheduler": "simple", "denoise": 1.0},
        ),
        "decode": ("TACADemoDecode", {"samples": ["sample", 0], "upscale": 4}),
        "check": ("TACADemoCheck", {"image": ["decode", 0], "text": ["trial", 3]}),
        "find": (
            "TACAFindSetting",
            {"trials": ["trial", 5], "score": ["check", 0], "image": ["decode", 0]},
        ),
        "record": ("PreviewAny", {"source": ["find", 3]}),
        "sheet": ("SaveImage", {"images": ["find", 0], "filename_prefix": "find"}),
    }
    graph = {node: {"class_type": kind, "inputs": values} for node, (kind, values) in graph.items()}
    for node, values in changes.items():
        graph.setdefault(node, {"class_type": values.pop("class_type", ""), "inputs": {}})
        graph[node]["inputs"] |= values
    return graph


class Watched:
    """What a run reports: how far the search is, and which samplers ran."""

    def __init__(self, stop=None):
        self.search, self.samplers, self.stop = [], [], stop

    def __call__(self, node, step, steps):
        if node == "find":
            self.search.append((step, steps))
            if self.stop and step >= self.stop[1]:
                address, self.stop = self.stop[0], None
                connection = HTTPConnection(address.removeprefix("http://"))
                connection.request("POST", "/interrupt", "{}", {"Content-Type": "application/json"})
                assert connection.getresponse().status == 200
        elif "sample" in node and step == steps:
            self.samplers.append(node)


def judged_by(graph, kind, times=1.0):
    """The graph with another judge, whose number every picture changes."""
    judge = {"class_type": kind, "inputs": {"image": ["decode", 0], "times": times}}
    return graph | {"check": judge}


def record_of(outputs):
    return json.loads(outputs["record"]["text"][0])


@pytest.mark.slow
def test_search_draws_as_its_plan_says(server):
    """5 settings on 4 prompts, then 2 and the first on 4 more; what it found is of those scores."""
    watched = Watched()
    outputs = server.run(graph_of(100), watched)
    record = record_of(outputs)
    scores = np.full((5, 8), np.nan)
    for prompt, seed, setting, score in record["scores"]:
        assert seed == 0
        scores[setting, prompt] = score
    assert np.isfinite(scores[:, :4]).all()
    assert np.isfinite(scores[0]).all()
    assert np.isfinite(scores).sum() == 32 == len(watched.samplers)
    assert watched.search == [(done, 32) for done in (5, 10, 15, 20, 23, 26, 29, 32)]
    made = search.Search(5, 8)
    while made.todo:
        made.add(scores[np.ix_(made.alive, made.todo.units)])
    found = made.finding()
    assert (record["best"], record["winner"]) == (found.best, found.winner)
    assert record["difference"] == found.difference
    assert record["settings"][0] == "gamma 1 (plain)"
    sheet = server.picture(outputs["sheet"]["images"][0])
    assert Image.open(io.BytesIO(sheet)).width == 1200


def test_its_pictures_are_the_sweeps(server):
    """The scores of one prompt and seed are those of the same graph with TACA Sweep alone."""
    graph = judged_by(graph_of(200), "Mean")
    record = record_of(server.run(graph))
    for node in ("trial", "find", "record", "sheet"):
        del graph[node]
    # The second prompt's noise is its own.
    graph["sample"]["inputs"] |= {"model": ["sweep", 0], "seed": 1200}
    graph["positive"]["inputs"]["text"] = CAPTIONS[1]
    graph["see"] = {"class_type": "PreviewAny", "inputs": {"source": ["check", 0]}}
    alone = [float(text) for text in server.run(graph)["see"]["text"]]
    own = {setting: score for prompt, _, setting, score in record["scores"] if prompt == 1}
    assert [own[i] for i in range(5)] == alone
    assert len(set(alone)) == 5


@pytest.mark.parametrize("at", [10, 26], ids=["first round", "second round"])
def test_an_interrupted_search_goes_on_where_it_was(server, at):
    """What was drawn is not drawn again."""
    graph = graph_of(300 + 10 * at)
    first, second = Watched((server.address, at)), Watched()
    with pytest.raises(Failed, match="interrupted"):
        server.run(graph, first)
    outputs = server.run(graph, second)
    drawn = [{each for each in w.samplers if each != "sample"} for w in (first, second)]
    assert drawn[0]
    assert not drawn[0] & drawn[1]
    assert len(drawn[0] | drawn[1]) == 8, "a sampler for each prompt"
    assert second.search[0][0] >= first.search[-1][0]
    assert len(record_of(outputs)["scores"]) == 32


def test_another_workflow_with_the_same_search(server):
    """Its Trial comes from ComfyUI's cache, where it was made under another id."""
    server.run(graph_of(600))
    renamed = json.dumps(graph_of(600, steps=3)).replace('"trial"', '"another"')
    assert len(record_of(server.run(json.loads(renamed)))["scores"]) == 32


def test_words_and_seeds(server):
    """Conditionings of a word sweep through one model, on three seeds: each a unit of its own."""
    graph = graph_of(
        400,
        captions=[],
        seeds=4,
        clip={"class_type": "TACADemoLoadCLIP"},
        words={
            "class_type": "TACAWordSweep",
            "clip": ["clip", 0],
            "text": "a (red:w) circle left of a blue square",
            "weights": "1, 2, 0",
        },
        trial={
            "models": ["model", 0],
            "conditionings": ["words", 0],
            "labels": ["words", 1],
        },
        sample={"positive": ["trial", 1]},
        check={"text": "a red circle left of a blue square"},
    )
    record = record_of(server.run(graph))
    assert record["settings"] == ["w = 1", "w = 2", "w = 0"]
    assert len(record["scores"]) == 12
    assert sorted({(p, s) for p, s, _, _ in record["scores"]}) == [(0, s) for s in range(4)]


def test_the_largest_seed(server):
    """The noise of the second prompt would be of a larger one."""
    graph = judged_by(graph_of(2**64 - 1, captions=CAPTIONS[:2], steps=1), "Mean")
    assert len(record_of(server.run(graph))["scores"]) == 10


REFUSED = {
    "score and image must come from": {"find": {"score": ["other", 0]}},
    "leave the seeds and prompts of TACA Sweep empty": {"sweep": {"seeds": "1, 2"}},
    "has the same seed twice": {"trial": {"seeds": "1, 1"}},
    "has 5 settings, and none of number 6": {"trial": {"setting": 6}},
    "needs two units or more": {"trial": {"prompts": CAPTIONS[0]}},
    "seeds must be numbers": {"trial": {"seeds": "one"}},
    "seeds must be numbers from 0 to": {"trial": {"seeds": f"1, {2**64 + 1}"}},
    "score must be connected": {"find": {"score": 0.5}},
}


@pytest.mark.parametrize("problem", REFUSED)
def test_what_cannot_be_searched_is_refused(problem, server):
    graph = graph_of(500, **{node: dict(values) for node, values in REFUSED[problem].items()})
    graph["other"] = {"class_type": "PrimitiveFloat", "inputs": {"value": 1.0}}
    with pytest.raises(Failed, match=problem):
        server.run(graph)


@pytest.mark.parametrize(
    ("kind", "times", "problem"),
    [
        ("MeanOfAll", 1.0, "got 1 scores for 5 pictures"),
        ("Mean", 1e400, "got a score that is not a finite number"),
        ("Word", 1.0, "got a score that is not a finite number: .'good'"),
        ("Nothing", 1.0, "got a score that is not a finite number: .None"),
    ],
)
def test_scores_that_say_nothing_are_refused(kind, times, problem, server):
    with pytest.raises(Failed, match=problem):
        server.run(judged_by(graph_of(700), kind, times))
