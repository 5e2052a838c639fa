"""The model families TACA knows: which of their blocks attend jointly, and where text sits there.

To add a family, add an entry to ``FAMILIES``: ``name``, ``models`` and ``joint``, which says where
the tokens of its blocks are by a function of ``layouts.py``. All else is for exceptions. A family
is recognised by the class name of its ``diffusion_model``, and no model of ComfyUI's is imported,
so a core that moves or lacks one cannot break the pack.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .arguments import CallArguments
from .block_ranges import parse_blocks
from .layouts import (
    ExtraText,
    FindExtraText,
    Locate,
    cropped,
    glyphs,
    hidream_o1,
    llama_tokens,
    minimax,
    mochi,
    no_extra_text,
    one_stream,
    padded,
    pictures_in_text,
    qwen_image21,
    records_length,
    records_only,
    text_alone,
    time_token,
    two_streams,
    uvit,
    with_prefix,
)
from .reach import Reach, through_globals, through_handed_attention, through_options


class JointBlock(NamedTuple):
    """A module whose ``forward`` runs one joint attention.

    The same form serves blocks that only show where tokens are, and refiners of text alone.
    """

    module: nn.Module  # the block, or the attention in it
    locate: Locate  # where its tokens are
    reach: Reach  # how an attention override reaches its attention


@dataclass(frozen=True)
class Family:
    """One family of models."""

    name: str  # what users call it
    models: tuple[str, ...]  # class names of the ``diffusion_model``
    # Path of each list of blocks with joint attention -> where the tokens of its blocks are.
    joint: dict[str, Locate] = field(hash=False)
    # The same for blocks that are not joint, but show lengths that joint blocks need.
    before: dict[str, Locate] = field(default_factory=dict, hash=False)
    attention: str = ""  # a block's attention module, where the block itself is out of reach
    reach: Reach = through_options  # how an attention override reaches that attention
    extra_text: FindExtraText = no_extra_text  # its text tokens besides the conditioning's
    padded_front: int = 0  # number of text tokens to which core pads a conditioning in front
    # Where the picture's own tokens are among all image tokens: before those of references, after
    # them, or in the left half of each row.
    own_image: Literal["first", "last", "left"] = "first"
    patch: int = 0  # side of a token in latents, where the model has no ``patch_size``
    required_attrs: tuple[str, ...] = ()  # of its model, to tell it from others of that class name
    refiner: str = ""  # path of blocks in which the text attends to itself first
    mixes_text: bool = False  # whether it does so where TACA does not reach
    before_run: tuple[str, ...] = ()  # modules that ComfyUI runs on the text before the first step
    past_hooks: tuple[str, ...] = ()  # norms whose weights are read past ComfyUI's hook on them
    # Whether ComfyUI caches the keys of the text from step to step and from run to run, with what a
    # LoRA made of them.
    caches_text_keys: bool = False

    def includes(self, diffusion_model: nn.Module, class_name: str) -> bool:
        """Whether a model with a class of this name among its bases is of this family."""
        parts = [part_of(diffusion_model, path) for path in (*self.joint, *self.required_attrs)]
        return class_name in self.models and None not in parts

    def joint_blocks(self, diffusion_model: nn.Module, limit: str = "") -> Iterator[JointBlock]:
        """The joint blocks of a model that ``limit`` names; as ``parse_blocks``, errors too."""
        lists = {name: part_of(diffusion_model, name) for name in self.joint}
        chosen = parse_blocks(limit, {name: len(blocks) for name, blocks in lists.items()})
        for name, i in chosen:
            yield JointBlock(self._attending(lists[name][i]), self.joint[name], self.reach)

    def refiner_blocks(self, diffusion_model: nn.Module) -> list[JointBlock]:
        """The blocks in which text attends to text alone, before it meets the picture."""
        blocks = part_of(diffusion_model, self.refiner) if self.refiner else ()
        return [JointBlock(uncompiled(block), text_alone, self.reach) for block in blocks]

    def observed_blocks(self, diffusion_model: nn.Module, limit: str = "") -> list[JointBlock]:
        """``joint_blocks``, and all other blocks that show where their tokens are."""
        blocks: dict[nn.Module, JointBlock] = {}
        for name, locate in {**self.before, **self.joint}.items():
            for block in map(self._attending, part_of(diffusion_model, name) or ()):
                blocks[block] = JointBlock(block, records_only(locate), self.reach)
        blocks |= {block.module: block for block in self.joint_blocks(diffusion_model, limit)}
        return list(blocks.values())

    def extra_text_of(
        self, diffusion_model: nn.Module, num_prompt: int, call: CallArguments
    ) -> ExtraText:
        """The text tokens of the model besides those of a prompt's conditioning.

        Raises ValueError if the conditioning does not have ``num_prompt`` tokens.
        """
        num_text = call.num_text
        missing = num_text - num_prompt
        if missing and (num_text != self.padded_front or missing < 0):
            raise ValueError(
                f"TACA: the positive conditioning has {num_text} text tokens, its prompt "
                f"{num_prompt}. Connect the CLIP and the prompt that made the conditioning. Where "
                f"another node adds tokens (Apply Style Model, Concat, a picture's), put TACA "
                f"Weigh Words directly behind the node that encodes the text: it tells them apart."
            )
        extra = self.extra_text(diffusion_model, num_text, call.others)
        return extra._replace(before=[*extra.before, *([0.0] * missing)])

    def grid(self, diffusion_model: nn.Module, latent: Sequence[int]) -> tuple[int, int, int]:
        """Frames, rows and columns of the tokens of latents of this shape."""
        size: Any = self.patch or diffusion_model.patch_size
        patch = [size, size] if isinstance(size, int) else [*size]
        patch = [getattr(diffusion_model, "patch_size_t", None) or 1, *patch][-3:]
        sides = (1, *latent[2:])[-3:]
        frames, rows, columns = (-(-n // p) for n, p in zip(sides, patch, strict=True))
        return frames, rows, columns

    def own_places(
        self, diffusion_model: nn.Module, grid: tuple[int, int, int], num_image: int
    ) -> Tensor:
        """Indices of the picture's own tokens among image tokens, ``(frames, rows, columns)``."""
        frames, rows, columns = grid
        count = math.prod(grid)
        if self.own_image == "left":
            return torch.arange(num_image).view(frames, rows, -1)[:, :, :columns]
        # Z-Image pads the picture too, at its end.
        multiple = getattr(diffusion_model, "pad_tokens_multiple", None) or 1
        first = num_image - -(-count // multiple) * multiple if self.own_image == "last" else 0
        return torch.arange(count).view(grid) + max(first, 0)

    def _attending(self, block: nn.Module) -> nn.Module:
        block = uncompiled(block)
        return getattr(block, self.attention) if self.attention else block


FLUX_BLOCKS = {
    "double_blocks": two_streams(text=(1, "txt"), image=(0, "img")),
    "single_blocks": one_stream((0, "x")),
}
DIFFUSERS_TEXT, DIFFUSERS_IMAGE = (1, "encoder_hidden_states"), (0, "hidden_states")
DIFFUSERS_BLOCKS = {"transformer_blocks": two_streams(DIFFUSERS_TEXT, DIFFUSERS_IMAGE)}
IMAGE_FIRST = two_streams(DIFFUSERS_TEXT, DIFFUSERS_IMAGE, image_first=True)

FAMILIES = (
    Family(
        "FLUX.1 (dev, schnell, Fill, Kontext)",
        ("Flux",),
        FLUX_BLOCKS,
        required_attrs=("vector_in",),  # of CLIP-L's pooled output
    ),
    # FLUX.2's text is padded to 512 tokens in front, which count, as FLUX.1's padding does.
    Family(
        "FLUX.2 (dev, Klein), LongCat-Image and Ovis-Image",
        ("Flux",),
        FLUX_BLOCKS,
        padded_front=512,
    ),
    Family("Chroma and Chroma Radiance", ("Chroma",), FLUX_BLOCKS),
    Family(
        "AuraFlow",
        ("MMDiT",),
        {  # its 8 registers are the same for every prompt: they are not text
            "double_layers": with_prefix(8, two_streams(text=(0, "c"), image=(1, "x"))),
            "single_layers": with_prefix(8, one_stream((0, "cx"))),
        },
    ),
    # ByT5's tokens, of the text to be written in the picture, count as text. A vision encoder's do
    # not: they show the picture to start from. (In HunyuanVideo 1.0 they can lie within the text
    # encoder's output, where they cannot be distinguished from text.)
    Family(
        "HunyuanVideo 1.0 and 1.5, HunyuanImage 2.1",
        ("HunyuanVideo",),
        FLUX_BLOCKS,
        extra_text=glyphs,
        own_image="last",
        mixes_text=True,
    ),
    Family(
        "SD3 and SD3.5",
        ("MMDiT",),
        {"joint_blocks": two_streams(text=(0, "context"), image=(1, "x"))},
    ),
    Family(
        # Learned padding (Z-Image) counts as what it pads. Z-Image Omni: [text | SigLIP |
        # references and image]; SigLIP's tokens, of the references, are neither text nor image.
        "Lumina 2, Neta-Lumina, NewBie and Z-Image (Turbo, Omni, pixel space)",
        ("NextDiT",),
        {"layers": one_stream((0, "x"))},
        before={
            "context_refiner": records_length("num_text"),
            "siglip_refiner": records_length("num_other"),
        },
        extra_text=padded,
        own_image="last",
        refiner="context_refiner",
    ),
    Family(
        "HiDream-I1 and HiDream-E1",
        ("HiDreamImageTransformer2DModel",),
        {
            "double_stream_blocks": two_streams(
                text=(2, "text_tokens"), image=(0, "image_tokens"), image_first=True
            ),
            # [image | text | the block's own Llama tokens], of which each block has as many
            "single_stream_blocks": one_stream((0, "image_tokens"), image_first=True),
        },
        extra_text=llama_tokens,
        own_image="left",
    ),
    Family(
        "HiDream-O1",
        ("HiDreamO1Transformer",),
        {"language_model.layers": hidream_o1},
        extra_text=time_token,
        mixes_text=True,
        reach=through_handed_attention(3, "optimized_attention", "make_two_pass_attention"),
        caches_text_keys=True,
    ),
    Family(  # references come before the image, in this family and the next
        "OmniGen2",
        ("OmniGen2Transformer2DModel",),
        {"layers": one_stream((0, "hidden_states"))},
        refiner="context_refiner",
        own_image="last",
    ),
    Family(
        "Boogu-Image",
        ("BooguTransformer2DModel",),
        {
            "double_stream_layers": two_streams(
                text=(1, "instruct_hidden_states"), image=(0, "img_hidden_states")
            ),
            "single_stream_layers": one_stream((0, "hidden_states")),
        },
        own_image="last",
        refiner="context_refiner",
    ),
    # Without a prompt (its unconditional pass) Ideogram's sequence is the image alone.
    Family(
        "Ideogram 4", ("Ideogram4Transformer2DModel",), {"layers": one_stream((0, "x"))}, patch=1
    ),
    Family(
        "Krea 2",
        ("SingleStreamDiT",),
        {"blocks": one_stream((0, "x"))},
        patch=2,
        mixes_text=True,
    ),
    Family("Lens", ("LensTransformer2DModel",), {"transformer_blocks": IMAGE_FIRST}, patch=1),
    Family("Qwen-Image and Qwen-Image-Edit", ("QwenImageTransformer2DModel",), DIFFUSERS_BLOCKS),
    Family(
        "Qwen-Image 2.1",
        ("QwenImage21Transformer2DModel",),
        {"transformer_blocks": qwen_image21},
        patch=1,
        reach=through_handed_attention(
            3, "attn_fn", "block_causal_attention", "prefix_cached_attention"
        ),
        caches_text_keys=True,
    ),
    Family("JoyImage-Edit", ("JoyImageTransformer3DModel",), {"double_blocks": IMAGE_FIRST}),
    Family("Mage-Flow", ("MageFlowTransformer2DModel",), DIFFUSERS_BLOCKS),
    Family(
        "CogVideoX",
        ("CogVideoXTransformer3DModel",),
        {"blocks": two_streams(DIFFUSERS_TEXT, DIFFUSERS_IMAGE)},
    ),
    Family(  # its pixel blocks attend to the image alone
        "PixelDiT and PiD",
        ("PixDiT_T2I",),
        {"patch_blocks": two_streams(text=(1, "y"), image=(0, "x"))},
        extra_text=cropped,
    ),
    Family("Mochi", ("AsymmDiTJoint",), {"blocks": mochi}, extra_text=cropped),
    Family(
        "MiniMax-H3",
        ("MiniMaxH3Model",),
        {"blocks": minimax},
        extra_text=pictures_in_text,
        own_image="last",
        mixes_text=True,
        before_run=("condition_proj", "token_refiner"),
        past_hooks=(".q_norm", ".k_norm"),
    ),
    Family(
        "Ernie-Image",
        ("ErnieImageModel",),
        {"layers": one_stream((0, "x"), image_first=True)},
        attention="self_attention",
        reach=through_globals,
    ),
    Family(
        "U-ViT",
        ("UViT",),
        {"joint": uvit},
        refiner="caption_blocks",
    ),
)

WORKS_ON = (
    "TACA works on FLUX, SD3.5, Qwen-Image, Z-Image, HunyuanVideo and others, see "
    "https://github.com/taca-comfyui/taca-attention/blob/main/docs/models.md"
)
CROSS_ATTENTION = (
    "it attends to the text by cross-attention, so text and image never compete in one softmax."
)
ONE_WAY = "its text takes no part in the attention, and stays the same in every block."
NUNCHAKU = (
    "no patch reaches its attention, which nunchaku runs in kernels of its own or hands no "
    "options. Load the model with one of ComfyUI's own loaders or as GGUF."
)
REFUSED = {
    "ComfyFluxWrapper": ("nunchaku's FLUX", NUNCHAKU),
    "NunchakuFluxTransformer2dModel": ("nunchaku's FLUX", NUNCHAKU),
    "ComfyFlux2Wrapper": ("nunchaku's FLUX.2", NUNCHAKU),
    "NunchakuQwenImageTransformer2DModel": ("nunchaku's Qwen-Image", NUNCHAKU),
    "UNetModel": ("Stable Diffusion 1, 2 and XL", CROSS_ATTENTION),
    "PixArtMS": ("PixArt", CROSS_ATTENTION),
    "HunYuanDiT": ("Hunyuan-DiT", CROSS_ATTENTION),
    "WanModel": ("Wan", CROSS_ATTENTION),
    "LTXVModel": ("LTX-Video", CROSS_ATTENTION),
    "GeneralDIT": ("Cosmos", CROSS_ATTENTION),
    "Anima": ("Anima", CROSS_ATTENTION),
    "MiniTrainDIT": ("Cosmos Predict2", CROSS_ATTENTION),
    "Kandinsky5": ("Kandinsky 5", CROSS_ATTENTION),
    "Kandinsky6": ("Kandinsky 6", CROSS_ATTENTION),
    "Prism": ("Prism", CROSS_ATTENTION),
    "StageB": ("Stable Cascade", ONE_WAY),
    "StageC": ("Stable Cascade", ONE_WAY),
    "UViT": ("U-ViT with a separate cross-attention", CROSS_ATTENTION),
    "NaDiT": ("SeedVR2", "it restores what it is given and takes no prompt."),
    "Trellis2": ("TRELLIS.2", "it makes a shape from a picture and takes no prompt."),
    "MiniMaxMusic3DiT": ("MiniMax Music 3", "it makes music, and has no image tokens."),
    "SenseNovaU15": (
        "SenseNova-U1.5",
        "ComfyUI runs its blocks by methods of their own, which TACA does not reach.",
    ),
}
"""Models that TACA cannot act on, by class: what users call them, and why."""


def family_of(diffusion_model: nn.Module, own_class: type | None = None) -> Family:
    """The family of a model.

    ``own_class`` is its class, where another pack has replaced that of the loaded model.

    Raises ValueError if the model has no joint attention that TACA can reach; names some that have.
    """
    diffusion_model = uncompiled(diffusion_model)
    names = [cls.__name__ for cls in (own_class or type(diffusion_model)).__mro__]
    for name in names:  # a pack's class before the class of ComfyUI's that it derives from
        for family in FAMILIES:
            if family.includes(diffusion_model, name):
                return family
        if name in REFUSED:
            called, reason = REFUSED[name]
            raise ValueError(f"TACA cannot act on {called} ({names[0]}): {reason} {WORKS_ON}")
    raise ValueError(
        f"This version of TACA does not know the model {names[0]}. If it runs one attention over "
        f"text and image, report it: https://github.com/taca-comfyui/taca-attention/issues. "
        f"{WORKS_ON}"
    )


def part_of(module: nn.Module, path: str) -> Any:
    """A part of a module by its path, through compiled modules; None if there is none."""
    part: Any = module
    for name in path.split("."):
        part = uncompiled(getattr(part, name, None))
    return part


def uncompiled(module: Any) -> Any:
    """The module itself, where ``torch.compile`` has wrapped it."""
    return getattr(module, "_orig_mod", module)
