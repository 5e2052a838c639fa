"""Load TACA LoRA on real models, with files written by peft and diffusers themselves."""

import json
import sys

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from diffusers import (
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file

from support import tiny
from support.compiling import compiled, load
from support.loras import (
    NAMINGS,
    core_model,
    merged_by_core,
    random_lora,
    replaced,
)
from support.tiny import KINDS, sample

lora_module = sys.modules["taca_pack.taca.lora"]


def diffusers_model(kind):
    """A tiny transformer of diffusers, with weights large enough for attention to be uneven."""
    torch.manual_seed(7)
    if kind == "flux":
        model = FluxTransformer2DModel(
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=128,
            num_attention_heads=1,
            joint_attention_dim=64,
            pooled_projection_dim=32,
            guidance_embeds=True,
        )
    else:
        model = SD3Transformer2DModel(
            sample_size=32,
            num_layers=2,
            attention_head_dim=64,
            num_attention_heads=2,
            joint_attention_dim=48,
            caption_projection_dim=128,
            pooled_projection_dim=32,
            pos_embed_max_size=32,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )
    for name, parameter in model.named_parameters():
        if ".norm_" in name and parameter.ndim == 1 and "added" not in name:
            parameter.data.fill_(2.0)
    return model


def publish(kind, folder, **settings):
    """(kind, model, LoRA file by diffusers, the model with that LoRA merged by peft).

    The LoRA is on every linear layer: attention, feed-forward and adaLN; alpha is not the rank.
    """
    transformer = diffusers_model(kind)
    model = core_model(folder / "base.safetensors", transformer.state_dict())
    settings = {"r": 4, "lora_alpha": 6, **settings}
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, **settings)
    transformer.add_adapter(config)
    generator = torch.Generator().manual_seed(9)
    for name, parameter in transformer.named_parameters():
        if "magnitude" in name:  # training moves them from the lengths of W + B A
            parameter.data *= 1 + 0.5 * torch.rand(parameter.shape, generator=generator)
    pipeline = FluxPipeline if kind == "flux" else StableDiffusion3Pipeline
    pipeline.save_lora_weights(
        str(folder / "lora"),
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        transformer_lora_adapter_metadata=config.to_dict(),
    )
    transformer.fuse_lora()
    merged = {
        key.replace(".base_layer", ""): tensor
        for key, tensor in transformer.state_dict().items()
        if ".lora_" not in key
    }
    file = folder / "lora" / "pytorch_lora_weights.safetensors"
    return kind, model, file, core_model(folder / "merged.safetensors", merged)


@pytest.fixture(scope="module", params=KINDS)
def published(request, tmp_path_factory):
    return publish(request.param, tmp_path_factory.mktemp("published"))


def runs(model, kind, sigmas, start=None, cfg=3.0, seed=3):
    """A run over these sigmas by core's sampler; from noise, or from latents at sigmas[0]."""
    positive, negative = tiny.conditioning(kind, 7), tiny.conditioning(kind, 12, seed=5)
    noise = torch.randn(1, 16, 16, 16, generator=torch.manual_seed(seed))
    latent = torch.zeros_like(noise)
    if start is not None:
        latent, noise = start, torch.zeros_like(noise)
    return comfy.sample.sample_custom(
        model,
        noise,
        cfg,
        comfy.samplers.sampler_object("euler"),
        sigmas,
        positive,
        negative,
        latent,
    )


def copy_to(loras, file):
    (loras / file.name).write_bytes(file.read_bytes())
    return file.name


def test_the_files_alpha_is_in_the_metadata(published):
    """Or the next test would not see it ignored."""
    _, _, file, _ = published
    assert not any(key.endswith(".alpha") for key in load_file(file))
    header = comfy.utils.load_torch_file(str(file), return_metadata=True)[1]
    assert json.loads(header["lora_adapter_metadata"])["transformer.lora_alpha"] == 6


@pytest.mark.parametrize("gamma", [1.0, 1.2])
def test_equals_the_merged_model(published, apply_taca, load_lora, loras, gamma):
    """In a window of all steps it is the model that peft merged, which core never saw."""
    kind, model, file, merged = published
    ours = load_lora(apply_taca(model, gamma, 0.0), copy_to(loras, file))
    expected = sample(apply_taca(merged, gamma, 0.0), kind)
    torch.testing.assert_close(sample(ours, kind), expected, atol=3e-5, rtol=3e-5)
    assert (sample(apply_taca(model, gamma, 0.0), kind) - expected).abs().max() > 0.1
    assert not replaced(model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {
            "alpha_pattern": {r".*\.attn\.to_[qk]": 12, r"transformer_blocks\.0\..*": 0},
            "rank_pattern": {r"attn\.to_\w": 8},
            "use_rslora": True,
        },
        # The first that is all of a name's last parts counts; diffusers writes them sorted.
        {"alpha_pattern": {"^to_q": 30, "attn": 9, "o_q": 40, "to_k|to_q": 20, "to_q": 10}},
    ],
    ids=["rslora", "patterns", "first match"],
)
def test_scales_of_peft(tmp_path, apply_taca, load_lora, loras, kind, settings):
    """The scale of each layer is what peft computes from the configuration in the file."""
    kind, model, file, merged = publish(kind, tmp_path, **settings)
    ours = load_lora(apply_taca(model, 1.0, 0.0), copy_to(loras, file))
    expected = sample(merged, kind, steps=3)
    # Deltas of that scale drive pictures far from 1, where float32 rounds more coarsely.
    atol = 2e-5 * float(expected.abs().max())
    torch.testing.assert_close(sample(ours, kind, steps=3), expected, atol=atol, rtol=1e-4)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_dora_and_biases_of_peft(tmp_path, apply_taca, load_lora, loras, kind, settings, caplog):
    """The lengths of rows as peft defines them, biases of B scaled; in fused layers too."""
    kind, model, file, merged = publish(kind, tmp_path, use_rslora=True, **settings)
    ours = load_lora(apply_taca(model, 1.0, 0.0), copy_to(loras, file))
    assert "left out" not in caplog.text
    expected = sample(merged, kind, steps=3)
    atol = 2e-5 * float(expected.abs().max())
    torch.testing.assert_close(sample(ours, kind, steps=3), expected, atol=atol, rtol=1e-4)


def test_confined_to_the_window(published, apply_taca, load_lora, loras):
    """Merged in the first steps, the plain model's bits from there; again for a second picture."""
    kind, model, file, merged = published
    name = copy_to(loras, file)
    sigmas = torch.tensor([1.0, 0.985, 0.97, 0.9, 0.6, 0.3, 0.0])
    inside = runs(apply_taca(merged), kind, sigmas[:4])
    both = load_lora(apply_taca(model), name)
    for _ in range(2):
        first = runs(both, kind, sigmas[:4])
        torch.testing.assert_close(first, inside, atol=3e-5, rtol=3e-5)
        # Core scales what it returns; at sigma > 0 it is the noisy latent that goes on.
        start = model.model.process_latent_in(first) * (1 - 0.9)
        start = model.model.process_latent_out(start)
        rest = [runs(m, kind, sigmas[3:], start) for m in (both, model)]
        assert torch.equal(*rest)
        after = apply_taca(load_lora(model, name))
        assert torch.equal(runs(after, kind, sigmas), runs(both, kind, sigmas))


def test_no_window_no_cost(published, apply_taca, load_lora, loras):
    """Outside the window no module is touched in any call."""
    kind, model, file, _ = published
    both = load_lora(apply_taca(model), copy_to(loras, file))
    inside = []

    def watch(executor, *args, **kwargs):
        inside.append(len(replaced(both)))
        return executor(*args, **kwargs)

    both.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "watch", watch)
    sample(both, kind, cfg=1.0)
    assert inside[0] > 20
    assert inside[1:] == [0] * 9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("algorithm", "naming"),
    [
        ("lora", "generic"),
        ("lora", "kohya"),
        ("LoHa", "generic"),
        ("LoKr", "generic"),
        ("OFT", "generic"),
        ("dora", "generic"),
        ("full", "generic"),
        ("GLoRA", "generic"),
        ("GLoRA, old", "kohya"),
        ("1 x 1", "kohya"),
        ("tucker", "generic"),
        ("LoKr, both", "generic"),
        ("LoKr, whole", "generic"),
        ("LoHa, tucker", "kohya"),
        ("set", "generic"),
        ("norms", "kohya"),
    ],
)
def test_formats(folder, apply_taca, load_lora, kind, algorithm, naming):
    """Whatever core reads, with the effect of core's merge."""
    model = tiny.load(folder, kind)
    state = random_lora(model, algorithm, NAMINGS[naming])
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    expected = sample(apply_taca(merged_by_core(model, state, 0.8), 1.2, 0.0), kind, steps=3)
    plain = sample(apply_taca(model, 1.2, 0.0), kind, steps=3)
    ours = sample(load_lora(apply_taca(model, 1.2, 0.0), state, 0.8), kind, steps=3)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    assert (plain - expected).abs().max() > 0.05
    assert not replaced(model)
    assert all(torch.equal(v, before[k]) for k, v in model.model.state_dict().items())


@pytest.mark.parametrize("prefix", ["base_model.model.", "transformer.", "lora_transformer_", ""])
def test_other_prefixes_of_diffusers_keys(published, load_lora, apply_taca, loras, prefix):
    kind, model, file, _ = published
    if prefix == "" and kind == "sd3":
        pytest.skip("core knows no bare keys for SD3")
    state = load_file(file)
    for key in list(state):
        bare = key.removeprefix("transformer.")
        module, _, which = bare.partition(".lora_")
        if prefix == "lora_transformer_":
            module = module.replace(".", "_")
            which = {"A": "down", "B": "up"}[which[0]] + which[1:]
        state[f"{prefix}{module}.lora_{which}"] = state.pop(key).clone()
    expected = sample(apply_taca(merged_by_core(model, load_file(file)), 1.0, 0.0), kind)
    ours = sample(load_lora(apply_taca(model, 1.0, 0.0), state), kind)
    torch.testing.assert_close(ours, expected, atol=3e-5, rtol=3e-5)


def test_pefts_prefix_keeps_alpha_and_dora(published, load_lora, apply_taca, caplog):
    """What core reads of ``transformer.`` keys is read of peft's own, whatever its ending."""
    kind, model, file, _ = published
    state = load_file(file)
    for key in list(state):
        base, down, _ = key.partition(".lora_A.")
        if down:
            state[f"{base}.alpha"] = torch.tensor(3.0)
            rows = len(state[f"{base}.lora_B.weight"])
            state[f"{base}.dora_scale"] = 1 + torch.rand(rows, 1)
    renamed = {key.replace("transformer.", "base_model.model.", 1): v for key, v in state.items()}
    expected = sample(merged_by_core(model, state), kind, steps=3)
    ours = load_lora(apply_taca(model, 1.0, 0.0), renamed)
    torch.testing.assert_close(sample(ours, kind, steps=3), expected, atol=3e-4, rtol=3e-4)
    assert "left out" not in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_pefts_prefix_before_comfyuis_names(folder, load_lora, apply_taca, kind):
    """As PEFT saves what it trained on ComfyUI's or the authors' own model, and not diffusers'."""
    model = tiny.load(folder, kind)
    state = random_lora(model)
    renamed = {
        key.replace("diffusion_model.", "base_model.model.", 1): w for key, w in state.items()
    }
    ours = sample(load_lora(apply_taca(model, 1.0, 0.0), renamed), kind)
    expected = sample(load_lora(apply_taca(model, 1.0, 0.0), state), kind)
    torch.testing.assert_close(ours, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("algorithm", ["dora", "OFT", "GLoRA", "set"])
def test_several_that_are_no_sums(folder, apply_taca, load_lora, algorithm, order):
    """In their order, as core merges one into what the one before it left."""
    model = tiny.load(folder, "sd3")
    states = [random_lora(model, each, seed=len(each)) for each in ("lora", algorithm)][::order]
    merged, ours = model, apply_taca(model, 1.0, 0.0)
    for state in states:
        merged = merged_by_core(merged, state, 0.7)
        ours = load_lora(ours, state, 0.7)
    expected = sample(merged, "sd3", steps=3)
    atol = 2e-5 * float(expected.abs().max())
    torch.testing.assert_close(sample(ours, "sd3", steps=3), expected, atol=atol, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_several_and_ordinary_ones_beside(folder, apply_taca, load_lora, kind):
    """Two TACA LoRAs of different kinds add up; a merged and a bypassed LoRA stay what they are."""
    model = tiny.load(folder, kind)
    states = [
        random_lora(model, algorithm, seed=seed, only=only)
        for seed, (algorithm, only) in enumerate(
            [("lora", ""), ("full", "blocks"), ("lora", "blocks.0"), ("lora", "blocks.1")]
        )
    ]
    ordinary = merged_by_core(model, states[2], 0.5)
    bypassed = comfy.sd.load_bypass_lora_for_models(ordinary, None, dict(states[3]), 0.5, 0)[0]
    merged = bypassed
    for state in states[:2]:
        merged = merged_by_core(merged, state)
    expected = sample(apply_taca(merged, 1.2, 0.0), kind, steps=3)
    ours = apply_taca(bypassed, 1.2, 0.0)
    for state in states[:2]:
        ours = load_lora(ours, state)
    torch.testing.assert_close(sample(ours, kind, steps=3), expected, atol=1e-4, rtol=1e-4)
    outside = torch.tensor([0.9, 0.5, 0.0])
    ours = load_lora(apply_taca(bypassed), states[0])
    assert torch.equal(runs(ours, kind, outside), runs(bypassed, kind, outside))


@pytest.mark.parametrize("algorithm", ["lora", "LoHa", "full"])
def test_beside_a_lora_that_widens_a_layer(folder, apply_taca, load_lora, algorithm):
    """FLUX's Control LoRAs (Canny, Depth) have the model take a second picture: core merges another
    LoRA into what the layer had before, if it comes first. Behind it core leaves that layer out."""
    model = tiny.load(folder, "flux")
    lora = random_lora(model, algorithm)
    generator = torch.manual_seed(3)
    control = {"diffusion_model.img_in.reshape_weight": torch.tensor([128, 128])}
    for name, shape in {"A": (4, 128), "B": (128, 4)}.items():
        part = 0.2 * torch.randn(shape, generator=generator)
        control[f"diffusion_model.img_in.lora_{name}.weight"] = part
    hint = torch.randn(1, 16, 16, 16, generator=generator)
    prompt = tiny.conditioning("flux", 7, concat_latent_image=hint)

    def controlled(m):
        return merged_by_core(m, control)

    def drawn(m):
        return sample(m, "flux", steps=3, cfg=1.0, positive=prompt)

    expected = drawn(controlled(merged_by_core(model, lora)))
    without = drawn(controlled(model))
    assert (without - expected).abs().max() > 0.1
    assert (without - drawn(model)).abs().max() > 0.1
    ours = apply_taca(model, 1.0, 0.0)
    for m in (controlled(load_lora(ours, lora)), load_lora(controlled(ours), lora)):
        torch.testing.assert_close(drawn(m), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("algorithm", ["lora", "full"])
def test_rows_of_mixed_sigma(folder, apply_taca, load_lora, kind, algorithm):
    model = tiny.load(folder, kind)
    both = load_lora(apply_taca(model, 1.2, 900.0), random_lora(model, algorithm))
    x, cond = tiny.latent(8, 8, batch=3), tiny.conditioning(kind, 9, batch=3)[0]
    extra = {"y": cond[1]["pooled_output"]}
    if kind == "flux":
        extra["guidance"] = torch.full((3,), 3.5)

    def call(rows):
        sigma = torch.tensor([0.95, 0.5, 0.99])[rows]
        both.pre_run()
        try:
            return both.model.apply_model(
                x[rows],
                sigma,
                c_crossattn=cond[0][rows],
                transformer_options={"wrappers": both.wrappers},
                **{name: value[rows] for name, value in extra.items()},
            )
        finally:
            both.cleanup()

    alone = torch.cat([call(slice(i, i + 1)) for i in range(3)])
    torch.testing.assert_close(call(slice(None)), alone, atol=2e-5, rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled(folder, apply_taca, load_lora, kind, fresh_dynamo):
    """Both orders, on and off, in one process; another strength; never a stale result."""
    model = load(folder, kind)
    state = random_lora(model, only="blocks")
    fast = compiled(model, whole=True)

    def picture(m):
        return sample(m, kind, steps=4, text=(7, 7))

    with_taca, plain = apply_taca(model), picture(model)
    pairs = [
        (load_lora(apply_taca(fast), state), picture(load_lora(with_taca, state))),
        (fast, plain),
        (apply_taca(fast), picture(with_taca)),
        (load_lora(apply_taca(fast), state, 0.5), picture(load_lora(with_taca, state, 0.5))),
        (compiled(load_lora(with_taca, state), whole=True), picture(load_lora(with_taca, state))),
        (fast, plain),
    ]
    for m, expected in pairs:
        torch.testing.assert_close(picture(m), expected, atol=1e-4, rtol=1e-4)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert not replaced(model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_reduced_precision(folder, apply_taca, load_lora, kind, dtype):
    """As good as merging into weights that were rounded once already; no stored weight changes."""
    model = tiny.load(folder, kind, dtype=dtype)
    state = random_lora(model, only="blocks")
    full = tiny.load(folder, kind)
    rounded = {
        key: value.float() for key, value in model.model.diffusion_model.state_dict().items()
    }
    full.model.diffusion_model.load_state_dict(rounded)
    expected = sample(apply_taca(merged_by_core(full, state), 1.2, 0.0), kind, steps=4, cfg=1.0)
    ours = load_lora(apply_taca(model, 1.2, 0.0), state)
    result = sample(ours, kind, steps=4, cfg=1.0).float()
    without = sample(apply_taca(model, 1.2, 0.0), kind, steps=4, cfg=1.0).float()
    error, effect = ((x - expected).abs().mean() for x in (result, without))
    assert error < 0.05 * effect


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_comfyuis(folder, apply_taca, load_lora, kind):
    """Loaded, counted and freed as a model of its own, beside the model."""
    model = tiny.load(folder, kind)
    state = random_lora(model)
    both = load_lora(apply_taca(model), state)
    size = sum(v.numel() * v.element_size() for k, v in state.items() if "alpha" not in k)
    before = [sample(m, kind, steps=2) for m in (model, both)]
    loaded = [
        m
        for m in comfy.model_management.current_loaded_models
        if isinstance(m.model and m.model.model, lora_module.LoRA)
    ]
    assert [m.model_memory() for m in loaded] == [size]
    assert all(p.device == both.load_device for p in loaded[0].model.model.parameters())
    comfy.model_management.unload_all_models()
    assert not comfy.model_management.current_loaded_models
    again = [sample(m, kind, steps=2) for m in (model, both)]
    assert all(map(torch.equal, before, again))


@pytest.mark.parametrize("kind", KINDS)
def test_multi_gpu_clones_have_their_own(folder, apply_taca, load_lora, kind):
    model = tiny.load(folder, kind)
    both = load_lora(apply_taca(model), random_lora(model))
    if not hasattr(model, "deepclone_multigpu"):
        pytest.skip("this ComfyUI runs on one device")
    clone = both.deepclone_multigpu()
    mine, theirs = (m.get_additional_models_with_key("taca_lora")[0].model for m in (both, clone))
    assert mine is not theirs
    # Another place in memory is another kernel for some sums.
    torch.testing.assert_close(sample(both, kind), sample(clone, kind), atol=1e-3, rtol=1e-3)


def test_what_another_pack_keeps_of_a_layer(folder, apply_taca, load_lora):
    """From call to call and run to run: nothing is added to it in place."""
    model, kept = tiny.load(folder, "flux", seed=8), {}
    layer = model.model.diffusion_model.double_blocks[0].img_mod.lin
    forward = layer.forward

    def keeping(x):
        return kept.setdefault(x.sum().item(), forward(x))

    settings = {"steps": 4, "text": (7, 7)}
    expected = sample(model, "flux", **settings)
    layer.forward = keeping
    try:
        lora = load_lora(apply_taca(model, 1.0, 900.0), random_lora(model, only="img_mod"))
        acted = sample(lora, "flux", **settings)
        assert torch.equal(sample(lora, "flux", **settings), acted)
        assert torch.equal(sample(model, "flux", **settings), expected)
    finally:
        del layer.forward
    assert not torch.equal(acted, expected)
    assert torch.equal(sample(lora, "flux", **settings), acted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_failing_step_leaves_nothing_behind(folder, apply_taca, load_lora, kind):
    model = tiny.load(folder, kind)
    state = random_lora(model, "full")
    plain, fine = sample(model, kind), sample(load_lora(apply_taca(model), state), kind)
    fails = model.clone()

    def failing(*args, **kwargs):
        raise comfy.model_management.InterruptProcessingException

    options = fails.model_options.setdefault("transformer_options", {})
    options["optimized_attention_override"] = failing
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(load_lora(apply_taca(fails), state), kind)
    assert not replaced(model)
    assert torch.equal(sample(model, kind), plain)
    assert torch.equal(sample(load_lora(apply_taca(model), state), kind), fine)
