"""Tokenizers that come in the encoder's file: FLUX.2-dev, Ernie-Image, Lens; and SentencePiece's.

Core has no such files, so they are made here: Mistral's format with a token for each byte and for
some words; Lens's of core's Llama tokenizer, with the special tokens of its template; SentencePiece
models of Gemma's kind and of Jina's, trained on a few sentences. AuraFlow's comes with core.
"""

import base64
import io
import json
import re
import sys
from pathlib import Path

import comfy.ops
import comfy.sd
import pytest
import torch

import nodes
from support.clips import OPTIONS, TINY, clip_of, part

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


@pytest.fixture(scope="module", params=["FLUX.2", "Ernie-Image", "Lens"])
def clip(request):
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield made(request.param, monkeypatch)


def made(name, monkeypatch):
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
    inner = getattr(clip.tokenizer, clip.tokenizer.clip)
    found = tokens.word(word)
    decoded = inner.tokenizer.decode([ids[cut + i] for i in found])
    times = prompt.replace("catfish", "").count(word)
    assert decoded.replace(" ", "") == word * times


SENTENCES = (
    "a red cat on a plate and the blue dog near it",
    "the house by the sea, in two words",
    "don't touch the dog's bone",
    "one two three four five six seven",
)


def sentencepiece_model(kind, **options):
    sentencepiece = pytest.importorskip("sentencepiece")
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 30),
        model_writer=file,
        model_type=kind,
        minloglevel=2,
        hard_vocab_limit=False,
        **options,
    )
    return torch.tensor(list(file.getvalue()), dtype=torch.uint8)


def gemma():
    """With a token for each byte, spaces as they are, and no space in front."""
    return sentencepiece_model(
        "bpe",
        vocab_size=400,
        byte_fallback=True,
        add_dummy_prefix=False,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
    )


def jina():
    """Normalised, with a token for what it does not know."""
    ids = {"bos_id": 0, "pad_id": 1, "eos_id": 2, "unk_id": 3}
    return sentencepiece_model("unigram", vocab_size=100, **ids)


PIECES = {
    "AuraFlow": ("aura_t5.AuraT5Tokenizer", "aura_t5.AuraT5Model", None),
    "Lumina 2": ("lumina2.LuminaTokenizer", "lumina2.te", {"spiece_model": gemma}),
    "PixelDiT": (
        "pixeldit.PixelDiTGemma2Tokenizer",
        "pixeldit.pixeldit_te",
        {"spiece_model": gemma},
    ),
    "NewBie": (
        "newbie.NewBieTokenizer",
        "newbie.te",
        {"gemma_spiece_model": gemma, "jina_spiece_model": jina},
    ),
}


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        ("a catfish and a cat", "cat"),
        ("the red cat's red hat", "red"),
        ("an 😀 here", "😀"),
        ("一只猫在沙发上", "猫"),
        ("two\n\n  words and  one", "words"),
        ("café, a (blue:1.2) dog", "dog"),
        ("a <end_of_turn> sign", "sign"),
        ("(one (two:1.3)) three", "three"),
    ],
)
@pytest.mark.parametrize("name", PIECES)
def test_words_are_their_pieces(name, prompt, word):
    """Of SentencePiece, whose encoders here have no weights: their structure is enough."""
    tokenizer, encoder, files = PIECES[name]
    try:
        built = part(encoder)
    except ImportError:
        pytest.skip(f"this ComfyUI has no {name}")
    clip = comfy.sd.CLIP(no_init=True)
    held = {key: make() for key, make in (files or {}).items()}
    clip.tokenizer = part(tokenizer)(embedding_directory=None, tokenizer_data=held)
    clip.tokenizer_options, clip.layer_idx = {}, None
    built = built if isinstance(built, type) else built()
    clip.cond_stage_model = built(device="meta", dtype=torch.float32)
    tokens = of(clip, prompt)
    encoder_name, chunks = next(iter(clip.tokenize(prompt).items()))
    ids = [each for chunk in chunks for each, *_ in chunk]
    cut = len(ids) - len(tokens.table)
    [inner] = [v for k, v in vars(clip.tokenizer).items() if k.endswith(encoder_name)]
    found = tokens.word(word)
    decoded = inner.tokenizer.decode([int(ids[cut + i]) for i in found])
    times = prompt.replace("catfish", "").count(word)
    assert decoded.replace(" ", "") == word * times


def test_another_text_without_an_end_is_told(pack, monkeypatch, run_in_page):
    """Lumina 2's encoder is causal, and its last token is a word: the first is always the same."""
    tiny = TINY | {"num_hidden_layers": 3, "vocab_size": 400}
    monkeypatch.setitem(OPTIONS, "gemma2_2b_model_config", tiny)
    file = {"spiece_model": gemma()}
    clip = clip_of("lumina2.LuminaTokenizer", "lumina2.LuminaModel", file=file)
    text = "a red (cat:2) on a plate"

    def told(plain):
        (theirs,) = nodes.CLIPTextEncode().encode(clip, plain)
        try:
            return run_in_page(pack["TACAWeighWords"], theirs, clip, text)[1]
        except ValueError as error:
            return str(error)

    assert told("a red cat on a plate") == ""
    for other in ("a dog near the blue sea", "a red dog on a plate"):
        assert re.search("not what the CLIP makes of the text|of another text", told(other))
