"""TACA Alignment Score against transformers' CLIP, on seeded weights of ViT-L's shapes."""

import re

import pytest
import torch
from safetensors.torch import save_file

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

TEXT = "a red circle left of a blue square"
LONG = " ".join(["a red circle left of a blue square and"] * 12)


@pytest.fixture(scope="module")
def clip_l(tmp_path_factory):
    """transformers' CLIP ViT-L/14, and the two files that core reads."""
    config = transformers.CLIPConfig(
        text_config={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "projection_dim": 768,
            "eos_token_id": 49407,
        },
        vision_config={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
        },
        projection_dim=768,
    )
    with torch.device("meta"):
        model = transformers.CLIPModel(config)
    model = model.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 22, generator=generator)
    for name, weight in model.named_parameters():
        offset = int(torch.randint(len(noise), (), generator=generator))
        count = weight.numel()
        values = noise.roll(offset).repeat(count // len(noise) + 1)[:count].view(weight.shape)
        norm = re.search(r"norm|layrnorm", name) and name.endswith("weight")
        # What core keeps in half precision is the same number in both.
        weight.data.copy_((1 + 0.1 * values if norm else 0.03 * values).half())
    for name, buffer in model.named_buffers():
        assert name.endswith("position_ids")
        buffer.copy_(torch.arange(buffer.shape[-1])[None])
    folder = tmp_path_factory.mktemp("clip")
    state = {
        key: value.half().contiguous()
        for key, value in model.state_dict().items()
        if "position_ids" not in key
    }
    text = {k: v for k, v in state.items() if k.startswith(("text_model", "text_projection"))}
    vision = {k: v for k, v in state.items() if k.startswith(("vision_model", "visual_proj"))}
    save_file(text, folder / "clip_l.safetensors")
    save_file(
        {k: v for k, v in text.items() if k != "text_projection.weight"},
        folder / "clip_l_without.safetensors",
    )
    save_file(vision, folder / "clip_vision_l.safetensors")
    return model, folder


@pytest.fixture(scope="module")
def loaded(clip_l):
    import comfy.clip_vision
    import comfy.sd

    folder = clip_l[1]
    clip = comfy.sd.load_clip([str(folder / "clip_l.safetensors")])
    return comfy.clip_vision.load(str(folder / "clip_vision_l.safetensors")), clip


@pytest.fixture
def score(pack):
    return pack["TACAAlignmentScore"].execute


def expected(model, image, text):
    """By transformers, from its own tokens and its own preparation of the picture."""
    from pathlib import Path

    import comfy.sd1_clip

    folder = Path(comfy.sd1_clip.__file__).parent / "sd1_tokenizer"
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    ids = tokenizer(text, truncation=True, max_length=77, return_tensors="pt").input_ids
    pixels = (image * 255).round().byte().movedim(-1, 1)
    prepared = transformers.CLIPImageProcessor()(list(pixels), return_tensors="pt")
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=prepared.pixel_values)
    return torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)


def pictures(size, count=2):
    generator = torch.Generator().manual_seed(1)
    small = torch.rand(count, 3, 9, 9, generator=generator)
    smooth = torch.nn.functional.interpolate(small, size, mode="bilinear")
    return (smooth.movedim(1, -1) * 255).round() / 255


def test_equals_transformers(clip_l, loaded, score):
    image = pictures((224, 224))
    reference = expected(clip_l[0], image, TEXT)
    assert (reference[0] - reference[1]).abs() > 1e-4, "the pictures must differ"
    value, label = score(image, TEXT, *loaded).result
    assert value == pytest.approx(reference.mean().item(), abs=2e-6)
    low, high = reference.min().item(), reference.max().item()
    assert label == f"CLIP {value:.4f} ({low:.4f} to {high:.4f})"


def test_a_text_of_more_than_75_tokens(clip_l, loaded, score):
    """CLIP reads the first 75, in both."""
    image = pictures((224, 224), 1)
    value, label = score(image, LONG, *loaded, label="gamma 1.2").result
    assert value == pytest.approx(expected(clip_l[0], image, LONG).item(), abs=2e-6)
    assert label == f"gamma 1.2: CLIP {value:.4f}"


def test_other_sizes_are_resized_as_transformers_does(clip_l, loaded, score):
    image = pictures((300, 420), 1)
    value = score(image, TEXT, *loaded).result[0]
    assert value == pytest.approx(expected(clip_l[0], image, TEXT).item(), abs=2e-4)


def test_grey_and_transparent_pictures(loaded, score):
    """As the same in three channels; transparency is not looked at."""
    grey = pictures((224, 224), 1)[..., :1]
    of_three, *others = (
        score(each, TEXT, *loaded).result[0]
        for each in (
            grey.expand(-1, -1, -1, 3),
            grey,
            torch.cat([grey, grey * 0], -1),
            torch.cat([grey, grey, grey, grey * 0], -1),
        )
    )
    assert others == [of_three] * 3


def test_what_is_not_clip_l_is_refused(clip_l, loaded, score):
    import comfy.sd

    vision = loaded[0]
    image, folder = pictures((224, 224), 1), clip_l[1]
    with pytest.raises(ValueError, match="no text to compare"):
        score(image, " ", *loaded)
    for kind in (comfy.sd.CLIPType.FLUX, comfy.sd.CLIPType.SD3):
        several = comfy.sd.load_clip([str(folder / "clip_l.safetensors")] * 2, clip_type=kind)
        with pytest.raises(ValueError, match=r"CLIP-L by itself.*type stable_diffusion"):
            score(image, TEXT, vision, several)
    without = comfy.sd.load_clip([str(folder / "clip_l_without.safetensors")])
    with pytest.raises(ValueError, match="without its text projection"):
        score(image, TEXT, vision, without)


def test_a_loader_that_does_not_tell_its_file(loaded, score, monkeypatch):
    """As another pack's may not: the projection's numbers alone do not say where they are from."""
    vision, clip = loaded
    for untold in (None, (None, ("",)), (None, (["a_gone_file.safetensors"],))):
        monkeypatch.setattr(clip.patcher, "cached_patcher_init", untold)
        with pytest.raises(ValueError, match=r"cannot tell whether.*type stable_diffusion"):
            score(pictures((224, 224), 1), TEXT, vision, clip)


def test_files_that_are_no_safetensors(clip_l, loaded, score, tmp_path):
    """Of core's other kind; and with the projection as it was saved of old."""
    import comfy.sd
    from safetensors.torch import load_file

    image, (_, folder) = pictures((224, 224), 1), clip_l
    known = score(image, TEXT, *loaded).result
    whole = load_file(folder / "clip_l.safetensors")
    without = {key: weight for key, weight in whole.items() if "text_projection" not in key}
    old = {**without, "text_projection": whole["text_projection.weight"].T.contiguous()}
    for state in (whole, old, without):
        torch.save(state, tmp_path / "clip_l.bin")
        clip = comfy.sd.load_clip([str(tmp_path / "clip_l.bin")])
        if state is without:
            with pytest.raises(ValueError, match="without its text projection"):
                score(image, TEXT, loaded[0], clip)
        else:
            assert score(image, TEXT, loaded[0], clip).result == known


def test_another_vision_model_is_refused(loaded, score):
    import comfy.clip_vision

    other = {
        "model_type": "clip_vision_model",
        "hidden_size": 64,
        "image_size": 224,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_channels": 3,
        "num_hidden_layers": 2,
        "patch_size": 32,
        "projection_dim": 512,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }
    vision = comfy.clip_vision.ClipVisionModel(other)
    for weight in vision.model.parameters():
        weight.data.fill_(0.01)
    with pytest.raises(ValueError, match=r"ViT-L.*another"):
        score(pictures((224, 224), 1), TEXT, vision, loaded[1])
