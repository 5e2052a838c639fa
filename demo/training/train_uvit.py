"""Train a U-ViT on the demo's world, with text in all its blocks or in the central ones.

``python dev.py run demo/training/train_uvit.py --shared 3 --seed 0`` trains one network of the
comparison whose recipe is ``benchmarks/fusion.md``; ``evaluate_uvit.py`` judges them. A run that
was stopped goes on where it last saved.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path += [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]

import world
from codec import SCALE, Codec
from trainer import Trainer, optimisers_of, pictures_of, tokens_of

from uvit.config import UViTConfig, outside
from uvit.diffusion import TIMESTEPS, noise_levels
from uvit.files import metadata_of
from uvit.network import UViT

BLOCKS, WIDTH = 7, 128
STEPS, FALL, WARMUP = 3000, 600, 200
BATCH, POOL, RATE, EMA, DROPOUT = 32, 60, 1e-3, 0.998, 0.1
CODEC = Path(world.__file__).parent / "taca_demo_codec.safetensors"


def config_of(shared: int) -> UViTConfig:
    """The network whose central ``shared`` blocks see the text."""
    outer = outside(BLOCKS, shared)
    return UViTConfig(BLOCKS, WIDTH, 16, world.SIZE // 4, 2, world.TOKENS, 64, outer)


def train(options: argparse.Namespace) -> None:
    """Train one network to the last step, by the recipe."""
    run, folder = f"shared-{options.shared}-seed-{options.seed}", options.work
    name = f"{run}-steps-{options.steps}"
    folder.mkdir(parents=True, exist_ok=True)
    constant = options.steps - FALL  # as many steps as a longer run has too
    codec, captions = Codec.load(CODEC), world.captions("train") * POOL
    pictures = pictures_of(captions, options.seed)
    pool = torch.cat([(SCALE * codec.encode(some)).half() for some in pictures])
    tokens = tokens_of(captions)
    config = config_of(options.shared)
    network = UViT(config).initialise(torch.Generator().manual_seed(options.seed))
    files = folder / f"{name}.pt", folder / f"{name}.jsonl"
    trainer = Trainer(network, optimisers_of(network, RATE), EMA, *files, time.process_time)
    begun = {int(f.stem.rpartition("-")[2]): f for f in folder.glob(f"{run}-constant-*.pt")}
    if not trainer.step and any(steps <= constant for steps in begun):
        trainer.resume(begun[max(steps for steps in begun if steps <= constant)])
    signal, noise_share = noise_levels()

    def rate_at(step: int) -> float:
        return RATE * min(1.0, step / WARMUP, (options.steps - step) / FALL)

    def loss_at(step: int) -> Tensor:
        # A step's own generator: the same draws whatever the fusion, and when resumed.
        drawn = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
        chosen = torch.randint(len(pool), (BATCH,), generator=drawn)
        t = torch.randint(1, TIMESTEPS + 1, (BATCH,), generator=drawn)
        kept = torch.rand(BATCH, 1, generator=drawn) >= DROPOUT
        x = pool[chosen].float()
        noise = torch.randn(x.shape, generator=drawn)
        a, s = (level[t - 1][:, None, None, None] for level in (signal, noise_share))
        with torch.autocast("cpu", torch.bfloat16):
            predicted = network(a * x + s * noise, t, codec.embed(tokens[chosen] * kept))
        return (predicted.float() - noise).square().mean()

    if trainer.step < constant:
        trainer.run(constant, rate_at, loss_at)
        shutil.copy(trainer.checkpoint, folder / f"{run}-constant-{constant}.pt")
    trainer.run(options.steps, rate_at, loss_at)
    said = {"steps": options.steps, "batch": BATCH, "seed": options.seed, "shared": options.shared}
    metadata = metadata_of(config, SCALE, **said, cpu_seconds=round(trainer.seconds))
    weights = trainer.average.module.state_dict()
    file = folder / f"{name}.safetensors"
    save_file({k: w.contiguous() for k, w in weights.items()}, file, metadata)
    print(f"Saved {file}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shared", type=int, required=True, help="central blocks with text; 7: all"
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path(".dev/fusion"), help="log, checkpoint")
    torch.set_num_threads(1)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
