"""A run's folder, stand-ins for servers: killed anywhere, damaged, shared, with faults."""

import itertools
import multiprocessing
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import compbench.__main__ as compbench
import pytest
from comfy_server import Server
from compbench import draw

from support import ROOT
from support.comfy_stand_in import StandIn, asked_for, changed, graph_of_the_demo
from support.compbench import (
    api_form,
    assert_complete,
    draw_all,
    drawn,
    files_under,
    picture_of,
    posix,
    refuses,
    wait_until,
    write,
)


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
        if fault == "wait":  # the one that draws may take its time on a busy machine
            patience = {bad.url: 0.3}
            monkeypatch.setattr(
                compbench, "Server", lambda url, **_: Server(url, patience=patience.get(url))
            )
        compbench.main(line(bad.url, good.url, images=5))
        assert sum(good.asked.values()) == 30
    assert_complete(out)
    assert 0 < len(tried) == len(set(tried))
    assert fault != "refuse" or len(tried) <= draw.IN_FLIGHT


def test_no_server_is_left(line, fast, monkeypatch):
    """All refuse; or one does and the other does not answer, while minutes pass quickly."""
    with StandIn() as gone:
        pass
    with StandIn(lambda graph: "refuse") as a, StandIn(lambda graph: "refuse") as b:
        refuses(line(a.url, b.url), r"Every server refuses the workflow.*no such node")
        asked, looks = [], itertools.count()
        a.fault = lambda graph: asked.append(graph) or "refuse"
        clock = SimpleNamespace(monotonic=lambda: 600.0 * next(looks) if asked else 0.0)
        monkeypatch.setattr(draw, "time", clock)
        refuses(line(gone.url, a.url), r"No server has answered.*Cannot connect.*no such node")


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
        # A background job's children ignore the signal, and so would this one.
        kept = signal.signal(signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(whole, stderr=subprocess.PIPE, text=True)
        signal.signal(signal.SIGINT, kept)
        with process:
            wait_until(lambda: drawn(out) >= 5 or process.poll() is not None)
            process.send_signal(signal.SIGINT)
            said = process.communicate()[1]
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
