"""TACA Prompt Check: IMAGE and text -> how likely it is that the picture shows the text."""

from statistics import fmean
from typing import Any, TypeVar

from comfy.utils import ProgressBar
from comfy_api.latest import io
from torch import Tensor

from ..taca.judge import QUESTION, Judge, geometric_mean
from .sweep import lines
from .ui.grades import Graded, page_of
from .ui.pictures import in_rgb, require_pictures
from .ui.schema import schema
from .ui.text import show

WHOLE = "the whole text"
T = TypeVar("T")


class TACAPromptCheck(io.ComfyNode):
    """How likely it is that pictures show what their prompts say, by a text encoder that sees."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "TACAPromptCheck",
            inputs=[
                io.Image.Input("image"),
                io.String.Input("text", default="", multiline=True),
                io.Clip.Input("clip"),
                io.String.Input(
                    "phrases", default="", multiline=True, placeholder="two cats\na red ball"
                ),
                io.Boolean.Input("find_phrases", default=False),
                io.String.Input("label", optional=True, force_input=True),
            ],
            outputs=[
                io.Float.Output("score", is_output_list=True),
                io.String.Output("label", is_output_list=True),
                io.Image.Output("table"),
            ],
            search_aliases=[
                "taca",
                "vqascore",
                "vlm judge",
                "vision language model",
                "image text score",
            ],
            is_input_list=True,
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        image: list[Tensor],
        text: list[str],
        clip: list[Any],
        phrases: list[str],
        find_phrases: list[bool],
        label: list[str] | None = None,
    ) -> io.NodeOutput:
        require_pictures("TACA Prompt Check", image)
        count = len(image)
        texts, own = spread("text", text, count), spread("phrases", phrases, count)
        labels = spread("label", label or [""], count)
        if not all(each.strip() for each in texts):
            raise ValueError("TACA Prompt Check has no text to ask the picture for.")
        judge = Judge(clip[0])
        found = {each: judge.phrases(each) if find_phrases[0] else [] for each in {*texts}}
        atoms = [
            tuple(dict.fromkeys([each.strip(), *lines(some), *found[each]]))
            for each, some in zip(texts, own, strict=True)
        ]
        judge.load()
        bar = ProgressBar(sum(len(a) * len(batch) for a, batch in zip(atoms, image, strict=True)))
        tables: dict[tuple[str, ...], Graded] = {}
        scores, summaries = [], []
        for batch, some, name in zip(image, atoms, labels, strict=True):
            table = tables.setdefault(some, Graded(some[0], [WHOLE, *some[1:]]))
            questions = [QUESTION.format(atom) for atom in some]
            each = []
            for picture in batch:
                answers = judge.ask(in_rgb(picture[None]), questions, lambda: bar.update(1))
                each.append(geometric_mean(answers))
                table.add(name, answers, each[-1])
            scores.append(fmean(each))
            shown = f"check {scores[-1]:.3f}"
            if len(each) > 1:
                shown += f" ({min(each):.3f} to {max(each):.3f})"
            summaries.append(f"{name}: {shown}" if name else shown)
        summary = summaries[0]
        if count > 1:
            best = summaries[scores.index(max(scores))]
            summary = f"{count} pictures, {min(scores):.3f} to {max(scores):.3f}; best: {best}"
        yes, no = (", ".join(map(repr, some)) for some in judge.words)
        note = f"P(yes) by {judge.family.name}, of the answer's first token: {yes} against {no}"
        [page], drawn = show([page_of(list(tables.values()), note)], summary, cls)
        return io.NodeOutput(scores, summaries, page, ui=drawn)


def spread(name: str, values: list[T], count: int) -> list[T]:
    """One value for each picture, from as many or one for all.

    Raises ValueError for any other number of values.
    """
    if len(values) not in (1, count):
        raise ValueError(
            f"TACA Prompt Check has {count} pictures and {len(values)} of {name}: connect "
            f"both from the same list, such as TACA Sweep's."
        )
    return values * count if len(values) == 1 else values
