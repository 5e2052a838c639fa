"""Train a U-ViT on the demo's world, with early or one of two kinds of intermediate fusion.

``python dev.py run demo/training/train_uvit.py --fusion early --seed 0`` trains one network of the
comparison whose recipe is ``benchmarks/fusion.md``; ``evaluate_uvit.py`` judges them. A run that
was stopped goes on where it last saved. ``--try-out`` goes through all of it in seconds.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path += [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]

import world
from codec import PATCH, SCALE, Codec
from trainer import DEVICE, Trainer, optimisers_of, orthogonalised, pictures_of, tokens_of

from uvit.config import UViTConfig
from uvit.files import metadata_of
from uvit.network import UViT

BLOCKS, WIDTH = 7, 128
FUSIONS = {
    "early": {"caption_blocks": 0},
    "concatenation": {"caption_blocks": 2, "image_blocks": 2},
    "cross": {"caption_blocks": 2, "image_blocks": 2, "conditioning": "cross-attention"},
}
STEPS, FALL, WARMUP, POOL, LOOK = 4000, 1600, 100, 100, 500
BATCH, RATE, EMA, DROPOUT = 48, 6e-3, 0.998, 0.1
ADAMW = 1 / 3  # of the rate: more, and the text is learnt later
NOISE = 2.0  # median of the noise's share over the picture's
TRY_OUT = {"FALL": 2, "WARMUP": 2, "POOL": 1, "BATCH": 4}
SHAPES, RELATIONS = world.SHAPES[:2], ("left of", "above")
SIZE, TOKENS = 32, 8  # pixels to the side of a picture; words of the longest caption
CODEC = Path(world.__file__).parent / "taca_demo_codec.safetensors"


def captions_of(split: str) -> list[str]:
    """The demo's captions of ``SHAPES`` and ``RELATIONS`` alone, one of each scene."""
    scenes = {told: world.parse(told) for told in world.captions(split)}
    return [
        told
        for told, (a, relation, b) in scenes.items()
        if relation in RELATIONS and {a.shape, b.shape} <= set(SHAPES)
    ]


def config_of(fusion: str) -> UViTConfig:
    """The network of a fusion."""
    return UViTConfig(BLOCKS, WIDTH, 16, SIZE // PATCH, 2, TOKENS, 64, **FUSIONS[fusion])


def context_of(codec: Codec, tokens: Tensor) -> Tensor:
    """The text as the networks get it, ``(n, 8, 64)``: without the padding behind all captions."""
    return codec.embed(tokens)[:, :TOKENS]


def noised(x: Tensor, noise: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """What a network sees at angles ``(n,)`` and the v that it has to tell (arXiv 2202.00512).

    0 is the picture, pi / 2 the noise. Both have the variance of x, if that is 1.
    """
    cos, sin = (each[:, None, None, None] for each in (angle.cos(), angle.sin()))
    return cos * x + sin * noise, cos * noise - sin * x


def predicted(network: UViT, z: Tensor, angle: Tensor, context: Tensor) -> Tensor:
    """The v of ``noised``; the time of the network goes to 1000."""
    return network(z, angle * (2000 / torch.pi), context)


@torch.no_grad()
def sample(
    network: UViT, codec: Codec, captions: list[str], seed: int, steps: int, cfg: float
) -> np.ndarray:
    """Draw a picture of each caption by DDIM: ``(captions, 32, 32, 3)``.

    A caption's noise depends on the seed and its place among the captions alone.
    """
    tokens = tokens_of(captions)
    context = context_of(codec, torch.cat([tokens, torch.zeros_like(tokens)])).to(DEVICE)
    side = network.config.side
    z = torch.randn(len(captions), 16, side, side, generator=torch.Generator().manual_seed(seed))
    z, share = z.to(DEVICE), torch.linspace(1, 0, steps + 1, device=DEVICE)
    for angle, following in itertools.pairwise(torch.atan2(3 * share, 1 - share)):
        v = predicted(network, z.repeat(2, 1, 1, 1), angle.expand(2 * len(z)), context)
        positive, negative = v.chunk(2)
        v = negative + cfg * (positive - negative)
        z = (following - angle).cos() * z + (following - angle).sin() * v
    return codec.decode(z.cpu() / SCALE).numpy()


def enlarged(picture: np.ndarray) -> np.ndarray:
    """A picture at the size that the checker knows, between its pixels linearly."""
    rows = torch.from_numpy(picture).movedim(-1, 0)[None]
    larger = torch.nn.functional.interpolate(rows, size=world.SIZE, mode="bilinear")
    return larger[0].movedim(0, -1).numpy()


def train(options: argparse.Namespace) -> None:
    """Train one network to the last step, by the recipe."""
    run, folder = f"{options.fusion}-seed-{options.seed}", options.work
    name = f"{run}-steps-{options.steps}"
    folder.mkdir(parents=True, exist_ok=True)
    constant = options.steps - FALL  # as many steps as a longer run has too
    codec, captions = Codec.load(CODEC), captions_of("train") * POOL
    pictures = pictures_of(captions, options.seed, SIZE)
    pool = torch.cat([(SCALE * codec.encode(some)).half() for some in pictures])
    tokens = tokens_of(captions)
    config = config_of(options.fusion)
    network = UViT(config).initialise(torch.Generator().manual_seed(options.seed)).to(DEVICE)
    files = folder / f"{name}.pt", folder / f"{name}.jsonl"
    if options.precision == "fp32":
        torch.optim._muon._zeropower_via_newtonschulz = orthogonalised
    trainer = Trainer(
        network, optimisers_of(network, RATE, share=ADAMW), EMA, *files, time.process_time
    )
    begun = {int(f.stem.rpartition("-")[2]): f for f in folder.glob(f"{run}-constant-*.pt")}
    if not trainer.step and any(steps <= constant for steps in begun):
        trainer.resume(begun[max(steps for steps in begun if steps <= constant)])

    def rate_at(step: int) -> float:
        return RATE * min(1.0, step / WARMUP, (options.steps - step) / FALL)

    def loss_at(step: int) -> Tensor:
        # A step's own generator: the same draws whatever the fusion, and when resumed.
        drawn = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
        chosen = torch.randint(len(pool), (BATCH,), generator=drawn)
        angle = (NOISE * torch.randn(BATCH, generator=drawn).exp()).atan()
        kept = torch.rand(BATCH, 1, generator=drawn) >= DROPOUT
        x = pool[chosen].float()
        noise = torch.randn(x.shape, generator=drawn)
        given = *noised(x, noise, angle), angle, context_of(codec, tokens[chosen] * kept)
        z, v, angle, context = (each.to(DEVICE) for each in given)
        with torch.autocast(DEVICE.type, torch.bfloat16, options.precision == "bf16"):
            told = predicted(network, z, angle, context)
        return (told.float() - v).square().mean()

    held_out = captions_of("held-out")

    def look(step: int) -> dict[str, float]:
        if step % LOOK:
            return {}
        drawn = sample(trainer.average.module, codec, held_out, 0, 28, 3.0)
        pairs = zip(drawn, held_out, strict=True)
        right = [world.check(enlarged(one), told)["everything"] for one, told in pairs]
        return {"right": round(sum(right) / len(right), 4)}

    if trainer.step < constant:
        trainer.run(constant, rate_at, loss_at, look)
        shutil.copy(trainer.checkpoint, folder / f"{run}-constant-{constant}.pt")
    trainer.run(options.steps, rate_at, loss_at, look)
    said = {"steps": options.steps, "batch": BATCH, "seed": options.seed, "fusion": options.fusion}
    metadata = metadata_of(config, SCALE, **said, cpu_seconds=round(trainer.seconds))
    weights = trainer.average.module.state_dict()
    file = folder / f"{name}.safetensors"
    save_file({k: w.contiguous() for k, w in weights.items()}, file, metadata)
    print(f"Saved {file}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fusion", choices=FUSIONS, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path(".dev/fusion"), help="log, checkpoint")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--try-out", action="store_true", help="a few small steps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.try_out:
        globals().update(TRY_OUT)
        options.steps = 4
    train(options)


if __name__ == "__main__":
    main()
