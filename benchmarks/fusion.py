"""Early against intermediate fusion of text in a U-ViT: what each costs at the published sizes.

``fusion.md`` says how the figures are made, and has the recipe of the other comparison, of
alignment: ``demo/training/train_uvit.py`` and ``evaluate_uvit.py``.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timing
import torch
from reporting import ROOT, markdown, store
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(ROOT))

from uvit.config import Conditioning, UViTConfig
from uvit.diffusion import TIMESTEPS
from uvit.network import UViT, plain_attention

SIZES = {"small": 13, "deep": 17}
CONDITIONINGS: tuple[Conditioning, ...] = "concatenation", "cross-attention"
EARLY = "early"
TIMED: dict[str, tuple[int, int, Conditioning]] = {
    "concatenation c3 v3": (3, 3, "concatenation"),
    "concatenation c1 v5": (1, 5, "concatenation"),
    "concatenation c2 v6": (2, 6, "concatenation"),
    "cross c3 v3": (3, 3, "cross-attention"),
    "cross c2 v4": (2, 4, "cross-attention"),
}
"""Caption blocks, image blocks and conditioning of the fusions that are timed beside early."""
PRECISIONS = "float32", "bfloat16"
"""What attention computes in, the first as in the paper's code without xformers; all else is
bfloat16 by autocast."""
WORK = "training", "sampling"
COUNTED = range(7)


def config_of(size: str, fusion: str) -> UViTConfig:
    """A network of a published size."""
    if fusion == EARLY:
        return UViTConfig(SIZES[size])
    captions, images, conditioning = TIMED[fusion]
    return streams_of(size, captions, images, conditioning)


def streams_of(size: str, captions: int, images: int, conditioning: Conditioning) -> UViTConfig:
    """The same with the text's own blocks (c) and the image's own (v)."""
    return UViTConfig(
        SIZES[size], image_blocks=images, caption_blocks=captions, conditioning=conditioning
    )


def inputs_of(config: UViTConfig, batch: int, device: torch.device | str) -> list[Tensor]:
    """Seeded latents, timesteps and prompts."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, config.channels, config.side, config.side, generator=generator)
    t = torch.randint(1, TIMESTEPS + 1, (batch,), generator=generator)
    context = torch.randn(batch, config.text_tokens, config.text_width, generator=generator)
    return [each.to(device) for each in (x, t, context)]


def gflops_of(config: UViTConfig) -> tuple[float, float]:
    """Forward, and forward and backward, of one picture; attention counted as matrix products."""
    network = UViT(config, device="meta")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = network(*inputs_of(config, 1, "meta")).square().mean()
        forward = counter.get_total_flops()
        loss.backward()
    return forward / 1e9, counter.get_total_flops() / 1e9


def flops_of(size: str) -> dict[str, Any]:
    """Early fusion's, and what every c and v saves of them, in percent."""
    early = gflops_of(config_of(size, EARLY))
    found: dict[str, Any] = {"early_gflops": dict(zip(("forward", "training"), early, strict=True))}
    for conditioning in CONDITIONINGS:
        counted = {
            f"c{c} v{v}": gflops_of(streams_of(size, c, v, conditioning))
            for c, v in itertools.product(COUNTED, range(SIZES[size] // 2 + 1))
        }
        found[conditioning] = {
            name: [round(100 * (1 - one / all_), 1) for one, all_ in zip(each, early, strict=True)]
            for name, each in counted.items()
        }
    return found


def steps_of(
    config: UViTConfig, what: str, batch: int, device: torch.device, all_float32: bool = False
) -> dict[str, Callable[[], None]]:
    """One step of training, or one call as in sampling, of a new network, by precision."""
    precision = PRECISIONS[0]

    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, **_: Any) -> Tensor:
        if precision != "float32":
            return plain_attention(q, k, v, heads)
        with torch.autocast(device.type, enabled=False):
            return plain_attention(q.float(), k.float(), v.float(), heads)

    network = UViT(config, attend).initialise(torch.Generator().manual_seed(0)).to(device)
    x, t, context = inputs_of(config, batch, device)
    training = what == "training"
    numbers = {"betas": (0.9, 0.9), "weight_decay": 0.03, "fused": True}
    optimiser = torch.optim.AdamW(network.parameters(), 2e-4, **numbers) if training else None

    def step(chosen: str) -> None:
        nonlocal precision
        precision = chosen
        with (
            torch.set_grad_enabled(training),
            torch.autocast(device.type, torch.bfloat16, not all_float32),
        ):
            predicted = network(x, t, context)
        if optimiser is not None:
            (predicted.float() - x).square().mean().backward()
            optimiser.step()
            optimiser.zero_grad()

    return {each: partial(step, each) for each in PRECISIONS[: 1 if all_float32 else 2]}


def cases(
    device: torch.device,
    sizes: Sequence[str] = tuple(SIZES),
    batches: Sequence[int] = (1, 4),
    work: Sequence[str] = WORK,
    all_float32: bool = False,
) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """What to time: a setting, a method of it, and a step; those of a setting are comparable.

    A network is made as its first case is asked for, and free when its steps are dropped.
    """
    for size, batch, what in itertools.product(sizes, batches, work):
        for fusion in (EARLY, *TIMED):
            steps = steps_of(config_of(size, fusion), what, batch, device, all_float32)
            for precision, step in steps.items():
                yield setting_of(size, batch, what), f"{fusion}, {precision}", step


def throughput(
    size: str, batch: int, what: str, rounds: int, all_float32: bool = False
) -> dict[str, Any]:
    """Pictures a second of every method of a setting, and ratios within rounds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = cases(device, [size], [batch], [what], all_float32)
    steps = {method: step for _, method, step in found}
    timed = lambda method: timing.seconds(steps[method], device)  # noqa: E731
    times = timing.interleaved(timed, list(steps), rounds, setting_of(size, batch, what))
    speed = {method: round(batch / float(np.median(own)), 3) for method, own in times.items()}
    return {"rounds": rounds, "pictures_per_second": speed} | compared(times)


def setting_of(size: str, batch: int, what: str) -> str:
    """What the methods of a setting have in common."""
    return f"{size}, batch {batch}, {what}"


def compared(times: dict[str, list[float]]) -> dict[str, Any]:
    """How many times as fast: by fusion, by precision, by both; median and its interval.

    What was timed in one precision alone has no figures for precision.
    """

    def ratio(slow: str, fast: str) -> list[float]:
        found = timing.spread(np.divide(times[slow], times[fast]).tolist())
        return [round(found[key], 3) for key in ("low", "median", "high")]

    timed = [p for p in PRECISIONS if f"{EARLY}, {p}" in times]
    fused = {p: {f: ratio(f"{EARLY}, {p}", f"{f}, {p}") for f in TIMED} for p in timed}
    if len(timed) == 1:
        return {"fusion": fused, "precision": {}, "both": {}}
    one, other = timed
    return {
        "fusion": fused,
        "precision": {f: ratio(f"{f}, {one}", f"{f}, {other}") for f in (EARLY, *TIMED)},
        "both": {f: ratio(f"{EARLY}, {one}", f"{f}, {other}") for f in TIMED},
    }


def written(report: dict[str, Any]) -> str:
    """A report as Markdown."""
    parts = ["# Early against intermediate fusion: cost", timing.said(report["environment"])]
    for size, found in report["flops"].items():
        for conditioning in CONDITIONINGS:
            head = f"## {size}, {conditioning}: FLOPs of a training step saved, in percent"
            saved = found[conditioning]
            rows = [
                [f"v{v}", *(saved[f"c{c} v{v}"][1] for c in COUNTED)]
                for v in range(SIZES[size] // 2 + 1)
            ]
            parts += [head, markdown(["", *(f"c{c}" for c in COUNTED)], rows)]
    parts.append(
        "## Speed\n\nHow many times as fast as early fusion, and bfloat16 attention as float32 "
        "attention: medians of rounds, and their 95 % intervals. All else is computed in "
        f"{'float32' if report.get('all_float32') else 'bfloat16'}."
    )
    rows = []
    for setting, found in report["throughput"].items():
        for fusion in found["precision"] or TIMED:
            ratios = [found["fusion"].get(p, {}).get(fusion) for p in PRECISIONS]
            ratios += [found[key].get(fusion) for key in ("precision", "both")]
            cells = (timing.ranged(each) if each else "" for each in ratios)
            rows.append([setting, fusion, str(found["rounds"]), *cells])
    head = ["setting", "text", "rounds", *(f"fusion, {p} attention" for p in PRECISIONS)]
    parts.append(markdown([*head, "precision alone", "both"], rows))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument(
        "--all-float32", action="store_true", help="for a CPU without bfloat16 units"
    )
    parser.add_argument("--rounds", type=int, default=5, help="0: FLOPs only")
    parser.add_argument("--note", default="", help="about the machine, for the record")
    parser.add_argument("--out", type=Path, help="JSON; by default among the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    timing.clock = timing.CLOCKS["cpu"]
    report = {"environment": timing.environment(device, "cpu"), "note": options.note}
    report["all_float32"] = options.all_float32
    report["flops"] = {size: flops_of(size) for size in options.sizes}
    report["throughput"] = {}
    file = options.out or timing.RESULTS / f"fusion-cost-{timing.slug_of(device)}.json"
    settings = itertools.product(options.sizes, options.batches, options.work)
    for setting in settings if options.rounds else ():
        found = throughput(*setting, options.rounds, options.all_float32)
        report["throughput"][setting_of(*setting)] = found
        print(setting, found["fusion"], flush=True)
        store(file, report)
    store(file, report)
    file.with_suffix(".md").write_text(written(report), encoding="utf-8")
    print(f"Saved {file} and {file.with_suffix('.md').name}")


if __name__ == "__main__":
    main()
