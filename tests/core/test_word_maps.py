"""The Attention Report's maps of areas, context windows and tiles lie where they belong."""

import sys

import comfy.sample
import numpy as np
import pytest
import torch
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from PIL import Image

import nodes
from support import tiny
from support.reports import report_on
from support.tiny import sample

REPORT = sys.modules["taca_pack.taca.report"]
MAPS = sys.modules["taca_pack.taca.word_maps"]
heat_maps = sys.modules["taca_pack.nodes.report"].heat_maps
SIDE = 16
"""Rows and columns of the latents: 8 x 8 tokens."""


@pytest.fixture
def model(folder, apply_taca):
    return apply_taca(tiny.load(folder, "flux"), 1.5, 0.0)


def reported(model, positive, size=(SIDE, SIDE), add=lambda model: model):
    """A report on token 1 of the prompt in a run of one step, from the same noise."""
    report = report_on({"a": [1]}, 7, lambda: tiny.conditioning("flux", 7)[0][0])
    sample(add(REPORT.watched(model, report)), "flux", 1, positive=positive, size=size)
    return report


def area(height, width, top, left):
    """The prompt in a part of the picture; sides in latents."""
    sides = (8 * width, 8 * height, 8 * left, 8 * top)
    return nodes.ConditioningSetArea().append(tiny.conditioning("flux", 7), *sides, 1.0)[0]


def percent(height, width, top, left):
    sides = (each / SIDE for each in (width, height, left, top))
    prompt = tiny.conditioning("flux", 7)
    return nodes.ConditioningSetAreaPercentage().append(prompt, *sides, 1.0)[0]


def masked(height, width, top, left):
    mask = torch.zeros(1, 8 * SIDE, 8 * SIDE)
    mask[:, 8 * top : 8 * (top + height), 8 * left : 8 * (left + width)] = 1
    prompt = tiny.conditioning("flux", 7)
    return nodes.ConditioningSetMask().append(prompt, mask, "mask bounds", 1.0)[0]


@pytest.mark.parametrize("part", [area, percent, masked])
def test_an_area_is_at_its_place(model, part):
    report = reported(model, [*tiny.conditioning("flux", 7, seed=4), *part(8, 8, 4, 8)])
    [(found, is_whole)] = report.word_maps()
    assert is_whole
    seen = torch.zeros(8, 8, dtype=torch.bool)
    seen[2:6, 4:] = True
    assert torch.equal(found[0].isfinite(), seen)
    expected = torch.stack(report.maps).mean(0)
    torch.testing.assert_close(found[:, 2:6, 4:], expected)
    blue = torch.tensor([0, 0, 200], dtype=torch.uint8)
    sheet = heat_maps(report, Image.new("RGB", (128, 128), tuple(blue.tolist())))
    drawn = torch.from_numpy(np.array(sheet))[-136:-8, 8:136]  # within the sheet's margins
    outside = torch.ones(128, 128, dtype=torch.bool)
    outside[24:104, 56:] = False  # with the width over which the heat fades out
    assert (drawn[outside] == blue).all()
    assert (drawn[40:88, 72:] != blue).any(-1).all()


def test_two_areas_of_one_size_are_two_places(model):
    """ComfyUI puts them in one batch; each shows a part of its own."""
    left, right = area(16, 8, 0, 0), area(16, 8, 0, 8)
    [(both, _)] = reported(model, [*left, *right]).word_maps()
    for part, columns in ((left, slice(0, 4)), (right, slice(4, 8))):
        [(alone, _)] = reported(model, part).word_maps()
        assert alone.isfinite().sum() == 32
        torch.testing.assert_close(both[..., columns], alone[..., columns], atol=1e-6, rtol=1e-4)


def test_an_area_over_the_whole_prompt(model):
    """Where both show the picture, their mean."""
    whole, part = tiny.conditioning("flux", 7), area(8, 8, 8, 0)
    [(both, _)] = reported(model, [*whole, *part]).word_maps()
    [(expected, _)], [(of_part, _)] = (reported(model, p).word_maps() for p in (whole, part))
    expected[:, 4:, :4] = (expected + of_part)[:, 4:, :4] / 2
    torch.testing.assert_close(both, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("schedule", ["standard_static", "looped_uniform"])
def test_context_windows_are_where_they_see_the_noise(model, dim, schedule):
    """Over a tall or wide picture, also with the row that newer cores add in front of a window."""
    how = {"context_length": 10, "context_overlap": 4, "context_stride": 1, "freenoise": False}
    how |= {"closed_loop": True, "fuse_method": "pyramid", "context_schedule": schedule}
    size = (24, 8) if dim == 2 else (8, 24)
    noise = comfy.sample.prepare_noise(torch.zeros(1, 16, *size), 3)
    seen = []

    def add(model):
        model = ContextWindowsManualNode.execute(model, dim=dim, **how).result[0]

        def keep(apply, given):
            x = given["input"][:1]
            apart = (x.unsqueeze(dim + 1) - noise.unsqueeze(dim)).abs()
            apart = apart.amax((0, 1, 4 if dim == 2 else 2))
            assert apart.amin(1).max() < 1e-5
            seen.append(tuple(apart.argmin(1).tolist()))
            return apply(given["input"], given["timestep"], **given["c"])

        model.set_model_unet_function_wrapper(keep)
        return model

    report = reported(model, tiny.conditioning("flux", 7), size, add)
    across = tuple(range(8))
    expected = [(own, across) if dim == 2 else (across, own) for own in seen]
    assert [*dict.fromkeys(report.places)] == [*dict.fromkeys(expected)]
    [(found, is_whole)] = report.word_maps()
    assert is_whole
    assert found.isfinite().all()


def test_tiles_that_nobody_explains(model):
    """Another node cuts the latents: their place is not known, and the report says so."""

    def add(model):
        model = model.clone()

        def halves(apply, given):
            parts = given["input"].chunk(2, 2)
            return torch.cat([apply(x, given["timestep"], **given["c"]) for x in parts], 2)

        model.set_model_unet_function_wrapper(halves)
        return model

    report = reported(model, tiny.conditioning("flux", 7), add=add)
    [(found, is_whole)] = report.word_maps()
    assert not is_whole
    assert found.shape == (1, 4, 8)
    heat_maps(report, None)


def test_maps_of_other_grids_are_put_together():
    """Of a sparse whole, a finer part that begins at an odd row, and one over the edge."""
    whole = (1, 16, 12, 8)
    everything = tuple(range(12)), tuple(range(8))
    part = tuple(range(3, 9)), tuple(range(4, 8))
    wrapped = (10, 11, 0, 1), tuple(range(8))
    maps = [
        (torch.full((1, 3, 2), 1.0), everything),
        (torch.full((1, 3, 2), 4.0), part),
        (torch.full((1, 2, 4), 7.0), wrapped),
    ]
    found = MAPS.joined(maps, whole)
    expected = torch.ones(6, 4)
    expected[1:4, 2:] = 2.5
    expected[[0, 5]] = 4.0
    torch.testing.assert_close(found[0], expected)
    [only] = MAPS.joined(maps[:1], whole)
    assert torch.equal(only, torch.ones(3, 2))
