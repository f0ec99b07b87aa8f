"""The loader: batches of an epoch, in an order and with crops that are pure functions of (seed, epoch)."""

from __future__ import annotations

import contextlib
import logging
import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from .batch import Batch, CropKey, DataError, Split
from .order import check_counter
from .sampler import Sampler

__all__ = ["Loader"]

_log = logging.getLogger("fflfast.data")

_AHEAD = 2  # batches in preparation while one is in use
_MAX_BAD_SHARE = 0.01


class Loader(Sampler):
    """Batches of a split: shuffled every epoch to train, in file order to evaluate.

    Batch ``step`` of ``epoch`` is a pure function of (seed, epoch, step): neither the number of
    workers nor where an epoch was entered changes a byte, so that resuming needs only those two
    numbers. Workers are threads; images that must be decoded are decoded in them, two batches
    ahead.

    An image that cannot be read is named in a warning (logger ``fflfast.data``) and counted in
    ``unreadable``. When training, another image of the same batch takes its row, its target and its
    index with it (of this process's share, where there are several), so that shapes stay; more than
    1 % of the split (and more than one file) is an error. When evaluating, the first one is an error.

    Args:
        split: what to read.
        batch_size: images a batch, over all processes, ≥ 1; the last batch of an epoch may be smaller.
        seed: ≥ 0; not used for evaluation.
        train: whether to shuffle and to crop at random.
        workers: threads; 0 reads in the calling thread.
        drop_last: leave out a last batch that is smaller than the others.
        limit: use only this many images, drawn once over the whole split, the same for every seed;
            None for all.
        views: how many views of each image a batch holds (a tuple if more than one).
        pin_memory: allocate batches in page-locked memory, so that copies to a CUDA device need not
            wait.
        rank, world: which of how many processes this one is: when training it gets its `share` of
            each batch, when evaluating the whole batches rank, rank + world, …; a batch may be empty.
        lead: when training, put one row before each share that is not empty: the image before it in
            the whole batch, cyclically, for methods that mix neighbours. None where world is 1.

    Attributes:
        unreadable: {place in the split: what is wrong with which file}.

    Raises:
        TypeError, ValueError: an argument out of range, or no batch at all.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        seed: int,
        train: bool,
        workers: int = 0,
        drop_last: bool = False,
        limit: int | None = None,
        views: int = 1,
        pin_memory: bool = False,
        rank: int = 0,
        world: int = 1,
        lead: bool = False,
    ) -> None:
        super().__init__(
            split, batch_size=batch_size, seed=seed, train=train, drop_last=drop_last, limit=limit,
            rank=rank, world=world, lead=lead,
        )  # fmt: skip
        check_counter("workers", workers)
        check_counter("views", views, 1)
        self.workers, self.views, self.pin_memory = workers, views, pin_memory
        self.unreadable: dict[int, str] = {}
        if pin_memory and not torch.cuda.is_available():
            raise ValueError("pin_memory: expected a CUDA device, found none; leave it off")

    def inputs(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Iterate over what a step is given, from ``start_step`` on: here the batches themselves.

        Args:
            epoch: ≥ 0; decides order and crops when training.
            start_step: 0 … len(loader); the batches before it are never read.

        Raises:
            ValueError: start_step beyond the epoch.
            DataError: images cannot be read, see the class.
        """
        order, spans = self.rows(epoch, start_step)
        crop = CropKey(self.seed, epoch) if self.train else None
        return self._batches([self.places[order[start:stop]] for start, stop in spans], crop)

    def batch(self, inputs: Batch) -> Batch:
        """Return the batch that a step's inputs stand for: here the same."""
        return inputs

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Iterate over the batches of an epoch, from ``start_step`` on; arguments and errors as for `inputs`."""
        return self.inputs(epoch, start_step)

    def _batches(self, chosen: list[Tensor], crop: CropKey | None) -> Iterator[Batch]:
        if not self.workers:
            for index in chosen:
                pending = _Pending(self, index)
                pending.read(crop, None)
                yield pending.result()
            return
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="fflfast-data")
        with contextlib.ExitStack() as stack:
            stack.callback(pool.shutdown, wait=True, cancel_futures=True)
            queue: deque[_Pending] = deque()
            for index in chosen:
                queue.append(_Pending(self, index))
                queue[-1].read(crop, pool)
                if len(queue) > _AHEAD:
                    yield queue.popleft().result()
            while queue:
                yield queue.popleft().result()


class _Pending:
    """A batch whose images are being written."""

    def __init__(self, loader: Loader, index: Tensor) -> None:
        self.loader = loader
        self.index = index
        shape = (len(index), *loader.split.shape)
        self.views = [
            torch.empty(shape, dtype=torch.uint8, device="cpu", pin_memory=loader.pin_memory)
            for _ in range(loader.views)
        ]
        self.parts: list[tuple[int, Future[dict[int, str]]]] = []
        self.failed: dict[int, str] = {}

    def read(self, crop: CropKey | None, pool: ThreadPoolExecutor | None) -> None:
        split, size = self.loader.split, len(self.index)
        if not size:
            return
        if pool is None:
            self.failed = split.fill(self.views, self.index, crop)
            return
        chunk = split.chunk or size
        for start in range(0, size, chunk):
            part = slice(start, start + chunk)
            views = [view[part] for view in self.views]
            self.parts.append((start, pool.submit(split.fill, views, self.index[part], crop)))

    def result(self) -> Batch:
        for start, part in self.parts:
            self.failed.update({start + row: reason for row, reason in part.result().items()})
        index = self._repair() if self.failed else self.index
        images = self.views[0] if len(self.views) == 1 else tuple(self.views)
        target = self.loader.split.targets[index]
        if self.loader.pin_memory:
            target, index = target.pin_memory(), index.pin_memory()
        return Batch(images, target, index)

    def _repair(self) -> Tensor:
        """Give each unreadable image's row to the next readable one of the batch, or raise."""
        loader, size = self.loader, len(self.index)
        if not loader.train:
            raise DataError(
                f"{loader.split.name}: evaluation needs every image, but "
                f"{'; '.join(self.failed.values())}; restore or remove the file"
            )
        most = max(1, math.floor(_MAX_BAD_SHARE * loader.num_images))
        for row, reason in sorted(self.failed.items()):
            place = int(self.index[row])
            if place not in loader.unreadable:
                loader.unreadable[place] = reason
                _log.warning(
                    "%s: left out %s (%d so far, at most %d)",
                    loader.split.name,
                    reason,
                    len(loader.unreadable),
                    most,
                )
        if len(loader.unreadable) > most:
            raise DataError(
                f"{loader.split.name}: {len(loader.unreadable)} of {loader.num_images} images cannot be read "
                f"(at most {most} are left out), the last: {reason}; restore or remove the files"
            )
        if len(self.failed) == size:
            raise DataError(
                f"{loader.split.name}: no image of a batch of {size} can be read, the last: {reason}; "
                "restore or remove the files, or choose a larger batch_size"
            )
        index = self.index.clone()
        for row in self.failed:
            other = next(r % size for r in range(row + 1, row + size) if r % size not in self.failed)
            index[row] = index[other]
            for view in self.views:
                view[row] = view[other]
        return index
