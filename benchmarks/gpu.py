"""What TACA costs on this machine's GPU: everything, in one command and so many minutes.

    python benchmarks/gpu.py --minutes 9

needs torch and its usual companions (numpy, scipy, psutil, matplotlib, einops, safetensors), and
the ``comfy*`` folders of a ComfyUI in $COMFYUI_PATH, beside this checkout, or in it. The most
important cases come first. Each gets a share of the time that is left; what it finds is written at
once, and what cannot run is listed with the reason. ``--dry`` runs it all at sizes that mean
nothing.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import logging
import os
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PLACES = (ROOT, ROOT.parent, ROOT.parent.parent)  # in custom_nodes it is two above
beside = [str(place) for place in PLACES if (place / "comfy").is_dir()]
os.environ.setdefault("COMFYUI_PATH", next(iter(beside), ""))
sys.path.insert(0, os.environ["COMFYUI_PATH"])
for name in ("torchsde", "node_helpers"):  # core imports them for what nothing here runs
    if not find_spec(name):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__dict__["conditioning_set_values"] = None

import attention  # noqa: E402
import fusion  # noqa: E402
import host  # noqa: E402
import model  # noqa: E402
import timing  # noqa: E402
import torch  # noqa: E402
from reporting import markdown  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.nn.attention.flex_attention import flex_attention  # noqa: E402

import comfy.model_management  # isort: skip  # noqa: E402

METHODS = model.METHODS | {name: model.WEIGHED[name] for name in model.WORDS}
RANKS = (16,)
NAMES = ("flux", "sd35-medium", "qwen-image")
SDPA = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
WAYS = {"plain": "plain", "inside": "K cloned (TACA)", "in place": "K scaled in place"}
Found = dict[str, Any]


# What runs


def joined(out: Tensor) -> Tensor:
    return out.transpose(1, 2).flatten(2)


def kernels(compiled: bool) -> Iterator[tuple[str, Callable[..., Tensor] | str]]:
    """Each attention kernel as ``attention.plain`` is called, or why it is not there."""
    for name in SDPA:

        def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Any, backend: str = name) -> Tensor:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return attention.plain(q, k, v, mask)

        yield f"SDPA {name.removesuffix('_ATTENTION').lower()}", sdpa
    flex = attention.compile_once(flex_attention, dynamic=False) if compiled else flex_attention
    yield "flex", lambda q, k, v, mask: joined(flex(q, k, v))
    try:
        from sageattention import sageattn

        yield "Sage", lambda q, k, v, mask: joined(sageattn(q, k, v, tensor_layout="HND"))
    except ImportError as error:
        yield "Sage", str(error)
    try:
        from xformers.ops import memory_efficient_attention as xformers

        turned = lambda *qkv: (x.transpose(1, 2) for x in qkv)  # noqa: E731
        yield "xformers", lambda q, k, v, mask: xformers(*turned(q, k, v)).flatten(2)
    except ImportError as error:
        yield "xformers", str(error)


def exactness(shape: attention.Shape, image: int, device: torch.device, dry: bool) -> Found:
    """Largest difference from float64 of plain attention and TACA's, by kernel and dtype.

    Beside them is what gamma changes. Raises ValueError if TACA is off by more than a tenth of
    that beyond twice plain's difference.
    """
    found: Found = {"errors": {}, "left_out": {}}
    wrong = []
    for dtype in ("bfloat16", "float16", "float8_e4m3fn"):
        case = attention.Case(shape, image, 1, device, "float32", 0)
        cast = getattr(torch, dtype)
        qkv = [x.to(cast) for x in case.joint[:3]]
        case.joint = case.joint._replace(**dict(zip("qkv", qkv, strict=True)))
        length = case.joint.q.shape[2]
        rows = sorted({int(i) for i in torch.linspace(0, length - 1, 64).tolist()})
        right = [case.reference(rows, each) for each in (1.0, torch.tensor(1.2).item())]
        effect = (right[1] - right[0]).abs().max().item()
        for name, kernel in kernels(not dry):
            label = f"{name}, {dtype}"
            try:
                if isinstance(kernel, str):
                    raise ImportError(kernel)
                joint = case.joint._replace(attend=kernel)
                outputs = joint.plain(), joint.inside()
            except Exception as error:
                found["left_out"][label] = reason(error)
                continue
            pairs = zip(outputs, right, strict=True)
            errors = [(a[0, rows].double() - b).abs().max().item() for a, b in pairs]
            found["errors"][label] = [*errors, effect]
            if not errors[1] <= 2 * errors[0] + 0.1 * effect:
                wrong.append(f"{label}: off by {errors[1]:.1e}, plain by {errors[0]:.1e}")
    if wrong:
        raise ValueError("; ".join(wrong))
    return found


def joint_attention(
    shape: attention.Shape, size: int, dtype: str, device: torch.device, rounds: int, dry: bool
) -> Found:
    """``attention.py`` at one shape and size: TACA beside the paper's three ways."""
    image = (size // 16) ** 2
    case = attention.Case(shape, image, 1, device, dtype)
    names = [each for each in attention.METHODS if not dry or each != "flex compiled"]
    errors, skipped = case.check(names)
    if dry:
        skipped["flex compiled"] = "a dry run"
    found: Found = {"image_tokens": image, "text_tokens": shape.text, "mask": shape.mask}
    found |= {"peak_mib": {}, "max_abs_error": errors, "skipped": skipped, "dtype": dtype}
    for kind in attention.KINDS:
        found[kind], found["peak_mib"][kind] = case.measure(kind, list(errors), rounds, str(size))
    return found


def in_place(joint: attention.Joint) -> Tensor:
    """TACA where K is scaled where it lies and divided again, as until version 0.2."""
    keys = joint.k.narrow(2, 0, joint.text)
    kept = keys.clone()
    keys.mul_(joint.gamma)
    image = joint.rows(joint.k, slice(joint.text, None))
    keys.copy_(kept)
    return torch.cat([joint.rows(joint.k, slice(joint.text)), image], 1)


def clone_or_place(
    shape: attention.Shape, size: int, dtype: str, device: torch.device, rounds: int
) -> Found:
    """TACA's attention with K in a copy, and in place."""
    case = attention.Case(shape, (size // 16) ** 2, 1, device, dtype, 0)
    ways = {"plain": case.joint.plain, "inside": case.joint.inside}
    ways["in place"] = partial(in_place, case.joint)
    if not torch.allclose(ways["inside"](), ways["in place"](), atol=attention.TOLERANCE[dtype]):
        raise ValueError("K in place: not what TACA computes")
    timed = lambda name: timing.seconds(ways[name], device)  # noqa: E731
    times = timing.interleaved(timed, list(ways), rounds, "K in place")
    peaks = {name: timing.peak_mib(way, device) for name, way in ways.items()}
    return {"ways": timing.summaries(times), "peaks": peaks}


def whole_step(
    name: str, kind: model.Model, size: int, dtype: str, device: torch.device, **how: Any
) -> Found:
    """``model.py`` with words, and a LoRA of one rank; ``how`` has depth, compile and rounds."""
    options = SimpleNamespace(**({"depth": kind.depth, "compile": False, "words": False} | how))
    options.methods = [each for each in METHODS if each not in ("plain", "lora 64")]
    plain = model.load(kind, options.depth, getattr(torch, dtype), device)
    notes, length = [], kind.text[0] + (size // 16) ** 2
    if device.type == "cuda":
        need = 12 * attention.SHAPES[name].heads * length**2
        if need > torch.cuda.mem_get_info()[0]:
            options.methods.remove("dense")
            notes = [f"the dense matrix is left out: {need / 2**30:.0f} GiB do not fit"]
    found = model.measure(plain, name, kind, size, 1, options, device, RANKS)
    case = {"model": name, "dtype": dtype, "size": size, "batch": 1, "depth": options.depth}
    case |= {"compiled": options.compile, "attention": model.comfyui.asked, "mask": kind.mask}
    return case | {"text_tokens": kind.text[0]} | found | {"notes": found["notes"] + notes}


def of_host(rounds: int, calls: int) -> Found:
    """``host.py``, at a few rounds."""
    machine = host.Host()
    captured = machine.check()
    return machine.measure(captured, rounds, calls)


# Cases and their tables


def cases(options: Any, device: torch.device) -> Iterator[tuple[str, str, Callable[[], Found]]]:
    """Label, kind of table, and what to run; the most important first."""
    dry, rounds, shapes, kinds = options.dry, options.rounds or 50, attention.SHAPES, model.MODELS
    dtype, (small, large), tokens = "bfloat16", (1024, 2048), 1024
    if dry:
        shapes, kinds = tiny(shapes, kinds)
        dtype, (small, large), tokens = "float32", (64, 128), 16

    def step(name: str, size: int, dtype: str = dtype, compiled: bool = False) -> Any:
        """Compiled, of few blocks: compiling is slow."""
        kind = kinds[name]
        depth = kind.reduced if dry or compiled else kind.depth
        how = {"rounds": rounds, "compile": compiled, "depth": depth}
        run = partial(whole_step, name, kind, size, dtype, device, **how)
        return f"{name}, {size}², {dtype}, one step{', compiled' * compiled}", "model", run

    def joint(name: str, size: int) -> Any:
        run = partial(joint_attention, shapes[name], size, dtype, device, rounds, dry)
        return f"{name}, {size}², {dtype}, one joint block", "attention", run

    yield "kernels", "kernels", partial(exactness, shapes["flux"], tokens, device, dry)
    yield step("flux", small)
    yield joint("flux", small)
    yield step("sd35-medium", small)
    yield "the host's work", "host", partial(of_host, *((1, 2) if dry else (10, 10)))
    place = partial(clone_or_place, shapes["flux"], small, dtype, device, rounds)
    yield "K in place", "place", place
    yield step("qwen-image", small)
    yield step("flux", small, "float8_e4m3fn")
    for name, size in [pair for pair in itertools.product(NAMES, (small, large))][1:]:
        yield joint(name, size)
    for name in NAMES:
        yield step(name, large)
    setting = "small", 4, "training", 10
    yield "fusion, training", "fusion", partial(not_dry, dry, partial(fusion.throughput, *setting))
    label, kind, run = step("flux", small, compiled=True)
    yield label, kind, partial(not_dry, dry, run)


def not_dry(dry: bool, run: Callable[[], Found]) -> Found:
    """What takes minutes on a CPU at any size."""
    if dry:
        raise TimeoutError("not in a dry run")
    return run()


def tiny(shapes: Any, kinds: Any) -> Any:
    """The same at sizes that a CPU runs at once."""
    text = 12
    small = {n: replace(each, hidden=64, heads=2, text=text) for n, each in shapes.items()}
    flux, qwen, sd35 = (kinds[name] for name in ("flux", "qwen-image", "sd35-medium"))
    narrow = {"num_attention_heads": 1, "joint_attention_dim": 64}
    medium = model.sd3(2, 1)
    return small, {
        "flux": replace(flux, sizes=flux.sizes | host.TINY, text=(text, 64), pooled=32),
        "qwen-image": replace(qwen, sizes=qwen.sizes | narrow, text=(text, 64)),
        "sd35-medium": replace(medium, text=(text, sd35.text[1])),
    }


def reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return textwrap.shorten(f"{type(error).__name__}: {lines[0]}".replace("|", "/"), 120)


def table(case: Found) -> str:
    """One case as Markdown."""
    if "left out" in case:
        return case["left out"]
    if case["kind"] == "kernels":
        rows = [[label, *(f"{x:.1e}" for x in found)] for label, found in case["errors"].items()]
        rows += [[label, f"left out: {why}", "", ""] for label, why in case["left_out"].items()]
        head = ["largest difference from float64", "plain", "TACA", "gamma changes"]
        return markdown(head, rows)
    if case["kind"] == "place":
        ways, peaks = case["ways"], case["peaks"]
        rows = [[WAYS[n], timing.cell(r), timing.peak_cell(peaks, n, 1)] for n, r in ways.items()]
        return markdown(["attention", "time / plain", "peak MiB"], rows)
    if case["kind"] == "fusion":
        rows = [[way, f"{speed:.3g}"] for way, speed in case["pictures_per_second"].items()]
        return markdown(["text in", "pictures a second"], rows)
    tables = {"attention": attention.table, "host": host.table}
    return tables.get(case["kind"], partial(model.table, methods=METHODS))(case)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="what starts later is left out")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on whatever is there")
    begun, options = time.monotonic(), timing.parse(parser, "50 at most, as time allows")
    device = comfy.model_management.get_torch_device()
    if device.type != "cuda" and not options.dry:
        parser.error("torch finds no GPU: --dry tries the command out.")
    warnings.filterwarnings("ignore", message=".*flex_attention")
    results, end = timing.Results("gpu", options.out, device), begun + 60 * options.minutes
    results.cases.clear()  # a table is of one run
    wrong, todo = False, list(cases(options, device))
    for number, (label, kind, run) in enumerate(todo):
        left = end - time.monotonic()
        # A share of its own, of which it loads and compiles too; an early one may take four.
        timing.deadline = time.monotonic() + min(left, 4 * left / (len(todo) - number))
        case: Found = {"kind": kind, "environment": timing.environment(device, options.clock)}
        try:
            if left < 6 * options.minutes:  # the last tenth is for what had begun
                raise TimeoutError(f"no time was left of {options.minutes:g} minutes")
            with torch.inference_mode(kind != "fusion"):
                case |= run()
        except (Exception, SystemExit) as error:
            found = "Wrong" if isinstance(error, ValueError) else "Left out"
            case["left out"] = f"{found}: {reason(error)}"
            wrong |= found == "Wrong"
        comfy.model_management.unload_all_models()
        gc.collect()
        comfy.model_management.soft_empty_cache()
        case["seconds"] = round(time.monotonic() - end + left, 1)
        results.add(label, case)
        print(f"\n### {label}\n\n{table(case)}\n", flush=True)
        results.report(f"TACA on {timing.machine(device)}", table)
    timing.deadline = float("inf")
    results.plot(attention.METHODS | METHODS)
    return int(wrong)


if __name__ == "__main__":
    logging.getLogger("taca").setLevel(logging.ERROR)
    sys.exit(main())
