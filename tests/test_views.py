"""Several augmentations of each image in one step: where they come from, and that they stay aligned."""

from __future__ import annotations

import pytest
import torch
from steps import CPU, Alone, batches, bits, freeze_norms, gradients, make, rows, same_bits
from test_data_loader import Faulty
from torch.utils._pytree import tree_map

from fflfast.data import Batch, Loader, ResidentLoader
from fflfast.methods import FFL
from fflfast.ops.augment import augment, mix, normalization_table, normalize
from fflfast.tasks import Classification, task_of
from fflfast.training import TrainConfig, resolve
from fflfast.training.feeding import training_feed
from fflfast.training.processes import SINGLE


class Viewing(FFL):
    """FFL whose sub-networks each see an augmentation of their own."""

    def __init__(self, cohort, num_classes, options=None):
        super().__init__(cohort, num_classes, options)
        self.num_views = len(cohort)


VIEWING = {"method": f"{__name__}:Viewing"}
TABLE = normalization_table((127.0,) * 3, (64.0,) * 3)
AT = {"epoch": torch.tensor(3), "step": torch.tensor(2)}


def uint8_batch(size=9, views=1):
    generator = torch.Generator().manual_seed(0)
    images = tuple(
        torch.randint(256, (size, 3, 8, 8), dtype=torch.uint8, generator=generator) for _ in range(views)
    )  # fmt: skip
    target = torch.randint(5, (size,), generator=generator)
    return Batch(images[0] if views == 1 else images, target, torch.arange(size) * 7)


@pytest.mark.parametrize("channels_last", [False, True])
def test_each_view_is_an_augmentation_of_its_own_and_the_first_is_the_only_one(channels_last):
    task, batch = Classification(5, seed=4, pad=2, flip=True), uint8_batch()
    ready = task.training_batch(batch, TABLE, **AT, views=3, channels_last=channels_last)
    for view, images in enumerate(ready.images):
        own = augment(batch.images, batch.index, seed=4, epoch=3, view=view, pad=2, flip=True, table=TABLE)
        assert torch.equal(images, own)
        assert images.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert not torch.equal(ready.images[0], ready.images[1])
    one = task.training_batch(batch, TABLE, **AT, views=1, channels_last=channels_last)
    assert same_bits(bits([one.images]), bits([ready.images[0]]))
    assert torch.equal(one.target, batch.target)
    assert torch.equal(one.index, batch.index)


@pytest.mark.parametrize("alphas", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
@pytest.mark.parametrize("channels_last", [False, True])
def test_all_views_are_mixed_alike(alphas, channels_last):
    """By hand from the unmixed views: one target is right for all of them."""
    batch = uint8_batch(views=2)
    plain, task = (Classification(5, seed=4, pad=2, flip=True, **a) for a in ({}, alphas))
    unmixed = plain.training_batch(batch, TABLE, **AT, views=2, channels_last=channels_last)
    mixed = task.training_batch(batch, TABLE, **AT, views=2, channels_last=channels_last)
    options = {f"{name}_alpha": alpha for name, alpha in alphas.items()}
    for view, images in zip(unmixed.images, mixed.images, strict=True):
        by_hand, target = mix(view, batch.target, 5, seed=4, **AT, **options)
        assert torch.equal(images, by_hand)
        assert torch.equal(mixed.target, target)
        assert images.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert mixed.target.shape == (9, 5)


def test_views_that_were_cropped_apart_stay_apart():
    task, batch = Classification(5), uint8_batch(views=2)
    ready = task.training_batch(batch, TABLE, **AT, views=2, channels_last=False)
    for images, view in zip(ready.images, batch.images, strict=True):
        assert torch.equal(images, normalize(view, TABLE))


def test_a_step_hands_every_sub_network_its_view():
    step, seen = make(**VIEWING), []
    assert step.learner.cohort.trunk is not None  # which gets all views at once
    step.learner.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].images))
    (batch,) = batches(step, 1)
    output = step(batch, epoch=1, step=0)
    single = make()
    single.learner.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].images))
    single(batch, epoch=1, step=0)
    assert [len(seen[0]), len(output.logits["sub1"])] == [2, 24]
    assert same_bits(bits([seen[0][0]]), bits([seen[1]]))
    assert not torch.equal(seen[0][0], seen[0][1])


@pytest.mark.parametrize("trunk", ["auto", "none"])
def test_parts_and_shares_cut_every_view(trunk):
    """Norms keep their statistics, so that parts and the shares of two processes add up to the whole batch."""
    options = {**VIEWING, "trunk": trunk, "dtype": torch.float64, "prepare": freeze_norms}
    whole, parted = make(**options), make(**options, accumulate=5)
    shares = [make(**options, processes=Alone(rank, 2)) for rank in range(2)]
    seen = [gradients(step) for step in (whole, parted, *shares)]
    (batch,) = batches(whole, 1)
    whole(batch, epoch=0, step=0)
    parted(batch, epoch=0, step=0)
    for step, part in zip(shares, (rows(batch, 0, 9), rows(batch, 9, 24)), strict=True):
        step(part, epoch=0, step=0, images=24)
    for name, gradient in seen[0].items():
        torch.testing.assert_close(seen[1][name], gradient, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close((seen[2][name] + seen[3][name]) / 2, gradient, rtol=1e-9, atol=1e-12)


def test_the_leading_row_is_dropped_from_every_view():
    whole, second = make(**VIEWING, mixup=0.5), make(**VIEWING, mixup=0.5, processes=Alone(1, 2))
    (batch,) = batches(whole, 1)
    seen = []
    for step in (whole, second):
        step.learner.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    whole(batch, epoch=0, step=4)
    second(rows(batch, 11, 24), epoch=0, step=4, images=24, lead=1)
    for mine, all_ in zip(seen[1].images, seen[0].images, strict=True):
        assert torch.equal(mine, all_[12:])
    assert torch.equal(seen[1].target, seen[0].target[12:])


@pytest.mark.parametrize("data_on", ["host", "device"])
def test_what_is_the_same_at_every_reading_is_read_once(data_on):
    """The feed gives one image for all views; a loader that gives each its own copy comes to the same bytes."""
    config, data, _ = resolve(TrainConfig(data="synthetic", image_size=8, pad=1, arch=["tiny"] * 2, data_on=data_on))
    feed = training_feed(config, data.train, CPU, SINGLE, lead=False, views=2)
    assert isinstance(feed.loader, ResidentLoader if data_on == "device" else Loader)
    batch = feed.batch(next(iter(feed.inputs(1))))
    assert isinstance(batch.images, torch.Tensor)
    twice = Loader(data.train, batch_size=config.batch_size, seed=config.seed, train=True, views=2)
    task = Classification(10, pad=1, flip=True)
    ready = [
        task.training_batch(each, TABLE, epoch=torch.tensor(1), step=torch.tensor(0), views=2, channels_last=False)
        for each in (batch, next(iter(twice.epoch(1))))
    ]
    assert same_bits(bits(ready[0].images), bits(ready[1].images))
    assert torch.equal(ready[0].target, ready[1].target)


def test_what_is_cropped_as_it_is_read_comes_once_a_view():
    config, _, _ = resolve(TrainConfig(data="synthetic", image_size=8, pad=1, arch=["tiny"] * 2, batch_size=8))
    feed = training_feed(config, Faulty(50), CPU, SINGLE, lead=False, views=3)
    (inputs,) = feed.sample(1)
    assert isinstance(inputs, Batch)
    assert [image.shape for image in inputs.images] == [(8, 3, 2, 2)] * 3
    assert same_bits(bits(tree_map(torch.clone, inputs.images)), bits(next(iter(feed.inputs(0))).images))


def test_a_task_that_does_not_exist():
    with pytest.raises(ValueError, match="expected classification or pose, got 'detection'"):
        task_of("detection", 3)
    with pytest.raises(ValueError, match="task pose: expected the keypoints"):
        task_of("pose", 14)
