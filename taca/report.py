"""What attention does in a run: how much of it goes to text, and where each word gets it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import Tensor

from .arguments import CallArguments, run_arguments, with_callback
from .block import joint_forward
from .block_ranges import short
from .compiler import uncompiled_calls
from .events import Events
from .families import family_of, part_of, uncompiled
from .probe import Pair, Probe
from .prompt_calls import Prompts, conditionings_of, positive_rows
from .run import TacaConfig, config_of
from .schedule import NEVER, ResolvedSchedule, Schedule
from .swap import Swap, swapped
from .timesteps import resolver, timesteps_tensor
from .word_maps import Place, joined, place_of
from .words import RunWords


class Asked(NamedTuple):
    """The words of a report, and the conditioning they belong to."""

    words: Mapping[str, list[int]]  # word -> its tokens in the conditioning
    num_tokens: int | None = None  # of the conditioning of the prompt that they are of
    encode: Callable[[], Tensor] | None = None  # encodes that prompt again
    carrying: frozenset[Any] | None = None  # uuids of the conditionings that carry these words


@dataclass
class Report:
    """What the last run showed; ``watched`` fills it in."""

    ask: Callable[[Any], Asked]  # of a run's guider
    asked: Asked = field(default_factory=lambda: Asked({}))  # of the run
    config: TacaConfig = field(default_factory=lambda: TacaConfig(Schedule(1.0)))  # of the run
    prompts: Prompts | None = None  # of the run
    run_words: RunWords | None = None  # those with weights in it
    schedule: ResolvedSchedule = NEVER  # of the run
    own: frozenset[Any] | None = None  # uuids of this prompt's conditionings, if there are others
    blocks: list[str] = field(default_factory=list)  # names of the joint blocks
    events: Events = field(default_factory=Events)  # of the run
    # (steps that had ended, t, block) -> what its probe measured in each call
    shares: dict[tuple[int, float, int], list[Pair]] = field(default_factory=dict)
    # Of each call and block ``(words, rows, columns)``, and where its latents lie in the run's.
    maps: list[Tensor] = field(default_factory=list)
    places: list[Place | None] = field(default_factory=list)
    whole: torch.Size = field(default_factory=torch.Size)  # of the run's latents
    # t, the positive prompt's conditionings, and their latents and text, of each call since t last
    # changed.
    asked_at: list[tuple[float, frozenset[Any], list[Tensor]]] = field(default_factory=list)

    def is_again(self, t: float, whose: frozenset[Any], given: list[Tensor]) -> bool:
        """Whether this was asked before, as by a guidance that then leaves out layers."""
        self.asked_at = [each for each in self.asked_at if each[0] == t]
        again = any(whose & own and _are_equal(given, each) for _, own, each in self.asked_at)
        self.asked_at.append((t, whose, given))
        return again

    def table(self) -> Tensor:
        """Shares ``(2, steps, blocks)``: without TACA and with; NaN where nothing was seen."""
        shares: dict[tuple[int, int], list[Pair]] = {}
        for (ended, t, block), pairs in self.shares.items():
            shares.setdefault((self.events.step_of(ended, t), block), []).extend(pairs)
        steps = 1 + max((step for step, _ in shares), default=-1)
        table = torch.full((2, steps, len(self.blocks)), torch.nan)
        for (step, block), pairs in shares.items():
            table[:, step, block] = torch.tensor(pairs).mean(0)
        return table

    def begin(self, guider: Any) -> None:
        """Clear what the run before has left."""
        self.asked = self.ask(guider)
        self.config = config_of(guider.model_patcher) or TacaConfig(Schedule(1.0))
        self.shares.clear()
        self.maps.clear()
        self.places.clear()
        self.asked_at.clear()

    def add(
        self,
        moment: tuple[int, float, int],
        places: list[Place | None],
        shares: Pair,
        maps: Tensor | None,
    ) -> None:
        """Keep what a probe measured: ``moment`` as in ``shares``, the place of each row."""
        self.shares.setdefault(moment, []).append(shares)
        if maps is not None:
            for place in dict.fromkeys(places):
                rows = [i for i, own in enumerate(places) if own == place]
                self.maps.append(maps[rows].mean(0))
                self.places.append(place)

    def word_maps(self) -> list[tuple[Tensor, bool]]:
        """Attention to each word ``(words, rows, columns)``, and whether of the whole picture.

        First that of the whole picture, NaN where no call saw it; then of parts of it whose place
        is not known, by their size.
        """
        known, parts = list[tuple[Tensor, Place]](), dict[torch.Size, list[Tensor]]()
        for each, place in zip(self.maps, self.places, strict=True):
            if place:
                known.append((each, place))
            else:
                parts.setdefault(each.shape, []).append(each)
        whole = [(joined(known, self.whole), True)] if known else []
        sizes = sorted(parts, reverse=True)
        return [*whole, *((torch.stack(parts[size]).mean(0), False) for size in sizes)]


def watched(model: ModelPatcher, report: Report) -> ModelPatcher:
    """A clone of a model, with TACA or without, whose runs fill a report."""
    patched = model.clone()
    patched.add_wrapper(WrappersMP.OUTER_SAMPLE, partial(_watch_run, report))
    transformer = uncompiled(patched.get_model_object("diffusion_model"))
    report.blocks += [
        f"{short(name)} {i}"
        for name in family_of(transformer).joint
        for i in range(len(part_of(transformer, name)))
    ]
    # First, so that it is around TACA's own: what it puts on a block is then inside of TACA's.
    wrappers = patched.wrappers.setdefault(WrappersMP.APPLY_MODEL, {})
    ours = [*wrappers.pop("taca_report", []), partial(_watch_call, report)]
    patched.wrappers[WrappersMP.APPLY_MODEL] = {"taca_report": ours, **wrappers}
    return patched


def _watch_run(report: Report, executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Tensor:
    """ComfyUI's OUTER_SAMPLE wrapper: find the prompt among combined ones."""
    guider, given = executor.class_obj, run_arguments(args, kwargs)
    if comfy.model_management.in_training:
        return executor(*args, **kwargs)
    report.begin(guider)
    _, num_tokens, encode, carrying = report.asked
    report.own = carrying or conditionings_of(guider, num_tokens, encode)
    report.prompts = Prompts(
        guider, len(given["noise"]), report.config.options.conditionings(guider)
    )
    resolved = resolver(guider.model_patcher, given["sigmas"], given["latent_shapes"][0])
    report.schedule = resolved(report.config.schedule)
    report.whole = given["latent_shapes"][0]
    report.run_words = RunWords.of(report.prompts, resolved)
    sampling = guider.model_patcher.get_model_object("model_sampling")
    report.events = Events(timesteps_tensor(sampling, given["sigmas"])[:-1].tolist())
    args, kwargs = with_callback(args, kwargs, report.events.counted(given.get("callback")))
    try:
        return executor(*args, **kwargs)
    finally:
        # Otherwise a reference cycle would keep the guider and its models alive.
        report.prompts = report.run_words = None
        report.asked_at.clear()


def _watch_call(report: Report, executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Tensor:
    """ComfyUI's APPLY_MODEL wrapper: a measuring override in every joint block."""
    if comfy.model_management.in_training:
        return executor(*args, **kwargs)
    base_model, call = executor.class_obj, CallArguments.of(*args, **kwargs)
    positive = positive_rows(call, report.prompts, report.own).nonzero().flatten()
    t = timesteps_tensor(base_model.model_sampling, call.t)
    given = [each[positive] for each in (call.x, call.c_crossattn) if each is not None]
    rows = report.prompts.of_rows(call) if report.prompts else [[]] * len(call.t)
    own_rows = [[each for _, each in rows[i]] for i in positive.tolist()]
    whose = frozenset(each["uuid"] for row in own_rows for each in row)
    if not len(positive) or report.is_again(float(t.max()), whose, given):
        return executor(*args, **kwargs)
    report.events.begin_call((), t.tolist())
    transformer = uncompiled(base_model.diffusion_model)
    family, options = family_of(transformer), report.config.options
    gamma = report.schedule.gamma_at(t).to(call.t.device)
    gamma = options.limit(gamma, call, transformer, report.prompts)
    repeats = report.prompts.repeats(call, report.own) if report.prompts else 1
    num_asked = report.asked.num_tokens
    num_prompt = call.num_text if num_asked is None else num_asked * repeats
    extra = family.extra_text_of(transformer, num_prompt, call)
    text = extra.places(num_prompt, repeats, is_whole=num_asked is None)
    shapes = call.others.get("latent_shapes") or [call.x.shape]
    grid = family.grid(transformer, shapes[0])
    report.whole = report.whole or shapes[0]  # there is none outside a run
    window = call.transformer_options.get("context_window")
    areas = ([each.get("area") for each in row] or [None] for row in own_rows)
    where = [place_of(shapes[0], report.whole, window, own) for own in areas]
    moment = len(report.events.ended), float(t.max())
    adjusted = {block.module for block in family.joint_blocks(transformer, options.blocks)}
    index = {block.module: i for i, block in enumerate(family.joint_blocks(transformer))}
    words = report.run_words and report.run_words.of_call(call, t.tolist(), transformer)
    state = call.initial_state()
    swaps: list[Swap] = []
    for block in family.observed_blocks(transformer):
        own = gamma if block.module in adjusted else torch.ones_like(gamma)
        at = (*moment, index.get(block.module, -1))  # -1: no joint attention to measure
        places = partial(family.own_places, transformer, grid)
        is_last, found = family.own_image == "last", partial(report.add, at, where)
        asked = report.asked.words
        probe = Probe(asked, own, words or None, positive, places, is_last, text, found)
        wrap = partial(joint_forward, block=block, state=state, override=probe.override, traces=[])
        swaps.append((block.module, "forward", wrap))
    with swapped(swaps), uncompiled_calls:
        return executor(*args, **kwargs)


def _are_equal(first: list[Tensor], second: list[Tensor]) -> bool:
    pairs = zip(first, second, strict=False)
    return all(a.device == b.device and torch.equal(a, b) for a, b in pairs)
