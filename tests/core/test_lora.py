"""Load TACA LoRA on real models, with files written by peft and diffusers themselves."""

import json
import sys

import comfy.lora
import comfy.lora_convert
import comfy.model_management
import comfy.ops
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import folder_paths
import pytest
import tiny
import torch
from comfy.patcher_extension import WrappersMP
from comfy.weight_adapter import adapter_maps
from diffusers import (
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_compile import compiled, fresh_dynamo  # noqa: F401
from test_families import dense, families, named
from test_families import sample as sample_family
from test_model import KINDS, reference, sample

lora_module = sys.modules["taca_pack.taca.lora"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def loras(tmp_path, monkeypatch):
    """An empty loras folder, as ComfyUI knows it."""
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors", ".pt"})
    )
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


@pytest.fixture
def load_lora(pack, loras):
    """``model, state or name -> model`` through the node Load TACA LoRA."""

    def load(model, lora, strength=1.0):
        name = lora
        if isinstance(lora, dict):
            name = f"{id(lora)}.safetensors"
            save_file({k: v.contiguous() for k, v in lora.items()}, loras / name)
        return pack["LoadTACALoRA"].execute(model, name, strength).result[0]

    return load


def diffusers_model(kind):
    """A tiny transformer of diffusers, with weights large enough for attention to be uneven."""
    torch.manual_seed(7)
    if kind == "flux":
        model = FluxTransformer2DModel(
            num_layers=2, num_single_layers=2, attention_head_dim=128, num_attention_heads=1,
            joint_attention_dim=64, pooled_projection_dim=32, guidance_embeds=True,
        )  # fmt: skip
    else:
        model = SD3Transformer2DModel(
            sample_size=32, num_layers=2, attention_head_dim=64, num_attention_heads=2,
            joint_attention_dim=48, caption_projection_dim=128, pooled_projection_dim=32,
            pos_embed_max_size=32, dual_attention_layers=(0,), qk_norm="rms_norm",
        )  # fmt: skip
    for name, parameter in model.named_parameters():
        if ".norm_" in name and parameter.ndim == 1 and "added" not in name:
            parameter.data.fill_(2.0)
    return model


def core_model(path, state):
    """A transformer's tensors in diffusers' layout, through a file and core's loader."""
    save_file({k: v.clone().contiguous() for k, v in state.items()}, path)
    return comfy.sd.load_diffusion_model(str(path))


def publish(kind, folder, **settings):
    """(kind, model, LoRA file by diffusers, the model with that LoRA merged by peft).

    The LoRA is on every linear layer: attention, feed-forward and adaLN; alpha is not the rank.
    """
    transformer = diffusers_model(kind)
    model = core_model(folder / "base.safetensors", transformer.state_dict())
    settings = {"r": 4, "lora_alpha": 6, **settings}
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, **settings)
    transformer.add_adapter(config)
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


def replaced(model):
    """Modules whose forward is not their class's own, or whose weights have a function."""
    return [
        name
        for name, module in model.model.named_modules()
        if "forward" in module.__dict__ or getattr(module, "weight_function", [])
    ]


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
        {"alpha_pattern": {r".*\.attn\.to_[qk]": 12, r"transformer_blocks\.0\..*": 0},
         "rank_pattern": {r"attn\.to_\w": 8}, "use_rslora": True},
        # The first that is all of a name's last parts counts; diffusers writes them sorted.
        {"alpha_pattern": {"^to_q": 30, "attn": 9, "o_q": 40, "to_k|to_q": 20, "to_q": 10}},
    ],
    ids=["rslora", "patterns", "first match"],
)  # fmt: skip
def test_scales_of_peft(tmp_path, apply_taca, load_lora, loras, kind, settings):
    """The scale of each layer is what peft computes from the configuration in the file."""
    kind, model, file, merged = publish(kind, tmp_path, **settings)
    ours = load_lora(apply_taca(model, 1.0, 0.0), copy_to(loras, file))
    expected = sample(merged, kind, steps=3)
    torch.testing.assert_close(sample(ours, kind, steps=3), expected, atol=1e-4, rtol=1e-4)


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


def random_lora(model, algorithm="lora", naming="diffusion_model.{}", rank=4, seed=1, only=""):
    """A LoRA as core's trainer would write it: every weight and bias, or those named."""
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def random(*shape, scale=0.05):
        return torch.randn(shape, generator=generator) * scale

    for name, module in model.model.named_modules():
        if not hasattr(module, "weight_function") or only not in name:
            continue
        key = naming.format(name.removeprefix("diffusion_model."))
        if "{}" in naming and naming.startswith("lora_"):
            key = key.replace(".", "_")
        weight = module.weight
        if weight is not None and weight.ndim >= 2:
            rows, columns = weight.shape[0], weight[0].numel()
            if algorithm in ("lora", "dora"):
                state[f"{key}.lora_up.weight"] = random(rows, rank, scale=0.2)
                state[f"{key}.lora_down.weight"] = random(rank, columns, scale=0.2)
                state[f"{key}.alpha"] = torch.tensor(2.0)
                if algorithm == "dora":
                    state[f"{key}.dora_scale"] = weight.flatten(1).norm(dim=1)[:, None] * 1.1
            elif algorithm == "full":
                state[f"{key}.diff"] = random(*weight.shape, scale=0.02)
            elif algorithm.startswith("GLoRA"):
                is_old = algorithm == "GLoRA, old"
                side = columns if is_old else weight.shape[1]
                shapes = [(side, rank), (rank, side), (rows, rank), (rank, columns)]
                parts = ("a2", "a1", "b2", "b1") if is_old else ("a1", "a2", "b1", "b2")
                for part, shape in zip(parts, shapes, strict=True):
                    state[f"{key}.{part}.weight"] = random(*shape)
                state[f"{key}.alpha"] = torch.tensor(2.0)
            else:
                train = adapter_maps[algorithm].create_train(weight, rank=rank, alpha=1.0)
                for part, tensor in train.named_parameters():
                    filled = tensor.detach().clone()
                    if part != "alpha":
                        filled = random(*tensor.shape, scale=0.15)
                    state[f"{key}.{part}"] = filled
        elif weight is not None and algorithm == "full":
            state[f"{key}.diff"] = random(*weight.shape, scale=0.3)
        if algorithm == "full" and getattr(module, "bias", None) is not None:
            state[f"{key}.diff_b"] = random(*module.bias.shape)
    return state


def merged_by_core(model, state, strength=1.0):
    return comfy.sd.load_lora_for_models(model, None, dict(state), strength, 0)[0]


NAMINGS = {
    "generic": "diffusion_model.{}",  # core's trainer, ai-toolkit
    "kohya": "lora_unet_{}",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("algorithm", "naming"),
    [("lora", "generic"), ("lora", "kohya"), ("LoHa", "generic"), ("LoKr", "generic"),
     ("OFT", "generic"), ("dora", "generic"), ("full", "generic"), ("GLoRA", "generic"),
     ("GLoRA, old", "kohya")],
)  # fmt: skip
def test_formats(folder, apply_taca, load_lora, kind, algorithm, naming):
    """Whatever core reads, with the effect of core's merge."""
    model = tiny.load(folder, kind)
    state = random_lora(model, algorithm, NAMINGS[naming])
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    expected = sample(apply_taca(merged_by_core(model, state, 0.8), 1.2, 0.0), kind)
    plain = sample(apply_taca(model, 1.2, 0.0), kind)
    ours = sample(load_lora(apply_taca(model, 1.2, 0.0), state, 0.8), kind)
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
    expected = sample(apply_taca(merged, 1.2, 0.0), kind)
    ours = apply_taca(bypassed, 1.2, 0.0)
    for state in states[:2]:
        ours = load_lora(ours, state)
    torch.testing.assert_close(sample(ours, kind), expected, atol=1e-4, rtol=1e-4)
    outside = torch.tensor([0.9, 0.5, 0.0])
    ours = load_lora(apply_taca(bypassed), states[0])
    assert torch.equal(runs(ours, kind, outside), runs(bypassed, kind, outside))


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
                x[rows], sigma, c_crossattn=cond[0][rows],
                transformer_options={"wrappers": both.wrappers},
                **{name: value[rows] for name, value in extra.items()},
            )  # fmt: skip
        finally:
            both.cleanup()

    alone = torch.cat([call(slice(i, i + 1)) for i in range(3)])
    torch.testing.assert_close(call(slice(None)), alone, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled(folder, apply_taca, load_lora, kind, fresh_dynamo):  # noqa: F811
    """Both orders, on and off, in one process; another strength; never a stale result."""
    model = tiny.load(folder, kind)
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


def with_lora(weights, lora):
    """A file's weights and, in float64, a LoRA of every linear layer with alpha 2 and rank 4."""
    merged = dict(weights)
    for key, up in lora.items():
        base, is_up, _ = key.partition(".lora_up.weight")
        if is_up:
            name = f"{base.removeprefix('diffusion_model.')}.weight"
            delta = 2 / 4 * up.double() @ lora[f"{base}.lora_down.weight"].double()
            merged[name] = merged[name].double().add(delta.view(merged[name].shape)).float()
    return merged


def in_blocks(weights):
    """Names of the linear layers that quantised files quantise."""
    return [k.removesuffix(".weight") for k, v in weights.items()
            if "blocks" in k and k.endswith(".weight") and v.ndim == 2]  # fmt: skip


def scaled_fp8(weights, layout):
    """Weights in float8 with a scale for each matrix, in one of core's two layouts, and the same
    weights as a plain file would have them."""
    quantised, plain = dict(weights), dict(weights)
    for name in in_blocks(weights):
        weight = weights[f"{name}.weight"]
        scale = weight.abs().amax() / 448
        quantised[f"{name}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
        plain[f"{name}.weight"] = quantised[f"{name}.weight"].float() * scale
        if layout == "scaled_fp8":
            quantised[f"{name}.scale_weight"] = scale
            continue
        quantised[f"{name}.weight_scale"] = scale
        quantised[f"{name}.input_scale"] = torch.tensor(0.05)
        words = json.dumps({"format": "float8_e4m3fn"}).encode()
        quantised[f"{name}.comfy_quant"] = torch.tensor(list(words), dtype=torch.uint8)
    if layout == "scaled_fp8":
        quantised["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    return quantised, plain


class Packed(torch.Tensor):
    """Small integers with the shape of the weight that they stand for, as GGUF packs have it."""

    @classmethod
    def of(cls, weight):
        scale = weight.abs().amax(1, keepdim=True) / 7
        packed = (weight / scale).round().to(torch.int8).flatten()[None].as_subclass(cls)
        packed.scale, packed.shown = scale, weight.shape
        return packed

    @property
    def shape(self):
        return self.shown

    def unpacked(self):
        return self.as_subclass(torch.Tensor).view(self.shown) * self.scale


class PackedOps(comfy.ops.manual_cast):
    """``custom_operations`` as GGUF packs hand them to core's loader."""

    class Linear(comfy.ops.manual_cast.Linear):
        packed = None

        def _load_from_state_dict(self, state, prefix, metadata, strict, missing, *args):
            name = f"{prefix}weight"
            if isinstance(state[name], Packed):
                self.packed = state.pop(name)
                bits = self.packed.as_subclass(torch.Tensor)
                self.weight = torch.nn.Parameter(bits, requires_grad=False)
            super()._load_from_state_dict(state, prefix, metadata, strict, missing, *args)
            if self.packed is not None:
                missing.remove(name)

        def forward(self, x):
            if self.packed is None:
                return super().forward(x)
            return torch.nn.functional.linear(x, self.packed.unpacked(), self.bias)


def gguf(weights):
    """Weights as a GGUF pack hands them to core's loader, and as a plain file would have them."""
    names = [f"{name}.weight" for name in in_blocks(weights)]
    packed = weights | {name: Packed.of(weights[name]) for name in names}
    return packed, weights | {name: packed[name].unpacked() for name in names}


def quantised(weights, layout, path):
    """A model from these weights in a layout, and what a plain file would hold."""
    if layout == "GGUF":
        state, plain = gguf(weights)
        options = {"custom_operations": PackedOps}
        return comfy.sd.load_diffusion_model_state_dict(state, model_options=options), plain
    state, plain = scaled_fp8(weights, layout)
    return core_model(path, state), plain


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["scaled_fp8", "comfy_quant", "GGUF"])
def test_quantised_files(apply_taca, load_lora, kind, layout, tmp_path):
    """Through core's loader and its operations for such files, or a pack's: the dense run with the
    weights that the file stands for, and with a LoRA merged into those."""
    weights = tiny.weights(kind)
    model, plain = quantised(weights, layout, tmp_path / "quantised.safetensors")
    full = core_model(tmp_path / "plain.safetensors", plain)
    lora = random_lora(full, only="blocks")
    merged = core_model(tmp_path / "merged.safetensors", with_lora(plain, lora))
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    run = {"steps": 3, "cfg": 1.0}
    off, on, with_both = (
        reference(m, kind, gamma=gamma, first=3, **run)
        for m, gamma in ((full, 1.0), (full, 1.4), (merged, 1.4))
    )
    ours = apply_taca(model, 1.4, 0.0)
    for m, expected, without in ((ours, on, off), (load_lora(ours, lora), with_both, on)):
        result = sample(m, kind, **run)
        assert (result - expected).abs().max() < 1e-3 * (without - expected).abs().max()
    # Adapters that need the weight itself have core's, but not one that only its module unpacks.
    dora = random_lora(full, "dora", only="blocks")
    if layout == "GGUF":
        for state in (dora, random_lora(full, "OFT", only="blocks")):
            with pytest.raises(ValueError, match=r"needs the weights themselves .* a LoRA without"):
                load_lora(ours, state)
    else:
        expected = sample(apply_taca(merged_by_core(full, dora), 1.4, 0.0), kind, **run)
        result = sample(load_lora(ours, dora), kind, **run)
        torch.testing.assert_close(result, expected, atol=1e-3, rtol=1e-3)
    assert not replaced(model)
    assert all(torch.equal(v, before[k]) for k, v in model.model.state_dict().items())
    names = in_blocks(weights)
    modules = {n.removeprefix("diffusion_model."): m for n, m in model.model.named_modules()}
    kinds = {type(modules[name].weight.data).__name__ for name in names}
    assert kinds == {"Tensor" if layout == "GGUF" else "QuantizedTensor"}


@pytest.mark.parametrize("case", named("FLUX.2", "Qwen-Image"), ids=str)
@pytest.mark.parametrize("layout", ["scaled_fp8", "comfy_quant"])
def test_quantised_files_of_families(case, apply_taca, load_lora, layout, tmp_path, monkeypatch):
    """As ComfyUI's own templates for these models ask for."""
    for name in ("source", "full"):
        (tmp_path / name).mkdir()
    families.load(case, tmp_path / "source", monkeypatch)
    [file] = (tmp_path / "source").iterdir()
    state, plain = scaled_fp8(load_file(file), layout)
    save_file(state, file)
    save_file(plain, tmp_path / "full" / file.name)
    model, full = (families.load(case, tmp_path / n, monkeypatch) for n in ("source", "full"))
    lora = random_lora(full, only="blocks")
    ours = apply_taca(model, 1.4, 0.0)
    off, on, with_both = (
        sample_family(dense(m, case, gamma), case)
        for m, gamma in ((full, 1.0), (full, 1.4), (merged_by_core(full, lora), 1.4))
    )
    for m, expected, without in ((ours, on, off), (load_lora(ours, lora), with_both, on)):
        result = sample_family(m, case)
        assert (result - expected).abs().max() < 1e-3 * (without - expected).abs().max()
    assert not replaced(model)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_comfyuis(folder, apply_taca, load_lora, kind):
    """Loaded, counted and freed as a model of its own, beside the model."""
    model = tiny.load(folder, kind)
    state = random_lora(model)
    both = load_lora(apply_taca(model), state)
    size = sum(v.numel() * v.element_size() for k, v in state.items() if "alpha" not in k)
    sample(both, kind, steps=2)
    loaded = [m for m in comfy.model_management.current_loaded_models
              if isinstance(m.model and m.model.model, lora_module.LoRA)]  # fmt: skip
    assert [m.model_memory() for m in loaded] == [size]
    assert all(p.device == both.load_device for p in loaded[0].model.model.parameters())
    comfy.model_management.unload_all_models()
    assert not comfy.model_management.current_loaded_models
    for m in (model, both):
        assert sample(m, kind, steps=2).isfinite().all()


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


def test_without_taca_is_an_error(folder, load_lora):
    model = tiny.load(folder, "flux")
    with pytest.raises(RuntimeError, match="add TACA Patch Model"):
        sample(load_lora(model, random_lora(model)), "flux")


def test_strength_0_is_the_model(folder, load_lora):
    model = tiny.load(folder, "flux")
    assert load_lora(model, random_lora(model), 0.0) is model


def test_fits_nowhere(folder, load_lora):
    model = tiny.load(folder, "flux")
    other = random_lora(tiny.load(folder, "sd3"), only="blocks")
    with pytest.raises(ValueError, match=r"does not fit this model .* diffusion_model\.") as error:
        load_lora(model, other)
    assert "joint_blocks" in str(error.value)


def test_another_size_fits_nowhere(folder, load_lora):
    """The right names, for a larger model."""
    model = tiny.load(folder, "flux")
    state = {
        key: torch.cat([t, t]) if "lora_up" in key else t for key, t in random_lora(model).items()
    }
    with pytest.raises(ValueError, match="does not fit this model"):
        load_lora(model, state)


def test_fits_partly(folder, load_lora, caplog):
    model = tiny.load(folder, "flux")
    state = random_lora(model)
    weights = sum("lora_" in key for key in state)
    state["lora_te1_text_model.lora_up.weight"] = torch.zeros(4, 4)
    state["lora_te1_text_model.lora_down.weight"] = torch.zeros(4, 4)
    load_lora(model, state)
    assert f"2 of {weights + 2} tensors" in caplog.text
    assert "lora_te1_text_model" in caplog.text


@pytest.mark.parametrize("damage", ["truncated", "garbage", "header", "empty"])
def test_a_damaged_file(folder, load_lora, loras, damage):
    model = tiny.load(folder, "flux")
    path = loras / "bad.safetensors"
    save_file(random_lora(model), path)
    data = path.read_bytes()
    path.write_bytes({"truncated": data[:-100], "garbage": b"not a file" * 9,
                      "header": b"\xff" * 8 + data[8:], "empty": b""}[damage])  # fmt: skip
    with pytest.raises(ValueError, match=r"bad\.safetensors cannot be read"):
        load_lora(model, "bad.safetensors")


def test_damaged_metadata(folder, load_lora, loras):
    model = tiny.load(folder, "flux")
    save_file(random_lora(model), loras / "bad.safetensors", {"lora_adapter_metadata": "{not json"})
    with pytest.raises(ValueError, match=r"bad\.safetensors cannot be read"):
        load_lora(model, "bad.safetensors")


@pytest.mark.parametrize("naming", list(NAMINGS))
def test_a_model_that_is_loaded_compiled(folder, load_lora, naming):
    """Some packs compile by an object patch, which stays on the live model after a run."""
    model = tiny.load(folder, "flux")
    state = random_lora(model, naming=NAMINGS[naming])
    fast = model.clone()
    compiled = torch.compile(model.get_model_object("diffusion_model"), backend="eager")
    fast.add_object_patch("diffusion_model", compiled)
    expected = load_lora(model, state)
    fast.patch_model()
    try:
        names = [
            m.get_additional_models_with_key("taca_lora")[0].model.module_names
            for m in (load_lora(fast, state), expected)
        ]
    finally:
        fast.unpatch_model()
    assert names[0] == names[1]


def test_a_scale_alone_is_told(folder, load_lora, caplog):
    """DoRA's scale of a layer that has nothing else here: once, and with the count."""
    model = tiny.load(folder, "flux")
    state = random_lora(model)
    tensors = sum("lora_" in key for key in state)
    load_lora(model, state | {"other.dora_scale": torch.ones(4)})
    [said] = [r.message for r in caplog.records if "left out" in r.message]
    assert said.startswith(f"TACA: 1 of {tensors + 1} tensors")
    assert "other.dora_scale" in said


@pytest.mark.parametrize("name", ["UPPER.SAFETENSORS", "Short.Sft"])
def test_extensions_in_any_letters(folder, load_lora, loras, name):
    """What core's list shows is loaded."""
    model = tiny.load(folder, "flux")
    save_file(random_lora(model), loras / name)
    assert load_lora(model, name) is not model


def test_pickles_are_refused(folder, load_lora, loras):
    torch.save({"a": torch.zeros(1)}, loras / "lora.pt")
    with pytest.raises(ValueError, match="only safetensors"):
        load_lora(tiny.load(folder, "flux"), "lora.pt")
