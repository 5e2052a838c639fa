"""The demo's text encoder as a CLIP: its vocabulary and embeddings, inside of ComfyUI's classes."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import comfy.sd
import torch
from comfy.sd1_clip import ClipTokenWeightEncoder, SD1ClipModel, SD1Tokenizer, SDTokenizer
from comfy.supported_models_base import ClipTarget

from . import world
from .codec import Codec


class Words:
    """A tokenizer with a token for each word, as transformers' tell where each stands."""

    is_fast = True

    @classmethod
    def from_pretrained(cls, path: str, **options: Any) -> Words:
        return cls()

    def __call__(self, text: str, **options: Any) -> dict[str, list[Any]]:
        """Token ids, and the characters of each.

        Raises ValueError if a word is not in the vocabulary.
        """
        # Nobody writes what cannot be printed; TACA marks a place in a template so.
        words = [word for word in re.finditer(r"\S+", text) if word[0].isprintable()]
        ids = [int(world.encode(word[0])[0]) for word in words]
        return {"input_ids": ids, "offset_mapping": [word.span() for word in words]}

    def decode(self, ids: list[int], **options: Any) -> str:
        return " ".join(world.VOCABULARY[each] for each in ids)

    def get_vocab(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(world.VOCABULARY)}


class DemoWords(SDTokenizer):
    """A caption as 16 tokens, with the weights that ComfyUI reads in it."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
        super().__init__(
            max_length=world.TOKENS,
            pad_with_end=False,
            embedding_size=64,
            embedding_key="demo",
            tokenizer_class=Words,
            has_start_token=False,
            has_end_token=False,
        )


class DemoTokenizer(SD1Tokenizer):
    """The one tokenizer of the demo's CLIP."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
        super().__init__(clip_name="demo", tokenizer=DemoWords)


class DemoEncoder(torch.nn.Module, ClipTokenWeightEncoder):
    """The codec's embeddings of words and places."""

    special_tokens: ClassVar = {"pad": 0}
    return_attention_masks = False

    def __init__(self, device: Any = None, dtype: Any = None, model_options: Any = None) -> None:
        super().__init__()
        self.transformer = torch.nn.Module()  # ComfyUI asks for one
        self.codec: Codec = model_options["codec"]

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """It has none."""

    def reset_clip_options(self) -> None:
        """It has none."""

    def encode(self, tokens: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors ``(texts, 16, 64)``, and the pooled one that the demo's model does not read."""
        return self.codec.embed(torch.tensor(tokens)).clone(), torch.zeros(len(tokens), 1)


class DemoClip(SD1ClipModel):
    """The one encoder of the demo's CLIP."""

    def __init__(self, device: Any = None, dtype: Any = None, model_options: Any = None) -> None:
        super().__init__(device, dtype, model_options, clip_name="demo", clip_model=DemoEncoder)


def load(codec: Codec) -> comfy.sd.CLIP:
    """The demo's CLIP, as ComfyUI's loaders make theirs."""
    return comfy.sd.CLIP(ClipTarget(DemoTokenizer, DemoClip), model_options={"codec": codec})
