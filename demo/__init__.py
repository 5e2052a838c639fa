"""The demo's node pack: what stands in for SD3's text encoders and VAE around the demo's model."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from comfy_api.latest import ComfyExtension, io

from . import clip, world
from .codec import Codec

_CODEC = Path(__file__).parent / "taca_demo_codec.safetensors"


@cache
def _codec() -> Codec:
    return Codec.load(_CODEC)


class TACADemoTextEncode(io.ComfyNode):
    """Encode a caption with the demo's closed vocabulary."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return io.Schema(
            node_id="TACADemoTextEncode",
            display_name="TACA Demo Text Encode",
            category="TACA/demo",
            description="Encodes a caption for the TACA demo's model, which draws two coloured "
            "shapes, for example 'a red circle left of a blue square'.",
            search_aliases=["taca demo prompt"],
            inputs=[
                io.String.Input(
                    "text",
                    multiline=True,
                    default="a red circle left of a blue square",
                    tooltip="A caption of the form 'a COLOUR SHAPE RELATION a COLOUR SHAPE'. "
                    f"Colours: {', '.join(world.COLOURS)}. Shapes: {', '.join(world.SHAPES)}. "
                    f"Relations: {', '.join(world.RELATIONS)}. "
                    "A caption a line makes a batch. Leave it empty for the negative prompt.",
                )
            ],
            outputs=[io.Conditioning.Output(tooltip="Each caption as 16 tokens of 64 channels.")],
        )

    @classmethod
    def execute(cls, text: str) -> io.NodeOutput:
        """Encode `text`.

        Parameters
        ----------
        text : str
            A caption of at most 16 words of the vocabulary a line; several make a batch.

        Returns
        -------
        io.NodeOutput
            Conditioning of shape ``(lines, 16, 64)``.

        Raises
        ------
        ValueError
            If a word is unknown or the text is too long.
        """
        lines = text.strip().splitlines() or [""]
        tokens = torch.from_numpy(np.stack([world.encode(line) for line in lines]))
        # ComfyUI asks an SD3 conditioning for a pooled vector; the demo's model does not read it.
        pooled = {"pooled_output": torch.zeros(len(lines), 1)}
        return io.NodeOutput([[_codec().embed(tokens), pooled]])


class TACADemoLoadCLIP(io.ComfyNode):
    """The demo's text encoder as a CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return io.Schema(
            node_id="TACADemoLoadCLIP",
            display_name="TACA Demo Load CLIP",
            category="TACA/demo",
            description="The text encoder of the TACA demo's model, for CLIP Text Encode and TACA "
            f"Text Encode. It knows the words {', '.join(world.VOCABULARY[1:])}.",
            search_aliases=["taca demo clip"],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        """Load it."""
        return io.NodeOutput(clip.load(_codec()))


class TACADemoDecode(io.ComfyNode):
    """Decode the demo's latents with its linear codec."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return io.Schema(
            node_id="TACADemoDecode",
            display_name="TACA Demo Decode",
            category="TACA/demo",
            description="Decodes the TACA demo's latents. Sample them from an Empty SD3 Latent "
            "Image of 128 by 128: its 16 by 16 latents are a picture of 64 by 64 pixels here, "
            "four pixels to a latent instead of SD3's eight.",
            search_aliases=["taca demo vae"],
            inputs=[
                io.Latent.Input("samples", tooltip="Latents with 16 channels."),
                io.Int.Input(
                    "upscale",
                    default=4,
                    min=1,
                    max=16,
                    tooltip="Every pixel becomes a square of this many pixels, for viewing.",
                ),
            ],
            outputs=[io.Image.Output(tooltip="The picture, 64 by 64 pixels times the upscale.")],
        )

    @classmethod
    def execute(cls, samples: dict, upscale: int) -> io.NodeOutput:
        """Decode `samples`.

        Parameters
        ----------
        samples : dict
            Latents of shape ``(batch, 16, h, w)`` under ``"samples"``.
        upscale : int
            Size of one pixel in the image.

        Returns
        -------
        io.NodeOutput
            Image of shape ``(batch, 4 * h * upscale, 4 * w * upscale, 3)`` in [0, 1].

        Raises
        ------
        ValueError
            If the latents do not have 16 channels.
        """
        latents = samples["samples"]
        if latents.ndim != 4 or latents.shape[1] != 16:
            raise ValueError(
                "TACA Demo Decode takes latents of shape (batch, 16, height, width), "
                f"not {tuple(latents.shape)}."
            )
        pictures = _codec().decode(latents.float().cpu())
        pictures = pictures.repeat_interleave(upscale, 1).repeat_interleave(upscale, 2)
        return io.NodeOutput(pictures)


class TACADemoCheck(io.ComfyNode):
    """Judge pictures of the demo's world."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return io.Schema(
            node_id="TACADemoCheck",
            display_name="TACA Demo Check",
            category="TACA/demo",
            description="Whether a picture of the TACA demo shows all that its caption says: two "
            "shapes, their colours, and where they are.",
            search_aliases=["taca demo judge"],
            inputs=[
                io.Image.Input("image", tooltip="From TACA Demo Decode, at any upscale."),
                io.String.Input(
                    "text",
                    multiline=True,
                    default="a red circle left of a blue square",
                    tooltip="The caption, or one a line for a batch.",
                ),
            ],
            outputs=[
                io.Float.Output("score", tooltip="The share of the pictures that are right."),
                io.String.Output("label", tooltip="What is right in each."),
            ],
        )

    @classmethod
    def execute(cls, image: torch.Tensor, text: str) -> io.NodeOutput:
        """Judge.

        Parameters
        ----------
        image : torch.Tensor
            Of shape ``(batch, 64 * n, 64 * n, 3)`` in [0, 1].
        text : str
            A caption, or as many as there are pictures, one a line.

        Returns
        -------
        io.NodeOutput
            Score and label.

        Raises
        ------
        ValueError
            If a caption is not of the demo's form, or there are not as many as pictures.
        """
        captions = text.strip().splitlines()
        captions = captions * len(image) if len(captions) == 1 else captions
        found = [
            world.check(picture.cpu().numpy(), caption)
            for picture, caption in zip(image, captions, strict=True)
        ]
        labels = [
            "right" if one["everything"] else f"wrong {', '.join(k for k in one if not one[k])}"
            for one in found
        ]
        score = sum(one["everything"] for one in found) / len(found)
        return io.NodeOutput(score, "; ".join(labels))


class TACADemoDataset(io.ComfyNode):
    """Draw pictures of the demo's world, to train on."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return io.Schema(
            node_id="TACADemoDataset",
            display_name="TACA Demo Dataset",
            category="TACA/demo",
            description="Draws captioned pictures of the TACA demo's world, for Train LoRA: for "
            "each a latent and a conditioning.",
            search_aliases=["taca demo training data"],
            inputs=[
                io.Int.Input("count", default=64, min=1, max=4096, tooltip="How many pictures."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**32 - 1,
                    tooltip="Another seed draws other captions and pictures.",
                ),
            ],
            outputs=[
                io.Latent.Output(tooltip="The pictures, encoded."),
                io.Conditioning.Output(tooltip="Their captions, encoded, in the same order."),
            ],
        )

    @classmethod
    def execute(cls, count: int, seed: int) -> io.NodeOutput:
        """Draw and encode.

        Parameters
        ----------
        count : int
            How many pictures, of captions the demo's model was trained on.
        seed : int
            Of the captions and of the pictures.

        Returns
        -------
        io.NodeOutput
            Latents of shape ``(count, 16, 16, 16)`` and as many conditionings.
        """
        rng = np.random.default_rng(seed)
        captions = rng.choice(world.captions("train"), count)
        pictures = np.stack([world.render(str(caption), rng) for caption in captions])
        latents = _codec().encode(torch.from_numpy(pictures).float())
        encode = TACADemoTextEncode.execute
        conditioning = [encode(str(caption)).result[0][0] for caption in captions]
        return io.NodeOutput({"samples": latents}, conditioning)


class TACADemoExtension(ComfyExtension):
    """The demo's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """List them."""
        return [
            TACADemoTextEncode,
            TACADemoLoadCLIP,
            TACADemoDecode,
            TACADemoCheck,
            TACADemoDataset,
        ]


async def comfy_entrypoint() -> ComfyExtension:
    """Give ComfyUI the extension."""
    return TACADemoExtension()
