"""Batches on their way to a real GPU, with streams that are held up at random."""

from __future__ import annotations

import random

import pytest
import torch
from test_data_loader import array_split, same, take

from fflfast.data import Batch, Loader, ResidentLoader, prefetch
from fflfast.data.prefetch import _copy_stream

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = torch.device("cuda", 0)


def host(batch):
    return Batch(*(part.cpu() for part in batch))


@pytest.mark.parametrize("held_up", ["copies", "consumer", "both"])
def test_every_batch_arrives_while_streams_are_held_up(held_up):
    loader = Loader(array_split(250, size=16), batch_size=8, seed=1, train=True, pin_memory=True, workers=2)
    draw = random.Random(0)
    seen = []
    want = take(loader, 1)
    for batch in prefetch(loader.inputs(1), CUDA):
        if held_up in ("consumer", "both"):
            torch.cuda._sleep(draw.randrange(2_000_000))
        seen.append(Batch(*(part.clone() for part in batch)))
        if held_up in ("copies", "both"):
            with torch.cuda.stream(_copy_stream(CUDA)):
                torch.cuda._sleep(draw.randrange(2_000_000))
    assert same([host(batch) for batch in seen], want)


def test_the_host_never_waits():
    loader = Loader(array_split(250, size=16), batch_size=8, seed=1, train=True, pin_memory=True)
    resident = ResidentLoader(array_split(250, size=16), device=CUDA, batch_size=8, seed=1, train=True)
    take(resident)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sums = [batch.images.sum() for batch in prefetch(loader.inputs(0), CUDA)]
        same_sums = [resident.batch(rows).images.sum() for rows in prefetch(resident.inputs(0), CUDA)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(torch.stack(sums), torch.stack(same_sums))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_for_a_gpu_lie_in_page_locked_memory(workers):
    options = {"batch_size": 8, "seed": 1, "train": True, "workers": workers}
    pinned = take(Loader(array_split(), pin_memory=True, views=2, **options))
    for batch, plain in zip(pinned, take(Loader(array_split(), views=2, **options)), strict=True):
        assert all(part.is_pinned() for part in (*batch.images, batch.target, batch.index))
        assert same([(*batch.images, *batch[1:])], [(*plain.images, *plain[1:])])


def test_leaving_early_leaves_no_copy_behind():
    loader = Loader(array_split(250, size=64), batch_size=8, seed=1, train=True, pin_memory=True)
    for _ in range(20):
        with torch.cuda.stream(_copy_stream(CUDA)):
            torch.cuda._sleep(5_000_000)
        ahead = prefetch(loader.inputs(0), CUDA)
        next(ahead)
        ahead.close()
        reused = [torch.full((8, 3, 64, 64), 7, dtype=torch.uint8, device=CUDA) for _ in range(4)]
        torch.cuda.synchronize()
        assert all(bool((memory == 7).all()) for memory in reused)


def test_a_resident_loader_gives_the_bytes_of_a_loader():
    split = array_split(100, size=8)
    for train, options in ((True, {"lead": True, "rank": 1, "world": 2}), (False, {"limit": 30})):
        options = {"batch_size": 16, "seed": 3, "train": train} | options
        resident = ResidentLoader(split, device=CUDA, **options)
        assert same([host(batch) for batch in resident.epoch(2)], take(Loader(split, **options), 2))
