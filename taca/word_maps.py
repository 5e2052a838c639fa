"""Where a call's latents lie in the picture, and the maps of several calls put together."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

Place = tuple[tuple[int, ...], ...]
"""The rows and the columns of the run's latents that a call has."""


def place_of(
    latent: Sequence[int],
    whole: Sequence[int],
    window: Any,
    areas: Collection[Sequence[int] | None],
) -> Place | None:
    """Where latents of shape ``latent`` lie in the run's, of shape ``whole``.

    ``window`` is ComfyUI's context window of the call, or None; ``areas`` the area of the row's
    conditioning, ``(sizes, offsets)``, or of each that it may be. None if the place is not known,
    as of another pack's tiles.
    """
    sides: list[Sequence[int]] = [range(n) for n in whole[-2:]]
    axis = getattr(window, "dim", 0) - len(whole)
    if window is not None and axis >= -2:
        every = torch.arange(whole[axis])[None]
        sides[axis] = window.get_tensor(every, "cpu", dim=1)[0].tolist()
    found = set()
    for area in areas:
        half = len(area or ()) // 2
        lengths, starts = (area[:half][-2:], area[half:][-2:]) if area else (whole[-2:], (0, 0))
        parts = zip(sides, starts, lengths, strict=True)
        found.add(tuple(tuple(side[start:][:length]) for side, start, length in parts))
    place = found.pop() if len(found) == 1 else ()
    return place if [len(side) for side in place] == [*latent[-2:]] else None


def joined(maps: Sequence[tuple[Tensor, Place]], whole: Sequence[int]) -> Tensor:
    """Maps ``(words, rows, columns)``, each with its place, as one of the whole picture.

    Each place has the mean of the maps that show it, and NaN if none does.
    """
    groups: dict[tuple[Place, torch.Size], list[Tensor]] = {}
    for each, place in maps:
        groups.setdefault((place, each.shape), []).append(each)
    cells = [
        min(-(-len(place[i]) // shape[i + 1]) for place, shape in groups) for i in range(2)
    ]  # of the finest map, in latents
    sides = [-(-n // cell) for n, cell in zip(whole[-2:], cells, strict=True)]
    total, count = torch.zeros(*sides, len(maps[0][0])), torch.zeros(*sides, 1)
    for (place, _), own in groups.items():
        rows, columns = (
            torch.tensor(side[::cell]) // cell for side, cell in zip(place, cells, strict=True)
        )
        mean = torch.stack(own).mean(0)[None]
        size = len(rows), len(columns)
        mean = torch.nn.functional.interpolate(mean, size, mode="nearest-exact")[0]
        at = rows[:, None], columns
        total.index_put_(at, len(own) * mean.permute(1, 2, 0), accumulate=True)
        count.index_put_(at, torch.full((*size, 1), float(len(own))), accumulate=True)
    return (total / count).permute(2, 0, 1)
