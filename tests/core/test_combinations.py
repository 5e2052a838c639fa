"""TACA beside what users combine it with: each equals the same combination done densely."""

import contextlib
import gc
import re
import sys
from functools import partial
from unittest import mock

import comfy.controlnet
import comfy.hooks
import comfy.ldm.flux.math
import comfy.samplers
import comfy.sd
import comfy.utils
import folder_paths
import pytest
import tiny
import torch
from comfy.ldm.flux.layers import timestep_embedding
from comfy.ldm.modules.diffusionmodules import mmdit
from comfy.patcher_extension import WrappersMP
from comfy.taesd.taesd import TAESD
from comfy_extras.nodes_apg import APG
from comfy_extras.nodes_cfg import CFGNorm, CFGZeroStar
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_edit_model import ReferenceLatent
from comfy_extras.nodes_mahiro import Mahiro
from comfy_extras.nodes_model_merging import ModelMergeSimple, ModelSave
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_sd3 import ControlNetApplySD3
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
from comfy_extras.nodes_tcfg import TCFG
from diffusers import FluxControlNetModel, SD3ControlNetModel
from reference import dense_attention, dense_override, image_tokens
from safetensors.torch import load_file, save_file
from test_families import dense as dense_family
from test_families import families, named
from test_families import sample as sample_family
from test_lora import random_lora
from test_model import KINDS, installed_on, sample

try:
    from comfy_extras.nodes_nag import NAGuidance
except ImportError:  # not in every ComfyUI
    NAGuidance = None
try:
    from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
except ImportError:
    EasyCacheNode = LazyCacheNode = None

import nodes

TEXT, SIZE = 7, (16, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def dense(model, gamma=1.4, text=TEXT, size=SIZE, more=0, threshold=0.0, calls=None):
    """The model with Eq. 10 in dense float64, in all calls at t >= threshold."""
    lengths = [text + image_tokens(torch.empty(1, 16, *size)) + more]
    return dense_in(model, lengths, gamma, text, threshold, calls)


def dense_in(model, lengths, gamma=1.4, text=TEXT, threshold=0.0, calls=None):
    """The same in attention of several lengths; ``calls`` gets t of each call."""

    def override(func, q, k, v, heads, **kwargs):
        length = k.shape[2 if kwargs.get("skip_reshape") else 1]
        t = 1000 * float(kwargs["transformer_options"]["sigmas"][0])
        if calls is not None and t not in calls[-1:]:
            calls.append(t)
        adjusted = length in lengths and t >= threshold
        inner = dense_override(gamma if adjusted else 1.0, text, length)
        return inner(func, q, k, v, heads, **kwargs).to(q.dtype)

    return attending(model, override)


def attending(model, override):
    """The model with an attention override in ComfyUI's one slot, for good."""
    model = model.clone()
    options = model.model_options.setdefault("transformer_options", {})
    options["optimized_attention_override"] = override
    return model


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
    ("PAG", "flux"), ("PAG", "sd3"),  # it perturbs a UNet's attn1
    ("NAG", "sd3"),  # it patches what attn1 puts out, which MMDiT does not ask for
    ("EasyCache", "sd3"),  # it wraps DIFFUSION_MODEL, of which MMDiT has none
}  # fmt: skip
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


def skips(model):
    """A cache by a DIFFUSION_MODEL wrapper: every second call is answered from the one before."""
    model, kept = model.clone(), []

    def cached(executor, x, *args, **kwargs):
        if kept:
            return x + kept.pop()
        y = executor(x, *args, **kwargs)
        kept.append(y - x)
        return y

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "cache", cached)
    return model


def around(model, patches, calls=99):
    """As older packs do: attributes of the model are others for the length of its first calls."""
    model, left = model.clone(), [calls]

    def call(function, args):
        left[0] -= 1
        theirs = mock.patch.multiple(model.model.diffusion_model, **patches)
        with theirs if left[0] >= 0 else contextlib.nullcontext():
            return function(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(call)
    return model


def own_forward(model, hands_options=False):
    """As TeaCache: FLUX's forward written anew, without options for its blocks, and their sum
    kept: every second call is answered from the one before."""
    flux, kept = model.model.diffusion_model, []

    def forward(img, img_ids, txt, txt_ids, timesteps, y, guidance=None, control=None,
                transformer_options=None, attn_mask=None, **kwargs):  # fmt: skip
        img, txt = flux.img_in(img), flux.txt_in(txt)
        vec = flux.time_in(timestep_embedding(timesteps, 256)) + flux.vector_in(y)
        vec = vec + flux.guidance_in(timestep_embedding(guidance, 256))
        more = {"vec": vec, "pe": flux.pe_embedder(torch.cat((txt_ids, img_ids), 1))}
        if hands_options:
            more["transformer_options"] = transformer_options
        if kept:
            return flux.final_layer(img + kept.pop(), vec)
        before, tokens = img, txt.shape[1]
        for block in flux.double_blocks:
            img, txt = block(img=img, txt=txt, **more)
        both = torch.cat((txt, img), 1)
        for block in flux.single_blocks:
            both = block(both, **more)
        kept.append(both[:, tokens:] - before)
        return flux.final_layer(both[:, tokens:], vec)

    return around(model, {"forward_orig": forward})


class FirstBlock(torch.nn.Module):
    """As first-block caches: one block that stands for all, and may leave out all but the first."""

    def __init__(self, double, single=()):
        super().__init__()
        self.double, self.single, self.kept = double, single, []

    def forward(self, *streams, img=None, txt=None, **kwargs):
        if streams:  # SD3's
            txt, img = streams
            txt, img = self.double[0](txt, img, **kwargs)
        else:
            img, txt = self.double[0](img=img, txt=txt, **kwargs)
        first = img
        if self.kept:
            img = first + self.kept.pop()
            return (txt, img) if streams else (img, txt)
        for block in self.double[1:]:
            if streams:
                txt, img = block(txt, img, **kwargs)
            else:
                img, txt = block(img=img, txt=txt, **kwargs)
        if self.single:
            both = torch.cat((txt, img), 1)
            for block in self.single:
                both = block(both, **kwargs)
            txt, img = both[:, : txt.shape[1]], both[:, txt.shape[1] :]
        self.kept.append(img - first)
        return (txt, img) if streams else (img, txt)


def first_block(model, calls=99):
    transformer = model.model.diffusion_model
    if hasattr(transformer, "joint_blocks"):
        one = FirstBlock(list(transformer.joint_blocks))
        return around(model, {"joint_blocks": torch.nn.ModuleList([one])}, calls)
    one = FirstBlock(list(transformer.double_blocks), list(transformer.single_blocks))
    lists = {"double_blocks": [one], "single_blocks": []}
    lists = {name: torch.nn.ModuleList(each) for name, each in lists.items()}
    return around(model, lists, calls)


CACHES = {
    "wrapper": ("flux", skips, skips),
    "forward": ("flux", own_forward, lambda model: own_forward(model, hands_options=True)),
    "first block of FLUX": ("flux", first_block, first_block),
    "first block of SD3": ("sd3", first_block, first_block),
    "first block, then none": ("flux", *(lambda model: first_block(model, 4),) * 2),
}


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("ours_first", [True, False])
def test_a_cache(folder, apply_taca, name, ours_first):
    """As the packs of caches do it: what they compute has gamma, what they leave out has none."""
    kind, cache, dense_cache = CACHES[name]
    model = tiny.load(folder, kind)
    settings = {"steps": 6, "text": (TEXT, TEXT)}
    expected = sample(dense_cache(dense(model)), kind, **settings)
    ours = cache(apply_taca(model, 1.4, 0.0)) if ours_first else apply_taca(cache(model), 1.4, 0.0)
    torch.testing.assert_close(sample(ours, kind, **settings), expected, atol=2e-3, rtol=2e-3)
    plain = sample(cache(model), kind, **settings)
    assert (plain - expected).abs().max() > 0.1
    assert (plain - sample(model, kind, **settings)).abs().max() > 0.1, "the cache left out calls"
    assert not installed_on(model)


def test_a_cache_that_hides_the_chosen_blocks(folder, pack):
    """A first-block cache and TACA Options' blocks: an error, not another choice of blocks."""
    model = tiny.load(folder, "flux")
    options = pack["TACAOptions"].execute(False, "double 1").result[0]
    ours = pack["TACAPatchModel"].execute(model, 1.4, 0.0, None, options).result[0]
    with pytest.raises(ValueError, match=r"'double 1' is not within .* double 0-0\. A cache"):
        sample(first_block(ours), "flux", steps=2)
    assert not installed_on(model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_that_hides_the_modules_of_a_lora(folder, apply_taca, kind):
    """A first-block cache and Load TACA LoRA: an error that names both, and nothing left behind."""
    model = tiny.load(folder, kind)
    taca = apply_taca(model, 1.4, 0.0)
    lora = sys.modules["taca_pack.taca.lora_file"].fit_lora(
        random_lora(model, only="blocks"), taca.model, "lora", 1.0
    )
    patch_lora = sys.modules["taca_pack.taca.patch"].patch_lora
    with pytest.raises(RuntimeError, match=r"Load TACA LoRA does not find .* cache"):
        sample(first_block(patch_lora(taca, lora)), kind, steps=2)
    assert not installed_on(model)


WINDOWS = {"context_stride": 1, "closed_loop": False, "fuse_method": "pyramid"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", ["standard_static", "looped_uniform"])
def test_context_windows_over_a_tall_picture(folder, apply_taca, kind, schedule):
    """Core samples parts of the latents by themselves; each has a length of its own."""
    model = tiny.load(folder, kind)
    settings = {"steps": 4, "text": (TEXT, TEXT), "size": (24, 8)}

    def windows(m):
        return ContextWindowsManualNode.execute(
            m, context_length=10, context_overlap=4, context_schedule=schedule, dim=2,
            freenoise=True, **WINDOWS,
        ).result[0]  # fmt: skip

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
            m, context_length=3, context_overlap=1, context_schedule="standard_static", dim=2,
            freenoise=False, **WINDOWS,
        ).result[0]  # fmt: skip

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
        sample_size=32, num_layers=2, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=48, caption_projection_dim=128, pooled_projection_dim=32,
        pos_embed_max_size=32,
    ),
    "flux": lambda: FluxControlNetModel(
        num_layers=2, num_single_layers=2, attention_head_dim=128, num_attention_heads=1,
        joint_attention_dim=64, pooled_projection_dim=32, guidance_embeds=True,
    ),
}  # fmt: skip


def xlabs_controlnet():
    """In XLabs' layout: FLUX's two-stream blocks, and a picture that is read by convolutions."""
    state = {
        name: tensor
        for name, tensor in tiny.weights("flux", seed=3).items()
        if not name.startswith(("single_blocks", "final_layer"))
    }
    more = torch.nn.ModuleDict({
        "controlnet_blocks": torch.nn.ModuleList(torch.nn.Linear(128, 128) for _ in range(2)),
        "pos_embed_input": torch.nn.Linear(64, 128),
        "input_hint_block": torch.nn.Sequential(
            *(each for i in range(8) for each in (
                torch.nn.Conv2d(16 if i else 3, 16, 3), torch.nn.SiLU()))
        ),
    })  # fmt: skip
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
    given = {"control_net": control, "image": picture, "strength": 0.7, "start_percent": 0.0,
             "end_percent": 0.5, "positive": positive, "negative": negative}  # fmt: skip
    if layout == "XLabs":
        hinted = nodes.ControlNetApplyAdvanced().apply_controlnet(**given)
    else:
        hinted = ControlNetApplySD3.execute(**given, vae=small_vae()).result

    def drawn(m, conditions=hinted):
        return nodes.common_ksampler(
            m, 3, 4, 3.0, "euler", "simple", *conditions, {"samples": torch.zeros(1, 16, *SIZE)}
        )[0]["samples"]  # fmt: skip

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
    assert not installed_on(model)


@contextlib.contextmanager
def adjusted(control_model):
    """A ControlNet whose own joint attention has Eq. 10 too, which TACA does not do."""
    forward = control_model.forward
    override = dense_override(1.4, TEXT, TEXT + 64)

    def attend(q, *args, **kwargs):
        return override(None, q, *args, **kwargs).to(q.dtype)

    def adjusted_forward(*args, **kwargs):
        with mock.patch.multiple(comfy.ldm.flux.math, optimized_attention=attend), \
             mock.patch.multiple(mmdit, optimized_attention=attend):  # fmt: skip
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
        tiny.conditioning(kind, TEXT), tiny.conditioning(kind, TEXT, seed=5), pixels, vae, mask,
        noise_mask,
    )  # fmt: skip

    def inpaint(m):
        return nodes.common_ksampler(
            m, 3, 4, 3.0, "euler", "simple", positive, negative, latent
        )[0]["samples"]  # fmt: skip

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
        *nodes.ConditioningSetMask().append(
            tiny.conditioning(kind, TEXT), left, "default", 1.0)[0],
        *nodes.ConditioningSetMask().append(
            tiny.conditioning(kind, TEXT, seed=8), right, "default", 1.0)[0],
        *nodes.ConditioningSetTimestepRange().set_range(
            tiny.conditioning(kind, TEXT, seed=9), 0.0, 0.4)[0],
    ]  # fmt: skip
    settings = {"steps": 4, "text": (TEXT, TEXT), "positive": positive}
    expected = sample(dense(model), kind, **settings)
    ours = sample(apply_taca(model, 1.4, 0.0), kind, **settings)
    torch.testing.assert_close(ours, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_conditioning_areas(folder, apply_taca, kind):
    """A prompt for a part of the picture: its calls are of that part's size."""
    model = tiny.load(folder, kind)
    area = nodes.ConditioningSetArea().append(
        tiny.conditioning(kind, 9, seed=8), 64, 64, 32, 32, 1.0)[0]  # fmt: skip
    positive = [*tiny.conditioning(kind, TEXT), *area]
    settings = {"steps": 3, "text": (TEXT, TEXT), "positive": positive, "cfg": 1.0}
    ours = sample(apply_taca(model, 1.4, 0.0), kind, **settings)
    small, large = dense(model, text=9, size=(8, 8)), dense(model)
    overrides = [m.model_options["transformer_options"]["optimized_attention_override"]
                 for m in (small, large)]  # fmt: skip
    both = model.clone()

    def override(func, q, k, v, heads, **kwargs):
        length = q.shape[2 if kwargs.get("skip_reshape") else 1]
        return overrides[length != 9 + 16](func, q, k, v, heads, **kwargs)

    both.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = (
        override
    )
    torch.testing.assert_close(ours, sample(both, kind, **settings), atol=2e-3, rtol=2e-3)


def hooked(conditioning, lora):
    """A prompt with core's keyframed LoRA: on in the first half of the sampling."""
    hook = comfy.hooks.create_hook_lora(lora=dict(lora), strength_model=1.0, strength_clip=0.0)
    keyframes = comfy.hooks.HookKeyframeGroup()
    for strength, start in ((1.0, 0.0), (0.0, 0.5)):
        keyframes.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
    hook.set_keyframes_on_hooks(keyframes)
    return comfy.hooks.set_hooks_for_conditioning(conditioning, hook)


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
    fit, add = (sys.modules[f"taca_pack.taca.{module}"] for module in ("lora_file", "patch"))
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
    ["heun", "dpmpp_2s_ancestral", "res_multistep", "dpmpp_sde", "uni_pc", "euler_ancestral",
     "dpmpp_2m"],
)  # fmt: skip
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
            m, 3, 6, 1.0, "euler", "simple", tiny.conditioning(kind, TEXT),
            tiny.conditioning(kind, TEXT), {"samples": tiny.latent(16, 16)}, denoise=denoise,
        )[0]["samples"]  # fmt: skip

    plain, expected, ours = map(drawn, (
        model, dense(model, threshold=threshold, calls=calls), apply_taca(model, 1.4, threshold)
    ))  # fmt: skip
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
            combine(model, case), combine(dense_family(model, case, 1.4), case),
            combine(taca, case), apply_taca(combine(model, case), 1.4, 0.0),
        )
    )  # fmt: skip
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
            m, 3, 20, 1.0, "euler", "simple", tiny.conditioning("flux", TEXT),
            tiny.conditioning("flux", TEXT), start, denoise=denoise,
        )[0]["samples"]
        for m in (model, apply_taca(model, 1.4))
    ]  # fmt: skip
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
    """Fifty runs of five settings in random order: each as in its first, and no memory kept."""
    model = tiny.load(folder, "flux")
    kinds = [
        model, apply_taca(model), apply_taca(model, 1.6, 900.0),
        SkipLayerGuidanceDiT.execute(apply_taca(model), 3.0, 0.0, 1.0, "1", "0").result[0],
        residual(apply_taca(model, 0.8, 0.0), "flux"),
    ]  # fmt: skip
    expected = [sample(m, "flux", steps=3) for m in kinds]
    gc.collect()
    holders = sys.getrefcount(model.model)
    order = torch.randint(5, (50,), generator=torch.manual_seed(0)).tolist()
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
    fit_lora = sys.modules["taca_pack.taca.lora_file"].fit_lora
    lora = fit_lora(random_lora(model, rank=2), model.model, "lora", 1.0)
    with pytest.raises(RuntimeError, match="Flux KV Cache keeps keys"):
        sample_family(sys.modules["taca_pack.taca.patch"].patch_lora(ours, lora), case, steps=3)
