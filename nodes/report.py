"""TACA Attention Report: a run of the user's own, and what attention did in it."""

from __future__ import annotations

import copy
from typing import Any

from comfy_api.latest import io, ui
from PIL import Image
from torch import Tensor

from ..taca.options import find_words, without_ends
from ..taca.report import Report, watched
from . import drawing
from .options import tokens_of
from .preview import say


class TACAAttentionReport(io.ComfyNode):
    """SamplerCustomAdvanced, and plots of what its attention did."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TACAAttentionReport",
            display_name="TACA Attention Report",
            category="TACA",
            description=(
                "Samples as SamplerCustomAdvanced does, and shows how much of the image's "
                "attention goes to the text in every step and block, without TACA and with it; "
                "and, for words you choose, where in the picture they are looked at."
            ),
            search_aliases=["taca", "attention map", "heat map", "daam", "text attention share"],
            inputs=[
                io.Noise.Input("noise", tooltip="As for SamplerCustomAdvanced."),
                io.Guider.Input("guider", tooltip="Its model has TACA, or has not."),
                io.Sampler.Input("sampler", tooltip="As for SamplerCustomAdvanced."),
                io.Sigmas.Input("sigmas", tooltip="As for SamplerCustomAdvanced."),
                io.Latent.Input("latent_image", tooltip="As for SamplerCustomAdvanced."),
                io.String.Input(
                    "words",
                    default="",
                    tooltip=(
                        "Words of the prompt for heat maps, with commas between, such as 'red "
                        "circle, blue'. They need clip and prompt; without those, give the numbers "
                        "of the text tokens: 'circle=2, red=4-5'."
                    ),
                ),
                io.Clip.Input("clip", optional=True, tooltip="To find the words in the prompt."),
                io.String.Input(
                    "prompt",
                    optional=True,
                    force_input=True,
                    tooltip="The text of the positive prompt, the very one that is encoded.",
                ),
                io.Vae.Input(
                    "vae", optional=True, tooltip="Puts the heat maps over the decoded picture."
                ),
            ],
            outputs=[
                io.Latent.Output("output", tooltip="What SamplerCustomAdvanced would give."),
                io.Image.Output("shares", tooltip="Share of attention on text, to save."),
                io.Image.Output("heat_maps", tooltip="A sheet of heat maps, one a word, to save."),
                io.String.Output("summary", tooltip="The figures in words."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, noise: Any, guider: Any, sampler: Any, sigmas: Tensor, latent_image: Any,
                words: str, clip: Any = None, prompt: str | None = None,
                vae: Any = None) -> io.NodeOutput:  # fmt: skip
        from comfy_extras.nodes_custom_sampler import SamplerCustomAdvanced

        report = Report(words_of(words, clip, prompt))
        observed = copy.copy(guider)
        observed.model_patcher = watched(guider.model_patcher, report)
        observed.model_options = observed.model_patcher.model_options
        output = SamplerCustomAdvanced.execute(
            noise, observed, sampler, sigmas, latent_image
        ).result[0]  # fmt: skip
        table = report.table()
        if not table.numel():
            raise RuntimeError(
                "TACA Attention Report saw no joint attention in this run: another node or pack "
                "probably replaced this model's attention, or a cache answered every call."
            )
        decoded = None if vae is None else drawing.to_picture(vae.decode(output["samples"])[0])
        shares = plot(table, report.blocks)
        maps = heat_maps(report, decoded)
        text = summary(table, report)
        images = [drawing.to_tensor(picture) for picture in (shares, maps)]
        say(text)
        both = drawing.to_tensor(drawing.stack([shares, maps]))
        shown = ui.PreviewImage(both, cls=cls).as_dict()
        shown |= ui.PreviewText(text).as_dict()
        return io.NodeOutput(output, *images, text, ui=shown)


def words_of(words: str, clip: Any, prompt: str | None) -> dict[str, list[int]]:
    """The text tokens of the chosen words."""
    if clip is None or prompt is None:
        return find_words(words, [], None)

    def tokenize(text: str) -> list[list[list[int]]]:
        return [[without_ends(ids) for ids in part] for part in tokens_of(clip, text)]

    return find_words(words, tokens_of(clip, prompt), tokenize)


def plot(table: Tensor, blocks: list[str]) -> Image.Image:
    """Shares over the steps, averaged over blocks; and over the blocks, in the first step seen."""
    picture = Image.new("RGB", (760, 640), drawing.PAPER)
    by_step = 100 * table.nanmean(2)
    seen = [i for i in range(by_step.shape[1]) if not bool(by_step[0, i].isnan())]
    by_block = 100 * table[:, seen[0]]
    steps = [str(i + 1) for i in range(table.shape[1])]
    for box, values, x_label, marks in (
        ((70, 80, 730, 290), by_step, "step", drawing.ticks(steps)),
        ((70, 370, 730, 590), by_block, "block", drawing.ticks(blocks, 8)),
    ):
        top = drawing.round_up(values.nan_to_num(0).max().item())
        axes = drawing.Axes(picture, box, (0.5, values.shape[1] + 0.5), (0.0, top))
        title = "% of the image's attention that goes to text"
        if x_label == "block":
            title += f", by block, in step {seen[0] + 1}"
        axes.frame(x_label, title, [0, top / 2, top], marks)
        for which, colour in enumerate(reversed(drawing.COLOURS[:2])):
            line = list(enumerate(values[which].tolist(), 1))
            axes.line([point for point in line if point[1] == point[1]], colour, dots=True)
    for which, name in enumerate(("without TACA", "as sampled")):
        axes.draw.text((70 + 140 * which, 20), name, fill=drawing.COLOURS[1 - which],
                       font=drawing.font(16))  # fmt: skip
    return picture


def heat_maps(report: Report, decoded: Image.Image | None) -> Image.Image:
    """A picture for each word, brighter where it is looked at more."""
    if report.maps is None:
        note = Image.new("RGB", (420, 60), drawing.PAPER)
        drawing.ImageDraw.Draw(note).text(
            (12, 20), "No words were chosen.", fill=drawing.INK, font=drawing.font(16)
        )
        return note
    maps = report.maps / report.calls
    pictures, labels = [], []
    for word, own in zip(report.words, maps, strict=True):
        low, high = own.min(), own.max()
        heat = drawing.heat((own - low) / (high - low).clamp_min(1e-12))
        scale = max(1, 384 // max(heat.size))
        size = decoded.size if decoded else (heat.width * scale, heat.height * scale)
        heat = heat.resize(size, Image.Resampling.BILINEAR)
        pictures.append(Image.blend(decoded, heat, 0.6) if decoded else heat)
        labels.append(f"{word}: {100 * low:.3g} to {100 * high:.3g} %")
    return drawing.sheet(pictures, labels, min(len(pictures), 2), "attention of each place to")


def summary(table: Tensor, report: Report) -> str:
    """The figures in words."""
    by_step = 100 * table.nanmean(2)
    lines = ["step   without TACA   as sampled"]
    for i in range(by_step.shape[1]):
        if not bool(by_step[0, i].isnan()):
            lines.append(f"{i + 1:4}   {by_step[0, i]:9.2f} %   {by_step[1, i]:8.2f} %")
    changed = by_step[:, (table[0] != table[1]).any(1) & ~by_step[0].isnan()]
    if changed.numel():
        plain, taca = changed.mean(1).tolist()
        lines.insert(
            0,
            f"Where TACA acts, text gets {taca:.2f} % of the image's attention instead of "
            f"{plain:.2f} %, {taca / max(plain, 1e-9):.2f} times as much.\n",
        )
    else:
        lines.insert(0, "TACA acts on no step of this run.\n")
    return "\n".join(lines)


NODES = [TACAAttentionReport]
