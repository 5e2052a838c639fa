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


def check_num_text(layout: Layout, count: int) -> None:
    """Raise ValueError if a sequence has other text tokens than the ``count`` that are known."""
    num_text = sum(length for kind, length, _ in layout if kind == "text")
    if num_text != count:
        raise ValueError(
            f"TACA: this attention has {num_text} text tokens, and of {count} it is known what "
            f"they are: another node adds tokens to the text, as USO Style Reference does, or "
            f"takes some away. Take out that node, or what asks for single tokens: word weights, "
            f"the words of a report, prompt and prompt_only of TACA Options."
        )


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
