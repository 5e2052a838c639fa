"""Which token is which characters': by core's tokenizers, and encoders of core's that are tiny."""

import sys

import pytest
import torch

from support.clips import CLIPS, FLUX, OPTIONS, SD3_WITHOUT_T5, TINY_T5, clip_of

tokens_module = sys.modules["taca_pack.taca.prompt_tokens"]
of = tokens_module.PromptTokens.of


@pytest.mark.parametrize("name", CLIPS)
def test_a_word_is_where_the_conditioning_changes_first(name):
    """These encoders are causal: what is before a word does not depend on it."""
    try:
        clip = clip_of(*CLIPS[name])
    except ImportError:
        pytest.skip(f"this ComfyUI has no {name}")
    prompts = [f"a (red:1.2) catfish and a {word} near it" for word in ("cat", "dog")]
    conds = [clip.cond_stage_model.encode_token_weights(clip.tokenize(p))[0] for p in prompts]
    tokens = of(clip, prompts[0])
    assert len(tokens.table) == conds[0].shape[1]
    first = int((conds[0] != conds[1]).any(-1)[0].nonzero()[0])
    assert tokens.word("cat")[0] == first
    last = conds[0].shape[1] - 1 - sum(own == 0 for own in tokens.own())
    assert tokens.own() == (1.0,) * (last + 1) + (0.0,) * (conds[0].shape[1] - last - 1)
    assert all(tokens.own()[i] for i in tokens.word("near it"))


def ids_at(clip, name, tokens, word):
    """The ids that the tokenizer has at a word's places, decoded."""
    ids = [each for chunk in clip.tokenize(tokens.text)[name] for each, _ in chunk]
    inner = getattr(clip.tokenizer, name if hasattr(clip.tokenizer, name) else f"clip_{name}")
    found = tokens.word(word)
    return found, inner.tokenizer.decode([ids[i] for i in found if i < len(ids)]).replace(" ", "")


@pytest.mark.parametrize(
    ("prompt", "word", "times"),
    [
        ("a catfish on a plate", "cat", 0),
        ("a redhead woman", "red", 0),
        ("a catfish and a cat", "cat", 1),
        ('a sign that says "OPEN 24 hours"', "OPEN", 1),
        ("well-dressed, black/white", "dressed", 1),
        ("well-dressed, black/white", "white", 1),
        ("a 3d-render", "render", 1),
        ("(a (cat:1.3):0.8) and a cat's cat_toy", "cat", 3),
        (r"a \(big\) cat (x:1.2)", "big", 1),
        ("(1:1.1)(1:1.3) 11", "1", 2),
        ("a cafe\u0301 by the sea", "cafe", 0),
        ("a cat\u200dlike dog", "cat", 0),
    ],
)
@pytest.mark.parametrize("encoder", ["t5xxl", "l"])
def test_words_end_where_words_do(prompt, word, times, encoder):
    clip = clip_of(*FLUX) if encoder == "t5xxl" else clip_of(*SD3_WITHOUT_T5, t5=False)
    tokens = of(clip, prompt)
    if not times:
        with pytest.raises(ValueError, match=f"does not find '{word}' in the prompt"):
            tokens.word(word)
        return
    _, decoded = ids_at(clip, encoder, tokens, word)
    assert decoded.strip('"-/').count(word.lower() if encoder == "l" else word) == times
    assert len(decoded) < times * (len(word) + 2)


def test_what_an_encoder_does_not_know():
    clip = clip_of(*FLUX)
    tokens = of(clip, "a 猫 and an 😀, 鹿鹿")
    for word in ("猫", "😀", "鹿"):
        with pytest.raises(ValueError, match="the text encoder does not know it"):
            tokens.word(word)
    clip = clip_of(*CLIPS["Qwen-Image"])  # whose script puts nothing between words
    text = "一只猫在沙发上"
    ids_at_word = ids_of(clip, text, "猫")
    assert clip.tokenizer.qwen25_7b.tokenizer.decode(ids_at_word) in (
        "猫",
        "只猫",
        "一只猫",
        "猫在",
    )


def ids_of(clip, text, word):
    tokens = of(clip, text)
    ids = [each for each, _ in clip.tokenize(text)["qwen25_7b"][0]]
    cut = len(ids) - len(tokens.table)
    return [ids[cut + i] for i in tokens.word(word)]


@pytest.mark.parametrize("how", [{"t5": False}, {"t5": False, "clip_l": False}, {"clip_g": False}])
def test_the_encoders_that_sd3_has(how, monkeypatch):
    if "t5" not in how:  # its conditioning is of T5's width
        wide = TINY_T5 | {"d_model": 4096, "vocab_size": 32128}
        monkeypatch.setitem(OPTIONS, "t5xxl_model_config", wide)

    clip = clip_of(*SD3_WITHOUT_T5, **how)
    tokens = of(clip, "a red cat")
    assert len(tokens.table) == (77 if "t5" in how else 154)
    assert tokens.word("red") == ([2] if "t5" in how else [2, 79])  # T5 has two tokens for "a"
    own = (1.0,) * 5 + (0.0,) * 72  # start, three words, end
    assert tokens.own()[:77] == own


def test_padding_in_the_middle():
    """A phrase in brackets is not cut in two: the chunk before it is filled up."""
    clip = clip_of(*SD3_WITHOUT_T5, t5=False)
    tokens = of(clip, "word " * 70 + "(a big red cat on the sofa:1.3) dog")
    own = (1.0,) * 72 + (0.0,) * 5 + (1.0,) * 10 + (0.0,) * 67
    assert tokens.own() == own
    assert tokens.word("cat") == [77 + 4]
    assert tokens.word("dog") == [77 + 8]


@pytest.mark.parametrize("vectors", [1, 3])
def test_textual_inversion(tmp_path, vectors):
    """An embedding's ids are tensors; an encoder of another width leaves it out."""
    torch.save(
        {"clip_l": torch.randn(vectors, 32), "clip_g": torch.randn(vectors, 32)},
        tmp_path / "style.pt",
    )
    text = "embedding:style, a cat (embedding:style:1.2) and embedding:style a dog"
    clip = clip_of(*SD3_WITHOUT_T5, str(tmp_path), t5=False)
    tokens = of(clip, text)
    assert len(tokens.table) == 77
    # start, embedding, comma, a, cat, embedding, and, embedding, a, dog, end
    assert tokens.word("cat") == [1 + vectors + 2]
    assert tokens.word("dog") == [1 + 3 * vectors + 5]
    assert sum(tokens.own()) == 3 * vectors + 8
    weighed = text.index("embedding", 20)
    first = 1 + vectors + 3
    assert tokens.covering(weighed, weighed + 15) == [*range(first, first + vectors)]
    clip = clip_of(*FLUX, str(tmp_path))  # T5 is of 64 here
    tokens = of(clip, text)
    ids = [t for t, _ in clip.tokenize(text)["t5xxl"][0] if not torch.is_tensor(t)]
    decode = clip.tokenizer.t5xxl.tokenizer.decode
    assert [decode([ids[i]]).strip() for i in (*tokens.word("cat"), *tokens.word("dog"))] == [
        "cat",
        "dog",
    ]
    assert len(tokens.table) == 256
    assert sum(tokens.own()) == ids.index(1) + 1


@pytest.mark.parametrize("folder", [None, "empty"])
def test_an_embedding_that_is_not_there(tmp_path, folder):
    clip = clip_of(*SD3_WITHOUT_T5, folder and str(tmp_path), t5=False)
    tokens = of(clip, "embedding:missing, a cat")
    _, decoded = ids_at(clip, "l", tokens, "cat")
    assert decoded == "cat"


def test_characters_that_a_tokenizer_drops():
    """HunyuanVideo's, as transformers 5 reads it; ComfyUI's own one, of 0.33, keeps them."""
    clip = clip_of(*CLIPS["HunyuanVideo"])
    decode = clip.tokenizer.llama.tokenizer.decode

    def ids_of(text):
        return [each for each, _ in clip.tokenize(text)["llama"][0]]

    tokens = of(clip, "一只猫 and a big cat😀 on the sofa, don’t")
    ids = ids_of(tokens.text)
    cut = len(ids) - len(tokens.table)
    for word in ("big cat", "sofa", "on"):
        decoded = decode([ids[cut + i] for i in tokens.word(word)])
        decoded = decoded.replace(" ", "")
        assert word.replace(" ", "") in decoded
        assert len(decoded) < len(word) + 4
    if "猫" not in decode(ids):
        with pytest.raises(ValueError, match="does not know it"):
            tokens.word("猫")
    for prompt, word in (("x😀y", "😀"), ("a cat😀dog", "😀"), ("ﬁsh", "ﬁsh"), ("cat😀", "cat😀")):
        prompt_tokens, is_kept = of(clip, prompt), word in decode(ids_of(prompt))
        start = prompt.index(word)
        assert bool(prompt_tokens.covering(start, start + len(word))) == is_kept
        assert prompt_tokens.knows(start, start + len(word)) == is_kept


@pytest.mark.parametrize("text", ["e\u0301 dog", "a\u200bb c", "x\ufeffy", "cafe\u0301 1"])
@pytest.mark.parametrize("encoder", ["t5xxl", "l"])
def test_accents_and_joiners_of_their_own(text, encoder):
    """Each token but start and end is of characters, also where a normaliser has joined some."""
    clip = clip_of(*FLUX) if encoder == "t5xxl" else clip_of(*SD3_WITHOUT_T5, t5=False)
    tokens = of(clip, text)
    own = int(sum(tokens.own())) - (1 if encoder == "t5xxl" else 2)
    first = 0 if encoder == "t5xxl" else 1
    assert tokens.covering(0, len(text)) == [*range(first, first + own)]


def test_words_as_users_write_them():
    clip = clip_of(*FLUX)
    tokens, find = of(clip, "six seven six"), tokens_module.find_words
    assert find("six, six seven", tokens) == {"six": [0, 2], "six seven": [0, 1]}
    with pytest.raises(ValueError, match="does not find 'ten'"):
        find("ten", tokens)
    assert find("x=3, y=4-6", None) == {"x": [3], "y": [4, 5, 6]}
    with pytest.raises(ValueError, match="needs clip and prompt"):
        find("six", None)
    with pytest.raises(ValueError, match="cannot read"):
        find("six=a", None)
    for half in ("\ud83d", "\ud83d=x"):  # ComfyUI's worker dies of a message it cannot write
        with pytest.raises(ValueError, match="TACA") as error:
            find(half, None)
        str(error.value).encode()
