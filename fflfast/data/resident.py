"""A loader whose images lie on the training device, so that a batch is a gather there and nothing crosses a bus."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .batch import Batch, DataError, Split
from .sampler import Sampler

__all__ = ["ResidentLoader", "resident_bytes"]

_CHUNK = 1024  # images that are on the host at a time


def resident_bytes(split: Split, limit: int | None = None) -> int | None:
    """Return how many bytes a `ResidentLoader` of a split, or of ``limit`` of its images, takes on its device.

    None for splits that cannot lie there: those whose images are decoded or cropped when they are read.
    """
    if not split.fixed:
        return None
    channels, height, width = split.shape
    count = len(split) if limit is None else min(limit, len(split))
    target = split.targets[0].numel() * split.targets.itemsize
    return count * (channels * height * width + target + torch.int64.itemsize)  # image, target and place


class ResidentLoader(Sampler):
    """Batches of a split that lies on a device as a whole: the same as those of `Loader`, byte for byte.

    The images are copied there once, as uint8 and in their final size. An epoch's order follows once an epoch; the
    ``inputs`` of a step are a slice of it, and `batch` gathers their images by operations of the device alone, so that
    a whole step from its inputs on can be captured in a CUDA graph.

    Args:
        split: whose images are ``fixed``, see `resident_bytes`.
        device: where the images go.
        batch_size, seed, train, drop_last, limit, rank, world, lead: see `Loader`.

    Raises:
        TypeError, ValueError: an argument out of range, no batch at all, or a split that cannot lie on a device.
        DataError: images that cannot be read.
    """

    def __init__(
        self,
        split: Split,
        *,
        device: torch.device | str,
        batch_size: int,
        seed: int,
        train: bool,
        drop_last: bool = False,
        limit: int | None = None,
        rank: int = 0,
        world: int = 1,
        lead: bool = False,
    ) -> None:
        super().__init__(
            split, batch_size=batch_size, seed=seed, train=train, drop_last=drop_last, limit=limit,
            rank=rank, world=world, lead=lead,
        )  # fmt: skip
        if resident_bytes(split) is None:
            raise ValueError(f"{split.name}: its images are made when they are read; take Loader in place of this")
        self.device = torch.device(device)
        self._images = torch.empty((self.num_images, *split.shape), dtype=torch.uint8, device=self.device)
        for places, target in zip(self.places.split(_CHUNK), self._images.split(_CHUNK), strict=True):
            read = torch.empty(target.shape, dtype=torch.uint8, device="cpu")
            failed = split.fill([read], places, None)
            if failed:
                raise DataError(f"{split.name}: {'; '.join(failed.values())}; restore or remove the file")
            target.copy_(read)
        self._targets = split.targets[self.places].to(self.device)
        self._places = self.places.to(self.device)

    def inputs(self, epoch: int, start_step: int = 0) -> Iterator[Tensor]:
        """Iterate over what a step is given: int64 (B,) on the device, of which `batch` makes the batch.

        Args:
            epoch: ≥ 0; decides the order when training.
            start_step: 0 … len(loader).

        Raises:
            ValueError: start_step beyond the epoch.
        """
        order, spans = self.rows(epoch, start_step)
        if self.device.type == "cuda":
            order = order.pin_memory()  # so that the copy waits for nothing; its memory is kept until it is done
        order = order.to(self.device, non_blocking=self.device.type == "cuda")
        return (order[start:stop] for start, stop in spans)

    def batch(self, inputs: Tensor) -> Batch:
        """Gather the batch of a step's inputs: uint8 (B, C, H, W), target and index (B,), on the device."""
        images, target, index = (table.index_select(0, inputs) for table in (self._images, self._targets, self._places))
        return Batch(images, target, index)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Iterate over the batches of an epoch, from ``start_step`` on; arguments and errors as for `inputs`."""
        return map(self.batch, self.inputs(epoch, start_step))
