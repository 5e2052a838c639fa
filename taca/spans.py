"""What the tokens of a joint sequence are."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

Kind = Literal["text", "image", "other"]


class Span(NamedTuple):
    """Consecutive tokens of one kind in a joint sequence."""

    kind: Kind  # "other" is neither text nor image, such as registers
    length: int
    is_query: bool = True  # False where a model has cached the keys of its text


Layout = Sequence[Span]
"""A whole joint sequence, in order."""


Group = tuple[bool, int, int]
"""Consecutive queries with the same keys: ``(is_image, start, length)``."""


def query_groups(layout: Layout) -> list[Group]:
    """All queries of a layout, in order."""
    groups: list[Group] = []
    end = 0
    for kind, length, is_query in layout:
        if not is_query or not length:
            continue
        is_image, start = kind == "image", end
        end += length
        if groups and groups[-1][0] == is_image:
            start = groups.pop()[1]
        groups.append((is_image, start, end - start))
    return groups


def num_tokens(layout: Layout) -> tuple[int, int]:
    """Numbers of queries and keys, which identify the joint attention."""
    num_queries = num_keys = 0
    for _, length, is_query in layout:
        num_queries += length if is_query else 0
        num_keys += length
    return num_queries, num_keys
