"""LoRA files that do not fit, or only in part, or are damaged: what is said."""

import pytest
import torch
from safetensors.torch import save_file

from support import tiny
from support.loras import NAMINGS, merged_by_core, random_lora
from support.tiny import sample


def test_without_taca_is_an_error(folder, load_lora):
    model = tiny.load(folder, "flux")
    with pytest.raises(RuntimeError, match="add the TACA node"):
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


def test_one_layer_under_two_names(folder, load_lora, caplog):
    """Core keeps the last of the names that it knows; the other one is told."""
    model, names = tiny.load(folder, "flux"), ("transformer.", "")
    state = {
        f"{prefix}transformer_blocks.0.attn.to_q.lora_{which}.weight": torch.full(
            shape, 1.0 + len(prefix)
        )
        for prefix in names
        for which, shape in (("A", (1, 128)), ("B", (128, 1)))
    }
    lora = load_lora(model, state).get_additional_models_with_key("taca_lora")[0].model
    [key] = (k for k in merged_by_core(model, state).patches if "qkv" in k)
    [patch] = merged_by_core(model, state).patches[key]
    [delta] = lora.deltas[0]
    assert torch.equal(delta.value(torch.device("cpu")).weights[0], patch[1].weights[0])
    assert "2 of 4 tensors" in caplog.text


@pytest.mark.parametrize(
    "key",
    ["transformer.transformer_blocks.0.attn.to_q.b_norm", "diffusion_model.pos_embed.diff_b"],
)
def test_what_the_model_has_no_parameter_for(folder, load_lora, key, caplog):
    """Core makes names of such keys that no model has."""
    model = tiny.load(folder, "sd3" if "pos" in key else "flux")
    beside = {key.replace("b_norm", "w_norm"): torch.ones(128, 128), key: torch.ones(128)}
    load_lora(model, random_lora(model) | beside)
    assert f"left out, for example {key}" in caplog.text


@pytest.mark.parametrize(
    ("part", "shape"),
    [
        ("double_blocks.0.img_attn.qkv.dora_scale", (77, 1)),
        ("double_blocks.0.img_attn.qkv.lora_magnitude_vector", (77,)),
        ("double_blocks.0.img_attn.norm.key_norm.hada_w1_a", (128, 2)),
    ],
)
def test_what_core_cannot_merge(folder, load_lora, part, shape, caplog):
    """Its merge only logs an error, at each use: left out, and told once."""
    model, name = tiny.load(folder, "flux"), f"diffusion_model.{part}"
    state = random_lora(model) | {name: torch.ones(shape)}
    if "hada" in part:
        for each, size in (("1_b", (2, 128)), ("2_a", (128, 2)), ("2_b", (2, 128))):
            state[name.replace("1_a", each)] = torch.ones(size)
    load_lora(model, state)
    left_out = 4 if "hada" in part else 3
    assert f"TACA: {left_out} of " in caplog.text
    assert not [r for r in caplog.records if r.levelname == "ERROR"]


@pytest.mark.parametrize("state", [{}, {"lora_unet_img_in.alpha": torch.ones(())}], ids=len)
def test_a_file_without_weights(folder, load_lora, state):
    with pytest.raises(ValueError, match=r"is not a LoRA: it holds no weights"):
        load_lora(tiny.load(folder, "flux"), state)


def test_lokr_of_three_tensors(folder, load_lora, apply_taca):
    """Its second factor as a Tucker decomposition, on a linear layer: core's merge fails at it."""
    model, generator = tiny.load(folder, "flux"), torch.Generator().manual_seed(5)
    name = "diffusion_model.double_blocks.0.img_attn.proj.lokr_"
    w1, a, b, t = (
        torch.randn(shape, generator=generator) * 0.5
        for shape in ((8, 8), (16, 16), (16, 16), (16, 16, 1, 1))
    )
    w2 = torch.einsum("i j k l, j r, i p -> p r", t, b, a)
    three = {"w1": w1, "w2_a": a, "w2_b": b, "t2": t}
    expected, ours = (
        load_lora(apply_taca(model, 1.0, 0.0), {f"{name}{k}": v for k, v in state.items()})
        for state in ({"w1": w1, "w2": w2}, three)
    )
    torch.testing.assert_close(
        sample(ours, "flux", 3), sample(expected, "flux", 3), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("damage", ["truncated", "garbage", "header", "empty"])
def test_a_damaged_file(folder, load_lora, loras, damage):
    model = tiny.load(folder, "flux")
    path = loras / "bad.safetensors"
    save_file(random_lora(model), path)
    data = path.read_bytes()
    path.write_bytes(
        {
            "truncated": data[:-100],
            "garbage": b"not a file" * 9,
            "header": b"\xff" * 8 + data[8:],
            "empty": b"",
        }[damage]
    )
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
