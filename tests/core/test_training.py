"""TACA Training Window under core's own trainer.

Gradients are compared by what the trainer makes of them: two steps of SGD from the same seed, here
and with the dense float64 attention in TACA's place.
"""

import sys

import comfy.model_management
import comfy.sd
import folder_paths
import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingFlux, ModelSamplingSD3
from comfyui import load_pack
from safetensors.torch import save_file

from support import ROOT, tiny
from support.reference import dense_override
from support.tiny import KINDS, sample
from support.training import train


def left_of_ours(model):
    """What the pack has left on modules. (Older trainers leave some forwards of core's own.)"""
    hooks = [each for module in model.model.modules() for each in module._forward_pre_hooks]
    forwards = (module.__dict__.get("forward") for module in model.model.modules())
    # Its name is that of the forward it replaces; its code's is its own.
    codes = [getattr(forward, "__code__", None) for forward in forwards]
    return hooks + [code for code in codes if "taca" in getattr(code, "co_name", "")]


patch_lora = sys.modules["taca_pack.taca.patch"].patch_lora
fit_lora = sys.modules["taca_pack.taca.lora_fit"].fit_lora


@pytest.fixture
def window(pack):
    return lambda model: pack["TACATrainingWindow"].execute(model).result[0]


def dense(model, kind, gamma, text=7, tokens=16):
    """The same model, drawing in the same window, with the dense attention in TACA's place."""
    model = model.clone()
    model.remove_wrappers_with_key("apply_model", "taca")
    model.remove_wrappers_with_key("outer_sample", "taca")
    model.remove_callbacks_with_key("on_prepare_state", "taca")
    model.injections.clear()
    inner = dense_override(gamma, text, text + tokens)

    def override(func, q, k, v, heads, **kwargs):
        kwargs.pop("transformer_options", None)
        with torch.autocast("cpu", enabled=False):
            return inner(func, q, k, v, heads, **kwargs).to(q.dtype)

    options = model.model_options.setdefault("transformer_options", {})
    options["optimized_attention_override"] = override
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("checkpointing", "depth", "batch", "bypass"),
    [
        (False, 1, 1, False),
        (True, 1, 1, False),
        (True, 2, 1, False),
        (True, 1, 2, False),
        (True, 1, 1, True),
    ],
)
def test_gradients_are_the_dense_ones(
    folder, apply_taca, window, kind, checkpointing, depth, batch, bypass
):
    plain_model = tiny.load(folder, kind)
    if kind == "flux" and not checkpointing:
        # Core's FLUX adds in place, and cannot be trained so, with TACA or without.
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            train(plain_model, kind, checkpointing=False)
        return
    model = window(apply_taca(plain_model, 1.5, 900.0))
    settings = {"checkpointing": checkpointing, "depth": depth, "batch": batch, "bypass": bypass}
    ours, losses = train(model, kind, **settings)
    expected, expected_losses = train(dense(model, kind, 1.5), kind, **settings)
    plain, _ = train(dense(model, kind, 1.0), kind, **settings)
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    assert ours.keys() == expected.keys()
    start, _ = train(model, kind, rate=1e-7, **settings)

    def change(lora):
        return torch.cat([(lora[key] - start[key]).flatten() for key in sorted(lora)])

    effect = (change(plain) - change(expected)).norm()
    assert (change(ours) - change(expected)).norm() < 0.01 * effect
    comfy.model_management.unload_all_models()
    assert not left_of_ours(model)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_are_inside(folder, apply_taca, window, kind):
    """Uniform over the trainer's own draws inside the window; those of sampling do not change.

    A second window of the same TACA changes nothing.
    """
    model = window(apply_taca(tiny.load(folder, kind), 1.2, 970.0))
    original = model.model.model_sampling
    ours = model.get_model_object("model_sampling")
    twice = window(model).get_model_object("model_sampling")
    percents = torch.linspace(0, 0.9999, 200).tolist()
    assert [ours.percent_to_sigma(p) for p in percents] == [
        original.percent_to_sigma(p) for p in percents
    ]
    comfy.model_management.in_training = True
    try:
        draws = [ours.percent_to_sigma(p) for p in percents]
        assert [twice.percent_to_sigma(p) for p in percents] == draws
    finally:
        comfy.model_management.in_training = False
    drawn = torch.tensor(draws)
    assert drawn.min() >= 0.97
    assert drawn.max() > 0.999
    assert (drawn[:-1] >= drawn[1:]).all()
    # The same share of draws either side of 0.985 as of the trainer's own that are inside.
    own = torch.tensor([original.percent_to_sigma(i / 20000) for i in range(20000)])
    own = own[own >= 0.97]
    assert (drawn > 0.985).float().mean() == pytest.approx(
        (own > 0.985).float().mean().item(), abs=0.02
    )


@pytest.mark.parametrize("kind", [pytest.param("flux", marks=pytest.mark.slow), "sd3"])
def test_the_loss_inside_the_window_falls(folder, apply_taca, window, kind):
    """And the LoRA, loaded by Load TACA LoRA, acts there and nowhere else (test_lora)."""
    model = window(apply_taca(tiny.load(folder, kind), 1.2, 900.0))
    _, losses = train(model, kind, steps=40, optimizer="AdamW", rate=3e-3, images=1)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


@pytest.mark.parametrize("kind", KINDS)
def test_trained_then_loaded(folder, apply_taca, window, pack, kind, tmp_path, monkeypatch):
    """The trainer's file, biases and norms too, is the model it trained, inside the window."""
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"})
    )
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    model = apply_taca(tiny.load(folder, kind), 1.2, 0.0)
    lora, _ = train(window(model), kind, steps=10, optimizer="AdamW", rate=0.02)
    assert any(key.endswith(".diff_b") for key in lora)
    assert any(key.endswith(".diff") for key in lora) == (kind == "flux")
    save_file(lora, tmp_path / "trained.safetensors")
    ours = pack["LoadTACALoRA"].execute(model, "trained.safetensors", 1.0).result[0]
    merged = comfy.sd.load_lora_for_models(model, None, dict(lora), 1.0, 0)[0]
    torch.testing.assert_close(sample(ours, kind), sample(merged, kind), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(sample(ours, kind), sample(model, kind), atol=0.05)


def test_without_taca_is_an_error(folder, window):
    with pytest.raises(ValueError, match="put the TACA node before it"):
        window(tiny.load(folder, "flux"))


def test_training_a_patched_model_without_the_window_is_an_error(folder, apply_taca):
    model = apply_taca(tiny.load(folder, "flux"))
    with pytest.raises(RuntimeError, match="TACA Training Window between"):
        train(model, "flux")


@pytest.mark.parametrize("kind", KINDS)
def test_model_sampling_behind_it_is_an_error(folder, apply_taca, window, kind):
    """Which would take the window away without a word."""
    model = window(apply_taca(tiny.load(folder, kind), 1.2, 999.0))
    if kind == "flux":
        model = ModelSamplingFlux().patch(model, 1.15, 0.5, 1024, 1024)[0]
    else:
        model = ModelSamplingSD3().patch(model, 3.0)[0]
    with pytest.raises(RuntimeError, match="put TACA Training Window last"):
        train(model, kind)


def test_a_window_without_timesteps_is_an_error(folder, apply_taca, window):
    with pytest.raises(ValueError, match="holds no timestep"):
        window(apply_taca(tiny.load(folder, "sd3"), 1.2, 1000.0))


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_is_as_before(folder, apply_taca, window, kind):
    patched = apply_taca(tiny.load(folder, kind))
    before = sample(patched, kind)
    assert torch.equal(sample(window(patched), kind), before)
    assert torch.equal(sample(patched, kind), before)
    comfy.model_management.unload_all_models()
    assert not left_of_ours(patched)


@pytest.mark.slow
def test_on_the_demo_model(apply_taca, window):
    """gamma 1.2 raises the demo model's loss inside the window; a LoRA trained there lowers it on
    pictures it never saw, and leaves the loss outside the window alone to the bit."""
    demo = load_pack(ROOT / "demo", "taca_demo_pack")
    path = ROOT / "demo" / "models" / "taca_demo_mmdit.safetensors"
    model = comfy.sd.load_diffusion_model(str(path))
    taca = apply_taca(model)
    latents, positive = demo.TACADemoDataset.execute(256, 0).result
    held_out, captions = demo.TACADemoDataset.execute(64, 99).result
    text = torch.cat([caption[0] for caption in captions])

    def loss(m, t):
        x0 = m.model.process_latent_in(held_out["samples"])
        sigma = torch.full((64,), t / 1000)
        noise = torch.randn(x0.shape, generator=torch.manual_seed(1))
        x = m.model.model_sampling.noise_scaling(sigma.view(-1, 1, 1, 1), noise, x0)
        options = {"wrappers": m.wrappers}
        m.pre_run()
        result = m.model.apply_model(
            x, sigma, c_crossattn=text, y=torch.zeros(64, 1), transformer_options=options
        )
        m.cleanup()
        return (result - x0).square().mean().item()

    lora, _ = train(
        window(taca),
        None,
        steps=60,
        accumulate=4,
        optimizer="AdamW",
        rate=5e-4,
        rank=16,
        data=([latents], [positive]),
    )
    trained = patch_lora(taca, fit_lora(lora, model.model, "trained", 1.0))
    for t in (999, 990, 980, 971):
        assert loss(trained, t) < 0.985 * loss(taca, t)
        assert loss(taca, t) > loss(model, t)
    for t in (960, 500):
        assert loss(trained, t) == loss(model, t)
