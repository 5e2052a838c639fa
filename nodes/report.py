"""TACA Attention Report: what attention did in a run of the user's own graph."""

import copy
import math
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..taca.prompt_tokens import PromptTokens, find_words, text_of
from ..taca.report import Asked, Report, watched
from ..taca.weighted_text import read
from ..taca.words import WORDS_KEY, carrying, own_tokens
from .ui import pictures
from .ui.plots import COLOURS, Axes, round_up, ticks
from .ui.schema import schema
from .ui.text import show

TACAReport = io.Custom("TACA_REPORT")


class TACAAttentionReport(io.ComfyNode):
    """SamplerCustomAdvanced, and plots of what its attention did."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "TACAAttentionReport",
            inputs=[
                io.Noise.Input("noise"),
                io.Guider.Input("guider"),
                io.Sampler.Input("sampler"),
                io.Sigmas.Input("sigmas"),
                io.Latent.Input("latent_image"),
                io.String.Input("words", default="", placeholder="red circle, blue"),
                io.Clip.Input("clip", optional=True),
                io.String.Input("prompt", optional=True, force_input=True),
                io.Vae.Input("vae", optional=True),
            ],
            outputs=[
                io.Latent.Output("output"),
                io.Image.Output("shares"),
                io.Image.Output("heat_maps"),
                io.String.Output("summary"),
            ],
            search_aliases=["taca", "attention map", "heat map", "daam", "text attention share"],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        noise: Any,
        guider: Any,
        sampler: Any,
        sigmas: Tensor,
        latent_image: Any,
        words: str,
        clip: Any = None,
        prompt: str | None = None,
        vae: Any = None,
    ) -> io.NodeOutput:
        from comfy_extras.nodes_custom_sampler import SamplerCustomAdvanced as Core

        report = Report(partial(asked, words, clip, prompt))
        observed = copy.copy(guider)
        observed.model_patcher = watched(guider.model_patcher, report)
        output = Core.execute(noise, observed, sampler, sigmas, latent_image).result[0]
        decoded = None if vae is None else pictures.to_picture(vae.decode(output["samples"])[0])
        results, shown = drawn(report, decoded, cls)
        return io.NodeOutput(output, *results, ui=shown)


class TACAWatchAttention(io.ComfyNode):
    """A model whose runs are watched, in any sampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "TACAWatchAttention",
            inputs=[
                io.Model.Input("model"),
                io.String.Input("words", default="", placeholder="red circle, blue"),
                io.Clip.Input("clip", optional=True),
                io.String.Input("prompt", optional=True, force_input=True),
            ],
            outputs=[io.Model.Output(), TACAReport.Output("report")],
            search_aliases=["taca", "attention map", "heat map", "text attention share"],
        )

    @classmethod
    def execute(
        cls, model: Any, words: str, clip: Any = None, prompt: str | None = None
    ) -> io.NodeOutput:
        report = Report(partial(asked, words, clip, prompt))
        return io.NodeOutput(watched(model, report), report)


class TACAShowAttention(io.ComfyNode):
    """The report of a watched run, once its picture is there."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "TACAShowAttention",
            inputs=[TACAReport.Input("report"), io.Image.Input("images")],
            outputs=[
                io.Image.Output("shares"),
                io.Image.Output("heat_maps"),
                io.String.Output("summary"),
            ],
            search_aliases=["taca", "attention map", "heat map", "text attention share"],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, report: Report, images: Tensor) -> io.NodeOutput:
        results, shown = drawn(report, pictures.to_picture(images[0]), cls)
        return io.NodeOutput(*results, ui=shown)


def drawn(
    report: Report, decoded: Image.Image | None, node: Any
) -> tuple[tuple[Tensor, Tensor, str], dict[str, Any]]:
    """The outputs of a report (plots, heat maps, text), and the node's ``ui``.

    Raises RuntimeError if nothing was measured.
    """
    table = report.table()
    if not table.numel():
        raise RuntimeError(
            "TACA saw no joint attention to report: the watched model has not been sampled, "
            "another node or pack replaced its attention, a cache answered every call, or it is "
            "the second of Dual Model CFG Guider, which runs as the first: watch that one."
        )
    said, header, rows = summary(table)
    plots = plot(table, report.blocks)
    page = pictures.stack([plots, pictures.table(header, rows, plots.width)])
    (shares, maps), shown = show([page, heat_maps(report, decoded)], said, node)
    return (shares, maps, "\n".join([said, "", *map("   ".join, [header, *rows])])), shown


def asked(words: str, clip: Any, prompt: str | None, guider: Any) -> Asked:
    """The words of a prompt, or of a positive conditioning of the run that carries its own.

    If ``words`` is empty, the words with a weight are taken.

    Raises ValueError as ``find_words``.
    """
    positive = getattr(guider, "original_conds", {}).get("positive", ())
    own = [each for each in positive if WORDS_KEY in each]
    if clip is not None and prompt is not None:
        own = carrying(positive, read(clip, prompt).text)
        if not own:
            tokens = PromptTokens.of(clip, prompt)
            found = find_words(words, tokens)
            return Asked(found, len(tokens.table), partial(text_of, clip, prompt))
    if not own:
        return Asked(find_words(words, None))
    chosen, found = _carried(words, own)
    same = (each["uuid"] for each in own if each[WORDS_KEY] is chosen[WORDS_KEY])
    return Asked(found, len(own_tokens(chosen)), carrying=frozenset(same))


def _carried(words: str, entries: list[Any]) -> tuple[Any, Mapping[str, list[int]]]:
    """The first conditioning with all of these words, or with weights; and their tokens."""
    if not words.strip():
        chosen = next((each for each in entries if each[WORDS_KEY].has_weights), entries[0])
        return chosen, chosen[WORDS_KEY].weighed_tokens()
    for each in entries[:-1]:
        with suppress(ValueError):
            return each, find_words(words, each[WORDS_KEY].prompt)
    return entries[-1], find_words(words, entries[-1][WORDS_KEY].prompt)


def plot(table: Tensor, blocks: list[str]) -> Image.Image:
    """Shares over steps, averaged over blocks; and over blocks, in the first measured step."""
    picture = pictures.blank(760, 640)
    by_step = 100 * table.nanmean(2)
    first = int((~by_step[0].isnan()).nonzero()[0])
    steps = [str(i + 1) for i in range(table.shape[1])]
    title = "% of the image's attention that goes to text"
    for top, x_label, y_label, values, marks in (
        (80, "step", title, by_step, ticks(steps)),
        (370, "block", f"{title}, in step {first + 1}", 100 * table[:, first], ticks(blocks, 8)),
    ):
        high = round_up(values.nan_to_num(0).max().item())
        box = (70, top, 730, top + 210)
        axes = Axes(picture, box, (0.5, values.shape[1] + 0.5), (0.0, high))
        axes.frame(x_label, y_label, [0, high / 2, high], marks)
        for line, colour in zip(values.tolist(), reversed(COLOURS), strict=True):
            points = [(i, value) for i, value in enumerate(line, 1) if not math.isnan(value)]
            axes.line(points, colour, dots=True)
    font = pictures.font(16)
    axes.draw.text((70, 20), "without TACA", fill=COLOURS[1], font=font)
    axes.draw.text((210, 20), "as sampled", fill=COLOURS[0], font=font)
    return picture


def heat_maps(report: Report, decoded: Image.Image | None) -> Image.Image:
    """A picture for each word, brighter where the picture attends more to it."""
    if not report.maps:
        return pictures.sheet([pictures.blank(420, 8)], ["No words were chosen."], 1)
    drawn, labels = [], []
    for found, is_whole in report.word_maps():
        where = "" if is_whole else " in parts of the picture"
        for word, own in zip(report.asked.words, found, strict=True):
            seen = own.isfinite()
            low, high = own[seen].min(), own[seen].max()
            heat = pictures.heat(((own - low) / (high - low).clamp_min(1e-12)).nan_to_num(0))
            scale = max(1, 384 // max(heat.size))
            size = decoded.size if decoded else (heat.width * scale, heat.height * scale)
            heat = heat.resize(size, Image.Resampling.BILINEAR)
            if decoded:
                mask = Image.fromarray(153 * seen.byte().numpy()).resize(size)
                heat = Image.composite(heat, decoded, mask)
            drawn.append(heat)
            labels.append(f"{word}{where}: {100 * low:.3g} % to {100 * high:.3g} %")
    return pictures.sheet(drawn, labels, min(len(drawn), 2), "attention of each place to")


def summary(table: Tensor) -> tuple[str, list[str], list[list[str]]]:
    """The figures in a sentence, and as a header and rows of a table."""
    by_step = 100 * table.nanmean(2)
    seen = ~by_step[0].isnan()
    changed = by_step[:, seen & (table[0] != table[1]).any(1)]
    first = "TACA acts on no step of this run."
    if changed.numel():
        plain, taca = changed.mean(1).tolist()
        first = (
            f"Where TACA acts, text gets {taca:.2f} % of the image's attention instead of "
            f"{plain:.2f} %, {taca / max(plain, 1e-9):.2f} times as much."
        )
    rows = [
        [f"{i + 1:4}", f"{by_step[0, i]:10.2f} %", f"{by_step[1, i]:8.2f} %"]
        for i in seen.nonzero().flatten().tolist()
    ]
    return first, ["step", "without TACA", "as sampled"], rows
