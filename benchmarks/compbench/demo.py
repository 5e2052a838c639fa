"""compbench on the demo's model: one of two servers killed on the way, every picture checked.

``python dev.py run benchmarks/compbench/demo.py`` draws held-out captions of the demo's world,
kills a server after a third of the pictures and the command itself after two thirds, starts the
command again, and has the demo's checker look at what is there. It takes minutes on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
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


def write_inputs(folder: Path, captions: list[str], steps: int = 20) -> list[str]:
    """A prompt file as T2I-CompBench's are, and the workflow; the command's arguments for them."""
    folder.mkdir(parents=True, exist_ok=True)
    # As theirs: CRLF, and no end of the last line.
    (folder / "shapes_val.txt").write_bytes("\r\n".join(captions).encode())
    (folder / "workflow.json").write_text(json.dumps(workflow(steps)))
    return ["--prompts", str(folder / "shapes_val.txt"),
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
    [category] = plan.categories
    for gamma in plan.gammas:
        count = found[gamma] = Counter()
        for i, prompt in enumerate(category.prompts):
            other = category.prompts[(i + 2) % len(category.prompts)]
            for unit in category.units(i, gamma):
                picture = np.asarray(Image.open(out / unit.path).convert("RGB")) / 255
                right = world.check(picture, prompt)
                count.update(key for key in CRITERIA if right[key])
                count["chance"] += world.check(picture, other)["everything"]
                count["pictures"] += 1
    return found


def worker_of(command: subprocess.Popen) -> psutil.Process:
    """One of the command's Ray workers."""
    family = psutil.Process(command.pid).children(recursive=True)
    return next(p for p in family if " ".join(p.cmdline()).startswith("ray::Worker"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / ".dev" / "compbench")
    parser.add_argument("--captions", type=int, default=30)
    parser.add_argument("--images", type=int, default=10)
    parser.add_argument("--ray", action="store_true", help="two workers of Ray, on the CPU")
    options = parser.parse_args()
    out = options.out / "pictures"
    arguments = write_inputs(options.out, world.captions("held-out")[: options.captions])
    arguments += ["--out", str(out), "--images", str(options.images)]
    total = 2 * options.captions * options.images
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
        print(f"\nKilling a server after {drawn(out)} of {total} pictures", flush=True)
        (worker_of(first) if options.ray else servers[0][1]).kill()
        wait_for(out, 2 * total // 3, first)
        print(f"\nKilling the command after {drawn(out)} of {total} pictures", flush=True)
        first.kill()
        first.wait()
        subprocess.run(command, check=True)
        seconds = time.monotonic() - started
    print(
        f"\n{store.check(out)} pictures whole, {drawn(out)} lines in the manifest, {seconds:.0f} s"
    )
    for gamma, count in judge(out).items():
        share = {key: f"{count[key] / count['pictures']:.1%}" for key in (*CRITERIA, "chance")}
        print(f"gamma {gamma:g}: right of {count['pictures']}:", share)


def wait_for(out: Path, number: int, command: subprocess.Popen) -> None:
    """Until a run has so many pictures."""
    while drawn(out) < number:
        if command.poll() is not None:
            sys.exit("The command ended early.")
        time.sleep(0.05)


if __name__ == "__main__":
    main()
