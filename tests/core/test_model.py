"""TACA on real FLUX and SD3.5 models, through core's loaders and core's sampler."""

import itertools
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_model_advanced import ModelSamplingFlux, ModelSamplingSD3

import nodes
from support import tiny
from support.reference import dense_override, image_tokens, to_float64, velocity
from support.tiny import KINDS, call, installed_on, reference, sample, sigmas_of

comfy.utils.set_progress_bar_enabled(False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("size", "text", "cfg", "steps"),
    [
        ((16, 16), (7, 7), 3.0, 30),
        ((17, 13), (7, 12), 3.0, 10),  # odd sizes, unequal prompts
        ((10, 24), (77, 512), 1.0, 10),
        ((12, 12), (333, 20), 5.0, 10),
    ],
)
def test_the_picture_is_the_authors(folder, apply_taca, kind, size, text, cfg, steps):
    """A whole run is the dense float64 run with gamma in the first tenth of the steps."""
    model = tiny.load(folder, kind)
    settings = {"steps": steps, "cfg": cfg, "size": size, "text": text}
    ours = sample(apply_taca(model), kind, **settings).double()
    theirs = reference(model, kind, first=steps // 10, **settings)
    plain = sample(model, kind, **settings).double()
    error = (ours - theirs).abs().max()
    effect = (ours - plain).abs().max()
    assert effect > 1e-2, "gamma must show, or the test shows nothing"
    assert error < 1e-3 * effect


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gamma", [0.0, 0.8, 1.2, 2.0])
def test_one_call_equals_dense(folder, apply_taca, kind, gamma):
    """One call of the model with rows of different sigma, each with its own gamma."""
    model = apply_taca(tiny.load(folder, kind), gamma, 900.0)
    sigma = torch.tensor([1.0, 0.95, 0.9, 0.5])
    gammas = [gamma, gamma, gamma, 1.0]
    x = tiny.latent(14, 18, batch=4)
    cond = tiny.conditioning(kind, 9, batch=4)[0]
    extra = {"y": cond[1]["pooled_output"]}
    if kind == "flux":
        extra["guidance"] = torch.full((4,), 3.5)
    ours = call(model, x, sigma, cond[0], extra)
    calls = []
    override = dense_override(gammas, 9, 9 + image_tokens(x), calls)
    v = velocity(to_float64(model), model, x, sigma, cond[0], override, extra)
    assert calls
    expected = x.double() - sigma.view(-1, 1, 1, 1).double() * v
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)


def test_kontext_references_are_image(folder, apply_taca):
    """Reference latents count as image: their queries are adjusted, their keys are not scaled."""
    model = apply_taca(tiny.load(folder, "flux"))
    x, cond = tiny.latent(8, 8), tiny.conditioning("flux", 9)[0]
    references = [tiny.latent(8, 12, seed=7), tiny.latent(6, 8, seed=8)]
    sigma = torch.ones(1)
    extra = {"y": cond[1]["pooled_output"], "guidance": torch.tensor([3.5])}
    extra["ref_latents"] = references
    ours = call(model, x, sigma, cond[0], extra)
    length = 9 + image_tokens(x) + sum(map(image_tokens, references))
    v = velocity(to_float64(model), model, x, sigma, cond[0], dense_override(1.2, 9, length), extra)
    torch.testing.assert_close(ours.double(), x.double() - v, atol=1e-5, rtol=1e-5)


def test_an_attention_mask_is_honoured(folder, apply_taca):
    """As regional prompting gives it to FLUX."""
    model = apply_taca(tiny.load(folder, "flux"))
    x, cond, sigma = tiny.latent(8, 8), tiny.conditioning("flux", 9)[0], torch.ones(1)
    n = 9 + image_tokens(x)
    mask = torch.randn(1, 1, n, n, generator=torch.manual_seed(1)) * 2
    extra = {"y": cond[1]["pooled_output"], "guidance": torch.tensor([3.5]), "attention_mask": mask}
    ours = call(model, x, sigma, cond[0], extra)
    v = velocity(to_float64(model), model, x, sigma, cond[0], dense_override(1.2, 9, n), extra)
    torch.testing.assert_close(ours.double(), x.double() - v, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_multi_gpu_clones_each_see_their_own_blocks(folder, apply_taca, kind):
    """Core's deep clones, one thread each as for one device each, at the same time."""
    model = apply_taca(tiny.load(folder, kind), 1.5, 900.0)
    if not hasattr(model, "deepclone_multigpu"):
        pytest.skip("this ComfyUI runs on one device")
    clone = model.deepclone_multigpu()
    assert clone.model is not model.model
    x, cond = tiny.latent(24, 24), tiny.conditioning(kind, 9)[0]
    extra = {"y": cond[1]["pooled_output"]}
    if kind == "flux":
        extra["guidance"] = torch.tensor([3.5])
    inside, outside = torch.tensor([0.95]), torch.tensor([0.5])
    # One device works inside the window while the other is outside it.
    work = [
        (m, s) for m, s in ((model, inside), (clone, outside), (model, outside), (clone, inside))
    ]

    @torch.inference_mode()  # which, like the number of threads, each thread has of its own
    def run(i):
        return call(work[i][0], x, work[i][1], cond[0], extra)

    expected = [run(i) for i in range(4)]
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as threads:
        for _ in range(5):
            for pair in ((0, 1), (3, 2)):
                for i, result in zip(pair, threads.map(run, pair), strict=True):
                    assert torch.equal(result, expected[i])
    assert torch.equal(expected[0], expected[3])
    assert not installed_on(model)
    assert not installed_on(clone)


@pytest.mark.parametrize("kind", KINDS)
def test_model_sampling_in_front_or_behind(folder, apply_taca, kind, caplog):
    """The window is of t, so another shift moves other steps into it; the order does not matter."""
    caplog.set_level("INFO", logger="taca")
    model = tiny.load(folder, kind)

    def shift(m):
        if kind == "flux":
            return ModelSamplingFlux().patch(m, 3.0, 3.0, 1024, 1024)[0]
        return ModelSamplingSD3().patch(m, 8.0)[0]

    before, after = (sample(m, kind) for m in (apply_taca(shift(model)), shift(apply_taca(model))))
    assert torch.equal(before, after)
    assert not torch.equal(before, sample(shift(model), kind))
    steps = {"flux": 4, "sd3": 2}[kind]  # by hand, from the shifts' formulae
    logged = [r.message for r in caplog.records if r.name == "taca"]
    assert len(logged) == 2
    assert all(f"acted on {steps} of 10 steps" in message for message in logged)


@pytest.mark.parametrize("kind", KINDS)
def test_calls_that_a_cache_answers_are_counted(folder, apply_taca, kind, caplog):
    """No call but the first reaches the blocks: the run is that of its change, and it is said."""
    caplog.set_level("INFO", logger="taca")
    plain = tiny.load(folder, kind)
    known = []

    def cache(executor, x, *args, **kwargs):
        if not known:
            known.append(executor(x, *args, **kwargs) - x)
        return x + known[0]

    sigmas = sigmas_of(plain, 10).double()
    noise = torch.randn(1, 16, 16, 16, generator=torch.manual_seed(3)).double()
    [[text, more]] = tiny.conditioning(kind, 7)
    extra = {"y": more["pooled_output"]} | (
        {"guidance": torch.tensor([3.5])} if kind == "flux" else {}
    )
    expected = {}
    for gamma in (1.0, 1.2):
        known.clear()
        model = apply_taca(plain, gamma, 900.0)
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "cache", cache)
        result = sample(model, kind, steps=10, cfg=1.0)
        override = dense_override(gamma, 7, 7 + image_tokens(noise))
        x = noise * sigmas[0]
        kept = sigmas[0] * velocity(to_float64(plain), plain, x, sigmas[:1], text, override, extra)
        for sigma, following in itertools.pairwise(sigmas):
            x = x + (following - sigma) / sigma * kept
        expected[gamma] = plain.model.process_latent_out(x)
        assert (result - expected[gamma]).abs().max() < 1e-4
    assert (expected[1.0] - expected[1.2]).abs().max() > 1e-2  # the first call's gamma
    said = caplog.records[-1].message
    assert "acted on 1 of 10 steps" in said
    assert "A cache answered" in said


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_without_text_are_no_error(folder, apply_taca, kind, monkeypatch):
    """A model's pass without a prompt (FLUX and SD3 have none, later families do)."""
    families = sys.modules["taca_pack.taca.families"]
    model = tiny.load(folder, kind)

    family = families.family_of(model.model.diffusion_model)
    located = []

    def without_text(locate):
        def locate_without_text(args, kwargs, state):
            args = tuple(x[:, :0] if i == family_text[kind][0] else x for i, x in enumerate(args))
            kwargs = {n: x[:, :0] if n == family_text[kind][1] else x for n, x in kwargs.items()}
            located.append(locate(args, kwargs, state))
            return located[-1]

        return locate_without_text

    family_text = {"flux": (1, "txt"), "sd3": (0, "context")}
    joint = {name: without_text(locate) for name, locate in family.joint.items()}
    if kind == "flux":
        monkeypatch.setattr(
            families,
            "FAMILIES",
            [
                replace(
                    family,
                    joint={
                        "double_blocks": joint["double_blocks"],
                        "single_blocks": lambda args, kwargs, state: (),
                    },
                )
            ],
        )
    else:
        monkeypatch.setattr(families, "FAMILIES", [replace(family, joint=joint)])
    assert torch.equal(sample(model, kind), sample(apply_taca(model), kind))
    assert located
    assert not any(located)


@pytest.mark.parametrize("kind", ["schnell", "flux-fill"])
def test_other_flux_models(folder, apply_taca, kind):
    """Without guidance, and with more channels than the picture's."""
    model = tiny.load(folder, kind)
    run = {"steps": 4, "cfg": 1.0}
    plain, ours = (sample(m, kind, **run) for m in (model, apply_taca(model, 1.2, 0.0)))
    expected = reference(model, kind, gamma=1.2, first=4, **run)
    effect = (plain - expected).abs().max()
    assert effect > 1e-2
    assert (ours - expected).abs().max() < 1e-3 * effect


def test_attn2_is_left_alone(folder, apply_taca):
    """SD3.5-Medium's image-only attention gets every query and its own keys, in one call."""
    model = tiny.load(folder, "sd3").clone()
    lengths = []

    def spy(func, q, k, v, heads, **kwargs):
        lengths.append((q.shape[1], k.shape[1]))
        return func(q, k, v, heads, **kwargs)

    model.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = spy
    sample(apply_taca(model, 1.2, 1000.0), "sd3", steps=1, cfg=1.0, text=(7, 7))
    # Block 0: image queries, text queries, attn2; block 1: image queries, text queries.
    assert lengths == [(64, 71), (7, 71), (64, 64), (64, 71), (7, 71)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("gamma", "threshold"), [(1.0, 970.0), (1.2, 1000.0)])
def test_off_is_bit_identical(folder, apply_taca, kind, gamma, threshold):
    """gamma 1, or no step inside: the plain model's bits, and nothing installed in any call."""
    model = tiny.load(folder, kind)
    patched = apply_taca(model, gamma, threshold)
    inside = []

    def watch(executor, *args, **kwargs):
        inside.append(len(installed_on(patched)))
        return executor(*args, **kwargs)

    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "watch", watch)
    settings = {"steps": 4, "cfg": 1.0}
    start = torch.equal(sample(model, kind, **settings), sample(patched, kind, **settings))
    if gamma == 1:
        assert start
        assert inside == [0] * 4
    else:  # t = 1000 itself is inside: only the first step may differ
        assert not start
        assert inside[0] > 0
        assert inside[1:] == [0] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_calls_options_stay_as_they_are(folder, apply_taca, kind):
    """Whoever shares transformer_options with the blocks finds nothing of ours there."""
    patched = apply_taca(tiny.load(folder, kind))
    left = []

    def watch(executor, *args, **kwargs):
        result = executor(*args, **kwargs)
        left.append("optimized_attention_override" in args[-1])
        return result

    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "watch", watch)
    sample(patched, kind, steps=4, cfg=1.0)
    assert left == [False] * 4


@pytest.mark.parametrize("kind", KINDS)
def test_applying_twice_replaces(folder, apply_taca, kind, caplog):
    caplog.set_level("INFO", logger="taca")
    model = tiny.load(folder, kind)
    twice = sample(apply_taca(apply_taca(model, 2.0, 0.0), 1.2), kind)
    assert len(caplog.records) == 1
    assert torch.equal(twice, sample(apply_taca(model), kind))


@pytest.mark.parametrize("kind", KINDS)
def test_original_and_clones_are_untouched(folder, apply_taca, kind):
    model = tiny.load(folder, kind)
    plain = sample(model, kind)
    one, two = apply_taca(model, 1.2), apply_taca(model, 1.7)
    results = [sample(m, kind) for m in (one, two, one, model, two)]
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[4])
    assert torch.equal(results[3], plain)
    assert not torch.equal(results[0], results[1])
    assert not installed_on(model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "error", [RuntimeError, KeyboardInterrupt, comfy.model_management.InterruptProcessingException]
)
def test_a_failing_step_leaves_nothing_behind(folder, apply_taca, kind, error):
    model = tiny.load(folder, kind)
    plain, patched = sample(model, kind), sample(apply_taca(model), kind)
    fails = model.clone()

    def failing(*args, **kwargs):
        raise error

    options = fails.model_options.setdefault("transformer_options", {})
    options["optimized_attention_override"] = failing
    with pytest.raises(error):
        sample(apply_taca(fails), kind)
    assert not installed_on(model)
    assert torch.equal(sample(model, kind), plain)
    assert torch.equal(sample(apply_taca(model), kind), patched)


@pytest.mark.parametrize("kind", KINDS)
def test_another_packs_forward_is_kept(folder, apply_taca, kind):
    """A forward that someone put on a block runs inside ours and is back afterwards."""
    model = tiny.load(folder, kind, seed=4)
    expected = sample(apply_taca(model), kind)
    transformer = model.model.diffusion_model
    block = next(b for n, b in transformer.named_modules() if n.endswith("blocks.0"))
    original, calls = block.forward, []

    def theirs(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    block.forward = theirs
    try:
        assert torch.equal(sample(apply_taca(model), kind), expected)
        assert len(calls) >= 10
        assert block.__dict__["forward"] is theirs
    finally:
        del block.forward


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("late", [True, False])
def test_other_users_of_the_override_slot(folder, apply_taca, kind, ours_first, late):
    """Whoever is in the slot attends for us, whether put there with a node or in each call."""
    model = tiny.load(folder, kind)
    calls = []

    def theirs(func, q, k, v, heads, **kwargs):
        calls.append(1)
        return 0.5 * func(q, k, v, heads, **kwargs)

    def slot(m):
        m = m.clone()
        if late:
            m.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "theirs", each_call)
        else:
            options = m.model_options.setdefault("transformer_options", {})
            options["optimized_attention_override"] = theirs
        return m

    def each_call(executor, *args, **kwargs):
        args[-1]["optimized_attention_override"] = theirs
        return executor(*args, **kwargs)

    both = slot(apply_taca(model)) if ours_first else apply_taca(slot(model))
    together = sample(both, kind)
    assert calls
    assert not torch.equal(together, sample(apply_taca(model), kind))
    assert not torch.equal(together, sample(slot(model), kind))
    other = apply_taca(slot(model)) if ours_first else slot(apply_taca(model))
    assert torch.equal(together, sample(other, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("weights", "dtype"),
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float8_e4m3fn, torch.bfloat16),
    ],
)
def test_reduced_precision(folder, apply_taca, kind, weights, dtype):
    """As far from the dense float64 step as the plain model is from its own."""
    model = tiny.load(folder, kind, dtype=weights)
    model.set_model_compute_dtype(dtype)
    seen = set()

    def spy(func, q, k, v, heads, **kwargs):
        seen.update((q.dtype, k.dtype, v.dtype))
        return func(q, k, v, heads, **kwargs)

    model.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = spy
    run = {"steps": 1, "cfg": 1.0, "size": (12, 12)}
    # Core's FLUX reads 1000 times the guidance in the compute dtype: 3504 in bfloat16.
    guidance = (torch.tensor(3.5, dtype=dtype) * 1000).item() / 1000
    results, expected, errors = [], [], []
    for m, gamma in ((model, 1.0), (apply_taca(model, 1.5), 1.5)):
        results.append(sample(m, kind, **run).double())
        assert model.model.get_dtype() == weights
        expected.append(reference(model, kind, gamma=gamma, guidance=guidance, **run))
        errors.append((results[-1] - expected[-1]).norm())
    assert seen == {dtype}
    assert errors[1] < 1.3 * errors[0]
    assert (expected[1] - expected[0]).norm() > 20 * errors[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_its_pictures(folder, apply_taca, kind):
    model = apply_taca(tiny.load(folder, kind))
    both = sample(model, kind, batch=2)
    torch.testing.assert_close(both[:1], sample(model, kind, batch=1), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("UNetModel", r"Stable Diffusion.*UNetModel.*TACA works on FLUX, SD3.5"),
        ("ComfyFluxWrapper", "nunchaku"),
        ("OfTomorrow", r"does not know the model OfTomorrow.*report it: https://"),
    ],
)
def test_a_model_that_it_cannot_act_on_is_refused(apply_taca, name, says):
    model = torch.nn.Module()
    model.diffusion_model = type(name, (torch.nn.Module,), {})()
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match=says):
        apply_taca(comfy.model_patcher.ModelPatcher(model, cpu, cpu))


@pytest.mark.parametrize("kind", KINDS)
def test_never_a_silent_no_op(folder, apply_taca, kind):
    """Blocks that ran, but whose attention never came to us, are an error that names the model."""
    model = tiny.load(folder, kind, seed=6)
    transformer = model.model.diffusion_model
    blocks = [b for n, b in transformer.named_modules() if n.endswith(("blocks.0", "blocks.1"))]
    originals = [b.forward for b in blocks]
    for block, original in zip(blocks, originals, strict=True):

        def without_options(*args, _original=original, **kwargs):
            return _original(*args, **(kwargs | {"transformer_options": {}}))

        block.forward = without_options
    try:
        name = type(transformer).__name__
        says = rf"bypassed in \d of \d blocks of {name}.*without_options \(.*test_model\)"
        with pytest.raises(RuntimeError, match=says):
            sample(apply_taca(model), kind)
        sample(apply_taca(model, 1.0), kind)  # gamma 1 asks for nothing
    finally:
        for block in blocks:
            del block.forward


@pytest.mark.parametrize("kind", KINDS)
def test_one_log_line_a_run(folder, apply_taca, kind, caplog):
    caplog.set_level("INFO", logger="taca")
    sample(apply_taca(tiny.load(folder, kind)), kind, steps=30)
    (record,) = [r for r in caplog.records if r.name == "taca"]
    blocks = {"flux": 4, "sd3": 2}[kind]
    assert f"gamma 1.2 at t >= 970 acted on 3 of 30 steps, {blocks} joint blocks" in record.message
    assert record.levelname == "INFO"


def test_a_window_without_steps_warns(folder, apply_taca, caplog):
    model = apply_taca(tiny.load(folder, "sd3"), 1.2, 970.0)
    latent = {"samples": torch.randn(1, 16, 16, 16)}
    conds = tiny.conditioning("sd3", 7), tiny.conditioning("sd3", 7)
    nodes.common_ksampler(model, 3, 4, 1.0, "euler", "simple", *conds, latent, denoise=0.5)
    (record,) = [r for r in caplog.records if r.name == "taca"]
    assert record.levelname == "WARNING"
    assert "0 of 4 steps" in record.message
