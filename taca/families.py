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

from .attention import Kind, Span, Tokens
from .options import parse_blocks


@dataclass
class Seen:
    """What one call of the model has shown so far; made for a call and dropped with it.

    Parameters
    ----------
    text : int
        Text tokens of the conditioning, until a block shows how many the model made of them. A
        single-stream block is not told.
    lead : int
        Tokens before the text that are neither text nor image: registers, a vision encoder's.
    other : int
        Tokens between text and image that are neither.
    kept : int
        Tokens at the start whose keys the model keeps from step to step, and that do not ask.
    ran : bool
        Whether a joint block with text ran.
    attended : bool
        Whether a joint attention reached the patch.
    """

    text: int = 0
    lead: int = 0
    other: int = 0
    kept: int = 0
    ran: bool = False
    attended: bool = False


Locate = Callable[[tuple[Any, ...], Mapping[str, Any], Seen], Tokens]
"""The tokens of a block's joint sequence, from the block's arguments and what the call showed."""


def two_streams(text: tuple[int, str], image: tuple[int, str], image_first: bool = False) -> Locate:
    """A block called with text and image apart, that attends to ``[lead | text | image]``.

    ``text`` and ``image`` are the position and the name of those arguments, ``(B, tokens, C)``;
    with ``image_first`` it attends to ``[image | text]``.
    """

    def locate(args: tuple[Any, ...], kwargs: Mapping[str, Any], seen: Seen) -> Tokens:
        seen.text = _argument(args, kwargs, *text).shape[1] - seen.lead
        lead = (Span("other", seen.lead),) if seen.lead else ()
        images = Span("image", _argument(args, kwargs, *image).shape[1])
        spans = *lead, Span("text", seen.text), images
        return spans[::-1] if image_first else spans

    return locate


def one_stream(sequence: tuple[int, str], image_first: bool = False) -> Locate:
    """A block called with ``[lead | text | other | image]`` in one tensor, or the reverse."""

    def locate(args: tuple[Any, ...], kwargs: Mapping[str, Any], seen: Seen) -> Tokens:
        length = _argument(args, kwargs, *sequence).shape[1]
        # Some models say where images begin, and also when a cache skips their two-stream blocks.
        options = kwargs.get("transformer_options") or {}
        text = options["img_slice"][0] - seen.lead if "img_slice" in options else seen.text
        image = Span("image", length - seen.lead - text - seen.other)
        lead, other = ((Span("other", n),) if n else () for n in (seen.lead, seen.other))
        spans = *lead, Span("text", text), *other, image
        return spans[::-1] if image_first else spans

    return locate


def with_lead(count: int, locate: Locate) -> Locate:
    """A block whose text begins with so many tokens that are not text."""

    def locate_with_lead(args: tuple[Any, ...], kwargs: Mapping[str, Any], seen: Seen) -> Tokens:
        seen.lead = count
        return locate(args, kwargs, seen)

    return locate_with_lead


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


def mochi(args: tuple[Any, ...], kwargs: Mapping[str, Any], seen: Seen) -> Tokens:
    """``[image | text]``: the block itself leaves out the padding of its text."""
    text = min(_argument(args, kwargs, 2, "y").shape[1], kwargs["crop_y"])
    return Span("image", _argument(args, kwargs, 0, "x").shape[1]), Span("text", text)


def minimax(args: tuple[Any, ...], kwargs: Mapping[str, Any], seen: Seen) -> Tokens:
    """As the model modulates its tokens, by a row for each time and, of that, each kind.

    Pictures in the prompt count as image, for they are modulated as such. Sound is neither.
    """
    kinds: tuple[Kind, ...] = ("image", "text", "other")
    segments = _argument(args, kwargs, 2, "mod_segments")
    return tuple(Span(kinds[row % 3], stop - start) for start, stop, row in segments)


def hidream_o1(args: tuple[Any, ...], kwargs: Mapping[str, Any], seen: Seen) -> Tokens:
    """``[text | time | image]``, with what its vision encoder saw behind the text's first three.

    What is before the time is read as a language model reads, by itself; its keys are kept.
    """
    length = _argument(args, kwargs, 0, "x").shape[1]
    if kwargs["past_key_value"]:
        length += kwargs["past_key_value"][2]
    text = seen.text - 1
    spans = [Span("text", text, asks=False)]
    if seen.kept > text:
        vision = Span("other", seen.kept - text, asks=False)
        spans = [Span("text", 3, asks=False), vision, Span("text", text - 3, asks=False)]
    return *spans, Span("other", 1), Span("image", length - seen.kept - 1)


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
        For each list of blocks with a joint attention, by its path, where its tokens are.
    before : dict
        For each list of blocks that show what joint blocks are not told, what is seen there.
    attention : str
        Which attribute of a block attends, where blocks are not handed ``transformer_options``.
    text : tuple, optional
        The parts of its conditioning in their order, each the names by which ComfyUI's tokenizer
        calls the encoders whose outputs lie over each other in it.
    has : tuple of str
        Parts that tell it from another family whose class has the same name.
    before_run : tuple of str
        Parts that ComfyUI runs on the text once, before the run, where no window is.
    kept_keys : bool
        Whether ComfyUI keeps the keys of the text from step to step and from run to run, where
        what a LoRA made of them would stay.
    """

    name: str
    models: tuple[str, ...]
    joint: dict[str, Locate] = field(hash=False)
    before: dict[str, Locate] = field(default_factory=dict, hash=False)
    attention: str = ""
    text: tuple[tuple[str, ...], ...] = ()
    has: tuple[str, ...] = ()
    before_run: tuple[str, ...] = ()
    kept_keys: bool = False

    def includes(self, diffusion_model: nn.Module, name: str) -> bool:
        """Whether a model, not compiled, is of this family by a class of this name."""
        parts = (part_of(diffusion_model, path) for path in (*self.joint, *self.has))
        return name in self.models and all(part is not None for part in parts)

    def joint_blocks(
        self, diffusion_model: nn.Module, limit: str = ""
    ) -> Iterator[tuple[nn.Module, Locate]]:
        """Each joint block of this model, or those a line names, with where its tokens are."""
        lists = {name: part_of(diffusion_model, name) for name in self.joint}
        chosen = parse_blocks(limit, {name: len(blocks) for name, blocks in lists.items()})
        for name, locate in self.joint.items():
            for i, block in enumerate(lists[name]):
                if (name, i) in chosen:
                    yield self._attends(block), locate

    def _attends(self, block: nn.Module) -> nn.Module:
        block = uncompiled(block)
        return getattr(block, self.attention) if self.attention else block

    def blocks(self, diffusion_model: nn.Module, limit: str = "") -> dict[nn.Module, Locate]:
        """These joint blocks, and all that come before them and show where their tokens are."""
        others = {
            self._attends(block): _without_tokens(locate)
            for name, locate in {**self.before, **self.joint}.items()
            for block in part_of(diffusion_model, name) or ()
        }
        return {**others, **dict(self.joint_blocks(diffusion_model, limit))}


FLUX_BLOCKS = {
    "double_blocks": two_streams(text=(1, "txt"), image=(0, "img")),
    "single_blocks": one_stream((0, "x")),
}

FAMILIES = (
    Family(
        "FLUX.1 (dev, schnell, Fill, Kontext)",
        ("Flux",),
        FLUX_BLOCKS,
        text=(("t5xxl",),),
        has=("vector_in",),  # of CLIP-L's pooled output
    ),
    Family(
        # FLUX.2's text is filled up to 512 tokens in front, which count, as FLUX.1's padding does.
        "FLUX.2 (dev, Klein), LongCat-Image and Ovis-Image",
        ("Flux",),
        FLUX_BLOCKS,
    ),
    Family(
        "Chroma and Chroma Radiance",
        ("Chroma",),
        FLUX_BLOCKS,
        text=(("t5xxl",),),
    ),
    Family(
        # Its 8 registers are the same for every prompt: they are not text.
        "AuraFlow",
        ("MMDiT",),
        {
            "double_layers": with_lead(8, two_streams(text=(0, "c"), image=(1, "x"))),
            "single_layers": with_lead(8, one_stream((0, "cx"))),
        },
    ),
    Family(
        # ByT5's tokens, of what is to be written in the picture, are text. Those of a vision
        # encoder are not: they show the picture to begin with. (In HunyuanVideo 1.0 that one can
        # lie within what the text encoder returns, where it cannot be told from text.)
        "HunyuanVideo 1.0 and 1.5, HunyuanImage 2.1",
        ("HunyuanVideo",),
        FLUX_BLOCKS,
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
        "HiDream-O1",
        ("HiDreamO1Transformer",),
        {"language_model.layers": hidream_o1},
        kept_keys=True,
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
    Family("Mochi", ("AsymmDiTJoint",), {"blocks": mochi}),
    Family(
        "MiniMax-H3",
        ("MiniMaxH3Model",),
        {"blocks": minimax},
        before_run=("condition_proj", "token_refiner"),
    ),
    Family(
        "Ernie-Image",
        ("ErnieImageModel",),
        {"layers": one_stream((0, "x"), image_first=True)},
        attention="self_attention",
    ),
    Family(
        # [time | text | image], in the blocks that text joins.
        "U-ViT with text by concatenation",
        ("UViT",),
        {"joint_blocks": with_lead(1, one_stream((0, "x")))},
        text=(("l",),),
    ),
)

CROSS_ATTENTION = (
    "its image attends to the text apart from itself (cross-attention), so the two do not compete "
    "in one softmax, which is what TACA adjusts."
)
LOAD_OTHERWISE = "Load the model with one of ComfyUI's own loaders or as GGUF."
OWN_KERNELS = (
    f"nunchaku runs its attention in kernels of its own, which no patch reaches. {LOAD_OTHERWISE}"
)
REFUSED = {
    "ComfyFluxWrapper": ("nunchaku's FLUX", OWN_KERNELS),
    "NunchakuFluxTransformer2dModel": ("nunchaku's FLUX", OWN_KERNELS),
    "ComfyFlux2Wrapper": ("nunchaku's FLUX.2", OWN_KERNELS),
    "NunchakuQwenImageTransformer2DModel": (
        "nunchaku's Qwen-Image",
        "nunchaku's blocks hand ComfyUI's options on to no attention, so no patch is reached. "
        f"{LOAD_OTHERWISE}",
    ),
    "UNetModel": ("Stable Diffusion 1, 2 and XL", CROSS_ATTENTION),
    "PixArtMS": ("PixArt", CROSS_ATTENTION),
    "HunYuanDiT": ("Hunyuan-DiT", CROSS_ATTENTION),
    "WanModel": ("Wan", CROSS_ATTENTION),
    "LTXVModel": ("LTX-Video", CROSS_ATTENTION),
    "GeneralDIT": ("Cosmos", CROSS_ATTENTION),
    "Anima": ("Anima", CROSS_ATTENTION),
    "MiniTrainDIT": ("Cosmos Predict2", CROSS_ATTENTION),
    "Kandinsky5": ("Kandinsky 5", CROSS_ATTENTION),
    **dict.fromkeys(
        ("StageB", "StageC"),
        (
            "Stable Cascade",
            "only its image asks, itself and the text, which stays the same in every block; TACA "
            "needs text that takes part in the attention.",
        ),
    ),
    "UViT": ("U-ViT with text by cross-attention", CROSS_ATTENTION),
    "NaDiT": (
        "SeedVR2",
        "it restores what it is given and takes no prompt; its attention, in windows, is handed "
        "no options, so no patch reaches it.",
    ),
}
"""Models that TACA cannot act on, by class: what users call them, and why."""


def family_of(diffusion_model: nn.Module) -> Family:
    """The family of a model.

    Raises
    ------
    ValueError
        If the model has no joint attention that TACA can reach; names the families that do.
    """
    diffusion_model = uncompiled(diffusion_model)
    names = [cls.__name__ for cls in type(diffusion_model).__mro__]
    works = "; ".join(family.name for family in FAMILIES)
    for name in names:  # a pack's own class before that of ComfyUI's it is made from
        for family in FAMILIES:
            if family.includes(diffusion_model, name):
                return family
        if name in REFUSED:
            called, reason = REFUSED[name]
            raise ValueError(
                f"TACA cannot act on {called} ({names[0]}): {reason} TACA works on: {works}."
            )
    raise ValueError(
        f"TACA cannot act on this model ({names[0]}): it needs a transformer that runs one joint "
        f"attention over text and image tokens. TACA works on: {works}."
    )


def part_of(module: nn.Module, path: str) -> Any:
    """A part of a module by its path; None where it has none."""
    part: Any = module
    for name in path.split("."):
        part = getattr(part, name, None)
    return part


def uncompiled(module: nn.Module) -> nn.Module:
    """The module itself, where ``torch.compile`` has wrapped it."""
    return getattr(module, "_orig_mod", module)
