"""The loop of the demo's training and of the benchmarks': averaged weights, log, checkpoint."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import world
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where models train. What a step draws comes from the CPU, so that it is the same on both."""


def pictures_of(captions: list[str], seed: int, size: int = world.SIZE) -> Iterator[torch.Tensor]:
    """A picture of each caption, some thousands at a time."""
    rng = np.random.default_rng(seed)
    for start in range(0, len(captions), 5100):
        some = captions[start : start + 5100]
        yield torch.from_numpy(np.stack([world.render(caption, rng, size) for caption in some]))


def tokens_of(captions: list[str], text: str = "words") -> torch.Tensor:
    """Token ids of some captions."""
    return torch.from_numpy(np.stack([world.encode(caption, text) for caption in captions]))


def logged(log: Path) -> dict[int, dict[str, Any]]:
    """What a log holds of each step; the last of it, for a resumed run may repeat steps."""
    return {each["step"]: each for each in map(json.loads, log.read_text().splitlines())}


def orthogonalised(
    gradient: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """Muon's Newton-Schulz iteration in the gradient's own precision.

    PyTorch's runs in bfloat16, which takes four times as long on a CPU without bfloat16 units.
    """
    a, b, c = coefficients
    tall = gradient.shape[0] > gradient.shape[1]
    x = gradient.T if tall else gradient
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def optimisers_of(
    model: torch.nn.Module, lr: float, muon: bool = True, share: float = 1.0
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest (or for everything).

    AdamW's rate is always that ``share`` of Muon's.
    """
    matrices, others = [], []
    for name, weight in model.named_parameters():
        is_matrix = "_block" in name and "adaLN" not in name and weight.ndim == 2
        (matrices if muon and is_matrix else others).append(weight)
    group = {"params": others, "share": share}
    found = [torch.optim.AdamW([group], lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)]
    if matrices:
        like_adamw = {"weight_decay": 0.01, "adjust_lr_fn": "match_rms_adamw"}
        found.append(torch.optim.Muon(matrices, lr, **like_adamw))
    return found


@dataclasses.dataclass
class Trainer:
    """A training, which goes on from its checkpoint if there is one.

    Parameters
    ----------
    ema : float
        How much of the average is kept in a step, once there were many.
    checkpoint, log : Path
        Written every 500 and every 100 steps.
    clock : callable
        Whose seconds are logged.
    """

    model: torch.nn.Module
    optimisers: list[torch.optim.Optimizer]
    ema: float
    checkpoint: Path
    log: Path
    clock: Callable[[], float] = time.monotonic
    step: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.average = AveragedModel(self.model)
        self.average.n_averaged += 1  # else its first update would copy, which no resumed run may
        if self.checkpoint.exists():
            self.resume(self.checkpoint)

    def resume(self, checkpoint: Path) -> None:
        """Go on from there."""
        state = torch.load(checkpoint, "cpu", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.module.load_state_dict(state["average"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        state = {"model": self.model.state_dict(), "average": self.average.module.state_dict()}
        state |= {"step": self.step, "seconds": self.seconds}
        state["optimisers"] = [optimiser.state_dict() for optimiser in self.optimisers]
        torch.save(state, self.checkpoint.with_suffix(".new"))
        self.checkpoint.with_suffix(".new").replace(self.checkpoint)

    def run(
        self,
        steps: int,
        rate_at: Callable[[int], float],
        loss_at: Callable[[int], torch.Tensor],
        look: Callable[[int], dict] = lambda step: {},
    ) -> None:
        """Train up to a step; what ``look`` finds is logged too."""
        start, total = self.clock() - self.seconds, 0.0
        for step in range(self.step + 1, steps + 1):
            for optimiser in self.optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = rate_at(step) * group.get("share", 1.0)
            loss = loss_at(step)
            loss.backward()
            for optimiser in self.optimisers:
                optimiser.step()
                optimiser.zero_grad()
            total += loss.item()
            self.average.multi_avg_fn = get_ema_multi_avg_fn(min(self.ema, step / (step + 10)))
            self.average.update_parameters(self.model)
            self.step, self.seconds = step, self.clock() - start
            if step % 100 == 0:
                record = {"step": step, "seconds": round(self.seconds)}
                record |= {"loss": round(total / 100, 5), **look(step)}
                total = 0.0
                print(json.dumps(record), flush=True)
                with self.log.open("a") as file:
                    file.write(json.dumps(record) + "\n")
            if step % 500 == 0 or step == steps:
                self.save()
