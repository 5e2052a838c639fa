"""The demo's world, its checker and its codec."""

from __future__ import annotations

import codec
import numpy as np
import pytest
import torch
import world


@pytest.fixture(scope="module")
def drawn() -> tuple[list[str], np.ndarray]:
    """Return every caption once, and a picture of each."""
    captions = world.captions("train") + world.captions("held-out")
    rng = np.random.default_rng(7)
    return captions, np.stack([world.render(caption, rng) for caption in captions])


def everything_right(pictures: np.ndarray, captions: list[str]) -> float:
    """Return the share of pictures that the checker passes."""
    pairs = zip(pictures, captions, strict=True)
    return np.mean([world.check(picture, caption)["everything"] for picture, caption in pairs])


def judge(drawn_caption: str, asked: str) -> dict[str, bool]:
    """Judge a picture of one caption against another."""
    return world.check(world.render(drawn_caption, np.random.default_rng(3)), asked)


def test_split_is_disjoint_and_stable() -> None:
    train, held_out = world.captions("train"), world.captions("held-out")
    assert (len(train), len(held_out)) == (1020, 204)
    assert len({*train, *held_out}) == 1224
    # Both wordings of a scene are on the same side.
    assert {str(world.parse(c).mirrored()) for c in held_out} == set(held_out)
    # The trained weights depend on this very split.
    assert held_out[0] == "a red circle above a green circle"
    assert held_out[-1] == "a magenta square below a cyan triangle"
    with pytest.raises(ValueError, match="split"):
        world.captions("test")


def test_pictures(drawn: tuple[list[str], np.ndarray]) -> None:
    _, pictures = drawn
    assert pictures.shape == (1224, 64, 64, 3)
    assert pictures.dtype == np.float32
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    np.testing.assert_allclose(pictures[:, 0, 0], 0.5)


def test_checker_passes_rendered_pictures(drawn: tuple[list[str], np.ndarray]) -> None:
    captions, pictures = drawn
    assert everything_right(pictures, captions) >= 0.995


def test_checker_passes_codec_reconstructions(drawn: tuple[list[str], np.ndarray]) -> None:
    captions, pictures = drawn
    fitted = codec.Codec.fit(torch.from_numpy(pictures), len(world.VOCABULARY), world.TOKENS)
    latents = fitted.encode(torch.from_numpy(pictures))
    assert latents.shape == (1224, 16, 16, 16)
    assert codec.to_model(latents).std() == pytest.approx(1, abs=0.01)
    torch.testing.assert_close(codec.from_model(codec.to_model(latents)), latents)
    decoded = fitted.decode(latents).numpy()
    assert abs(decoded - pictures).mean() < 0.01
    assert everything_right(decoded, captions) >= 0.995


def test_checker_tolerates_noise(drawn: tuple[list[str], np.ndarray]) -> None:
    captions, pictures = drawn
    noise = np.random.default_rng(5).normal(0, 0.03, pictures.shape)
    assert everything_right(pictures + noise, captions) >= 0.995


@pytest.mark.parametrize(
    ("drawn_caption", "failing"),
    [
        ("a blue circle left of a red square", None),  # colours swapped
        ("a blue square left of a red circle", "relation"),  # places swapped
        ("a red circle above a blue square", "relation"),  # wrong axis
        ("a red triangle left of a blue square", "shape"),
        ("a red circle left of a blue circle", "shape"),
        ("a red square left of a blue circle", None),  # shapes swapped
        ("a red circle left of a green square", "colour"),
    ],
)
def test_checker_catches_wrong_pictures(drawn_caption: str, failing: str | None) -> None:
    result = judge(drawn_caption, "a red circle left of a blue square")
    assert not result["everything"]
    if failing:
        wrong = [key for key in ("colour", "shape", "relation") if not result[key]]
        assert wrong == [failing]


def test_checker_catches_every_other_caption(drawn: tuple[list[str], np.ndarray]) -> None:
    captions, pictures = drawn
    rng = np.random.default_rng(11)
    for caption, picture in zip(captions[::8], pictures[::8], strict=True):
        scene = world.parse(caption)
        other = captions[rng.integers(len(captions))]
        same = world.parse(other) in (scene, scene.mirrored())
        assert world.check(picture, other)["everything"] == same


def test_checker_wants_exactly_two_objects() -> None:
    caption = "a red circle left of a blue square"
    picture = world.render(caption, np.random.default_rng(3))
    missing, third = picture.copy(), picture.copy()
    missing[:, 32:] = world.GROUND
    third[:9, 52:] = world.COLOURS["yellow"]
    for wrong in (missing, np.full_like(picture, 0.5)):
        assert not any(world.check(wrong, caption).values())
    # The two largest objects are right; there is one too many.
    failed = [key for key, right in world.check(third, caption).items() if not right]
    assert failed == ["count", "everything"]


def test_checker_doubts_shapeless_and_mixed_objects() -> None:
    caption = "a red square left of a blue square"
    picture = np.full((64, 64, 3), world.GROUND)
    picture[20:44, 4:28] = world.COLOURS["red"]
    picture[20:44, 36:60] = world.COLOURS["blue"]
    assert world.check(picture, caption)["everything"]
    hollow, mixed = picture.copy(), picture.copy()
    hollow[26:38, 10:28] = world.GROUND
    mixed[20:32, 4:28] = world.COLOURS["green"]
    assert not world.check(hollow, caption)["shape"]
    assert not world.check(mixed, caption)["colour"]


def test_every_caption_encodes_and_parses_back(drawn: tuple[list[str], np.ndarray]) -> None:
    captions, _ = drawn
    for caption in captions:
        assert str(world.parse(caption)) == caption
        tokens = world.encode(caption)
        assert tokens.shape == (world.TOKENS,)
        assert " ".join(world.VOCABULARY[i] for i in tokens if i) == caption
    assert not world.encode("").any()


@pytest.mark.parametrize("text", ["a red dragon", "red, circle", world.PADDING])
def test_unknown_words_are_named_with_the_vocabulary(text: str) -> None:
    with pytest.raises(ValueError, match="whole vocabulary") as error:
        world.encode(text)
    assert all(word in str(error.value) for word in world.VOCABULARY[1:])


def test_long_texts_are_refused() -> None:
    assert world.encode("a " * 16).all()
    with pytest.raises(ValueError, match="17 words"):
        world.encode("a " * 17)


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a red circle",
        "a red circle near a blue square",
        "a circle red above a blue square",
        "a red circle above a red circle",
        "the red circle above a blue square",
    ],
)
def test_malformed_captions_are_refused(caption: str) -> None:
    with pytest.raises(ValueError, match="form"):
        world.parse(caption)
