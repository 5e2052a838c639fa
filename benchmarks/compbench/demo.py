"""compbench on the demo's model: one of two servers killed on the way, every picture checked.

``python dev.py run benchmarks/compbench/demo.py`` draws held-out captions of the demo's world,
in both layouts, kills a server after a third of the pictures and the command itself after two
thirds, starts the command again, and has the demo's checker look at what is there. It takes minutes
on a CPU. ``--record FILE`` writes down what was found.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path += [str(HERE.parent), str(ROOT / "demo")]

import comfy_server  # noqa: E402
import world  # noqa: E402

from compbench import store  # noqa: E402
from compbench.plan import IMAGES  # noqa: E402
from compbench.server import Lost, Refused, Server  # noqa: E402

CRITERIA = ("colour", "shape", "relation", "everything")


def workflow(steps: int = 20) -> dict[str, Any]:
    """The demo's model with TACA, in API form."""

    def node(class_type: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": class_type, "inputs": inputs}

    return {
        "model": node(
            "UNETLoader", unet_name="taca_demo_mmdit.safetensors", weight_dtype="default"
        ),
        "taca": node("TACAPatchModel", model=["model", 0], gamma=1.2, timestep_threshold=970.0),
        "positive": node("TACADemoTextEncode", text=""),
        "negative": node("TACADemoTextEncode", text=""),
        "latent": node("EmptySD3LatentImage", width=128, height=128, batch_size=1),
        "sample": node(
            "KSampler", model=["taca", 0], seed=0, steps=steps, cfg=3.0, sampler_name="euler",
            scheduler="simple", positive=["positive", 0], negative=["negative", 0],
            latent_image=["latent", 0], denoise=1.0,
        ),
        "decode": node("TACADemoDecode", samples=["sample", 0], upscale=1),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="ComfyUI"),
    }  # fmt: skip


def answers(url: str) -> bool:
    """Whether a ComfyUI is there."""
    try:
        Server(url).check()
    except (Lost, Refused):
        return False
    return True


@contextmanager
def comfyuis(folder: Path, number: int) -> Iterator[list[tuple[str, subprocess.Popen]]]:
    """Servers' addresses and processes, once they answer; a process may be killed."""
    place = Path(os.environ["COMFYUI_PATH"])
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # the demo's model needs no more
    with ExitStack() as stack:
        started = []
        for i in range(number):
            own = folder / f"server{i}"
            arguments = [*comfy_server.prepare_base(own, place), "--disable-auto-launch"]
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            command = comfy_server.command(place, port, arguments)
            log = stack.enter_context((own / "log").open("wb"))
            process = stack.enter_context(
                comfy_server.running(
                    command, stdout=log, stderr=subprocess.STDOUT, cwd=place, env=environment
                )
            )
            started.append((f"http://127.0.0.1:{port}", process))
        for i, (url, process) in enumerate(started):
            while not answers(url):
                if process.poll() is not None:
                    log = folder / f"server{i}" / "log"
                    raise RuntimeError(log.read_text("utf-8", "replace")[-3000:])
                time.sleep(0.2)
        yield started


def write_inputs(folder: Path, shapes: int, objects: int, steps: int = 20) -> list[str]:
    """Prompt files as T2I-CompBench's and GenEval's are, and the workflow; the arguments for them.

    Parameters
    ----------
    shapes, objects : int
        How many held-out captions are in the one and in the other.
    """
    captions = world.captions("held-out")[: shapes + objects]
    folder.mkdir(parents=True, exist_ok=True)
    # As theirs: CRLF, and no end of the last line.
    (folder / "shapes_val.txt").write_bytes("\r\n".join(captions[:shapes]).encode())
    lines = [{"tag": "position", "include": [], "prompt": text} for text in captions[shapes:]]
    (folder / "objects.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "workflow.json").write_text(json.dumps(workflow(steps)))
    return ["--prompts", str(folder / "shapes_val.txt"), str(folder / "objects.jsonl"),
            "--workflow", str(folder / "workflow.json")]  # fmt: skip


def drawn(out: Path) -> int:
    """How many pictures a run has."""
    manifest = out / store.MANIFEST
    return manifest.read_bytes().count(b"\n") if manifest.exists() else 0


def judge(out: Path) -> dict[float, Counter[str]]:
    """Gamma -> how many pictures the demo's checker finds right, by criterion.

    ``chance`` counts those that would be right for the caption after the next one. (The next one
    may tell the same scene from its other object.)
    """
    found: dict[float, Counter[str]] = {}
    plan = store.known(out)
    each = [(category, i) for category in plan.categories for i in range(len(category.prompts))]
    for gamma in plan.gammas:
        count = found[gamma] = Counter()
        for k, (category, i) in enumerate(each):
            other, j = each[(k + 2) % len(each)]
            for unit in category.units(i, gamma):
                picture = np.asarray(Image.open(out / unit.path).convert("RGB")) / 255
                right = world.check(picture, unit.prompt)
                count.update(key for key in CRITERIA if right[key])
                count["chance"] += world.check(picture, other.prompts[j])["everything"]
                count["pictures"] += 1
    return found


def record(out: Path, kills: dict[str, int], again: int, seconds: float) -> dict[str, Any]:
    """What a finished run has, as JSON; it is an error if a picture is not whole and once there.

    Parameters
    ----------
    kills : dict
        What was killed -> after how many pictures.
    again : int
        How many pictures the second command found.
    """
    plan = store.known(out)
    lines = [json.loads(line) for line in (out / store.MANIFEST).read_bytes().splitlines()]
    whole = store.check(out)
    names = sorted({line["server"] for line in lines})
    of_server = Counter(f"server {names.index(line['server'])}" for line in lines)
    if not whole == len(lines) == len(plan.units()):
        sys.exit(f"{len(plan.units())} pictures, {whole} whole, {len(lines)} lines")
    return {
        "pictures": len(plan.units()),
        "whole": whole,
        "lines of the manifest": len(lines),
        "by category": {c.name: 2 * len(c.prompts) * len(c.seeds) for c in plan.categories},
        "by server": dict(sorted(of_server.items())),
        "killed after": kills,
        "found by the second command": again,
        "seconds": round(seconds),
        "plan, SHA-256": hashlib.sha256(
            json.dumps(plan.json(), sort_keys=True).encode()
        ).hexdigest(),
        "right, by gamma": {f"{gamma:g}": dict(count) for gamma, count in judge(out).items()},
    }


def worker_of(command: subprocess.Popen) -> psutil.Process:
    """One of the command's Ray workers."""
    family = psutil.Process(command.pid).children(recursive=True)
    return next(p for p in family if " ".join(p.cmdline()).startswith("ray::Worker"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / ".dev" / "compbench")
    parser.add_argument("--shapes", type=int, default=28, help="captions in T2I-CompBench's layout")
    parser.add_argument("--objects", type=int, default=5, help="captions in GenEval's")
    parser.add_argument("--ray", action="store_true", help="two workers of Ray, on the CPU")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write what was found, as JSON")
    options = parser.parse_args()
    out = options.out / "pictures"
    arguments = write_inputs(options.out, options.shapes, options.objects)
    arguments += ["--out", str(out)]
    total = 2 * (IMAGES["t2i"] * options.shapes + IMAGES["geneval"] * options.objects)
    kills = {}
    with ExitStack() as stack:
        if options.ray:
            arguments += ["--ray", "--workers", "2", "--gpus-per-worker", "0"]
        else:
            servers = stack.enter_context(comfyuis(options.out, 2))
            arguments += ["--servers", *(url for url, _ in servers)]
        command = [sys.executable, str(HERE), *arguments]
        started = time.monotonic()
        first = subprocess.Popen(command)
        wait_for(out, total // 3, first)
        (worker_of(first) if options.ray else servers[0][1]).kill()
        kills["server"] = drawn(out)
        print(f"\nKilled a server after {kills['server']} of {total} pictures", flush=True)
        wait_for(out, 2 * total // 3, first)
        first.kill()
        first.wait()
        kills["command"] = drawn(out)
        print(f"\nKilled the command after {kills['command']} of {total} pictures", flush=True)
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        print(said)
        seconds = time.monotonic() - started
    again = int(re.search(r"(\d+) of them drawn before", said)[1])
    text = json.dumps(record(out, kills, again, seconds), indent=1)
    print(text)
    if options.record:
        options.record.write_text(text + "\n")


def wait_for(out: Path, number: int, command: subprocess.Popen) -> None:
    """Until a run has so many pictures."""
    while drawn(out) < number:
        if command.poll() is not None:
            sys.exit("The command ended early.")
        time.sleep(0.05)


if __name__ == "__main__":
    main()
