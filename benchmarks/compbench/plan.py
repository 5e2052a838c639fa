"""What a run draws, and the folder that its pictures go to.

T2I-CompBench reads ``<setting>/<category>/samples/<prompt>_<NNNNNN>.png``: one counter over the
category, one underscore in the name, nothing else in the folder. GenEval reads
``<setting>/geneval/<NNNNN>/metadata.jsonl`` and ``.../samples/<NNNN>.png``.

A picture is drawn when its file is there, moved to its place as a whole. A PNG has a checksum of
each of its parts, and ComfyUI's metadata have the graph that drew it: so the file itself says
whether it is undamaged, and which prompt, seed and gamma it shows.
"""

from __future__ import annotations

import io
import json
import os
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from .workflow import Problem, Unit, Workflow

FIRST_SEED = 42
IMAGES, GENEVAL_IMAGES = 10, 4  # per prompt, in the two protocols
GENEVAL, GENEVAL_2 = "geneval", "geneval2"


@dataclass
class Category:
    """The prompts of one file; ``metadata`` is GenEval's, one for each prompt."""

    name: str
    prompts: list[str]
    seeds: list[int]
    metadata: list[dict[str, Any]] | None = None

    def folder(self, gamma: float) -> str:
        return f"{setting(gamma)}/{self.name}"

    def units(self, gamma: float) -> list[Unit]:
        """The pictures of one setting, in order."""
        return [u for index in range(len(self.prompts)) for u in self.units_of(index, gamma)]

    def units_of(self, index: int, gamma: float) -> list[Unit]:
        """The pictures of one prompt, one for each seed."""
        prompt, count = self.prompts[index], len(self.seeds)
        names = [f"samples/{prompt}_{index * count + i:06}.png" for i in range(count)]
        if self.metadata:
            names = [f"{index:05}/samples/{i:04}.png" for i in range(count)]
        paths = [f"{self.folder(gamma)}/{name}" for name in names]
        return [Unit(paths[i], prompt, seed, gamma) for i, seed in enumerate(self.seeds)]


@dataclass
class Plan:
    """All that a run's pictures depend on: ``run.json`` in the output folder."""

    workflow: Workflow
    gammas: list[float]
    categories: list[Category]

    def groups(self) -> list[list[Unit]]:
        """The units by prompt: a server that draws a group encodes its text once."""
        return [
            [unit for gamma in self.gammas for unit in category.units_of(index, gamma)]
            for category in self.categories
            for index in range(len(category.prompts))
        ]

    def units(self) -> list[Unit]:
        return [unit for group in self.groups() for unit in group]

    @classmethod
    def read(cls, out: Path) -> Plan:
        """The plan of the run in a folder."""
        try:
            known = json.loads((out / "run.json").read_text("utf-8"))
            categories = [Category(**category) for category in known["categories"]]
            return cls(Workflow(**known["workflow"]), known["gammas"], categories)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Problem(f"{out} holds no run: {error}") from error

    def begin(self, out: Path) -> list[Unit]:
        """Make the folder, or take up the run in it; what is not drawn yet."""
        if not (out / "run.json").exists():
            write(out, "run.json", json.dumps(asdict(self), indent=1).encode())
        known = Plan.read(out)
        names = [field.name for field in fields(self)]
        if other := [name for name in names if getattr(self, name) != getattr(known, name)]:
            why = f"{out} holds another run, whose {' and '.join(other)} differ"
            raise Problem(f"{why} (a category is its prompts and seeds). Name another folder.")
        for left in out.glob("partial-*"):
            left.unlink()
        for gamma in self.gammas:
            for category in self.categories:
                for i, metadata in enumerate(category.metadata or ()):
                    file = f"{category.folder(gamma)}/{i:05}/metadata.jsonl"
                    write(out, file, json.dumps(metadata).encode())
        return self.missing(out)

    def missing(self, out: Path) -> list[Unit]:
        """The units whose pictures are not there, or are damaged."""
        units = self.units()
        folders = {(out / unit.path).parent for unit in units}
        there = {file for folder in folders if folder.is_dir() for file in folder.iterdir()}
        if strange := sorted(map(str, there - {out / unit.path for unit in units})):
            more = f"and {len(strange) - 1} more"  # evaluators would take them for pictures
            raise Problem(f"{strange[0]} {more} are not this run's. Move them away.")
        with ThreadPoolExecutor() as pool:
            faults = pool.map(lambda unit: fault(out / unit.path, unit, self.workflow), units)
            looks = tqdm(faults, "looking", len(units), leave=False, delay=2)
            found = [unit for unit, wrong in zip(units, looks, strict=True) if wrong]
        if damaged := [unit.path for unit in found if out / unit.path in there]:
            print(f"{len(damaged)} are damaged: {', '.join(damaged[:3])} ...", file=sys.stderr)
        return found


def fault(picture: Path | io.BytesIO, unit: Unit, workflow: Workflow) -> str | None:
    """What is wrong with a picture, if anything is."""
    try:
        with Image.open(picture, formats=["PNG"]) as image:
            image.verify()  # the checksums, to the end of the file
            if "prompt" not in image.info:
                return "a picture without ComfyUI's metadata (is the server's off?)"
            is_own = workflow.asks_for(unit, json.loads(image.info["prompt"]))
    except (OSError, SyntaxError, ValueError, KeyError, TypeError) as error:
        return f"not a whole PNG of ComfyUI's ({error})"
    return None if is_own else "another picture than asked for"


def write(out: Path, path: str, content: bytes) -> None:
    """Write a file that is there as a whole or not at all."""
    (out / path).parent.mkdir(parents=True, exist_ok=True)
    partial = out / f"partial-{uuid.uuid4().hex}"
    partial.write_bytes(content)
    partial.replace(out / path)


def setting(gamma: float) -> str:
    """The folder of a setting."""
    return f"gamma_{str(float(gamma)).removesuffix('.0')}"


def read_category(file: Path, images: int | None = None, seed: int = FIRST_SEED) -> Category:
    """Read a prompt file: T2I-CompBench's ``.txt``, or the ``.jsonl`` of GenEval or GenEval 2."""
    try:
        lines = [line.strip() for line in file.read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise Problem(f"Cannot read the prompts in {file}: {error}") from error
    if not (lines := [line for line in lines if line]):
        raise Problem(f"{file} has no prompts.")
    is_geneval = file.suffix == ".jsonl"
    count = images or (GENEVAL_IMAGES if is_geneval else IMAGES)
    seeds = list(range(seed, seed + count))
    if is_geneval:
        try:
            metadata = [dict(json.loads(line)) for line in lines]
            if "vqa_list" in metadata[0]:
                pairs = [pair for entry in metadata for pair in entry["vqa_list"]]
                if not all(isinstance(a, str) and isinstance(b, str) for a, b in pairs):
                    raise TypeError("a question or an answer is no text")
                return Category(GENEVAL_2, [e["prompt"] for e in metadata], seeds, metadata)
            prompts, _ = zip(*((entry["prompt"], entry["tag"]) for entry in metadata), strict=True)
            return Category(GENEVAL, list(prompts), seeds, metadata)
        except (ValueError, KeyError, TypeError) as error:
            raise Problem(
                f"{file} is neither GenEval's evaluation_metadata.jsonl nor GenEval 2's data: "
                f"{error!r}"
            ) from error
    reserved = "_/" + ('<>:"\\|?*' if os.name == "nt" else "")
    for prompt in lines:  # the evaluators read it back from the pictures' names
        if wrong := sorted({c for c in prompt if c in reserved or not c.isprintable()}):
            raise Problem(f"{file}: a prompt, being a file's name, cannot have {wrong}: {prompt}")
        if len(f"{prompt}_{len(lines) * count - 1:06}.png".encode()) > 255:  # usual file systems
            raise Problem(f"{file}: too long for the name of a file: {prompt}")
    if (name := file.stem.removesuffix("_val")) in (GENEVAL, GENEVAL_2):
        raise Problem(f"{file}: this name is GenEval's own; call the file something else.")
    return Category(name, lines, seeds)
