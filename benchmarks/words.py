"""Do word weights do what they say? Pictures of the demo's two models, judged by its checker.

``python dev.py run benchmarks/words.py`` draws held-out captions at CFG 1 with the same noise for
every weight, through TACA Text Encode and ComfyUI's sampler, and writes ``results/words.json``, a
plot and the table of docs/words.md. What is in the results is not drawn again.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from reporting import (
    DEMO,
    JUDGED,
    RESULTS,
    ROOT,
    SHARED,
    digits,
    interval,
    judge_missing,
    markdown,
    outcomes,
    subplots,
    write_between,
)

sys.path += SHARED

import world
from comfyui import load_pack, parts  # also ComfyUI's own set-up
from subject import Subject

import nodes

RECORD = RESULTS / "words.json"
PAGE = ROOT / "docs" / "words.md"
CODEC = DEMO / "taca_demo"
MODELS = {
    "clean": DEMO / "models" / "taca_demo",
    "suppressed": DEMO / "models" / "taca_demo_suppressed",
}
KINDS = {"colour": world.COLOURS, "shape": world.SHAPES}
WEIGHTS = (-2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 4.0)


class Setting(NamedTuple):
    """What is weighed, how, and by how much."""

    what: str  # "colour" or "shape": both such words of the caption
    how: str  # "attention" by TACA, "embedding" by ComfyUI, what to avoid, or "contradicting"
    weight: float


SETTINGS = [
    *(Setting("colour", "attention", weight) for weight in WEIGHTS),
    *(Setting("shape", "attention", weight) for weight in (-1.0, 0.0, 0.5, 2.0, 4.0)),
    *(Setting("colour", "avoid", weight) for weight in (0.5, 1.0, 2.0, 4.0)),
    *(Setting("colour", "avoid another", weight) for weight in (2.0, 4.0)),
    *(Setting("colour", "embedding", weight) for weight in (0.0, 2.0, 4.0)),
    *(Setting("colour", "contradicting", weight) for weight in WEIGHTS),
]


class Weighing(Subject):
    """A model of the demo's world, whose captions weigh."""

    def condition(self, captions: list[str]) -> list[Any]:
        """As ``Subject.condition``, of captions that tell how they weigh: ``setting|caption``."""
        conditionings = [self._weighed(*caption.split("|")) for caption in captions if caption]
        if not conditionings:
            return super().condition(captions)
        text = torch.cat([tensor for ((tensor, _),) in conditionings])
        extras = conditionings[0][0][1]
        pooled = torch.zeros(len(captions), 1)
        return [[text, {**extras, "pooled_output": pooled}]]

    def _weighed(self, setting: str, caption: str) -> list[Any]:
        what, how, weight = Setting(*json.loads(setting))
        of = "|".join(KINDS[what])
        if how.startswith("avoid"):
            avoid = re.search(rf"\b({of})\b", caption)[0]
            if how == "avoid another":  # that the caption does not name
                avoid = next(word for word in KINDS[what] if word not in caption)
            return self.encode(self.clip, caption, avoid, weight)
        said = contradicting(caption) if how == "contradicting" else caption
        text = re.sub(rf"\b({of})\b", rf"(\1:{weight})", said)
        if how == "embedding":
            return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))
        encoded = self.encode(self.clip, text)
        if how == "contradicting":
            (encoded,) = nodes.ConditioningConcat().concat(encoded, super().condition([caption]))
        return encoded

    def judge(self, setting: Setting, captions: list[str]) -> dict[str, str]:
        """By criterion, a digit a picture that is 1 if it is what the words that weigh say."""
        told = json.dumps(setting)
        judged: list[dict[str, bool]] = [{}] * len(captions)
        for places in grouped(captions):
            some = [captions[i] for i in places]
            noise = 1000 + places[0]
            pictures = self.draw(self.model, [f"{told}|{c}" for c in some], noise, 1.0)
            for i, picture in zip(places, pictures, strict=True):
                contradicts = setting.how == "contradicting"
                said = contradicting(captions[i]) if contradicts else captions[i]
                judged[i] = world.check(picture, said)
        return digits(judged)


def contradicting(caption: str) -> str:
    """The caption with two colours that it does not name."""
    others = (colour for colour in world.COLOURS if colour not in caption)
    return re.sub("|".join(world.COLOURS), lambda _: next(others), caption)


def grouped(captions: list[str]) -> list[list[int]]:
    """Captions whose words stand at the same places, which one conditioning can hold."""
    lengths = [len(caption.split()) for caption in captions]
    return [[i for i, n in enumerate(lengths) if n == length] for length in sorted({*lengths})]


def shares(settings: list[dict[str, Any]], **wanted: Any) -> dict[float, tuple[float, float]]:
    """Weight -> percent right of what is weighed, and half the 95 % interval."""
    found = {}
    for setting in settings:
        if all(setting[key] == value for key, value in wanted.items()):
            found[setting["weight"]] = interval(100.0 * outcomes(setting, setting["what"]))
    return dict(sorted(found.items()))


def table(settings: list[dict[str, Any]]) -> str:
    """Percent right, by criterion."""
    rows = []
    for setting in settings:
        about = setting["model"], setting["what"], setting["how"], f"{setting['weight']:g}"
        right = [interval(100.0 * outcomes(setting, what)) for what in JUDGED]
        rows.append([*about, *(f"{mean:.1f} ± {half:.1f}" for mean, half in right)])
    return markdown(("model", "words", "by", "weight", *JUDGED), rows)


def plot(settings: list[dict[str, Any]], path: Path) -> None:
    """Percent right over the weight, a model each."""
    figure, axes = subplots(1, len(MODELS), 5.5, 4, sharey=True)
    for axis, model in zip(axes.flat, MODELS, strict=True):
        for what, how in dict.fromkeys((s.what, s.how) for s in SETTINGS):
            points = shares(settings, model=model, what=what, how=how)
            sign = -1 if how.startswith("avoid") else 1
            x = [sign * weight for weight in points]
            y, bars = zip(*points.values(), strict=True) if points else ((), ())
            axis.errorbar(x, y, bars, marker="o", capsize=2, label=f"{what}, {how}")
        axis.set(title=model, xlabel="weight (what is avoided: minus its strength)")
    axes[0, 0].set(ylabel="colours or shapes right, %")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=2, help="of the held-out captions every n-th")
    parser.add_argument("--table", action="store_true", help="and the plot, of what there is")
    options = parser.parse_args()
    captions = world.captions("held-out")[:: options.every]
    result: dict[str, Any] = {"captions": len(captions), "settings": []}
    if RECORD.exists():
        result = json.loads(RECORD.read_text())
    if not options.table:
        torch.set_num_threads(1)
        load_pack()
        pack = load_pack(ROOT / "demo", "taca_demo_pack")
        for name, files in MODELS.items():
            subject = Weighing(files, CODEC, torch.float32)
            subject.encode = parts("conditioning")[0].encode
            subject.clip = pack.clip.load(subject.codec)
            wanted = [
                ({"model": name, **setting._asdict()}, partial(subject.judge, setting, captions))
                for setting in SETTINGS
            ]
            judge_missing(RECORD, result, wanted)
    plot(result["settings"], RECORD.with_suffix(".png"))
    write_between(PAGE, "words", f"\n{table(result['settings'])}\n\n")


if __name__ == "__main__":
    main()
