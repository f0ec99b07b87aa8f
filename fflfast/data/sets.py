"""Opening a data set by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from .arrays import digits, synthetic, synthetic_imagenet
from .batch import DataBundle, DataError
from .cifar import cifar
from .coco_keypoints import coco_keypoints
from .fashion_mnist import fashion_mnist
from .folder import imagefolder
from .lspet import lspet
from .order import check_counter

__all__ = ["available", "open_data", "task_of"]

_FROM_FILES: dict[str, Callable[..., DataBundle]] = {
    "cifar10": partial(cifar, "cifar10"),
    "cifar100": partial(cifar, "cifar100"),
    "coco-keypoints": coco_keypoints,
    "fashion_mnist": fashion_mnist,
    "imagefolder": imagefolder,
    "lspet": lspet,
}
_EMBEDDED = ("digits", "synthetic", "synthetic-imagenet")
_POSE = ("coco-keypoints", "lspet")


def available() -> tuple[str, ...]:
    """Return the names that `open_data` takes."""
    return tuple(sorted((*_FROM_FILES, *_EMBEDDED)))


def task_of(name: str) -> str:
    """Return for which task a data set is, by its name alone: pose, else classification."""
    return "pose" if name in _POSE else "classification"


def open_data(
    name: str,
    data_dir: str | Path | None = None,
    *,
    download: bool = False,
    image_size: int | None = None,
    seed: int = 0,
) -> DataBundle:
    """Open a data set's training and test splits.

    Args:
        name: ``digits``, ``synthetic`` and ``synthetic-imagenet`` need no files; ``fashion_mnist``, ``cifar10``,
            ``cifar100``, ``imagefolder``, ``lspet`` and ``coco-keypoints`` read them from ``data_dir``.
        data_dir: the folder of the files, or the folder that holds that folder. None only where a
            default exists.
        download: fetch missing files into data_dir, checked against published checksums; nothing is
            fetched otherwise.
        image_size: side of the square images, in pixels, ≥ 1; None for the data set's own (imagefolder: 224,
            lspet: 128, coco-keypoints: 256).
        seed: of the synthetic data sets; no other depends on it.

    Raises:
        ValueError: an unknown name, or options that do not fit it.
        DataError: files that are missing or damaged, named, with the remedy.
    """
    if name not in available():
        close = difflib.get_close_matches(str(name), available(), 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"expected one of {', '.join(available())}, got {name!r}{hint}")
    if image_size is not None:
        check_counter("image_size", image_size, 1)
    check_counter("seed", seed)
    if name in _EMBEDDED:
        if data_dir is not None:
            raise ValueError(f"{name} reads no files; leave out --data-dir {str(data_dir)!r} or choose other data")
        if name == "digits":
            return digits(image_size)
        return (synthetic if name == "synthetic" else synthetic_imagenet)(image_size, seed=seed)
    folder = None if data_dir is None else Path(data_dir).expanduser()
    try:
        return _FROM_FILES[name](folder, download=download, image_size=image_size)
    except OSError as error:
        raise DataError(f"{name}: {error}; check --data-dir and its permissions") from error
