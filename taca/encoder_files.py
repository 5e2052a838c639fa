"""The files that a text encoder was read from.

Core records neither which weights a file lacks nor which of them it does not use.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

SAFE = (".safetensors", ".sft")


def files_of(clip: Any) -> list[Path]:
    """The files of a CLIP; none if its loader does not record them."""
    paths = (getattr(clip.patcher, "cached_patcher_init", None) or [None, [[]]])[1][0]
    return [Path(path) for path in ([paths] if isinstance(paths, str) else paths)]


def opened(clip: Any) -> Iterator[Any]:
    """The safetensors files of a CLIP, each open for reading."""
    for file in files_of(clip):
        if file.suffix in SAFE and file.is_file():
            with safe_open(file, framework="pt") as weights:
                yield weights
