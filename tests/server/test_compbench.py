"""T2I-CompBench and GenEval through ComfyUI: layouts, resumption, lost servers, results."""

import asyncio
import json
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from comfy_stand_in import StandIn, asked_for, changed, colour_of, graph_of_the_demo, png_of
from PIL import Image
from workflow import ROOT, USERS, read
from workflow import api_form as as_the_page_sends

sys.path += [str(ROOT / "benchmarks"), str(ROOT / "demo")]

import comfy_server
import compbench.__main__ as compbench
import world
from comfy_server import Lost
from compbench import draw, ray_workers, results
from compbench.plan import Category, Plan, Problem, Unit, read_category
from compbench.plan import write as put
from compbench.workflow import Workflow, read_workflow

NO_WORKFLOW = Workflow({}, [], "", None, "")
PROMPTS = ["a red circle left of a blue square", "It's red, and blue.", "a cup: green-ish"]
BENCH = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a bench"}
COW = {"tag": "colors", "include": [], "prompt": "a photo of a red cow / calf_1"}
STAND_IN = f"{sys.executable} {Path(__file__).with_name('comfy_stand_in.py')} {{port}} {{folder}}"
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


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def color(tmp_path):
    """T2I-CompBench's prompt files end lines with CRLF, and have no end of the last line."""
    return write(tmp_path / "color_val.txt", " \r\n".join(PROMPTS))


@pytest.fixture
def geneval(tmp_path):
    return write(tmp_path / "metadata.jsonl", f"{json.dumps(BENCH)}\n{json.dumps(COW)}")


@pytest.fixture
def line(tmp_path, color, out):
    """The command line, for servers and options."""

    def line(*servers, prompts=(color,), workflow=None, images=2, **more):
        workflow = workflow or api_form(tmp_path)
        words = ["--prompts", *prompts, "--workflow", workflow, "--out", out, "--images", images]
        words += ["--servers", *servers] if servers else []
        for name, value in more.items():
            words += [f"--{name.replace('_', '-')}", value]
        return [str(word) for word in words]

    return line


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


# --- prompts and layouts --------------------------------------------------------------------------


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
        ("objects.jsonl", '{"prompt": "a cup"}', "is not GenEval"),
        ("objects.jsonl", "a cup", "is not GenEval"),
    ],
)
def test_prompts_that_are_refused(tmp_path, name, content, why):
    with pytest.raises(Problem, match=why):
        read_category(write(tmp_path / name, content))


# --- the workflow ---------------------------------------------------------------------------------


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


# --- the folder -----------------------------------------------------------------------------------


@pytest.fixture
def plan(color, tmp_path):
    return Plan(read_workflow(api_form(tmp_path)), [1.0, 1.2], [read_category(color, 2)])


def picture_of(unit):
    texts, seeds, gammas = {"text": unit.prompt}, {"seed": unit.seed}, {"gamma": unit.gamma}
    return png_of(changed(positive=texts, sample=seeds, taca=gammas))


def draw_all(out, plan):
    for unit in plan.begin(out):
        put(out, unit.path, picture_of(unit))


@pytest.mark.parametrize("step", ["open", "half", "written", "placed"])
@pytest.mark.parametrize("number", range(3))
def test_killed_between_any_two_steps(out, plan, monkeypatch, step, number):
    """Before, in the middle of and after each thing done for run.json and two pictures."""
    writes, move = [], Path.replace

    def dies_in_write(path, content):
        writes.append(path)
        part = {"open": 0, "half": len(content) // 2}.get(step, len(content))
        write(path, content[:part] if len(writes) > number else content)
        if len(writes) > number and part < len(content):
            raise KeyboardInterrupt

    def dies_in_move(path, place):
        if len(writes) <= number or step == "placed":
            move(path, place)
        if len(writes) > number:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", dies_in_write)
        patch.setattr(Path, "replace", dies_in_move)
        with pytest.raises(KeyboardInterrupt):
            draw_all(out, plan)
    there = max(0, number - 1 + (step == "placed"))
    assert plan.begin(out) == plan.units()[there:]
    draw_all(out, plan)
    assert_complete(out)


@pytest.mark.parametrize("change", ["workflow", "gammas", "prompts", "seeds", "files"])
def test_other_runs_are_not_mixed(tmp_path, color, out, line, change):
    # What is filled in does not count.
    same = changed(positive={"text": "x"}, sample={"seed": 9}, taca={"gamma": 1})
    same["save"]["inputs"]["filename_prefix"] = "y"
    with StandIn() as server:
        compbench.main(line(server.url))
        compbench.main(line(server.url, workflow=api_form(tmp_path / "same", same)))
        assert sum(server.asked.values()) == 12
        before, more = files_under(out), {}
        if change == "workflow":
            more["workflow"] = api_form(tmp_path / "other", graph_of_the_demo(steps=3))
        elif change == "gammas":
            more["gammas"] = 1
        elif change == "prompts":
            write(color, "a red cup")
        elif change == "seeds":
            more["seed"] = 43
        else:
            more["prompts"] = [color, write(tmp_path / "shape_val.txt", "a cup")]
        refuses(line(server.url, **more), r"holds another run, whose \w+ differ")
    assert files_under(out) == before


@pytest.mark.parametrize("damage", ["gone", "empty", "shorter", "picture", "metadata", "another's"])
def test_what_is_damaged_is_drawn_again(out, line, plan, damage):
    draw_all(out, plan)
    victim = plan.units()[3]
    whole = picture_of(victim)
    # One bit is another, in the pixels or in the graph.
    at = whole.index(b"IDAT") + 9 if damage == "picture" else whole.index(b"TACADemoDecode")
    flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    other = {"empty": b"", "shorter": whole[:-5], "another's": picture_of(plan.units()[4])}
    write(out / victim.path, other.get(damage, flipped))
    if damage == "gone":
        (out / victim.path).unlink()
    check = ["--check", "--out", str(out)]
    refuses(check, r"^compbench: 1 pictures are missing or damaged.*draws these again")
    with StandIn() as server:
        compbench.main(line(server.url))
        assert server.asked == {victim[1:]: 1}
    assert_complete(out)
    compbench.main(check)
    # The evaluators would take this for one:
    write(out / "gamma_1/color/samples/a cup_000099.png", "x")
    refuses(check, r"a cup_000099.png and 0 more are not this run's")


# --- servers --------------------------------------------------------------------------------------


@pytest.fixture
def fast(monkeypatch):
    """Looks for lost servers sooner."""
    monkeypatch.setattr(draw, "_PAUSES", (0.02,))


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("error", r"failed 5 times on http.*: KSampler: no memory"),
        ("restart", r"failed 5 times"),
        ("cut", r"failed 5 times.*not a whole PNG"),
        ("bare", r"failed 5 times.*without ComfyUI's metadata"),
        ("other", r"failed 5 times.*another picture than asked for"),
        ("refuse", r"refuses the workflow: .*no such node"),
        ("batch", r"refuses the workflow: .*gives 2 pictures.*batch size to 1"),
    ],
)
def test_faults(out, line, fast, capsys, fault, why):
    """One that stays ends the run with the reason, and the command goes on; others pass."""
    bad, seen = ("It's red, and blue.", 43, 1.2), set()

    def once(graph):
        unit = asked_for(graph)
        return None if unit in seen else seen.add(unit) or fault

    with StandIn(lambda graph: fault if asked_for(graph) == bad else None) as server:
        assert "is kept: the same command goes on" in refuses(line(server.url), why)
        left = 12 - drawn(out)
        assert 0 < left < 12
        server.fault = once if "failed" in why else lambda graph: None
        compbench.main(line(server.url))
    assert_complete(out)
    assert f"{left} drawn, {left if 'failed' in why else 0} tries" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["restart", "500", "error", "refuse", "wait"])
def test_one_of_two_fails_at_everything(out, line, monkeypatch, fault):
    """And says it is well. Another draws all, and no picture is tried there again and again."""
    tried, good_is_there = [], threading.Event()
    monkeypatch.setattr(draw, "_PAUSES", (0.05,))

    def fails(graph):
        good_is_there.wait()  # before that a picture may well be tried again
        tried.append(asked_for(graph))
        return fault

    with StandIn(fails) as bad, StandIn() as good:
        # so that the other is faster
        good.fault = lambda graph: good_is_there.set() or time.sleep(0.03)
        patience = 0.01 if fault == "wait" else 1
        compbench.main(line(bad.url, good.url, images=5, patience=patience))
        assert sum(good.asked.values()) == 30
    assert_complete(out)
    assert 0 < len(tried) == len(set(tried))
    assert fault != "refuse" or len(tried) <= draw.IN_FLIGHT


def test_no_server_is_left(line, fast):
    """All refuse; or one does and the other does not answer."""
    with StandIn() as gone:
        pass
    with StandIn(lambda graph: "refuse") as a, StandIn(lambda graph: "refuse") as b:
        refuses(line(a.url, b.url), r"Every server refuses the workflow.*no such node")
        both = line(gone.url, a.url, patience=0.01)
        refuses(both, r"No server has answered.*Cannot connect.*no such node")


def test_servers_share_the_work(out, line, fast):
    """A prompt's pictures are one server's, for it to encode the text once."""
    with StandIn() as a, StandIn() as b:
        a.fault = b.fault = lambda graph: time.sleep(0.005)
        compbench.main(line(a.url, b.url, images=10))
        assert sum(a.asked.values()) + sum(b.asked.values()) == 60
        prompts = [{prompt for prompt, _, _ in server.asked} for server in (a, b)]
    assert all(prompts)
    assert not prompts[0] & prompts[1]


@posix
def test_stopped_by_ctrl_c(out, line):
    with StandIn(lambda graph: time.sleep(0.1)) as server:
        whole = [sys.executable, str(ROOT / "benchmarks/compbench"), *line(server.url, images=10)]
        with subprocess.Popen(whole, stderr=subprocess.PIPE, text=True) as process:
            wait_until(lambda: drawn(out) >= 5)
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=30)[1]
    assert process.returncode == 1
    assert "compbench: Stopped." in said
    assert "Traceback" not in said
    assert 5 <= drawn(out) < 60


@posix
@pytest.mark.slow
def test_killed_fifty_times(tmp_path, line):
    """SIGKILL at random moments: nothing is lost, nothing is doubled."""
    rng = random.Random(0)  # noqa: S311
    prompts = [write(tmp_path / "color_val.txt", "\n".join(f"picture {i}" for i in range(8)))]
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["compbench.__main__"])
    kills = folders = halfway = 0
    with StandIn() as server, StandIn() as other:
        while kills < 50:
            folders, killed_here = folders + 1, 0
            server.asked.clear(), other.asked.clear()
            words = line(server.url, other.url, prompts=prompts, images=5)
            words[words.index("--out") + 1] = str(out := tmp_path / f"out{folders}")
            while True:
                life = processes.Process(target=compbench.main, args=(words,))
                life.start()
                goal = drawn(out) + rng.randint(0, 12)  # seconds would all be of the start
                while kills < 50 and drawn(out) < goal and life.is_alive():
                    time.sleep(0.001)
                life.join(rng.uniform(0, 0.05) if kills < 50 else None)
                if life.exitcode is not None:
                    break
                life.kill()
                life.join()
                kills, killed_here = kills + 1, killed_here + 1
                halfway += 0 < drawn(out) < 80
            assert life.exitcode == 0
            assert_complete(out)
            again = sum(server.asked.values()) + sum(other.asked.values()) - 80
            assert 0 <= again <= 2 * draw.IN_FLIGHT * killed_here
    assert folders < 50, "a kill in each folder would say little about resumption"
    assert halfway >= 25, "nor would kills before the first picture or after the last"


# --- real servers ---------------------------------------------------------------------------------


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
    "taca_flux1_dev": ("12.noise_seed", "17.gamma", "21"),
    "taca_flux1_dev_lora": ("12.noise_seed", "17.gamma", "22"),
    "taca_sd35_medium": ("9.value", "13.gamma", "16"),
    "taca_sd35_medium_lora": ("9.value", "13.gamma", "17"),
}


@pytest.mark.slow
def test_the_packs_own_workflows(tmp_path, start):
    """All that draw without and with TACA need no option; each of the others is told why not."""
    info = comfy_server.Server(start()).get("/object_info")
    for path in USERS:
        graph = as_the_page_sends(read(path), info)
        file = api_form(tmp_path / path.stem, graph)
        saving = {n: c["inputs"] for n, c in graph.items() if c["class_type"] == "SaveImage"}
        if len(saving) != 2:
            with pytest.raises(Problem, match="--"):  # an option that helps, or what it needs
                read_workflow(file)
            continue
        found = read_workflow(file)
        [output] = [n for n, i in saving.items() if i["filename_prefix"].endswith("_plain")]
        plain = read_workflow(file, output=output, is_plain=True)
        kinds = [{c["class_type"] for c in some.graph.values()} for some in (found, plain)]
        assert "TACAPatchModel" in kinds[0]
        assert not {"TACAPatchModel", "LoadTACALoRA"} & kinds[1]
        assert (plain.gamma, plain.seed) == (None, found.seed)
        places = found.seed, found.gamma, found.output
        assert places == OURS.get(path.stem, places)
        assert "a cup" in json.dumps(found.filled(Unit("", "a cup", 7, 1.3)))


# --- Ray ------------------------------------------------------------------------------------------


@posix
@pytest.mark.slow
def test_on_ray(out, captions):
    """Two workers, each with a ComfyUI of its own; a worker is killed, then a ComfyUI."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install ray")
    ours = "main.py", "--output-directory", "compbench-"
    threads = [
        when_drawn(out, 8, lambda: running("ray::Worker")[0].kill()),
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
            made = ray_workers.Worker(start, patience)
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


# --- results --------------------------------------------------------------------------------------


def write_scores(file, scores):
    """BLIP's answers are texts, the others' are numbers."""
    answers = [f"{s:.4f}" if "blip" in str(file) else round(s, 4) for s in scores]
    write_json(file, [{"question_id": i, "answer": a} for i, a in enumerate(answers)])


@pytest.fixture
def judged(out, geneval):
    """A run of every category, without its pictures, and what the evaluators would leave."""
    names = ["color", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex"]
    categories = [Category(name, ["a cup", "a pot", "a pan"], [42, 43]) for name in names]
    plan = Plan(NO_WORKFLOW, [1.0, 1.2], [*categories, read_category(geneval, 2)])
    plan.begin(out)
    for gamma in plan.gammas:
        for category in categories:
            folder, (_, result, seen) = category.folder(gamma), results.EVALUATORS[category.name]
            write_scores(out / folder / result, [0.1 * (i + gamma) for i in range(6)])
            if seen:  # with paths, or by that of spatial without
                paths = [f"x/{unit.path}" for unit in category.units(gamma)]
                names = [path.rpartition("/")[2] for path in paths]
                files = names if category.name == "spatial" else paths
                write_json(out / folder / seen, [{"image": file} for file in files])
        # As pandas writes it: slashes are escaped, the order is the folder's.
        lines = []
        for unit in plan.categories[-1].units(gamma):
            about = BENCH if unit.prompt == BENCH["prompt"] else COW
            is_right = about == BENCH or unit.seed == 43
            entry = about | {"filename": f"/else/{unit.path}", "correct": is_right}
            lines.insert(0, json.dumps(entry).replace("/", "\\/"))
        write(out / plan.categories[-1].folder(gamma) / "results.jsonl", "\n".join(lines) + "\n")
    return out, plan


@pytest.fixture
def reading(out):
    return ["--read", "--out", str(out)]


def test_results_are_read(judged, reading, capsys):
    compbench.main(reading)
    table = capsys.readouterr().out
    for row in (
        "T2I-CompBench | color | spatial | 3d_spatial | numeracy | non_spatial | complex |",
        "gamma_1 | 0.3500 | 0.3500 |",
        "gamma_1.2 | 0.3700 (+0.0200 ± 0.0000) |",
        "paper: SD3.5-Medium, TACA, r = 64 | 0.8074 | 0.2678 |  |  | 0.3106 | 0.4470 |",
        "GenEval | single_object | colors | overall |",
        "gamma_1 | 1.0000 | 0.5000 | 0.7500 |",
    ):
        assert f"| {row}" in table


@pytest.mark.parametrize(
    "name", ["spatial", "3d_spatial", "numeracy", "non_spatial", "complex", "color", "geneval"]
)
def test_results_of_another_setting_are_refused(judged, reading, name):
    """gamma 1's, copied to 1.2, would read as no difference at all."""
    out, _ = judged
    shutil.copytree(out / "gamma_1" / name, out / "gamma_1.2" / name, dirs_exist_ok=True)
    named = "not of this run's pictures at this setting: gamma_1/"
    refuses(reading, named if name in ("color", "geneval") else "to the byte, so one is a copy")


def test_results_that_are_older_than_the_pictures(judged, reading):
    old = judged[0] / "gamma_1/numeracy/annotation_num/vqa_result.json"
    os.utime(write(judged[0] / "gamma_1/numeracy/samples/a cup_000000.png", ""), (9e8, 9e8))
    os.utime(old, (9e8 - 1, 9e8 - 1))
    refuses(reading, f"{old} is older than the pictures")


def save(plan, out):
    write_json(out / "run.json", asdict(plan))


@pytest.fixture
def baseline(judged, tmp_path):
    """A run of the plain workflow, judged."""
    out, plan = judged
    plain = tmp_path / "plain"
    shutil.copytree(out, plain)
    save(replace(plan, gammas=[1.0]), plain)
    write_scores(plain / "gamma_1/color/annotation_blip/vqa_result.json", np.arange(6) / 10)
    return plain


def test_baseline(judged, reading, baseline, capsys):
    """Differences are to another run's gamma 1; the workflow's own is with its LoRA."""
    out, plan = judged
    nodes = {"LoadTACALoRA": {"strength": 1.0}, "KSampler": {"steps": 30, "seed": None}}
    graph = {kind: {"class_type": kind, "inputs": inputs} for kind, inputs in nodes.items()}
    save(replace(plan, workflow=replace(NO_WORKFLOW, graph=graph)), out)
    compbench.main(reading)
    printed = capsys.readouterr().out
    assert "gamma_1 is with the LoRA of LoadTACALoRA, not the plain model" in printed
    assert "| gamma_1.2 | 0.3700 (+0.0200 ± 0.0000) |" in printed
    compbench.main([*reading, "--baseline", str(baseline)])
    printed = capsys.readouterr().out
    for row in (
        "| baseline | 0.2500 | 0.3500 |",
        "| gamma_1 | 0.3500 (+0.1000 ± 0.0000) | 0.3500 (+0.0000 ± 0.0000) |",
        "| gamma_1.2 | 0.3700 (+0.1200 ± 0.0000) |",
        "| baseline | 1.0000 | 0.5000 | 0.7500 |",  # GenEval
        "In brackets: the difference to baseline",
        "differ in more than TACA and LoRAs: KSampler.steps 30",
    ):
        assert row in printed


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"prompts": ["a cup", "a pan", "a pot"]}, "same prompts and seeds of color"),
        ({"seeds": [43, 42]}, "same prompts and seeds of color"),
        ({"gammas": [1.2]}, "no pictures at gamma 1"),
        ({}, r"of other sizes: \[\(64, 64\), \(128, 128\)\]"),
    ],
)
def test_baselines_that_are_not_of_the_same_pictures(judged, reading, baseline, change, why):
    out, plan = judged
    gammas = change.pop("gammas", [1.0])
    categories = [replace(plan.categories[0], **change), *plan.categories[1:]]
    save(replace(plan, gammas=gammas, categories=categories), baseline)
    for folder, size in ((out, 128), (baseline, 64)):
        place = write(folder / plan.units()[0].path, "")
        Image.new("RGB", (size, size)).save(place)
        os.utime(place, (0, 0))
    refuses([*reading, "--baseline", str(baseline)], why)


def test_interval():
    """Paired, over prompts; GenEval's tags count the same, however many prompts they have."""
    plain = {"colors": [0.5, 0.0], "position": [0.0, 0.5, 1.0], "color": [0.1, 0.4, 0.2]}
    taca = {"colors": [1.0, 0.5], "position": [0.5, 0.5, 0.5], "color": [0.15, 0.7, 0.2]}
    scores = {column: {"gamma_1": plain[column], "gamma_1.2": taca[column]} for column in plain}
    table = results.table(scores, Plan(NO_WORKFLOW, [1.0, 1.2], []))
    for columns in (["color"], ["colors", "position"]):
        differences = [np.subtract(taca[column], plain[column]) for column in columns]
        score = np.mean([np.mean(taca[column]) for column in columns])
        mean = np.mean([np.mean(d) for d in differences])
        half = 1.96 * np.sqrt(sum(np.var(d, ddof=1) / len(d) for d in differences)) / len(columns)
        assert f"| {score:.4f} ({mean:+.4f} ± {half:.4f}) |" in table


OTHER, NOT_ITS = "not of this run's pictures", "not what its evaluator writes"


BLIP = "color/annotation_blip/vqa_result.json"
SEEN = "color/annotation1_blip/vqa_test.json"
SPATIAL = "spatial/labels/annotation_obj_detection_2d/mapping.json"
LINES = "geneval/results.jsonl"


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        (BLIP, lambda e: e[:-1], "5 results for 6 pictures"),
        (BLIP, lambda e: [*e[:-1], e[0]], OTHER),
        (BLIP, lambda e: [{**e[0], "answer": "nan"}, *e[1:]], "the score of 0 is nan"),
        (BLIP, lambda e: [{**e[0], "answer": "71.1"}, *e[1:]], "the score of 0 is 71.1"),
        (BLIP, lambda e: [{"question_id": 0}, *e[1:]], NOT_ITS),
        (BLIP, lambda e: "x", NOT_ITS),
        (SEEN, lambda e: [{"image": "gamma_1/color/samples/a cat_000000.png"}, *e[1:]], OTHER),
        (SPATIAL, lambda e: [{"image": "a cat_000000.png"}, *e[1:]], OTHER),
        (LINES, lambda e: e[:-1], "3 results for 4 pictures"),
        (LINES, lambda e: [*e[:-1], e[0]], OTHER),
        (LINES, lambda e: [{**e[0], "prompt": "a cat"}, *e[1:]], "for another prompt"),
        (LINES, lambda e: [{**e[0], "filename": "x/00007/samples/0000.png"}, *e[1:]], OTHER),
        (LINES, lambda e: [{**e[0], "correct": 0.5}, *e[1:]], "neither correct nor not"),
        (LINES, lambda e: [{"prompt": "x"}, *e[1:]], NOT_ITS),
    ],
)
def test_wrong_results_are_refused(judged, reading, name, change, why):
    file = judged[0] / "gamma_1.2" / name
    if name == LINES:
        entries = change([json.loads(line) for line in file.read_text().splitlines()])
        write(file, "\n".join(map(json.dumps, entries)))
    else:
        write_json(file, change(json.loads(file.read_text())))
    refuses(reading, why)


def test_results_that_are_not_there(judged, reading, capsys):
    """Some; and all, when the commands are printed, with the paths that the scripts take."""
    out, _ = judged
    gone = out / "gamma_1/complex/annotation_3_in_1/vqa_result.json"
    gone.unlink()
    compbench.main(reading)
    printed = capsys.readouterr().out
    assert f"Not there yet:\n{gone}" in printed
    assert "| gamma_1 | 0.3500 | 0.3500 | 0.3500 | 0.3500 | 0.3500 |  |" in printed
    for file in out.rglob("*result*.json*"):
        file.unlink()
    lines = refuses(reading, "No evaluator has been run")
    place = (out / "gamma_1/complex").resolve()
    for command in (
        f"BLIP_vqa.py --out_dir={place})",
        f"2D_spatial_eval.py --outpath={place} --complex=True)",
        f"CLIP_similarity.py --outpath={place} --complex=True)",
        f"3_in_1.py --outpath={place})",
        f"2D_spatial_eval.py --outpath={place.parent / 'spatial'})",
    ):
        assert command in lines


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ("", "--prompts and the --workflow"),
        ("--prompts a --workflow b", "either --servers or --ray"),
        ("--prompts a --workflow b --servers u --gammas 1 1.0", "twice"),
        ("--check --baseline y", "goes with --read"),
    ],
)
def test_command_line(more, why, capsys):
    with pytest.raises(SystemExit):
        compbench.main(["--out", "x", *more.split()])
    assert why in capsys.readouterr().err
