"""The kinds of text encoders that see pictures, and how each is asked a question."""

from dataclasses import dataclass, replace
from typing import Any

from comfy.sd1_clip import SDClipModel

LOAD = (
    "Load Qwen3-VL (4B or 8B, type krea2 or stable_diffusion), Qwen2.5-VL 7B (type qwen_image), "
    "Gemma 4, or Gemma 3 with its vision model by Load CLIP, from a safetensors file with all "
    "weights."
)
_QWEN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
_QWEN_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


@dataclass(frozen=True)
class EncoderFamily:
    """A kind of text encoder, and its chat template."""

    name: str
    chat: str  # a turn of the user, with {} for the message
    picture: str  # what stands for a picture; one token of it is replaced by the picture's own
    place: int  # the id of that token
    start: tuple[int, ...] = ()  # ids that begin every text
    around: tuple[int, ...] = ()  # ids inserted before and after the picture
    is_square: bool = False  # whether pictures are squeezed into a square of the model's own size
    is_headless: bool = False  # whether core loads no head of it, and would use its embeddings
    is_tokenized: bool = False  # whether core's tokenizer makes pictures smaller, not its model
    reads_ids: bool = False  # whether its layers look at the ids too, a picture's being 0


_GEMMA = EncoderFamily(
    "Gemma 3",
    "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",
    "\n\n<image_soft_token>\n\n",
    262144,
    start=(2,),
    around=(255999, 256000),
    is_square=True,
)
_GEMMA_4_SMALL = EncoderFamily(
    "Gemma 4",
    "<|turn>user\n{}<turn|>\n<|turn>model\n",
    "\n\n<|image><|image|><image|>\n\n",
    258880,
    start=(2,),
    is_tokenized=True,
    reads_ids=True,
)
# Without a thought that is closed, the larger ones begin their answer with one.
_GEMMA_4 = replace(_GEMMA_4_SMALL, chat=_GEMMA_4_SMALL.chat + "<|channel>thought\n<channel|>")
ENCODER_FAMILIES = {
    "Qwen25_7BVLI": EncoderFamily(
        "Qwen2.5-VL",
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + _QWEN,
        _QWEN_PICTURE,
        151655,
        is_headless=True,
    ),
    "Qwen3VL": EncoderFamily("Qwen3-VL", _QWEN, _QWEN_PICTURE, 151655),
    "Gemma3_4B_Vision": _GEMMA,
    "Gemma3_12B": _GEMMA,
    "Gemma4AudioMixin": _GEMMA_4_SMALL,  # E2B and E4B, which hear too
    "Gemma4Base": _GEMMA_4,
}
"""By the name of core's class of the model, or of its first base class that is here."""


def vision_encoder(clip: Any) -> tuple[str, Any, EncoderFamily]:
    """The encoder of a CLIP that sees pictures: name, model and kind; errors as ``Judge``."""
    named = dict(clip.cond_stage_model.named_children()) | {"": clip.cond_stage_model}
    models = {n: part.transformer for n, part in named.items() if isinstance(part, SDClipModel)}
    for name, model in models.items():
        for kind in type(model).__mro__:
            if (family := ENCODER_FAMILIES.get(kind.__name__)) is None:
                continue
            if model.model.norm is None:
                raise ValueError(
                    f"TACA Prompt Check: this {family.name} is cut off below its last layers, and "
                    f"has no answers. {LOAD}"
                )
            if not family.is_headless and not hasattr(model, "logits"):
                raise ValueError(
                    f"TACA Prompt Check: this ComfyUI does not generate text with {family.name}. "
                    f"Update ComfyUI."
                )
            return name, model, family
    kinds = ", ".join(sorted({type(model).__name__.strip("_") for model in models.values()}))
    raise ValueError(
        f"TACA Prompt Check cannot show a picture to this text encoder ({kinds or 'unknown'}). "
        f"{LOAD}"
    )
