"""Tokenizers that come in the encoder's file: FLUX.2-dev, Ernie-Image, Lens.

Core has no such files, so they are made here: Mistral's format with a token for each byte and for
some words; and Lens's of core's Llama tokenizer, with the special tokens of its template.
"""

import base64
import json
import sys
from pathlib import Path

import comfy.ops
import pytest
import torch

from support.clips import OPTIONS, TINY, clip_of

of = sys.modules["taca_pack.taca.prompt_tokens"].PromptTokens.of
MERGED = (
    "ca",
    "cat",
    " cat",
    " a",
    "fi",
    "fis",
    "fish",
    " red",
    "re",
    "red",
    " r",
    " re",
    " c",
    " ca",
)
SPECIAL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")


def mistral():
    """A file in the format of Mistral's tokenizers, as bytes in a tensor."""
    words = [bytes([i]) for i in range(256)] + [word.encode() for word in sorted(MERGED, key=len)]
    special = [*SPECIAL, *(f"<SPECIAL_{i}>" for i in range(len(SPECIAL), 12))]
    held = {
        "config": {
            "default_vocab_size": len(special) + len(words) + 12,
            "default_num_special_tokens": len(special),
        },
        "vocab": [
            {"rank": i, "token_bytes": base64.b64encode(word).decode()}
            for i, word in enumerate(words)
        ],
        "special_tokens": [{"rank": i, "token_str": word} for i, word in enumerate(special)],
    }
    return torch.tensor(list(json.dumps(held).encode()), dtype=torch.uint8)


def lens():
    """A file as Lens's encoder holds it, as bytes in a tensor."""
    from tokenizers import Tokenizer

    folder = Path(comfy.__file__).parent if comfy.__file__ else Path(*comfy.__path__)
    tokenizer = Tokenizer.from_file(f"{folder}/text_encoders/llama_tokenizer/tokenizer.json")
    tokenizer.add_special_tokens([f"<|{name}|>" for name in ("start", "message", "end", "channel")])
    return torch.tensor(list(tokenizer.to_str().encode()), dtype=torch.uint8)


@pytest.fixture(params=["FLUX.2", "Ernie-Image", "Lens"])
def clip(request, monkeypatch):
    name = request.param
    for encoder, layers in (("mistral3_24b", 31), ("ministral3_3b", 3)):
        tiny = TINY | {"num_hidden_layers": layers}
        monkeypatch.setitem(OPTIONS, f"{encoder}_model_config", tiny)
    try:
        if name == "FLUX.2":
            return clip_of("flux.Flux2Tokenizer", "flux.flux2_te", file={"tekken_model": mistral()})
        if name == "Ernie-Image":
            return clip_of(
                "ernie.ErnieTokenizer", "ernie.ErnieTEModel", file={"tekken_model": mistral()}
            )
        tiny = {
            "num_hidden_layers": 2,
            "hidden_size": 16,
            "intermediate_size": 16,
            "head_dim": 8,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "vocab_size": 128300,
        }
        monkeypatch.setitem(OPTIONS, "gpt_oss_config", tiny)
        monkeypatch.setitem(OPTIONS, "selected_layers", (0, 1))
        clip = clip_of(
            "gpt_oss.LensTokenizer", "gpt_oss.LensTEModel", file={"tokenizer_json": lens()}
        )
        generator = torch.Generator().manual_seed(1)
        for module in clip.cond_stage_model.modules():  # whose weights come with a file
            shape = getattr(module, "_orig_shape", (getattr(module, "out_features", 0), 16))
            if getattr(module, "weight", None) is None and shape[0]:
                shape = (*shape[:-1], module.in_features)
                weight = 0.3 * torch.randn(shape, generator=generator)
                module.weight = torch.nn.Parameter(weight, requires_grad=False)
        return clip
    except ImportError:
        pytest.skip(f"this ComfyUI has no {name}")
    except TypeError as error:
        if "MistralConverter" not in str(error):
            raise
        pytest.skip("this ComfyUI cannot read Mistral's tokenizers with this transformers")


def ids_of(clip, prompt):
    [chunk] = next(iter(clip.tokenize(prompt).values()))
    return [each for each, *_ in chunk]


def test_a_word_is_where_the_conditioning_changes_first(clip):
    """These encoders are causal: what is before a word does not depend on it."""
    prompts = [f"a red fish and a {word} near it" for word in ("cat", "dog")]
    conds = [clip.cond_stage_model.encode_token_weights(clip.tokenize(p))[0] for p in prompts]
    tokens = of(clip, prompts[0])
    assert len(tokens.table) == conds[0].shape[1]
    length = min(each.shape[1] for each in conds)
    different = (conds[0][:, :length] != conds[1][:, :length]).any(-1)[0]
    assert tokens.word("cat")[0] == int(different.nonzero()[0])
    assert tokens.own() == (1.0,) * len(tokens.table)


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        ("a catfish and a cat", "cat"),
        ("the red cat's red hat", "red"),
        ("an 😀 here", "😀"),
        ("一只猫在沙发上", "猫"),
        ("two\n\n words", "words"),
    ],
)
def test_words_are_their_ids(clip, prompt, word):
    """The ids at a word's tokens decode to the word alone, as often as it stands there."""
    tokens, ids = of(clip, prompt), ids_of(clip, prompt)
    cut = len(ids) - len(tokens.table)
    part = getattr(clip.tokenizer, clip.tokenizer.clip)
    found = tokens.word(word)
    decoded = part.tokenizer.decode([ids[cut + i] for i in found])
    times = prompt.replace("catfish", "").count(word)
    assert decoded.replace(" ", "") == word * times
