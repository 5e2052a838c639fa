"""Real servers and workers, killed and started anew."""

import asyncio
import json
import re
import shlex
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path

import comfy_server
import compbench.__main__ as compbench
import numpy as np
import pytest
import world
from comfy_server import Lost
from compbench.plan import Plan, Problem, Unit
from compbench.workflow import read_workflow
from kept_server import KeptServer
from PIL import Image

from support.comfy_stand_in import asked_for, changed, png_of
from support.compbench import STAND_IN, api_form, drawn, posix, refuses, running, wait_until, write
from support.workflow import ROOT, USERS, read
from support.workflow import api_form as as_the_page_sends


@pytest.fixture
def captions(tmp_path, line):
    """The command line for held-out captions of the demo's world, in both layouts."""
    texts = world.captions("held-out")[:10]
    objects = [{"tag": "position", "include": [], "prompt": text} for text in texts[8:]]
    shapes = write(tmp_path / "shapes_val.txt", "\r\n".join(texts[:8]))
    lines = write(tmp_path / "objects.jsonl", "\n".join(map(json.dumps, objects)))
    return line(prompts=[shapes, lines])


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts a real ComfyUI; its address."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the demo's model needs no more
    with ExitStack() as stack:

        def start():
            base = Path(tempfile.mkdtemp(dir=tmp_path))
            return stack.enter_context(comfy_server.serving(base, base / "log")).address

        yield start


def when_drawn(out, number, act):
    """Do something once a run has so many pictures; a thread to wait for."""
    whole = lambda: wait_until(lambda: drawn(out) >= number) or act()  # noqa: E731
    thread = threading.Thread(target=whole, daemon=True)
    thread.start()
    return thread


def assert_drawn_by_the_demo(out):
    """All there, each of the right size, showing its caption, and not another."""
    plan = Plan.read(out)
    assert plan.missing(out) == []
    assert drawn(out) == 40
    for gamma in plan.gammas:
        own = [unit for unit in plan.units() if unit.gamma == gamma]
        right = chance = 0
        # The next caption may tell the same scene from its other object.
        for unit, other in zip(own, own[4:] + own[:4], strict=True):
            with Image.open(out / unit.path) as image:
                assert image.size == (64, 64)
                assert asked_for(json.loads(image.info["prompt"])) == unit[1:]
                picture = np.asarray(image.convert("RGB")) / 255
            right += world.check(picture, unit.prompt)["everything"]
            chance += world.check(picture, other.prompt)["everything"]
        assert chance < 0.2 * len(own), gamma
        assert right > 0.6 * len(own), gamma


@posix
@pytest.mark.slow
def test_two_servers_one_killed_then_the_command(out, captions, start):
    """Real ones, with the demo's model; the same command then draws what is left."""
    urls = [start(), start()]
    whole = [sys.executable, str(ROOT / "benchmarks/compbench"), *captions, "--servers", *urls]
    with subprocess.Popen(whole, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: drawn(out) >= 8)
        running("main.py", f"--port {urls[0].rpartition(':')[2]} ")[0].kill()
        wait_until(lambda: drawn(out) >= 20)
        process.kill()
        assert "; again: gamma_" in process.communicate()[1]
    said = subprocess.run(whole, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert 20 <= int(re.search(r"40 pictures, (\d+) of them drawn before", said)[1]) < 40
    assert_drawn_by_the_demo(out)


OURS = {
    # workflow -> seed, gamma and output that are found without an option
    "01_FLUX.1-dev_with_and_without_TACA": ("12.noise_seed", "17.gamma", "21"),
    "16_FLUX.1-dev_with_a_LoRA": ("12.noise_seed", "17.gamma", "22"),
    "02_SD3.5-Medium_with_and_without_TACA": ("9.value", "13.gamma", "16"),
    "17_SD3.5-Medium_with_a_LoRA": ("9.value", "13.gamma", "17"),
}


@pytest.mark.slow
def test_the_packs_own_workflows(tmp_path, start):
    """All that draw without and with TACA need no option; each of the others is told why not."""
    info = comfy_server.Server(start()).get("/object_info")
    for path in USERS:
        graph = as_the_page_sends(read(path), info)
        file = api_form(tmp_path / path.stem, graph)
        saving = {n: c["inputs"] for n, c in graph.items() if c["class_type"] == "SaveImage"}
        uses_gamma = any(content["class_type"] == "TACAPatchModel" for content in graph.values())
        shown = [c for c in graph.values() if c["class_type"] in ("SaveImage", "PreviewImage")]
        if uses_gamma and len(shown) == 1:  # a recipe, with TACA alone
            assert read_workflow(file).output in saving
            continue
        if len(saving) != 2 or not uses_gamma:  # T2I-CompBench's prompts weigh no words
            with pytest.raises(Problem, match="--"):  # an option that helps, or what it needs
                read_workflow(file)
            continue
        found = read_workflow(file)
        [output] = [n for n, i in saving.items() if i["filename_prefix"].endswith("_without_TACA")]
        plain = read_workflow(file, output=output, is_plain=True)
        kinds = [{c["class_type"] for c in some.graph.values()} for some in (found, plain)]
        assert "TACAPatchModel" in kinds[0]
        assert not {"TACAPatchModel", "LoadTACALoRA"} & kinds[1]
        assert (plain.gamma, plain.seed) == (None, found.seed)
        places = found.seed, found.gamma, found.output
        assert places == OURS.get(path.stem, places)
        assert "a cup" in json.dumps(found.filled(Unit("", "a cup", 7, 1.3)))


@posix
@pytest.mark.slow
def test_on_ray(out, captions):
    """Two workers, each with a ComfyUI of its own; a worker is killed, then a ComfyUI."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install ray")
    ours = "main.py", "--output-directory", "compbench-"
    threads = [
        when_drawn(out, 8, lambda: running("ray::KeptServer")[0].kill()),
        when_drawn(out, 20, lambda: running(*ours)[0].kill()),
    ]
    compbench.main([*captions, "--ray", "--workers", "2", "--gpus-per-worker", "0"])
    assert not any(thread.is_alive() for thread in threads)
    wait_until(lambda: not running(*ours))  # theirs ended with them
    assert_drawn_by_the_demo(out)


@pytest.fixture
def worker():
    """Makes a worker without Ray."""
    with ExitStack() as stack:

        def make(start=STAND_IN, patience=60):
            made = KeptServer(start, patience)
            stack.callback(lambda: made.pipe.close())
            return made

        yield make


def drawn_by(worker, graph=None):
    return asyncio.run(worker.draw(graph or changed(), "save"))


def process_of(worker):
    [process] = running("comfy_stand_in", worker.folder.name)
    return process


@posix
def test_a_worker_starts_its_server(worker):
    """Again when it has ended; and it goes with the worker, and with it what it has started."""
    worker = worker(shlex.join(["env", "sh", "-c", f"{STAND_IN}; true"]))
    graph = changed(save={"filename_prefix": "compbench/ab/abc"})
    copy = write(Path(worker.folder.name, "compbench/ab/abc_00001_.png"), "")
    with pytest.raises(Lost):
        drawn_by(worker, graph)
    for _ in range(2):
        asyncio.run(worker.check())
        assert drawn_by(worker, graph) == png_of(graph)
        assert not copy.exists()
        process_of(worker).kill()
    asyncio.run(worker.check())
    process = process_of(worker)
    worker.pipe.close()  # what happens when the worker is killed
    wait_until(lambda: not process.is_running())


@posix
@pytest.mark.parametrize("fault", ["", "wait"])
def test_a_worker_starts_a_server_that_hangs_anew(worker, fault):
    """One that is there, but answers no more; and one that answers, but draws no more."""
    worker = worker(f"{STAND_IN} {fault}", 0.3)
    asyncio.run(worker.check())
    hung = process_of(worker)
    if not fault:
        hung.suspend()
    with pytest.raises(Lost, match="no picture in"):
        drawn_by(worker)
    asyncio.run(worker.check())
    wait_until(lambda: not hung.is_running())
    assert process_of(worker).pid != hung.pid


@posix
def test_what_ray_needs(worker, line, monkeypatch):
    """A command that starts ComfyUI, and Ray itself."""
    with pytest.raises(Lost, match=r"ComfyUI did not start[\s\S]*SyntaxError"):
        asyncio.run(worker(f"{sys.executable} -c 1+").check())
    refuses([*line(start="python main.py --port {port}"), "--ray"], r"--start has no \{folder\}")
    monkeypatch.setitem(sys.modules, "ray", None)
    refuses([*line(), "--ray"], "Ray is not installed")
