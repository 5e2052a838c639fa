"""TACA Attention Report against dense softmaxes, and the other nodes that show things."""

import sys
from functools import partial

import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_custom_sampler import (
    BasicGuider,
    CFGGuider,
    FlipSigmas,
    Guider_DualCFG,
    KSamplerSelect,
    Noise_RandomNoise,
    SamplerCustomAdvanced,
)
from comfy_extras.nodes_perpneg import Guider_PerpNeg
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

from support import tiny
from support import words as words_of
from support.loras import hooked, random_lora, replaced
from support.reference import factor_matrix, to_float64, velocity
from support.reports import report_on
from support.tiny import KINDS, run, sample, sigmas_of

report_module = sys.modules["taca_pack.taca.report"]
probe_module = sys.modules["taca_pack.taca.probe"]
tokens_module = sys.modules["taca_pack.taca.prompt_tokens"]
family_of = sys.modules["taca_pack.taca.families"].family_of
advice = sys.modules["taca_pack.nodes.preview"].advice


@pytest.fixture
def reports(monkeypatch):
    """The reports that nodes make, and not only what they draw of them."""
    made = []

    class Kept(report_module.Report):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(sys.modules["taca_pack.nodes.report"], "Report", Kept)
    return made


def dense_shares(model, kind, gamma, text=7, size=(16, 16), words=()):
    """By block: the share of text without TACA and with, and maps of the words, in float64."""
    x = torch.randn(1, 16, *size, generator=torch.manual_seed(3))
    cond = tiny.conditioning(kind, text)[0]
    extra = {"y": cond[1]["pooled_output"]}
    if kind == "flux":
        extra["guidance"] = torch.tensor([3.5])
    length = text + (size[0] // 2) * (size[1] // 2)
    found, maps = [], []

    def override(
        func, q, k, v, heads, mask=None, skip_reshape=False, skip_output_reshape=False, **kwargs
    ):
        if not skip_reshape:
            q, k, v = (y.flatten(2).unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k, v))
        logits = q.double() @ k.double().transpose(-2, -1) / q.shape[-1] ** 0.5
        if k.shape[2] != length:
            out = logits.softmax(-1) @ v
            return out if skip_output_reshape else out.transpose(1, 2).flatten(2)
        plain = logits.softmax(-1)
        taca = (logits * factor_matrix(length, slice(text), gamma)).softmax(-1)
        found.append([p[:, :, text:, :text].sum(-1).mean().item() for p in (plain, taca)])
        maps.append([taca[0, :, text:, word].sum(-1).mean(0) for word in words])
        out = taca @ v
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    velocity(to_float64(model), model, x, torch.ones(1), cond[0], override, extra)
    return torch.tensor(found), maps


@pytest.mark.parametrize("kind", KINDS)
def test_shares_and_maps_are_the_dense_ones(folder, apply_taca, pack, reports, kind):
    model = tiny.load(folder, kind)
    node = pack["TACAAttentionReport"]
    run(node, apply_taca(model, 1.5, 1000.0), kind, words="a=1, bc=2-4", steps=3)
    report = reports[0]
    table = report.table()
    expected, maps = dense_shares(model, kind, 1.5, words=([1], [2, 3, 4]))
    assert table.shape == (2, 3, len(report.blocks))
    torch.testing.assert_close(table[:, 0].T, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(table[0, 1:], table[1, 1:])  # outside the window nothing differs
    run(node, apply_taca(model, 1.5, 1000.0), kind, words="a=1, bc=2-4", steps=1)
    expected = torch.stack([torch.stack(m) for m in maps]).mean(0)
    ours = torch.stack(reports[1].maps).mean(0).flatten(1)
    torch.testing.assert_close(ours.double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_samples_as_core_does(folder, apply_taca, pack, kind, cfg, sampler):
    """The very latents of SamplerCustomAdvanced, and nothing left behind."""
    model = tiny.load(folder, kind)
    patched = apply_taca(model)
    settings = {"cfg": cfg, "sampler": sampler, "text": 9}
    expected = run(SamplerCustomAdvanced, patched, kind, **settings)[0]["samples"]
    output, shares, maps, text = run(
        pack["TACAAttentionReport"], patched, kind, words="x=2", **settings
    )
    assert torch.equal(output["samples"], expected)
    assert shares.shape[-1] == maps.shape[-1] == 3
    assert "Where TACA acts, text gets" in text
    assert not replaced(model)
    assert torch.equal(
        run(SamplerCustomAdvanced, patched, kind, **settings)[0]["samples"], expected
    )


def test_only_the_positive_prompts_rows(folder, apply_taca, pack, reports):
    """With CFG in one call the share is the positive prompt's, as without CFG."""
    model = apply_taca(tiny.load(folder, "sd3"))
    for cfg in (1.0, 3.0):
        run(pack["TACAAttentionReport"], model, "sd3", steps=1, cfg=cfg, words="")
    torch.testing.assert_close(reports[0].table(), reports[1].table(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("x=7", "text token 7, counted from 0, and the prompt has 7"),
        (", ".join(f"w{i}=1" for i in range(128)), "at most 127 words"),
    ],
)
def test_words_that_cannot_be_shown_are_told(folder, pack, words, says):
    model = tiny.load(folder, "flux")
    with pytest.raises(ValueError, match=says):
        run(pack["TACAAttentionReport"], model, "flux", steps=1, words=words)
    assert not replaced(model)


def test_a_model_without_taca(folder, pack):
    text = run(pack["TACAAttentionReport"], tiny.load(folder, "flux"), "flux", words="")[3]
    assert text.startswith("TACA acts on no step")


def test_the_cost(folder, apply_taca, pack, monkeypatch):
    """At 1024 x 1024 a run's attention is asked for half of itself again, at most."""
    model = apply_taca(tiny.load(folder, "flux"), 1.2, 0.0)
    queries = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def counting(q, *args, **kwargs):
        queries.append(q.shape[-2])
        return plain(q, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counting)
    settings = {"steps": 1, "size": (128, 128), "text": 512}
    run(SamplerCustomAdvanced, model, "flux", **settings)
    own = sum(queries)
    assert own == 4 * (4096 + 512)
    queries.clear()
    run(pack["TACAAttentionReport"], model, "flux", words="", **settings)
    assert own < sum(queries) < 1.5 * own


def test_places_lie_on_a_grid(folder):
    transformer = tiny.load(folder, "flux").model.diffusion_model
    family = family_of(transformer)

    def places(latent, image):
        grid = family.grid(transformer, latent)
        own = partial(family.own_places, transformer, grid)
        return probe_module.Probe(*[None] * 4, own, False, None, None).places(image)

    asked = places((1, 16, 128, 128), 4096)
    assert asked.shape == (1, 32, 32)
    assert asked[0, 0, :3].tolist() == [0, 2, 4]
    assert asked[0, 1, 0] == 128
    asked = places((1, 16, 13, 21), 77)
    assert asked.shape == (1, 7, 11)
    assert asked.flatten().tolist() == list(range(77))
    assert places((1, 16, 16, 16), 9 * 64).shape == (1, 8, 8)  # and not the references'
    film = places((1, 16, 49, 128, 128), 49 * 4096)
    assert film.shape == (4, 16, 16)
    assert film[1, 0, 0] == 13 * 4096


@pytest.mark.parametrize("count", [1, 3])
def test_references_are_not_the_picture(folder, apply_taca, pack, reports, count):
    """FLUX.1 Kontext: as with CFG 1 the picture's own tokens, however many references there are."""
    model = tiny.load(folder, "flux")
    refs = [torch.ones(1, 16, 8, 6)] * count
    positive = tiny.conditioning("flux", 7, reference_latents=refs)
    guider = BasicGuider.execute(apply_taca(model, 1.5, 0.0), positive).result[0]
    shown(pack, guider, model, "a=1", (8, 6))
    assert {m.shape for m in reports[0].maps} == {(1, 4, 3)}


def shown(pack, guider, model, words, size, **more):
    return (
        pack["TACAAttentionReport"]
        .execute(
            Noise_RandomNoise(3),
            guider,
            KSamplerSelect.execute("euler").result[0],
            sigmas_of(model, 1),
            {"samples": torch.zeros(1, 16, *size)},
            words,
            **more,
        )
        .result
    )


@pytest.mark.parametrize("lengths", [(7, 9), (7, 7)])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_combined_prompts_are_kept_apart(folder, apply_taca, pack, reports, lengths, cfg):
    """A word and the share are the first prompt's, as if there were no other."""
    model = tiny.load(folder, "flux")
    first, second = (tiny.conditioning("flux", n, seed=i) for i, n in enumerate(lengths, 1))
    negative = tiny.conditioning("flux", lengths[0], seed=5)
    for positive in (first, [*first, *second]):
        patched = apply_taca(model, 1.5, 0.0)
        guider = CFGGuider.execute(patched, positive, negative, cfg).result[0]
        shown(pack, guider, model, "a=1", (16, 16))
    alone, combined = reports
    torch.testing.assert_close(combined.table(), alone.table(), atol=1e-5, rtol=1e-4)
    maps = [torch.stack(report.maps).mean(0) for report in (combined, alone)]
    torch.testing.assert_close(*maps, atol=1e-5, rtol=1e-4)


def carrying(seed, text):
    """A conditioning of seven tokens that carries its words, one a token."""
    starts = [i for i in range(len(text)) if i == 0 or text[i - 1] == " "]
    token = tokens_module.Token
    table = [(token("l", i, len(text[i:].split()[0]) + i, False, False),) for i in starts]
    padding = [(token("l", 0, 0, True, False),)] * (7 - len(table))
    prompt = words_of.PromptTokens(text, tuple(table + padding))
    own = words_of.Words(prompt, (1.0,) * 7, ())
    return words_of.attach(tiny.conditioning("flux", 7, seed=seed), own)


def test_of_combined_prompts_the_one_that_has_the_word(folder, apply_taca, pack, reports):
    """Each carries its own words: they are found, and looked for, in one of them."""
    model = tiny.load(folder, "flux")
    plain = tiny.conditioning("flux", 7, seed=4)
    first, second = carrying(1, "a red cat"), carrying(2, "one big blue dog")
    mask = {"area": (8, 8, 0, 0), "strength": 1.0}
    area = [[second[0][0], {**second[0][1], **mask}]]
    runs = [(second, "blue"), ([*plain, *first, *second], "blue"), ([*first, *plain], "red cat")]
    runs += [(first, "red cat"), ([*plain, *second, *area], "dog")]
    for positive, words in runs:
        guider = BasicGuider.execute(apply_taca(model, 1.5, 0.0), positive).result[0]
        shown(pack, guider, model, words, (16, 16))
    for alone, combined in ((0, 1), (3, 2)):
        torch.testing.assert_close(
            torch.stack(reports[combined].maps),
            torch.stack(reports[alone].maps),
            atol=1e-5,
            rtol=1e-4,
        )
    assert {m.shape for m in reports[-1].maps} == {(1, 8, 8), (1, 4, 4)}
    with pytest.raises(ValueError, match="does not find 'fox'"):
        shown(pack, guider, model, "fox", (16, 16))


@pytest.mark.parametrize("which", ["dual", "nested", "perp-neg"])
def test_other_guiders(folder, apply_taca, pack, reports, which):
    """Shares and maps are the positive prompt's, as if it were alone."""
    model = apply_taca(tiny.load(folder, "flux"), 1.5, 0.0)
    lengths = enumerate((7, 9, 12))
    positive, middle, negative = (tiny.conditioning("flux", n, seed=i) for i, n in lengths)
    alone = BasicGuider.execute(model, positive).result[0]
    if which == "perp-neg":
        guider = Guider_PerpNeg(model)
        guider.set_conds(positive, negative, middle)
        guider.set_cfg(3.0, 1.0)
    else:
        guider = Guider_DualCFG(model)
        guider.set_conds(positive, middle, negative)
        guider.set_cfg(3.0, 2.0, nested=which == "nested")
    for each in (alone, guider):
        shown(pack, each, model, "a=1", (16, 16))
    tables, maps = ([report.table() for report in reports], [r.maps for r in reports])
    torch.testing.assert_close(*tables, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(*map(torch.stack, maps), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("first", ["watch", "guidance"])
def test_a_pass_without_some_layers_is_not_the_pictures(folder, apply_taca, first):
    """Skip layer guidance calls the model once more with the prompt; the report is as without."""
    model, reports = apply_taca(tiny.load(folder, "flux"), 1.5, 0.0), []

    def skipping(model):
        return SkipLayerGuidanceDiT.execute(model, 3.0, 0.0, 1.0, "1", "0", 0.0).result[0]

    for adds in ((), (skipping,)):
        report = report_on({"a": [1]})
        steps = [lambda m, report=report: report_module.watched(m, report), *adds]
        watched = model
        for add in steps if first == "watch" else steps[::-1]:
            watched = add(watched)
        sample(watched, "flux", steps=1, text=(7, 7))
        reports.append(report)
    assert len(reports[0].maps) == len(reports[1].maps) == 4
    torch.testing.assert_close(*(report.table() for report in reports))
    torch.testing.assert_close(*(torch.stack(report.maps) for report in reports))


def test_a_prompt_twice_is_measured_twice(folder, apply_taca):
    """Of one text and the same latents, with a LoRA's hook and without: other attention."""
    model = apply_taca(tiny.load(folder, "flux"), 1.5, 0.0)
    prompt = tiny.conditioning("flux", 7)
    hooked_one, tables = hooked(prompt, random_lora(model, only="blocks")), []
    for positive in (prompt, hooked_one, [*prompt, *hooked_one]):
        report = report_on({"a": [1]}, 7, lambda: prompt[0][0])
        sample(report_module.watched(model, report), "flux", steps=1, positive=positive)
        tables.append(report.table())
    assert (tables[0] - tables[1]).abs().max() > 1e-3
    torch.testing.assert_close(tables[2], (tables[0] + tables[1]) / 2, atol=1e-5, rtol=1e-4)


def test_a_call_outside_a_run_is_measured(folder):
    """As a node makes it that calls the model without a guider: the first prompt counts."""
    model = tiny.load(folder, "flux")
    report = report_on({"a": [1]})
    report.asked = report.ask(None)  # as a run before has left it
    watched = report_module.watched(model, report)
    x, [[text, extras]] = tiny.latent(16, 16, batch=2), tiny.conditioning("flux", 7, batch=2)
    given = {"y": extras["pooled_output"], "guidance": torch.full((2,), 3.5)}
    for wrappers in (model.wrappers, watched.wrappers):
        options = {"wrappers": wrappers, "cond_or_uncond": [0, 1]}
        watched.model.apply_model(
            x, torch.full((2,), 0.9), c_crossattn=text, transformer_options=options, **given
        )
    assert len(report.shares) == len(report.blocks)
    assert [is_whole for _, is_whole in report.word_maps()] == [True]


def test_an_area_beside_a_whole_prompt(folder, apply_taca, pack, reports):
    """Of one prompt, found by what its CLIP makes of it, in two sizes: a picture for each."""
    model = tiny.load(folder, "flux")
    text = tiny.conditioning("flux", 7)[0]
    other = tiny.conditioning("flux", 7, seed=4)[0]
    area = [text[0], {**text[1], "area": (8, 8, 0, 0), "strength": 1.0}]
    model_ = apply_taca(model, 1.5, 0.0)
    for positive in ([other, text, area], [other, area]):
        report = report_on({"a": [1]}, 7, lambda: text[0])
        guider = BasicGuider.execute(report_module.watched(model_, report), positive).result[0]
        SamplerCustomAdvanced.execute(
            Noise_RandomNoise(3),
            guider,
            KSamplerSelect.execute("euler").result[0],
            sigmas_of(model, 1),
            {"samples": torch.zeros(1, 16, 16, 16)},
        )
        sizes = {(1, 8, 8), (1, 4, 4)} if len(positive) == 3 else {(1, 4, 4)}
        assert {m.shape for m in report.maps} == sizes
        sys.modules["taca_pack.nodes.report"].heat_maps(report, None)
    guider = BasicGuider.execute(report_module.watched(model_, report), [other, other]).result[0]
    with pytest.raises(ValueError, match="none of the 2 combined conditionings is of this prompt"):
        guider.sample(*[torch.zeros(1, 16, 16, 16)] * 2, None, sigmas_of(model, 1))


def test_an_area_of_another_prompt(folder, apply_taca, pack, reports):
    model = tiny.load(folder, "flux")
    whole, area = (tiny.conditioning("flux", 7, seed=i) for i in (1, 2))
    area[0][1] |= {"area": (8, 8, 0, 0), "strength": 1.0}
    guider = BasicGuider.execute(apply_taca(model, 1.5, 0.0), [*whole, *area]).result[0]
    shown(pack, guider, model, "a=1", (16, 16))
    assert {m.shape for m in reports[0].maps} == {(1, 8, 8)}


@pytest.mark.parametrize("kind", KINDS)
def test_schedule_preview_says_what_the_run_does(folder, apply_taca, pack, kind, caplog):
    caplog.set_level("INFO", logger="taca")
    model = apply_taca(tiny.load(folder, kind), 1.3, 900.0)
    output = pack["TACASchedulePreview"].execute(sigmas_of(model, 10), model)
    plot, text = output.result
    assert plot.shape[0] == 1
    longer = pack["TACASchedulePreview"].execute(sigmas_of(model, 40), model).result[0]
    assert longer.shape[1] > plot.shape[1]  # the table is in the picture
    assert plot[:, 520:].min() < 0.5  # below the plot, in ink
    assert set(output.ui) == {"images", "animated", "text"}
    sample(model, kind, steps=10)
    said = next(r.message for r in caplog.records if "acted on" in r.message)
    count = int(said.split("acted on ")[1].split(" ")[0])
    assert f"TACA acts on {count} of 10 steps" in text
    assert text.count("1.300") == count


@pytest.mark.parametrize("kind", KINDS)
def test_first_steps_from_picture_to_noise(folder, apply_taca, pack, kind):
    """Eight steps of core's FlipSigmas: gamma acts in the calls 1 to 3, as the preview says."""
    window = {"window": "first steps", "steps": 3}
    schedule = pack["TACASchedule"].execute(1.3, window).result[0]
    model = apply_taca(tiny.load(folder, kind), schedule=schedule)
    sigmas = FlipSigmas.execute(sigmas_of(model, 8)).result[0]
    text = pack["TACASchedulePreview"].execute(sigmas, model).result[1]
    assert ["1.300" in line for line in text.splitlines()[-8:]] == [True] * 3 + [False] * 5
    assert acting(model, kind, "euler", sigmas) == [True] * 3 + [False] * 5


def acting(model, kind, sampler, sigmas):
    """For each call of a run: whether TACA has swapped a forward for it."""
    calls, model = [], model.clone()

    def watch(executor, *args, **kwargs):
        calls.append(bool(replaced(model)))
        return executor(*args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "watch", watch)
    guider = BasicGuider.execute(model, tiny.conditioning(kind, 7)).result[0]
    SamplerCustomAdvanced.execute(
        Noise_RandomNoise(3),
        guider,
        KSamplerSelect.execute(sampler).result[0],
        sigmas,
        {"samples": torch.zeros(1, 16, 16, 16)},
    )
    return calls


@pytest.mark.parametrize(
    "sampler", ["dpmpp_2m_sde", "dpmpp_sde", "er_sde", "sa_solver", "seeds_2", "exp_heun_2_x0"]
)
def test_pure_noise_of_every_sampler(folder, apply_taca, sampler):
    """Their first call is at t = 999.97."""
    model = apply_taca(tiny.load(folder, "flux"), 1.3, 1000.0)
    calls = acting(model, "flux", sampler, sigmas_of(model, 6))
    assert calls[0]
    assert sum(calls) == 1


@pytest.mark.parametrize(
    ("inside", "says"),
    [
        ([False] * 10, "No step is inside"),
        ([True] * 3 + [False] * 27, ""),
        ([True] + [False] * 3, "single step is a quarter"),
        ([True], "single step is a quarter"),
        ([True] * 5 + [False] * 5, "quarter of"),
    ],
)
def test_advice(inside, says):
    hints = advice(inside, 1.2)
    assert len(hints) == bool(says)
    assert says in "".join(hints)


def test_preview_errors(folder, pack):
    node, model = pack["TACASchedulePreview"], tiny.load(folder, "flux")
    with pytest.raises(ValueError, match="no schedule"):
        node.execute(sigmas_of(model, 4), model)
    schedule = pack["TACASchedule"].execute(1.2, {"window": "timestep", "timestep_threshold": 970})
    with pytest.raises(ValueError, match="without a step"):
        node.execute(torch.tensor([]), model, schedule.result[0])
    model.add_object_patch("diffusion_model", torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="TACA"):
        node.execute(torch.tensor([1.0, 0.0]), model, schedule.result[0])


def test_sweep(folder, pack):
    """One model for each setting; gamma 1 is the plain model's bits, and only once."""
    model = tiny.load(folder, "flux")
    models, labels, *_ = pack["TACASweep"].execute(model, "1, 1.2; 1.5", "970,900").result
    assert labels == [
        "gamma 1 (plain)",
        "gamma 1.2, t >= 970",
        "gamma 1.2, t >= 900",
        "gamma 1.5, t >= 970",
        "gamma 1.5, t >= 900",
    ]
    assert torch.equal(sample(models[0], "flux"), sample(model, "flux"))
    assert not torch.equal(sample(models[1], "flux"), sample(models[3], "flux"))
    percent = pack["TACASweep"].execute(model, "1.2", "970, 25 %", "3, 4", "a cup\n\n a hat ")
    models, labels, seeds, prompts = percent.result
    at = "gamma 1.2, t >= 970", "gamma 1.2, 0-25 %"
    assert labels == [
        f"{each}, seed {seed}, {text}"
        for seed in (3, 4)
        for text in ("a cup", "a hat")
        for each in at
    ]
    assert seeds == [3] * 4 + [4] * 4
    assert prompts == (["a cup"] * 2 + ["a hat"] * 2) * 2
    assert models[0] is models[2]  # one for each setting
    with pytest.raises(ValueError, match="end_percent must be between"):
        pack["TACASweep"].execute(model, "1.2", "110%")
    for bad, says in (("1, x", "must be numbers"), (" , ", "is empty"), ("nan", "finite")):
        with pytest.raises(ValueError, match=says):
            pack["TACASweep"].execute(model, bad, "970")
    assert pack["TACASweep"].execute(model, "1.2", "970", "-1, 3").result[2] == [-1, 3]
    with pytest.raises(ValueError, match="seeds must be numbers from 0 to 18446744073709551615"):
        pack["TACASweep"].execute(model, "1.2", "970", f"1, {2**64}")


def test_a_list_from_a_chinese_keyboard(folder, pack):
    model = tiny.load(folder, "flux")
    written = "1\uff0c1.2\uff1b\uff11.\uff15", "970\uff0c25\uff05", "3\u30014"
    given = pack["TACASweep"].execute(model, *written).result
    plain = pack["TACASweep"].execute(model, "1, 1.2, 1.5", "970, 25%", "3, 4").result
    assert given[1:] == plain[1:]


def test_contact_sheet(pack):
    node = pack["TACAContactSheet"]
    images = [torch.rand(1, 64, 48, 3), torch.rand(2, 64, 48, 3)]

    def places(sheet, image):
        """Where the picture lies in the sheet, pixel by pixel, once brought to 8 bits."""
        wanted, whole = ((x * 255).round() for x in (image, sheet))
        corners = ((whole[:-63, :-47] - wanted[0, 0]).abs() <= 1).all(-1).nonzero().tolist()
        parts = [(whole[y : y + 64, x : x + 48] - wanted).abs() for y, x in corners]
        return [part for part in parts if (part <= 1).all()]

    assert node.execute(images, None, [0]).result[0].shape[0] == 1  # the sweep is bypassed
    sheet = node.execute(images, ["one", "two"], [0], ["title"]).result[0]
    assert sheet.shape[0] == 1
    assert sheet.shape[2] < 3 * 64
    wide = node.execute(images, ["one", "two"], [3], [""]).result[0]
    assert wide.shape[2] > sheet.shape[2]
    assert wide.shape[1] < sheet.shape[1]
    with pytest.raises(ValueError, match="2 pictures and 3 labels"):
        node.execute(images, ["a", "b", "c"], [0])
    for image in (*images[0], *images[1]):  # each once, and nothing drawn over it
        assert len(places(sheet[0], image)) == len(places(wide[0], image)) == 1


@pytest.mark.parametrize("first", ["watch", "taca"])
def test_watched_in_any_sampler(folder, apply_taca, pack, first):
    """KSampler's own latents, and the figures of the report that samples by itself."""
    model = tiny.load(folder, "flux")

    def watch(model):
        return pack["TACAWatchAttention"].execute(model, "a=1").result

    if first == "watch":
        watched, report = watch(model)
        watched = apply_taca(watched, 1.5, 750.0)
    else:
        watched, report = watch(apply_taca(model, 1.5, 750.0))
    with pytest.raises(RuntimeError, match="has not been sampled"):
        pack["TACAShowAttention"].execute(report, torch.zeros(1, 64, 64, 3))
    for steps in (7, 5):  # a report is of the last run alone
        plain = sample(apply_taca(model, 1.5, 750.0), "flux", steps=steps)
        assert torch.equal(sample(watched, "flux", steps=steps), plain)
        assert report.table().shape == (2, steps, len(report.blocks))
        assert len(report.maps) == steps * len(report.blocks)
    alone = report_on({"a": [1]})
    sample(report_module.watched(apply_taca(model, 1.5, 750.0), alone), "flux", steps=5)
    assert torch.equal(report.table(), alone.table())
    assert (report.table()[0] != report.table()[1]).any(1).tolist() == [True] * 3 + [False] * 2
    output = pack["TACAShowAttention"].execute(report, torch.zeros(1, 64, 64, 3))
    assert len(output.ui["images"]) == 2
    pictures = output.result
    assert pictures[0].shape[-1] == pictures[1].shape[-1] == 3
    assert pictures[2].startswith("Where TACA acts, text gets")
    assert not replaced(model)
