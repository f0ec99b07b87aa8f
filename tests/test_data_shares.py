"""Shares of several processes: together the batches of one, and a resident loader gives the same as one that reads."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest
import torch
from test_data_loader import Faulty, array_split, same, take

from fflfast.data import ArraySplit, DataError, Loader, ResidentLoader, resident_bytes, share
from fflfast.ops.augment import mix


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 5, 6, 7, 16, 17, 128])
def test_shares_cover_a_batch_in_order_and_leave_no_image_alone(n, world):
    shares = [share(n, rank, world) for rank in range(world)]
    assert shares[0][0] == 0
    assert shares[-1][1] == n
    assert all(before[1] == after[0] for before, after in itertools.pairwise(shares))
    sizes = [stop - start for start, stop in shares]
    active = max(1, min(world, n // 2))
    assert sizes[active:] == [0] * (world - active)
    assert max(sizes[:active]) - min(sizes[:active]) <= 1
    assert n < 2 or min(sizes[:active]) >= 2


def loaders(kind, split, world, **options):
    make = Loader if kind == "loader" else lambda split, **rest: ResidentLoader(split, device="cpu", **rest)
    return [make(split, seed=3, rank=rank, world=world, **options) for rank in range(world)]


@pytest.mark.parametrize("kind", ["loader", "resident"])
@pytest.mark.parametrize("world", [2, 3, 7])
@pytest.mark.parametrize("options", [{}, {"limit": 23}, {"drop_last": True}], ids=str)
def test_shares_of_training_make_the_batches_of_one_process(kind, world, options):
    split = array_split()
    whole = take(Loader(split, batch_size=8, seed=3, train=True, **options), 5)
    parts = loaders(kind, split, world, batch_size=8, train=True, **options)
    for start in (0, 2):
        taken = [take(loader, 5, start) for loader in parts]
        for step, (want, *got) in enumerate(zip(whole[start:], *taken, strict=True), start):
            assert same([want], [tuple(map(torch.cat, zip(*got, strict=True)))])
            assert [loader.images(step) for loader in parts] == [len(want.index)] * world
            sizes = [share(len(want.index), rank, world) for rank in range(world)]
            assert [len(batch.index) for batch in got] == [stop - first for first, stop in sizes]
            assert {batch.images.shape[1:] for batch in got} == {(3, 4, 4)}


@pytest.mark.parametrize("kind", ["loader", "resident"])
@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_a_leading_row_is_the_image_before_in_the_whole_batch(kind, world):
    split = array_split()
    whole = take(Loader(split, batch_size=8, seed=3, train=True), 5)
    for start in (0, 3):
        taken = [take(p, 5, start) for p in loaders(kind, split, world, batch_size=8, train=True, lead=True)]
        for want, *got in zip(whole[start:], *taken, strict=True):
            before = want.index.roll(1)
            for rank, batch in enumerate(got):
                first, stop = share(len(want.index), rank, world)
                lead = before[first : first + 1] if world > 1 and first < stop else before[:0]
                assert torch.equal(batch.index, torch.cat([lead, want.index[first:stop]]))
                assert torch.equal(batch.images[:, 0, 0, 0].long(), batch.index)
                assert torch.equal(batch.target, batch.index % 7)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("alphas", [{"mixup_alpha": 1.0}, {"cutmix_alpha": 1.0}], ids=str)
def test_mixing_behind_a_leading_row_is_mixing_the_whole_batch(world, alphas):
    def mixed(batch, step):
        return mix(batch.images.float(), batch.target, 7, seed=1, epoch=5, step=step, **alphas)

    options = {"batch_size": 8, "seed": 3, "train": True}
    parts = [take(p, 5) for p in loaders("loader", array_split(), world, batch_size=8, train=True, lead=True)]
    for step, (whole, *own) in enumerate(zip(take(Loader(array_split(), **options), 5), *parts, strict=True)):
        shares = [tuple(part[1:] for part in mixed(batch, step)) for batch in own]
        for got, wanted in zip(zip(*shares, strict=True), mixed(whole, step), strict=True):
            assert torch.equal(torch.cat(got), wanted)


@pytest.mark.parametrize("kind", ["loader", "resident"])
@pytest.mark.parametrize("world", [2, 3, 9])
@pytest.mark.parametrize("options", [{}, {"limit": 23}, {"drop_last": True}], ids=str)
def test_evaluation_deals_whole_batches(kind, world, options):
    split = array_split()
    whole = take(Loader(split, batch_size=8, seed=0, train=False, **options))
    parts = loaders(kind, split, world, batch_size=8, train=False, **options)
    rounds = list(zip(*(take(loader) for loader in parts), strict=True))
    assert len(rounds) == len(parts[0]) == -(-len(whole) // world)
    dealt = [batch for batches in rounds for batch in batches]
    assert same(dealt[: len(whole)], whole)
    assert all(batch.images.shape == (0, 3, 4, 4) and batch.target.shape == (0,) for batch in dealt[len(whole) :])
    for step, batches in enumerate(rounds):
        assert parts[-1].images(step) == sum(len(batch.index) for batch in batches)
    with pytest.raises(ValueError, match=f"step: expected 0 … {len(rounds) - 1} of numbers, got {len(rounds)}"):
        parts[0].images(len(rounds))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_share_that_is_decoded_has_the_crops_of_its_epoch(workers):
    for rank in range(3):
        options = {"batch_size": 16, "seed": 3, "train": True, "rank": rank, "world": 3, "lead": True}
        decoded = take(Loader(Faulty(50), workers=workers, **options), 2)
        for batch, plain in zip(decoded, take(Loader(array_split(size=2), **options), 2), strict=True):
            assert torch.equal(batch.images, plain.images + 2)
            assert torch.equal(batch.index, plain.index)


def test_an_unreadable_image_is_replaced_from_its_own_share(caplog):
    split = Faulty(200, bad=(17, 60))
    options = {"batch_size": 16, "seed": 0, "train": True}
    clean = take(Loader(Faulty(200), **options))
    with caplog.at_level(logging.WARNING, "fflfast.data"):
        parts = [take(Loader(split, rank=rank, world=2, **options)) for rank in (0, 1)]
    replaced = 0
    for want, *got in zip(clean, *parts, strict=True):
        for rank, batch in enumerate(got):
            own = want.index[slice(*share(len(want.index), rank, 2))]
            assert set(batch.index.tolist()) == set(own.tolist()) - split.bad
            assert torch.equal(batch.images[:, 0, 0, 0].long(), batch.index)
            replaced += int((batch.index != own).sum())
    assert replaced == 2
    with pytest.raises(DataError, match="evaluation needs every image, but image-17"):
        [take(Loader(split, rank=rank, world=2, batch_size=16, seed=0, train=False)) for rank in (0, 1)]


# ---- images that lie on the device


@pytest.mark.parametrize("train", [True, False], ids=["train", "test"])
@pytest.mark.parametrize("limit", [None, 23, 500])
def test_a_resident_loader_gives_what_a_loader_gives(train, limit):
    options = {"batch_size": 8, "seed": 3, "train": train, "limit": limit}
    split = array_split()
    resident, loader = ResidentLoader(split, device="cpu", **options), Loader(split, **options)
    assert (len(resident), resident.num_images) == (len(loader), loader.num_images)
    for epoch, start in ((0, 0), (4, 2), (4, len(loader))):
        assert same(take(resident, epoch, start), take(loader, epoch, start))
    inputs = list(resident.inputs(4))
    assert all(rows.dtype == torch.int64 and rows.dim() == 1 for rows in inputs)
    assert len({rows.untyped_storage().data_ptr() for rows in inputs}) == 1  # one tensor an epoch, cut into views
    assert same([resident.batch(rows) for rows in inputs], take(loader, 4))
    assert same([loader.batch(batch) for batch in loader.inputs(4)], take(loader, 4))


def test_resident_images_are_resized_once_to_the_same_bytes(monkeypatch):
    monkeypatch.setattr("fflfast.data.resident._CHUNK", 100)
    pixels = np.random.default_rng(0).integers(0, 256, (250, 1, 8, 8), dtype=np.uint8)
    split = ArraySplit("small", pixels, np.arange(250) % 7, 7, image_size=20)
    options = {"batch_size": 64, "seed": 3, "train": True}
    assert same(take(ResidentLoader(split, device="cpu", **options)), take(Loader(split, **options)))


def test_a_resident_batch_is_its_receivers():
    loader = ResidentLoader(array_split(), device="cpu", batch_size=50, seed=0, train=False)
    for part in take(loader)[0]:
        part.zero_()
    assert torch.equal(take(loader)[0].images[:, 0, 0, 0].long(), torch.arange(50))
    assert torch.equal(take(loader)[0].index, torch.arange(50))


def test_resident_bytes_are_those_that_lie_on_the_device():
    split = array_split()
    for limit, count in ((None, 50), (23, 23), (500, 50)):
        loader = ResidentLoader(split, device="cpu", batch_size=8, seed=0, train=True, limit=limit)
        tensors = (loader._images, loader._targets, loader._places)
        assert {len(t) for t in tensors} == {count}
        assert resident_bytes(split, limit) == sum(t.nbytes for t in tensors)
    resized = ArraySplit("small", np.zeros((4, 1, 8, 8), dtype=np.uint8), np.zeros(4), 1, image_size=32)
    assert resident_bytes(resized) == 4 * (32 * 32 + 16)
    assert resident_bytes(Faulty(5)) is None
    with pytest.raises(ValueError, match="faulty: its images are made when they are read"):
        ResidentLoader(Faulty(5), device="cpu", batch_size=2, seed=0, train=True)


def test_resident_errors():
    loader = ResidentLoader(array_split(), device="cpu", batch_size=8, seed=0, train=True)
    with pytest.raises(ValueError, match=r"start_step: expected 0 … 7 batches of numbers, got 8"):
        loader.epoch(0, 8)
    with pytest.raises(ValueError, match="epoch: expected 0 ≤ epoch"):
        loader.inputs(-1)
    with pytest.raises(ValueError, match="drop_last with batch_size 64 leaves no batch of 50 images"):
        ResidentLoader(array_split(), device="cpu", batch_size=64, seed=0, train=True, drop_last=True)
