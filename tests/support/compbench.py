"""A run of the compbench benchmark: prompts, its folder, what is in it."""

import json
import os
import sys
import time

import compbench.__main__ as compbench
import psutil
import pytest
from compbench.plan import Plan
from compbench.plan import write as put
from compbench.workflow import Workflow
from PIL import Image

from support import ROOT
from support.comfy_stand_in import changed, colour_of, graph_of_the_demo, png_of

NO_WORKFLOW = Workflow({}, [], "", None, "")


PROMPTS = ["a red circle left of a blue square", "It's red, and blue.", "a cup: green-ish"]


BENCH = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a bench"}


COW = {"tag": "colors", "include": [], "prompt": "a photo of a red cow / calf_1"}


STAND_IN = f"{sys.executable} {ROOT / 'tests/support/comfy_stand_in.py'} {{port}} {{folder}}"


posix = pytest.mark.skipif(os.name == "nt", reason="signals")


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())
    return path


def write_json(path, value):
    return write(path, json.dumps(value))


def api_form(folder, graph=None):
    return write_json(folder / "workflow.json", graph or graph_of_the_demo())


def refuses(line, why):
    with pytest.raises(SystemExit, match=why) as stopped:
        compbench.main(line)
    return str(stopped.value)


def wait_until(true, limit=300):
    deadline = time.monotonic() + limit
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def running(*words):
    """Processes with all of these in their command lines, but for the shells that guard them."""
    lines = {p: " ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])}
    found = {p for p, line in lines.items() if all(word in line for word in words)}
    return [process for process in found if not lines[process].startswith("sh ")]


def files_under(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def drawn(out):
    """How many pictures a run has."""
    return sum(1 for _ in out.glob("gamma_*/**/samples/*.png"))


def assert_complete(out):
    """Every picture is there, once, whole, and its own; and nothing else is."""
    plan = Plan.read(out)
    units = plan.units()
    assert plan.missing(out) == []
    for unit in units:
        with Image.open(out / unit.path) as image:
            assert image.getpixel((3, 3)) == colour_of(unit.prompt, unit.seed, unit.gamma)
    others = files_under(out) - {unit.path for unit in units}
    assert {path for path in others if not path.endswith("/metadata.jsonl")} == {"run.json"}


def picture_of(unit):
    texts, seeds, gammas = {"text": unit.prompt}, {"seed": unit.seed}, {"gamma": unit.gamma}
    return png_of(changed(positive=texts, sample=seeds, taca=gammas))


def draw_all(out, plan):
    for unit in plan.begin(out):
        put(out, unit.path, picture_of(unit))
