"""Does a picture show a text? A vision language model that came as a text encoder answers.

The answer is P(yes): the probability that the first token of the model's answer means yes, among
the tokens that mean yes or no (VQAScore, arXiv 2404.01291). Nothing is generated for it: the
question takes one forward pass.
"""

import math
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.utils
import torch
from comfy.sd1_clip import SDTokenizer
from comfy.text_encoders import qwen_vl
from torch import Tensor

from .encoder_files import opened
from .vision_encoders import LOAD, vision_encoder

QUESTION = 'Does this figure show "{}"? Please answer yes or no.'
YES, NO = ("Yes", " Yes", "yes", " yes"), ("No", " No", "no", " no")
LARGEST = 1024 * 1024  # pixels; a larger picture is scaled down, as core's edit nodes do
LONGEST = 256  # tokens that a list of phrases may take
REQUEST = """\
A picture was drawn after the description below. List what can be checked in it, one short phrase \
on a line: every object with its number and its colour or texture, and every relation between \
two objects. Use the words of the description and write nothing else.

Description: {}"""
_MARK = re.compile(r"\s*(?:(?:[-*\u2022\u2013\u2014]|\(?\d+[.)\uff0e\uff09])(?:\s+|$)|\d+\u3001)")


class Judge:
    """A CLIP of ComfyUI's that can be asked about pictures.

    Raises ValueError, with what to load instead, for an encoder that sees no pictures, lacks its
    language model head, or cannot be run as a language model by this ComfyUI.
    """

    def __init__(self, clip: Any) -> None:
        self.clip = clip
        self.name, self.model, self.family = vision_encoder(clip)
        within = vars(clip.tokenizer) | {"": clip.tokenizer}
        tokenizers = {n: part for n, part in within.items() if isinstance(part, SDTokenizer)}
        # Core calls Gemma's encoder by another name than its tokenizer.
        self.tokenizer = tokenizers.get(self.name, next(iter(tokenizers.values()))).tokenizer
        words = [[(word, self._single(word)) for word in some] for some in (YES, NO)]
        self.words = [{word: i for word, i in some if i is not None} for some in words]
        """The words for yes, and those for no, that are one token; with its id."""
        self.ids = [i for some in self.words for i in some.values()]
        self.rows = self._rows_of_the_head()
        self.is_shuffled = self.family.is_headless and shuffles()

    def load(self) -> None:
        """Have core load the encoder, which frees it when memory is short."""
        # LTX-2's encoder estimates its memory use from the tokens.
        self.clip.load_model({self.name: [[(i, 1.0) for i in self.tokens("")]]})

    def ask(
        self, picture: Tensor, questions: Sequence[str], step: Callable[[], Any] = lambda: None
    ) -> list[float]:
        """P(yes) for each question about a picture, ``(1, H, W, 3)`` in 0..1.

        The picture is encoded once for all questions. ``step`` is called after each of them. Call
        ``load`` first.

        Raises ValueError if an answer is no number.
        """
        device = self.clip.patcher.load_device
        answers = []
        with getattr(comfy.model_management, "cuda_device_context", nullcontext)(device):
            seen, extra = self.model.preprocess_embed(self.shown(picture), device=device)
            if self.is_shuffled:
                seen = seen[torch.argsort(self.model.visual.get_window_index(extra)[0])]
            seen = seen.reshape(1, -1, seen.shape[-1]).float()
            if getattr(self.model.model, "normalize_in", False):
                seen = seen * seen.shape[-1] ** -0.5  # 0.16.3 scales it as it does the words
            for question in questions:
                logits = self._logits(seen, extra, question, device)
                answers.append(torch.softmax(logits, -1)[: len(self.words[0])].sum().item())
                if math.isnan(answers[-1]):
                    raise ValueError(
                        f"TACA Prompt Check: {self.family.name}'s answer is no number (NaN), as "
                        f"where it overflows in fp16. Start ComfyUI with --bf16-text-enc or "
                        f"--fp32-text-enc, or load another file of it."
                    )
                step()
        return answers

    def shown(self, picture: Tensor) -> dict[str, Any]:
        """A picture as core's encoders take it from core's tokenizers."""
        if self.family.is_tokenized:
            tokens = self.clip.tokenize(self.family.picture, image=picture)
            [shown] = (t for some in tokens.values() for t, *_ in some[0] if isinstance(t, dict))
            return shown
        side = self.model.image_size if self.family.is_square else None
        return {"type": "image", "data": prepared(picture, side), "original_type": "image"}

    def _logits(self, seen: Tensor, extra: Any, question: str, device: Any) -> Tensor:
        """Logits of ``ids``, ``(ids,)``, for the first token of the answer."""
        tokens = self.tokens(question)
        place = tokens.index(self.family.place)
        embedding = self.model.get_input_embeddings()
        before, after = (
            embedding(torch.tensor([ids], device=device), out_dtype=torch.float32)
            for ids in (tokens[:place], tokens[place + 1 :])
        )
        info = {"type": "image", "index": place, "size": seen.shape[1], "extra": extra}
        embeds = torch.cat([before.float(), seen, after.float()], 1)
        run, own = self.model, {}
        if self.family.reads_ids:
            ids = [*tokens[:place], *[0] * seen.shape[1], *tokens[place + 1 :]]
            run, own = self.model.model, {"input_ids": torch.tensor([ids], device=device)}
        hidden = run(None, embeds=embeds, embeds_info=[info], **own)[0][:, -1:]
        if self.rows is not None:
            return hidden[0, 0].float() @ self.rows.to(hidden.device).T
        return self.model.logits(hidden)[0, -1].float()[self.ids]

    def tokens(self, question: str) -> list[int]:
        """A question about a picture, in the model's own chat format."""
        text = self.family.chat.format(self.family.picture + question)
        ids = [*self.family.start, *self.tokenizer(text)["input_ids"]]
        if self.family.around:
            place = ids.index(self.family.place)
            ids[place + 1 : place + 1] = self.family.around[1:]
            ids[place:place] = self.family.around[:1]
        return ids

    def phrases(self, text: str) -> list[str]:
        """The phrases of a text that can be checked in a picture, listed by the encoder itself.

        Raises ValueError if core does not generate text with it, or it lists none.
        """
        if self.family.is_headless or not hasattr(self.model.model.config, "stop_tokens"):
            raise ValueError(
                f"TACA Prompt Check: ComfyUI does not generate text with {self.family.name}, so "
                f"it cannot list phrases. Write them yourself, or load Qwen3-VL."
            )
        request = self.family.chat.format(REQUEST.format(text))
        tokens = self.clip.tokenize(request, skip_template=True, min_length=1)
        ids = self.clip.generate(tokens, do_sample=False, max_length=LONGEST)
        said = self.clip.decode(ids)
        if len(ids) >= LONGEST:
            said = said.rpartition("\n")[0]  # its last line is cut off
        found = listed(said)
        if not found:
            raise ValueError(
                f"TACA Prompt Check: {self.family.name} listed no phrases of this text. Write "
                f"them yourself, a line each."
            )
        return found

    def _single(self, word: str) -> int | None:
        """The id of a word that is one token; None for others."""
        ids = list(self.tokenizer(word)["input_ids"])
        ids = ids[len(self.family.start) :] if ids[:-1] == [*self.family.start] else ids
        return ids[0] if len(ids) == 1 else None

    def _rows_of_the_head(self) -> Tensor | None:
        """The head's rows for ``ids``, from the file; None if core has loaded the head itself.

        Core leaves weights that a file lacks uninitialised, so the file has to be examined.

        Raises ValueError if no file is known, or it lacks the vision model or the head.
        """
        needs_head = self.family.is_headless or self.model.model.config.lm_head
        lacks = "vision model (visual or vision_model)"
        for file in opened(self.clip):
            names = list(file.keys())
            if not any(part in name for name in names for part in ("visual.", "vision_model.")):
                continue
            heads = [name for name in names if name.endswith("lm_head.weight")]
            if heads and self.family.is_headless:
                return _rows(file, heads[0], self.ids)
            if heads or not needs_head:
                return None  # core has read it, or the embeddings are the head
            lacks = "head (lm_head.weight)"
        raise ValueError(
            f"TACA Prompt Check: this {self.family.name} has no {lacks} in its file, or its "
            f"loader does not say which file it read, so it cannot answer. {LOAD}"
        )


def listed(said: str) -> list[str]:
    """The lines of a list, each once, without their marks and numbers."""
    found = (line[mark.end() if (mark := _MARK.match(line)) else 0 :] for line in said.splitlines())
    return list(dict.fromkeys(filter(None, map(str.strip, found))))


def prepared(picture: Tensor, side: int | None = None) -> Tensor:
    """A picture as encoders get it: three channels, at most a megapixel; or a square of ``side``.

    Core would crop a picture to a square where transformers squeezes it into one.
    """
    picture = picture[..., :3]
    if side:
        channels = picture.movedim(-1, 1)
        resized = torch.nn.functional.interpolate(
            channels, (side, side), mode="bilinear", antialias=True
        )
        return resized.movedim(1, -1)
    height, width = picture.shape[1:3]
    scale = math.sqrt(LARGEST / (height * width))
    if scale >= 1:
        return picture
    size = max(1, round(width * scale)), max(1, round(height * scale))
    channels = picture.movedim(-1, 1)
    return comfy.utils.common_upscale(channels, *size, "area", "disabled").movedim(1, -1)


def shuffles() -> bool:
    """Whether core leaves Qwen2.5-VL's vision tokens in the order of its windows, as 0.16.3 does.

    Tried on a tower without blocks, in which no token attends to another.
    """
    tower = qwen_vl.Qwen2VLVisionTransformer(
        hidden_size=4,
        output_hidden_size=4,
        num_heads=1,
        num_layers=0,
        device="cpu",
        dtype=torch.float32,
        ops=comfy.ops.manual_cast,
    )
    for weight in tower.parameters():
        weight.data.copy_(torch.linspace(-1, 1, weight.numel()).view_as(weight))
    grid = torch.tensor([[1, 4, 16]])  # two windows abreast
    patches = torch.linspace(-1, 1, 64 * 3 * 2 * 14 * 14).view(64, -1).square()
    return not torch.allclose(tower(patches, grid), tower.merger(tower.patch_embed(patches)))


def geometric_mean(probabilities: Sequence[float]) -> float:
    """The geometric mean; 0 if one of them is 0."""
    # The root of each, since the product of many would underflow.
    return math.prod(each ** (1 / len(probabilities)) for each in probabilities)


def _rows(file: Any, key: str, ids: Sequence[int]) -> Tensor:
    """Rows of a weight in a file, float32 ``(ids, width)``, of fp8 scaled; errors as ``Judge``."""
    weight = file.get_slice(key)
    rows = [weight[i : i + 1] for i in ids]
    layer = key.removesuffix(".weight")
    names = (f"{layer}.scale_weight", f"{layer}.weight_scale")
    scales = [file.get_tensor(name).float() for name in file.keys() if name in names]  # noqa: SIM118
    if not rows[0].is_floating_point() or any(scale.numel() > 1 for scale in scales):
        raise ValueError(
            f"TACA Prompt Check: the head of this file is quantised in a way that is not read "
            f"({rows[0].dtype}). {LOAD}"
        )
    return math.prod(scales, start=torch.cat([row.float() for row in rows]))
