"""Load TACA LoRA on every family: what core merges, inside the window."""

import comfy.samplers
import comfy.sd
import pytest
import torch
from safetensors.torch import save_file

from support import families
from support.families import exists, named
from support.family_runs import sample
from support.loras import random_lora


def test_equals_the_merged_lora(case, folder, pack, apply_taca, loras, monkeypatch):
    """On every linear layer and norm of the model, in the keys that core's own trainer writes."""
    if "HiDream-O1" in case.name or "Qwen-Image 2.1" in case.name:
        pytest.skip(f"{case.name}: refused, for the LoRA would stay in the keys that core keeps")
    model = families.load(case, folder, monkeypatch)
    state = random_lora(model, rank=2)
    # MiniMax-H3 refines the text before the run, where no window is.
    state = {
        k: v
        for k, v in state.items()
        if v.ndim < 3 and not ("MiniMax" in case.name and ("refiner" in k or "condition_proj" in k))
    }
    if "MiniMax" not in case.name:  # whose norms of queries and keys no LoRA of the window reaches
        state |= random_lora(model, "norms")
    save_file(state, loras / "lora.safetensors")
    ours = pack["LoadTACALoRA"].execute(apply_taca(model, 1.0), "lora.safetensors", 0.5).result[0]
    plain, result = sample(model, case), sample(ours, case)
    assert torch.equal(sample(model, case), plain)  # which core's own merge does not always give
    merged = comfy.sd.load_lora_for_models(model, None, dict(state), 0.5, 0)[0]
    expected = sample(merged, case)
    effect = (expected - plain).abs().max()
    assert effect > 1e-4
    assert (result - expected).abs().max() < 5e-3 * effect


@pytest.mark.parametrize("case", named("HiDream-I1"), ids=str, indirect=True)
@pytest.mark.parametrize("algorithm", ["lora", "LoHa", "LoKr", "GLoRA"])
def test_an_expert_without_a_token(case, folder, pack, apply_taca, loras, monkeypatch, algorithm):
    """HiDream-I1 asks some experts about no token, and core merges into them all the same."""
    model = families.load(case, folder, monkeypatch)
    asked = []
    for name, module in model.model.named_modules():
        if name.endswith(".gate"):

            def gate(x, forward=module.forward):
                chosen, *others = forward(x)
                asked.append(chosen)
                return torch.zeros_like(chosen), *others

            monkeypatch.setattr(module, "forward", gate)
    state = random_lora(model, algorithm, rank=2, only="experts")
    save_file(state, loras / "lora.safetensors")
    ours = pack["LoadTACALoRA"].execute(apply_taca(model, 1.0, 0.0), "lora.safetensors", 0.5)
    merged = comfy.sd.load_lora_for_models(model, None, dict(state), 0.5, 0)[0]
    expected, result = (sample(m, case) for m in (merged, ours.result[0]))
    assert asked
    torch.testing.assert_close(result, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("wide", [True, False])
def test_what_runs_before_the_run_is_told(
    folder, pack, apply_taca, loras, monkeypatch, caplog, wide
):
    """MiniMax-H3's text is refined once: a LoRA's part there does nothing, and the log says so."""
    [video] = named("MiniMax-H3")
    if not exists(video):
        pytest.skip("this ComfyUI has no MiniMax-H3")
    model = families.load(video, folder, monkeypatch)
    state = random_lora(model, rank=2, only="" if wide else "diffusion_model.blocks")
    save_file({k: v for k, v in state.items() if v.ndim < 3}, loras / "lora.safetensors")
    pack["LoadTACALoRA"].execute(apply_taca(model, 1.0), "lora.safetensors", 0.5)
    told = [r.message for r in caplog.records if "have no effect" in r.message]
    assert len(told) == wide
    assert not wide or "MiniMax-H3" in told[0]
    assert not wide or "lora.safetensors" in told[0]
    caplog.clear()
    norms = random_lora(model, "norms", only="blocks.0")
    norms = {k: v for k, v in norms.items() if "refiner" not in k and "blocks.0." in k}
    save_file(norms, loras / "norms.safetensors")
    pack["LoadTACALoRA"].execute(apply_taca(model, 1.0), "norms.safetensors", 0.5)
    assert f"2 of the {len(norms)} modules" in caplog.text


@pytest.mark.parametrize("case", named("HiDream-O1"), ids=str, indirect=True)
def test_a_lora_that_would_stay_is_refused(case, folder, pack, apply_taca, loras, monkeypatch):
    """HiDream-O1's keys of its text are kept, and a LoRA of the window would be in them."""
    model = families.load(case, folder, monkeypatch)
    save_file(random_lora(model, rank=2), loras / "lora.safetensors")
    with pytest.raises(ValueError, match=r"LoRA .* on HiDream-O1, since ComfyUI caches"):
        pack["LoadTACALoRA"].execute(apply_taca(model), "lora.safetensors", 0.5)


@pytest.mark.parametrize("case", named("Lumina 2", "Z-Image", "Qwen-Image"), ids=str)
@pytest.mark.parametrize("gamma", [1.0, 1.5])
def test_rows_of_which_some_are_inside(case, folder, apply_taca, load_lora, monkeypatch, gamma):
    """A sampler with a sigma for each row: as if each were alone, norms in fused kernels too."""
    model = families.load(case, folder, monkeypatch)
    state = random_lora(model, rank=2) | random_lora(model, "norms")
    text, noise = families.conditioning(case), torch.randn(3, *case.latent)

    def rows(model, x, sigmas, extra_args, **kwargs):
        return model(x, sigmas[0] * torch.tensor([0.95, 0.5, 0.99]), **extra_args)

    def drawn(m):
        guider = comfy.samplers.CFGGuider(m)
        guider.set_conds(text, text)
        sampler = comfy.samplers.KSAMPLER(rows)
        return guider.sample(noise, torch.zeros_like(noise), sampler, torch.tensor([1.0, 0.0]))

    plain, inside, some = (
        drawn(m)
        for m in (
            model,
            load_lora(apply_taca(model, gamma, 0.0), state),
            load_lora(apply_taca(model, gamma, 900.0), state),
        )
    )
    effect = (plain - inside).abs().amax((1, *range(2, plain.ndim)))
    assert (effect > 1e-3).all()
    assert (some[[0, 2]] - inside[[0, 2]]).abs().max() < 2e-3 * effect.max()
    assert (some[1] - plain[1]).abs().max() < 2e-3 * effect.max()
