"""The files that a text encoder was read from.

Core keeps no note of weights that a file lacks, and none of those that it does not use.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

SAFE = (".safetensors", ".sft")


def files_of(clip: Any) -> list[Path]:
    """The files of a CLIP; none if its loader does not tell them."""
    paths = (getattr(clip.patcher, "cached_patcher_init", None) or [None, [[]]])[1][0]
    return [Path(path) for path in ([paths] if isinstance(paths, str) else paths)]


def opened(clip: Any) -> Iterator[Any]:
    """Those of a CLIP's files that are safetensors, each open for reading."""
    for file in files_of(clip):
        if file.suffix in SAFE and file.is_file():
            with safe_open(file, framework="pt") as weights:
                yield weights
