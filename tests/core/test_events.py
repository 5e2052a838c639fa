"""What happened in a run, counted at its calls, and whose rows they were."""

import asyncio
import gc
import sys
import weakref
from contextlib import contextmanager
from itertools import pairwise

import comfy.sampler_helpers
import comfy.samplers
import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy_execution.caching import CacheKeySetInputSignature
from comfy_execution.graph import DynamicPrompt
from comfy_execution.progress import reset_progress_state
from comfy_execution.utils import CurrentNodeContext
from comfy_extras import nodes_custom_sampler as custom_sampler
from comfy_extras.nodes_custom_sampler import Guider_DualCFG
from comfy_extras.nodes_perpneg import Guider_PerpNeg, PerpNeg

import nodes as core_nodes
from support import tiny
from support.clips import FLUX as FLUX_CLIP
from support.clips import clip_of
from support.loras import random_lora
from support.reports import report_on
from support.tiny import sample
from support.words import weighed

block = sys.modules["taca_pack.taca.block"]
patch = sys.modules["taca_pack.taca.patch"]
Options = sys.modules["taca_pack.taca.options"].Options
Schedule = sys.modules["taca_pack.taca.schedule"].Schedule
TimestepWindow = sys.modules["taca_pack.taca.schedule"].TimestepWindow
NodeText = sys.modules["taca_pack.nodes.ui.text"].NodeText
lacks_taca = sys.modules["taca_pack.nodes.lora"].lacks_taca
ordinary_loras = sys.modules["taca_pack.nodes.patch"].ordinary_loras
LENGTHS = {"positive": 7, "middle": 9, "negative": 12, "empty_negative_prompt": 5}


@pytest.fixture
def gammas(monkeypatch):
    """The text lengths of the joint attentions that TACA scaled, and whether in each row."""
    seen = []
    original = block.temperature_adjusted_attention

    def spy(attend, q, k, v, gamma, layout, *args):
        length = sum(span.length for span in layout if span.kind == "text")
        seen.append((length, [bool(each != 1) for each in gamma.expand(len(q))]))
        return original(attend, q, k, v, gamma, layout, *args)

    monkeypatch.setattr(block, "temperature_adjusted_attention", spy)
    return seen


def limited(pack, model):
    options = pack["TACAOptions"].execute(True, "").result[0]
    return pack["TACAPatchModel"].execute(model, 1.5, 970.0, None, options).result[0]


def run(guider, steps=1, sampler=None, batch=1, sigmas=None):
    """One guider's run."""
    noise = torch.randn(batch, 16, 8, 8, generator=torch.manual_seed(3))
    sampler = sampler or comfy.samplers.sampler_object("euler")
    sigmas = torch.linspace(1, 0, steps + 1) if sigmas is None else sigmas
    return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas)


def conds(*names):
    return [tiny.conditioning("flux", LENGTHS[name], seed=i) for i, name in enumerate(names)]


@pytest.mark.parametrize("which", ["cfg", "dual", "nested", "perp-neg", "perp-neg patch"])
def test_gamma_is_the_positive_prompts(folder, pack, gammas, which):
    """Whatever else a guider puts into the batch, and in which order."""
    model = limited(pack, tiny.load(folder, "flux"))
    positive, middle, negative, empty = conds(*LENGTHS)
    if which == "cfg":
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
    elif which in ("dual", "nested"):
        guider = Guider_DualCFG(model)
        guider.set_conds(positive, middle, negative)
        guider.set_cfg(3.0, 2.0, nested=which == "nested")
    elif which == "perp-neg":
        guider = Guider_PerpNeg(model)
        guider.set_conds(positive, negative, empty)
        guider.set_cfg(3.0, 1.0)
    else:
        guider = comfy.samplers.CFGGuider(PerpNeg.execute(model, empty, 1.0).result[0])
        guider.set_conds(positive, negative)
    if which in ("cfg", "perp-neg patch"):
        guider.set_cfg(3.0)
    run(guider)
    assert gammas
    assert {length for length, rows in gammas if any(rows)} == {LENGTHS["positive"]}


@pytest.mark.parametrize("length", [7, 14])
def test_rows_in_another_order(folder, pack, gammas, length):
    """Tiles in one batch.

    A text may begin with another one: an empty prompt's of a causal encoder, in a template.
    """
    lengths = tiny.conditioning("flux", length), tiny.conditioning("flux", 7, seed=5)
    if length > 7:
        lengths[1][0][0] = lengths[0][0][0][:, :7]
    results = []
    for together in (False, True):
        model = limited(pack, tiny.load(folder, "flux"))
        model.set_model_unet_function_wrapper(tiny.tiled(together))
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(*lengths)
        guider.set_cfg(3.0)
        results.append(run(guider))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)
    rows = [True, False, True, False] if length == 7 else [True, True]
    assert {tuple(rows), tuple(rows[::-1])} & {tuple(rows) for _, rows in gammas}


def of(c, rows):
    """A call's arguments for these of its rows."""
    count = len(c["c_crossattn"])
    is_batch = {k: isinstance(v, torch.Tensor) and len(v) == count for k, v in c.items()}
    return {k: v[rows] if is_batch[k] else v for k, v in c.items()}


def turned_round(apply_model, given):
    x, t, c = given["input"], given["timestep"], given["c"]
    rows = list(range(len(x)))[::-1]
    return apply_model(x[rows], t[rows], **of(c, rows))[rows]


def tiles_of_one_latent(apply_model, given, together=True):
    """Two tiles of each latent, as many rows as ComfyUI's batch has."""
    x, t, c = given["input"], given["timestep"], given["c"]
    result = torch.empty_like(x)
    for i in range(len(x) // 2):
        rows = [i, i + len(x) // 2]
        tiles = x[rows].chunk(2, -1)
        if together:
            both = apply_model(torch.cat(tiles), t[rows * 2], **of(c, rows * 2)).chunk(2)
        else:
            both = [apply_model(tile, t[rows], **of(c, rows)) for tile in tiles]
        result[rows] = torch.cat(both, -1)
    return result


@pytest.mark.parametrize("wrapper", [turned_round, tiles_of_one_latent])
def test_as_many_rows_of_others(folder, pack, wrapper):
    """What ComfyUI says of the batch is then of other rows: their text tells."""
    plain = {tiles_of_one_latent: lambda *args: tiles_of_one_latent(*args, together=False)}
    results = []
    for each in (plain.get(wrapper), wrapper):
        model = limited(pack, tiny.load(folder, "flux"))
        if each is not None:
            model.set_model_unet_function_wrapper(each)
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(tiny.conditioning("flux", 7), tiny.conditioning("flux", 7, seed=5))
        guider.set_cfg(3.0)
        results.append(run(guider, batch=2))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


def test_the_positive_prompt_twice(folder, pack, gammas):
    """In place of the negative one, as a guidance that perturbs one of both."""

    def twice(apply_model, given):
        rows = [given["cond_or_uncond"].index(0)] * 2
        x, t, c = given["input"], given["timestep"], given["c"]
        return apply_model(x[rows], t[rows], **of(c, rows))

    model = limited(pack, tiny.load(folder, "flux"))
    model.set_model_unet_function_wrapper(twice)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(tiny.conditioning("flux", 7), tiny.conditioning("flux", 7, seed=5))
    guider.set_cfg(3.0)
    run(guider)
    assert {tuple(rows) for _, rows in gammas} == {(True, True)}


def test_rows_that_nobody_knows_are_an_error(folder, pack):
    """A pack that mixes the texts of both prompts in each row."""

    def mixed(apply_model, given):
        x, t, c = given["input"], given["timestep"], given["c"]
        text = c["c_crossattn"].mean(0, keepdim=True).expand(4, -1, -1)
        y = torch.cat([c["y"], c["y"]])
        more = {key: torch.cat([c[key]] * 2) for key in ("guidance",) if key in c}
        result = apply_model(
            torch.cat([x, x]), torch.cat([t, t]), **{**c, "c_crossattn": text, "y": y, **more}
        )
        return result[:2]

    model = limited(pack, tiny.load(folder, "flux"))
    model.set_model_unet_function_wrapper(mixed)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(tiny.conditioning("flux", 7), tiny.conditioning("flux", 7, seed=5))
    guider.set_cfg(3.0)
    with pytest.raises(ValueError, match="cannot tell which rows"):
        run(guider)


def test_an_area_with_the_negative_prompts_text(folder, pack):
    """ComfyUI adds a copy of the area to the negative prompt, of one uuid and here of one text."""
    prompt = tiny.conditioning("flux", 7)
    area = [[prompt[0][0], {**prompt[0][1], "area": (4, 4, 0, 0), "strength": 1.0}]]
    guider = comfy.samplers.CFGGuider(limited(pack, tiny.load(folder, "flux")))
    guider.set_conds([*area, *tiny.conditioning("flux", 7, seed=2)], prompt)
    guider.set_cfg(3.0)
    with pytest.raises(ValueError, match="give one of these texts another comma"):
        run(guider)


def test_a_guider_that_names_no_positive_prompt(folder, pack):
    """What needs it is an error, and nothing is guessed."""

    class Guider(comfy.samplers.CFGGuider):
        def set_conds(self, first, second):
            self.inner_set_conds({"first": first, "second": second})

        def predict_noise(self, x, timestep, model_options=None, seed=None):
            lists = [self.conds["first"], self.conds["second"]]
            return sum(
                comfy.samplers.calc_cond_batch(self.inner_model, lists, x, timestep, model_options)
            )

    guider = Guider(limited(pack, tiny.load(folder, "flux")))
    guider.set_conds(*conds("positive", "negative"))
    with pytest.raises(ValueError, match="which prompt of Guider is the positive one"):
        run(guider)


@pytest.mark.parametrize("which", ["positive", "negative", "another"])
def test_a_conditioning_that_a_node_made_again(folder, pack, gammas, which):
    """A guidance that calls the model with its own copy of a prompt: its text tells whose it is."""
    model = limited(pack, tiny.load(folder, "flux"))
    texts = dict(zip(("positive", "negative", "another"), conds(*LENGTHS), strict=False))
    again = comfy.sampler_helpers.convert_cond(texts[which])

    def guidance(args):
        encoded = comfy.samplers.encode_model_conds(
            args["model"].extra_conds, again, args["input"], args["input"].device, "positive"
        )
        gammas.clear()
        how = args["input"], args["sigma"], args["model_options"]
        return comfy.samplers.calc_cond_batch(args["model"], [encoded], *how)[0]

    model.set_model_sampler_post_cfg_function(guidance)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(texts["positive"], texts["negative"])
    guider.set_cfg(3.0)
    run(guider)
    assert bool(gammas) == (which == "positive")


@pytest.mark.skipif(not hasattr(custom_sampler, "DualModelGuider"), reason="no such guider")
@pytest.mark.parametrize("patched", ["first", "both", "second", "both, unlike"])
def test_a_guider_of_two_models(folder, pack, gammas, patched):
    """ComfyUI gives both the options of the first."""
    first, second = (tiny.load(folder, "flux", seed=seed) for seed in (0, 4))
    if patched != "second":
        first = limited(pack, first)
    if patched == "both, unlike":
        second = pack["TACAPatchModel"].execute(second, 1.4, 970.0).result[0]
    elif patched != "first":
        second = limited(pack, second)
    texts = conds("positive", "negative")
    guider = custom_sampler.DualModelGuider.execute(first, texts[0], 3.0, second, texts[1])
    if patched in ("second", "both, unlike"):
        with pytest.raises(RuntimeError, match="TACA does not act on this model, since its guider"):
            run(guider.result[0])
        return
    run(guider.result[0])
    assert {length for length, rows in gammas if any(rows)} == {7}


@pytest.mark.parametrize("threshold", [930.0, 840.0])
@pytest.mark.parametrize("share", [1.0, 0.98, 0.95, 0.9])
def test_steps_are_those_it_acted_on(folder, apply_taca, gammas, caplog, share, threshold):
    """Also of a sampler that tells the model less sigma than its own, as detail samplers do.

    At 0.9 two of its steps are told within one step of the run's own sigmas.
    """
    caplog.set_level("INFO", logger="taca")
    guider = comfy.samplers.CFGGuider(apply_taca(tiny.load(folder, "flux"), 1.2, threshold))
    guider.set_conds(*conds("positive", "negative"))
    told = []

    def less(model, x, sigmas, extra_args, callback, **kwargs):
        for i, sigma in enumerate(sigmas[:-1]):
            before = len(gammas)
            denoised = model(x, sigma * share * x.new_ones(len(x)), **extra_args)
            told.append(len(gammas) > before)
            callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
            x = denoised + (x - denoised) * sigmas[i + 1] / sigma
        return x

    run(guider, sampler=comfy.samplers.KSAMPLER(less), steps=40)
    assert f"acted on {sum(told)} of 40 steps" in caplog.records[-1].message
    assert caplog.records[-1].levelname == ("INFO" if any(told) else "WARNING")


@pytest.mark.parametrize(
    "name", ["heun", "dpm_2", "dpmpp_2m", "uni_pc", "dpmpp_sde", "euler", "lcm"]
)
def test_a_step_of_several_calls_is_one(folder, apply_taca, caplog, name):
    """As many as begin inside the window."""
    caplog.set_level("INFO", logger="taca")
    guider = comfy.samplers.CFGGuider(apply_taca(tiny.load(folder, "flux"), 1.2, 750.0))
    guider.set_conds(*conds("positive", "negative"))
    run(guider, steps=10, sampler=comfy.samplers.sampler_object(name))
    assert "acted on 3 of 10 steps" in caplog.records[-1].message


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2"])
@pytest.mark.parametrize("threshold", [700.0, 850.0])
def test_a_sampler_that_adds_noise_before_its_steps(
    folder, apply_taca, gammas, caplog, name, threshold
):
    """It tells the model more sigma than its steps begin with."""
    caplog.set_level("INFO", logger="taca")
    guider = comfy.samplers.CFGGuider(apply_taca(tiny.load(folder, "flux"), 1.2, threshold))
    guider.set_conds(*conds("positive", "negative"))
    acted, before = [], [0]

    def callback(*_):
        acted.append(len(gammas) > before[-1])
        before.append(len(gammas))

    sampler = comfy.samplers.ksampler(name, {"s_churn": 4.0})
    noise = torch.randn(1, 16, 8, 8, generator=torch.manual_seed(3))
    sigmas = torch.linspace(1, 0, 11)
    guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, callback=callback, seed=1)
    assert sum(acted) > sum(1000 * sigmas >= threshold)
    assert f"acted on {sum(acted)} of 10 steps" in caplog.records[-1].message


@pytest.mark.parametrize("name", ["dpm_fast", "dpm_adaptive"])
@pytest.mark.parametrize("threshold", [0.0, 860.0])
def test_a_sampler_that_chooses_its_own_steps(folder, apply_taca, gammas, caplog, name, threshold):
    """Counted are those that it tells of."""
    caplog.set_level("INFO", logger="taca")
    guider = comfy.samplers.CFGGuider(apply_taca(tiny.load(folder, "flux"), 1.2, threshold))
    guider.set_conds(*conds("positive", "negative"))
    noise = torch.randn(1, 16, 4, 4, generator=torch.manual_seed(3))
    steps, before = [], []

    def callback(*_):
        steps.append(len(gammas) > sum(before))
        before.append(len(gammas) - sum(before))

    sampler = comfy.samplers.sampler_object(name)
    sigmas = torch.linspace(1, 0, 7)
    guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, callback=callback)
    assert f"acted on {sum(steps)} of {len(steps)} steps" in caplog.records[-1].message
    assert all(steps) == (threshold == 0)


def test_a_restart_is_another_step(folder, apply_taca, caplog):
    """Noise that a run comes by twice: both of its steps count."""
    caplog.set_level("INFO", logger="taca")
    guider = comfy.samplers.CFGGuider(apply_taca(tiny.load(folder, "flux"), 1.2, 850.0))
    guider.set_conds(*conds("positive", "negative"))
    run(guider, sigmas=torch.tensor([1, 0.8, 0.6, 0.9, 0.5, 0]))
    assert "acted on 2 of 5 steps" in caplog.records[-1].message


def test_a_sampler_that_tells_of_no_step(folder, apply_taca, caplog):
    caplog.set_level("INFO", logger="taca")

    def silent(model, x, sigmas, extra_args, **kwargs):
        for sigma, following in pairwise(sigmas):
            denoised = model(x, sigma * x.new_ones(len(x)), **extra_args)
            x = denoised + (x - denoised) * following / sigma
        return x

    guider = comfy.samplers.CFGGuider(apply_taca(tiny.load(folder, "flux"), 1.2, 750.0))
    guider.set_conds(*conds("positive", "negative"))
    run(guider, steps=10, sampler=comfy.samplers.KSAMPLER(silent))
    assert "acted on 3 of 10 steps" in caplog.records[-1].message


@pytest.mark.parametrize("order", [("positive", "negative"), ("negative", "positive")])
def test_the_first_call_in_which_taca_acts(folder, pack, order):
    """With positive_only the negative prompt may come first; no cache can answer either."""

    def forward_of_a_pack(img, *args, **kwargs):
        return img

    model = limited(pack, tiny.load(folder, "flux"))
    model.add_object_patch("diffusion_model.forward_orig", forward_of_a_pack)

    class Guider(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            how = x, timestep, model_options
            return sum(
                comfy.samplers.calc_cond_batch(self.inner_model, [self.conds[name]], *how)[0]
                for name in order
            )

    guider = Guider(model)
    guider.set_conds(*conds("positive", "negative"))
    with pytest.raises(RuntimeError, match=r"no block of Flux ran.*forward_of_a_pack"):
        run(guider)


def test_chosen_blocks_that_another_node_leaves_out(folder, pack, caplog):
    """The others run, without TACA: no call of them acted."""
    caplog.set_level("INFO", logger="taca")
    options = pack["TACAOptions"].execute(False, "joint 1").result[0]
    plain = tiny.load(folder, "sd3")
    plain.set_model_patch_replace(lambda args, extra: args, "dit", "double_block", 1)
    model = pack["TACAPatchModel"].execute(plain, 1.4, 0.0, None, options).result[0]
    assert torch.equal(sample(model, "sd3", steps=4), sample(plain, "sd3", steps=4))
    said = caplog.records[-1].message
    assert "acted on 0 of 4 steps" in said
    assert "no block that gets TACA ran with text" in said
    assert caplog.records[-1].levelname == "WARNING"


def test_a_model_that_never_calls_its_blocks(folder, apply_taca):
    """A pack's own forward, which does what the blocks do by itself."""

    def forward_of_a_pack(img, *args, **kwargs):
        return img

    model = apply_taca(tiny.load(folder, "flux"))
    model.add_object_patch("diffusion_model.forward_orig", forward_of_a_pack)
    with pytest.raises(
        RuntimeError, match=r"no block of Flux ran.*forward_of_a_pack \(.*test_events\)"
    ):
        sample(model, "flux")


def test_blocks_that_attend_by_themselves(folder, apply_taca):
    """A part of them; the others are not enough."""
    model = apply_taca(tiny.load(folder, "flux"))
    double = model.model.diffusion_model.double_blocks[0]

    def own_attention(img, txt, **kwargs):
        q = img[:, :, :128]
        return img + optimized_attention(q, q, q, 1), txt

    double.forward = own_attention
    try:
        with pytest.raises(RuntimeError, match=r"bypassed in 1 of 4 blocks of Flux.*own_attention"):
            sample(model, "flux")
    finally:
        del double.forward


def test_blocks_that_take_no_options(folder, apply_taca):
    """A pack's forward of the model calls the pack's forward of a block without ComfyUI's options.

    That is no TypeError of ours.
    """
    model = apply_taca(tiny.load(folder, "flux"))
    flux = model.model.diffusion_model
    double = flux.double_blocks[0]

    def forward_of_a_pack(img, img_ids, txt, *args, **kwargs):
        double(flux.img_in(img), flux.txt_in(txt))
        return img

    def without_options(img, txt):
        return img, txt

    double.forward = without_options
    model.add_object_patch("diffusion_model.forward_orig", forward_of_a_pack)
    try:
        with pytest.raises(RuntimeError, match=r"bypassed in 1 of 1 blocks.*without_options"):
            sample(model, "flux")
    finally:
        del double.forward


def test_a_class_that_another_clone_gave_the_model(folder, apply_taca, gammas):
    """While it is still loaded so: the plain clone of the same loader is what it was."""

    model = tiny.load(folder, "flux", seed=9)
    live = model.model.diffusion_model
    expected = sample(apply_taca(model), "flux")
    gammas.clear()
    theirs = type("OfAPack", (type(live).__bases__[0],), dict(vars(type(live))))
    other = model.clone()
    other.add_object_patch("diffusion_model.__class__", theirs)
    sample(other, "flux")
    try:
        assert type(live) is theirs
        patched = apply_taca(model)
        assert torch.equal(sample(patched, "flux"), expected)
        assert gammas
    finally:
        comfy.model_management.unload_all_models()


@pytest.mark.parametrize("with_report", [False, True])
def test_a_run_lets_its_guider_go(folder, apply_taca, pack, with_report):
    """At once, and its models with it, not when the garbage collector comes by."""
    guider = comfy.samplers.CFGGuider(apply_taca(tiny.load(folder, "flux")))
    guider.set_conds(*conds("positive", "negative"))
    alive = weakref.ref(guider)
    gc.collect()
    gc.disable()
    try:
        if with_report:
            report = sys.modules["taca_pack.taca.report"]
            guider.model_patcher = report.watched(guider.model_patcher, report_on({}))
        run(guider)
        del guider
        assert alive() is None
    finally:
        gc.enable()


@pytest.fixture
def sent(monkeypatch):
    """The texts that go to the page, and the nodes under which it shows them."""
    # Some of what 0.16.3's needs is called like a module of the tests' own packages.
    server = pytest.importorskip("server", reason="its server cannot be imported here")
    texts = []
    kind = type("Server", (), {"send_progress_text": lambda _, *what: texts.append(what)})
    monkeypatch.setattr(server.PromptServer, "instance", kind(), raising=False)
    return texts


def test_a_loras_node_is_told_too(folder, apply_taca, load_lora, sent):
    model = tiny.load(folder, "flux")
    with CurrentNodeContext("a", "5"):
        model = load_lora(model, random_lora(model, only="blocks"))
    with CurrentNodeContext("a", "6"):
        model = apply_taca(model, 1.2, 750.0)
    with CurrentNodeContext("a", "7"):
        sample(model, "flux", steps=8)
    assert [node for _, node in sent] == ["6", "5"]
    assert {text for text, _ in sent} == {"gamma 1.2 at t >= 750 acted on 5 of 8 steps."}


def test_equal_nodes_have_texts_of_their_own(pack, monkeypatch):
    """ComfyUI's cache does not hand what one node made to another with the same inputs."""
    monkeypatch.setattr(core_nodes, "NODE_CLASS_MAPPINGS", pack)
    says = ("TACAPatchModel", "LoadTACALoRA", "TACASweep", "TACATextEncode", "TACAWeighWords")
    kinds = enumerate((*says, "TACAWordSweep") * 2)
    graph = {str(node): {"class_type": kind, "inputs": {}} for node, kind in kinds}

    async def keys():
        unchanged = type("Unchanged", (), {"get": lambda _, node: asyncio.sleep(0, False)})()
        found = CacheKeySetInputSignature(DynamicPrompt(graph), list(graph), unchanged)
        await found.add_keys(list(graph))
        return {node: found.get_data_key(node) for node in graph}

    assert len(set(asyncio.run(keys()).values())) == len(graph)


@pytest.mark.parametrize("weighs", [False, True])
@pytest.mark.parametrize("gamma", [1.0, 1.4])
def test_steps_in_which_there_was_nothing_to_do(folder, gamma, weighs):
    """The window held steps, but gamma is 1, or the prompt begins later. Words may weigh."""
    said, begin = [], 0.0 if gamma == 1 else 0.5
    limits = Options(positive_only=True)
    schedule = Schedule(gamma, TimestepWindow(800.0))
    model = patch.patch_model(tiny.load(folder, "flux"), schedule, limits, said.append)
    later = tiny.conditioning("flux", 7, start_percent=begin, end_percent=1.0)
    later = weighed(later, [1.0] * 6 + [2.0]) if weighs else later
    sample(model, "flux", steps=4, positive=later)
    assert "acted on 0 of 4 steps. In " in said[0]
    assert "calls in the window there was nothing to do: gamma is 1, or the prompt" in said[0]
    assert "No step was inside" not in said[0]


def test_what_a_run_did_is_told(folder, apply_taca, pack):
    """Under each node that had a part in it: what acted, or why nothing did."""
    said, others = [], []
    model = patch.patch_model(
        tiny.load(folder, "flux"), Schedule(1.2, TimestepWindow(750.0)), say=said.append
    )
    words = weighed(tiny.conditioning("flux", 7), [1.0] * 6 + [2.0], say=others.append)
    sample(model, "flux", steps=8, positive=words)
    assert said == ["gamma 1.2 at t >= 750 acted on 5 of 8 steps."]
    assert others == ["weights of 'it' 2 acted on 8 of 8 steps."]
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(*conds("positive", "negative"))
    run(guider, sigmas=torch.tensor([0.64, 0.3, 0.0]))
    assert said[1].startswith("gamma 1.2 at t >= 750 acted on 0 of 2 steps. No step was inside")
    assert "the model was called at t = 640 to 300. Widen the window" in said[1]

    def lowering(model, x, sigmas, extra_args, **kwargs):  # tells the model another sigma
        return model(x, 0.7 * sigmas[:1], **extra_args)

    def idle(model, x, *args, **kwargs):
        return x

    for sampler in (lowering, idle):
        run(guider, sampler=comfy.samplers.KSAMPLER(sampler), sigmas=torch.tensor([1.0, 0.0]))
    assert "the model was called at t = 700 to 700." in said[2]
    assert said[3].endswith("0 of 1 steps. The model was not called.")


def test_text_under_a_node(sent):
    """Of the node that made it, in whichever node the run is; anew with each prompt."""
    with CurrentNodeContext("a", "10"):
        text = NodeText("Above gamma 1.5", plan="gamma 1.6, from TACA Schedule")
    for prompt in ("a", "b"):
        for i in range(3):
            with CurrentNodeContext(prompt, "11"):
                text(f"acted {i}")
    assert sent[0] == ("gamma 1.6, from TACA Schedule\nAbove gamma 1.5", "10")
    expected = [
        ("acted 0\nAbove gamma 1.5", "10"),
        ("Run 1: acted 0\nRun 2: acted 1\nAbove gamma 1.5", "10"),
        ("Run 2: acted 1\nRun 3: acted 2\nAbove gamma 1.5", "10"),
    ]
    assert sent[1:] == expected * 2
    with CurrentNodeContext("c", "10"):
        sweep = NodeText(total=3)
    for _ in range(2):
        with CurrentNodeContext("c", "11"):
            sweep("acted")
    assert sent[-2:] == [("1 of 3: acted", "10"), ("2 of 3: acted", "10")]


def test_a_sweep_over_words_counts_to_its_end(folder, pack, sent):
    """Where all weights are 1 nothing acts, and nothing is said."""
    model, clip = tiny.load(folder, "flux"), clip_of(*FLUX_CLIP)
    with CurrentNodeContext("d", "10"):
        sweep = pack["TACAWordSweep"].execute(clip, "a (red:w) cup", "-1, 1, 2").result[0]
    for [(text, extras)] in sweep:
        positive = [[text, {**extras, "pooled_output": torch.zeros(1, 32)}]]
        with CurrentNodeContext("d", "11"):
            sample(model, "flux", steps=1, cfg=1.0, positive=positive)
    assert [text[:7] for text, _ in sent] == ["1 of 2:", "2 of 2:"]


def test_text_of_a_node_that_runs_for_each_of_a_list(sent):
    """All its runs, and what is to be warned of in any of them."""
    texts = []
    for i, warnings in enumerate([["Above gamma 1.5"], []]):
        with CurrentNodeContext("e", "10", i):
            texts.append(NodeText(*warnings))
    for i, text in enumerate(texts):
        with CurrentNodeContext("e", "11", i):
            text(f"acted {i}")
    assert sent[-1] == ("Run 1: acted 0\nRun 2: acted 1\nAbove gamma 1.5", "10")


@contextmanager
def queued(graph, prompt="a", node="10"):
    """A node that runs, in a graph that was queued."""
    reset_progress_state(prompt, DynamicPrompt(graph))
    try:
        with CurrentNodeContext(prompt, node):
            yield
    finally:
        reset_progress_state("", DynamicPrompt({}))


@pytest.mark.parametrize("behind", ["TACAPatchModel", "TACASweep", "KSampler"])
def test_a_lora_that_gets_no_taca_is_told_at_once(behind):
    """By the graph, whatever lies between; a node that another one runs is left alone."""
    graph = {
        "1": {"class_type": "UNETLoader", "inputs": {}},
        "2:5": {"class_type": "LoadTACALoRA", "inputs": {"model": ["1", 0]}},
        "3": {"class_type": "SomeSwitch", "inputs": {"anything": ["2:5", 0], "n": [1, 2]}},
        "4": {"class_type": behind, "inputs": {"model": ["3", 1]}},
        "9": {"class_type": "TACAPatchModel", "inputs": {"model": ["1", 0]}},
    }
    with queued(graph, node="2:5"):
        assert lacks_taca() == (behind == "KSampler")
    with queued(graph, node="7"):
        assert not lacks_taca()
    assert not lacks_taca()


def test_a_lora_whose_taca_is_taken_out_runs_again(pack, monkeypatch):
    """Or ComfyUI would take it from its cache, and only the sampler could say what is wrong."""
    monkeypatch.setattr(core_nodes, "NODE_CLASS_MAPPINGS", pack)
    lora = {"class_type": "LoadTACALoRA", "inputs": {"lora_name": "a.safetensors", "strength": 1.0}}
    taca = {"class_type": "TACAPatchModel", "inputs": {"model": ["1", 0], "gamma": 1.2}}
    found = []
    for graph in ({"1": lora, "2": taca}, {"1": lora}, {"1": lora, "2": {**taca}}):
        with queued(graph, node="1"):
            found.append(pack["LoadTACALoRA"].fingerprint_inputs(model=None, **lora["inputs"]))
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize(
    ("name", "kind", "is_told"),
    [
        ("taca/flux.safetensors", "LoraLoaderModelOnly", True),
        ("flux-dev-lora-rank-64.safetensors", "LoraLoader", True),
        ("sd3.5-medium-lora-rank-16.safetensors", "LoraLoader", True),
        ("taca.safetensors", "LoadTACALoRA", False),
        ("style.safetensors", "LoraLoader", False),
        ("metacarpal.safetensors", "LoraLoader", False),
        (["3", 0], "LoraLoader", False),
    ],
)
def test_a_taca_lora_in_another_loader_is_told(name, kind, is_told):
    graph = {"1": {"class_type": kind, "inputs": {"lora_name": name}}}
    with queued(graph):
        said = ordinary_loras()
    assert [f"{name} acts in all steps, in {kind}. Load TACA LoRA keeps it inside the window."] * (
        is_told
    ) == said
    graph["1"]["inputs"]["strength_model"] = 0.0
    with queued(graph):
        assert ordinary_loras() == []


def test_a_lora_in_another_loader_is_told_of_as_long_as_it_is_there(folder, pack, sent):
    """ComfyUI does not run the TACA node again where one is added or taken out behind it."""
    graph = {"1": {"class_type": "LoraLoader", "inputs": {"lora_name": "taca.safetensors"}}}
    with queued({}):
        model = pack["TACAPatchModel"].execute(tiny.load(folder, "flux"), 1.2, 970.0).result[0]
    for i, each in enumerate((graph, {}, graph)):
        with queued(each, f"run {i}", "11"):
            sample(model, "flux", steps=2)
    assert ["taca.safetensors acts in all" in text for text, _ in sent] == [True, False, True]


def test_what_is_said_before_a_run(folder, pack, sent):
    """Of a schedule, of a gamma that breaks pictures, and of a LoRA in another loader."""
    node, model = pack["TACAPatchModel"], tiny.load(folder, "flux")
    schedule = pack["TACASchedule"].execute(1.6, {"window": "first steps", "steps": 2}).result[0]
    graph = {"1": {"class_type": "LoraLoader", "inputs": {"lora_name": "taca.safetensors"}}}
    with queued(graph):
        node.execute(model, 1.2, 970.0, schedule)
    plan, gamma, lora = sent[0][0].splitlines()
    assert plan == "gamma 1.6 at the first 2 steps, from TACA Schedule"
    assert gamma.startswith("Above gamma 1.5")
    assert lora.startswith("taca.safetensors acts in all steps, in LoraLoader")
    with CurrentNodeContext("b", "10"):
        first = node.execute(model, 1.5, 970.0).result[0]
    assert len(sent) == 1
    with CurrentNodeContext("b", "11"):
        node.execute(first, 1.2, 900.0)
    replaces = "This replaces the TACA node before it (gamma 1.5 at t >= 970): only one acts."
    assert sent[1:] == [(replaces, "11")]


@pytest.mark.parametrize("size", [(16, 16), (32, 64)])
def test_a_run_in_the_window_for_its_size(folder, pack, size):
    """64 and 512 tokens: as many steps as lie above the t of equal noise; the preview says so."""
    model, said = tiny.load(folder, "flux"), []
    schedule = pack["TACASchedule"].execute(1.2, {"window": "paper, any size"}).result[0]
    sample(patch.patch_model(model, schedule, say=said.append), "flux", steps=10, size=size)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 10)
    odds = 0.97 / 0.03 * (size[0] * size[1] / 4 / 4096) ** 0.5
    count = int((sigmas / (1 - sigmas) >= odds).sum())
    assert f"acted on {count} of 10 steps" in said[0]
    latent = {"samples": torch.zeros(1, 16, *size)}
    preview = pack["TACASchedulePreview"].execute
    text = preview(sigmas, model, schedule, latent).result[1]
    assert text.startswith(f"TACA acts on {count} of 10 steps.")
    assert "1024 x 1024" not in text
    # Empty, for another model's autoencoder: the sampler makes it this one's size.
    half = {"samples": torch.zeros(1, 16, *(n // 2 for n in size)), "downscale_ratio_spacial": 16}
    assert preview(sigmas, model, schedule, half).result[1] == text
    assert "for a picture of 1024 x 1024" in preview(sigmas, model, schedule).result[1]
