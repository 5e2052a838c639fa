"""Ranges of blocks, as users write them."""

import re


def parse_blocks(text: str, lists: dict[str, int]) -> list[tuple[str, int]]:
    """The blocks that a text such as ``"double 0-9, single"`` names; all if it is empty.

    ``lists`` has the length of each list of blocks by its name, ``{"double_blocks": 19}``. Returns
    pairs of a list's name and an index.

    Raises ValueError if the text cannot be read, or the model has no such blocks; it lists those
    that the model has.
    """
    if not text.strip():
        return [(name, i) for name, count in lists.items() for i in range(count)]
    known = ", ".join(f"{short(name)} 0-{count - 1}" for name, count in lists.items() if count)
    chosen: set[tuple[str, int]] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([a-z_]+)\s*(?:(\d+)\s*(?:-\s*(\d+))?)?\s*", part.lower())
        if not match:
            raise ValueError(
                f"TACA Options cannot read the blocks {part.strip()!r}. Write them like this: "
                f"'double 0-9, single 0-18'. This model has {known}."
            )
        word, first, last = match.groups()
        name = next((n for n in lists if word in (n, short(n))), None)
        if name is None:
            raise ValueError(f"TACA Options: this model has no {word!r} blocks; it has {known}.")
        low = int(first) if first else 0
        high = int(last) if last else low if first else lists[name] - 1
        if not low <= high < lists[name]:
            raise ValueError(
                f"TACA Options: {part.strip()!r} is not within this model's blocks, {known}. A "
                f"cache may have put all blocks into one."
            )
        chosen |= {(name, i) for i in range(low, high + 1)}
    return [(name, i) for name in lists for i in range(lists[name]) if (name, i) in chosen]


def short(name: str) -> str:
    """``double`` for ``double_blocks``, ``layers`` for ``language_model.layers``."""
    return name.rpartition(".")[2].partition("_")[0]
