"""TACA beside what users combine it with: each equals the same combination done densely."""

import gc
import sys
from functools import partial

import comfy.samplers
import comfy.sd
import folder_paths
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_apg import APG
from comfy_extras.nodes_cfg import CFGNorm, CFGZeroStar
from comfy_extras.nodes_edit_model import ReferenceLatent
from comfy_extras.nodes_mahiro import Mahiro
from comfy_extras.nodes_model_merging import ModelMergeSimple, ModelSave
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
from comfy_extras.nodes_tcfg import TCFG
from safetensors.torch import load_file

from support import families, tiny
from support.families import named
from support.family_runs import dense as dense_family
from support.family_runs import sample as sample_family
from support.loras import hooked, random_lora
from support.reference import (
    SIZE,
    TEXT,
    dense,
    dense_attention,
    image_tokens,
)
from support.reports import report_on
from support.tiny import KINDS, installed_on, sample
from support.words import weighed

try:
    from comfy_extras.nodes_nag import NAGuidance
except ImportError:  # not in every ComfyUI
    NAGuidance = None
try:
    from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
except ImportError:
    EasyCacheNode = LazyCacheNode = None

import nodes

PATCH, OPTIONS, REPORT = (
    sys.modules[f"taca_pack.taca.{m}"] for m in ("patch", "options", "report")
)
config_of = sys.modules["taca_pack.taca.run"].config_of


def block_name(kind):
    return "double" if kind == "flux" else "joint"


def residual(model, kind):
    """What a cache or an accelerator does to a call: here it halves what the model says."""
    model = model.clone()
    model.add_wrapper_with_key(
        WrappersMP.APPLY_MODEL, "halve", lambda executor, *a, **k: executor(*a, **k) * 0.5
    )
    return model


def uniform(model):
    """As perturbed attention guidance on a DiT: away from a pass that attends to all alike."""
    model = model.clone()

    def attend(func, q, k, v, heads, skip_reshape=False, **kwargs):
        mean = v.mean(2).flatten(1) if skip_reshape else v.mean(1).flatten(1)
        return mean[:, None].expand(-1, q.shape[2 if skip_reshape else 1], -1)

    def guide(args):
        options = comfy.model_patcher.create_model_options_clone(args["model_options"])
        options["transformer_options"]["optimized_attention_override"] = attend
        [away] = comfy.samplers.calc_cond_batch(
            args["model"], [args["cond"]], args["input"], args["sigma"], options
        )
        return args["denoised"] + 0.5 * (args["cond_denoised"] - away)

    model.set_model_sampler_post_cfg_function(guide)
    return model


COMBINATIONS = {
    "PAG": lambda m, kind: PerturbedAttentionGuidance.execute(m, 3.0).result[0],
    "a PAG of attention": lambda m, kind: uniform(m),
    "skip layer guidance": lambda m, kind: SkipLayerGuidanceDiT.execute(
        m, 3.0, 0.0, 1.0, *(("1", "0") if kind == "flux" else ("1", "")), 0.0
    ).result[0],
    "NAG": lambda m, kind: NAGuidance.execute(m, 5.0, 0.5, 1.5).result[0],
    "APG": lambda m, kind: APG.execute(m, 0.7, 5.0, 0.3).result[0],
    "CFG-Zero*": lambda m, kind: CFGZeroStar.execute(m).result[0],
    "CFG norm": lambda m, kind: CFGNorm.execute(m, 1.0).result[0],
    "TCFG": lambda m, kind: TCFG.execute(m).result[0],
    "Mahiro": lambda m, kind: Mahiro.execute(m).result[0],
    "a wrapper around calls": residual,
    "EasyCache": lambda m, kind: EasyCacheNode.execute(m, 3.0, 0.1, 0.9, False).result[0],
    "LazyCache": lambda m, kind: LazyCacheNode.execute(m, 3.0, 0.1, 0.9, False).result[0],
}
NO_OPS = {
    ("PAG", "flux"),
    ("PAG", "sd3"),  # it perturbs a UNet's attn1
    ("NAG", "sd3"),  # it patches what attn1 puts out, which MMDiT does not ask for
    ("EasyCache", "sd3"),  # it wraps DIFFUSION_MODEL, of which MMDiT has none
}
"""What core's own nodes do not do on these models; they are still beside TACA in workflows."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", COMBINATIONS)
@pytest.mark.parametrize("ours_first", [True, False])
def test_beside(folder, apply_taca, kind, name, ours_first):
    if (name == "NAG" and NAGuidance is None) or ("Cache" in name and EasyCacheNode is None):
        pytest.skip(f"this ComfyUI has no {name}")
    model = tiny.load(folder, kind)
    combine = COMBINATIONS[name]
    settings = {"steps": 6, "text": (TEXT, TEXT)}
    plain = sample(combine(model, kind), kind, **settings)
    beside_nothing = (plain - sample(model, kind, **settings)).abs().max()
    assert (beside_nothing > 0.1) != ((name, kind) in NO_OPS)
    expected = sample(combine(dense(model), kind), kind, **settings)
    if ours_first:
        ours = combine(apply_taca(model, 1.4, 0.0), kind)
    else:
        ours = apply_taca(combine(model, kind), 1.4, 0.0)
    torch.testing.assert_close(sample(ours, kind, **settings), expected, atol=2e-3, rtol=2e-3)
    assert (plain - expected).abs().max() > 0.1
    assert not installed_on(model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_hooked_to_steps(folder, apply_taca, kind):
    """Core's keyframed LoRA on the conditioning, beside TACA."""
    model = tiny.load(folder, kind)
    lora, prompt = random_lora(model, only="blocks"), tiny.conditioning(kind, TEXT)
    settings = {"steps": 4, "text": (TEXT, TEXT), "cfg": 1.0}
    expected = sample(dense(model), kind, positive=hooked(prompt, lora), **settings)
    ours = sample(apply_taca(model, 1.4, 0.0), kind, positive=hooked(prompt, lora), **settings)
    torch.testing.assert_close(ours, expected, atol=2e-3, rtol=2e-3)
    without = sample(apply_taca(model, 1.4, 0.0), kind, **settings)
    assert not torch.allclose(ours, without, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_merging(folder, apply_taca, kind):
    """A merge of a patched model is the merge."""
    one, two = tiny.load(folder, kind), tiny.load(folder, kind, seed=9)
    merged = ModelMergeSimple().merge(one, two, 0.5)[0]
    ours = ModelMergeSimple().merge(apply_taca(one, 1.4), two, 0.5)[0]
    assert torch.equal(sample(ours, kind), sample(apply_taca(merged, 1.4), kind))


@pytest.mark.parametrize("kind", KINDS)
def test_saving(folder, apply_taca, kind, tmp_path, monkeypatch):
    """By core's ModelSave, before and after a run: the plain model's file, also with a TACA LoRA;
    loaded again, it is the plain model."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    model = tiny.load(folder, kind)
    fit, add = (sys.modules[f"taca_pack.taca.{module}"] for module in ("lora_fit", "patch"))
    lora = fit.fit_lora(random_lora(model), model.model, "lora", 1.0)
    taca = apply_taca(model, 1.4, 0.0)
    files = []
    for m in (model, taca, add.patch_lora(taca, lora)):
        for _ in range(2):
            ModelSave().save(m, f"{len(files)}")
            files.append(next(tmp_path.glob(f"{len(files)}_*.safetensors")))
            sample(m, kind, steps=1)
    first, *others = map(load_file, files)
    for state in others:
        assert state.keys() == first.keys()
        assert all(torch.equal(state[key], first[key]) for key in first)
    for key, value in tiny.weights(kind).items():
        names = (f".{key}", f".{key.replace('.scale', '.weight')}")  # as core calls FLUX's norms
        assert torch.equal(next(t for name, t in first.items() if name.endswith(names)), value)
    again = comfy.sd.load_diffusion_model(str(files[-1]))
    assert torch.equal(sample(again, kind), sample(model, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "sampler",
    [
        "heun",
        "dpmpp_2s_ancestral",
        "res_multistep",
        "dpmpp_sde",
        "uni_pc",
        "euler_ancestral",
        "dpmpp_2m",
        "ddim",
    ],
)
def test_samplers_densely(folder, apply_taca, kind, sampler):
    """Several calls a step, and noise between them; in all calls, and in a window that begins or
    ends within a step."""
    model, calls = tiny.load(folder, kind), []
    settings = {"steps": 4, "text": (TEXT, TEXT), "sampler": sampler}
    results = []
    for threshold in (0.0, 800.0):
        expected = sample(dense(model, threshold=threshold, calls=calls), kind, **settings)
        ours = sample(apply_taca(model, 1.4, threshold), kind, **settings)
        torch.testing.assert_close(ours, expected, atol=5e-3, rtol=5e-3)
        results.append(expected)
    assert (results[0] - results[1]).abs().max() > 0.05
    assert min(calls) < 800 < max(calls)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("denoise", [0.8, 0.4])
@pytest.mark.parametrize("threshold", [0.0, 750.0])
def test_image_to_image_densely(folder, apply_taca, kind, denoise, threshold):
    """From a picture: the window's timesteps are those of the whole sampling."""
    model, calls = tiny.load(folder, kind), []

    def drawn(m):
        return nodes.common_ksampler(
            m,
            3,
            6,
            1.0,
            "euler",
            "simple",
            tiny.conditioning(kind, TEXT),
            tiny.conditioning(kind, TEXT),
            {"samples": tiny.latent(16, 16)},
            denoise=denoise,
        )[0]["samples"]

    plain, expected, ours = map(
        drawn,
        (model, dense(model, threshold=threshold, calls=calls), apply_taca(model, 1.4, threshold)),
    )
    torch.testing.assert_close(ours, expected, atol=2e-3, rtol=2e-3)
    assert max(calls) < 990
    assert ((plain - expected).abs().max() > 0.05) == (max(calls) >= threshold)


@pytest.mark.parametrize("references", [1, 2])
def test_kontext(folder, apply_taca, references):
    """Reference latents, by core's node and through the sampler: they count as image."""
    model, positive = tiny.load(folder, "flux"), tiny.conditioning("flux", TEXT)
    sizes, more = [(8, 12), (6, 8)][:references], 0
    for i, size in enumerate(sizes):
        reference = {"samples": tiny.latent(*size, seed=7 + i)}
        positive = ReferenceLatent.execute(positive, reference).result[0]
        more += image_tokens(reference["samples"])
    settings = {"steps": 3, "cfg": 1.0, "positive": positive}
    expected = sample(dense(model, more=more), "flux", **settings)
    ours = sample(apply_taca(model, 1.4, 0.0), "flux", **settings)
    torch.testing.assert_close(ours, expected, atol=2e-3, rtol=2e-3)
    for other in (
        sample(model, "flux", **settings),
        sample(dense(model), "flux", steps=3, cfg=1.0),
    ):
        assert (other - expected).abs().max() > 0.1


def test_tokens_that_another_node_adds_to_the_text(folder, apply_taca):
    """As USO Style Reference puts a style before it: text for gamma, and whatever asks for single
    tokens of the prompt is told, for they are elsewhere."""
    style = torch.randn(1, 3, 128, generator=torch.manual_seed(5))

    def styled(model):
        def before(given):
            text, ids = given["txt"], given["txt_ids"]
            given["txt"] = torch.cat([style.expand(len(text), -1, -1), text], 1)
            given["txt_ids"] = torch.cat([ids.new_zeros(len(text), 3, 3), ids], 1)
            return given

        model = model.clone()
        model.set_model_post_input_patch(before)
        return model

    model = tiny.load(folder, "flux")
    settings = {"steps": 2, "text": (TEXT, TEXT)}
    expected = sample(styled(dense(model, text=TEXT + 3)), "flux", **settings)
    ours = styled(apply_taca(model, 1.4, 0.0))
    torch.testing.assert_close(sample(ours, "flux", **settings), expected, atol=2e-3, rtol=2e-3)
    sample(REPORT.watched(ours, report_on({})), "flux", **settings)
    weighs = weighed(tiny.conditioning("flux", TEXT), [1.0] * (TEXT - 1) + [2.0])
    limited = OPTIONS.Options(prompt=(1.0,) * 5 + (0.0,) * 2)
    schedule = config_of(ours).schedule
    for asks in (
        lambda: sample(styled(PATCH.patch_model(model, schedule, limited)), "flux", **settings),
        lambda: sample(ours, "flux", positive=weighs, **settings),
        lambda: sample(REPORT.watched(ours, report_on({"a": [1]})), "flux", **settings),
        lambda: sample(REPORT.watched(ours, report_on({"a": [1]}, TEXT)), "flux", **settings),
    ):
        with pytest.raises(
            ValueError, match=r"10 text tokens, and of 7 it is known .* adds tokens"
        ):
            asks()


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_in_front_or_behind(folder, apply_taca, kind):
    """An ordinary LoRA adds to the weights either way round."""
    model = tiny.load(folder, kind)
    lora = random_lora(model, only="blocks")

    def add(m):
        return comfy.sd.load_lora_for_models(m, None, dict(lora), 0.7, 0.0)[0]

    settings = {"steps": 4, "text": (TEXT, TEXT)}
    expected = sample(dense(add(model)), kind, **settings)
    before, after = add(apply_taca(model, 1.4, 0.0)), apply_taca(add(model), 1.4, 0.0)
    torch.testing.assert_close(sample(before, kind, **settings), expected, atol=2e-3, rtol=2e-3)
    assert torch.equal(sample(before, kind, **settings), sample(after, kind, **settings))
    assert (sample(dense(model), kind, **settings) - expected).abs().max() > 0.1


FAMILY_COMBINATIONS = {
    "skip layer guidance": lambda m, case: COMBINATIONS["skip layer guidance"](m, "flux"),
    "APG": COMBINATIONS["APG"],
    "EasyCache": COMBINATIONS["EasyCache"],
    "a hooked LoRA": lambda m, case: m,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILY_COMBINATIONS)
@pytest.mark.parametrize("case", named("Qwen-Image", "Z-Image", "FLUX.2", "Chroma"), ids=str)
def test_beside_on_families(folder, apply_taca, monkeypatch, case, name):
    """As `test_beside`, on the models that most people run."""
    model = families.load(case, folder, monkeypatch)
    combine, run = FAMILY_COMBINATIONS[name], {"steps": 4, "cfg": 3.0}
    alone = sample_family(model, case, **run)
    if name == "a hooked LoRA":
        conditioning, lora = families.conditioning, random_lora(model, only="att")
        monkeypatch.setattr(
            families, "conditioning", lambda *a, **k: hooked(conditioning(*a, **k), lora)
        )
    taca = apply_taca(model, 1.4, 0.0)
    plain, expected, *ours = (
        sample_family(m, case, **run)
        for m in (
            combine(model, case),
            combine(dense_family(model, case, 1.4), case),
            combine(taca, case),
            apply_taca(combine(model, case), 1.4, 0.0),
        )
    )
    effect = (plain - expected).abs().max()
    assert effect > 0.1
    # Z-Image asks no patch whether to run a block.
    no_op = (name, case.name) == ("skip layer guidance", "Z-Image")
    assert ((plain - alone).abs().max() > 0.1) != no_op
    assert all((each - expected).abs().max() < 2e-3 * effect for each in ours)
    assert not installed_on(model)


@pytest.mark.parametrize(("denoise", "inside"), [(0.9, 0), (0.95, 1), (1.0, 2)])
def test_image_to_image(folder, apply_taca, denoise, inside, caplog):
    """With denoise below 1 the window lies partly or wholly before the run: said once."""
    caplog.set_level("INFO", logger="taca")
    model = tiny.load(folder, "flux")
    start = {"samples": tiny.latent(16, 16)}
    runs = [
        nodes.common_ksampler(
            m,
            3,
            20,
            1.0,
            "euler",
            "simple",
            tiny.conditioning("flux", TEXT),
            tiny.conditioning("flux", TEXT),
            start,
            denoise=denoise,
        )[0]["samples"]
        for m in (model, apply_taca(model, 1.4))
    ]
    said = [r for r in caplog.records if r.name == "taca"]
    assert len(said) == 1
    assert f"acted on {inside} of 20" in said[0].message
    assert (said[0].levelname == "WARNING") == (inside == 0)
    assert torch.equal(*runs) == (inside == 0)


def test_schedule_is_resolved_for_each_part_of_a_split_run(folder, apply_taca):
    """KSampler (Advanced) twice: each half has the steps that are its own."""
    model = tiny.load(folder, "sd3")
    patched = apply_taca(model, 1.4)
    positive, negative = (tiny.conditioning("sd3", TEXT, seed=s) for s in (1, 5))
    arguments = (20, 1.0, "euler", "simple", positive, negative)
    latent = {"samples": torch.zeros(1, 16, *SIZE)}
    whole = nodes.common_ksampler(patched, 3, *arguments, latent)[0]
    advanced = nodes.KSamplerAdvanced()
    first = advanced.sample(patched, "enable", 3, *arguments, latent, 0, 10, "enable")[0]
    second = advanced.sample(patched, "disable", 3, *arguments, first, 10, 20, "disable")[0]
    torch.testing.assert_close(second["samples"], whole["samples"], atol=1e-3, rtol=1e-3)
    plain = advanced.sample(model, "disable", 3, *arguments, first, 10, 20, "disable")[0]
    assert torch.equal(plain["samples"], second["samples"])


def test_two_patched_clones_and_a_shared_model_in_turn(folder, apply_taca):
    """Twenty runs of five settings in random order: each as in its first, and no memory kept."""
    model = tiny.load(folder, "flux")
    kinds = [
        model,
        apply_taca(model),
        apply_taca(model, 1.6, 900.0),
        SkipLayerGuidanceDiT.execute(apply_taca(model), 3.0, 0.0, 1.0, "1", "0").result[0],
        residual(apply_taca(model, 0.8, 0.0), "flux"),
    ]
    expected = [sample(m, "flux", steps=3) for m in kinds]
    gc.collect()
    holders = sys.getrefcount(model.model)
    order = torch.randint(5, (20,), generator=torch.manual_seed(0)).tolist()
    for i in order:
        assert torch.equal(sample(kinds[i], "flux", steps=3), expected[i])
    assert not installed_on(model)
    gc.collect()
    # Core holds on to the patcher that ran last; nothing grows with the runs.
    assert sys.getrefcount(model.model) <= holders + 1


@pytest.mark.parametrize("ours_first", [True, False])
def test_keys_that_core_keeps(folder, apply_taca, monkeypatch, ours_first):
    """Flux KV Cache: from the second step on the references are keys alone, and not queries."""
    nodes_flux = pytest.importorskip("comfy_extras.nodes_flux")
    if not hasattr(nodes_flux, "FluxKVCache"):
        pytest.skip("this ComfyUI has no Flux KV Cache")
    [case] = named("FLUX.2 Klein, references without noise")
    model = families.load(case, folder, monkeypatch)
    text, references, shapes = 512, 4, []

    def dense(func, q, k, v, heads, mask=None, skip_reshape=False, gamma=1.0, **kwargs):
        assert skip_reshape
        shapes.append((q.shape[2], k.shape[2]))
        factor = torch.ones(q.shape[2], k.shape[2], dtype=torch.float64)
        factor[text:, :text] = gamma
        return dense_attention(q, k, v, factor, mask).transpose(1, 2).flatten(2).to(q.dtype)

    def cached(m):
        return nodes_flux.FluxKVCache.execute(m).result[0]

    def dense_run(gamma):
        m = cached(model)
        options = m.model_options.setdefault("transformer_options", {})
        options["optimized_attention_override"] = partial(dense, gamma=gamma)
        return sample_family(m, case, steps=3)

    plain, expected = map(dense_run, (1.0, 1.5))
    whole = text + 12 + references
    assert {(whole, whole), (whole - references, whole)} <= set(shapes)
    if ours_first:
        ours = cached(apply_taca(model, 1.5, 0.0))
    else:
        ours = apply_taca(cached(model), 1.5, 0.0)
    effect = (expected - plain).abs().max()
    assert effect > 1e-2
    assert (sample_family(ours, case, steps=3) - expected).abs().max() < 2e-3 * effect
    fit_lora = sys.modules["taca_pack.taca.lora_fit"].fit_lora
    lora = fit_lora(random_lora(model, rank=2), model.model, "lora", 1.0)
    with pytest.raises(RuntimeError, match="Flux KV Cache keeps keys"):
        sample_family(sys.modules["taca_pack.taca.patch"].patch_lora(ours, lora), case, steps=3)
