"""The checks of test_gpu_large.py on few elements: they pass what is right and find a single wrong row."""

from __future__ import annotations

import pytest
import torch
from large import (
    assert_augment,
    assert_fusion,
    assert_loss,
    draw_fusion,
    draw_logits,
    images_around,
    parts,
    run_augment,
    run_fusion,
    run_loss,
)

from fflfast import DistillGraph
from fflfast.ops import fusion_reference

FFL = DistillGraph.ffl(2)
FUSION = {"chunk": 5, "spots": (0, 6, 7, 10, 11)}


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_wrong_row_of_a_gradient_is_found(reduction):
    logits, target = draw_logits(3, 23, 40, "cpu")
    found = run_loss(logits, target, FFL, reduction)
    check = (logits, target, FFL, reduction)
    assert_loss(found, *check, chunk=4)
    for k, row in ((0, 0), (2, 22), (1, 9)):
        wrong = [g.clone() for g in found.gradients]
        wrong[k][row] = wrong[k][row - 1]
        with pytest.raises(AssertionError, match=f"gradient {k}, row {row} of 23"):
            assert_loss(found._replace(gradients=wrong), *check, chunk=4)
    missing = [g.clone() for g in found.gradients]
    missing[0][8].zero_()
    with pytest.raises(AssertionError, match="gradient 0, row 8"):
        assert_loss(found._replace(gradients=missing), *check, chunk=4)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_wrong_loss_is_found(reduction):
    logits, target = draw_logits(3, 23, 40, "cpu")
    found = run_loss(logits, target, FFL, reduction)
    without_a_row = run_loss([z[:-1] for z in logits], target[:-1], FFL, "mean")
    wrong = found.loss.roll(1) if reduction == "none" else without_a_row.loss
    for change in ({"loss": wrong}, {"terms": without_a_row.terms}):
        with pytest.raises(AssertionError):
            assert_loss(found._replace(**change), logits, target, FFL, reduction, chunk=4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_a_wrong_image_of_a_fusion_is_found(layout):
    f = draw_fusion(12, (5, 3), 6, 4, "cpu", layout)
    found = run_fusion(fusion_reference.STAGES, f)
    assert_fusion(found, f, **FUSION)
    for name in ("y", "pooled", "inferred"):
        wrong = getattr(found, name).clone()
        wrong[-1] = wrong[-2]
        with pytest.raises(AssertionError):
            assert_fusion(found._replace(**{name: wrong}), f, **FUSION)
    for k in range(2):
        wrong = [g.clone() for g in found.gradients]
        wrong[k][7] = wrong[k][6]
        with pytest.raises(AssertionError, match=f"gradient of map {k}"):
            assert_fusion(found._replace(gradients=wrong), f, **FUSION)


@pytest.mark.parametrize(
    "name", ["moments1", "moments2", "sums1", "sums2", "pointwise_gradient", "depthwise_gradient", "active"]
)
def test_sums_without_an_image_are_found(name):
    """As a kernel leaves them that loses the last image of twelve."""
    f = draw_fusion(12, (5, 3), 6, 4, "cpu")
    found = run_fusion(fusion_reference.STAGES, f)
    short = f._replace(maps=[x[:-1] for x in f.maps], grad=f.grad[:-1])
    wrong = found.active.roll(1, 1) if name == "active" else getattr(run_fusion(fusion_reference.STAGES, short), name)
    with pytest.raises(AssertionError):
        assert_fusion(found._replace(**{name: wrong}), f, **FUSION)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_wrong_image_of_an_augmentation_is_found(channels_last):
    images, index, options, got = run_augment(11, 8, "cpu", channels_last=channels_last)
    assert_augment(images, index, options, got, chunk=3)
    for row in (0, 7, 10):
        wrong = got.clone()
        wrong[row] = wrong[row - 1]
        with pytest.raises(AssertionError, match=f"image {row} of 11"):
            assert_augment(images, index, options, wrong, chunk=3)


def test_parts_leave_nothing_out():
    assert parts(7, 3) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert parts(6, 3) == [slice(0, 3), slice(3, 6)]


def test_images_around_places():
    assert images_around((0,), (10,), 9) == [0, 1, 7, 8]
    assert images_around((50, 85), (10,), 100) == [0, 1, 4, 5, 6, 7, 8, 9, 98, 99]
    assert images_around((2**31,), (2**14, 2**15), 2**17 + 1) == [0, 1, 2**16 - 1, 2**16, 2**16 + 1, 2**17 - 1, 2**17]
