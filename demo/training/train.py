"""Train the demo's model, a small MM-DiT of the SD3 architecture, from scratch on a CPU or a GPU.

``python demo/training/train.py --comfyui DIR`` renders the pictures, fits the codec, trains by
rectified flow and writes ``taca_demo_mmdit.safetensors`` and ``taca_demo.json`` to ``demo/models``
and ``taca_demo_codec.safetensors`` beside it, where ComfyUI does not offer it as a model. Other
sizes, depths and texts make the models of ``benchmarks/alignment.py``. A run that was stopped goes
on where it last saved. On a machine that does other work too, set ``OMP_WAIT_POLICY=passive``:
OpenMP's waiting threads otherwise spin on the cores that the others need, and a step can take
twenty times as long.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).resolve().parent.parent))

import world
from codec import CHANNELS, Codec, from_model, to_model
from trainer import (
    DEVICE,
    Trainer,
    logged,
    optimisers_of,
    orthogonalised,
    pictures_of,
    tokens_of,
)

DEMO = Path(world.__file__).parent

TOKEN = 8  # pixels to the side of an image token: 2x2 codec patches of 4 pixels
CONTEXT = 64


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", type=Path, default=os.environ.get("COMFYUI_PATH"))
    parser.add_argument("--models", type=Path, default=DEMO / "models", help="where to write")
    parser.add_argument("--name", default="taca_demo", help="of the files")
    parser.add_argument("--codec", type=Path, default=DEMO, help="where to write the codec")
    parser.add_argument("--depth", type=int, default=3, help="blocks and heads; width / 64")
    parser.add_argument("--size", type=int, default=world.SIZE, help="of the pictures, in pixels")
    parser.add_argument("--text", choices=world.TEXTS, default="words")
    parser.add_argument("--work", type=Path, default=Path(".dev/train"), help="log, checkpoint")
    parser.add_argument("--steps", type=int, default=11000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--optimiser", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--dropout", type=float, default=0.1, help="share of empty captions")
    parser.add_argument("--shift", type=float, default=2.0, help="of the logit-normal times")
    parser.add_argument("--pool", type=int, default=100, help="pictures per caption")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--compile", action="store_true", help="needs a C++ compiler")
    parser.add_argument("--start", type=Path, help="train this model further, with --start-codec")
    parser.add_argument("--start-codec", type=Path)
    parser.add_argument("--dose", type=float, default=0.0, help="of careless captions")
    parser.add_argument("--leave-out", action="store_true", help="attributes, in place of wrong")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate-every", type=int, default=1000, help="steps")
    arguments = parser.parse_args()
    if arguments.comfyui is None:
        parser.error("name ComfyUI's folder with --comfyui or COMFYUI_PATH")
    return arguments


def build_model(depth: int, grid: int) -> torch.nn.Module:
    """Build ComfyUI's MMDiT as its loader will, and initialise it as the DiT paper does.

    The width is 64 * `depth`, from which ComfyUI reads the depth; `grid` image tokens a side.
    """
    from comfy.cli_args import args

    args.cpu = args.use_pytorch_cross_attention = True
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.mmdit import (
        OpenAISignatureMMDITWrapper,
        get_2d_sincos_pos_embed,
    )

    model = OpenAISignatureMMDITWrapper(
        input_size=None,
        in_channels=CHANNELS,
        depth=depth,
        num_patches=grid**2,
        pos_embed_max_size=grid,
        context_embedder_config={
            "target": "torch.nn.Linear",
            "params": {"in_features": CONTEXT, "out_features": 64 * depth},
        },
        qk_norm="rms",
        operations=comfy.ops.disable_weight_init,
    )
    for name, weight in model.named_parameters():
        if "ln_" in name:
            torch.nn.init.ones_(weight)
        elif weight.ndim == 1 or "adaLN" in name or "final_layer" in name:
            torch.nn.init.zeros_(weight)
        else:
            torch.nn.init.xavier_uniform_(weight.data.flatten(1))
    position = get_2d_sincos_pos_embed(64 * depth, grid)
    model.pos_embed.copy_(torch.from_numpy(position)[None])
    return model


def build_pool(arguments: argparse.Namespace) -> tuple[Codec, torch.Tensor, torch.Tensor]:
    """Render the pictures and fit the codec: codec, model-space latents, token ids."""
    captions = world.captions("train") * arguments.pool
    codec = Codec.load(arguments.start_codec) if arguments.start_codec else None
    latents = []
    for pictures in pictures_of(captions, arguments.seed, arguments.size):
        words = len(world.PHRASES if arguments.text == "phrases" else world.VOCABULARY)
        codec = codec or Codec.fit(pictures, words, world.TEXTS[arguments.text], CONTEXT)
        latents.append(to_model(codec.encode(pictures)).half())
    told = captions
    if arguments.dose:  # drawn once for each picture
        rng = np.random.default_rng([arguments.seed, 1])
        told = [world.careless(c, arguments.dose, rng, arguments.leave_out) for c in captions]
        print(json.dumps({"wrong": share_of_wrong(captions, told)}), flush=True)
    return codec, torch.cat(latents), tokens_of(told, arguments.text)


def share_of_wrong(captions: list[str], told: list[str]) -> float:
    """Share of captions that say something else than the picture shows, or less."""
    return round(sum(a != b for a, b in zip(captions, told, strict=True)) / len(told), 4)


def draw_batches(
    count: int, batch: int, first: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Generator]]:
    """Yield each step's indices and random generator, the same whether resumed or not."""
    per_epoch = count // batch
    for epoch in itertools.count(first // per_epoch):
        order = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(count))
        for step in range(max(first, epoch * per_epoch), (epoch + 1) * per_epoch):
            place = step % per_epoch * batch
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            yield order[place : place + batch], generator


@torch.no_grad()
def accuracy(
    model: torch.nn.Module,
    codec: Codec,
    captions: list[str],
    arguments: argparse.Namespace,
    steps: int = 16,
    cfg: float = 3.0,
) -> dict[str, float]:
    """Sample captions (Euler, shift 3) and return the share right per criterion.

    A quick look while training: `evaluate.py` measures the written file through ComfyUI.
    """
    tokens = tokens_of(captions, arguments.text)
    side = 2 * arguments.size // TOKEN
    context = codec.embed(torch.cat([tokens, torch.zeros_like(tokens)])).to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(captions), CHANNELS, side, side, generator=generator).to(DEVICE)
    times = torch.linspace(1, 0, steps + 1, device=DEVICE)
    times = 3 * times / (1 + 2 * times)
    for t, following in itertools.pairwise(times):
        velocity = model(x.repeat(2, 1, 1, 1), (1000 * t).expand(2 * len(x)), context=context)
        positive, negative = velocity.chunk(2)
        x = x + (following - t) * (negative + cfg * (positive - negative))
    pictures = codec.decode(from_model(x.cpu())).numpy()
    results = [world.check(*pair) for pair in zip(pictures, captions, strict=True)]
    return {key: round(sum(r[key] for r in results) / len(results), 4) for key in results[0]}


def main() -> None:
    """Train, resuming from the checkpoint if there is one, and write the model's files."""
    arguments = parse_arguments()
    sys.path.append(str(arguments.comfyui))
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)

    model = build_model(arguments.depth, arguments.size // TOKEN).to(DEVICE)
    if arguments.start:
        model.load_state_dict({k: w.float() for k, w in load_file(arguments.start).items()})
    if arguments.precision == "fp32":
        torch.optim._muon._zeropower_via_newtonschulz = orthogonalised
    optimisers = optimisers_of(model, arguments.lr, arguments.optimiser == "muon")
    codec, pool, tokens = build_pool(arguments)
    files = arguments.work / "checkpoint.pt", arguments.work / "log.jsonl"
    trainer = Trainer(model, optimisers, arguments.ema, *files)
    trainer.log.touch()

    def flow_loss(
        x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, context: torch.Tensor
    ) -> torch.Tensor:
        noisy = torch.lerp(x, noise, t[:, None, None, None])
        with torch.autocast(DEVICE.type, torch.bfloat16, arguments.precision == "bf16"):
            velocity = model(noisy, 1000 * t, context=context)
        return (velocity.float() - (noise - x)).square().mean()

    if arguments.compile:
        flow_loss = torch.compile(flow_loss, dynamic=False)
    batches = draw_batches(len(pool), arguments.batch, trainer.step, arguments.seed)

    def loss_at(_: int) -> torch.Tensor:
        chosen, generator = next(batches)
        x = pool[chosen].float()
        noise = torch.randn(x.shape, generator=generator)
        t = torch.sigmoid(torch.randn(len(x), generator=generator))
        t = arguments.shift * t / (1 + (arguments.shift - 1) * t)
        kept = torch.rand(len(x), 1, generator=generator) >= arguments.dropout
        drawn = x, noise, t, codec.embed(tokens[chosen] * kept)
        return flow_loss(*(each.to(DEVICE) for each in drawn))

    def rate_at(step: int) -> float:
        warm = min(1.0, step / arguments.warmup)
        return arguments.lr * warm * (1 + math.cos(math.pi * step / arguments.steps)) / 2

    def look(step: int) -> dict[str, Any]:
        if step % arguments.evaluate_every:
            return {}
        held_out = world.captions("held-out")[::2]
        return {"held-out": accuracy(trainer.average.module, codec, held_out, arguments)}

    trainer.run(arguments.steps, rate_at, loss_at, look)
    write_files(arguments, trainer, codec)


def write_files(arguments: argparse.Namespace, trainer: Trainer, codec: Codec) -> None:
    """Write the averaged weights in fp16, the codec and the model's card."""
    arguments.models.mkdir(parents=True, exist_ok=True)
    weights = trainer.average.module.state_dict()
    half = {name: weight.half().contiguous() for name, weight in weights.items()}
    name = arguments.name
    save_file(half, arguments.models / f"{name}_mmdit.safetensors", {"format": "pt"})
    codec.save(arguments.codec / f"{name}_codec.safetensors")
    records = logged(trainer.log)
    stride = max(1, math.ceil(len(records) / 100))
    import comfyui_version

    places = {"comfyui", "models", "name", "codec", "work", "evaluate_every", "start"}
    places.add("start_codec")
    depth = arguments.depth
    card = {
        "architecture": {"class": "MMDiT (SD3)", "depth": depth, "width": 64 * depth},
        "training": {key: value for key, value in vars(arguments).items() if key not in places},
        "wall_time_minutes": round(trainer.seconds / 60, 1),
        "versions": {
            "torch": importlib.metadata.version("torch"),
            "comfyui": comfyui_version.__version__,
        },
        "loss": {step: records[step]["loss"] for step in list(records)[::stride]},
    }
    (arguments.models / f"{name}.json").write_text(json.dumps(card, indent=1) + "\n")


if __name__ == "__main__":
    main()
