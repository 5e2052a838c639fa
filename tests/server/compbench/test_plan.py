"""Prompt files, protocols and workflows: what is drawn, and what is refused."""

import json

import compbench.__main__ as compbench
import pytest
from compbench.plan import Plan, Problem, Unit, read_category
from compbench.workflow import read_workflow

from support.comfy_stand_in import StandIn, asked_for, changed, graph_of_the_demo
from support.compbench import (
    BENCH,
    COW,
    NO_WORKFLOW,
    PROMPTS,
    api_form,
    assert_complete,
    files_under,
    write,
)


def test_layouts(out, line, color, geneval, capsys):
    """Name by name, as the evaluators' own code reads them."""
    with StandIn() as server:
        compbench.main(line(server.url, prompts=[color, geneval]))
    expected = {"run.json"}
    for setting in ("gamma_1", "gamma_1.2"):
        expected |= {f"{setting}/color/samples/{PROMPTS[i // 2]}_{i:06}.png" for i in range(6)}
        for i, metadata in enumerate([BENCH, COW]):
            folder = f"{setting}/geneval/{i:05}"
            expected |= {f"{folder}/metadata.jsonl"}
            expected |= {f"{folder}/samples/{j:04}.png" for j in range(2)}
            assert json.loads((out / folder / "metadata.jsonl").read_text()) == metadata
    assert files_under(out) == expected
    assert_complete(out)
    assert capsys.readouterr().out.count("evaluate_images.py") == 2


def test_protocols(color, geneval):
    """10 images per prompt by seeds 42 ... 51, 4 for GenEval; a prompt's pictures together."""
    categories = [read_category(color), read_category(geneval)]
    groups = Plan(NO_WORKFLOW, [1.0, 1.0000001], categories).groups()
    assert [len(group) for group in groups] == [20] * 3 + [8] * 2
    assert {unit.seed for unit in groups[0]} == {*range(42, 52)}
    path = f"gamma_1.0000001/color/samples/{PROMPTS[1]}_000013.png"
    assert groups[1][13] == Unit(path, PROMPTS[1], 45, 1.0000001)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("color_val.txt", "a_cup", "'_'"),
        ("color_val.txt", "a cup/glass", "'/'"),
        ("color_val.txt", "a\tcup", "'\\\\t'"),
        ("color_val.txt", "ä" * 130, "too long"),
        ("color_val.txt", "\r\n\r\n", "no prompts"),
        ("geneval.txt", "a cup", "GenEval's own"),
        ("objects.jsonl", '{"prompt": "a cup"}', "is neither GenEval"),
        ("objects.jsonl", "a cup", "is neither GenEval"),
    ],
)
def test_prompts_that_are_refused(tmp_path, name, content, why):
    with pytest.raises(Problem, match=why):
        read_category(write(tmp_path / name, content))


def test_places_are_found(tmp_path):
    found = read_workflow(api_form(tmp_path))
    places = found.prompt, found.seed, found.gamma, found.output
    assert places == (["positive.text"], "sample.seed", "taca.gamma", "save")
    graphs = [found.filled(Unit("", "a {prompt}", 7, 1.3)) for _ in range(2)]
    assert asked_for(graphs[0]) == ("a {prompt}", 7, 1.3)
    # Servers that share an output folder would otherwise overwrite one another's pictures.
    names = [graph["save"]["inputs"].pop("filename_prefix") for graph in graphs]
    assert names[0] != names[1]
    assert graphs[0] == graphs[1]


def two_branches():
    """As in the pack's own workflows: without TACA, and with."""
    graph = graph_of_the_demo()
    for name, kind, new in (
        ("plain", "sample", {"model": ["model", 0]}),
        ("plain decode", "decode", {"samples": ["plain", 0]}),
        ("plain save", "save", {"images": ["plain decode", 0]}),
    ):
        graph[name] = {**graph[kind], "inputs": {**graph[kind]["inputs"], **new}}
    return graph


def test_two_branches(tmp_path):
    """The one with TACA is drawn, or the one whose node is named, and what it needs."""
    graph = two_branches()
    file = api_form(tmp_path, graph)
    for named in ("save", None):
        found = read_workflow(file, output=named)
        assert (found.output, found.graph.keys()) == ("save", graph_of_the_demo().keys())
    with pytest.raises(Problem, match=r"gamma: it has no place.*--gammas 1 draws"):
        read_workflow(file, output="plain save")
    plain = read_workflow(file, output="plain save", is_plain=True)
    assert (plain.gamma, len(plain.graph)) == (None, 7)
    # A third that is behind gamma too:
    graph["other save"] = {"class_type": "PreviewImage", "inputs": {"images": ["decode", 0]}}
    doubt = r"3 places for it: save \(SaveImage\), plain save .*other save .*--output NODE"
    with pytest.raises(Problem, match=doubt):
        read_workflow(api_form(tmp_path, graph))


DOUBTFUL = changed(positive={"more": ["join", 0]}, join={"text": "x"})


@pytest.mark.parametrize(
    ("graph", "why"),
    [
        ({"nodes": [], "links": []}, "Export"),
        ([1], "not a workflow"),
        ({"1": {"class_type": "A"}}, "not a workflow"),
        (changed(positive={"text": None}), "prompt: it has no place.*--prompt-at"),
        (changed(sample={"seed": ["taca", 0]}), "seed: it has no place.*--seed-at"),
        (changed(taca={"schedule": ["positive", 0]}), "gamma: it has no place.*--gamma-at"),
        (changed(save={"images": None}), "output: it has no place.*--output"),
        (DOUBTFUL, "2 places for it: positive.text .* join.text"),
    ],
)
def test_workflows_that_are_refused(tmp_path, graph, why):
    with pytest.raises(Problem, match=why):
        read_workflow(api_form(tmp_path, graph))


def test_places_that_are_named(tmp_path):
    file = api_form(tmp_path, DOUBTFUL)
    assert read_workflow(file, prompt="join.text").prompt == ["join.text"]
    for named, why in (("nobody.text", "needs no input"), ("positive.more", "connected")):
        with pytest.raises(Problem, match=why):
            read_workflow(file, prompt=named)
    # {prompt} stands wherever it goes, and more than once.
    texts = {"text": "a photo: {prompt}, sharp", "more": ["join", 0]}
    marked = api_form(tmp_path, changed(positive=texts, join={"text": "{prompt}"}))
    graph = read_workflow(marked).filled(Unit("", "a cup", 7, 1.3))
    texts = [graph[node]["inputs"]["text"] for node in ("positive", "join")]
    assert texts == ["a photo: a cup, sharp", "a cup"]
