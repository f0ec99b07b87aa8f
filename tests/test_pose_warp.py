"""Rotating, zooming and mirroring: against float64 interpolation, and byte for byte against itself."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import grid_sample

from fflfast.ops.counters import FLIP, ROTATION, ZOOM, below, hash_words
from fflfast.ops.warp import warp

ORDER = torch.tensor([1, 0, 2])


def sample(batch=12, size=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)
    points = torch.rand(batch, 3, 3, generator=generator) * (size - 1)
    points[..., 2] = 1
    return images, points, torch.randint(0, 10**6, (batch,), generator=generator)


def drawn(index, rotation, scale, flip, **where):
    """Angle in radians, zoom and sign of each image, in float64."""
    key = hash_words(where.get("seed", 0), where.get("epoch", 0), index, where.get("view", 0))
    share = [(2 * below(key, stream, 4096).double() + 1) / 4096 - 1 for stream in (ROTATION, ZOOM)]
    sign = 1 - 2 * below(key, FLIP, 2).double() if flip else torch.ones(len(index), dtype=torch.float64)
    return share[0] * math.radians(rotation), 1 + scale * share[1], sign


def matrices(index, rotation, scale, flip, **where):
    angle, zoom, sign = drawn(index, rotation, scale, flip, **where)
    rows = [[sign * angle.cos(), -sign * angle.sin()], [angle.sin(), angle.cos()]]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2) * zoom[:, None, None]


@pytest.mark.parametrize(
    ("size", "rotation", "scale", "flip"), [(32, 30, 0.25, True), (33, 180, 0, False), (64, 0, 0.75, True)]
)
def test_pixels_are_bilinear_within_one_grey_level(size, rotation, scale, flip):
    images, points, index = sample()
    got, _ = warp(
        images, points, index, size, seed=3, epoch=5, view=1, rotation=rotation, scale=scale, flip=flip, order=ORDER
    )
    matrix = matrices(index, rotation, scale, flip, seed=3, epoch=5, view=1)
    offset = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    grid = torch.stack(torch.meshgrid(offset, offset, indexing="xy"), dim=-1)
    source = torch.einsum("bij,yxj->byxi", torch.linalg.inv(matrix), grid) + 23.5
    want = grid_sample(images.double(), source / 23.5 - 1, padding_mode="zeros", align_corners=True)
    assert got.shape == (12, 3, size, size)
    assert (got - want).abs().max() < 1
    assert (got - want).abs().mean() < 0.3


def test_points_go_where_the_pixels_go():
    """A white dot of each joint is found where the moved joint is, in each image that still shows it."""
    images, points, index = sample(40, 64)
    images.zero_()
    points[..., :2] = points[..., :2].round()
    for row in range(40):
        for channel in range(3):  # a joint's dot in a channel of its own, with a slope that leads to it
            x, y = points[row, channel, :2]
            far = torch.maximum((torch.arange(64) - x).abs(), (torch.arange(64)[:, None] - y).abs())
            images[row, channel] = (250 - 25 * far).clamp(min=0).to(torch.uint8)
    got, moved = warp(images, points, index, 48, seed=1, epoch=2, rotation=40, scale=0.3, flip=True, order=ORDER)
    _, _, sign = drawn(index, 40, 0.3, True, seed=1, epoch=2)
    seen = 0
    for row in range(40):
        for channel in range(3):
            joint = int(ORDER[channel]) if sign[row] < 0 else channel
            x, y, visible = moved[row, joint].tolist()
            if visible and 2 <= x <= 45 and 2 <= y <= 45:
                value, place = got[row, channel].flatten().max(0)
                assert value > 200
                assert math.hypot(int(place) % 48 - x, int(place) // 48 - y) < 1
                seen += 1
    assert seen > 50
    assert 5 < (sign < 0).sum() < 35


def test_points_against_float64():
    images, points, index = sample(200)
    _, moved = warp(images, points, index, 40, seed=0, epoch=9, rotation=60, scale=0.5, flip=True, order=ORDER)
    matrix = matrices(index, 60, 0.5, True, epoch=9)
    want = torch.einsum("bij,bkj->bki", matrix, points[..., :2].double() - 23.5) + 19.5
    mirrored = matrix[:, 0, 0] * matrix[:, 1, 1] - matrix[:, 0, 1] * matrix[:, 1, 0] < 0
    want = torch.where(mirrored[:, None, None], want[:, ORDER], want)
    inside = ((want > -0.5) & (want < 39.5)).all(dim=-1)
    assert torch.equal(moved[..., 2] > 0, inside)
    assert (moved[..., :2] - want)[inside].abs().max() < 2e-3
    assert not moved[~inside].any()
    assert 100 < inside.sum() < 500


def test_all_off_is_the_middle():
    images, points, index = sample()
    got, moved = warp(images, points, index, 32, seed=0, epoch=0, order=ORDER)
    assert torch.equal(got, images[:, :, 8:40, 8:40])
    inside = ((points[..., :2] >= 7.5) & (points[..., :2] < 39.5)).all(dim=-1)
    assert torch.equal(moved[..., 2] > 0, inside)
    assert (moved[..., :2] - (points[..., :2] - 8))[inside].abs().max() < 1e-3


def test_a_mirror_alone_mirrors_exactly_and_swaps_joints():
    images, points, index = sample()
    points[0, 0, 2] = 0
    got, moved = warp(images, points, index, 48, seed=0, epoch=0, flip=True, order=ORDER)
    _, _, sign = drawn(index, 0, 0, True)
    for row, mirrored in enumerate((sign < 0).tolist()):
        want = images[row].flip(-1) if mirrored else images[row]
        assert torch.equal(got[row], want)
        joints = points[row].clone()
        if mirrored:
            joints[:, 0] = 47 - joints[:, 0]
            joints = joints[ORDER]
        joints *= joints[:, 2:]
        assert (moved[row] - joints).abs().max() < 1e-3
    assert {True, False} == set((sign < 0).tolist())


def test_the_same_bytes_whatever_the_batch():
    images, points, index = sample()
    options = {"seed": 7, "epoch": torch.tensor(3), "rotation": 30.0, "scale": 0.25, "flip": True, "order": ORDER}
    whole = warp(images, points, index, 36, **options)
    for row in (0, 5, 11):
        one = warp(images[row : row + 1], points[row : row + 1], index[row : row + 1], 36, **options)
        assert torch.equal(one[0][0], whole[0][row])
        assert torch.equal(one[1][0], whole[1][row])
    strided = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(warp(strided, points, index, 36, **options)[0], whole[0])
    other = warp(images, points, index, 36, **options, view=1)[0]
    assert all(not torch.equal(a, b) for a, b in zip(other, whole[0], strict=True))
    empty = warp(images[:0], points[:0], index[:0], 36, **options)
    assert [tuple(part.shape) for part in empty] == [(0, 3, 36, 36), (0, 3, 3)]


def test_the_bytes_are_these():
    """What every device and every version makes of these integers; a change here changes every run."""
    place = np.arange(40)
    images = torch.from_numpy((place[:, None] * 37 ^ place * 11).astype(np.uint8)).expand(4, 1, 40, 40)
    points = torch.tensor([[4.0, 30.5, 1.0], [20.25, 10.0, 1.0], [33.0, 33.0, 1.0]]).expand(4, 3, 3)
    got, moved = warp(
        images, points, torch.arange(4), 28, seed=2, epoch=1, rotation=30.0, scale=0.25, flip=True, order=ORDER
    )
    digests = [hashlib.sha256(part.contiguous().numpy().tobytes()).hexdigest()[:16] for part in (got, moved)]
    assert digests == ["f026bdad26edb390", "ac3d28a04b4807ea"]


def test_points_that_are_no_numbers_are_unseen():
    images, points, index = sample(2)
    points[0, 0] = torch.tensor([math.nan, 1.0, 1.0])
    points[0, 1] = torch.tensor([1e30, math.inf, 1.0])
    points[1, 2] = torch.tensor([math.nan, math.nan, 0.0])
    _, moved = warp(images, points, index, 48, seed=0, epoch=0, order=ORDER)
    assert not moved[0, :2].any()
    assert not moved[1, 2].any()
    assert moved[0, 2, 2] == 1


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"images": torch.zeros(2, 3, 8, 8)}, "images: expected uint8"),
        ({"points": torch.zeros(2, 3, 3, dtype=torch.int64)}, "points: expected float"),
        ({"points": torch.zeros(1, 3, 3)}, "points: expected"),
        ({"index": torch.zeros(2)}, "index: expected int64"),
        ({"order": torch.zeros(2, dtype=torch.int64)}, "order: expected int64"),
        ({"size": 0}, "size: expected"),
        ({"rotation": 181.0}, "rotation: expected 0 to 180"),
        ({"rotation": math.nan}, "rotation: expected 0 to 180"),
        ({"scale": 0.8}, "scale: expected 0 to 0.75"),
        ({"seed": -1}, "seed: expected"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, match):
    arguments = {
        "images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
        "points": torch.zeros(2, 3, 3),
        "index": torch.arange(2),
        "size": 8,
        "seed": 0,
        "epoch": 0,
        "order": ORDER,
    }
    with pytest.raises((TypeError, ValueError), match=match):
        warp(**arguments | change)
