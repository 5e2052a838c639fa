"""Early against intermediate fusion of text in a U-ViT: what each costs at the published sizes.

``fusion.md`` says how the figures are made, and has the recipe of the other comparison, of
alignment: ``demo/training/train_uvit.py`` and ``evaluate_uvit.py``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable
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

from uvit.config import UViTConfig, central
from uvit.diffusion import TIMESTEPS
from uvit.network import UViT, plain_attention

PUBLISHED = {"small": 13, "deep": 17}
CENTRAL = (1, 3, 5)
COMPILED = ("early", "central 1")  # compiling takes longer than all else


def published_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, **_: Any) -> Tensor:
    """As the published code: in float32, whatever autocast says."""
    with torch.autocast(q.device.type, enabled=False):
        return plain_attention(q.float(), k.float(), v.float(), heads)


def fusions_of(name: str) -> dict[str, int]:
    """How many blocks see the text."""
    return {"early": PUBLISHED[name]} | {f"central {k}": k for k in CENTRAL}


def published_config(blocks: int, shared: int, conditioning: str) -> UViTConfig:
    """The published network, where ``shared`` central blocks see the text."""
    first, last = central(blocks, shared)
    return UViTConfig(blocks, first=first, last=last, conditioning=conditioning)


def inputs_of(config: UViTConfig, batch: int, device: torch.device | str) -> list[Tensor]:
    """Seeded latents, timesteps and prompts."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, config.channels, config.side, config.side, generator=generator)
    t = torch.randint(1, TIMESTEPS + 1, (batch,), generator=generator)
    context = torch.randn(batch, config.text_tokens, config.text_width, generator=generator)
    return [each.to(device) for each in (x, t, context)]


def gflops_of(config: UViTConfig, backward: bool) -> float:
    """Of one picture, attention counted as matrix products. Nothing is computed."""
    network = UViT(config, device="meta")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = network(*inputs_of(config, 1, "meta")).square().mean()
        if backward:
            loss.backward()
    return counter.get_total_flops() / 1e9


def work_of(
    config: UViTConfig, way: str, what: str, batch: int, device: torch.device
) -> Callable[[], None]:
    """One training step, or one call, of a new network."""
    attention = published_attention if way == "published way" else plain_attention
    network = UViT(config, attention).initialise(torch.Generator().manual_seed(0)).to(device)
    x, t, context = inputs_of(config, batch, device)
    call = torch.compile(network, dynamic=False) if way == "compiled" else network
    fused = {} if way == "published way" else {"fused": True}
    numbers = {"betas": (0.9, 0.9), "weight_decay": 0.03, **fused}
    optimiser = torch.optim.AdamW(network.parameters(), 2e-4, **numbers)

    def work() -> None:
        training = what == "training"
        with torch.set_grad_enabled(training), torch.autocast(device.type, torch.bfloat16):
            predicted = call(x, t, context)
        if training:
            (predicted.float() - x).square().mean().backward()
            optimiser.step()
            optimiser.zero_grad()

    return work


def cost(options: argparse.Namespace) -> None:
    """FLOPs and throughput."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    timing.clock = timing.CLOCKS["cpu"]
    report: dict[str, Any] = {"environment": timing.environment(device, "cpu")}
    report |= {"note": options.note, "rounds": options.rounds, "compiled": options.compile}
    report |= {"flops": {}, "throughput": {}}
    for name, conditioning in itertools.product(options.networks, options.conditionings):
        counted = {}
        for fusion, shared in fusions_of(name).items():
            config = published_config(PUBLISHED[name], shared, conditioning)
            counted[fusion] = gflops_of(config, False), gflops_of(config, True)
        found = report["flops"][f"{name}, {conditioning}"] = {
            fusion: {"inference_gflops": round(forward, 2), "training_gflops": round(both, 2)}
            | {"saved_percent": round(100 * (1 - both / counted["early"][1]), 1)}
            for fusion, (forward, both) in counted.items()
        }
        print(name, conditioning, json.dumps(found, indent=1))
    settings = options.networks, options.conditionings, options.batches, options.what
    for setting in itertools.product(*settings) if options.rounds else ():
        label = "{}, {}, batch {}, {}".format(*setting)
        more = setting[0] in options.compile, options.rounds
        report["throughput"][label] = throughput(*setting, *more)
        print(label, json.dumps(report["throughput"][label], indent=1), flush=True)
    file = options.out
    if file is None and options.rounds:
        file = timing.RESULTS / f"fusion-cost-{timing.slug_of(device)}.json"
    if file:
        store(file, report)
        file.with_suffix(".md").write_text(cost_table(report), encoding="utf-8")
        print(f"Saved {file} and {file.with_suffix('.md').name}")


def throughput(
    name: str, conditioning: str, batch: int, what: str, compiled: bool, rounds: int
) -> dict[str, Any]:
    """Pictures a second of every method, and ratios within rounds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fusions, published = fusions_of(name), "early, published way"
    methods = dict(fusions)
    if conditioning == "concatenation":
        methods[published] = fusions["early"]
    if compiled:
        torch.compiler.reset()  # its limit of recompilations is for one setting
        methods |= {f"{fusion}, compiled": fusions[fusion] for fusion in COMPILED}
    works = {}
    for method, shared in methods.items():
        config = published_config(PUBLISHED[name], shared, conditioning)
        works[method] = work_of(config, method.partition(", ")[2], what, batch, device)
        works[method]()
    timed = lambda method: timing.seconds(works[method], device)  # noqa: E731
    times = timing.interleaved(timed, list(works), rounds, f"{name}, {what}", warm_up=False)

    def ratios(slow: str, fast: str) -> dict[str, list[float]]:
        """Of one method to another, where both were timed; ``{}`` in a name is each fusion."""
        found = {fusion: (slow.format(fusion), fast.format(fusion)) for fusion in fusions}
        timed = {f: pair for f, pair in found.items() if {*pair} <= {*times} and len({*pair}) == 2}
        quotients = {f: np.divide(times[one], times[other]) for f, (one, other) in timed.items()}
        return {f: np.quantile(q, (0.5, 0.1, 0.9)).round(3).tolist() for f, q in quotients.items()}

    alone, same = ratios("early", "{}"), ratios("early, compiled", "{}, compiled")
    both, both_compiled = ratios(published, "{}"), ratios(published, "{}, compiled")
    ours = {"ours": both.get("early"), "ours, compiled": both_compiled.get("early")}
    speed = {method: round(batch / float(np.median(own)), 3) for method, own in times.items()}
    values = alone, both, same, both_compiled, ratios("{}", "{}, compiled")
    found = {"rounds": rounds, "pictures_per_second": speed, "implementation_at_equal_fusion": ours}
    return found | dict(zip(COLUMNS.values(), values, strict=True))


ALONE = "fusion_at_equal_implementation"
COLUMNS = {"fusion alone": ALONE, "both": "both", "fusion alone, compiled": f"{ALONE}, compiled"}
COLUMNS |= {"both, compiled": "both, compiled", "compiled": "compiled_at_equal_fusion"}


def cost_table(report: dict[str, Any]) -> str:
    """FLOPs saved and ratios as Markdown."""
    rows = []
    for setting, found in report["throughput"].items():
        for fusion, flops in report["flops"][setting.partition(", batch")[0]].items():
            cells = (found[kind].get(fusion) for kind in COLUMNS.values())
            told = ["{:.3f} ({:.3f}-{:.3f})".format(*cell) if cell else "" for cell in cells]
            saved = f"{flops['saved_percent']} %"
            rows.append([setting, fusion, saved, str(found["rounds"]), *told])
    head = ("setting", "text in", "FLOPs saved", "rounds", *COLUMNS)
    return f"""# Early against intermediate fusion: cost

{timing.said(report["environment"])}

Speed; early fusion = 1, in the columns "both" the published way of it, in the last one the same \
uncompiled. Medians and 10-90 % of the rounds.

{markdown(head, rows)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = ["concatenation", "cross-attention"]
    compiled = "networks that are timed by torch.compile too"
    parser.add_argument("--networks", nargs="+", choices=PUBLISHED, default=list(PUBLISHED))
    parser.add_argument("--conditionings", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--what", nargs="+", default=["training", "inference"])
    parser.add_argument("--rounds", type=int, default=5, help="0: FLOPs only")
    parser.add_argument("--compile", nargs="*", choices=PUBLISHED, default=[], help=compiled)
    parser.add_argument("--note", default="", help="about the machine, for the record")
    parser.add_argument("--out", type=Path, help="JSON; by default among the results")
    torch.set_num_threads(1)
    cost(parser.parse_args())


if __name__ == "__main__":
    main()
