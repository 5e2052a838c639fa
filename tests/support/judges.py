"""Tiny vision language models, in files as they are published, by transformers and by core."""

import json
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
    adds_one = "Gemma3" in type(model).__name__  # to the weights of its norms
    pool = torch.randn(1 << 20, generator=generator)
    for name, weight in model.named_parameters():
        count = weight.numel()
        offset = int(torch.randint(1 << 20, (), generator=generator))
        noise = pool.roll(offset).repeat(count // len(pool) + 1)[:count].view(weight.shape)
        is_norm = re.search(r"norm|ln_q", name) and name.endswith("weight")
        fan_in = weight.shape[-1] if weight.ndim < 3 else weight[0].numel()
        scale = 0.3 if weight.ndim == 1 else 1.5 * fan_in**-0.5
        values = 1 - adds_one + 0.2 * noise if is_norm else scale * noise
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


GEMMA4 = {
    "E2B": {"hidden_size_per_layer_input": 2, "num_kv_shared_layers": 20, "num_hidden_layers": 35},
    "12B": {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "num_hidden_layers": 48},
}
"""By how many layers there are core knows which it is. E2B has a vision tower, 12B has none."""
GEMMA4_TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
GEMMA4_TOWER = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 32,
}
GEMMA4_SPECIAL = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<unk>": 3,
    "<|channel>": 100,
    "<channel|>": 101,
    "<|turn>": 105,
    "<turn|>": 106,
    "<|image>": 255999,
    "<|image|>": 258880,
    "<image|>": 258882,
}


def gemma4(kind):
    """transformers' own Gemma 4, as `seeded` makes Qwen's."""
    is_unified = kind == "12B"
    text = GEMMA4_TEXT | GEMMA4[kind] | {"num_key_value_heads": 1, "final_logit_softcapping": 30.0}
    if is_unified:
        text |= {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "sliding_window": 1024}
        text |= {"use_bidirectional_attention": "vision"}
        del text["hidden_size_per_layer_input"]
        vision = {"mm_embed_dim": 64, "output_proj_dims": 64}
    else:
        full = ["sliding_attention"] * 4 + ["full_attention"]
        text |= {"use_double_wide_mlp": True, "layer_types": full * 7}
        vision = GEMMA4_TOWER | {"num_key_value_heads": 2}
    name = "Gemma4Unified" if is_unified else "Gemma4"
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.fill_(0.9)
    return with_noise(model)


def gemma4_tokenizer(texts, words):
    """As JSON: the letters of texts, words, also after a space, and Gemma's marks."""
    letters = sorted({letter for text in texts for letter in text.replace(" ", "\u2581")})
    vocabulary = GEMMA4_SPECIAL | {letter: 1000 + i for i, letter in enumerate(letters)}
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            vocabulary[word[:end]] = 2000 + len(merges)
            merges.append([word[: end - 1], word[end - 1]])
        vocabulary["\u2581" + word] = 2000 + len(merges)
        merges.append(["\u2581", word])
    how = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    marks = [
        how | {"id": number, "content": mark, "special": True}
        for mark, number in GEMMA4_SPECIAL.items()
    ]
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": marks,
            "normalizer": {
                "type": "Replace",
                "pattern": {"String": " "},
                "content": "\u2581",
            },
            "model": {"type": "BPE", "unk_token": "<unk>", "vocab": vocabulary, "merges": merges},
        }
    )


def published_gemma4(model, tokenizer):
    """Its weights and tokenizer, as ComfyUI's files have them."""
    names = {
        "model.language_model.": "model.",
        "model.vision_tower.": "vision_model.",
        "model.embed_vision.embedding_projection.": "multi_modal_projector.embedding_projection.",
        "model.embed_vision.multimodal_embedder.": "multi_modal_projector.",
        "model.embed_vision.": "vision_model.",
    }
    state = {"tokenizer_json": torch.tensor(list(tokenizer.encode()), dtype=torch.uint8)}
    for name, weight in model.state_dict().items():
        old = next((old for old in names if name.startswith(old)), None)
        if old:
            state[names[old] + name.removeprefix(old)] = weight.contiguous()
    return state


def load_gemma4(kind, file):
    """By core's loader."""
    from comfy.text_encoders import gemma4 as core

    of = getattr(core, f"Gemma4_{kind}_Config")
    small = {"hidden_size": 64, "output_proj_dims": 64, "mm_embed_dim": 64, "intermediate_size": 8}
    vision = of.vision_config | (small if kind == "12B" else GEMMA4_TOWER)
    audio = of.audio_config | {"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 8}
    options = {"gemma4_model_config": GEMMA4_TEXT | GEMMA4[kind] | {"num_key_value_heads": 1}}
    with patch.object(of, "vision_config", vision), patch.object(of, "audio_config", audio):
        return comfy.sd.load_clip([str(file)], model_options=options)
