"""Tiny vision language models, in files as they are published, by transformers and by core."""

import re
from functools import cache
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import comfy.sd
import torch
import transformers
from safetensors.torch import save_file

from . import tiny_judge
from .tiny_judge import LANGUAGE

WIDTH_25 = 512  # its heads are as wide as this over their number, and core's always 128
VISION = {"depth": 8, "num_heads": 4, "intermediate_size": 96}
KINDS = ["qwen25", "qwen3", "qwen3 tied"]
FP8 = torch.float8_e4m3fn
DTYPE = {"qwen25": torch.bfloat16, "qwen3": torch.float32, "qwen3 tied": torch.float32}
"""Of the files. Core interpolates Qwen3-VL's embeddings of positions in the type of its weights."""


def exists(kind):
    """Whether this ComfyUI reads such a file."""
    return kind == "qwen25" or hasattr(comfy.sd.TEModel, "QWEN3VL_8B")


def config_of(kind):
    text = LANGUAGE | {"head_dim": 128, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    if kind == "qwen25":
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
        vision = VISION | {
            "hidden_size": 64,
            "out_hidden_size": WIDTH_25,
            "fullatt_block_indexes": [7],
        }
        return transformers.Qwen2_5_VLConfig(
            text_config=text | {"rope_parameters": rope, "hidden_size": WIDTH_25},
            vision_config=vision,
            tie_word_embeddings=False,
        )
    rope = {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    }
    vision = VISION | {
        "hidden_size": 64,
        "out_hidden_size": 64,
        "deepstack_visual_indexes": [1, 3, 6],
        "num_position_embeddings": 2304,
    }
    is_tied = kind.endswith("tied")
    return transformers.Qwen3VLConfig(
        text_config=text | {"rope_parameters": rope, "tie_word_embeddings": is_tied},
        vision_config=vision,
        tie_word_embeddings=is_tied,
    )


def seeded(kind, dtype=None):
    """transformers' own model, with weights that are numbers of this type, computed in float32."""
    dtype = dtype or DTYPE[kind]
    config = config_of(kind)
    of = {"qwen25": "Qwen2_5_VL"}.get(kind, "Qwen3VL")
    model = getattr(transformers, f"{of}ForConditionalGeneration")(config).eval()
    return with_noise(model, dtype)


def with_noise(model, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    is_gemma = "Gemma" in type(model).__name__  # whose norms add 1 to their weights
    pool = torch.randn(1 << 20, generator=generator)
    for name, weight in model.named_parameters():
        count = weight.numel()
        offset = int(torch.randint(1 << 20, (), generator=generator))
        noise = pool.roll(offset).repeat(count // len(pool) + 1)[:count].view(weight.shape)
        is_norm = re.search(r"norm|ln_q", name) and name.endswith("weight")
        fan_in = weight.shape[-1] if weight.ndim < 3 else weight[0].numel()
        scale = 0.3 if weight.ndim == 1 else 1.5 * fan_in**-0.5
        values = 1 - is_gemma + 0.2 * noise if is_norm else scale * noise
        weight.data.copy_(values.to(dtype).float())
    return model


def published(kind, model):
    """Its weights, under the names that the published files have."""
    state = {}
    for name, weight in model.state_dict().items():
        if kind == "qwen25":
            name = name.replace("model.language_model.", "model.")
            name = name.replace("model.visual.", "visual.")
        if not (name == "lm_head.weight" and kind.endswith("tied")):
            state[name] = weight
    return state


def in_fp8(state, model, scaled=True):
    """The language model's matrices in fp8, as files called fp8_scaled with a scale beside each.

    The model gets the numbers that they stand for.
    """
    own = dict(model.named_parameters())
    for name in list(state):
        is_matrix = ("proj" in name and "visual" not in name) or name == "lm_head.weight"
        if is_matrix and name.endswith("weight"):
            weight = state[name]
            scale = weight.abs().max() / 448 if scaled else torch.tensor(1.0)
            state[name] = (weight / scale).to(FP8)
            if scaled:
                state[name.removesuffix("weight") + "scale_weight"] = scale.clone()
            within = name if name in own else name.replace("model.", "model.language_model.", 1)
            own[within].data.copy_(state[name].float() * scale)
    if scaled:
        state["scaled_fp8"] = torch.zeros(2).to(FP8)
    return state


def tiny_qwen3_clip():
    """Not in every ComfyUI."""
    from comfy.text_encoders import qwen3vl

    sizes = {"hidden_size": 64, "intermediate_size": 96, "depth": 8}
    sizes |= {"deepstack_visual_indexes": [1, 3, 6]}

    class TinyQwen3Clip(qwen3vl.Qwen3VLClipModel):
        def __init__(self, **options):
            with (
                patch.dict(qwen3vl.QWEN3VL_VISION, {"qwen3vl_8b": sizes}),
                patch.dict(qwen3vl.QWEN3VL_VISION_COMMON, {"num_heads": 4}),
            ):
                super().__init__(**options)

    return TinyQwen3Clip


def load(kind, file, **changed):
    """By core's loader."""
    if kind == "qwen25":
        return tiny_judge.load_file(file, LANGUAGE | {"hidden_size": WIDTH_25})
    language = LANGUAGE | {"lm_head": not kind.endswith("tied")} | changed
    options = {"qwen3vl_8b_model_config": language, "qwen3vl_8b_class": tiny_qwen3_clip()}
    return comfy.sd.load_clip([str(file)], model_options=options)


def saved(kind, state, file, dtype=None):
    dtype = dtype or DTYPE[kind]
    scales = {name for name in state if name.endswith("scale_weight")}
    kept = {n: w if w.dtype == FP8 or n in scales else w.to(dtype) for n, w in state.items()}
    save_file({name: weight.contiguous() for name, weight in kept.items()}, file)
    return file


@cache
def tokenizer():
    """Qwen's, as it comes with core."""
    folder = Path(comfy.sd.sd1_clip.__file__).parent / "text_encoders" / "qwen25_tokenizer"
    return transformers.Qwen2Tokenizer.from_pretrained(folder)


SCRIPT = ["two", " cats", "\n\n", "1", ".", " a", " red", " ball", "<|im_end|>"]


def scripted(model):
    """A model that says one thing: each token is followed by the script's next one.

    The first follows the end of a line, which is how a chat hands over.
    """
    language, of = model.model.language_model, tokenizer()
    for layer in language.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    language.norm.weight.data.fill_(1)
    chain = [of.convert_tokens_to_ids("\u010a"), *(of(part).input_ids[0] for part in SCRIPT)]
    embedded = language.embed_tokens.weight
    for token, after in pairwise(chain):
        model.lm_head.weight.data[after] = 99 * embedded[token]
    return model


GEMMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,  # the last of them sees all, the others 1024 tokens
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SIGLIP = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 224,
    "patch_size": 14,
}
GEMMA_TOKENS = 16  # of a picture


def gemma3():
    """transformers' own Gemma 3, as `seeded` makes Qwen's."""
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    text = {"head_dim": 256, "vocab_size": 262208, "sliding_window": 1024}
    text |= {"query_pre_attn_scalar": 256, "rope_parameters": rope}
    config = transformers.Gemma3Config(
        text_config=GEMMA | text,
        vision_config=SIGLIP | {"vision_use_head": False},
        mm_tokens_per_image=GEMMA_TOKENS,
    )
    return with_noise(transformers.Gemma3ForConditionalGeneration(config).eval())


def published_gemma3(model, tokenizer):
    """Its weights and tokenizer, as ComfyUI's files have them."""
    names = {
        "model.language_model.": "model.",
        "model.vision_tower.vision_model.": "vision_model.",
        "model.vision_tower.": "vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    }
    state = {"spiece_model": tokenizer}
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight":
            old = next(old for old in names if name.startswith(old))
            state[names[old] + name.removeprefix(old)] = weight.contiguous()
    return state


def load_gemma3(file):
    """By core's loader."""
    from comfy.text_encoders import llama, lumina2

    of = llama.Gemma3_4B_Vision_Config
    tower = of.vision_config | SIGLIP

    class TinyGemma3(lumina2.Gemma3_4B_Vision_Model):
        def __init__(self, **options):
            with (
                patch.object(of, "vision_config", tower),
                patch.object(of, "mm_tokens_per_image", GEMMA_TOKENS),
            ):
                super().__init__(**options)

    options = {"gemma3_4b_vision_model_config": GEMMA, "gemma3_4b_vision_class": TinyGemma3}
    return comfy.sd.load_clip([str(file)], model_options=options)
