"""Odd inputs, and runs that stop at any moment: a right result, or an error a user can act on.

``TACA_FUZZ=10000`` sets how many inputs are tried (300 otherwise); a twentieth of them are sampled,
and as many runs are stopped.
"""

import json
import math
import random
import re

import comfy.model_management
import comfy.samplers
import comfy.sd
import numpy as np
import pytest
import torch
from codec import Codec
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_custom_sampler import BasicGuider, KSamplerSelect, Noise_RandomNoise
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from support import ROOT, tiny
from support.fuzz import CASES, many
from support.loras import core_model, random_lora, replaced, with_lora
from support.reference import dense_override
from support.tiny import KINDS, reference, sample
from support.versions import CurveInput

SAMPLED = max(15, CASES // 20)
STOPS = max(12, CASES // 20)

SHAPES = ["step", "linear", "cosine"]
ANY = st.floats() | st.floats(0, 10) | st.sampled_from([0.0, 1.0, 1.2, -1.0, math.nan, math.inf])
WINDOW = st.one_of(
    st.fixed_dictionaries(
        {"window": st.just("timestep"), "timestep_threshold": ANY | st.floats(0, 1000)},
        optional={"shape": st.sampled_from([*SHAPES, "round", ""])},
    ),
    st.fixed_dictionaries(
        {
            "window": st.just("percent"),
            "start_percent": ANY | st.floats(0, 1),
            "end_percent": ANY | st.floats(0, 1),
        },
        optional={"shape": st.sampled_from(SHAPES)},
    ),
    st.fixed_dictionaries(
        {"window": st.just("first steps"), "steps": st.integers(-3, 12)},
        optional={"shape": st.sampled_from(SHAPES)},
    ),
)
BLOCKS = st.text(max_size=20) | st.from_regex(
    r"(double|single|joint) [0-3](-[0-3])?(, (double|single|joint) [0-3])?", fullmatch=True
)
GOOD_GAMMA = st.floats(0, 3)
GOOD_WINDOW = st.one_of(
    st.fixed_dictionaries(
        {
            "window": st.just("timestep"),
            "timestep_threshold": st.floats(0, 1000),
            "shape": st.sampled_from(SHAPES),
        }
    ),
    st.builds(
        lambda a, b, shape: {
            "window": "percent",
            "start_percent": min(a, b),
            "end_percent": max(a, b),
            "shape": shape,
        },
        st.floats(0, 1),
        st.floats(0, 1),
        st.sampled_from(SHAPES),
    ),
    st.fixed_dictionaries(
        {
            "window": st.just("first steps"),
            "steps": st.integers(1, 5),
            "shape": st.sampled_from(SHAPES),
        }
    ),
)
if CurveInput is not None:
    # Not at the percents of steps, where rounding would decide on which side of a point they lie.
    PLACES, HEIGHTS = [0.0, 0.13, 0.33, 0.63, 1.0], st.sampled_from([0.0, 0.25, 1.0])
    GOOD_WINDOW |= (
        st.lists(HEIGHTS, min_size=5, max_size=5)
        .filter(any)
        .map(
            lambda heights: {
                "window": "curve",
                "curve": {
                    "interpolation": "linear",
                    "points": list(zip(PLACES, heights, strict=True)),
                },
            }
        )
    )
    POINTS = st.lists(st.tuples(ANY | st.floats(0, 1), ANY | st.floats(0, 1)), max_size=5)
    WINDOW |= st.fixed_dictionaries({"window": st.just("curve"), "curve": POINTS})
WORDS = st.text(max_size=12) | st.from_regex(r"[ab]=\d{1,2}(-\d{1,2})?(, c=\d)?", fullmatch=True)
LORAS = st.sampled_from(["lora.safetensors", "no such.safetensors", "../lora.safetensors", ""])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny.load(folder, kind) for kind in KINDS}


@many(CASES)
@given(data=st.data(), kind=st.sampled_from(KINDS), gamma=ANY, window=WINDOW)
def test_any_input(pack, models, loras, data, kind, gamma, window):
    """Through the nodes: a patched model, or an error that says what is wrong."""
    model, draw = models[kind], data.draw
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 4)
    if not any(loras.iterdir()):
        save_file(random_lora(models["flux"], only="blocks.0"), loras / "lora.safetensors")

    def schedule():
        return pack["TACASchedule"].execute(gamma, dict(window)).result[0]

    def options():
        return (
            pack["TACAOptions"]
            .execute(draw(st.booleans()), draw(BLOCKS), None, draw(st.none() | st.text(max_size=5)))
            .result[0]
        )

    def report():
        guider = BasicGuider.execute(patched, tiny.conditioning(kind, 7)).result[0]
        return pack["TACAAttentionReport"].execute(
            Noise_RandomNoise(3),
            guider,
            KSamplerSelect.execute("euler").result[0],
            sigmas[-2:],
            {"samples": torch.zeros(1, 16, 4, 4)},
            draw(WORDS),
        )

    def patch():
        parts = [draw(st.none() | st.just(part)) for part in (schedule, options)]
        return pack["TACAPatchModel"].execute(
            model, draw(ANY), draw(ANY | st.floats(0, 1000)), *(part and part() for part in parts)
        )

    patched = said(patch) or model
    patched = said(lambda: pack["LoadTACALoRA"].execute(patched, draw(LORAS), draw(ANY))) or patched
    said(lambda: pack["TACASchedulePreview"].execute(sigmas, patched))
    said(lambda: pack["TACASweep"].execute(patched, draw(st.text(max_size=12)), "970"))
    if draw(st.integers(0, 9)) == 0:  # these take long
        said(lambda: pack["TACATrainingWindow"].execute(patched))
        said(report)
    assert not replaced(model)


def said(step):
    """What a node gives, or None where it gives an error that says enough."""
    try:
        return step().result[0]
    except FileNotFoundError as error:  # ComfyUI's own, of a file that is not there
        assert "lora" in str(error) or "no such" in str(error)  # noqa: PT017
    except (ValueError, RuntimeError) as error:
        assert "TACA" in str(error) or "safetensors" in str(error)  # noqa: PT017
        assert len(str(error)) > 30  # noqa: PT017
    return None


@pytest.mark.parametrize("window", [None, {}, {"window": None}, {"window": "soon"}])
def test_a_schedule_without_a_window(pack, window):
    """ComfyUI lets a workflow through that has none."""
    with pytest.raises(ValueError, match="TACA Schedule has no window: choose one of timestep"):
        pack["TACASchedule"].execute(1.2, window)


def percent_at(t, sampling):
    """The percent of the sampling at which t is reached."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if 1000 * sampling.percent_to_sigma(middle) > t else (low, middle)
        )
    return low if low > 1e-9 else 0.0


def window_at(window, sigma, sigmas, sampling):
    """Whether a step is inside, and its share of gamma - 1, from the words of the window and not
    from the pack."""
    t, high = 1000 * sigma, 1000.0
    if window["window"] == "curve":
        x, heights = zip(*window["curve"]["points"], strict=True)
        percent = percent_at(t, sampling)
        share = float(np.interp(percent, x, heights))
        # A step at the very place where the curve leaves 0 is inside.
        before = max(np.interp(np.linspace(0, percent + 0.001, 999), x, heights))
        behind = max(np.interp(np.linspace(percent - 0.001, 1, 999), x, heights))
        return before > 0 < behind, share
    if window["window"] == "timestep":
        low = window["timestep_threshold"]
    elif window["window"] == "percent":
        high, low = (
            1000 * sampling.percent_to_sigma(window[p]) for p in ("start_percent", "end_percent")
        )
    else:
        n = window["steps"]
        high, low = 1000 * sigmas[0], 1000 * sigmas[n] + 5e-3 if n < len(sigmas) - 1 else 0.0
    # A window that begins at t >= 999 begins with the sampling: with whatever noise that has.
    if t < low - 1e-3 or (t > high + 1e-3 and high < 999):
        return False, 0.0
    x = min(max((high - t) / max(high - low, 1e-9), 0.0), 1.0)
    share = {"step": 1.0, "linear": 1 - x, "cosine": (1 + math.cos(math.pi * x)) / 2}
    return True, share[window["shape"]]


@pytest.fixture(scope="module")
def lora_and_merged(models, tmp_path_factory):
    """For each kind a LoRA, and the model with it merged into its weights by hand."""
    folder, both = tmp_path_factory.mktemp("merged"), {}
    for kind, model in models.items():
        lora = random_lora(model, only="blocks")
        state = with_lora(tiny.weights(kind), lora)
        both[kind] = lora, core_model(folder / f"{kind}.safetensors", state)
    return both


@many(SAMPLED)
@given(
    kind=st.sampled_from(KINDS),
    gamma=GOOD_GAMMA,
    window=GOOD_WINDOW,
    text=st.integers(3, 30),
    steps=st.integers(1, 4),
    size=st.sampled_from([(8, 8), (6, 10), (7, 9)]),
    with_one=st.booleans(),
    words=st.sampled_from([None, "", "a=0", "a=0-2, b=1"]),
)
def test_any_setting_sampled(
    pack, models, lora_and_merged, kind, gamma, window, text, steps, size, with_one, words
):
    """The run is the dense one with the gamma that the window's words give each step, and with the
    LoRA merged in the steps inside; also through the report, which is to change nothing."""
    model, (lora, merged) = models[kind], lora_and_merged[kind]
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", steps).tolist()
    tokens = text + math.ceil(size[0] / 2) * math.ceil(size[1] / 2)
    places = [window_at(window, s, sigmas, sampling) for s in sigmas[:-1]]

    def step_of(options):
        return min(range(steps), key=lambda i: abs(sigmas[i] - options["sigmas"][0]))

    def override(func, q, k, v, heads, transformer_options=None, **kwargs):
        share = places[step_of(transformer_options)][1]
        inner = dense_override(1 + (gamma - 1) * share, text, tokens)
        return inner(func, q, k, v, heads, **kwargs).to(q.dtype)

    def call(executor, *args, **kwargs):
        inside = with_one and places[step_of(args[-1])][0]
        return (merged.model._apply_model if inside else executor)(*args, **kwargs)

    dense = model.clone()
    dense.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = (
        override
    )
    dense.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "merged", call)
    schedule = pack["TACASchedule"].execute(gamma, dict(window)).result[0]
    patched = pack["TACAPatchModel"].execute(model, 1.2, 970.0, schedule).result[0]
    if with_one:
        node = pack["LoadTACALoRA"].execute.__globals__
        patched = node["patch_lora"](patched, node["fit_lora"](lora, model.model, "lora", 1.0))
    positive = tiny.conditioning(kind, text)
    run = {"steps": steps, "cfg": 1.0, "size": size, "positive": positive}
    expected = sample(dense, kind, **run)
    if words is None:
        ours = sample(patched, kind, **run)
    else:
        ours = (
            pack["TACAAttentionReport"]
            .execute(
                Noise_RandomNoise(3),
                BasicGuider.execute(patched, positive).result[0],
                KSamplerSelect.execute("euler").result[0],
                torch.tensor(sigmas),
                {"samples": torch.zeros(1, 16, *size)},
                words,
            )
            .result[0]["samples"]
        )
    assert (ours - expected).norm() < 5e-3 * expected.norm()
    assert not replaced(model)


STOPPED_BY = [
    comfy.model_management.InterruptProcessingException,
    comfy.model_management.OOM_EXCEPTION,
    KeyboardInterrupt,
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", STOPPED_BY)
def test_stopped_at_any_moment(pack, models, kind, error):
    """In any attention of any step, with TACA, its LoRA and the report: the plain model's bits,
    after each stop."""
    model = models[kind]
    fails = model.clone()
    plain = sample(model, kind, steps=1)
    countdown = [0]

    def failing(func, q, k, v, heads, **kwargs):
        countdown[0] -= 1
        if countdown[0] == 0:
            raise error("stopped") if error is not KeyboardInterrupt else error
        return func(q, k, v, heads, **kwargs)

    fails.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = (
        failing
    )
    taca = pack["TACAPatchModel"].execute(fails, 1.2, 900.0).result[0]
    node = pack["LoadTACALoRA"].execute.__globals__
    lora = node["fit_lora"](random_lora(model, "full"), model.model, "lora", 1.0)
    both = node["patch_lora"](taca, lora)

    def report():
        guider = BasicGuider.execute(both, tiny.conditioning(kind, 7)).result[0]
        sigmas = comfy.samplers.calculate_sigmas(
            model.get_model_object("model_sampling"), "simple", 3
        )
        pack["TACAAttentionReport"].execute(
            Noise_RandomNoise(3),
            guider,
            KSamplerSelect.execute("euler").result[0],
            sigmas,
            {"samples": torch.zeros(1, 16, 16, 16)},
            "a=1",
        )

    runs = [lambda: sample(taca, kind, steps=3), lambda: sample(both, kind, steps=3), report]
    chance = random.Random(0)  # noqa: S311
    place = len(STOPPED_BY) * KINDS.index(kind) + STOPPED_BY.index(error)
    for _ in range(place, STOPS, len(STOPPED_BY) * len(KINDS)):
        countdown[0] = chance.randint(1, 9)
        with pytest.raises(error):
            chance.choice(runs)()
        assert countdown[0] == 0
        assert not replaced(model)
        assert torch.equal(sample(model, kind, steps=1), plain)
    comfy.model_management.unload_all_models()
    assert torch.equal(sample(model, kind, steps=1), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_file_cut_anywhere(tmp_path, pack, models, kind):
    """Cut at any place, or with any byte changed, is an error or a LoRA."""
    from safetensors.torch import save_file

    read = pack["LoadTACALoRA"].execute.__globals__["read_lora"]
    fit = pack["LoadTACALoRA"].execute.__globals__["fit_lora"]
    path = tmp_path / "lora.safetensors"
    save_file(random_lora(models[kind], only="blocks.0"), path)
    data = path.read_bytes()
    chance = random.Random(1)  # noqa: S311
    for _ in range(max(30, SAMPLED)):
        path.write_bytes(damaged(data, chance))
        try:
            fit(read(str(path)), models[kind].model, path.name, 1.0)
        except ValueError as error:
            assert "lora.safetensors" in str(error)  # noqa: PT017
    assert not replaced(models[kind])


def changed(state, kind, value):
    """A LoRA's tensors with something about all of one kind changed."""
    return {k: value(t) if k.endswith(kind) else t for k, t in state.items()}


HOSTILE = {
    "NaN": lambda s: changed(s, "lora_up.weight", lambda t: t * torch.nan),
    "infinite": lambda s: changed(s, "lora_down.weight", lambda t: t / 0),
    "alpha is NaN": lambda s: changed(s, "alpha", lambda t: t * torch.nan),
    "alpha is a row": lambda s: changed(s, "alpha", lambda t: torch.ones(3)),
    "alpha is a word": lambda s: changed(s, "alpha", lambda t: torch.tensor([True, False])),
    **{
        str(dtype): lambda s, dtype=dtype: changed(s, "weight", lambda t: (9 * t).to(dtype))
        for dtype in (
            torch.int8,
            torch.bool,
            torch.complex64,
            torch.float64,
            torch.float16,
            torch.float8_e4m3fn,
            torch.int64,
        )
    },
    "no rank": lambda s: changed(s, "weight", lambda t: t.new_zeros(0, 0)),
    "numbers alone": lambda s: changed(s, "weight", lambda t: t.new_ones(())),
    "rows": lambda s: changed(s, "weight", lambda t: t.flatten()),
    "six dimensions": lambda s: changed(s, "weight", lambda t: t[None, None, None, None]),
    "up is missing": lambda s: {k: t for k, t in s.items() if "up" not in k},
    "down is missing": lambda s: {k: t for k, t in s.items() if "down" not in k},
    "nothing": lambda s: {},
    "a path": lambda s: {f"../../{k}".replace(".", "/"): t for k, t in s.items()},
    "a path behind": lambda s: {k.replace("blocks.0", "blocks.0/../../x"): t for k, t in s.items()},
    "names of Python's": lambda s: {k.replace("blocks.0", "__class__"): t for k, t in s.items()},
    "another pack's module": lambda s: s | {"diffusion_model.forward.diff": torch.ones(2)},
    "a long name": lambda s: s | {"x" * 200_000 + ".lora_up.weight": torch.ones(2, 2)},
    "not ASCII": lambda s: s | {"\u202e\x00\U0001f600.lora_up.weight": torch.ones(2, 2)},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", [*HOSTILE, "rank 1024"])
def test_a_hostile_lora(pack, models, loras, kind, what):
    """An error that names the file, or the dense run with the LoRA merged."""
    model = models[kind]
    state = random_lora(model, only="blocks.0", rank=1024 if what == "rank 1024" else 4)
    state = HOSTILE.get(what, dict)(state)
    save_file(state, loras / "hostile.safetensors")
    patched = pack["TACAPatchModel"].execute(model, 1.2, 0.0).result[0]
    plain = sample(model, kind, steps=1, size=(8, 8))
    try:
        patched = pack["LoadTACALoRA"].execute(patched, "hostile.safetensors", 1.0).result[0]
    except ValueError as error:
        assert str(error).startswith("hostile.safetensors")  # noqa: PT017
        assert len(str(error)) < 2000  # noqa: PT017
    else:
        ours = sample(patched, kind, steps=1, size=(8, 8))
        merged = core_model(loras / "merged.safetensors", with_lora(tiny.weights(kind), state))
        expected = reference(merged, kind, gamma=1.2, first=1, steps=1, size=(8, 8))
        effect = (plain - expected).abs().max()
        assert effect > 1e-2
        assert (ours - expected).abs().max() < 1e-3 * effect
    assert not replaced(model)
    assert torch.equal(sample(model, kind, steps=1, size=(8, 8)), plain)


def header(words, size=None, data=bytes(64)):
    """A safetensors file with this header."""
    words = words if isinstance(words, bytes) else json.dumps(words).encode()
    return (len(words) if size is None else size).to_bytes(8, "little") + words + data


def entry(dtype="F32", shape=(4, 4), offsets=(0, 64)):
    name = "diffusion_model.double_blocks.0.img_attn.qkv.lora_up.weight"
    return {name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


HEADERS = {
    "larger than the file": header(entry(), 2**40),
    "larger than any file": header(entry(), 2**64 - 1),
    "smaller than itself": header(entry(), 9),
    "of no length": header(b"", 0),
    "no dict": header([1, 2]),
    "deep": header(b'{"a":' * 50_000),
    "behind the end": header(entry(offsets=(0, 2**50), shape=(2**24, 2**24))),
    "the wrong way round": header(entry(offsets=(64, 0))),
    "below zero": header(entry(offsets=(-64, 0))),
    "another shape": header(entry(shape=(400, 400))),
    "no shape": header(entry(shape=(-4, -4))),
    "an overflow": header(entry(shape=(2**63, 2**63))),
    "no such type": header(entry(dtype="F3")),
    "no words": header({"__metadata__": {"format": 3}, **entry()}),
    "twice": header(json.dumps(entry())[:-1].encode() + b"," + json.dumps(entry())[1:].encode()),
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_forged_header(pack, models, loras, what):
    (loras / "forged.safetensors").write_bytes(HEADERS[what])
    with pytest.raises(ValueError, match=r"^forged\.safetensors") as error:
        pack["LoadTACALoRA"].execute(models["flux"], "forged.safetensors", 1.0)
    assert len(str(error.value)) < 2000


DEMO = ROOT / "demo"


def damaged(data, chance):
    """Cut anywhere, or with any byte of the first 2000 another."""
    broken = bytearray(data)
    if chance.random() < 0.5:
        return broken[: chance.randrange(len(data))]
    broken[chance.randrange(min(2000, len(data)))] = chance.randrange(256)
    return broken


def test_a_damaged_demo_codec(tmp_path):
    """An error that names the file and the way out, or a codec that decodes to finite numbers."""
    codec, path = Codec, tmp_path / "codec.safetensors"
    data = (DEMO / "taca_demo_codec.safetensors").read_bytes()
    whole = codec.load(DEMO / "taca_demo_codec.safetensors")

    def tried(content):
        path.write_bytes(content)
        try:
            read = codec.load(path)
        except ValueError as error:
            assert "codec.safetensors" in str(error)  # noqa: PT017
            assert "demo/training/train.py" in str(error)  # noqa: PT017
            return False
        assert read.decode(torch.randn(1, 16, 2, 2)).isfinite().all()
        assert read.embed(torch.zeros(1, len(read.positions), dtype=torch.long)).isfinite().all()
        return True

    chance = random.Random(2)  # noqa: S311
    results = [tried(damaged(data, chance)) for _ in range(max(40, SAMPLED))]
    assert 0 < sum(results) < len(results)
    hostile = [
        {name: tensor * torch.nan for name, tensor in vars(whole).items()},
        {name: tensor.to(torch.int8) for name, tensor in vars(whole).items()},
        {name: tensor[None].contiguous() for name, tensor in vars(whole).items()},
        {**vars(whole), "encoder": whole.decoder, "decoder": whole.encoder},
        {**vars(whole), "words": torch.ones(3)},
        {**vars(whole), "positions": torch.ones(())},
        {**vars(whole), "mean": torch.ones(0)},
        {"mean": whole.mean},
        {**vars(whole), "self": torch.ones(1)},
        {},
    ]
    for state in hostile:
        save_file(state, path)
        assert not tried(path.read_bytes())
    for content in HEADERS.values():
        assert not tried(content)


def test_a_damaged_demo_model(tmp_path, caplog):
    """By core's own loader: an error that speaks of the file or its header. A name that was changed
    core takes for a part that is missing, and says so in its log."""
    path = tmp_path / "model.safetensors"
    data = (DEMO / "models/taca_demo_mmdit.safetensors").read_bytes()
    chance, outcomes = random.Random(3), set()  # noqa: S311
    for content in [*(damaged(data, chance) for _ in range(16)), *HEADERS.values()]:
        path.write_bytes(content)
        caplog.clear()
        try:
            comfy.sd.load_diffusion_model(str(path))
        except Exception as error:  # core's, of any kind
            outcomes.add("error")
            assert re.search("header|file|model type|size mismatch", str(error))  # noqa: PT017
        else:
            outcomes.add("loaded")
            assert content == data or "missing" in caplog.text
    assert outcomes == {"error", "loaded"}
