"""What a model is patched with, and the state of one sampling run."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import nn

from .block import Trace
from .compiler import Fallback
from .events import Events, Say, silent
from .families import JointBlock, family_of, part_of, uncompiled
from .lora import LoRA, loras_of
from .lora_forward import lora_swaps
from .options import NO_OPTIONS, Options
from .prompt_calls import Prompts
from .schedule import ResolvedSchedule, Schedule
from .swap import Swap
from .words import RunWords

PATCH_KEY = "taca"
"""The key of our wrappers and callbacks."""


@dataclass(frozen=True)
class TacaConfig:
    """What a model is patched with: when and how strongly TACA acts, and what limits gamma."""

    schedule: Schedule
    options: Options = NO_OPTIONS
    # Attention kernels that torch.compile could not trace, and why; see ``Fallback``.
    untraceable: dict[str, str] = field(default_factory=dict, compare=False)
    say: Say = field(default=silent, compare=False)


def config_of(patcher: ModelPatcher) -> TacaConfig | None:
    """What a model is patched with; None if it has no TACA."""
    wrappers = patcher.get_wrappers(WrappersMP.OUTER_SAMPLE, PATCH_KEY)
    return wrappers[0].args[0] if wrappers else None


class HookSites(NamedTuple):
    """Where TACA and its LoRAs act in one running model."""

    lists: dict[str, tuple[nn.Module, ...]]  # the model's lists of blocks when they were found
    blocks: list[JointBlock]  # blocks that get TACA, or only show where tokens are
    all_blocks: list[JointBlock]  # the same without limits: words weigh in every joint block
    refiners: list[JointBlock]  # blocks of text alone, which hide words to avoid from the prompt's
    adjusted: frozenset[nn.Module]  # modules that get TACA
    loras: list[LoRA]
    lora_swaps: Sequence[Swap]
    lora_trace: Trace  # whether any of their layers was called


@dataclass
class Run:
    """One sampling run; without a schedule, calls of the model outside any run."""

    config: TacaConfig
    schedule: ResolvedSchedule | None = None
    prompts: Prompts | None = None
    words: RunWords | None = None  # those that weigh
    events: Events = field(default_factory=Events)
    word_events: Events = field(default_factory=Events)
    # Whether each attention kernel takes masks, by name.
    takes_masks: dict[str, bool] = field(default_factory=dict)
    sites: dict[nn.Module, HookSites] = field(default_factory=dict)  # by model, one a device
    lora_calls: set[Any] = field(default_factory=set)  # conditionings whose last call had a LoRA
    caches_lora: bool = False  # whether ComfyUI's caches may hold what a LoRA made

    def __post_init__(self) -> None:
        self.fallback = Fallback(self.config.untraceable)

    def sites_of(self, base_model: BaseModel) -> HookSites:
        """Where TACA acts in a model.

        Found once a run, since with a LoRA that takes long, and again if a cache has replaced the
        model's blocks.
        """
        transformer = uncompiled(base_model.diffusion_model)
        known = self.sites.get(base_model)
        if known is not None and known.lists == _lists(transformer, known.lists):
            return known
        patcher = base_model.current_patcher  # of this device, in a run over several
        family, limit = family_of(transformer), self.config.options.blocks
        loras = loras_of(patcher) if patcher is not None else []
        trace = Trace()
        swaps = lora_swaps(loras, base_model, trace)
        # Each forward is wrapped once, and again if another pack has replaced it in the meantime.
        wraps = [
            (each, name, lru_cache(maxsize=1)(wrap) if name == "forward" else wrap)
            for each, name, wrap in swaps
        ]
        sites = HookSites(
            _lists(transformer, (*family.before, *family.joint)),
            family.observed_blocks(transformer, limit),
            family.observed_blocks(transformer),
            family.refiner_blocks(transformer),
            frozenset(block.module for block in family.joint_blocks(transformer, limit)),
            loras,
            wraps,
            trace,
        )
        if self.schedule is not None:  # nothing is kept on a patched model outside a run
            self.sites[base_model] = sites
        return sites


def _lists(transformer: nn.Module, names: Iterable[str]) -> dict[str, tuple[Any, ...]]:
    """The current lists of blocks of a model, by name."""
    return {name: tuple(part_of(transformer, name) or ()) for name in names}
