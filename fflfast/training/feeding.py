"""Where a run's images come from, and for what: a set that lies on the device, or batches that threads load."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_map

from ..data import Batch, DataBundle, Loader, ResidentLoader, Split, prefetch, resident_bytes
from ..tasks import Task, task_of
from .config import ConfigError, ResolvedConfig
from .processes import SINGLE, Processes

__all__ = ["Feed", "check_residence", "evaluation_feed", "memory_budget", "task_for", "training_feed"]

TEST_BATCH_SIZE = 256
"""Images in a test batch: one number for every test, since it may decide the last bit of a logit."""

_SHARE_OF_MEMORY = 8


def task_for(config: ResolvedConfig, data: DataBundle) -> Task:
    """Return the task of a run: what its data asks for, with the run's augmentation."""
    return task_of(
        data.task,
        data.num_classes,
        seed=config.seed,
        mixup=config.mixup,
        cutmix=config.cutmix,
        pad=config.pad,
        flip=config.flip,
        keypoints=data.keypoints,
        image_size=data.image_size,
        rotation=config.rotation,
        scale=config.scale,
        flip_test=config.flip_test,
    )


class Feed:
    """A loader and the way of its batches to the device.

    Attributes:
        loader: what is read; `len()` and `images(step)` say how many steps and images an epoch has.
        resident: whether the set lies on the device.
    """

    def __init__(self, loader: Loader | ResidentLoader, device: torch.device) -> None:
        self.loader = loader
        self.device = device
        self.resident = isinstance(loader, ResidentLoader)

    def inputs(self, epoch: int, start_step: int = 0) -> Iterator[Any]:
        """Yield what `batch` makes a batch of, on the device: batches, or places in a set that lies there."""
        inputs = self.loader.inputs(epoch, start_step)
        return inputs if self.resident else prefetch(inputs, self.device)

    def sample(self, most: int) -> list[Any]:
        """Return copies of the first inputs, those of batches as large as the very first: ``most`` at most."""
        loader = self.loader
        alike = sum(loader.images(step) == loader.images(0) for step in range(min(len(loader), most)))
        # Copies, since a batch holds only until the next one is asked for.
        return [tree_map(torch.clone, inputs) for _, inputs in zip(range(alike), self.inputs(0), strict=False)]

    @property
    def batch(self) -> Callable[[Any], Batch]:
        """Turns one of the `inputs` into a batch by operations of the device alone."""
        return self.loader.batch


def training_feed(
    config: ResolvedConfig, split: Split, device: torch.device, processes: Processes, *, lead: bool, views: int = 1
) -> Feed:
    """Return the training images of one process.

    Args:
        config: of the run.
        split: the training images.
        device: where they go.
        processes: those that share every batch.
        lead: add the neighbour that mixing needs.
        views: how many crops of each image a step takes. A split whose images are the same at every reading gives them
            once: there views differ by augmentation alone.
    """
    images = len(split) if config.limit_train is None else min(config.limit_train, len(split))
    return _feed(
        split,
        device,
        config.data_on,
        workers=config.workers,
        batch_size=config.batch_size,
        seed=config.seed,
        train=True,
        drop_last=images % config.batch_size == 1,  # batch normalisation cannot train on a single image
        limit=config.limit_train,
        rank=processes.rank,
        world=processes.count,
        lead=lead and processes.count > 1,
        views=views,
    )


def evaluation_feed(
    split: Split,
    device: torch.device,
    *,
    data_on: str = "auto",
    workers: int = 0,
    limit: int | None = None,
    processes: Processes = SINGLE,
) -> Feed:
    """Return the test images of one process: whole batches in file order, whatever the number of processes."""
    return _feed(
        split,
        device,
        data_on,
        workers=workers,
        batch_size=TEST_BATCH_SIZE,
        seed=0,
        train=False,
        limit=limit,
        rank=processes.rank,
        world=processes.count,
    )


def _feed(split: Split, device: torch.device, data_on: str, *, workers: int, views: int = 1, **options: Any) -> Feed:
    size = resident_bytes(split, options["limit"])
    fits = size is not None and size <= memory_budget(device)
    if data_on == "device" or (data_on == "auto" and fits):
        return Feed(ResidentLoader(split, device=device, **options), device)
    pin, views = device.type == "cuda", 1 if split.fixed else views
    return Feed(Loader(split, workers=workers, views=views, pin_memory=pin, **options), device)


def check_residence(data_on: str, data: DataBundle) -> None:
    """Raise ConfigError where data that is decoded as it is read shall lie on a device."""
    for split in (data.train, data.test):
        if data_on == "device" and resident_bytes(split) is None:
            raise ConfigError(
                f"--data-on device: {split.name} is decoded from files and cannot lie on a device; leave it away"
            )


def memory_budget(device: torch.device) -> int:
    """Return how many bytes of the memory that a device computes in a data set may take by itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // _SHARE_OF_MEMORY
    if not hasattr(os, "sysconf"):
        return 1 << 30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // _SHARE_OF_MEMORY
