"""The synthetic data sets: pure functions of their arguments, learnable, and small in memory whatever their number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_data_sets import everything

from fflfast.data import Loader, arrays, open_data


def test_synthetic_depends_on_its_seed_and_can_be_learnt():
    first, again, other = (open_data("synthetic", seed=s) for s in (1, 1, 2))
    assert (first.num_classes, len(first.train), len(first.test), first.image_size) == (10, 1024, 256, 32)
    assert np.array_equal(first.train.images, again.train.images)
    assert not np.array_equal(first.train.images, other.train.images)
    images, target = everything(first.test)
    centres = np.stack([first.train.images[first.train.targets == k].mean(0) for k in range(10)])
    nearest = ((images[:, None] - centres) ** 2).sum((2, 3, 4)).argmin(1)
    assert (nearest == target).mean() > 0.99
    assert first.train.images.std() == pytest.approx(first.std[0], rel=0.1)
    assert open_data("synthetic", image_size=48).train.shape == (3, 48, 48)


def test_synthetic_pixels_are_what_they_were():
    images = open_data("synthetic", seed=1).train.images
    assert images[:2, 1, 5, :4].tolist() == [[140, 107, 121, 35], [103, 16, 75, 113]]
    assert int(images.astype(np.int64).sum()) == 393_013_426


def test_synthetic_imagenet_repeats_one_image_a_class():
    bundle = open_data("synthetic-imagenet", image_size=4)
    assert (bundle.name, bundle.num_classes, len(bundle.train), len(bundle.test)) == (
        "synthetic-imagenet", 1000, 12_800, 1000,
    )  # fmt: skip
    assert bundle.recipe == {"pad": 0, "flip": True}
    assert bundle.train.images.images.nbytes == 1000 * 3 * 4 * 4
    loader = Loader(bundle.train, batch_size=1600, seed=0, train=True)
    for images, target, index in loader.epoch(0):
        assert torch.equal(target, index % 1000)
        assert np.array_equal(images.numpy(), bundle.train.images.images[target.numpy()])
    own, again = (open_data("synthetic-imagenet", image_size=4, seed=s).train.images.images for s in (0, 1))
    assert np.array_equal(own, bundle.train.images.images)
    assert not np.array_equal(own, again)
    assert not np.array_equal(own, everything(bundle.test)[0])


def test_distinct_images_are_those_of_a_small_synthetic_set():
    few = arrays.synthetic(8, num_classes=5, num_train=20, num_test=5)
    many = arrays.synthetic(8, num_classes=5, num_train=1000, num_test=5, distinct=20)
    assert np.array_equal(many.train.images[np.arange(40, 60)], few.train.images)
    with pytest.raises(ValueError, match="distinct: expected a multiple of the 5 classes, got 12"):
        arrays.synthetic(8, num_classes=5, distinct=12)
