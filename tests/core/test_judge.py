"""The judge of TACA Prompt Check against transformers' own models, on tiny seeded weights."""

import gc
import io
import sys
import weakref
from functools import partial

import comfy.model_management
import pytest
import torch
from safetensors.torch import save_file

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow

from support import judges  # noqa: E402
from support.clips import CLIPS, clip_of  # noqa: E402

judge_of = sys.modules["taca_pack.taca.judge"]
ATOMS = ["two blue cats and a red circle", "a red circle", "the cats are left of the circle"]
QUESTIONS = [judge_of.QUESTION.format(text) for text in ATOMS]


def made(kind, folder, dtype=None, change=None):
    """transformers' model, and the same weights through core's loader."""
    if not judges.exists(kind):
        pytest.skip(f"this ComfyUI has no {kind}")
    model = judges.seeded(kind, dtype)
    state = judges.published(kind, model)
    state = change(state, model) if change else state
    return model, judges.load(
        kind, judges.saved(kind, state, folder / "encoder.safetensors", dtype)
    )


@pytest.fixture(scope="module", params=judges.KINDS)
def pair(request, tmp_path_factory):
    return request.param, *made(request.param, tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return made("qwen3", tmp_path_factory.mktemp("encoder"))[1]


@pytest.fixture
def check(pack):
    """The node, called as the page does: with lists."""

    def run(image, text, clip, phrases="", find_phrases=False, **more):
        listed = [each if isinstance(each, list) else [each] for each in (image, text, phrases)]
        image, text, phrases = listed
        return (
            pack["TACAPromptCheck"]
            .execute(image, text, [clip], phrases, [find_phrases], **more)
            .result
        )

    return run


def pictures(height, width, count=1):
    generator = torch.Generator().manual_seed(height)
    small = torch.rand(count, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(small, (height, width), mode="bilinear")
    return (smooth.movedim(1, -1) * 255).round() / 255


def pixels_of(kind, picture):
    """By transformers' own preparation."""
    sizes = {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor = transformers.Qwen2VLImageProcessor(
        **({} if kind == "qwen25" else sizes), min_pixels=3136, max_pixels=12845056
    )
    as_bytes = (picture * 255).round().byte().movedim(-1, 1)
    out = processor(list(as_bytes), return_tensors="pt")
    return out.pixel_values, out.image_grid_thw


def expected(kind, model, pixels, grid, question):
    """All logits of the answer's first token, from transformers' own tokens."""
    count = int(grid.prod()) // 4
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    text = (
        f"{system if kind == 'qwen25' else ''}<|im_start|>user\n<|vision_start|>"
        f"{'<|image_pad|>' * count}<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = judges.tokenizer()(text, return_tensors="pt").input_ids
    kinds = (ids == 151655).int()
    shown = {"pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": kinds}
    out = model(ids, **shown, logits_to_keep=1)
    return out.logits[0, -1]


def yes_of(logits):
    """P(yes), of the eight tokens that Qwen's vocabulary has for the two words."""
    vocabulary = judges.tokenizer().get_vocab()
    yes, no = ([vocabulary[mark + w] for mark in ("", "\u0120") for w in some] for some in WORDS)
    exps = (logits.double() - logits.max()).exp()
    return (exps[yes].sum() / exps[[*yes, *no]].sum()).item()


WORDS = ("Yes", "yes"), ("No", "no")


def assert_equal(kind, model, clip, picture, pixels=None, within=2e-5):
    own = pixels or pixels_of(kind, picture)
    wanted = [yes_of(expected(kind, model, *own, question)) for question in QUESTIONS]
    assert len({round(each, 3) for each in wanted}) == 3, "the questions must differ"
    judge = judge_of.Judge(clip)
    judge.load()
    found = judge.ask(picture, QUESTIONS)
    assert found == pytest.approx(wanted, abs=within)


@pytest.mark.parametrize("size", [(3, 4), (8, 8), (16, 7)], ids=str)
def test_equals_transformers(pair, size):
    """From the picture's bytes on: in sizes that neither resizes."""
    kind, model, clip = pair
    unit = 28 if kind == "qwen25" else 32
    assert_equal(kind, model, clip, pictures(*(unit * side for side in size)))


@pytest.mark.parametrize("size", [(130, 201), (20, 300), (300, 220)], ids=str)
def test_other_sizes(pair, size, monkeypatch):
    """Core resizes in its own way: from what it makes of the picture on."""
    from comfy.text_encoders.qwen_vl import process_qwen2vl_images

    kind, model, clip = pair
    monkeypatch.setattr(judge_of, "LARGEST", 200 * 200)
    picture = pictures(*size)
    shown = judge_of.prepared(picture)
    assert shown.shape[1:3] == ((234, 171) if size == (300, 220) else size)
    half = [0.5] * 3
    how = {} if kind == "qwen25" else {"patch_size": 16, "image_mean": half, "image_std": half}
    assert_equal(kind, model, clip, picture, process_qwen2vl_images(shown, **how))


@pytest.mark.parametrize("kind", ["qwen25", "qwen3"])
def test_fp8_with_scales(kind, tmp_path):
    """As published; the head too."""
    model, clip = made(kind, tmp_path, change=judges.in_fp8)
    assert_equal(kind, model, clip, pictures(96, 128) if kind == "qwen3" else pictures(84, 112))


def test_fp8_without_scales(tmp_path):
    model, clip = made("qwen3", tmp_path, change=partial(judges.in_fp8, scaled=False))
    assert_equal("qwen3", model, clip, pictures(96, 128))


def test_weights_in_bfloat16(tmp_path):
    """Core interpolates the embeddings of positions in that type, where transformers does not."""
    model, clip = made("qwen3", tmp_path, torch.bfloat16)
    assert_equal("qwen3", model, clip, pictures(96, 128), within=2e-3)


def test_a_sheet(pair, check, monkeypatch):
    """Batches in a list, texts and labels of their own; one load for all."""
    kind, model, clip = pair
    loads = []
    load = comfy.model_management.LoadedModel.model_load
    loaded = comfy.model_management.LoadedModel
    monkeypatch.setattr(loaded, "model_load", lambda *a, **k: loads.append(a) or load(*a, **k))
    clip.load_model()
    before = {name: {*vars(module)} for name, module in clip.cond_stage_model.named_modules()}
    comfy.model_management.unload_all_models()
    loads.clear()
    unit = 28 if kind == "qwen25" else 32
    images = [pictures(4 * unit, 5 * unit, 2), pictures(6 * unit, 4 * unit)]
    texts = [ATOMS[0], "a dog"]
    phrases = [f"{ATOMS[1]}\n\n  {ATOMS[2]} \n{ATOMS[1]}", ""]
    scores, labels, table = check(images, texts, clip, phrases, label=["gamma 1", "gamma 1.2"])
    assert len(loads) == 1
    after = {name: {*vars(module)} for name, module in clip.cond_stage_model.named_modules()}
    assert after == before
    wanted = []
    for picture in (*images[0].split(1), images[1]):
        atoms = ["a dog"] if len(wanted) == 2 else ATOMS
        own = pixels_of(kind, picture)
        asked = [judge_of.QUESTION.format(atom) for atom in atoms]
        answers = torch.tensor([yes_of(expected(kind, model, *own, each)) for each in asked])
        wanted.append(answers.log().mean().exp().item())
    assert scores == pytest.approx([(wanted[0] + wanted[1]) / 2, wanted[2]], abs=2e-5)
    low, high = sorted(wanted[:2])
    assert labels == [
        f"gamma 1: check {scores[0]:.3f} ({low:.3f} to {high:.3f})",
        f"gamma 1.2: check {scores[1]:.3f}",
    ]
    assert table.ndim == 4
    assert table.shape[-1] == 3


def test_many_phrases_and_small_numbers():
    """Their product is smaller than any float."""
    assert judge_of.geometric_mean([1e-3, 1e-5] * 100) == pytest.approx(1e-4)
    assert judge_of.geometric_mean([0.5, 0.0]) == 0


def test_white_space_around_the_text(check, qwen3):
    picture = pictures(64, 64)
    alone = check(picture, ATOMS[1], qwen3)[0]
    assert check(picture, f"\n{ATOMS[1]} \n", qwen3, ATOMS[1])[0] == alone


def test_is_freed(check, tmp_path):
    clip = made("qwen3" if judges.exists("qwen3") else "qwen25", tmp_path)[1]
    alive = weakref.ref(clip.cond_stage_model)
    check(pictures(64, 64), "a cat", clip)
    comfy.model_management.unload_all_models()
    del clip
    gc.collect()
    assert alive() is None


def test_lists_that_do_not_fit(check, qwen3):
    with pytest.raises(ValueError, match="3 pictures and 2 of text"):
        check([pictures(64, 64)] * 3, ["a", "b"], qwen3)
    with pytest.raises(ValueError, match="no text"):
        check(pictures(64, 64), " ", qwen3)


def test_pictures_of_which_nothing_can_be_said(pack, check, qwen3):
    broken = pictures(8, 8)
    broken[0, 3, 3, 1] = torch.nan
    whole = pictures(8, 8)
    nodes = (
        ("Prompt Check", lambda image: check(image, "a cat", qwen3)),
        (
            "Alignment Score",
            lambda image: pack["TACAAlignmentScore"].execute(image[-1], "a cat", None, None),
        ),
    )
    for name, run in nodes:
        with pytest.raises(ValueError, match=f"TACA {name} has no picture to look at"):
            run([whole, whole[:0]])
        with pytest.raises(
            ValueError, match=rf"TACA {name}: picture \d has pixels that are no num"
        ):
            run([whole, torch.cat([whole, broken])])


def test_an_encoder_that_gives_no_number(check, tmp_path):
    """As one that overflows in half precision."""

    def change(state, model):
        state["model.language_model.norm.weight"] = state["model.language_model.norm.weight"] * 1e39
        return state

    clip = made("qwen3", tmp_path, change=change)[1]
    with pytest.raises(ValueError, match=r"Qwen3-VL's answer is no number.*--fp32-text-enc"):
        check(pictures(64, 64), "a cat", clip)


def test_a_picture_a_pixel_high(monkeypatch):
    """It keeps that pixel where it is made smaller."""
    monkeypatch.setattr(judge_of, "LARGEST", 1000)
    assert judge_of.prepared(pictures(1, 5000)).shape == (1, 1, 2236, 3)
    assert judge_of.prepared(pictures(5000, 1)).shape == (1, 2236, 1, 3)


def test_a_grey_picture(pack, check, qwen3):
    """As the same in three channels; also where a picture is shown behind a map."""
    grey = pictures(56, 84)[..., :1]
    of_three, of_one, of_two = (
        check(each, "a cat", qwen3)[0]
        for each in (grey.expand(-1, -1, -1, 3), grey, torch.cat([grey, grey * 0], -1))
    )
    assert of_one == of_two == of_three
    shown = sys.modules["taca_pack.nodes.ui.pictures"].to_picture
    assert shown(grey[0]).tobytes() == shown(grey[0].expand(-1, -1, 3)).tobytes()


def test_is_interrupted(qwen3):
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        judge_of.Judge(qwen3).ask(pictures(64, 64), QUESTIONS)


def test_phrases_that_the_encoder_lists(check, tmp_path, monkeypatch):
    """By core's own generation, with a model that says one thing."""

    def change(state, model):
        return judges.published("qwen3", judges.scripted(model))

    clip = made("qwen3", tmp_path, change=change)[1]
    judge = judge_of.Judge(clip)
    assert judge.phrases("a picture") == ["two cats", "a red ball"]
    node = sys.modules["taca_pack.nodes.check"]
    drawn, page_of = [], node.page_of
    monkeypatch.setattr(node, "page_of", lambda *a: drawn.extend(a[0]) or page_of(*a))
    check(pictures(64, 64), "a picture", clip, "a red ball\na dog", find_phrases=True)
    assert drawn[0].rows == ["the whole text", "a red ball", "a dog", "two cats"]
    monkeypatch.setattr(judge_of, "LONGEST", 4)
    assert judge.phrases("a picture") == ["two cats"], "the line that is cut off"
    monkeypatch.setattr(judge_of, "LONGEST", 1)
    with pytest.raises(ValueError, match=r"Qwen3-VL listed no phrases.*yourself"):
        judge.phrases("a picture")


@pytest.mark.parametrize(
    ("said", "phrases"),
    [
        ("- a cat - asleep\n* a sign: 2. floor", ["a cat - asleep", "a sign: 2. floor"]),
        ("(1) a cat\n 2) a dog\n3. 2 birds", ["a cat", "a dog", "2 birds"]),
        ("1、两只猫\n２． 红球", ["两只猫", "红球"]),
        ("– a cat\n• a dog\n-\n3.", ["a cat", "a dog"]),
        ("1.5 litres of milk\n-5 degrees", ["1.5 litres of milk", "-5 degrees"]),
    ],
)
def test_the_marks_of_a_list(said, phrases):
    """Those before a phrase go, what is within it stays."""
    assert judge_of.listed(said) == phrases


def test_nothing_but_what_no_text_shows(qwen3, monkeypatch):
    """256 tokens that decode to nothing, as padding does."""
    monkeypatch.setattr(qwen3, "generate", lambda *a, **k: [151643] * judge_of.LONGEST)
    monkeypatch.setattr(qwen3, "decode", lambda *a, **k: "")
    with pytest.raises(ValueError, match="listed no phrases"):
        judge_of.Judge(qwen3).phrases("a picture")


def test_what_cannot_answer_is_refused(pair, tmp_path, monkeypatch):
    kind, _, clip = pair
    with pytest.raises(ValueError, match=r"cannot show a picture .*\(Qwen3_4B\)\. Load Qwen3-VL"):
        judge_of.Judge(clip_of(*CLIPS["Z-Image"]))
    with pytest.raises(ValueError, match=r"\(CLIPTextModel, T5\)"):
        judge_of.Judge(clip_of("flux.FluxTokenizer", "flux.FluxClipModel"))
    if kind == "qwen25":
        with pytest.raises(ValueError, match=r"does not generate text with Qwen2.5-VL.*Qwen3-VL"):
            judge_of.Judge(clip).phrases("a cat")
    monkeypatch.setattr(clip.patcher, "cached_patcher_init", None)
    with pytest.raises(
        ValueError, match=r"has no vision model.*does not say which file.*all weights"
    ):
        judge_of.Judge(clip)


def test_files_that_lack_what_makes_answers(tmp_path):
    """Core reads them, and fills in what is not there."""
    model, _ = made("qwen3", tmp_path)
    state = judges.published("qwen3", model)
    del state["lm_head.weight"]
    file = judges.saved("qwen3", state, tmp_path / "headless.safetensors")
    with pytest.raises(ValueError, match=r"Qwen3-VL has no head \(lm_head.weight\)"):
        judge_of.Judge(judges.load("qwen3", file))
    blind = {name: weight for name, weight in state.items() if "visual" not in name}
    clip = judges.load("qwen3", file, lm_head=False)
    judge_of.Judge(clip)
    blind_file = judges.saved("qwen3", blind, tmp_path / "blind.safetensors")
    clip.patcher.cached_patcher_init = (None, ([str(blind_file)],))
    with pytest.raises(ValueError, match=r"Qwen3-VL has no vision model"):
        judge_of.Judge(clip)
    with pytest.raises(ValueError, match=r"cut off below its last layers"):
        judge_of.Judge(judges.load("qwen3", file, final_norm=False, lm_head=False))


def test_a_core_that_does_not_generate(qwen3, monkeypatch):
    from comfy.text_encoders import llama

    for kind in (llama.BaseQwen3, llama.BaseGenerate):
        monkeypatch.delattr(kind, "logits")
    with pytest.raises(ValueError, match=r"does not generate text with Qwen3-VL. Update ComfyUI"):
        judge_of.Judge(qwen3)


def test_the_tokens_of_a_question(pair):
    """The words that are one token; a prompt cannot stand for the picture."""
    judge = judge_of.Judge(pair[2])
    assert [[*some] for some in judge.words] == [[*judge_of.YES], [*judge_of.NO]]
    tokens = judge.tokens("Is <|image_pad|> there?")
    assert tokens.index(151655) < tokens.index(judges.tokenizer()("Is").input_ids[0])


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """transformers' Gemma 3, the CLIP, and a tokenizer as its file has it."""
    sentencepiece = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*QUESTIONS, "Yes yes No no", "user model", "- a red ball"] * 30),
        model_writer=written,
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        add_dummy_prefix=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        user_defined_symbols=["<start_of_turn>", "Yes", "yes", "No", "no"],
        minloglevel=2,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
    )
    model = judges.gemma3()
    tokens = torch.tensor(list(written.getvalue()), dtype=torch.uint8)
    file = tmp_path_factory.mktemp("gemma") / "gemma.safetensors"
    save_file(judges.published_gemma3(model, tokens), file)
    own = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    return model, judges.load_gemma3(file), own


@pytest.mark.parametrize("size", [(224, 224), (160, 300)], ids=str)
def test_gemma3_equals_transformers(gemma, size):
    """From the picture's bytes on, as far as core goes: it attends to pictures causally."""
    model, clip, own = gemma
    judge, picture = judge_of.Judge(clip), pictures(*size)
    square = {"height": 224, "width": 224}
    as_bytes = (picture * 255).round().byte().movedim(-1, 1)
    processor = transformers.Gemma3ImageProcessor(size=square)
    pixels = processor(list(as_bytes), return_tensors="pt").pixel_values
    words = [[own.piece_to_id(word) for word in some] for some in WORDS]
    assert [[*some.values()] for some in judge.words] == words
    wanted, both_ways = [], []
    for question in QUESTIONS:
        before = own.encode("<start_of_turn>user\n\n\n")
        after = own.encode(f"\n\n{question}"), own.encode("\n<start_of_turn>model\n")
        ids = [2, *before, 255999, *[262144] * 16, 256000, *after[0], 106, *after[1]]
        ids = torch.tensor([ids])
        for found, kinds in ((wanted, None), (both_ways, (ids == 262144).int())):
            logits = model(ids, pixel_values=pixels, token_type_ids=kinds).logits[0, -1].double()
            exps = (logits - logits.max()).exp()
            found.append((exps[words[0]].sum() / exps[[*words[0], *words[1]]].sum()).item())
    judge.load()
    # transformers resizes bytes, core floats.
    within = 5e-5 if size == (224, 224) else 1e-3
    assert judge.ask(picture, QUESTIONS) == pytest.approx(wanted, abs=within)
    assert wanted != pytest.approx(both_ways, abs=1e-3)


@pytest.fixture(scope="module", params=judges.GEMMA4)
def gemma4(request, tmp_path_factory):
    """transformers' Gemma 4, the CLIP, and its tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    if not hasattr(comfy.sd.TEModel, f"GEMMA_4_{request.param}"):
        pytest.skip(f"this ComfyUI has no Gemma 4 {request.param}")
    texts = [*QUESTIONS, "Yes No user model thought\n", judge_of.REQUEST]
    written = judges.gemma4_tokenizer(texts, [word for some in WORDS for word in some])
    model = judges.gemma4(request.param)
    file = tmp_path_factory.mktemp("gemma4") / "gemma.safetensors"
    save_file(judges.published_gemma4(model, written), file)
    own = tokenizers.Tokenizer.from_str(written)
    return request.param, model, judges.load_gemma4(request.param, file), own


@pytest.mark.parametrize("size", [(528, 1200), (20, 3000)], ids=str)
def test_gemma4_equals_transformers(gemma4, size):
    """From the picture's bytes on; of the sizes that are resized, from what core makes of it."""
    kind, model, clip, own = gemma4
    judge = judge_of.Judge(clip)
    as_bytes = (pictures(*size) * 255).round().byte()
    picture = (as_bytes + 0.25) / 255  # core rounds down
    resized = (judge.shown(picture)["data"] * 255).round().byte()
    assert size != (528, 1200) or torch.equal(resized, as_bytes)
    name = f"Gemma4{'Unified' * (kind == '12B')}ImageProcessor"
    processor = getattr(transformers, name)(do_resize=False)
    shown = processor(list(resized.movedim(-1, 1)), return_tensors="pt")
    count = int(shown.pop("num_soft_tokens_per_image")[0])
    vocabulary = own.get_vocab()
    words = [[vocabulary[m + w] for m in ("", "\u2581") for w in some] for some in WORDS]
    assert [{*some.values()} for some in judge.words] == [{*some} for some in words]
    wanted = []
    for question in QUESTIONS:
        text = f"<|turn>user\n\n\n<|image>{'<|image|>' * count}<image|>\n\n{question}<turn|>\n"
        text += "<|turn>model\n" + "<|channel>thought\n<channel|>" * (kind == "12B")
        ids = torch.tensor([[2, *own.encode(text, add_special_tokens=False).ids]])
        kinds = (ids == 258880).int()
        out = model(ids, **shown, mm_token_type_ids=kinds, logits_to_keep=1)
        logits = out.logits[0, -1].double()
        exps = (logits - logits.max()).exp()
        wanted.append((exps[words[0]].sum() / exps[[*words[0], *words[1]]].sum()).item())
    assert len({round(each, 3) for each in wanted}) == 3, "the questions must differ"
    judge.load()
    # From 0.33 on another kernel of core's rotates the positions.
    assert judge.ask(picture, QUESTIONS) == pytest.approx(wanted, abs=1e-3)


def test_gemma4_lists_phrases(gemma4, monkeypatch):
    """It is asked as transformers would ask it. The first token tells: deep random models turn
    rounding errors of the cached keys into other ones behind it."""
    kind, model, clip, own = gemma4
    monkeypatch.setattr(judge_of, "LONGEST", 3)
    written = []
    monkeypatch.setattr(clip, "decode", lambda ids: written.extend(ids) or "- a cat\n- a mat\n- a")
    assert judge_of.Judge(clip).phrases("a cat on a mat") == ["a cat", "a mat"]
    text = f"<|turn>user\n{judge_of.REQUEST.format('a cat on a mat')}<turn|>\n<|turn>model\n"
    text += "<|channel>thought\n<channel|>" * (kind == "12B")
    ids = torch.tensor([[2, *own.encode(text, add_special_tokens=False).ids]])
    logits = model(ids, logits_to_keep=1).logits[0, -1]
    assert logits[written[0]] == logits.max()


def test_what_is_seen_is_in_order():
    """As each version of core needs it."""
    import inspect

    from comfy.text_encoders import qwen_vl

    restores = "argsort" in inspect.getsource(qwen_vl.Qwen2VLVisionTransformer.forward)
    assert judge_of.shuffles() != restores


@pytest.mark.parametrize("name", ["Krea 2", "Mage-Flow", "Boogu", "JoyImage", "LongCat-Image"])
def test_encoders_as_their_models_load_them(name):
    """Each has a tokenizer and a class of its own; these have no file."""
    try:
        clip = clip_of(*CLIPS[name])
    except ImportError:
        pytest.skip(f"this ComfyUI has no {name}")
    with pytest.raises(ValueError, match="has no vision model"):
        judge_of.Judge(clip)
