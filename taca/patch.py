"""TACA and its LoRA on a ComfyUI model: keyed wrappers, and what they install for one call."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any, NamedTuple

import comfy.model_management
import comfy.model_sampling
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from .attention import Tokens, attends_over, temperature_adjusted_attention
from .families import Locate, Seen, family_of, part_of, uncompiled
from .lora import LoRA, Target, Wrap, lora_forwards, lora_targets, patcher_of, remembering
from .options import NO_OPTIONS, Options
from .schedule import Resolved, Sampling, Schedule

KEY = "taca"
LORA_KEY = "taca_lora"
TRAINING_KEY = "taca_training"
OVERRIDE = "optimized_attention_override"

Lists = dict[str, tuple[nn.Module, ...]]

frame_callback: Callable[[], Any] = lambda: False  # noqa: E731
"""What dynamo does with the frames of this thread: None where nothing is being compiled.

Asked of the torch that was tested, and later ones; some older ones return a reference that is not
counted.
"""
if torch.__version__ >= "2.13":
    frame_callback = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", frame_callback)

log = logging.getLogger("taca")


@dataclass(frozen=True)
class Settings:
    """What a model is patched with: when and how strongly, and what limits it."""

    schedule: Schedule
    options: Options = NO_OPTIONS


class Places(NamedTuple):
    """Where TACA and its LoRAs act in one model that is running.

    Parameters
    ----------
    lists : dict
        Its lists of blocks as they were.
    blocks : dict
        The joint blocks of those.
    targets : list of Target
        Its LoRAs' modules.
    loras : list
        Those modules, and what their forwards become where all rows of a call are inside.
    """

    lists: Lists
    blocks: dict[nn.Module, Locate]
    targets: list[Target]
    loras: list[tuple[nn.Module, Wrap]]


@dataclass
class Run:
    """What one sampling run has shown so far.

    Parameters
    ----------
    ran : bool
        Whether a joint block with text ran inside the window.
    attended : bool
        Whether a joint attention reached TACA.
    missed : int
        Calls in which joint blocks ran inside the window and no attention reached TACA.
    eager : bool
        Whether the model's blocks turned out not to compile in one piece.
    schedule : Resolved, optional
        gamma over t in this run.
    places : dict
        For each model that ran (one a device): where TACA and its LoRAs act in it.
    """

    ran: bool = False
    attended: bool = False
    missed: int = 0
    eager: bool = False
    schedule: Resolved | None = None
    places: dict[nn.Module, Places] = field(default_factory=dict)


def patch_model(model: Any, schedule: Schedule, options: Options = NO_OPTIONS) -> Any:
    """A clone of the model that samples with TACA.

    Parameters
    ----------
    model : comfy.model_patcher.ModelPatcher
        Left as it is.
    schedule : Schedule
        gamma over t. A model that already has TACA gets this one instead.
    options : Options
        Limits of gamma.

    Raises
    ------
    ValueError
        If the model has no joint attention that TACA can reach, or no such blocks.
    """
    list(joint_blocks(model.get_model_object("diffusion_model"), options))
    patched = model.clone()
    settings = Settings(schedule, options)
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, partial(_watch_run, settings)),
        (WrappersMP.APPLY_MODEL, partial(_adjust_call, settings, Run())),
    ):
        patched.remove_wrappers_with_key(kind, KEY)
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    return patched


def patch_lora(model: Any, lora: LoRA) -> Any:
    """A clone of the model with a LoRA that is active inside its TACA window, and only there.

    Parameters
    ----------
    model : comfy.model_patcher.ModelPatcher
        Left as it is; with TACA already, or to get it later. Several LoRAs add up.
    lora : LoRA
        Fitted to this model.

    Raises
    ------
    ValueError
        If what the LoRA does inside the window would stay in the model outside.
    """
    family = family_of(model.get_model_object("diffusion_model"))
    if family.kept_keys:
        raise ValueError(
            f"TACA cannot keep a LoRA inside its window on {family.name}: ComfyUI keeps the keys "
            f"of this model's text from step to step and from run to run, and {lora.name} would "
            f"stay in them. Take out Load TACA LoRA; TACA Patch Model works without it."
        )
    early = tuple(f"diffusion_model.{part}." for part in family.before_run)
    idle = sum(f"{name}.".startswith(early) for name in lora.module_names)
    if idle:
        log.warning(
            "TACA: ComfyUI runs a part of %s once, before the run, where no window is: %d of the "
            "%d modules of %s have no effect there.",
            family.name, idle, len(lora.module_names), lora.name,
        )  # fmt: skip
    patched = model.clone()
    others = patched.get_additional_models_with_key(LORA_KEY)
    patched.set_additional_models(LORA_KEY, [*others, patcher_of(lora)])
    patched.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, LORA_KEY)
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, LORA_KEY, _require_taca)
    return patched


def settings_of(patcher: Any) -> Settings | None:
    """What a model that has TACA is patched with."""
    wrappers = patcher.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY)
    return wrappers[0].args[0] if wrappers else None


def loras_of(patcher: Any) -> list[LoRA]:
    """The TACA LoRAs of a model."""
    return [each.model for each in patcher.get_additional_models_with_key(LORA_KEY)]


def _require_taca(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Around one sampling run of a model with a TACA LoRA."""
    patcher = executor.class_obj.model_patcher
    names = ", ".join(lora.name for lora in loras_of(patcher))
    if settings_of(patcher) is None:
        raise RuntimeError(
            f"The TACA LoRA {names} is active inside the window of TACA, and this model has none: "
            f"add the node TACA Patch Model, before or after Load TACA LoRA. (gamma 1 there is the "
            f"LoRA alone. For a LoRA that is on in every step use ComfyUI's Load LoRA.)"
        )
    if comfy.model_management.in_training:
        raise RuntimeError(
            f"A model with the TACA LoRA {names} cannot be trained: take Load TACA LoRA out. To go "
            f"on training a LoRA, choose it as the trainer's existing_lora."
        )
    return executor(*args, **kwargs)


def timestep(model_sampling: Any, sigma: Tensor) -> Tensor:
    """The paper's t, 0..1000 (1000 = pure noise), of sigma; of sigma's shape.

    A flow model's sigma is its noise share, whatever unit the model itself is told time in.
    """
    if isinstance(model_sampling, comfy.model_sampling.CONST):
        return sigma * 1000.0
    return model_sampling.timestep(sigma)


def timesteps(model_sampling: Any, sigma: Tensor) -> list[float]:
    """``timestep`` of each row's sigma, as numbers: read once, and no operation on the device."""
    if isinstance(model_sampling, comfy.model_sampling.CONST):
        return [1000.0 * each for each in sigma.tolist()]
    return timestep(model_sampling, sigma.cpu()).tolist()


def resolve(schedule: Schedule, model_sampling: Any, sigmas: Tensor | None = None) -> Resolved:
    """A schedule's gamma(t) for a model's sampling and, of a run, its sigmas."""
    # Not what Training Window makes of it.
    to_sigma = getattr(model_sampling, "taca_percent_to_sigma", model_sampling.percent_to_sigma)

    def percent_to_t(percent: float) -> float:
        return float(timestep(model_sampling, torch.tensor([to_sigma(percent)]).float()))

    steps = None if sigmas is None else timestep(model_sampling, sigmas)
    return schedule.resolve(Sampling(percent_to_t, steps))


def _watch_run(settings: Settings, executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Around one sampling run: say what TACA will do, and make sure that it did it."""
    guider = executor.class_obj
    patcher = guider.model_patcher
    sigmas = args[3] if len(args) > 3 else kwargs["sigmas"]
    if comfy.model_management.in_training:
        sigmas = None
    model_sampling = patcher.get_model_object("model_sampling")
    resolved = resolve(settings.schedule, model_sampling, sigmas)
    run = Run(schedule=resolved)
    _log_run(settings, resolved, patcher, sigmas)
    wrappers = guider.model_options["transformer_options"]["wrappers"][WrappersMP.APPLY_MODEL]
    _check_compiler(patcher.model.diffusion_model, wrappers)
    # This run's record goes to its calls inside their wrapper, not as an entry of
    # transformer_options: code that torch.compile made for a model fails without the entries it
    # was made with. The guider's options are this run's own copy.
    wrappers[KEY] = [partial(_adjust_call, settings, run)]
    result = executor(*args, **kwargs)
    if run.ran and not run.attended:
        raise RuntimeError(
            f"TACA changed nothing: the blocks of {type(patcher.model).__name__} ran inside the "
            f"window, but none of their attention reached TACA. Another node or pack probably "
            f"replaced this model's attention or blocks: remove it, or take out TACA Patch Model."
        )
    if run.missed:
        log.warning(
            "TACA: in %d calls of the model inside the window none of its attention reached TACA, "
            "for another node attends in its place there. Those were not adjusted: let that node "
            "begin behind the window.", run.missed,
        )  # fmt: skip
    return result


def _log_run(settings: Settings, resolved: Resolved, patcher: Any,
             sigmas: Tensor | None) -> None:  # fmt: skip
    """One line a run: gamma, how many steps are inside the window, how many blocks."""
    schedule = settings.schedule
    family = family_of(patcher.get_model_object("diffusion_model"))
    blocks = len(list(joint_blocks(patcher.model.diffusion_model, settings.options)))
    if sigmas is None:
        log.info(
            "TACA: training with gamma %g at %s, %d joint blocks of %s.",
            schedule.gamma, schedule.window, blocks, family.name,
        )  # fmt: skip
        return
    t = timestep(patcher.get_model_object("model_sampling"), sigmas[:-1])
    inside = int(resolved.contains(t).sum())
    log.log(
        logging.INFO if inside else logging.WARNING,
        "TACA: gamma %g at %s acts on %d of %d steps, %d joint blocks of %s%s.%s",
        schedule.gamma, schedule.window, inside, len(t), blocks, family.name,
        "".join(f", with {lora.name} at {lora.strength:g}" for lora in loras_of(patcher)),
        "" if inside else " No step is inside the window: lower its threshold or use more steps, "
        "or the picture is the plain model's.",
    )  # fmt: skip


def _check_compiler(diffusion_model: nn.Module, wrappers: Mapping[str, Any]) -> None:
    """Refuse a compiled model on a torch that lacks what ``_without_graph_breaks`` stands on."""
    if "torch._dynamo" not in sys.modules:
        return
    can = hasattr(torch.compiler, "set_stance") and hasattr(torch._dynamo, "error_on_graph_break")
    compiled = "torch.compile" in wrappers or any(
        hasattr(module, "_orig_mod") for module in diffusion_model.modules()
    )
    if compiled and not can:
        raise RuntimeError(
            f"TACA on a compiled model needs a later torch than {torch.__version__}: take out the "
            f"node that compiles the model, or update torch (2.13 is tested)."
        )


def _adjust_call(settings: Settings, run: Run, executor: Any, x: Tensor, t_model: Tensor,
                 *args: Any, **kwargs: Any) -> Any:  # fmt: skip
    """Around one call of the model: TACA and its LoRAs, if a row of the batch is inside."""
    base_model = executor.class_obj
    resolved = run.schedule or resolve(settings.schedule, base_model.model_sampling)
    if comfy.model_management.in_training:
        return _adjust_training_call(
            settings.options, resolved, run, executor, x, t_model, *args, **kwargs
        )
    # The one time in a call that the host waits for the device. Outside the window nothing else
    # is done; inside, what is installed is decided from these numbers.
    t = timesteps(base_model.model_sampling, t_model)
    inside = [resolved.contains(each) for each in t]
    if not any(inside):
        return executor(x, t_model, *args, **kwargs)
    places = _places(settings.options, run, base_model)
    gamma = gamma_of_rows(settings.options, resolved, torch.tensor(t), *args, **kwargs)
    seen = first_seen(*args, **kwargs)
    forwards: list[tuple[nn.Module, Wrap]] = []
    if bool((gamma != 1).any()):
        # One factor for all rows, where they have the same: then no graph depends on the batch.
        gamma = gamma[:1] if bool((gamma == gamma[:1]).all()) else gamma
        gamma = gamma.to(t_model.device, non_blocking=True)
        forwards += [
            (block, partial(_joint_forward, locate=locate, gamma=gamma, seen=seen))
            for block, locate in places.blocks.items()
        ]
    if all(inside):
        forwards += places.loras
    else:
        some = torch.tensor(inside).to(t_model.device, non_blocking=True)
        forwards += lora_forwards(places.targets, some)
    if not forwards:
        return executor(x, t_model, *args, **kwargs)
    with installed(forwards):
        result = _without_graph_breaks(run, partial(executor, x, t_model, *args, **kwargs))
    run.ran |= seen.ran
    run.attended |= seen.attended
    run.missed += seen.ran and not seen.attended
    return result


def _places(options: Options, run: Run, base_model: Any) -> Places:
    """Where TACA and its LoRAs act in a model that is running.

    Looked for once a run: on FLUX with a LoRA that takes the host longer than all the rest. And
    once more where a cache puts blocks of its own in their place for some of the calls.
    """
    transformer = uncompiled(base_model.diffusion_model)
    known = run.places.get(base_model)
    if known is not None and known.lists == _lists(transformer, known.lists):
        return known
    patcher = base_model.current_patcher  # of this device, in a run over several
    family = family_of(transformer)
    targets = list(lora_targets(loras_of(patcher) if patcher is not None else [], base_model))
    places = Places(
        _lists(transformer, (*family.before, *family.joint)),
        located_blocks(transformer, options),
        targets,
        [(module, remembering(wrap)) for module, wrap in lora_forwards(targets, None)],
    )
    if run.schedule is not None:  # a run, which ends; not what a patched model keeps
        run.places[base_model] = places
    return places


def _lists(transformer: nn.Module, names: Iterable[str]) -> Lists:
    """A model's lists of blocks, as they are now."""
    return {name: tuple(part_of(transformer, name) or ()) for name in names}


def gamma_of_rows(options: Options, schedule: Resolved, t: Tensor, c_concat: Any,
                   c_crossattn: Any, control: Any, transformer_options: dict[str, Any],
                   **kwargs: Any) -> Tensor:  # fmt: skip
    """Gamma for each row of a call, and for each text token if the options limit those."""
    text = 0 if c_crossattn is None else c_crossattn.shape[1]
    chunks = transformer_options.get("cond_or_uncond", [0])
    return options.gamma_of_rows(schedule.gamma_at(t), chunks, text)


def first_seen(c_concat: Any, c_crossattn: Any, *args: Any, clip_fea: Any = None,
               ar_len: int = 0, **kwargs: Any) -> Seen:  # fmt: skip
    """What a call shows before any of its blocks: its text, and a picture a vision encoder saw."""
    text, lead = (0 if tokens is None else tokens.shape[1] for tokens in (c_crossattn, clip_fea))
    return Seen(text=text, lead=lead, kept=ar_len)


def joint_blocks(diffusion_model: Any, options: Options) -> Iterator[tuple[nn.Module, Locate]]:
    """The joint blocks that TACA acts in."""
    diffusion_model = uncompiled(diffusion_model)
    return family_of(diffusion_model).joint_blocks(diffusion_model, options.blocks)


def located_blocks(diffusion_model: Any, options: Options) -> dict[nn.Module, Locate]:
    """The joint blocks that TACA acts in, and those that show where tokens are."""
    diffusion_model = uncompiled(diffusion_model)
    return family_of(diffusion_model).blocks(diffusion_model, options.blocks)


def _adjust_training_call(options: Options, schedule: Resolved, run: Run, executor: Any,
                          x: Tensor, t_model: Tensor, c_concat: Any, c_crossattn: Any,
                          control: Any, transformer_options: dict[str, Any],
                          **kwargs: Any) -> Any:  # fmt: skip
    """Around one call of a model in training, to blocks that ``training_window`` prepared.

    The backward pass may compute the blocks again after this call. Core keeps the call's options
    for that, so they say what TACA does; nothing is compiled in training.
    """
    patcher = executor.class_obj.current_patcher
    if TRAINING_KEY not in patcher.injections:
        raise RuntimeError(
            "This model has TACA, and core's trainer would train it at all timesteps: put TACA "
            "Training Window between TACA Patch Model and the trainer, or, to train without TACA, "
            "take TACA Patch Model out."
        )
    t = timestep(executor.class_obj.model_sampling, t_model)
    if not bool(schedule.contains(t).all()):
        raise RuntimeError(
            "The trainer drew a timestep outside the TACA window: put TACA Training Window last, "
            "behind TACA Patch Model and behind every node that changes the model's sampling."
        )
    call = (c_concat, c_crossattn, control, transformer_options)
    seen = first_seen(*call, **kwargs)
    adjustment = (gamma_of_rows(options, schedule, t, *call), seen)
    with_taca = {**transformer_options, KEY: adjustment}
    result = executor(x, t_model, c_concat, c_crossattn, control, with_taca, **kwargs)
    run.ran |= seen.ran
    run.attended |= seen.attended
    return result


def training_forward(forward: Callable[..., Any], locate: Locate) -> Callable[..., Any]:
    """A block's forward while its model is loaded for training; see ``_adjust_training_call``."""

    def taca_training_forward(*args: Any, **kwargs: Any) -> Any:
        adjustment = (kwargs.get("transformer_options") or {}).get(KEY)
        if adjustment is None:
            return forward(*args, **kwargs)
        return _joint_forward(forward, locate, *adjustment)(*args, **kwargs)

    return taca_training_forward


def _without_graph_breaks(run: Run, call: Callable[[], Any]) -> Any:
    """Call a model that may be compiled, and never in pieces.

    A kernel that torch.compile cannot trace breaks the graph, and what follows is compiled piece
    by piece. ComfyUI compiles without guards on ``transformer_options``, so such a piece, made
    with TACA's override, would later be taken for the plain model's, or the other way round.
    Hence blocks with TACA are compiled whole or, where that fails, not at all.
    """
    if not run.eager:
        try:
            return call()
        except Exception as error:
            if type(error).__module__ != "torch._dynamo.exc":
                raise
            log.warning(
                "TACA: this model's blocks cannot be compiled in one piece (often: an attention "
                "kernel that torch.compile cannot trace). Steps inside the window run uncompiled. "
                "(%s)", str(error).strip().partition("\n")[0],
            )  # fmt: skip
            run.eager = True
    with uncompiled_calls:
        return call()


class _Uncompiled:
    """The length of calls that run uncompiled, on however many threads (a device each).

    torch's stance is one for all threads: whoever comes first sets it, the last one resets it.
    Where nothing has loaded torch's compiler, there is nothing to do.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._stance: AbstractContextManager[Any] = nullcontext()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside and "torch._dynamo" in sys.modules:
                self._stance = torch.compiler.set_stance("force_eager")
                self._stance.__enter__()
            self._inside += 1

    def __exit__(self, *error: Any) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._stance.__exit__(*error)
                self._stance = nullcontext()


uncompiled_calls = _Uncompiled()


@contextmanager
def installed(forwards: list[tuple[nn.Module, Wrap]]) -> Iterator[None]:
    """For the length of this context, modules run what their forward was wrapped into.

    It is ``forward`` that is replaced, and not an entry of the model's ``transformer_options``:
    ComfyUI compiles models without guards on those, so a compiled model would keep for ever what
    they held at its first call.
    """
    before = []
    try:
        for module, wrap in forwards:
            before.append((module, module.__dict__.get("forward")))
            # As an attribute would be set, but for nn.Module's search for a parameter of that name.
            module.__dict__["forward"] = wrap(module.forward)
        yield
    finally:
        for module, forward in reversed(before):
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward


def taking_options(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A module's forward; of one that calls core's attention without options, a copy that has them.

    Core asks for an override in the options alone. So the copy's ``optimized_attention`` is one
    that is given them; the module's code is its own.
    """
    if not isinstance(forward, MethodType):
        return forward
    code, names = forward.__func__.__code__, forward.__func__.__globals__
    if "optimized_attention" not in code.co_names or "transformer_options" in code.co_varnames:
        return forward

    def forward_taking_options(*args: Any, transformer_options: Any, **kwargs: Any) -> Any:
        attend = partial(names["optimized_attention"], transformer_options=transformer_options)
        with_options = {**names, "optimized_attention": attend}
        copy = FunctionType(code, with_options, code.co_name, forward.__func__.__defaults__)
        return copy(forward.__self__, *args, **kwargs)

    return forward_taking_options


def options_of(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a block is handed, or that the attention it is handed was made with."""
    cells = _cells(kwargs.get("optimized_attention"))
    if "transformer_options" in cells:
        return cells["transformer_options"].cell_contents or {}
    return kwargs.get("transformer_options") or {}


def handing(kwargs: Mapping[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """A block's arguments with other options: its own, or those of the attention it is handed."""
    attention: Any = kwargs.get("optimized_attention")
    cells = _cells(attention)
    if attention is None:
        return {**kwargs, "transformer_options": options}
    if "transformer_options" not in cells:
        raise RuntimeError(
            "TACA does not know the attention that this model's blocks are handed: another node "
            "has wrapped it. Take that node out, or TACA Patch Model."
        )
    cells["transformer_options"] = CellType(options)
    made = FunctionType(attention.__code__, attention.__globals__, attention.__name__,
                        attention.__defaults__, tuple(cells.values()))  # fmt: skip
    return {**kwargs, "optimized_attention": made}


def _cells(function: Any) -> dict[str, CellType]:
    """What a function closes over, by name."""
    if not isinstance(function, FunctionType):
        return {}
    return dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))


def _joint_forward(forward: Callable[..., Any], locate: Locate, gamma: Tensor,
                   seen: Seen) -> Callable[..., Any]:  # fmt: skip
    """A block's forward, with TACA as the attention override of this one block."""
    with_options = taking_options(forward)

    def taca_forward(*args: Any, **kwargs: Any) -> Any:
        tokens = locate(args, kwargs, seen)
        if not any(span.kind == "text" and span.length for span in tokens):
            return forward(*args, **kwargs)
        seen.ran = True
        options = options_of(kwargs)
        override = _override(gamma, tokens, seen, options.get(OVERRIDE))
        kwargs = handing(kwargs, {**options, OVERRIDE: override})
        if torch.compiler.is_compiling():
            with torch._dynamo.error_on_graph_break(True):  # see _without_graph_breaks
                return with_options(*args, **kwargs)
        if "torch._dynamo" in sys.modules and frame_callback() is not None:
            # Past its limit of recompilations dynamo runs this function as it is; what it compiled
            # for the plain block, without guards on transformer_options, must not run inside.
            return torch.compiler.disable(with_options)(*args, **kwargs)
        return with_options(*args, **kwargs)

    return taca_forward


def _override(gamma: Tensor, tokens: Tokens, seen: Seen,
              other: Callable[..., Tensor] | None) -> Callable[..., Tensor]:  # fmt: skip
    """The attention override of one block; ``other`` is whoever's was there, and still attends."""

    def taca_override(func: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int,
                      mask: Tensor | None = None, attn_precision: Any = None,
                      skip_reshape: bool = False, skip_output_reshape: bool = False,
                      **kwargs: Any) -> Tensor:  # fmt: skip
        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            backend = func if other is None else partial(other, func)
            return backend(
                q, k, v, heads, mask=mask, attn_precision=attn_precision,
                skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape, **kwargs,
            )  # fmt: skip

        dim = 2 if skip_reshape else 1
        if not attends_over(tokens, q, k, dim):
            return attend(q, k, v, mask)  # not the joint attention of this block
        seen.attended = True
        return temperature_adjusted_attention(
            attend, q, k, v, gamma, tokens, mask, dim, out_dim=2 if skip_output_reshape else 1
        )

    return taca_override
