"""The output folder: what is in it is complete, and what was drawn is never lost or drawn twice.

Each picture is written to ``partial/`` and flushed to the disk, then named in ``manifest.jsonl``,
then renamed to its place. Whatever moment a run is killed at, the manifest's lines are the pictures
that exist: the next run renames what was not, and draws the rest. A picture that was lost or
damaged since loses its line, and is drawn again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from .plan import Plan, Problem, Unit

RUN, MANIFEST, PARTIAL, LOCK = "run.json", "manifest.jsonl", "partial", ".lock"
_NEW = ".lock.new"  # the run's file before it has its name
_PNG_END = b"IEND\xaeB`\x82"


class NotThePicture(Exception):
    """What a server sent is not the picture asked for."""


class Store:
    """An output folder that this process holds; use `opened`.

    Attributes
    ----------
    done : dict
        Path of each picture that exists -> its line of the manifest.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._writing = threading.Lock()
        self.done: dict[str, dict[str, Any]] = {}
        self.size: list[int] | None = None

    def add(self, unit: Unit, picture: bytes, server: str, seconds: float) -> None:
        """Keep a picture.

        Raises
        ------
        NotThePicture
            If it cannot be read, or is of another size than the others.
        """
        size = size_of(picture)
        with self._writing:
            if size != (self.size or size):
                raise NotThePicture(f"a picture of {size[0]} x {size[1]} among {self.size}")
            line = {
                "image": unit.path,
                "bytes": len(picture),
                "size": size,
                "sha256": hashlib.sha256(picture).hexdigest(),
                "server": server,
                "seconds": round(seconds, 3),
            }
            part = self._part(unit.path)
            _write(part, picture)
            _append(self._out / MANIFEST, line)
            self._place(part, unit.path)
            self.done[unit.path], self.size = line, size

    def _part(self, path: str) -> Path:
        return self._out / PARTIAL / f"{hashlib.sha256(path.encode()).hexdigest()}.png"

    def _place(self, part: Path, path: str) -> None:
        place = self._out / path
        place.parent.mkdir(parents=True, exist_ok=True)
        part.replace(place)

    def recover(self, plan: Plan) -> None:
        """Find what exists, whole, and finish what a killed run had begun."""
        planned = {unit.path for unit in plan.units()}
        there = _pictures(self._out, plan)
        _mend(self._out / MANIFEST)
        lines = list(_lines(self._out / MANIFEST))
        for line in lines:
            path, part = line["image"], self._part(line["image"])
            if path not in planned:
                raise Problem(f"{self._out / MANIFEST} names a picture of another run: {path}")
            if path not in there and part.exists() and _is_whole(part, line):
                self._place(part, path)
                there.add(path)
        if strange := sorted(there - {line["image"] for line in lines}):
            raise Problem(
                f"{len(strange)} files in {self._out} are not this run's pictures; move them "
                f"away: {', '.join(strange[:3])} ..."
            )
        present = [line for line in lines if line["image"] in there]
        for line, is_same in zip(present, self._are_same(present), strict=True):
            if is_same:
                self.done[line["image"]], self.size = line, line["size"]
        if again := [line["image"] for line in lines if line["image"] not in self.done]:
            print(
                f"{len(again)} pictures are missing or damaged, and are drawn again: "
                f"{', '.join(again[:3])} ...",
                file=sys.stderr,
            )
            for path in again:  # first: one that has no line would be strange
                (self._out / path).unlink(missing_ok=True)
            kept = b"".join(map(_line, self.done.values()))
            _write(self._out / PARTIAL / MANIFEST, kept)
            (self._out / PARTIAL / MANIFEST).replace(self._out / MANIFEST)
        for left in (self._out / PARTIAL).iterdir():
            left.unlink()

    def _are_same(self, lines: list[dict[str, Any]]) -> list[bool]:
        """Whether each picture is what its line says; hashing leaves Python to other threads."""
        with ThreadPoolExecutor() as pool:
            looks = pool.map(lambda line: _is_same(self._out / line["image"], line), lines)
            pause = 0.5 if sys.stderr.isatty() else 30
            return list(tqdm(looks, "looking", len(lines), False, mininterval=pause, delay=2))


@contextmanager
def opened(out: Path, plan: Plan) -> Iterator[Store]:
    """Hold an output folder, new or of the same run, for the length of this context.

    Raises
    ------
    Problem
        If another run's pictures are in it, or another process is at work on it.
    """
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / LOCK, timeout=0):
            run = out / RUN
            if run.exists():
                if differences := Plan.read(run).differences(plan):
                    raise Problem(
                        f"{out} holds a run with other {', '.join(differences)}: pictures "
                        f"of two runs are not mixed. Name another folder."
                    )
            elif strange := [f.name for f in out.iterdir() if f.name not in (LOCK, _NEW)]:
                raise Problem(
                    f"{out} is not empty and holds no run ({strange[0]}): name a new folder."
                )
            else:
                _write(out / _NEW, json.dumps(plan.json(), indent=1).encode())
                (out / _NEW).replace(run)
            (out / PARTIAL).mkdir(exist_ok=True)
            _prepare(out, plan)
            store = Store(out)
            store.recover(plan)
            yield store
    except Timeout:
        raise Problem(f"Another process is at work on {out}.") from None


def known(out: Path) -> Plan:
    """The plan of the run in a folder."""
    try:
        return Plan.read(out / RUN)
    except (OSError, ValueError, KeyError) as error:
        raise Problem(f"{out} holds no run: {error}") from error


def size_in(out: Path) -> list[int] | None:
    """Width and height of a run's pictures; None if there is none."""
    return next((line["size"] for line in _lines(out / MANIFEST)), None)


def check(out: Path) -> int:
    """Open every picture of a complete run; how many there are.

    Raises
    ------
    Problem
        If one is missing, damaged, or not the one that was drawn.
    """
    plan = known(out)
    lines = {line["image"]: line for line in _lines(out / MANIFEST)}
    wrong = [
        unit.path
        for unit in plan.units()
        if unit.path not in lines or not _is_whole(out / unit.path, lines[unit.path])
    ]
    if wrong:
        raise Problem(
            f"{len(wrong)} of {len(plan.units())} pictures are missing or damaged: "
            f"{', '.join(wrong[:3])} ... The command that drew them draws these again."
        )
    if strange := _pictures(out, plan) - lines.keys():
        raise Problem(f"Files that are not this run's: {', '.join(sorted(strange)[:3])} ...")
    return len(lines)


def size_of(picture: bytes) -> list[int]:
    """Width and height of a PNG, all of which is read.

    Raises
    ------
    NotThePicture
        If it is not one.
    """
    if not picture.endswith(_PNG_END):  # Pillow reads a picture without it
        raise NotThePicture("not a whole PNG")
    try:
        with Image.open(io.BytesIO(picture), formats=["PNG"]) as image:
            image.load()
            return list(image.size)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise NotThePicture(f"not a whole PNG ({error})") from error


def _prepare(out: Path, plan: Plan) -> None:
    """The folders, and GenEval's metadata."""
    for gamma in plan.gammas:
        for category in plan.categories:
            folder = out / category.folder(gamma)
            if not category.metadata:
                (folder / "samples").mkdir(parents=True, exist_ok=True)
            for i, metadata in enumerate(category.metadata or ()):
                (folder / f"{i:05}" / "samples").mkdir(parents=True, exist_ok=True)
                text = json.dumps(metadata)
                file = folder / f"{i:05}" / "metadata.jsonl"
                if not file.exists() or file.read_text("utf-8") != text:
                    file.write_text(text, "utf-8")


def _pictures(out: Path, plan: Plan) -> set[str]:
    """Paths of all files in the folders of samples."""
    folders = {unit.path.rpartition("/")[0] for unit in plan.units()}
    return {
        f"{folder}/{file.name}"
        for folder in folders
        if (out / folder).is_dir()
        for file in os.scandir(out / folder)
    }


def _is_same(file: Path, line: dict[str, Any]) -> bool:
    """Whether a file has the bytes of that line of the manifest."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest() == line["sha256"]
    except OSError:
        return False


def _is_whole(file: Path, line: dict[str, Any]) -> bool:
    """Whether a file is the picture of that line of the manifest."""
    try:
        return _is_same(file, line) and size_of(file.read_bytes()) == line["size"]
    except (OSError, NotThePicture):
        return False


def _mend(manifest: Path) -> None:
    """Take out a last line that a kill cut short: its picture was not in its place yet."""
    if manifest.exists():
        content = manifest.read_bytes()
        os.truncate(manifest, content.rfind(b"\n") + 1)


def _lines(manifest: Path) -> Iterable[dict[str, Any]]:
    """The manifest's whole lines."""
    if not manifest.exists():
        return []
    content = manifest.read_bytes()
    try:
        return [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]
    except ValueError as error:
        raise Problem(f"{manifest} is damaged ({error}): draw into a new folder.") from error


def _line(line: dict[str, Any]) -> bytes:
    return json.dumps(line).encode() + b"\n"


def _append(file: Path, line: dict[str, Any]) -> None:
    with file.open("ab") as stream:
        stream.write(_line(line))
        stream.flush()
        os.fsync(stream.fileno())


def _write(file: Path, content: bytes) -> None:
    """Write a file that is on the disk when this returns."""
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    if os.name != "nt":  # its name too
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
