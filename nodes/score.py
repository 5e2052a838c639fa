"""TACA Alignment Score: IMAGE and text -> CLIP's cosine between them, to label a contact sheet."""

from pathlib import Path
from typing import Any

import comfy.utils
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.sd import CLIP
from comfy_api.latest import io
from safetensors import safe_open
from torch import Tensor

from ..taca.encoder_files import SAFE, files_of
from .ui.pictures import in_rgb, require_pictures
from .ui.schema import schema
from .ui.text import show_text

ADVICE = (
    "Load CLIP-L by CLIPLoader with type stable_diffusion, from a file that has its text "
    "projection (clip_l.safetensors as published with FLUX and SD3 has it)."
)
_READABLE = (*SAFE, ".pt", ".pth", ".bin", ".ckpt")


class TACAAlignmentScore(io.ComfyNode):
    """How close a picture is to a text, by CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "TACAAlignmentScore",
            inputs=[
                io.Image.Input("image"),
                io.String.Input("text", default="", multiline=True),
                io.ClipVision.Input("clip_vision"),
                io.Clip.Input("clip"),
                io.String.Input("label", optional=True, force_input=True),
            ],
            outputs=[io.Float.Output("score"), io.String.Output("label")],
            search_aliases=["taca", "clip score", "clip similarity", "prompt alignment"],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, image: Tensor, text: str, clip_vision: Any, clip: Any, label: str | None = None
    ) -> io.NodeOutput:
        require_pictures("TACA Alignment Score", [image])
        cosines = clip_cosines(in_rgb(image), text, clip_vision, clip)
        score = cosines.mean().item()
        shown = f"CLIP {score:.4f}"
        if len(cosines) > 1:
            low, high = cosines.min().item(), cosines.max().item()
            shown += f" ({low:.4f} to {high:.4f})"
        show_text(shown)
        return io.NodeOutput(score, f"{label}: {shown}" if label else shown)


def clip_cosines(image: Tensor, text: str, clip_vision: ClipVisionModel, clip: CLIP) -> Tensor:
    """Cosine between each picture and the text (Radford et al. 2021, arXiv 2103.00020).

    ``image`` is ``(b, H, W, 3)`` in 0..1, cropped to its middle square; returns ``(b,)``, float32.

    Raises ValueError if the text is empty, or one of the encoders is not CLIP ViT-L with its
    projection.
    """
    if not text.strip():
        raise ValueError("TACA Alignment Score has no text to compare the picture with.")
    of_text = text_embedding(clip, text)
    of_image = clip_vision.encode_image(image)["image_embeds"]
    is_clip = getattr(clip_vision, "model_type", "clip_vision_model") == "clip_vision_model"
    if not is_clip or of_image.shape[-1] != of_text.shape[-1]:
        raise ValueError(
            "TACA Alignment Score compares within CLIP ViT-L, and this vision model is another: "
            "load CLIP ViT-L/14's (clip_vision_l, or CLIP-ViT-L-14) by Load CLIP Vision."
        )
    of_image = of_image.to(of_text).float()
    return torch.nn.functional.cosine_similarity(of_image, of_text.float(), dim=-1).cpu()


def text_embedding(clip: CLIP, text: str) -> Tensor:
    """The projected embedding of a text, ``(1, 768)``; errors as above."""
    tokens = clip.tokenize(text)
    encoder = getattr(clip.cond_stage_model, "clip_l", None)
    if set(tokens) != {"l"} or encoder is None:
        raise ValueError(
            f"TACA Alignment Score needs CLIP-L by itself; these are FLUX's, SD3's or another "
            f"model's text encoders, whose output is not in the space of pictures. {ADVICE}"
        )
    _, pooled = clip.encode_from_tokens(tokens, return_pooled=True)
    projection = encoder.transformer.text_projection
    if not _has_projection(clip):
        raise ValueError(
            f"TACA Alignment Score: this CLIP-L was saved without its text projection, as in "
            f"Stable Diffusion's checkpoints, and cannot be compared with pictures. {ADVICE}"
        )
    if encoder.return_projected_pooled:
        return pooled
    return projection(pooled.to(clip.patcher.load_device))


def _has_projection(clip: CLIP) -> bool:
    """Whether the files of a CLIP have its text projection.

    Without it core leaves the layer uninitialised and records nothing, so the files have to be
    examined.

    Raises ValueError if its loader does not record the files.
    """
    files = files_of(clip)
    if not files or not all(file.suffix in _READABLE and file.is_file() for file in files):
        raise ValueError(
            f"TACA Alignment Score cannot tell whether this CLIP-L has its text projection: its "
            f"loader does not say which file it read. {ADVICE}"
        )
    return all(any("text_projection" in key for key in _keys(file)) for file in files)


def _keys(file: Path) -> list[str]:
    """The names of the tensors in a file."""
    if file.suffix in SAFE:
        with safe_open(file, framework="pt") as weights:
            return list(weights.keys())
    return list(comfy.utils.load_torch_file(str(file), safe_load=True))
