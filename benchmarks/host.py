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
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import model as models
import numpy as np
import timing
import torch
from reporting import markdown
from torch import Tensor
from torch.nn import functional as F

from comfy.patcher_extension import WrappersMP  # isort: skip
import comfy.sd  # isort: skip

METHODS = ["plain", "plain again", "outside", "outside lora", "bare", "inside", "bare lora"]
METHODS += ["inside lora"]
FLUX = models.MODELS["flux"]
TINY = {"hidden_size": 128, "num_heads": 1, "context_in_dim": 64, "vec_in_dim": 32}
TEXT, RANK = 16, 4
MODEL = replace(FLUX, sizes=FLUX.sizes | TINY, text=(TEXT, 64), pooled=32)
CPU = torch.device("cpu")


def bare_override(func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, **kwargs: Any) -> Tensor:
    """The operations of Eq. 10 where the text is known, and nothing else."""
    scaled = k.clone()
    scaled.narrow(2, 0, TEXT).mul_(1.2)
    image = func(q.narrow(2, TEXT, q.shape[2] - TEXT), scaled, v, heads, **kwargs)
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

    names = [key.removesuffix(".lora_up.weight") for key in state if "lora_up" in key]
    modules = {name: model.model.get_submodule(name) for name in names}
    for name, module in modules.items():
        up, down = (state[f"{name}.lora_{part}.weight"] for part in ("up", "down"))
        module.__dict__["forward"] = adding(module.forward, up.T, down)
    try:
        yield
    finally:
        for module in modules.values():
            del module.__dict__["forward"]


class Probe(list[float]):
    """When a call of the model passes a wrapper of core's: on its way in and out."""

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        self.append(timing.clock())
        result = executor(*args, **kwargs)
        self.append(timing.clock())
        return result


class Host(models.Methods):
    """FLUX.1-dev with every method, and probes before and behind what TACA wraps it in."""

    def __init__(self) -> None:
        made = models.load(MODEL, FLUX.depth, torch.float32, CPU).model.diffusion_model
        self.plain = plain = comfy.sd.load_diffusion_model_state_dict(made.state_dict())
        self.blocks = len(made.double_blocks) + len(made.single_blocks)
        self.state = models.random_lora(plain, RANK)
        self.layers = len(self.state) // 2
        self.outer, self.inner = Probe(), Probe()
        probed = plain.clone()
        probed.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "bench_outer", self.outer)
        super().__init__(probed, MODEL, 64, 1, {"bare": bare_override}, [RANK])
        for patcher in {id(each): each for each in self.models.values()}.values():
            patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "bench_inner", self.inner)
        self.models |= {
            "bare lora": self.models["bare"],
            "inside lora": self.models[f"lora {RANK}"],
        }

    def calls(self, method: str, count: int) -> tuple[Tensor, list[list[float]]]:
        """One sampling run: its first call's output, and of ``count`` calls after it the times.

        Those are of the whole call, before the model, in the model, and after it.
        """

        def timed(call: Callable[[], Tensor]) -> tuple[Tensor, list[list[float]]]:
            output, rows = call().clone(), []  # the first call of a run looks things up
            for _ in range(count):
                self.outer.clear()
                self.inner.clear()
                start = timing.clock()
                call()
                whole = timing.clock() - start
                (came, left), (entered, done) = self.outer, self.inner
                rows.append([whole, entered - came, done - entered, left - done])
            return output, rows

        by_hand = bare_lora(self.plain, self.state) if method == "bare lora" else nullcontext()
        with by_hand:
            return self.run(method, timed, "inside" in method or "bare" in method)

    def check(self) -> None:
        """Raise ValueError if a method does not compute what its name says.

        Also if nothing has loaded torch's compiler, as ComfyUI does.
        """
        if "torch._dynamo" not in sys.modules:
            raise ValueError("torch._dynamo is not loaded: in a ComfyUI it is")
        found = {method: self.calls(method, 0)[0] for method in METHODS}

        def alike(one: str, other: str) -> bool:  # a LoRA's bias of rounding aside
            return torch.allclose(found[one], found[other], rtol=1e-3, atol=1e-4)

        for method in ("plain again", "outside", "outside lora"):
            if not torch.equal(found[method], found["plain"]):
                raise ValueError(f"{method}: not the plain model")
        for one, other in (("inside", "bare"), ("inside lora", "bare lora")):
            if not alike(one, other):
                raise ValueError(f"{one} and {other} are not the same")
        if alike("inside", "inside lora"):
            raise ValueError("the LoRA does nothing")


def summary(times: dict[str, list[list[list[float]]]], host: Host) -> dict[str, Any]:
    """What TACA adds, whole and by part.

    ``times`` are of each method, round by round, call by call, the four of ``Host.calls``.
    """
    # whole, before the model, in it, after it: medians of each round
    parts = {method: np.median(found, axis=1).T for method, found in times.items()}

    def more(method: str, than: str = "plain") -> Any:
        """The whole call, what is around the model, and the model."""
        whole, before, inside, after = parts[method] - parts[than]
        return whole, before + after, inside

    deciding, in_blocks = more("outside")[1], more("inside", "bare")[2]
    in_both = more("inside lora", "bare lora")[2]
    adds, lora = "the operations that", "**inside with a LoRA, the host's overhead**"
    rows = {
        "plain again": ("plain against plain", more("plain again")[0]),
        "outside": ("outside the window", more("outside")[0]),
        "outside lora": ("outside the window, with the LoRA", more("outside lora")[0]),
        "inside operations": (f"inside, {adds} Eq. 10 adds", more("bare")[0]),
        "inside": ("**inside, the host's overhead**", more("inside", "bare")[0]),
        "deciding": ("- deciding", deciding),
        "installing": ("- installing and restoring forwards", more("inside")[1] - deciding),
        "blocks": (f"- in the {host.blocks} blocks' forwards", in_blocks),
        "lora operations": (f"with a LoRA, {adds} it adds", more("bare lora", "bare")[0]),
        "inside lora": (lora, more("inside lora", "bare lora")[0]),
        "lora installing": ("- deciding, installing and restoring", more("inside lora")[1]),
        "lora layers": (f"- in the {host.layers} layers' forwards", in_both - in_blocks),
    }
    found: dict[str, Any] = {"blocks": host.blocks, "layers": host.layers, "rows": {}}
    found["plain_ms"] = round(1e3 * float(np.median(parts["plain"][0])), 3)
    for key, (label, values) in rows.items():
        us = {name: round(each, 1) for name, each in timing.spread(1e6 * values).items()}
        found["rows"][key] = {"label": label, "us": us["median"], **us}
    return found


def table(case: dict[str, Any]) -> str:
    """What TACA adds, as Markdown."""
    rows = []
    for row in case["rows"].values():
        us, low, high, p10, p90 = (f"{row[key]:.0f}" for key in ("us", "low", "high", "p10", "p90"))
        rows.append([row["label"], us, f"{low} to {high}", f"{p10} to {p90}"])
    head = ["", "median", "its 95 % interval", "10-90 % of rounds"]
    return (
        f"Microseconds of a call, beside the plain call's {case['plain_ms']} ms: of the medians of "
        f"{case['calls']} calls of each kind in {case['rounds']} rounds.\n\n"
        f"{markdown(head, rows)}"
    )


@torch.inference_mode()  # as ComfyUI runs its nodes
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=5, help="of each kind, in a round")
    parser.add_argument("--name", default="now", help="of the result; one of that name is replaced")
    options = timing.parse(parser, "100", "cpu")
    rounds = options.rounds or 100
    torch.set_num_threads(1)
    results = timing.Results("host", options.out, CPU)
    logging.getLogger("taca").setLevel(logging.ERROR)
    host = Host()
    host.check()
    gc.collect()
    gc.freeze()  # what was there before is not looked through again while calls are timed
    times = timing.interleaved(
        lambda method: host.calls(method, options.calls)[1], METHODS, rounds, "host", (), False
    )
    case = {"rounds": rounds, "calls": options.calls, **summary(times, host)}
    results.add(options.name, case | {"environment": timing.environment(CPU, options.clock)})
    print(f"\n\n{table(case)}")
    results.report("The host's work for one call", table)


if __name__ == "__main__":
    main()
