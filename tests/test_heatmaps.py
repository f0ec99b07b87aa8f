"""Joints as heatmaps and back."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fflfast.heatmaps import decode_heatmaps, flip_back, flip_order, gaussian_heatmaps


def joints(rows=4, count=3, size=64, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(rows, count, 2, generator=generator, dtype=torch.float64) * (size + 60) - 30
    seen = (torch.rand(rows, count, 1, generator=generator) < 0.8).to(torch.float64)
    return torch.cat([places, seen], -1).to(dtype)


def plainly(target, height, width, image_height, image_width, sigma):
    """The definition, cell by cell: maps and weights as nested numbers in double precision."""
    maps = torch.zeros(*target.shape[:2], height, width, dtype=torch.float64)
    weights = torch.zeros(*target.shape[:2], dtype=torch.float64)
    for b, j in ((b, j) for b in range(len(target)) for j in range(target.shape[1])):
        x, y, seen = target[b, j].tolist()
        if not seen > 0:
            continue
        column = math.floor((x + 0.5) * width / image_width - 0.5 + 0.5)
        row = math.floor((y + 0.5) * height / image_height - 0.5 + 0.5)
        for r, c in ((r, c) for r in range(height) for c in range(width)):
            if abs(r - row) <= 3 * sigma and abs(c - column) <= 3 * sigma:
                weights[b, j] = 1
                maps[b, j, r, c] = math.exp(-((r - row) ** 2 + (c - column) ** 2) / (2 * sigma**2))
    return maps, weights


@pytest.mark.parametrize(("size", "sigma"), [((16, 16), 2.0), ((16, 20), 1.0), ((9, 7), 0.7)])
def test_targets_are_the_definition(size, sigma):
    target = joints()
    maps, weights = gaussian_heatmaps(target, size, (64, 80), sigma=sigma)
    expected = plainly(target, *size, 64, 80, sigma)
    torch.testing.assert_close(maps, expected[0], rtol=1e-12, atol=0)
    assert torch.equal(weights, expected[1])
    assert 0 < weights.mean() < 1
    single, _ = gaussian_heatmaps(target.float(), size, (64, 80), sigma=sigma)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), maps, rtol=1e-5, atol=1e-7)


def test_what_is_not_seen_has_no_map_wherever_it_lies():
    places = [[math.nan, math.inf, 0], [30, 30, 0], [30, 30, -1], [-500, 30, 1], [30, 1e9, 1], [30, 30, 2]]
    maps, weights = gaussian_heatmaps(torch.tensor([places]), (16, 16), 64)
    assert weights.tolist() == [[0, 0, 0, 0, 0, 1]]
    assert maps.flatten(2).amax(-1).tolist() == [[0, 0, 0, 0, 0, 1]]


def test_a_joint_outside_shows_as_long_as_its_gaussian_does():
    """Cells of 4 pixels, σ = 2: cell −6 is the last one to the left whose Gaussian has a cell on the map."""
    left = torch.tensor([[[(-6 + 0.5) * 4 - 0.5, 30, 1], [(-7 + 0.5) * 4 - 0.5, 30, 1]]])
    maps, weights = gaussian_heatmaps(left, (16, 16), 64)
    assert weights.tolist() == [[1, 0]]
    torch.testing.assert_close(maps[0, 0].max().item(), math.exp(-36 / 8), rtol=1e-6, atol=0)


def test_coordinates_come_back_to_half_a_cell():
    target = joints(rows=16, size=63)
    target[..., :2].clamp_(0, 63)
    target[..., 2] = 1
    places, scores = decode_heatmaps(gaussian_heatmaps(target, (16, 16), 64)[0], 64)
    assert places.dtype == scores.dtype == torch.float32
    assert (places - target[..., :2]).abs().max() <= 2 + 1e-3
    assert torch.equal(scores, torch.ones_like(scores))


def test_a_cell_stands_for_the_middle_of_its_pixels_and_moves_a_quarter_uphill():
    maps = torch.zeros(1, 4, 6, 8)
    maps[0, 0, 2, 3] = 1.0  # alone
    maps[0, 1, 2, 3], maps[0, 1, 2, 4], maps[0, 1, 1, 3] = 1.0, 0.5, 0.25  # right and up
    maps[0, 2, 2, 3], maps[0, 2, 2, 2], maps[0, 2, 3, 3] = -1.0, -2.0, -3.0
    maps[0, 2] -= 2 * (maps[0, 2] == 0) * 2.5  # all negative: left is −2 against −5, below −3 against −5
    maps[0, 3, 0, 3], maps[0, 3, 0, 4] = 1.0, 0.5  # on the border
    places, scores = decode_heatmaps(maps, (12, 24))
    cells = torch.tensor([[3, 2], [3.25, 1.75], [2.75, 2.25], [3, 0]])
    pixels = (cells + 0.5) * torch.tensor([24 / 8, 12 / 6]) - 0.5
    torch.testing.assert_close(places[0], pixels)
    assert scores.tolist() == [[1, 1, -1, 1]]


def test_maps_of_a_mirrored_image_lie_on_those_of_the_image_without_a_shift():
    """Joints inside their cells: a mirrored image has each joint in the mirrored cell, left and right swapped."""
    target = joints(rows=8, count=4)
    target[..., :2] = (target[..., :2] / 4).floor() * 4 + 0.3 * target[..., :2] % 1 * 3
    mirrored = target.clone()
    mirrored[..., 0] = 63 - mirrored[..., 0]
    order = flip_order(4, [(0, 2)])
    assert order.tolist() == [2, 1, 0, 3]
    maps, _ = gaussian_heatmaps(target, (16, 16), 64)
    other, _ = gaussian_heatmaps(mirrored[:, order], (16, 16), 64)
    assert maps.any()
    assert torch.equal(flip_back(other, order), maps)


def test_no_batch_and_no_word_to_the_host():
    maps, weights = gaussian_heatmaps(torch.zeros(0, 3, 3), (8, 8), 32)
    places, scores = decode_heatmaps(maps, 32)
    assert (maps.shape, weights.shape, places.shape, scores.shape) == ((0, 3, 8, 8), (0, 3), (0, 3, 2), (0, 3))
    with FakeTensorMode():  # raises where a value would have to be read
        maps, _ = gaussian_heatmaps(torch.rand(2, 3, 3), (8, 8), 32)
        places, _ = decode_heatmaps(flip_back(maps, torch.tensor([2, 1, 0])), 32)
        assert places.shape == (2, 3, 2)


def test_what_does_not_fit_is_named():
    with pytest.raises(TypeError, match=r"floating-point tensor \(B, J, 3\), got torch.int64"):
        gaussian_heatmaps(torch.zeros(1, 2, 3, dtype=torch.int64), (8, 8), 32)
    with pytest.raises(ValueError, match=r"x, y, visible, got \(1, 2\)"):
        gaussian_heatmaps(torch.zeros(1, 2), (8, 8), 32)
    with pytest.raises(ValueError, match="sigma must be greater than 0, got 0"):
        gaussian_heatmaps(torch.zeros(1, 2, 3), (8, 8), 32, sigma=0)
    with pytest.raises(ValueError, match="size must be positive"):
        gaussian_heatmaps(torch.zeros(1, 2, 3), (0, 8), 32)
    with pytest.raises(ValueError, match="heatmaps must be"):
        decode_heatmaps(torch.zeros(1, 2, 0, 8), 32)
    with pytest.raises(ValueError, match=r"joints must be in \[0, 3\), got the pair \(0, 3\)"):
        flip_order(3, [(0, 3)])
    with pytest.raises(ValueError, match="one pair only"):
        flip_order(3, [(0, 1), (1, 2)])
