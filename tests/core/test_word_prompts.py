"""Prompts with weights: by core's tokenizers, and encoders of core's that are tiny."""

import sys

import comfy.hooks
import pytest
import torch
from comfy_extras.nodes_hunyuan import PROMPT_TEMPLATE_ENCODE_VIDEO_I2V

import nodes
from support.clips import CLIPS, FLUX, SD3_WITHOUT_T5, clip_of

conditioning = sys.modules["taca_pack.taca.conditioning"]
weighted_text = sys.modules["taca_pack.taca.weighted_text"]
KEY = sys.modules["taca_pack.taca.words"].WORDS_KEY
TEXT = "a (blue scarf:1.5) on a chair, (fog:0) and (pillows:-1)"
PLAIN = "a blue scarf on a chair, fog and pillows"
GLYPHS = "hunyuan_image.HunyuanImageTEModel"
ENCODERS = CLIPS | {"FLUX.1": FLUX, "SD3": SD3_WITHOUT_T5}


def clip_named(name):
    try:
        return clip_of(*ENCODERS[name], **({"t5": False} if name == "SD3" else {}))
    except ImportError:
        pytest.skip(f"this ComfyUI has no {name}")


@pytest.mark.parametrize("name", [name for name in ENCODERS if name != "HiDream-O1"])
def test_the_conditioning_is_that_of_the_plain_text(name, pack):
    clip = clip_named(name)
    ((text, extras),) = pack["TACATextEncode"].execute(clip, TEXT).result[0]
    ((expected, theirs),) = nodes.CLIPTextEncode().encode(clip, PLAIN)[0]
    assert torch.equal(text, expected)
    assert set(extras) == {*theirs, KEY, "hooks"}
    for node, more in (("TACATextEncode", ()), ("TACAWeighWords", ([[expected, theirs]],))):
        ((_, bare),) = pack[node].execute(*more, clip, TEXT, any_model=False).result[0]
        assert set(bare) == {*theirs, KEY, "model_conds"}
    words = extras[KEY]
    of = sys.modules["taca_pack.taca.prompt_tokens"].PromptTokens.of(clip, PLAIN)
    weights = [1.0] * text.shape[1]
    for word, weight in (("blue scarf", 1.5), ("fog", 0.0), ("pillows", -1.0)):
        start = PLAIN.index(word)
        for i in of.word(word):
            # HunyuanVideo's tokenizer, as transformers 5 reads it, knows no spaces: "a bl", "ue s".
            (at,) = {(token.start, token.end) for token in of.table[i]}
            written = [k for k in range(*at) if PLAIN[k] != " "]
            inside = sum(start <= k < start + len(word) for k in written) / len(written)
            weights[i] = 1 + inside * (weight - 1)
    assert list(words.weights) == pytest.approx(weights)
    assert len({*weights}) >= 4


@pytest.mark.parametrize(
    ("text", "plain", "weights"),
    [
        ("a ((red:2):1.5) b", "a red b", {"red": 2.0}),  # as core: the inner one replaces
        ("a ((red)) b", "a red b", {"red": 1.1 * 1.1}),
        ("a (red (dark blue:0.5):2) b", "a red dark blue b", {"red ": 2.0, "dark blue": 0.5}),
        (r"a \(red\) b", r"a \(red\) b", {}),
        (r"a (\(red\):2) b", r"a \(red\) b", {r"\(red\)": 2.0}),
        ("(red:1.0) b", "red b", {}),
        ("(a red\nscarf:-0.5)", "a red\nscarf", {"a red\nscarf": -0.5}),
        ("(红色围巾:1.5) 和雾", "红色围巾 和雾", {"红色围巾": 1.5}),
        ("a (b", r"a \(b", {}),
        ("(10:30:2) b", "10:30 b", {"10:30": 2.0}),
        ("", "", {}),
    ],
)
def test_weights_as_core_reads_them(text, plain, weights):
    parsed = weighted_text.parse(text)
    assert parsed.text == plain
    found = {plain[start:end]: weight for start, end, weight in parsed.phrases}
    assert found == pytest.approx(weights)
    assert len(parsed.weights) == len(plain)


def test_a_weight_that_is_no_number():
    for weight in ("nan", "inf", "-inf", "1e40"):
        with pytest.raises(ValueError, match="the weight of 'fog' must be a number"):
            weighted_text.parse(f"a (fog:{weight})")


@pytest.mark.parametrize(
    ("text", "plain", "says"),
    [
        ("smile :) (red:2)", r"smile :\) \(red:2\)", "a bracket has no partner at ') (red:2)'"),
        ("a (fog:1,5)", "a fog:1,5", "':1,5)' is no weight"),
        ("(猫：1.5)", "猫：1.5", "'：1.5)' is no weight"),
        ("（fog:2）", "（fog:2）", "':2）' is no weight"),
        ("((a:1.5): 0,8)", "a: 0,8", "': 0,8)' is no weight"),
        ("a (fog:\u22121)", "a fog:\u22121", "':\u22121)' is no weight"),
        ("a (fog:\u20131.5 )", "a fog:\u20131.5 ", "':\u20131.5 )' is no weight"),
        ("a (fog: - 1)", "a fog: - 1", "': - 1)' is no weight"),
        ("a (fog:150%)", "a fog:150%", "':150%)' is no weight"),
        ("(猫：１．５)", "猫：１．５", "'：１．５)' is no weight"),
        ("(قطة:١٫٥)", "قطة:١٫٥", "':١٫٥)' is no weight"),
        ("a cat (:2)", "a cat :2", "':2)' is no weight"),
        ("(a:1.5) (b:１.５) (c: 1e2) (d:1_0) (e:.5) (f:5.)", "a b c d e f", ""),
        (r"at 10:30, \(a:1,5\), （猫）, (16:9) (b:-.5)", r"at 10:30, \(a:1,5\), （猫）, 16 b", ""),
    ],
)
def test_what_is_no_weight_is_told(text, plain, says, pack, run_in_page, caplog):
    parsed = weighted_text.parse(text)
    assert parsed.text == plain
    clip = clip_named("Qwen-Image")
    ((_, extras),), encoded = run_in_page(pack["TACATextEncode"], clip, text)
    theirs = [[torch.zeros(1, len(extras[KEY].weights), 8), {}]]
    _, weighed = run_in_page(pack["TACAWeighWords"], theirs, clip, text)
    if not says:
        assert not parsed.warnings
        assert (encoded, weighed) == ("", "")
        return
    (warning,) = parsed.warnings
    assert says in warning
    assert (encoded, weighed) == (warning, warning)
    assert warning in caplog.text


def test_a_checkpoint_without_a_text_encoder(pack):
    """Core's loader hands None on."""
    for node, given in (
        ("TACATextEncode", (None, "a cat")),
        ("TACAWeighWords", ([], None, "a cat")),
        ("TACAWordSweep", (None, "a (cat:w)", "1, 2")),
    ):
        with pytest.raises(ValueError, match="the clip input is empty"):
            pack[node].execute(*given)


def test_what_to_avoid_is_known():
    with pytest.raises(ValueError, match="TACA cannot avoid '\U0001f9e3'"):
        conditioning.encode(clip_named("FLUX.1"), "a cat", "\U0001f9e3")


def test_what_to_avoid_is_not_cut_off():
    """LongCat-Image's encoder takes 512 tokens."""
    clip = clip_named("LongCat-Image")
    conditioning.encode(clip, "a cat", "many things " * 200)
    with pytest.raises(ValueError, match="cut it off"):
        conditioning.encode(clip, "a cat", "many things " * 300)


def test_brackets_around_nothing_avoid_nothing():
    plain, empty = (conditioning.encode(clip_named("FLUX.1"), "a cat", x) for x in ("", "( ())"))
    assert torch.equal(plain[0][0], empty[0][0])
    assert not empty[0][1][KEY].num_avoided


def test_what_to_avoid_is_not_asked_for():
    with pytest.raises(ValueError, match="no negative weights"):
        conditioning.encode(clip_named("FLUX.1"), "a cat", "(fog:-0.5)")


def test_words_beyond_a_chunk_and_across_brackets():
    clip = clip_named("SD3")
    text = "word " * 80 + "(scarf:2) and (blue:3)berry"
    ((_, extras),) = conditioning.encode(clip, text)
    of = sys.modules["taca_pack.taca.prompt_tokens"].PromptTokens.of(
        clip, weighted_text.parse(text).text
    )
    weights = extras[KEY].weights
    assert {weights[i] for i in of.word("scarf")} == {2.0}
    assert min(of.word("scarf")) > 77
    (berry,) = of.word("blueberry")
    assert weights[berry] == pytest.approx((4 * 3 + 5) / 9)


def test_an_embedding(tmp_path):
    torch.save({"clip_l": torch.randn(3, 32), "clip_g": torch.randn(3, 32)}, tmp_path / "style.pt")
    clip = clip_of(*SD3_WITHOUT_T5, str(tmp_path), t5=False)
    ((_, extras),) = conditioning.encode(clip, "a cat, (embedding:style:1.5) embedding:style")
    assert [w for w in extras[KEY].weights if w != 1] == [1.5] * 3


@pytest.mark.parametrize(
    "text",
    [
        "(embedding:style:1.5), a cat",
        "(embedding:style:1.2)(embedding:other:1.3)",
        "a cat(embedding:style:1.5)",
        "embedding:style,(cat:2)",
        "(embedding:style:1.5)cat, (a embedding:other:0.5)-x",
        "embedding:style<x and (embedding:other:2), x",
        "'sembedding:style and (embedding:style:2)",
    ],
)
def test_an_embedding_beside_brackets(tmp_path, text):
    """Read as core reads it: tokens and weights are those of core's own tokenizer."""
    for name in ("style", "other"):
        torch.save(
            {key: torch.randn(2, 32) for key in ("clip_l", "clip_g")}, tmp_path / f"{name}.pt"
        )
    clip = clip_of(*SD3_WITHOUT_T5, str(tmp_path), t5=False)
    parsed = weighted_text.parse(text)
    [theirs], [ours] = (clip.tokenize(each)["l"] for each in (text, parsed.text))
    plain = [[torch.is_tensor(t) or t for t, _ in each] for each in (theirs, ours)]
    assert plain[0] == plain[1]
    weights = conditioning.words_of(clip, parsed).weights
    assert list(weights) == pytest.approx([weight for _, weight in theirs])


def test_a_word_that_is_cut_off_or_unknown():
    """Z-Image's cut-off is none; Mochi-like limits are: by a tokenizer that stops at 77."""
    clip = clip_named("FLUX.1")
    parsed = weighted_text.parse("a (\U0001f9e3:2) scarf")
    with pytest.raises(ValueError, match="TACA cannot weigh '\U0001f9e3'"):
        conditioning.words_of(clip, parsed)


def test_a_conditioning_of_another_node(pack):
    clip = clip_named("FLUX.1")
    encode = pack["TACAWeighWords"].execute
    tokens = clip.tokenize(PLAIN)
    theirs = clip.encode_from_tokens_scheduled(tokens, add_dict={"guidance": 2.5})
    ((_, extras),) = encode(theirs, clip, TEXT).result[0]
    assert extras["guidance"] == 2.5
    assert extras[KEY].weights.count(-1.0) == len(
        sys.modules["taca_pack.taca.prompt_tokens"].PromptTokens.of(clip, PLAIN).word("pillows")
    )
    assert KEY not in theirs[0][1]
    other = [[torch.cat([theirs[0][0]] * 2, 1), {}]]
    with pytest.raises(ValueError, match="this conditioning has 512 text tokens, and the text has"):
        encode(other, clip, TEXT)
    with pytest.raises(ValueError, match="another text encoder, with tokens of 8 channels"):
        encode([[theirs[0][0][..., :8], {}]], clip, TEXT)


def test_a_text_that_its_padding_makes_as_long(pack):
    """FLUX.1's every prompt has 256 tokens: one of another text is told by what they are."""
    clip, weigh = clip_named("FLUX.1"), pack["TACAWeighWords"].execute
    plain = nodes.CLIPTextEncode().encode
    for other in ("a red house by the lake, two dogs", "portrait of a man, oil on canvas, 1890"):
        with pytest.raises(ValueError, match="this conditioning is of another text"):
            weigh(plain(clip, other)[0], clip, TEXT)
    # A word more or less, before one that weighs; core's brackets, which give T5 another token.
    for other_text in (
        "a very blue scarf on a chair, fog and pillows",
        "a scarf on a chair, fog and pillows",
        "a blue scarf on a chair, fog and soft pillows",
        "a blue scarf on a (chair:3), fog and pillows",
    ):
        with pytest.raises(ValueError, match="this conditioning is of another text"):
            weigh(plain(clip, other_text)[0], clip, TEXT)
    (theirs,) = plain(clip, other)
    for another in (
        "a (blue:1.4) scarf on a chair, (fog:0.5) and pillows",
        f"{PLAIN} in a house by the sea",
        PLAIN,
    ):
        own = plain(clip, another)[0]
        mixed = nodes.ConditioningAverage().addWeighted(own, theirs, 0.6)[0]
        for each in (own, mixed, nodes.ConditioningZeroOut().zero_out(own)[0]):
            assert KEY in weigh(each, clip, TEXT).result[0][0][1]


@pytest.mark.parametrize("name", ["SD3", "FLUX.1", "Qwen-Image", "Z-Image", "HiDream-I1"])
def test_what_cannot_be_known_of_a_conditioning_is_told(name, pack, run_in_page):
    """A text that is as long, also without padding and where padding hides it, as CLIP's does."""
    hidream = "hidream.HiDreamTokenizer", "hidream.hidream_clip"
    clip = clip_of(*hidream) if name == "HiDream-I1" else clip_named(name)

    def told(theirs, text=TEXT):
        try:
            weighed, said = run_in_page(pack["TACAWeighWords"], theirs, clip, text)
        except ValueError as error:
            return str(error)
        assert KEY in weighed[0][1]
        return said

    def plain(text):
        return nodes.CLIPTextEncode().encode(clip, text)[0]

    assert told(plain(PLAIN)) == ""
    assert told(nodes.ConditioningZeroOut().zero_out(plain(PLAIN))[0]) == ""
    if name in ("SD3", "HiDream-I1"):  # whose tokenizers read weights
        assert told(plain(f"({PLAIN}:1.4)")) == ""
    for other in (
        "a blue scarf on a wooden chair, fog and pillows",
        "a red scarf on a chair, fog and pillows",
        "two dogs in a park, rain and thunder on",
    ):
        answer = told(plain(other))
        expected = (
            "not what the CLIP makes of the text",
            "of another text",
            "text tokens, and the",
        )
        assert any(each in answer for each in expected)
    mixed = nodes.ConditioningAverage().addWeighted(plain(PLAIN), plain(other), 0.6)[0]
    assert "not what the CLIP makes of the text" in told(mixed)
    if name != "HiDream-I1":
        avoiding = pack["TACATextEncode"].execute(clip, PLAIN, "red dog").result[0]
        assert "has words to avoid" in told(avoiding)
        return
    tokens = clip.tokenize(PLAIN) | {"llama": clip.tokenize("another text")["llama"]}
    assert "not what the CLIP makes" in told(clip.encode_from_tokens_scheduled(tokens))


def test_a_picture_before_hunyuan_videos_text(pack):
    clip = clip_named("HunyuanVideo")
    tokens = clip.tokenize(
        PLAIN, llama_template=PROMPT_TEMPLATE_ENCODE_VIDEO_I2V, image_embeds=torch.rand(1, 8, 16)
    )
    (plain,) = nodes.CLIPTextEncode().encode(clip, PLAIN)
    theirs = clip.encode_from_tokens_scheduled(tokens)
    more = theirs[0][0].shape[1] - plain[0][0].shape[1]
    assert more == 8
    ((_, extras),) = pack["TACAWeighWords"].execute(theirs, clip, TEXT).result[0]
    weights = conditioning.words_of(clip, weighted_text.parse(TEXT)).weights
    assert extras[KEY].weights == (1.0,) * more + weights


def test_what_is_no_picture_before_the_text(pack):
    clip, weigh = clip_named("Qwen-Image"), pack["TACAWeighWords"].execute
    (plain,) = nodes.CLIPTextEncode().encode(clip, PLAIN)
    (longer,) = nodes.CLIPTextEncode().encode(clip, f"{PLAIN} by the sea")
    for other in (longer, nodes.ConditioningConcat().concat(plain, longer)[0]):
        with pytest.raises(ValueError, match="this conditioning is of another text"):
            weigh(other, clip, TEXT)


def test_encoders_with_texts_of_two_lengths(pack):
    clip = clip_of("hunyuan_image.HunyuanImageTokenizer", GLYPHS)
    tokens = clip.tokenize('a "dog"') | {"byt5": clip.tokenize('a "big dog"')["byt5"]}
    theirs = clip.encode_from_tokens_scheduled(tokens)
    with pytest.raises(ValueError, match="were given different texts"):
        pack["TACAWeighWords"].execute(theirs, clip, 'a "(dog:2)"')


def test_what_to_avoid_is_behind_the_prompt(pack):
    clip = clip_named("FLUX.1")
    ((text, extras),) = pack["TACATextEncode"].execute(clip, PLAIN, "red pillows", 2.0).result[0]
    of = sys.modules["taca_pack.taca.prompt_tokens"].PromptTokens.of
    own = of(clip, "red pillows").covering(0, 11)
    ((plain, _),) = nodes.CLIPTextEncode().encode(clip, PLAIN)[0]
    ((other, _),) = nodes.CLIPTextEncode().encode(clip, "red pillows")[0]
    assert torch.equal(text, torch.cat([plain, other[:, own]], 1))
    words = extras[KEY]
    assert words.weights == (1.0,) * plain.shape[1] + (-2.0,) * len(own)
    assert words.num_avoided == len(own)
    assert "hooks" not in pack["TACATextEncode"].execute(clip, PLAIN).result[0][0][1]


def test_words_that_weigh_no_more_need_no_taca(pack):
    """TACA Weigh Words takes the place of what any_model had put there."""
    clip, weigh = clip_named("FLUX.1"), pack["TACAWeighWords"].execute
    (waiting,) = pack["TACATextEncode"].execute(clip, TEXT, any_model=False).result
    assert KEY in waiting[0][1]["model_conds"]
    for text in (PLAIN, TEXT):
        ((_, extras),) = weigh(waiting, clip, text).result[0]
        assert KEY not in extras["model_conds"]
        assert ("hooks" in extras) == (text == TEXT)
    assert KEY in weigh(waiting, clip, TEXT, any_model=False).result[0][0][1]["model_conds"]


def test_one_hook_at_most(pack):
    """Weighed once more, the first weights' hook goes; what else has hooked in stays."""
    clip, weigh = clip_named("FLUX.1"), pack["TACAWeighWords"].execute
    (first,) = pack["TACATextEncode"].execute(clip, TEXT).result
    hooks = comfy.hooks.HookGroup()
    hooks.add(comfy.hooks.TransformerOptionsHook())
    both = comfy.hooks.set_hooks_for_conditioning(first, hooks)
    for text, any_model, count in ((TEXT, True, 1), (TEXT, False, 0), (PLAIN, True, 0)):
        for given, others in ((first, 0), (both, 1)):
            ((_, extras),) = weigh(given, clip, text, any_model=any_model).result[0]
            found = extras["hooks"].hooks if "hooks" in extras else []
            ours = [each for each in found if isinstance(each, conditioning.WeighHook)]
            assert (len(ours), len(found)) == (count, count + others)
    assert len(both[0][1]["hooks"]) == 2


def test_words_of_what_is_beside_the_text():
    """Llama's tokens of HiDream-I1."""
    clip = clip_of("hidream.HiDreamTokenizer", "hidream.hidream_clip")
    words = conditioning.words_of(clip, weighted_text.parse(TEXT))
    ((text, extras),) = clip.encode_from_tokens_scheduled(clip.tokenize(PLAIN))
    assert len(words.weights) == text.shape[1]
    beside = words.beside["conditioning_llama3"]
    assert len(beside) == extras["conditioning_llama3"].shape[2]
    ids = [each for chunk in clip.tokenize(PLAIN)["llama"] for each, _ in chunk]
    decode = clip.tokenizer.llama.tokenizer.decode
    for weight, word in ((1.5, "blue scarf"), (0.0, "fog"), (-1.0, "pillows")):
        found = decode([ids[i] for i, w in enumerate(beside) if w == weight])
        assert found.strip()
        assert found.replace(" ", "") in word.replace(" ", "")  # less where spaces are lost


@pytest.mark.parametrize(
    ("text", "weighed"),
    [
        ('a sign "(OPEN:2) 24" here and "(b:2)"', "OPENb"),
        ('"OPEN" (dog:2)', ""),
        ('OPEN "(OPEN:2)" OPEN "OPEN"', "OPEN"),
        ('(Text:2) "Text"', ""),
        ('‘(a:2)’ "b"', "a"),
        ('“(开:2)门” sign "(x:2)"', "x开"),  # those in straight marks come first
        ('"a\u0301 (é:2)"', "é"),
        (r'a "(\(x\):2) y"', "(x)"),
    ],
)
@pytest.mark.parametrize(
    "tokenizer", ["hunyuan_image.HunyuanImageTokenizer", "hunyuan_video.HunyuanVideo15Tokenizer"]
)
def test_what_is_to_be_written_weighs_in_byt5(tokenizer, text, weighed):
    """ByT5 is handed what stands in quotation marks, in an order of its own."""
    clip = clip_of(tokenizer, GLYPHS)
    parsed = weighted_text.parse(text)
    words = conditioning.words_of(clip, parsed)
    (chunk,) = clip.tokenize(parsed.text)["byt5"]
    ids = [each for each, _ in chunk]
    weights = words.beside["conditioning_byt5small"]
    assert len(weights) == len(ids)
    assert {*weights} <= {1.0, 2.0}
    found = [each for each, weight in zip(ids, weights, strict=True) if weight == 2]
    assert clip.tokenizer.byt5.tokenizer.decode(found) == weighed


@pytest.mark.parametrize("text", ["smile :) and (a", r"a \(big\) (cat:2)", "(a \\(b\\):0.5"])
@pytest.mark.parametrize("name", [name for name in ENCODERS if name != "HiDream-O1"])
def test_brackets_that_are_text(name, text):
    """They reach each encoder as they are meant, also one that takes a backslash as text."""
    clip = clip_named(name)
    plain = text.replace("(cat:2)", "cat")
    for bracket in "()":
        plain = plain.replace(f"\\{bracket}", bracket)
    has_weights = name in ("FLUX.1", "SD3", "OmniGen2", "HunyuanVideo")
    how = {"disable_weights": True} if has_weights else {}
    expected = clip.tokenizer.tokenize_with_weights(plain, **how)
    ((ours, extras),) = conditioning.encode(clip, text)
    assert torch.equal(ours, clip.encode_from_tokens(expected))
    assert extras[KEY].weights.count(2.0) == text.count("cat")


def test_a_word_that_one_encoder_alone_knows():
    """HiDream-I1's T5 lacks a letter that its Llama has."""
    clip = clip_of("hidream.HiDreamTokenizer", "hidream.hidream_clip")
    words = conditioning.words_of(clip, weighted_text.parse("(ĩ:1.5) and a (cat:2)"))
    assert 2.0 in words.weights
    assert 1.5 in words.beside["conditioning_llama3"]
    assert [*words.weighed_tokens()] == ["cat"]


@pytest.mark.parametrize("name", ["Qwen-Image", "Krea 2", "Boogu", "JoyImage", "Mage-Flow"])
def test_pictures_stand_before_the_text(name, pack):
    """Their encoders put the pictures' tokens first, and end as they do without pictures."""
    clip = clip_named(name)
    picture = torch.rand(1, 56, 56, 3)
    (key,) = clip.tokenize(PLAIN)
    with_picture, without = (
        [each for chunk in tokens[key] for each, *_ in chunk]
        for tokens in (clip.tokenize(PLAIN, images=[picture]), clip.tokenize(PLAIN))
    )
    words = conditioning.words_of(clip, weighted_text.parse(TEXT))
    last = [i for i, w in enumerate(words.weights) if w != 1]
    tail = len(words.weights) - last[0]
    assert with_picture[-tail:] == without[-tail:]
    assert any(not isinstance(each, int) for each in with_picture[:-tail])
    ((text, _),) = clip.encode_from_tokens_scheduled(clip.tokenize(PLAIN))
    theirs = [[torch.cat([torch.ones_like(text[:, :4]), text], 1), {}]]
    ((_, extras),) = pack["TACAWeighWords"].execute(theirs, clip, TEXT).result[0]
    assert extras[KEY].weights == (1.0,) * 4 + words.weights
    assert extras[KEY].prompt.own()[:4] == (0.0,) * 4
