"""Data order and crop boxes: pure functions of their counters, with the right distributions."""

from __future__ import annotations

import math

import pytest
import torch

from fflfast.data import permutation, random_resized_crop_boxes


def boxes(count=1, size=(100, 150), *, epoch=0, view=0, seed=1, **options):
    sizes = torch.tensor([size]).expand(count, -1)
    return random_resized_crop_boxes(torch.arange(count), sizes, seed=seed, epoch=epoch, view=view, **options)


def test_order_is_what_it_was():
    """These values may never change: runs resume with them, on any machine and version."""
    assert permutation(10, seed=1, epoch=2).tolist() == [4, 2, 0, 6, 1, 5, 9, 8, 7, 3]
    assert permutation(5, seed=2**63 - 1, epoch=0).tolist() == [1, 3, 2, 4, 0]


def test_boxes_are_what_they_were():
    index = torch.tensor([0, 1, 1_281_166])
    sizes = torch.tensor([[375, 500], [500, 333], [2000, 1500]])
    got = random_resized_crop_boxes(index, sizes, seed=1, epoch=2, view=0)
    assert got.tolist() == [[20, 152, 346, 330], [247, 140, 147, 188], [22, 23, 1857, 1406]]


@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_every_item_once(n):
    order = permutation(n, seed=3, epoch=4)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(n))


def test_orders_differ_by_seed_and_epoch_and_are_uniform():
    orders = {tuple(permutation(20, seed=s, epoch=e).tolist()) for s in range(20) for e in range(20)}
    assert len(orders) == 400
    counts = torch.zeros(4, 4)
    for epoch in range(4000):
        counts[torch.arange(4), permutation(4, seed=0, epoch=epoch)] += 1
    assert (((counts - 1000) ** 2) / 1000).sum() < 34  # 9 degrees of freedom, 10⁻⁴


def test_boxes_depend_on_their_own_counters_alone():
    sizes = torch.tensor([[100, 150], [40, 40], [300, 20]])
    together = random_resized_crop_boxes(torch.tensor([5, 6, 7]), sizes, seed=1, epoch=2, view=3)
    for row in range(3):
        alone = random_resized_crop_boxes(torch.tensor([5 + row]), sizes[row : row + 1], seed=1, epoch=2, view=3)
        assert torch.equal(alone[0], together[row])
    first = boxes(50)
    for other in (boxes(50, epoch=1), boxes(50, view=1), boxes(50, seed=2)):
        assert (first != other).any(1).sum() > 45


def test_boxes_follow_the_distribution():
    top, left, height, width = boxes(4000).double().T
    assert (height >= 1).all()
    assert (width >= 1).all()
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 100).all()
    assert (left + width <= 150).all()
    ratio = width / height
    assert ((ratio > 0.70) & (ratio < 1.42)).all()  # sides are rounded
    # Boxes up to 100·100·3/4 pixels always fit, so below half of the area nothing is rejected.
    area = height * width / 15_000
    below = area[area < 0.5]
    assert abs(below.mean().item() - 0.29) < 0.01
    small = area < 0.45
    assert abs(ratio[small].log().mean().item()) < 0.015
    assert ratio[small].log().var().item() == pytest.approx(math.log(4 / 3) ** 2 / 3, rel=0.06)
    assert abs((top / (100 - height))[small].mean().item() - 0.5) < 0.03
    assert abs((left / (150 - width))[small].mean().item() - 0.5) < 0.03


@pytest.mark.parametrize(
    ("size", "want"),
    [((1, 1), [0, 0, 1, 1]), ((400, 2), [198, 0, 3, 2]), ((2, 400), [0, 198, 2, 3])],
    ids=["one pixel", "tall", "wide"],
)
def test_where_no_box_fits_the_largest_central_one_is_taken(size, want):
    assert boxes(1, size, scale=(1.0, 1.0))[0].tolist() == want


def test_whole_image_on_request():
    assert boxes(1, (50, 50), scale=(1.0, 1.0), ratio=(1.0, 1.0))[0].tolist() == [0, 0, 50, 50]


def test_no_box():
    assert boxes(0).shape == (0, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: permutation(-1, seed=0, epoch=0), "n: expected 0 ≤ n"),
        (lambda: permutation(3, seed=-1, epoch=0), "seed: expected 0 ≤ seed"),
        (lambda: permutation(3, seed=0, epoch=2**63), "epoch: expected 0 ≤ epoch"),
        (lambda: permutation(3, seed=0.5, epoch=0), "seed: expected an int, got 0.5"),
        (lambda: boxes(2, (0, 5)), "smallest size 0"),
        (lambda: boxes(2, (5, 5), scale=(0.0, 1.0)), "scale: expected 0 < smallest"),
        (lambda: boxes(2, (5, 5), ratio=(2.0, 1.0)), "ratio: expected 0 < smallest"),
        (lambda: boxes(2, (5, 5), view=-1), "view: expected 0 ≤ view"),
        (
            lambda: random_resized_crop_boxes(torch.zeros(2), torch.ones(2, 2).long(), seed=0, epoch=0),
            "index: expected an int64 tensor, got torch.float32",
        ),
        (
            lambda: random_resized_crop_boxes(torch.arange(3), torch.ones(2, 2).long(), seed=0, epoch=0),
            r"shape \(B, 2\), got \(3,\) and \(2, 2\)",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
