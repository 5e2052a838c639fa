"""TACA with context windows, ControlNets, masks, regions and areas: the same done densely."""

import contextlib
import re
from unittest import mock

import comfy.controlnet
import comfy.ldm.flux.math
import comfy.ops
import comfy.sd
import pytest
import torch
from comfy.ldm.modules.diffusionmodules import mmdit
from comfy.ldm.qwen_image.controlnet import QwenImageFunControlNetModel
from comfy.taesd.taesd import TAESD
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_sd3 import ControlNetApplySD3
from diffusers import FluxControlNetModel, SD3ControlNetModel
from safetensors.torch import save_file

import nodes
from support import families, tiny
from support.families import named
from support.family_runs import dense as dense_family
from support.family_runs import sample as sample_family
from support.loras import merged_by_core, random_lora
from support.reference import (
    SIZE,
    TEXT,
    dense,
    dense_in,
    dense_override,
)
from support.tiny import KINDS, installed_on, sample
from support.words import PROMPT, by_reference, dense_words, weighed

WINDOWS = {"context_stride": 1, "closed_loop": False, "fuse_method": "pyramid"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", ["standard_static", "looped_uniform"])
def test_context_windows_over_a_tall_picture(folder, apply_taca, kind, schedule):
    """Core samples parts of the latents by themselves; each has a length of its own."""
    model = tiny.load(folder, kind)
    settings = {"steps": 4, "text": (TEXT, TEXT), "size": (24, 8)}

    def windows(m):
        return ContextWindowsManualNode.execute(
            m,
            context_length=10,
            context_overlap=4,
            context_schedule=schedule,
            dim=2,
            freenoise=True,
            **WINDOWS,
        ).result[0]

    # Ten rows or, with the frame in front that newer cores add, eleven: five or six of tokens.
    expected = sample(windows(dense_in(model, [TEXT + 20, TEXT + 24])), kind, **settings)
    plain = sample(windows(model), kind, **settings)
    assert (plain - expected).abs().max() > 0.1
    assert (plain - sample(model, kind, **settings)).abs().max() > 0.1
    for ours in (windows(apply_taca(model, 1.4, 0.0)), apply_taca(windows(model), 1.4, 0.0)):
        torch.testing.assert_close(sample(ours, kind, **settings), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("case", named("HunyuanVideo"), ids=str)
def test_context_windows_over_frames(case, folder, apply_taca, monkeypatch):
    model = families.load(case, folder, monkeypatch)
    frames, text = 6, case.text[0]
    monkeypatch.setattr(
        families, "empty", lambda *case: {"samples": torch.zeros(1, 16, frames, 8, 6)}
    )

    def windows(m):
        return ContextWindowsManualNode.execute(
            m,
            context_length=3,
            context_overlap=1,
            context_schedule="standard_static",
            dim=2,
            freenoise=False,
            **WINDOWS,
        ).result[0]

    lengths = [text + 12 * n for n in range(1, frames + 1)]
    expected = sample_family(windows(dense_in(model, lengths, text=text)), case, steps=3)
    plain = sample_family(windows(model), case, steps=3)
    effect = (plain - expected).abs().max()
    assert (plain - sample_family(model, case, steps=3)).abs().max() > 1e-2
    for ours in (windows(apply_taca(model, 1.4, 0.0)), apply_taca(windows(model), 1.4, 0.0)):
        assert (sample_family(ours, case, steps=3) - expected).abs().max() < 2e-3 * effect


def small_vae():
    codec = families.seeded(TAESD(latent_channels=16), 0)
    return comfy.sd.VAE(sd=codec | {"vae_scale": torch.tensor(1.0)})


CONTROLNETS = {
    "sd3": lambda: SD3ControlNetModel(
        sample_size=32,
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=48,
        caption_projection_dim=128,
        pooled_projection_dim=32,
        pos_embed_max_size=32,
    ),
    "flux": lambda: FluxControlNetModel(
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=128,
        num_attention_heads=1,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        guidance_embeds=True,
    ),
}


def xlabs_controlnet():
    """In XLabs' layout: FLUX's two-stream blocks, and a picture that is read by convolutions."""
    state = {
        name: tensor
        for name, tensor in tiny.weights("flux", seed=3).items()
        if not name.startswith(("single_blocks", "final_layer"))
    }
    more = torch.nn.ModuleDict(
        {
            "controlnet_blocks": torch.nn.ModuleList(torch.nn.Linear(128, 128) for _ in range(2)),
            "pos_embed_input": torch.nn.Linear(64, 128),
            "input_hint_block": torch.nn.Sequential(
                *(
                    each
                    for i in range(8)
                    for each in (torch.nn.Conv2d(16 if i else 3, 16, 3), torch.nn.SiLU())
                )
            ),
        }
    )
    return state | families.seeded(more, 4)


@pytest.mark.parametrize(
    ("kind", "layout"), [("flux", "InstantX"), ("flux", "XLabs"), ("sd3", "InstantX")]
)
def test_a_controlnet(folder, apply_taca, kind, layout, tmp_path):
    """From a file of its published layout, on both prompts: what it adds goes through as it is,
    and its own attention over text and image is not adjusted."""
    save_file(
        xlabs_controlnet() if layout == "XLabs" else families.seeded(CONTROLNETS[kind](), 3),
        tmp_path / "control.safetensors",
    )
    control = comfy.controlnet.load_controlnet(str(tmp_path / "control.safetensors"))
    model, seen = tiny.load(folder, kind), set()
    positive, negative = (tiny.conditioning(kind, TEXT, seed=s) for s in (1, 5))
    picture = torch.rand(1, 128, 128, 3, generator=torch.manual_seed(0))
    # Half of the run, so that steps with it and without follow each other.
    given = {
        "control_net": control,
        "image": picture,
        "strength": 0.7,
        "start_percent": 0.0,
        "end_percent": 0.5,
        "positive": positive,
        "negative": negative,
    }
    if layout == "XLabs":
        hinted = nodes.ControlNetApplyAdvanced().apply_controlnet(**given)
    else:
        hinted = ControlNetApplySD3.execute(**given, vae=small_vae()).result

    def drawn(m, conditions=hinted):
        return nodes.common_ksampler(
            m, 3, 4, 3.0, "euler", "simple", *conditions, {"samples": torch.zeros(1, 16, *SIZE)}
        )[0]["samples"]

    for name, block in control.control_model.named_modules():
        if re.fullmatch(r"\w+_blocks\.\d", name):
            block.register_forward_pre_hook(
                lambda block, *_: seen.add((type(block).__name__, "forward" in vars(block)))
            )
    plain, expected, ours = map(drawn, (model, dense(model), apply_taca(model, 1.4, 0.0)))
    torch.testing.assert_close(ours, expected, atol=2e-3, rtol=2e-3)
    assert (plain - expected).abs().max() > 0.1
    assert (plain - drawn(model, (positive, negative))).abs().max() > 0.1
    assert seen
    assert not any(installed for _, installed in seen)
    with adjusted(control.control_model):
        assert (drawn(dense(model)) - expected).abs().max() > 0.01
    override = dense_words({TEXT: [1.0] * TEXT, (TEXT, 0): PROMPT})
    expected = drawn(by_reference(model, override))
    assert (plain - expected).abs().max() > 0.05
    ours = drawn(model, (weighed(hinted[0], PROMPT), hinted[1]))
    torch.testing.assert_close(ours, expected, atol=2e-3, rtol=2e-3)
    assert not installed_on(model)
    # What is to be avoided is behind the text, and not shown to the ControlNet.
    lengths = []

    def seen_text(module, args, kwargs):
        lengths.append(kwargs["context"].shape[1])

    hook = control.control_model.register_forward_pre_hook(seen_text, with_kwargs=True)
    own, avoided = hinted[0][0], tiny.conditioning(kind, 3, seed=8)[0][0]
    weights = [*PROMPT, -1.5, -1.5, -1.5]
    longer = [[torch.cat([own[0], avoided], 1), own[1]]]
    theirs = [[longer[0][0], {**own[1], "cross_attn_controlnet": own[0]}]]
    override = dense_words({TEXT: [1.0] * TEXT, TEXT + 3: weights}, num_avoided=3)
    expected = drawn(by_reference(model, override), (theirs, hinted[1]))
    ours = drawn(model, (weighed(longer, weights, num_avoided=3), hinted[1]))
    hook.remove()
    torch.testing.assert_close(ours, expected, atol=2e-3, rtol=2e-3)
    assert {*lengths} == {TEXT}


def test_a_controlnet_that_comfyui_adds_to_the_negative(folder, tmp_path):
    """Apply ControlNet (OLD) takes the positive alone: what the negative is to avoid is hidden."""
    save_file(xlabs_controlnet(), tmp_path / "control.safetensors")
    control = comfy.controlnet.load_controlnet(str(tmp_path / "control.safetensors"))
    model, lengths = tiny.load(folder, "flux"), []
    picture = torch.rand(1, 128, 128, 3, generator=torch.manual_seed(0))
    prompt = tiny.conditioning("flux", TEXT)
    [positive] = nodes.ControlNetApply().apply_controlnet(prompt, control, picture, 0.7)
    weights = [1.0] * TEXT + [-1.5] * 3
    negative = weighed(tiny.conditioning("flux", TEXT + 3), weights, num_avoided=3)

    def seen_text(module, args, kwargs):
        lengths.append(kwargs["context"].shape[1])

    control.control_model.register_forward_pre_hook(seen_text, with_kwargs=True)
    latents = {"samples": torch.zeros(1, 16, *SIZE)}
    nodes.common_ksampler(model, 3, 1, 3.0, "euler", "simple", positive, negative, latents)
    assert lengths == [TEXT] * 2


@pytest.mark.parametrize("algorithm", ["lora", "norms"])
def test_a_controlnet_that_runs_layers_of_the_model(
    folder, apply_taca, load_lora, monkeypatch, tmp_path, algorithm
):
    """Qwen-Image Fun's has the model embed picture and text, before the model's call: a TACA LoRA
    acts there inside the window, as core's merge, and nowhere else."""
    case = next(iter(named("Qwen-Image")))
    model = families.load(case, folder, monkeypatch)
    sizes = {"inner_dim": 64, "num_attention_heads": 2, "attention_head_dim": 32}
    network = QwenImageFunControlNetModel(**sizes, operations=comfy.ops.disable_weight_init)
    save_file(families.seeded(network, 3), tmp_path / "fun.safetensors")
    control = comfy.controlnet.load_controlnet(str(tmp_path / "fun.safetensors"))
    latents = torch.randn(1, 16, 1, 8, 6, generator=torch.manual_seed(1))
    vae = mock.Mock(spacial_compression_encode=lambda: 8, encode=lambda pixels: latents)
    positive, negative = nodes.ControlNetApplyAdvanced().apply_controlnet(
        *(families.conditioning(case, seed=seed) for seed in (1, 5)),
        control,
        torch.rand(1, 64, 48, 3, generator=torch.manual_seed(0)),
        *(0.5, 0.0, 1.0, vae),
    )
    lora = random_lora(model, algorithm)

    def drawn(m, start=0, end=4, latent=None):
        part = {"start_step": start, "last_step": end, "disable_noise": start > 0}
        settings = 3, 4, 3.0, "euler", "simple", positive, negative
        latent = latent or families.empty(case, 2)
        return nodes.common_ksampler(m, *settings, latent, **part)[0]

    expected = drawn(dense_family(merged_by_core(model, lora), case, 1.4))["samples"]
    without = drawn(dense_family(model, case, 1.4))["samples"]
    assert (without - expected).abs().max() > 1
    ours = drawn(load_lora(apply_taca(model, 1.4, 0.0), lora))["samples"]
    torch.testing.assert_close(ours, expected, atol=2e-3, rtol=2e-3)
    # Two steps inside the window, at t = 1000 and 905, and two behind it.
    expected = drawn(model, start=2, latent=drawn(merged_by_core(model, lora), end=2))["samples"]
    ours = drawn(load_lora(apply_taca(model, 1.0, 800.0), lora))["samples"]
    torch.testing.assert_close(ours, expected, atol=2e-3, rtol=2e-3)
    assert not installed_on(model)
    assert "get_control" not in vars(control)


@contextlib.contextmanager
def adjusted(control_model):
    """A ControlNet whose own joint attention has Eq. 10 too, which TACA does not do."""
    forward = control_model.forward
    override = dense_override(1.4, TEXT, TEXT + 64)

    def attend(q, *args, **kwargs):
        return override(None, q, *args, **kwargs).to(q.dtype)

    def adjusted_forward(*args, **kwargs):
        with (
            mock.patch.multiple(comfy.ldm.flux.math, optimized_attention=attend),
            mock.patch.multiple(mmdit, optimized_attention=attend),
        ):
            return forward(*args, **kwargs)

    with mock.patch.object(control_model, "forward", adjusted_forward):
        yield


@pytest.mark.parametrize(
    ("kind", "noise_mask"),
    [("flux-fill", True), ("flux-fill", False), ("flux", True), ("sd3", True)],
)
def test_inpainting(folder, apply_taca, kind, noise_mask):
    """InpaintModelConditioning: FLUX Fill is given picture and mask in 320 channels more; the
    others, only what to keep."""
    model, vae = tiny.load(folder, kind), small_vae()
    pixels = torch.rand(1, 128, 128, 3, generator=torch.manual_seed(0))
    mask = torch.zeros(1, 128, 128)
    mask[:, 32:, :80] = 1.0
    positive, negative, latent = nodes.InpaintModelConditioning().encode(
        tiny.conditioning(kind, TEXT),
        tiny.conditioning(kind, TEXT, seed=5),
        pixels,
        vae,
        mask,
        noise_mask,
    )

    def inpaint(m):
        return nodes.common_ksampler(m, 3, 4, 3.0, "euler", "simple", positive, negative, latent)[
            0
        ]["samples"]

    plain, expected, ours = map(inpaint, (model, dense(model), apply_taca(model, 1.4, 0.0)))
    torch.testing.assert_close(ours, expected, atol=2e-3, rtol=2e-3)
    changed = (plain - expected).abs().amax((0, 1)) > 0.01
    assert changed[6:, :8].all()
    assert changed[:2].any() != noise_mask  # above the mask, where all is kept


@pytest.mark.parametrize("kind", KINDS)
def test_regional_prompts(folder, apply_taca, kind):
    """Two positive prompts, each in its half of the picture, and one for some of the steps."""
    model = tiny.load(folder, kind)
    left, right = (torch.zeros(1, *SIZE) for _ in range(2))
    left[:, :, :8], right[:, :, 8:] = 1.0, 1.0
    positive = [
        *nodes.ConditioningSetMask().append(tiny.conditioning(kind, TEXT), left, "default", 1.0)[0],
        *nodes.ConditioningSetMask().append(
            tiny.conditioning(kind, TEXT, seed=8), right, "default", 1.0
        )[0],
        *nodes.ConditioningSetTimestepRange().set_range(
            tiny.conditioning(kind, TEXT, seed=9), 0.0, 0.4
        )[0],
    ]
    settings = {"steps": 4, "text": (TEXT, TEXT), "positive": positive}
    expected = sample(dense(model), kind, **settings)
    ours = sample(apply_taca(model, 1.4, 0.0), kind, **settings)
    torch.testing.assert_close(ours, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_conditioning_areas(folder, apply_taca, kind):
    """A prompt for a part of the picture: its calls are of that part's size."""
    model = tiny.load(folder, kind)
    area = nodes.ConditioningSetArea().append(
        tiny.conditioning(kind, 9, seed=8), 64, 64, 32, 32, 1.0
    )[0]
    positive = [*tiny.conditioning(kind, TEXT), *area]
    settings = {"steps": 3, "text": (TEXT, TEXT), "positive": positive, "cfg": 1.0}
    ours = sample(apply_taca(model, 1.4, 0.0), kind, **settings)
    small, large = dense(model, text=9, size=(8, 8)), dense(model)
    overrides = [
        m.model_options["transformer_options"]["optimized_attention_override"]
        for m in (small, large)
    ]
    both = model.clone()

    def override(func, q, k, v, heads, **kwargs):
        length = q.shape[2 if kwargs.get("skip_reshape") else 1]
        return overrides[length != 9 + 16](func, q, k, v, heads, **kwargs)

    both.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = (
        override
    )
    torch.testing.assert_close(ours, sample(both, kind, **settings), atol=2e-3, rtol=2e-3)
