"""What a run draws: the prompts, the settings, and where each picture lies.

T2I-CompBench reads ``<setting>/<category>/samples/<prompt>_<NNNNNN>.png``: one counter over the
category, one underscore in the name, nothing else in the folder. GenEval reads
``<setting>/geneval/<NNNNN>/metadata.jsonl`` and ``.../samples/<NNNN>.png``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FIRST_SEED = 42
IMAGES = {"t2i": 10, "geneval": 4}
"""Pictures per prompt, in the protocols of T2I-CompBench and GenEval."""
GENEVAL = "geneval"
_LONGEST_NAME = 255  # bytes, on the usual file systems
_NOT_ON_WINDOWS = set('<>:"\\|?*')


class Problem(Exception):
    """What keeps a run from its result, in words that name the way out."""


@dataclass(frozen=True)
class Unit:
    """One picture.

    Attributes
    ----------
    path : str
        Of the picture in the output folder, with ``/``.
    """

    path: str
    prompt: str
    seed: int
    gamma: float


@dataclass(frozen=True)
class Category:
    """The prompts of one file.

    Attributes
    ----------
    metadata : tuple of dict, optional
        GenEval's, one for each prompt.
    """

    name: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    metadata: tuple[dict[str, Any], ...] | None = None

    def folder(self, gamma: float) -> str:
        """Where this category lies in the output folder, at one setting."""
        return f"{setting(gamma)}/{self.name}"

    def units(self, index: int, gamma: float) -> Iterator[Unit]:
        """The pictures of one prompt, one for each seed."""
        prompt = self.prompts[index]
        for i, seed in enumerate(self.seeds):
            if self.metadata:
                file = f"{index:05}/samples/{i:04}.png"
            else:
                file = f"samples/{prompt}_{index * len(self.seeds) + i:06}.png"
            yield Unit(f"{self.folder(gamma)}/{file}", prompt, seed, gamma)


@dataclass(frozen=True)
class Plan:
    """All that a run's pictures depend on; its JSON says whether two runs are the same.

    Attributes
    ----------
    workflow : dict
        `workflow.Workflow`, as JSON.
    """

    workflow: dict[str, Any]
    gammas: tuple[float, ...]
    categories: tuple[Category, ...]

    def groups(self) -> Iterator[list[Unit]]:
        """The units by prompt: a server that draws a group encodes its text once."""
        for category in self.categories:
            for index in range(len(category.prompts)):
                yield [unit for gamma in self.gammas for unit in category.units(index, gamma)]

    def units(self) -> list[Unit]:
        """All of them."""
        return [unit for group in self.groups() for unit in group]

    def json(self) -> dict[str, Any]:
        """Everything, as it comes back from a file."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def read(cls, file: Path) -> Plan:
        """The plan of an earlier run."""
        known = json.loads(file.read_text("utf-8"))
        categories = []
        for category in known["categories"]:
            metadata = category.pop("metadata")
            lists = {key: tuple(category[key]) for key in ("prompts", "seeds")}
            categories.append(
                Category(category["name"], **lists, metadata=tuple(metadata) if metadata else None)
            )
        return cls(known["workflow"], tuple(known["gammas"]), tuple(categories))

    def differences(self, other: Plan) -> list[str]:
        """In what two runs differ, in words."""
        found = [name for name in ("workflow", "gammas") if self.json()[name] != other.json()[name]]
        names = [[c.name for c in plan.categories] for plan in (self, other)]
        if names[0] != names[1]:
            return [*found, "prompt files"]
        for mine, theirs in zip(self.categories, other.categories, strict=True):
            if (mine.prompts, mine.metadata) != (theirs.prompts, theirs.metadata):
                found.append(f"prompts of {mine.name}")
            if mine.seeds != theirs.seeds:
                found.append(f"seeds of {mine.name}")
        return found


def setting(gamma: float) -> str:
    """The folder of a setting."""
    return f"gamma_{str(float(gamma)).removesuffix('.0')}"


def read_category(file: Path, images: int | None = None, seed: int = FIRST_SEED) -> Category:
    """Read a prompt file: T2I-CompBench's ``.txt``, or GenEval's ``.jsonl``.

    Parameters
    ----------
    file : Path
        Its name is the category's: ``color_val.txt`` is ``color``.
    images : int, optional
        Pictures per prompt; by default the protocol's.
    seed : int
        Of each prompt's first picture; the next ones count up.

    Raises
    ------
    Problem
        If it cannot be read, or its prompts cannot be file names.
    """
    try:
        lines = [line.strip() for line in file.read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise Problem(f"Cannot read the prompts in {file}: {error}") from error
    lines = [line for line in lines if line]
    if not lines:
        raise Problem(f"{file} has no prompts.")
    is_geneval = file.suffix == ".jsonl"
    count = images or IMAGES["geneval" if is_geneval else "t2i"]
    seeds = tuple(range(seed, seed + count))
    if is_geneval:
        metadata = tuple(_metadata(line, file) for line in lines)
        return Category(GENEVAL, tuple(m["prompt"] for m in metadata), seeds, metadata)
    last = f"_{len(lines) * count - 1:06}.png"
    for prompt in lines:
        _check_name(prompt, prompt + last, file)
    name = file.stem.removesuffix("_val")
    if name == GENEVAL:
        raise Problem(f"{file}: this name is GenEval's own; call the file something else.")
    return Category(name, tuple(lines), seeds)


def _metadata(line: str, file: Path) -> dict[str, Any]:
    try:
        metadata = json.loads(line)
        if isinstance(metadata["prompt"], str) and isinstance(metadata["tag"], str):
            return metadata
    except (json.JSONDecodeError, KeyError, TypeError):
        pass
    raise Problem(f"{file}: not a line of GenEval's evaluation_metadata.jsonl: {line[:80]}")


def _check_name(prompt: str, name: str, file: Path) -> None:
    """Refuse a prompt that the evaluators would not read back from the file's name."""
    wrong = {c for c in prompt if c in "_/" or not c.isprintable()}
    if os.name == "nt":
        wrong |= _NOT_ON_WINDOWS & set(prompt)
    if wrong:
        raise Problem(
            f"{file}: the pictures' names hold the prompt, which therefore cannot have "
            f"{' '.join(map(repr, sorted(wrong)))}: {prompt}"
        )
    if len(name.encode()) > _LONGEST_NAME:
        raise Problem(f"{file}: too long for the name of a file: {prompt}")
