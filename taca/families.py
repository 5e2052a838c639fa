"""The model families TACA knows: which of their blocks attend jointly, and where text sits there.

To add a family, add an entry to ``FAMILIES``. Nothing of ComfyUI's models is imported: a family
is recognised by the class name of its ``diffusion_model``, so a core that moves or lacks a model
cannot take the pack down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .attention import Span, Tokens
from .options import parse_blocks


@dataclass
class Seen:
    """What one call of the model has shown so far; made for a call and dropped with it.

    Parameters
    ----------
    text : int
        Text tokens of the conditioning, until a block shows how many the model made of them. A
        single-stream block is not told.
    other : int
        Tokens between text and image that are neither.
    ran : bool
        Whether a joint block with text ran.
    attended : bool
        Whether a joint attention reached the patch.
    """

    text: int = 0
    other: int = 0
    ran: bool = False
    attended: bool = False


Locate = Callable[[tuple[Any, ...], Mapping[str, Any], Seen], Tokens]
"""The tokens of a block's joint sequence, from the block's arguments and what the call showed."""


def two_streams(text: tuple[int, str], image: tuple[int, str], image_first: bool = False) -> Locate:
    """A block called with text and image apart, that attends to ``[text | image]``.

    ``text`` and ``image`` are the position and the name of those arguments, ``(B, tokens, C)``;
    with ``image_first`` it attends to ``[image | text]``.
    """

    def locate(args: tuple[Any, ...], kwargs: Mapping[str, Any], seen: Seen) -> Tokens:
        seen.text = _argument(args, kwargs, *text).shape[1]
        spans = Span("text", seen.text), Span("image", _argument(args, kwargs, *image).shape[1])
        return spans[::-1] if image_first else spans

    return locate


def one_stream(sequence: tuple[int, str], image_first: bool = False) -> Locate:
    """A block called with ``[text | other | image]`` in one tensor, or in the opposite order."""

    def locate(args: tuple[Any, ...], kwargs: Mapping[str, Any], seen: Seen) -> Tokens:
        length = _argument(args, kwargs, *sequence).shape[1]
        # Some models say where images begin, and also when a cache skips their two-stream blocks.
        options = kwargs.get("transformer_options") or {}
        text = options["img_slice"][0] if "img_slice" in options else seen.text
        image = Span("image", length - text - seen.other)
        other = (Span("other", seen.other),) if seen.other else ()
        spans = Span("text", text), *other, image
        return spans[::-1] if image_first else spans

    return locate


def shows(what: str, sequence: tuple[int, str] = (0, "x")) -> Locate:
    """A block that is not joint, called with nothing but what ``Seen`` calls ``what``."""

    def locate(args: tuple[Any, ...], kwargs: Mapping[str, Any], seen: Seen) -> Tokens:
        setattr(seen, what, _argument(args, kwargs, *sequence).shape[1])
        return ()

    return locate


def _without_tokens(locate: Locate) -> Locate:
    """What a block shows, where the block itself is left alone."""

    def locate_nothing(args: tuple[Any, ...], kwargs: Mapping[str, Any], seen: Seen) -> Tokens:
        locate(args, kwargs, seen)
        return ()

    return locate_nothing


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int, name: str) -> Any:
    return kwargs[name] if name in kwargs else args[position]


@dataclass(frozen=True)
class Family:
    """One family of models.

    Parameters
    ----------
    name : str
        What users call it.
    models : tuple of str
        Class names of the ``diffusion_model``.
    joint : dict
        For each list of blocks with a joint attention, where its tokens are.
    before : dict
        For each list of blocks that show what joint blocks are not told, what is seen there.
    text : tuple, optional
        The parts of its conditioning in their order, each the names by which ComfyUI's tokenizer
        calls the encoders whose outputs lie over each other in it.
    """

    name: str
    models: tuple[str, ...]
    joint: dict[str, Locate] = field(hash=False)
    before: dict[str, Locate] = field(default_factory=dict, hash=False)
    text: tuple[tuple[str, ...], ...] = ()

    def joint_blocks(
        self, diffusion_model: nn.Module, limit: str = ""
    ) -> Iterator[tuple[nn.Module, Locate]]:
        """Each joint block of this model, or those a line names, with where its tokens are."""
        lists = {name: getattr(diffusion_model, name) for name in self.joint}
        chosen = parse_blocks(limit, {name: len(blocks) for name, blocks in lists.items()})
        for name, locate in self.joint.items():
            for i, block in enumerate(lists[name]):
                if (name, i) in chosen:
                    yield uncompiled(block), locate

    def blocks(self, diffusion_model: nn.Module, limit: str = "") -> dict[nn.Module, Locate]:
        """These joint blocks, and all that come before them and show where their tokens are."""
        others = {
            uncompiled(block): _without_tokens(locate)
            for name, locate in {**self.before, **self.joint}.items()
            for block in getattr(diffusion_model, name) or ()
        }
        return {**others, **dict(self.joint_blocks(diffusion_model, limit))}


FAMILIES = (
    Family(
        "FLUX (dev, schnell, Fill, Kontext)",
        ("Flux",),
        {
            "double_blocks": two_streams(text=(1, "txt"), image=(0, "img")),
            "single_blocks": one_stream((0, "x")),
        },
        text=(("t5xxl",),),
    ),
    Family(
        # SD3.5-Medium's attn2, image to image only, is told from the joint attention by its length.
        "SD3 and SD3.5",
        ("MMDiT",),
        {"joint_blocks": two_streams(text=(0, "context"), image=(1, "x"))},
        text=(("l", "g"), ("t5xxl",)),
    ),
    Family(
        # Padding that the model learned (Z-Image) counts as what it pads. Z-Image Omni: [text |
        # SigLIP | references and image]; SigLIP's tokens show what to draw from, and are neither.
        "Lumina 2, Neta-Lumina, NewBie and Z-Image (Turbo, Omni, pixel space)",
        ("NextDiT",),
        {"layers": one_stream((0, "x"))},
        before={"context_refiner": shows("text"), "siglip_refiner": shows("other")},
    ),
    Family(
        # In a single block [image | text | the block's own Llama tokens], as many in every block.
        "HiDream-I1 and HiDream-E1",
        ("HiDreamImageTransformer2DModel",),
        {
            "double_stream_blocks": two_streams(
                text=(2, "text_tokens"), image=(0, "image_tokens"), image_first=True
            ),
            "single_stream_blocks": one_stream((0, "image_tokens"), image_first=True),
        },
    ),
    Family(
        # References come before the image, in this family and the next.
        "OmniGen2",
        ("OmniGen2Transformer2DModel",),
        {"layers": one_stream((0, "hidden_states"))},
    ),
    Family(
        # The second attention of a double block, image to image, is told by its length.
        "Boogu-Image",
        ("BooguTransformer2DModel",),
        {
            "double_stream_layers": two_streams(
                text=(1, "instruct_hidden_states"), image=(0, "img_hidden_states")
            ),
            "single_stream_layers": one_stream((0, "hidden_states")),
        },
    ),
    Family(
        # Without a prompt (its unconditional pass) the sequence is the image alone.
        "Ideogram 4",
        ("Ideogram4Transformer2DModel",),
        {"layers": one_stream((0, "x"))},
    ),
    Family(
        "Krea 2",
        ("SingleStreamDiT",),
        {"blocks": one_stream((0, "x"))},
    ),
    Family(
        "Lens",
        ("LensTransformer2DModel",),
        {
            "transformer_blocks": two_streams(
                text=(1, "encoder_hidden_states"), image=(0, "hidden_states"), image_first=True
            )
        },
    ),
    Family(
        "Qwen-Image and Qwen-Image-Edit",
        ("QwenImageTransformer2DModel",),
        {
            "transformer_blocks": two_streams(
                text=(1, "encoder_hidden_states"), image=(0, "hidden_states")
            )
        },
    ),
    Family(
        "JoyImage-Edit",
        ("JoyImageTransformer3DModel",),
        {
            "double_blocks": two_streams(
                text=(1, "encoder_hidden_states"), image=(0, "hidden_states"), image_first=True
            )
        },
    ),
    Family(
        "Mage-Flow",
        ("MageFlowTransformer2DModel",),
        {
            "transformer_blocks": two_streams(
                text=(1, "encoder_hidden_states"), image=(0, "hidden_states")
            )
        },
    ),
    Family(
        "CogVideoX",
        ("CogVideoXTransformer3DModel",),
        {"blocks": two_streams(text=(1, "encoder_hidden_states"), image=(0, "hidden_states"))},
    ),
    Family(
        # Its pixel blocks attend to the image alone.
        "PixelDiT and PiD",
        ("PixDiT_T2I",),
        {"patch_blocks": two_streams(text=(1, "y"), image=(0, "x"))},
    ),
)

OWN_KERNELS = {"ComfyFluxWrapper": "nunchaku", "NunchakuFluxTransformer2dModel": "nunchaku"}
"""Models that attend in kernels of their own, out of any patch's reach, and whose they are."""


def family_of(diffusion_model: nn.Module) -> Family:
    """The family of a model.

    Raises
    ------
    ValueError
        If the model has no joint attention that TACA can reach; names the families that do.
    """
    names = [cls.__name__ for cls in type(uncompiled(diffusion_model)).__mro__]
    for family in FAMILIES:
        if any(name in family.models for name in names):
            return family
    works = "; ".join(family.name for family in FAMILIES)
    for name in names:
        if name in OWN_KERNELS:
            raise ValueError(
                f"TACA cannot act on this model: {OWN_KERNELS[name]} runs attention in kernels of "
                f"its own, which no patch reaches. Load the model with one of ComfyUI's own "
                f"loaders or as GGUF. TACA works on: {works}."
            )
    raise ValueError(
        f"TACA cannot act on this model ({names[0]}): it needs a transformer that runs one joint "
        f"attention over text and image tokens. TACA works on: {works}."
    )


def uncompiled(module: nn.Module) -> nn.Module:
    """The module itself, where ``torch.compile`` has wrapped it."""
    return getattr(module, "_orig_mod", module)
