"""What TACA costs the host in one call of a model, whatever the model's size.

ComfyUI's own FLUX with its 57 blocks, read by core's loader, but so narrow that a call is mostly
the host's work. Calls are made by core's sampler with what the nodes install, a few of each kind
in turns: plain, outside the window, inside, and inside with a LoRA on all 304 layers. A call inside
also has operations to do that TACA adds; ``bare`` does these by hand, with as little Python as
that takes, so the host's overhead is what a call takes more than ``bare``. A machine is never as
fast for two whole calls, so each part is timed where it is small: calls that leave the model out,
and one block of each list, over and over with what each kind had put into it, which does nothing
but its attention and the layers that the LoRA changes, on what they had in a real call.
``--before`` times another checkout of the pack in the same rounds. ``README.md`` says how to read
the result.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import model as models
import numpy as np
import timing
import torch
from reporting import markdown
from torch import Tensor, nn
from torch.nn import functional as F

from comfy.patcher_extension import WrappersMP  # isort: skip
from comfy.ldm.modules.attention import optimized_attention  # isort: skip
import comfy.sd  # isort: skip

METHODS = ["plain", "plain again", "outside", "outside lora", "bare", "inside", "bare lora"]
METHODS += ["inside lora"]
FLUX = models.MODELS["flux"]
TINY = {"hidden_size": 128, "num_heads": 1, "context_in_dim": 64, "vec_in_dim": 32}
TEXT, RANK, SIZE, IN_A_ROW = 8, 4, 32, 5
MODEL = replace(FLUX, sizes=FLUX.sizes | TINY, text=(TEXT, 64), pooled=32)
CPU = torch.device("cpu")


def bare_override(
    gamma: Tensor, func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, **kwargs: Any
) -> Tensor:
    """The operations of Eq. 10 where the text is known, and nothing else.

    Gamma is a tensor, for no graph of torch.compile may hold its value.
    """
    scaled = k.clone()
    scaled.narrow(2, 0, TEXT).mul_(gamma)
    image = func(q.narrow(2, TEXT, q.shape[2] - TEXT), scaled, v, heads, **kwargs)
    text = func(q.narrow(2, 0, TEXT), k, v, heads, **kwargs)
    return torch.cat([text, image], 1)


def layers_of(state: dict[str, Tensor]) -> list[str]:
    """The names of a LoRA's layers."""
    return [key.removesuffix(".lora_up.weight") for key in state if "lora_up" in key]


@contextmanager
def hooked(modules: Iterable[nn.Module], before: Any, after: Any = None) -> Iterator[None]:
    """Modules that tell of their calls."""
    hooks = [each.register_forward_pre_hook(before, with_kwargs=True) for each in modules]
    hooks += [each.register_forward_hook(after) for each in modules] if after else []
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def bare_lora(model: Any, state: dict[str, Tensor]) -> Iterator[None]:
    """A LoRA's operations in the forward of its modules, and nothing else."""

    def adding(forward: Callable[[Tensor], Tensor], up: Tensor, down: Tensor) -> Any:
        def run(x: Tensor) -> Tensor:
            y = forward(x)
            low = F.linear(x, down).flatten(0, -2)
            y.view(-1, y.shape[-1]).addmm_(low, up, alpha=models.STRENGTH)
            return y

        return run

    modules = {name: model.model.get_submodule(name) for name in layers_of(state)}
    for name, module in modules.items():
        up, down = (state[f"{name}.lora_{part}.weight"] for part in ("up", "down"))
        module.__dict__["forward"] = adding(module.forward, up.T, down)
    try:
        yield
    finally:
        for module in modules.values():
            del module.__dict__["forward"]


Recorded = tuple[tuple[Any, ...], dict[str, Any]]


def replaying(
    layers: list[tuple[nn.Module, Recorded]], attention: list[Recorded], output: Any
) -> Callable[..., Any]:
    """A block's forward that runs some layers and the attention on what they were called with."""

    def replay(*args: Any, transformer_options: dict[str, Any], **kwargs: Any) -> Any:
        for layer, (inputs, named) in layers:
            layer(*inputs, **named)
        for inputs, named in attention:
            optimized_attention(*inputs, **named, transformer_options=transformer_options)
        return output

    return replay


@dataclass
class Captured:
    """One call: its output, what its blocks were called with, and the forwards put into them."""

    output: Any = None
    called: dict[nn.Module, Recorded] = field(default_factory=dict)
    forwards: dict[nn.Module, Any] = field(default_factory=dict)

    def seconds(self, block: nn.Module) -> float:
        """Of the block, called as it was: the best of some in a row, as a model's blocks are."""
        (args, kwargs), times = self.called[block], []
        for module, forward in self.forwards.items():
            module.__dict__["forward"] = forward
        for _ in range(IN_A_ROW):
            if torch.cuda.is_available():  # the host's own time is that of launching
                torch.cuda.synchronize()
            start = timing.clock()
            block(*args, **kwargs)
            times.append(timing.clock() - start)
        for module in self.forwards:
            del module.__dict__["forward"]
        return min(times)


class Host(models.Methods):
    """FLUX.1-dev with every method; ``before`` is another checkout of the pack, beside it."""

    def __init__(self, before: Path | None = None) -> None:
        made = models.load(MODEL, FLUX.depth, torch.float32, CPU).model.diffusion_model
        self.plain = plain = comfy.sd.load_diffusion_model_state_dict(made.state_dict())
        self.device = plain.load_device
        running = plain.model.diffusion_model
        self.counts = {  # the first block of each list stands for all of it
            running.double_blocks[0]: len(running.double_blocks),
            running.single_blocks[0]: len(running.single_blocks),
        }
        state, dtype = models.random_lora(plain, RANK), plain.model.get_dtype_inference()
        self.state = {name: each.to(self.device, dtype) for name, each in state.items()}
        self.blocks = sum(self.counts.values())
        self.layers, self.names = len(self.state) // 2, list(METHODS)
        self.passed: list[float] = []  # when a call passed each wrapper
        self.on_entry: Callable[..., Any] | None = None
        probed = plain.clone()
        probed.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "bench_outer", self.outer)
        inputs = probed, MODEL, SIZE, 1
        bare = partial(bare_override, torch.full((1,), models.blocks.GAMMA, device=self.device))
        super().__init__(*inputs, {"bare": bare}, [RANK])
        self.models["inside lora"] = self.models[f"lora {RANK}"]
        if before:
            pack = models.comfyui.load_pack(before, "taca_before").__name__
            other = models.Methods(*inputs, {}, [RANK], f"{pack}.taca").models
            self.models |= {"inside before": other["inside"]}
            self.models |= {"inside lora before": other[f"lora {RANK}"]}
            self.names += ["inside before", "inside lora before"]
        for patcher in {id(each): each for each in self.models.values()}.values():
            patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "bench_inner", self.inner)
        self.models["bare lora"] = self.models["bare"]

    def outer(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """A wrapper around TACA's."""
        start = timing.clock()
        result = executor(*args, **kwargs)
        self.passed.append(timing.clock() - start)
        return result

    def inner(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """A wrapper inside TACA's."""
        return self.on_entry(executor, *args, **kwargs) if self.on_entry else args[0]

    def run(self, method: str, around: Callable[..., Any], is_inside: bool | None = None) -> Any:
        by_hand = bare_lora(self.plain, self.state) if method == "bare lora" else nullcontext()
        with by_hand:
            is_inside = "inside" in method or "bare" in method
            return super().run(method, around, is_inside)

    def capture(self, method: str) -> Captured:
        """A call of the model, with what was installed while it ran."""
        found = Captured()

        def grab(module: nn.Module, args: Any, kwargs: Any) -> None:
            found.called[module] = args, dict(kwargs)

        def entered(executor: Any, *args: Any, **kwargs: Any) -> Any:
            for block in self.counts:
                for module in block.modules():
                    if "forward" in module.__dict__:
                        found.forwards[module] = module.forward
            return executor(*args, **kwargs)

        self.on_entry = entered
        with hooked(self.counts, before=grab):
            found.output = self.run(method, lambda call: call().clone())
        return found

    def replays(self) -> dict[nn.Module, Callable[..., Any]]:
        """For the first block of each list what does only its attention and its LoRA's layers."""
        layers: dict[nn.Module, Recorded] = {}
        attention: list[Recorded] = []
        parts: dict[nn.Module, tuple[list[Recorded], Any]] = {}

        def attended(func: Any, *args: Any, **kwargs: Any) -> Any:
            passed_on = {"transformer_options", "_inside_attn_wrapper"}  # by core, in each call
            known = {n: x for n, x in kwargs.items() if n not in passed_on}
            attention.append((tuple(map(kept, args)), known))
            return func(*args, **kwargs)

        def kept(x: Any) -> Any:
            return x.clone() if isinstance(x, Tensor) else x

        def begun(module: nn.Module, args: Any, kwargs: Any) -> None:
            if module in self.counts:
                attention.clear()
            else:
                layers[module] = tuple(map(kept, args)), kwargs

        def ended(module: nn.Module, args: Any, output: Any) -> None:
            if module in self.counts:
                output = tuple(map(kept, output)) if isinstance(output, tuple) else kept(output)
                parts[module] = list(attention), output

        changed = [self.plain.model.get_submodule(name) for name in layers_of(self.state)]
        own = [module for block in self.counts for module in block.modules() if module in changed]
        probed = self.plain.clone()
        options = probed.model_options.setdefault("transformer_options", {})
        options["optimized_attention_override"] = attended
        self.models["recorded"] = probed
        with hooked([*self.counts, *own], begun, ended):
            self.run("recorded", lambda call: call().clone(), True)
        found = {}
        for block, (calls, output) in parts.items():
            inside = [(each, layers[each]) for each in block.modules() if each in layers]
            found[block] = replaying(inside, calls, output)
        return found

    def around(self, method: str, count: int) -> float:
        """Seconds of a call whose model is left out: deciding, installing, restoring."""

        def timed(call: Callable[[], Tensor]) -> float:
            self.on_entry = lambda executor, *args, **kwargs: executor(*args, **kwargs)
            call()  # the first of a run looks things up, and is made sure of
            self.on_entry = None
            self.passed.clear()
            for _ in range(count):
                call()
            return float(np.median(self.passed))

        return self.run(method, timed)

    def in_blocks(self, captured: Captured) -> float:
        """Seconds in all blocks of a call."""
        return sum(count * captured.seconds(block) for block, count in self.counts.items())

    def check(self) -> dict[str, Captured]:
        """A call of each method, whose blocks do no more than attend and run the LoRA's layers.

        Raises ValueError if one does not compute what its name says, or if nothing has loaded
        torch's compiler, as ComfyUI does.
        """
        if "torch._dynamo" not in sys.modules:
            raise ValueError("torch._dynamo is not loaded: in a ComfyUI it is")
        found = {method: self.capture(method) for method in self.names}

        rtol = 1e-3 if self.plain.model.get_dtype_inference() == torch.float32 else 5e-2

        def alike(one: str, other: str) -> bool:  # a LoRA's bias of rounding aside
            return torch.allclose(found[one].output, found[other].output, rtol, rtol / 10)

        for method in ("plain again", "outside", "outside lora"):
            same = torch.equal(found[method].output, found["plain"].output)
            if not same or found[method].forwards:
                raise ValueError(f"{method}: not the plain model")
        for name in self.names:
            bare = name.removesuffix(" before").replace("inside", "bare")
            if "inside" in name and not alike(name, bare):
                raise ValueError(f"{name} and {bare} are not the same")
        if alike("inside", "inside lora"):
            raise ValueError("the LoRA does nothing")
        replays = self.replays()
        for block, replay in replays.items():
            block.__dict__["forward"] = replay
        found = {method: self.capture(method) for method in self.names}
        for block in replays:
            del block.__dict__["forward"]
        return found

    def measure(self, captured: dict[str, Captured], rounds: int, calls: int) -> dict[str, Any]:
        """``summary`` of interleaved rounds."""
        around = timing.interleaved(
            lambda method: self.around(method, calls), self.names, rounds, "around", (), False
        )
        rounds = len(around["plain"])
        blocks: dict[str, list[float]] = {name: [] for name in self.names}
        for _ in range(rounds):
            found = timing.interleaved(
                lambda method: self.in_blocks(captured[method]), self.names, calls, "blocks"
            )
            for name in self.names:
                blocks[name].append(found[name])
        return {"rounds": rounds, "calls": calls, **summary(around, blocks, self)}


def summary(
    around: dict[str, list[float]], blocks: dict[str, list[list[float]]], host: Host
) -> dict[str, Any]:
    """What TACA adds, whole and by part.

    ``around`` are ``Host.around`` of each method, one a round; ``blocks`` are ``Host.in_blocks``,
    several a round, whose differences are taken one by one.
    """

    def installing(method: str, than: str = "plain") -> Any:
        return np.subtract(around[method], around[than])

    def running(method: str, than: str = "plain") -> Any:
        pairs = zip(blocks[method], blocks[than], strict=True)
        return np.array([np.median(np.subtract(*pair)) for pair in pairs])

    def more(method: str, than: str = "plain") -> Any:
        return installing(method, than) + running(method, than)

    rows = {
        "plain again": ("plain against plain", more("plain again")),
        "outside": ("outside the window", more("outside")),
        "outside lora": ("outside the window, with the LoRA", more("outside lora")),
        "inside operations": ("inside, the operations that Eq. 10 adds", running("bare")),
        "lora operations": ("with a LoRA, the operations it adds", running("bare lora", "bare")),
    }
    for when in [when for when in (" before", "") if f"inside{when}" in around]:
        inside, lora = f"inside{when}", f"inside lora{when}"
        layers = running(lora, "bare lora") - running(inside, "bare")
        whole = installing(lora) + running(lora, "bare lora")
        rows |= {
            inside: (
                f"**inside, the host's overhead{when}**",
                installing(inside) + running(inside, "bare"),
            ),
            f"installing{when}": ("- deciding, installing and restoring", installing(inside)),
            f"blocks{when}": (f"- in {host.blocks} blocks' forwards", running(inside, "bare")),
            lora: (f"**inside with a LoRA, the host's overhead{when}**", whole),
            f"lora installing{when}": ("- deciding, installing and restoring", installing(lora)),
            f"lora layers{when}": (f"- in {host.layers} layers' forwards", layers),
        }
    found: dict[str, Any] = {"blocks": host.blocks, "layers": host.layers, "rows": {}}
    found["plain_ms"] = round(
        1e3 * float(np.median([each for one in blocks["plain"] for each in one])), 3
    )
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
        f"Microseconds of a call, beside {case['plain_ms']} ms of a plain call's attention and "
        f"layers: {case['calls']} calls of each part and kind, {case['rounds']} rounds.\n\n"
        f"{markdown(head, rows)}"
    )


@torch.inference_mode()  # as ComfyUI runs its nodes
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=20, help="of each kind, in a round")
    parser.add_argument("--before", type=Path, help="another checkout of the pack, timed beside")
    parser.add_argument("--name", default="now", help="of the result; one of that name is replaced")
    options = timing.parse(parser, "30", "cpu")
    rounds, count = options.rounds or 30, options.calls
    torch.set_num_threads(1)
    results = timing.Results("host", options.out, CPU)
    logging.getLogger("taca").setLevel(logging.ERROR)
    host = Host(options.before)
    captured = host.check()
    gc.collect()
    gc.freeze()  # what was there before is not looked through again while calls are timed
    case = host.measure(captured, rounds, count)
    results.add(options.name, case | {"environment": timing.environment(CPU, options.clock)})
    print(f"\n\n{table(case)}")
    results.report("The host's work for one call", table)


if __name__ == "__main__":
    main()
