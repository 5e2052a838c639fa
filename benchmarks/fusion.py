"""Early against intermediate fusion of text in a U-ViT: alignment, and what each costs.

Re-creates the comparison of Hu, Jia and Rostami (arXiv 2403.16530) from its abstract, on a small
scale: two networks that differ in nothing but the blocks that see the text.

``train`` and ``score``: alignment on the demo's world
------------------------------------------------------
The recipe, settled before any training: U-ViT of 7 blocks and width 128 (1.5 M parameters), text
by concatenation, in all blocks (``--shared 7``, early fusion) or the central 3 (``--shared 3``);
64 image tokens, 16 text tokens, frozen text table. Noise prediction at uniform t with the published
schedule, mean squared error; 3,000 steps of 32 pictures; Muon for the matrices of the blocks and
AdamW for the rest, 1e-3 after 200 steps of warm-up, in the last 600 steps falling to 0 linearly;
10 % empty captions; average of the weights at 0.998; bfloat16 autocast. Three seeds each; of one
seed both fusions see the same pictures, noise, timesteps and captions in the same order.

The comparison at the same number of pictures is that. For the same time, intermediate fusion is
trained again for 3,300 steps (``--steps 3300``): a step of these networks takes early fusion 1.10
times as long (median of 21 interleaved rounds of process time, before any training). The learning
rate being constant until it falls, that run goes on from the other's last step before the fall.

Training stops at the last step, whatever came out, and the averaged weights of that step are what
is scored: no choice among checkpoints. Seeds are trained in the order 0, 1, 2, early and
intermediate in turns, and what a machine does not get done in its time is left out and said so.
(4,000 steps were planned; they became 3,000 when 1,000 had run and nothing had been scored, for the
machine turned out to be slower than thought.)

``score`` draws the 204 captions that were held out, three noises each, the same for every network,
by DDIM in 50 steps at CFG scale 3, and lets the demo's checker judge. The figure is the share of
pictures in which everything is right; differences are paired by seed, caption and noise. Their 95 %
intervals come from a bootstrap over training seeds and the 102 held-out scenes; three seeds are few
for it, so each seed's own difference is given too.

``score`` tells a second thing, thought of when networks of this size were seen to draw colours in
their places but no whole shapes, so that the first says little: whether a network *tells* the right
caption from a wrong one, by which of the two it takes the noise better out of a picture (as
diffusion classifiers do). 204 pictures that were held out, 16 timesteps and noises each, the same
for every network and caption; wrong captions have the colours exchanged, the shapes exchanged (or
one of them another, where both are the same), or the relation turned round. Chance is a half.

A run that was stopped goes on where it last saved. ``seconds`` in the log are the process's own CPU
time, which a busy machine falsifies least.

``cost``: FLOPs and throughput at the published sizes
-----------------------------------------------------
U-ViT-S/2 (13 blocks) and U-ViT-S/2-Deep (17), width 512, 1 + 77 + 256 tokens. Early fusion against
text in the central 1, 3 and 5 blocks, by concatenation and by cross-attention; and beside them
early fusion in the published code's way, re-implemented: q, k and v cast to float32 for the
attention (under autocast), AdamW that is not fused, nothing compiled. (Its time token is ours too,
since the weights are the same.) Of the networks that ``--compile`` names, early fusion and one
central block by torch.compile are further methods in the same rounds. FLOPs are counted by torch
with attention as plain matrix products, forward for inference, forward and backward for training. A
training step is forward, backward and AdamW. Every round runs each method once in a new order,
ratios are taken within a round, and reported are their median and 10-90 % range. On a CPU one
thread and the process's own CPU time, on a GPU time; at most ``--seconds`` for a setting, though 5
rounds at least. Two kinds of ratio: fusion at equal implementation, and implementation at equal
fusion; "both" is measured, not multiplied. One command writes the whole file, and the table beside
it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timing
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

import world  # noqa: E402
from codec import SCALE, Codec  # noqa: E402

from uvit.config import UViTConfig, central  # noqa: E402
from uvit.diffusion import TIMESTEPS, noise_levels  # noqa: E402
from uvit.files import metadata_of, read_config  # noqa: E402
from uvit.network import UViT, plain_attention  # noqa: E402

BLOCKS, WIDTH = 7, 128
STEPS, FALL = 3000, 600
CODEC = ROOT / "demo" / "taca_demo_codec.safetensors"


def config_of(shared: int) -> UViTConfig:
    """The network whose central ``shared`` blocks see the text."""
    first, last = central(BLOCKS, shared)
    return UViTConfig(BLOCKS, WIDTH, 16, world.SIZE // 4, 2, world.TOKENS, 64, first, last)


def draw_pool(codec: Codec, per_caption: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures of every caption to train on, as the network's latents, and their token ids."""
    captions = world.captions("train") * per_caption
    rng = np.random.default_rng(seed)
    latents = []
    for start in range(0, len(captions), 5100):
        pictures = np.stack([world.render(caption, rng) for caption in captions[start:][:5100]])
        latents.append((SCALE * codec.encode(torch.from_numpy(pictures))).half())
    tokens = torch.from_numpy(np.stack([world.encode(caption) for caption in captions]))
    return torch.cat(latents), tokens


def optimisers_of(network: UViT, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest."""
    matrices, others = [], []
    for name, weight in network.named_parameters():
        is_matrix = "_block" in name and weight.ndim == 2
        (matrices if is_matrix else others).append(weight)
    return [
        torch.optim.AdamW(others, lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
        torch.optim.Muon(matrices, lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
    ]


def train(arguments: argparse.Namespace) -> None:
    """Train one network to the last step; see the module's recipe."""
    torch.set_num_threads(arguments.threads)
    config = config_of(arguments.shared)
    run = f"shared-{arguments.shared}-seed-{arguments.seed}"
    name = f"{run}-steps-{arguments.steps}"
    folder = arguments.work
    folder.mkdir(parents=True, exist_ok=True)
    log, checkpoint = folder / f"{name}.jsonl", folder / f"{name}.pt"
    constant = arguments.steps - FALL  # as many steps as a longer run has too

    codec = Codec.load(CODEC)
    pool, tokens = draw_pool(codec, arguments.pool, arguments.seed)
    network = UViT(config).initialise(torch.Generator().manual_seed(arguments.seed))
    optimisers = optimisers_of(network, arguments.lr)
    average = {key: weight.clone() for key, weight in network.named_parameters()}
    signal, noise_share = noise_levels()
    done, seconds = 0, 0.0
    begun = {
        int(path.stem.rpartition("-")[2]): path for path in folder.glob(f"{run}-constant-*.pt")
    }
    start_from = max((steps for steps in begun if steps <= constant), default=0)
    saved = checkpoint if checkpoint.exists() else begun.get(start_from)
    if saved is not None:
        state = torch.load(saved, weights_only=True)
        network.load_state_dict(state["network"])
        average, done, seconds = state["average"], state["step"], state["seconds"]
        for optimiser, kept_state in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(kept_state)

    def loss_of(x: Tensor, noise: Tensor, t: Tensor, context: Tensor) -> Tensor:
        a, s = (level[t - 1][:, None, None, None] for level in (signal, noise_share))
        with torch.autocast("cpu", torch.bfloat16):
            predicted = network(a * x + s * noise, t, context)
        return (predicted.float() - noise).square().mean()

    start, total = time.process_time() - seconds, 0.0
    for step in range(done + 1, arguments.steps + 1):
        lr = arguments.lr * min(1.0, step / arguments.warmup, (arguments.steps - step) / FALL)
        for group in itertools.chain(*(optimiser.param_groups for optimiser in optimisers)):
            group["lr"] = lr
        # A step's own generator: the same draws whatever the fusion, and when resumed.
        drawn = torch.Generator().manual_seed(arguments.seed * 1_000_003 + step)
        chosen = torch.randint(len(pool), (arguments.batch,), generator=drawn)
        t = torch.randint(1, TIMESTEPS + 1, (arguments.batch,), generator=drawn)
        kept = torch.rand(arguments.batch, 1, generator=drawn) >= arguments.dropout
        x = pool[chosen].float()
        noise = torch.randn(x.shape, generator=drawn)
        loss = loss_of(x, noise, t, codec.embed(tokens[chosen] * kept))
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        total += loss.item()
        decay = min(arguments.ema, step / (step + 10))
        with torch.no_grad():
            for key, weight in network.named_parameters():
                average[key].lerp_(weight, 1 - decay)

        if step % 100 == 0:
            seconds = time.process_time() - start
            record = {"step": step, "seconds": round(seconds), "loss": round(total / 100, 5)}
            total = 0.0
            print(json.dumps(record), flush=True)
            with log.open("a") as file:
                file.write(json.dumps(record) + "\n")
        if step % 200 == 0 or step in (constant, arguments.steps):
            seconds = time.process_time() - start
            state = {"network": network.state_dict(), "average": average, "step": step}
            state |= {"seconds": seconds, "optimisers": [o.state_dict() for o in optimisers]}
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
            if step == constant:
                shutil.copy(checkpoint, folder / f"{run}-constant-{constant}.pt")

    weights = {**network.state_dict(), **average}
    metadata = metadata_of(
        config, SCALE, steps=arguments.steps, batch=arguments.batch, seed=arguments.seed,
        cpu_seconds=round(seconds), shared=arguments.shared,
    )  # fmt: skip
    save_file({k: w.contiguous() for k, w in weights.items()}, folder / f"{name}.safetensors",
              metadata)  # fmt: skip
    print(f"Saved {folder / name}.safetensors")


@torch.no_grad()
def sample(network: UViT, codec: Codec, captions: list[str], seed: int, steps: int,
           cfg: float) -> np.ndarray:  # fmt: skip
    """Draw a picture of each caption by DDIM: ``(captions, 64, 64, 3)``.

    A caption's noise depends on the seed and its place among the captions alone.
    """
    tokens = torch.from_numpy(np.stack([world.encode(caption) for caption in captions]))
    context = codec.embed(torch.cat([tokens, torch.zeros_like(tokens)]))
    side = network.config.side
    x = torch.randn(len(captions), 16, side, side, generator=torch.Generator().manual_seed(seed))
    signal, noise_share = noise_levels()
    times = torch.linspace(TIMESTEPS, 1, steps).round().long().tolist()
    for t, following in itertools.zip_longest(times, times[1:]):
        predicted = network(x.repeat(2, 1, 1, 1), torch.full((2 * len(x),), t), context)
        positive, negative = predicted.chunk(2)
        noise = negative + cfg * (positive - negative)
        x0 = (x - noise_share[t - 1] * noise) / signal[t - 1]
        x = x0 if following is None else signal[following - 1] * x0 + noise_share[
            following - 1
        ] * noise  # fmt: skip
    return codec.decode(x / SCALE).numpy()


TOLD = ("colour", "shape", "relation", "all three")


def wrong(caption: str) -> list[str]:
    """The caption with the colours, the shapes and the relation wrong."""
    scene = world.parse(caption)

    def exchanged(what: str, every: Sequence[str]) -> world.Scene:
        one, other = getattr(scene.first, what), getattr(scene.second, what)
        if one == other:
            other = every[(every.index(one) + 1) % len(every)]
            return scene._replace(first=scene.first._replace(**{what: other}))
        return scene._replace(
            first=scene.first._replace(**{what: other}),
            second=scene.second._replace(**{what: one}),
        )

    turned = scene.mirrored().relation
    return [
        str(exchanged("colour", list(world.COLOURS))),
        str(exchanged("shape", world.SHAPES)),
        str(scene._replace(relation=turned)),
    ]


@torch.no_grad()
def tells(network: UViT, codec: Codec, captions: list[str], draws: int = 16) -> np.ndarray:
    """Whether each caption explains its picture better than wrong ones: ``(captions, TOLD)``."""
    rng = np.random.default_rng(0)
    pictures = np.stack([world.render(caption, rng) for caption in captions])
    x = SCALE * codec.encode(torch.from_numpy(pictures))
    told = [captions, *zip(*map(wrong, captions), strict=True)]
    contexts = [
        codec.embed(torch.from_numpy(np.stack([world.encode(one) for one in each])))
        for each in told
    ]
    signal, noise_share = noise_levels()
    drawn = torch.Generator().manual_seed(0)
    loss = torch.zeros(len(contexts), len(captions))
    for i in range(draws):
        t = round((i + 0.5) * TIMESTEPS / draws)
        noise = torch.randn(x.shape, generator=drawn)
        noisy = signal[t - 1] * x + noise_share[t - 1] * noise
        for each, context in zip(loss, contexts, strict=True):
            predicted = network(noisy, torch.full((len(x),), t), context)
            each += (predicted - noise).square().mean((1, 2, 3))
    right = (loss[0] < loss[1:]).T
    return torch.cat((right, right.all(1, keepdim=True)), 1).numpy()


def load(path: Path) -> tuple[UViT, dict[str, Any]]:
    """A trained network and what its file says of it."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    network = UViT(read_config(state, metadata, path.name)[0])
    network.load_state_dict(state)
    return network.eval(), json.loads(metadata["uvit"])


def score(arguments: argparse.Namespace) -> None:
    """Judge networks on the captions that were held out, and compare them with the first."""
    torch.set_num_threads(arguments.threads)
    codec, captions = Codec.load(CODEC), world.captions("held-out")
    report: dict[str, Any] = {
        "captions": len(captions), "noises": arguments.noises, "ddim_steps": arguments.ddim_steps,
        "cfg": arguments.cfg, "networks": {}, "differences": {},
    }  # fmt: skip
    judged: dict[str, dict[int, np.ndarray]] = {}
    told: dict[str, dict[int, np.ndarray]] = {}
    for path in arguments.files:
        network, said = load(path)
        right = []
        for seed in range(arguments.noises):
            pictures = sample(network, codec, captions, seed, arguments.ddim_steps, arguments.cfg)
            checks = [world.check(*pair) for pair in zip(pictures, captions, strict=True)]
            right.append([[check[key] for key in world.CRITERIA] for check in checks])
        name = "early" if said["shared"] == BLOCKS else f"central {said['shared']}"
        name += f", {said['steps']} steps"
        of_seed = np.array(right, dtype=float)  # (noises, captions, criteria)
        judged.setdefault(name, {})[said["seed"]] = of_seed
        knows = tells(network, codec, captions)[None].astype(float)
        told.setdefault(name, {})[said["seed"]] = knows
        report["networks"][path.stem] = {
            "training": said,
            "right": shares_of(world.CRITERIA, of_seed),
            "tells": shares_of(TOLD, knows),
        }
        print(path.stem, report["networks"][path.stem], flush=True)
    first = next(iter(judged))
    for name in list(judged)[1:]:
        seeds = sorted(judged[name].keys() & judged[first].keys())
        found = {
            "seeds": seeds,
            "right": paired(world.CRITERIA, judged[name], judged[first], seeds),
            "tells": paired(TOLD, told[name], told[first], seeds),
        }
        report["differences"][f"{name}, minus {first}"] = found
        print(name, "minus", first, found)
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


def shares_of(criteria: Sequence[str], of_seed: np.ndarray) -> dict[str, float]:
    """The share that is right ``(noises, captions, criteria)``, by criterion."""
    return dict(zip(criteria, of_seed.mean((0, 1)).round(4).tolist(), strict=True))


def paired(criteria: Sequence[str], ours: dict[int, np.ndarray], theirs: dict[int, np.ndarray],
           seeds: list[int], draws: int = 10_000) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Differences in points, by criterion: mean, 95 % interval, by seed.

    Of ``(noises, captions, criteria)`` for each training seed. Captions come in pairs that tell the
    same scene, which are drawn together; so are all pictures of a training seed.
    """
    difference = np.stack([ours[seed] - theirs[seed] for seed in seeds])
    scenes = 100 * difference.mean(1).reshape(len(difference), -1, 2, difference.shape[3]).mean(2)
    rng = np.random.default_rng(0)
    means = np.empty((draws, scenes.shape[2]))
    for i in range(draws):
        seeds = rng.integers(scenes.shape[0], size=scenes.shape[0])
        chosen = rng.integers(scenes.shape[1], size=scenes.shape[1])
        means[i] = scenes[seeds][:, chosen].mean((0, 1))
    interval = np.quantile(means, (0.025, 0.975), axis=0).round(2)
    return {
        what: {
            "mean": round(float(scenes[:, :, i].mean()), 2),
            "interval": interval[:, i].tolist(),
            "by_seed": scenes[:, :, i].mean(1).round(2).tolist(),
        }
        for i, what in enumerate(criteria)
    }


PUBLISHED = {"small": 13, "deep": 17}
CENTRAL = (1, 3, 5)
COMPILED = ("early", "central 1")  # compiling takes longer than all else


def published_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, **_: Any) -> Tensor:
    """As the published code: in float32, whatever autocast says."""
    q, k, v = (x.float() for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        return plain_attention(q, k, v, heads)


def published_config(blocks: int, shared: int, conditioning: str) -> UViTConfig:
    """The published network, where ``shared`` central blocks see the text."""
    first, last = central(blocks, shared)
    return UViTConfig(blocks, first=first, last=last, conditioning=conditioning)


def network_of(config: UViTConfig, published: bool) -> UViT:
    """A new network."""
    attention = published_attention if published else plain_attention
    return UViT(config, attention).initialise(torch.Generator().manual_seed(0))


def inputs_of(
    config: UViTConfig, batch: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Seeded latents, timesteps and prompts."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, config.channels, config.side, config.side, generator=generator)
    t = torch.randint(1, TIMESTEPS + 1, (batch,), generator=generator)
    context = torch.randn(batch, config.text_tokens, config.text_width, generator=generator)
    return x.to(device), t.to(device), context.to(device)


def flops_of(config: UViTConfig, backward: bool) -> int:
    """Of one picture, attention counted as matrix products. Nothing is computed."""
    network = UViT(config, device="meta")
    given = inputs_of(config, 1, torch.device("meta"))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = network(*given).square().mean()
        if backward:
            loss.backward()
    return counter.get_total_flops()


def work_of(network: UViT, what: str, batch: int, published: bool, compiled: bool,
            device: torch.device) -> Callable[[], None]:  # fmt: skip
    """One training step, or one call, of a network."""
    network = network.to(device)
    x, t, context = inputs_of(network.config, batch, device)
    call = torch.compile(network, dynamic=False) if compiled else network
    reduced = torch.autocast(device.type, torch.bfloat16)

    def inference() -> None:
        with torch.no_grad(), reduced:
            call(x, t, context)

    if what == "inference":
        return inference
    optimiser = torch.optim.AdamW(
        network.parameters(), 2e-4, betas=(0.9, 0.9), weight_decay=0.03,
        **({} if published else {"fused": True}),
    )  # fmt: skip

    def training() -> None:
        with reduced:
            predicted = call(x, t, context)
        (predicted.float() - x).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()

    return training


def seconds_of(function: Callable[[], None], device: torch.device) -> float:
    """How long a call takes; on a CPU its own CPU time."""
    if device.type == "cuda":
        return timing.seconds(function, device)
    start = time.process_time()
    function()
    return time.process_time() - start


def spread(values: list[float]) -> list[float]:
    """Median, 10 % and 90 % quantile."""
    return np.quantile(values, (0.5, 0.1, 0.9)).round(3).tolist()


FEWEST_ROUNDS = 5


def cost(arguments: argparse.Namespace) -> None:
    """FLOPs and throughput; see the module's head."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    report: dict[str, Any] = {
        "environment": timing.environment(device, "cpu"), "note": arguments.note,
        "rounds": arguments.rounds, "compiled": arguments.compile, "flops": {}, "throughput": {},
    }  # fmt: skip
    file = arguments.out
    if file is None and arguments.rounds:
        file = timing.RESULTS / f"fusion-cost-{timing.slug_of(device)}.json"
    for name, conditioning in itertools.product(arguments.networks, arguments.conditionings):
        blocks = PUBLISHED[name]
        rows = {}
        for shared in (blocks, *CENTRAL[::-1]):
            config = published_config(blocks, shared, conditioning)
            rows[shared] = [flops_of(config, backward) / 1e9 for backward in (False, True)]
        report["flops"][f"{name}, {conditioning}"] = {
            "early" if k == blocks else f"central {k}": {
                "inference_gflops": round(forward, 2), "training_gflops": round(both, 2),
                "saved_percent": round(100 * (1 - both / rows[blocks][1]), 1),
            }
            for k, (forward, both) in rows.items()
        }  # fmt: skip
        print(name, conditioning, json.dumps(report["flops"][f"{name}, {conditioning}"], indent=1))
    if arguments.rounds:
        for setting in itertools.product(
            arguments.networks, arguments.conditionings, arguments.batches, arguments.what
        ):
            label = "{}, {}, batch {}, {}".format(*setting)
            report["throughput"][label] = throughput(*setting, arguments, device)
            print(label, json.dumps(report["throughput"][label], indent=1), flush=True)
    if file:
        file.write_text(json.dumps(report, indent=1) + "\n")
        file.with_suffix(".md").write_text(cost_table(report), encoding="utf-8")
        print(f"Saved {file} and {file.with_suffix('.md').name}")


def throughput(name: str, conditioning: str, batch: int, what: str, arguments: argparse.Namespace,
               device: torch.device) -> dict[str, Any]:  # fmt: skip
    """Pictures a second of every method, and ratios within rounds."""
    blocks, published = PUBLISHED[name], "early, published way"
    if arguments.compile:
        torch.compiler.reset()  # its limit of recompilations is for one setting
    fusions = {"early": blocks} | {f"central {k}": k for k in CENTRAL}
    methods = {fusion: (shared, False, False) for fusion, shared in fusions.items()}
    if conditioning == "concatenation":
        methods[published] = (blocks, True, False)
    if name in arguments.compile:
        methods |= {f"{fusion}, compiled": (fusions[fusion], False, True) for fusion in COMPILED}
    works = {
        method: work_of(
            network_of(published_config(blocks, shared, conditioning), is_published),
            what,
            batch,
            is_published,
            is_compiled,
            device,
        )
        for method, (shared, is_published, is_compiled) in methods.items()
    }
    for work in works.values():
        work()
    times: dict[str, list[float]] = {method: [] for method in works}
    order = np.random.default_rng(0)
    started = time.monotonic()
    for done in range(arguments.rounds):
        if done >= FEWEST_ROUNDS and time.monotonic() - started > arguments.seconds:
            break
        for i in order.permutation(len(works)):
            method = list(works)[i]
            times[method].append(seconds_of(works[method], device))

    def ratios(slow: str, suffix: str = "", same: bool = False) -> dict[str, list[float]]:
        """Of one method to every fusion's, or with ``same`` to its own, where they were timed."""
        pairs = {fusion: (slow, f"{fusion}{suffix}") for fusion in fusions}
        if same:
            pairs = {fusion: (fusion, f"{fusion}{suffix}") for fusion in fusions}
        return {
            fusion: spread([a / b for a, b in zip(times[one], times[other], strict=True)])
            for fusion, (one, other) in pairs.items()
            if one in times and other in times and one != other
        }

    return {
        "rounds": len(times["early"]),
        "pictures_per_second": {m: round(batch / float(np.median(v)), 3) for m, v in times.items()},
        "fusion_at_equal_implementation": ratios("early"),
        "fusion_at_equal_implementation, compiled": ratios("early, compiled", ", compiled"),
        "implementation_at_equal_fusion": {
            "ours": ratios(published).get("early"),
            "ours, compiled": ratios(published, ", compiled").get("early"),
        },
        "compiled_at_equal_fusion": ratios("", ", compiled", same=True),
        "both": ratios(published),
        "both, compiled": ratios(published, ", compiled"),
    }


def cost_table(report: dict[str, Any]) -> str:
    """FLOPs saved and ratios as Markdown."""

    def cell(found: list[float] | None) -> str:
        return "{:.3f} ({:.3f}-{:.3f})".format(*found) if found else ""

    lines = [
        "# Early against intermediate fusion: cost", "", timing.said(report["environment"]), "",
        "Speed; early fusion = 1, in the columns \"both\" the published way of it, in the last one "
        "the same uncompiled. Medians and 10-90 % of the rounds.", "",
        "| setting | text in | FLOPs saved | rounds | fusion alone | both | fusion alone, compiled "
        "| both, compiled | compiled |", "|---|" + "---|" * 8,
    ]  # fmt: skip
    for setting, found in report["throughput"].items():
        flops = report["flops"][setting.partition(", batch")[0]]
        for fusion in ("early", *(f"central {k}" for k in CENTRAL)):
            kinds = ("fusion_at_equal_implementation", "both",
                     "fusion_at_equal_implementation, compiled", "both, compiled",
                     "compiled_at_equal_fusion")  # fmt: skip
            cells = [cell(found[kind].get(fusion)) for kind in kinds]
            saved = f"{flops[fusion]['saved_percent']} %"
            lines.append(
                f"| {setting} | {fusion} | {saved} | {found['rounds']} | {' | '.join(cells)} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the command line and run one of the parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(required=True)
    part = parts.add_parser("train", help="one network on the demo's world")
    part.set_defaults(run=train)
    part.add_argument("--shared", type=int, required=True, help="central blocks with text; 7: all")
    part.add_argument("--steps", type=int, default=STEPS)
    part.add_argument("--batch", type=int, default=32)
    part.add_argument("--lr", type=float, default=1e-3)
    part.add_argument("--warmup", type=int, default=200, help="steps")
    part.add_argument("--ema", type=float, default=0.998)
    part.add_argument("--dropout", type=float, default=0.1, help="share of empty captions")
    part.add_argument("--pool", type=int, default=60, help="pictures per caption")
    part.add_argument("--threads", type=int, default=1)
    part.add_argument("--seed", type=int, default=0)
    part.add_argument("--work", type=Path, default=Path(".dev/fusion"), help="log, checkpoint")

    part = parts.add_parser("score", help="trained networks by the demo's checker")
    part.set_defaults(run=score)
    part.add_argument("files", type=Path, nargs="+", help="the first is what others compare with")
    part.add_argument("--noises", type=int, default=3)
    part.add_argument("--ddim-steps", type=int, default=50)
    part.add_argument("--cfg", type=float, default=3.0)
    part.add_argument("--threads", type=int, default=1)
    part.add_argument("--out", type=Path)

    part = parts.add_parser("cost", help="FLOPs and throughput at the published sizes")
    part.set_defaults(run=cost)
    part.add_argument("--networks", nargs="+", choices=PUBLISHED, default=list(PUBLISHED))
    kinds = ["concatenation", "cross-attention"]
    part.add_argument("--conditionings", nargs="+", choices=kinds, default=kinds)
    part.add_argument("--batches", type=int, nargs="+", default=[1])
    part.add_argument("--what", nargs="+", default=["training", "inference"])
    part.add_argument("--rounds", type=int, default=5, help="0: FLOPs only")
    part.add_argument("--seconds", type=float, default=float("inf"), help="most for a setting")
    part.add_argument("--compile", nargs="*", choices=PUBLISHED, default=[],
                      help="networks that are timed by torch.compile too")  # fmt: skip
    part.add_argument("--note", default="", help="about the machine, for the record")
    part.add_argument("--out", type=Path, help="JSON; by default among the results")

    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
