"""The loader: every image once, resumable at any step, whatever the number of workers."""

from __future__ import annotations

import logging
import threading

import numpy as np
import pytest
import torch

from fflfast.data import ArraySplit, DataError, Loader


def array_split(n=50, size=4, channels=3) -> ArraySplit:
    """Image i holds the number i everywhere."""
    images = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, channels, size, size))
    return ArraySplit("numbers", images, np.arange(n) % 7, 7)


class Faulty:
    """Image i holds i plus the crop's epoch; some cannot be read. Two images a task."""

    name, shape, fixed, chunk = "faulty", (3, 2, 2), False, 2

    def __init__(self, n, bad=()):
        self.targets, self.bad, self.reads = torch.arange(n) % 7, set(bad), []

    def __len__(self):
        return len(self.targets)

    def fill(self, views, index, crop):
        failed = {}
        for row, place in enumerate(index.tolist()):
            self.reads.append(place)
            if place in self.bad:
                failed[row] = f"image-{place} cannot be read"
                continue
            for number, view in enumerate(views):
                view[row] = (place + (0 if crop is None else crop.epoch) + 7 * number) % 256
        return failed


def take(loader, epoch=0, start=0):
    return list(loader.epoch(epoch, start))


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True)
    )


@pytest.mark.parametrize("train", [True, False], ids=["train", "test"])
@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("batch_size", [1, 16, 50, 64])
def test_every_image_once_with_its_target(train, workers, batch_size):
    loader = Loader(array_split(), batch_size=batch_size, seed=1, train=train, workers=workers)
    batches = take(loader)
    assert len(batches) == len(loader) == -(-50 // batch_size)
    index = torch.cat([batch.index for batch in batches])
    assert torch.equal(index.sort().values, torch.arange(50))
    assert torch.equal(index, torch.arange(50)) is not train
    for batch in batches:
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape == (len(batch.index), 3, 4, 4)
        assert batch.target.dtype == batch.index.dtype == torch.int64
        assert torch.equal(batch.images[:, 0, 0, 0].long(), batch.index)
        assert torch.equal(batch.target, batch.index % 7)


@pytest.mark.parametrize("split", [array_split(), Faulty(50)], ids=["array", "decoded"])
def test_workers_and_the_step_of_entry_change_nothing(split):
    whole = take(Loader(split, batch_size=8, seed=3, train=True), epoch=5)
    for workers in (0, 1, 4):
        loader = Loader(split, batch_size=8, seed=3, train=True, workers=workers)
        for start in (0, 1, 6, 7):
            assert same(take(loader, 5, start), whole[start:])
    assert not same(take(loader, 6), whole)
    assert not same(take(Loader(split, batch_size=8, seed=4, train=True), 5), whole)


def test_batches_before_the_step_of_entry_are_never_read():
    split = Faulty(50)
    loader = Loader(split, batch_size=8, seed=3, train=True)
    batches = take(loader, 0, 5)
    assert split.reads == torch.cat([batch.index for batch in batches]).tolist()


def test_evaluation_ignores_epoch_and_seed():
    split = Faulty(20)
    first = take(Loader(split, batch_size=8, seed=3, train=False), 0)
    assert same(first, take(Loader(split, batch_size=8, seed=4, train=False), 9))
    assert torch.equal(first[0].images[:, 0, 0, 0], torch.arange(8).byte())


def test_views_come_as_a_tuple():
    images, target, index = take(Loader(Faulty(20), batch_size=8, seed=0, train=True, views=2))[0]
    assert isinstance(images, tuple)
    assert torch.equal(images[1], images[0] + 7)
    assert torch.equal(target, index % 7)
    first, second = take(Loader(array_split(), batch_size=8, seed=0, train=True, views=2))[0].images
    assert torch.equal(first, second)


def test_drop_last():
    loader = Loader(array_split(), batch_size=16, seed=0, train=True, drop_last=True)
    assert [len(batch.index) for batch in take(loader)] == [16, 16, 16]
    assert len(Loader(array_split(48), batch_size=16, seed=0, train=True, drop_last=True)) == 3


@pytest.mark.parametrize("train", [True, False], ids=["train", "test"])
def test_limit_takes_one_subset_from_the_whole_split(train):
    loaders = [Loader(array_split(), batch_size=8, seed=s, train=train, limit=20) for s in (0, 1)]
    seen = [torch.cat([batch.index for batch in take(loader, 3)]) for loader in loaders]
    assert len(seen[0]) == loaders[0].num_images == 20
    assert torch.equal(seen[0].sort().values, seen[1].sort().values)
    assert torch.equal(seen[0], seen[0].sort().values) is not train
    assert seen[0].max() > 35  # not the first ones
    assert Loader(array_split(), batch_size=8, seed=0, train=train, limit=500).num_images == 50


def test_batches_own_their_memory():
    loader = Loader(array_split(), batch_size=50, seed=0, train=False)
    take(loader)[0].images.zero_()
    batch = take(loader)[0]
    batch.target.zero_()
    batch.index.zero_()
    assert torch.equal(take(loader)[0].images[:, 0, 0, 0].long(), torch.arange(50))
    assert torch.equal(take(loader)[0].index, torch.arange(50))


def test_leaving_an_epoch_early_ends_its_threads():
    before = threading.active_count()
    batches = Loader(Faulty(5000), batch_size=8, seed=0, train=True, workers=4).epoch(0)
    next(batches)
    batches.close()
    assert threading.active_count() == before


def test_an_error_in_a_worker_arrives_and_ends_its_threads():
    class Broken(Faulty):
        def fill(self, views, index, crop):
            raise ZeroDivisionError("in a worker")

    before = threading.active_count()
    with pytest.raises(ZeroDivisionError, match="in a worker"):
        take(Loader(Broken(50), batch_size=8, seed=0, train=True, workers=2))
    assert threading.active_count() == before


@pytest.mark.parametrize("workers", [0, 3])
def test_unreadable_images_are_named_counted_and_left_out_of_training(workers, caplog):
    split = Faulty(200, bad=(17, 60))
    loader = Loader(split, batch_size=16, seed=0, train=True, workers=workers, views=2)
    with caplog.at_level(logging.WARNING, "fflfast.data"):
        batches = take(loader) + take(loader, 1)
    assert loader.unreadable == {17: "image-17 cannot be read", 60: "image-60 cannot be read"}
    assert sorted(record.getMessage() for record in caplog.records) == sorted(
        f"faulty: left out image-{place} cannot be read ({count} so far, at most 2)"
        for count, place in enumerate(loader.unreadable, 1)
    )
    for step, (images, target, index) in enumerate(batches):
        assert len(index) == (16 if step % 13 < 12 else 8)  # shapes stay
        assert not set(index.tolist()) & split.bad
        assert torch.equal(images[0][:, 0, 0, 0].long(), index + step // 13)
        assert torch.equal(images[1][:, 0, 0, 0], images[0][:, 0, 0, 0] + 7)
        assert torch.equal(target, index % 7)
    clean = take(Loader(Faulty(200), batch_size=16, seed=0, train=True))
    changed = sum(int((a.index != b.index).sum()) for a, b in zip(batches[:13], clean, strict=True))
    assert changed == 2
    fresh = Loader(split, batch_size=16, seed=0, train=True)
    assert torch.equal(take(fresh, 1, 7)[0].index, batches[13 + 7].index)  # also after resuming


def test_too_many_unreadable_images_end_training():
    loader = Loader(Faulty(200, bad=(1, 2, 3)), batch_size=16, seed=0, train=True)
    with pytest.raises(DataError, match=r"3 of 200 images cannot be read \(at most 2 are left out\).*image-"):
        take(loader)


def test_one_unreadable_image_of_few_is_left_out_and_a_batch_of_them_is_an_error():
    assert len(take(Loader(Faulty(10, bad=[3]), batch_size=4, seed=0, train=True))) == 3
    with pytest.raises(DataError, match=r"no image of a batch of 1 can be read.*image-3"):
        take(Loader(Faulty(10, bad=[3]), batch_size=1, seed=0, train=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_never_replaces_an_image(workers):
    batches = Loader(Faulty(200, bad=[9, 10]), batch_size=8, seed=0, train=False, workers=workers).epoch(0)
    next(batches)
    with pytest.raises(DataError, match=r"evaluation needs every image, but image-9 .*; image-10 "):
        next(batches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected 1 ≤ batch_size"),
        ({"batch_size": 2.0}, "batch_size: expected an int, got 2.0"),
        ({"seed": -1}, "seed: expected 0 ≤ seed"),
        ({"workers": -1}, "workers: expected 0 ≤ workers"),
        ({"limit": 0}, "limit: expected 1 ≤ limit"),
        ({"views": 0}, "views: expected 1 ≤ views"),
        ({"batch_size": 64, "drop_last": True}, "drop_last with batch_size 64 leaves no batch of 50 images"),
        ({"world": 0}, "world: expected 1 ≤ world"),
        ({"rank": -1}, "rank: expected 0 ≤ rank"),
        ({"rank": 2, "world": 2}, r"rank: expected 0 … 1 of 2 processes, got 2"),
        ({"train": False, "world": 2, "lead": True}, "lead: expected False for evaluation"),
    ],
    ids=str,
)
def test_errors(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Loader(array_split(), **({"batch_size": 8, "seed": 0, "train": True} | options))


def test_start_beyond_the_epoch():
    loader = Loader(array_split(), batch_size=8, seed=0, train=True)
    with pytest.raises(ValueError, match=r"start_step: expected 0 … 7 batches of numbers, got 8"):
        loader.epoch(0, 8)
    with pytest.raises(ValueError, match="epoch: expected 0 ≤ epoch"):
        loader.epoch(-1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_pinned_memory_needs_cuda():
    with pytest.raises(ValueError, match="pin_memory: expected a CUDA device, found none"):
        Loader(array_split(), batch_size=8, seed=0, train=True, pin_memory=True)
