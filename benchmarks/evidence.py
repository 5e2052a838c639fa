"""Does TACA help on a real model? 24 prompts, 4 seeds, without and with it, and one small JSON.

``python dev.py run benchmarks/evidence.py draw FLUX.1-dev`` draws the workflow *evidence* of
FLUX.1-dev or SD3.5-Medium on your ComfyUI, 192 pictures, and writes a sheet and a JSON to post;
``draw demo`` does the same on the demo's model, to try it out. ``--encoder`` names a text encoder
that sees pictures, for TACA Prompt Check; else CLIP's similarity judges. ``page`` writes
``docs/evidence.md`` from what was posted, ``results/evidence/*.json``.

The JSON has versions, hashes of the weights, settings, seeds and scores: no names of files, no
paths, no prompts but the hash of all. A run that is stopped goes on where it was if the server is
still there: name it by ``--address``.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from reporting import RESULTS, ROOT, SHARED, markdown, sha256, store, write_between

sys.path += [*SHARED, str(ROOT / "tests")]

from comfy_server import Server, serving

from support.workflow import MODELS, api_form, read

POSTED = RESULTS / "evidence"
PAGE = ROOT / "docs" / "evidence.md"
TEMPLATES = {
    "FLUX.1-dev": ROOT / "workflows/24_FLUX.1-dev_evidence.json",
    "SD3.5-Medium": ROOT / "workflows/25_SD3.5-Medium_evidence.json",
    "demo": ROOT / "demo/workflows/09_Find_the_best_setting.json",
}
PROMPTS, SEEDS = 24, "1, 2, 3, 4"
GAMMA, THRESHOLD = "1, 1.2", "970"
VERSIONS = ("comfyui", "pytorch", "taca")
KEYS = {"schema", "model", "judge", "versions", "weights", "sampler", "prompts", "record"}
RECORD = {"settings", "prompts", "seeds", "best", "difference", "interval", "winner", "scores"}


def one_of(graph: dict[str, Any], kind: str) -> str:
    """The one node of a kind."""
    [node] = [node for node, each in graph.items() if each["class_type"] == kind]
    return node


def graph_of(
    model: str, info: dict[str, Any], prompts: int = PROMPTS, steps: int | None = None
) -> dict[str, Any]:
    """The workflow of a model in API form; the demo's with as many prompts and seeds."""
    graph = api_form(read(TEMPLATES[model]), info)
    trial = graph[one_of(graph, "TACATrial")]["inputs"]
    graph[one_of(graph, "TACASweep")]["inputs"] |= {
        "gammas": GAMMA,
        "timestep_thresholds": THRESHOLD,
    }
    trial["seeds"] = SEEDS
    trial["prompts"] = "\n".join(trial["prompts"].splitlines()[:prompts])
    if steps:
        graph[one_of(graph, "KSampler")]["inputs"]["steps"] = steps
    find = one_of(graph, "TACAFindSetting")
    graph["record"] = {"class_type": "PreviewAny", "inputs": {"source": [find, 3]}}
    return graph


def judged_by(graph: dict[str, Any], encoder: str, kind: str) -> None:
    """Put TACA Prompt Check, with this text encoder, in the place of the workflow's judge."""
    find = graph[one_of(graph, "TACAFindSetting")]["inputs"]
    old = graph[find["score"][0]]["inputs"]
    loader = {"clip_name": encoder, "type": kind, "device": "default"}
    graph["encoder"] = {"class_type": "CLIPLoader", "inputs": loader}
    judge = {"image": old["image"], "text": old["text"], "clip": ["encoder", 0]}
    judge |= {"phrases": "", "find_phrases": False}
    graph["judge"] = {"class_type": "TACAPromptCheck", "inputs": judge}
    find["score"] = ["judge", 0]


def needed(graph: dict[str, Any], node: str) -> dict[str, Any]:
    """A node, and all that it needs."""
    found, todo = dict[str, Any](), [node]
    while todo:
        one = todo.pop()
        if one not in found:
            found[one] = graph[one]
            links = (each for each in graph[one]["inputs"].values() if isinstance(each, list))
            todo += [each[0] for each in links]
    return found


def hashes(graph: dict[str, Any], folders: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of each file that a graph loads, by node and widget; SystemExit if one is missing."""
    found = {}
    for each in graph.values():
        for widget in MODELS.keys() & each["inputs"].keys():
            name = each["inputs"][widget]
            files = [path for folder in folders for path in folder.rglob(Path(name).name)]
            if not files:
                sys.exit(f"{name} is not in the folders of models: name its folder by --models.")
            found[f"{each['class_type']}.{widget}"] = sha256(files[0])
    return found


def draw(
    server: Server, graph: dict[str, Any], model: str, folders: Iterable[Path], out: Path
) -> Path:
    """Draw what is missing, judge, and write the sheet and the JSON; returns the latter."""
    find = one_of(graph, "TACAFindSetting")
    graph = needed(graph, "record") | needed(graph, one_of(graph, "SaveImage"))
    weights = hashes(graph, folders)  # before hours of drawing

    def progress(node: str, done: int, total: int) -> None:
        if node == find:
            print(f"{done} of {total} pictures", flush=True)

    outputs = server.run(graph, progress)
    sampler = graph[one_of(graph, "KSampler")]["inputs"]
    system = server.get("/system_stats")["system"]
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    version = next(line for line in project.splitlines() if line.startswith("version ="))
    texts = graph[one_of(graph, "TACATrial")]["inputs"]["prompts"]
    judge = graph[graph[find]["inputs"]["score"][0]]["class_type"]
    versions = system["comfyui_version"], system["pytorch_version"], version.split('"')[1]
    evidence = {
        "schema": 1,
        "model": model,
        "judge": judge,
        "versions": dict(zip(VERSIONS, versions, strict=True)),
        "weights": weights,
        "sampler": {key: sampler[key] for key in ("sampler_name", "scheduler", "steps", "cfg")},
        "prompts": hashlib.sha256(texts.encode()).hexdigest(),
        "record": json.loads(outputs["record"]["text"][0]),
    }
    checked(evidence)
    name = hashlib.sha256(json.dumps(evidence).encode()).hexdigest()[:8]
    path = out / f"evidence-{model}-{name}.json"
    store(path, evidence)
    image = outputs[one_of(graph, "SaveImage")]["images"][0]
    path.with_suffix(".png").write_bytes(server.picture(image))
    return path


def checked(evidence: Any) -> dict[str, Any]:
    """What somebody posted, if it is what ``draw`` writes; else ValueError says why not."""
    if not isinstance(evidence, dict) or evidence.keys() != KEYS or evidence["schema"] != 1:
        raise ValueError(f"it must have {', '.join(sorted(KEYS))}, and no more")
    record = evidence["record"]
    if record.keys() != RECORD:
        raise ValueError(f"its record must have {', '.join(sorted(RECORD))}, and no more")
    if evidence["versions"].keys() != set(VERSIONS):
        raise ValueError(f"its versions must be of {', '.join(VERSIONS)}")
    for digest in [evidence["prompts"], *evidence["weights"].values()]:
        if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise ValueError(f"{digest!r} is no SHA-256")
    wanted = {
        (prompt, seed, setting)
        for prompt in range(record["prompts"])
        for seed in range(len(record["seeds"]))
        for setting in range(2)
    }
    if len(record["settings"]) != 2 or {tuple(row[:3]) for row in record["scores"]} != wanted:
        raise ValueError("it must have a score for each prompt, seed and setting")
    if not all(
        isinstance(row[3], int | float) and math.isfinite(row[3]) for row in record["scores"]
    ):
        raise ValueError("a score is not a finite number")
    if len(record["scores"]) != len(wanted):
        raise ValueError("it has a score twice")
    return evidence


def table(posted: list[dict[str, Any]]) -> str:
    """How many there are, and what each found."""
    if not posted:
        return "So far: none.\n"
    rows = []
    for each in sorted(posted, key=lambda each: (each["model"], each["judge"])):
        record, low_high = each["record"], each["record"]["interval"]
        interval = "-" if low_high is None else "{:+.4f} to {:+.4f}".format(*low_high)
        answer = {None: "no difference", 0: "without TACA"}.get(record["winner"], "with TACA")
        versions = ", ".join(each["versions"].values())
        count = len(record["scores"])
        values = f"{record['difference']:+.4f}", interval, answer, versions
        rows.append((each["model"], each["judge"], count, *values))
    head = ("model", "judge", "pictures", "difference", "95 % interval", "better")
    return f"So far: {len(posted)}.\n\n{markdown((*head, 'ComfyUI, PyTorch, TACA'), rows)}\n"


def write_page(folder: Path = POSTED, page: Path = PAGE) -> None:
    """Count and table, from the files in a folder; SystemExit names one that is not as it must."""
    posted = []
    for path in sorted(folder.glob("*.json")):
        try:
            posted.append(checked(json.loads(path.read_text("utf-8"))))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            sys.exit(f"{path.name}: {error}")
    write_between(page, "evidence", f"\n{table(posted)}\n")


@contextlib.contextmanager
def server_of(options: argparse.Namespace) -> Iterator[Server]:
    """The user's server, or one of our own for as long as it takes."""
    if options.address:
        yield Server(options.address)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    with serving(options.out / "base", options.out / "log") as server:
        yield server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("page", help="write docs/evidence.md from results/evidence")
    drawing = commands.add_parser("draw", help="draw, judge, and write what to post")
    drawing.add_argument("model", choices=TEMPLATES)
    drawing.add_argument("--address", help="of a ComfyUI that runs; else one is started")
    drawing.add_argument("--models", type=Path, nargs="+", default=[], help="folders of models")
    drawing.add_argument("--encoder", help="a text encoder that sees pictures, by its file")
    drawing.add_argument("--encoder-type", default="qwen_image", help="as in Load CLIP")
    drawing.add_argument("--out", type=Path, default=ROOT / ".dev" / "evidence")
    options = parser.parse_args()
    if options.command == "page":
        write_page()
        return
    folders = [*options.models, Path(os.environ["COMFYUI_PATH"], "models"), ROOT / "demo/models"]
    with server_of(options) as server:
        info = server.get("/object_info")
        graph = graph_of(options.model, info)
        if options.encoder:
            judged_by(graph, options.encoder, options.encoder_type)
        path = draw(server, graph, options.model, folders, options.out)
    print(f"sheet: {path.with_suffix('.png')}\nto post: {path}")


if __name__ == "__main__":
    main()
