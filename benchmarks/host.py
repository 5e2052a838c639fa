"""What TACA costs the host in one call of a model, whatever the model's size.

ComfyUI's own FLUX with its 57 blocks, read by core's loader, but so narrow that a call is mostly
the host's work. Calls are made by core's sampler with what the nodes install, a few of each kind
in turns: plain, outside the window, inside, and inside with a LoRA on all 304 layers. A call inside
also has operations to do that TACA adds; ``bare`` does these by hand, with as little Python as
that takes, so the host's overhead is what a call takes more than ``bare``. Only the pack's public
functions are used. ``README.md`` says how to read the result.
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import model as models
import timing
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comfy.patcher_extension import WrappersMP  # isort: skip
import comfy.sd  # isort: skip

METHODS = {
    "plain": "plain",
    "plain again": "plain, again",
    "outside": "TACA, outside the window",
    "outside lora": "TACA and LoRA, outside",
    "bare": "the added operations by hand",
    "inside": "TACA, inside",
    "bare lora": "those of a LoRA too, by hand",
    "inside lora": "TACA and LoRA, inside",
}
TINY = {"hidden_size": 128, "num_heads": 1, "context_in_dim": 64, "vec_in_dim": 32}
TEXT, IMAGE, RANK = 16, 16, 4
T_INSIDE, T_OUTSIDE = models.T_INSIDE, models.T_OUTSIDE
PROBES = ("bench_outer", "bench_inner")


def tiny_flux() -> Any:
    """A FLUX.1-dev with all its blocks, as core's loader reads it from a file's tensors."""
    flux = models.MODELS["flux"]
    narrow = models.Model(flux.config, flux.sizes | TINY, flux.depth, {}, flux.latent, flux.text)
    device = torch.device("cpu")
    made = models.load(narrow, flux.depth, torch.float32, device)
    return comfy.sd.load_diffusion_model_state_dict(made.model.diffusion_model.state_dict())


def bare_override(func: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int,
                  **kwargs: Any) -> Tensor:  # fmt: skip
    """The operations of Eq. 10 where the text is known, and nothing else."""
    first = k.narrow(2, 0, TEXT)
    own = first.clone()
    first.mul_(1.2)
    image = func(q.narrow(2, TEXT, IMAGE), k, v, heads, **kwargs)
    first.copy_(own)
    text = func(q.narrow(2, 0, TEXT), k, v, heads, **kwargs)
    return torch.cat([text, image], 1)


@contextmanager
def bare_lora(model: Any, state: dict[str, Tensor]) -> Iterator[None]:
    """A LoRA's operations in the forward of its modules, and nothing else."""

    def adding(forward: Callable[[Tensor], Tensor], up: Tensor, down: Tensor) -> Any:
        def run(x: Tensor) -> Tensor:
            y = forward(x)
            y.view(-1, y.shape[-1]).addmm_(F.linear(x, down).flatten(0, -2), up)
            return y

        return run

    changed: list[nn.Module] = []
    for key, up in state.items():
        name, is_up, _ = key.partition(".lora_up.")
        if is_up:
            module = model.model.get_submodule(name)
            down = state[f"{name}.lora_down.weight"]
            module.__dict__["forward"] = adding(module.forward, up.T, down)
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.__dict__["forward"]


class Probe:
    """When a call of the model passes a wrapper of core's: on its way in and out."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        self.times.append(timing.clock())
        result = executor(*args, **kwargs)
        self.times.append(timing.clock())
        return result


class Host:
    """The model with every method, and probes before and behind what TACA wraps it in."""

    def __init__(self) -> None:
        self.plain = plain = tiny_flux()
        self.blocks = sum(len(getattr(plain.model.diffusion_model, name))
                          for name in ("double_blocks", "single_blocks"))  # fmt: skip
        patch, schedule, lora = models.PACK
        self.state = models.random_lora(plain, RANK)
        fitted = lora.fit_lora(self.state, plain.model, "LoRA", 1.0)
        self.layers = len(self.state) // 2
        self.outer, self.inner = Probe(), Probe()

        def probed(add: Callable[[Any], Any]) -> Any:
            first = plain.clone()
            first.add_wrapper_with_key(WrappersMP.APPLY_MODEL, PROBES[0], self.outer)
            last = add(first).clone()
            last.add_wrapper_with_key(WrappersMP.APPLY_MODEL, PROBES[1], self.inner)
            return last

        def with_override(patcher: Any) -> Any:
            options = patcher.model_options.setdefault("transformer_options", {})
            options["optimized_attention_override"] = bare_override
            return patcher

        def with_taca(patcher: Any) -> Any:
            return patch.patch_model(patcher, schedule.Schedule())

        def with_lora(patcher: Any) -> Any:
            return patch.patch_lora(with_taca(patcher), fitted)

        untouched, taca, taca_lora, bare = map(
            probed, (lambda patcher: patcher, with_taca, with_lora, with_override)
        )
        self.models = {
            "plain": untouched, "plain again": untouched, "outside": taca,
            "outside lora": taca_lora, "bare": bare, "inside": taca, "bare lora": bare,
            "inside lora": taca_lora,
        }  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        side = 2 * int(IMAGE**0.5)
        self.noise = torch.randn(1, 16, side, side, generator=generator)
        text = torch.randn(1, TEXT, TINY["context_in_dim"], generator=generator)
        pooled = torch.randn(1, TINY["vec_in_dim"], generator=generator)
        self.conditioning = [[text, {"pooled_output": pooled, "guidance": 3.5}]]

    def run(self, method: str, count: int) -> tuple[Tensor, list[list[float]]]:
        """One sampling run: its first call's output, and of ``count`` calls after it the times.

        Those are of the whole call, before the model, in the model, and after it.
        """

        def timed(call: Callable[[], Tensor]) -> tuple[Tensor, list[list[float]]]:
            output, rows = call().clone(), []  # the first call of a run looks things up
            for _ in range(count):
                self.outer.times.clear()
                self.inner.times.clear()
                start = timing.clock()
                call()
                whole = timing.clock() - start
                came, left = self.outer.times
                entered, done = self.inner.times
                rows.append([whole, entered - came, done - entered, left - done])
            return output, rows

        t = T_INSIDE if "inside" in method or "bare" in method else T_OUTSIDE
        one = partial(models.one_call, self.models[method], self.conditioning, self.noise, t, timed)
        if method != "bare lora":
            return one()
        with bare_lora(self.plain, self.state):
            return one()

    def check(self) -> None:
        """Make sure that every method computes what its name says.

        Raises
        ------
        ValueError
            If not, or if nothing has loaded torch's compiler, as ComfyUI does.
        """
        if "torch._dynamo" not in sys.modules:
            raise ValueError("torch._dynamo is not loaded: in a ComfyUI it is")
        found = {method: self.run(method, 0)[0] for method in METHODS}
        for method in ("plain again", "outside", "outside lora"):
            if not torch.equal(found[method], found["plain"]):
                raise ValueError(f"{method}: not the plain model")
        for one, other in (("inside", "bare"), ("inside lora", "bare lora")):
            # A LoRA's bias of rounding aside, they compute the same.
            if not torch.allclose(found[one], found[other], rtol=1e-3, atol=1e-4):
                raise ValueError(f"{one} and {other} are not the same")
        if torch.allclose(found["inside"], found["inside lora"], rtol=1e-3, atol=1e-4):
            raise ValueError("the LoRA does nothing")


def spread(values: list[float]) -> dict[str, float]:
    """Microseconds: median and its 95 % interval, by the ranks of the rounds, and 10-90 % range."""
    ordered = sorted(1e6 * each for each in values)
    low, middle, high = timing.quantiles(ordered)
    reach = 0.98 * len(ordered) ** 0.5
    ends = (round(len(ordered) / 2 - reach - 0.5), round(len(ordered) / 2 + reach - 0.5))
    first, last = (ordered[min(max(i, 0), len(ordered) - 1)] for i in ends)
    named = {"us": middle, "low": first, "high": last, "p10": low, "p90": high}
    return {name: round(each, 1) for name, each in named.items()}


def disable_us(blocks: int, repeats: int = 200) -> float:
    """Microseconds of ``torch.compiler.disable`` made and called once a block, beyond the call."""

    def nothing(x: int) -> int:
        return x

    def timed(function: Callable[[], Any]) -> float:
        start = timing.clock()
        for _ in range(blocks):
            function()
        return timing.clock() - start

    pairs = [
        timed(lambda: torch.compiler.disable(nothing)(1)) - timed(lambda: nothing(1))
        for _ in range(repeats)
    ]
    return round(1e6 * statistics.median(pairs), 1)


WHOLE, BEFORE, INSIDE, AFTER = range(4)


def summary(times: dict[str, list[list[list[float]]]], host: Host) -> dict[str, Any]:
    """What TACA adds, whole and by part.

    Parameters
    ----------
    times : dict
        Of each method, round by round, call by call, the four times of ``Host.run``.
    host : Host
        What was measured.
    """

    def column(method: str, part: int) -> list[float]:
        """Medians of the rounds."""
        return [statistics.median(call[part] for call in calls) for calls in times[method]]

    def more(method: str, than: str, part: int = WHOLE) -> list[float]:
        pairs = zip(column(method, part), column(than, part), strict=True)
        return [a - b for a, b in pairs]

    def less(one: list[float], *others: list[float]) -> list[float]:
        return [a - sum(rest) for a, *rest in zip(one, *others, strict=True)]

    both = {name: [a + b for a, b in zip(more(name, "plain", BEFORE),
                                         more(name, "plain", AFTER), strict=True)]
            for name in ("inside", "inside lora")}  # fmt: skip
    deciding = [a + b for a, b in zip(more("outside", "plain", BEFORE),
                                      more("outside", "plain", AFTER), strict=True)]  # fmt: skip
    in_blocks = more("inside", "bare", INSIDE)
    in_layers = less(more("inside lora", "bare lora", INSIDE), in_blocks)
    rows = {
        "plain again": ("plain against plain", more("plain again", "plain")),
        "outside": ("outside the window", more("outside", "plain")),
        "outside lora": ("outside the window, with the LoRA", more("outside lora", "plain")),
        "inside operations": ("inside, the operations that Eq. 10 adds", more("bare", "plain")),
        "inside": ("**inside, the host's overhead**", more("inside", "bare")),
        "deciding": ("- deciding", deciding),
        "installing": ("- installing and restoring forwards", less(both["inside"], deciding)),
        "blocks": (f"- in the {host.blocks} blocks' forwards", in_blocks),
        "lora operations": ("with a LoRA, the operations that it adds",
                            more("bare lora", "bare")),
        "inside lora": ("**inside with a LoRA, the host's overhead**",
                        more("inside lora", "bare lora")),
        "lora installing": ("- deciding, installing and restoring", both["inside lora"]),
        "lora layers": (f"- in the {host.layers} layers' forwards", in_layers),
    }  # fmt: skip
    return {
        "blocks": host.blocks, "layers": host.layers,
        "plain_ms": round(1e3 * statistics.median(column("plain", WHOLE)), 3),
        "disable_us": disable_us(host.blocks),
        "rows": {key: {"label": label, **spread(values)} for key, (label, values) in rows.items()},
    }  # fmt: skip


def table(case: dict[str, Any]) -> str:
    """What TACA adds, as Markdown."""
    lines = [
        f"Microseconds of a call, beside the plain call's {case['plain_ms']} ms: of the medians of "
        f"{case['calls']} calls of each kind in {case['rounds']} rounds.", "",
        "| | median | its 95 % interval | 10-90 % of rounds |", "|---|---|---|---|",
    ]  # fmt: skip
    for row in case["rows"].values():
        us, low, high, p10, p90 = (f"{row[key]:.0f}" for key in ("us", "low", "high", "p10", "p90"))
        lines.append(f"| {row['label']} | {us} | {low} to {high} | {p10} to {p90} |")
    price = f"`torch.compiler.disable`, made and called once for each of {case['blocks']} blocks"
    return "\n".join([*lines, "", f"{price}, costs {case['disable_us']:.0f} here."])


@torch.inference_mode()  # as ComfyUI runs its nodes
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--calls", type=int, default=5, help="of each kind, in a round")
    parser.add_argument("--name", default="now", help="of the result; one of that name is replaced")
    parser.add_argument("--clock", choices=timing.CLOCKS, default="cpu")
    parser.add_argument("--out", type=timing.Path, default=timing.RESULTS, help="folder")
    options = parser.parse_args()
    timing.set_clock(options.clock)
    torch.set_num_threads(1)
    device = torch.device("cpu")
    results = timing.Results("host", options.out, device)
    logging.getLogger("taca").setLevel(logging.ERROR)
    host = Host()
    host.check()
    gc.collect()
    gc.freeze()  # what was there before is not looked through again while calls are timed
    times: dict[str, list[list[list[float]]]] = {method: [] for method in METHODS}
    shuffle = torch.Generator().manual_seed(0)
    started = time.monotonic()
    for index in range(options.rounds):
        for i in torch.randperm(len(METHODS), generator=shuffle).tolist():
            method = list(METHODS)[i]
            times[method].append(host.run(method, options.calls)[1])
        print(f"\rround {index + 1}/{options.rounds}, {time.monotonic() - started:.0f} s ",
              end="", file=sys.stderr, flush=True)  # fmt: skip
    case = {
        "rounds": options.rounds, "calls": options.calls, **summary(times, host),
        "environment": timing.environment(device, options.clock),
    }  # fmt: skip
    results.add(options.name, case)
    print(f"\n\n{table(case)}")
    parts = ["# The host's work for one call\n"]
    for name, each in results.cases.items():
        parts.append(f"## {name}\n\n{timing.said(each['environment'])}\n\n{table(each)}\n")
    results.write("\n".join(parts))


if __name__ == "__main__":
    main()
