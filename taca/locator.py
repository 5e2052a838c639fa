"""Where in a prompt the strings stand that ComfyUI hands to a tokenizer."""

import re
from collections.abc import Iterator, Sequence

MARK = "\ue000"  # a private-use character; as a prompt it shows the template around prompts

Places = Sequence[int | None]
"""The place in the prompt of each character of a string; None where it is of a template."""


class Locator:
    """Finds in a prompt the strings that a tokenizer was given, one after the other.

    A string is a piece of the prompt, or of the template with the prompt in it. Between two of them
    there can be ComfyUI's syntax: brackets, weights, names of embeddings, special tokens.
    """

    READ = re.compile(r"(?:[()\s\\]|:[^:()]*(?=\))|embedding:\S*|<[^<>\s]*>)*")

    def __init__(self, text: str, frame: str) -> None:
        before, _, after = frame.partition(MARK)
        own: Places = range(len(text))
        framed = [*[None] * len(before), *own, *[None] * len(after)]
        self.wholes = [(before + text + after, framed), (text, own), quoted(text)]
        self.cursors = [0] * len(self.wholes)

    def locate(self, string: str) -> list[int | None]:
        """For each character of a string its place in the prompt, or None."""
        wanted = _written(string)
        pattern = "".join(string[k] for k in wanted)
        for i, (whole, own) in enumerate(self.wholes):
            written = _written(whole)
            squeezed = "".join(whole[k] for k in written)
            for cursor in (self.cursors[i], 0):
                finds = _finds(squeezed, pattern)
                found = [w for w in finds if self._follows(whole, cursor, written[w])]
                if not found:
                    continue
                places: list[int | None] = [None] * len(string)
                for k, at in zip(wanted, written[found[0] :], strict=False):
                    places[k] = own[at]
                self.cursors[i] = written[found[0] + len(wanted) - 1] + 1
                return places
        return [None] * len(string)

    def _follows(self, whole: str, cursor: int, at: int) -> bool:
        if at < cursor:
            return False
        in_word = at > cursor and whole[at - 1].isalnum() and whole[at].isalnum()
        return not in_word and bool(self.READ.fullmatch(whole, cursor, at))


def quoted(text: str) -> tuple[str, Places]:
    """What ByT5 is handed of a prompt: the texts in quotation marks, each in a sentence."""
    whole, places = "", list[int | None]()
    for opening, closing in ('""', "\u2018\u2019", "\u201c\u201d"):
        for each in re.finditer(f"{opening}(.*?){closing}", text):
            whole += f'Text "{each[1]}". '
            places += [*[None] * 6, *range(*each.span(1)), *[None] * 3]
    return whole, places


def _written(text: str) -> list[int]:
    """Indices of all characters but white space and backslashes before brackets."""
    return [
        i
        for i, c in enumerate(text)
        if not (c.isspace() or (c == "\\" and text[i + 1 : i + 2] in ("(", ")")))
    ]


def _finds(text: str, piece: str) -> Iterator[int]:
    at = text.find(piece) if piece else -1
    while at >= 0:
        yield at
        at = text.find(piece, at + 1)
