"""What attention does in a run: how much of it goes to text, and where each word gets it.

Attention is linear in V: the same attention call, with V replaced by columns that are 1 at some
tokens and 0 elsewhere, returns how much of each query's attention goes to those tokens. So it works
with any kernel, no n x n matrix is built, and a sample of the image queries is enough.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import Tensor

from .arguments import CallArguments, run_arguments, with_callback
from .attention import scale_text_keys
from .block import AFTER_HEADS, Trace, joint_forward
from .block_ranges import short
from .compiler import uncompiled_calls
from .events import Events
from .families import family_of, part_of, uncompiled
from .layouts import TextPlaces
from .prompt_calls import Prompts, conditionings_of, positive_rows
from .run import TacaConfig, config_of
from .schedule import NEVER, ResolvedSchedule, Schedule
from .spans import Layout, Span, check_text
from .swap import Forward, Swap, swapped
from .timesteps import resolver, timesteps_tensor
from .word_weights import WordWeights, add_bias, image_bias
from .words import RunWords

QUERIES = 1024
"""The largest number of image queries that are measured, evenly over the picture."""
FRAMES = 4
"""The largest number of a video's frames that are measured."""


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
    # (steps that had ended, t, block) -> for each call the share of the image queries' attention
    # that goes to text, without TACA and as the run had it
    shares: dict[tuple[int, float, int], list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    # (words, rows, columns) for each call and block: the attention that each place of the picture
    # pays to each word, averaged over heads and frames, as the run had it. An area of the picture
    # or a tile has a size of its own.
    maps: list[Tensor] = field(default_factory=list)
    # t, and the positive prompt's latents and text, of each call since t last changed.
    asked_at: list[tuple[float, list[Tensor]]] = field(default_factory=list)

    def is_again(self, t: float, given: list[Tensor]) -> bool:
        """Whether this was asked before, as by a guidance that then leaves out layers."""
        self.asked_at = [(at, each) for at, each in self.asked_at if at == t]
        again = any(_are_equal(given, each) for _, each in self.asked_at)
        self.asked_at.append((t, given))
        return again

    def table(self) -> Tensor:
        """Shares ``(2, steps, blocks)``: without TACA and with; NaN where nothing was seen."""
        shares: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
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
        self.asked_at.clear()

    def check_words(self, known: Collection[int], head_dim: int) -> None:
        """Raise ValueError if these words cannot be measured in one attention call.

        ``known`` are the prompt's tokens that are text in the model.
        """
        for word, indices in self.asked.words.items():
            if lacking := [i for i in indices if i not in known]:
                raise ValueError(
                    f"TACA Attention Report: {word!r} is text token {lacking[-1]}, counted from "
                    f"0, and the prompt has {len(known)}."
                )
        if len(self.asked.words) >= head_dim:
            raise ValueError(
                f"TACA Attention Report takes at most {head_dim - 1} words on this model: name "
                f"fewer than these {len(self.asked.words)}."
            )


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
    if not len(positive) or report.is_again(float(t.max()), given):
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
    moment = len(report.events.ended), float(t.max())
    adjusted = {block.module for block in family.joint_blocks(transformer, options.blocks)}
    index = {block.module: i for i, block in enumerate(family.joint_blocks(transformer))}
    words = report.run_words and report.run_words.of_call(call, t.tolist(), transformer)
    state = call.initial_state()
    swaps: list[Swap] = []
    for block in family.observed_blocks(transformer):
        own = gamma if block.module in adjusted else torch.ones_like(gamma)
        place = (*moment, index.get(block.module, -1))  # -1: no joint attention to measure
        places = partial(family.own_places, transformer, grid)
        is_last = family.own_image == "last"
        probe = Probe(report, own, words or None, place, positive, places, is_last, text)
        wrap = partial(joint_forward, block=block, state=state, override=probe.override, traces=[])
        swaps.append((block.module, "forward", wrap))
    with swapped(swaps), uncompiled_calls:
        return executor(*args, **kwargs)


def _are_equal(first: list[Tensor], second: list[Tensor]) -> bool:
    pairs = zip(first, second, strict=False)
    return all(a.device == b.device and torch.equal(a, b) for a, b in pairs)


@dataclass
class Probe:
    """What to measure in one block of one call, and where the results go."""

    report: Report
    gamma: Tensor  # of the call's rows, as in this block
    words: WordWeights | None  # of the call's rows
    place: tuple[int, float, int]  # as in ``Report.shares``
    rows: Tensor  # indices of the rows of the batch that are the positive prompt's
    own_places: Callable[[int], Tensor]  # as ``Family.own_places``
    is_last: bool  # whether they are in the last span of image tokens, and not the first
    text: TextPlaces

    def override(
        self,
        trace: Trace,
        layout: Layout,
        joint: tuple[int, int],
        other: Forward | None,
        func: Forward,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """An override like ``taca_override``: attends as before, then measures."""
        backend = func if other is None else partial(other, func)
        result = backend(q, k, v, heads, *args, **kwargs)
        kwargs.update(zip(AFTER_HEADS, args, strict=False))
        mask = kwargs.pop("mask", None)
        is_split = kwargs.get("skip_reshape", False)
        dim = 2 if is_split else 1
        num_kept = k.shape[dim] - joint[1]
        if q.shape[dim] == joint[0] and num_kept >= 0:
            layout = (*layout, Span("other", num_kept, is_query=False))
            if not is_split:
                head_dim = q.shape[-1] // heads
                q, k = (x.unflatten(-1, (-1, head_dim)).transpose(1, 2) for x in (q, k))
            how = {**kwargs, "skip_reshape": True, "skip_output_reshape": False}
            self.measure(partial(func, heads=heads, **how), q, k, mask, layout)
        return result

    def places(self, num_image: int) -> Tensor:
        """The image tokens to measure ``(frames, rows, columns)``, evenly over the picture."""
        places = self.own_places(num_image)
        places = places[:: -(-len(places) // FRAMES)]
        stride = 1
        while places[:, ::stride, ::stride].numel() > QUERIES:
            stride += 1
        return places[:, ::stride, ::stride]

    def measure(
        self, attend: Forward, q: Tensor, k: Tensor, mask: Tensor | None, layout: Layout
    ) -> None:
        """Measure the share of text, with plain and with adjusted keys, and the maps of words.

        q and k are ``(b, h, n, d)``.

        Raises ValueError if a word is outside the prompt, or there are more words than this model
        has channels for.
        """
        queries = [span for span in layout if span.is_query]
        starts = accumulate((span.length for span in queries), initial=0)
        images = [pair for pair in zip(queries, starts, strict=False) if pair[0].kind == "image"]
        image, start = images[-1 if self.is_last else 0]
        grid = self.places(image.length)
        places = (grid.flatten() + start).to(q.device)
        kinds = torch.cat([torch.full((length,), kind == "text") for kind, length, _ in layout])
        text = kinds.nonzero().flatten().to(q.device)
        words = {}
        if self.report.asked.words:
            check_text(layout, self.text.num_text)
            self.report.check_words(self.text.copies[0], k.shape[-1])
            words = {
                word: [copy[i] for copy in self.text.copies for i in at if i in copy]
                for word, at in self.report.asked.words.items()
            }
        rows = self.rows.to(q.device)
        q, k = q[rows].index_select(2, places), k[rows]
        gamma = self.gamma[rows] if len(self.gamma) > 1 else self.gamma
        if mask is not None:
            mask = mask[rows] if mask.ndim > 2 and mask.shape[0] > 1 else mask
            if mask.ndim > 1 and mask.shape[-2] != 1:
                mask = mask.index_select(-2, places)
        # In place of V: column 0 is all of the text, column i the i-th word.
        columns = torch.zeros_like(k)
        columns[:, :, text, 0] = 1
        for i, indices in enumerate(words.values(), 1):
            columns[:, :, text[indices], i] = 1

        def mass(keys: Tensor, mask: Tensor | None) -> Tensor:
            """Attention to each column ``(queries, d)``, averaged over rows and heads."""
            out = attend(q, keys, columns, mask=mask)  # (b, queries, h * d)
            return out.float().unflatten(-1, (-1, k.shape[-1])).mean((0, 2))

        plain = mass(k, mask)
        is_adjusted = bool((gamma != 1).any())
        keys, weighed = scale_text_keys(k, gamma, layout, 2) if is_adjusted else k, mask
        if self.words is not None:
            bias = image_bias(self.words.of_rows(rows), layout, q)
            weighed = bias if mask is None else add_bias(mask, bias)
        adjusted = plain if keys is k and weighed is mask else mass(keys, weighed)
        pair = (plain[:, 0].mean().cpu(), adjusted[:, 0].mean().cpu())
        self.report.shares.setdefault(self.place, []).append(pair)
        if words:
            maps = adjusted[:, 1 : len(words) + 1].T.unflatten(-1, grid.shape)
            self.report.maps.append(maps.mean(1).cpu())
