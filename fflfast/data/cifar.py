"""CIFAR-10 and CIFAR-100 from their official binary version, memory-mapped."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .arrays import array_bundle
from .batch import DataBundle, DataError
from .files import download_file, locate

__all__ = ["cifar"]

_log = logging.getLogger("fflfast.data")

_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class _Layout:
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: tuple[int, ...]  # number of classes of each label byte of a record; the last one is the target
    names: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    md5: str


_LAYOUTS = {
    "cifar10": _Layout(
        folder="cifar-10-batches-bin",
        train=tuple(f"data_batch_{part}.bin" for part in range(1, 6)),
        test=("test_batch.bin",),
        labels=(10,),
        names="batches.meta.txt",
        mean=(125.3, 123.0, 113.9),
        std=(63.0, 62.1, 66.7),
        md5="c32a1d4ab5d03f1284b67883e8d87530",
    ),
    "cifar100": _Layout(
        folder="cifar-100-binary",
        train=("train.bin",),
        test=("test.bin",),
        labels=(20, 100),
        names="fine_label_names.txt",
        mean=(129.3, 124.1, 112.4),
        std=(68.2, 65.4, 70.4),
        md5="03b5dce01913d631647c71ecec9e9cb8",
    ),
}
_URL = "https://www.cs.toronto.edu/~kriz/{}.tar.gz"
_ARCHIVES = {"cifar10": "cifar-10-binary", "cifar100": "cifar-100-binary"}


def cifar(name: str, data_dir: Path | None, *, download: bool = False, image_size: int | None = None) -> DataBundle:
    """Open CIFAR-10 or CIFAR-100 (A. Krizhevsky, 2009): 50,000 + 10,000 colour images, 32 × 32.

    A record is one label byte (CIFAR-100: coarse, then fine), then the R, G and B planes.
    CIFAR-100's target is the fine label. A file with another number of whole records than the
    official one is read, with a warning.

    Args:
        name: ``cifar10`` or ``cifar100``.
        data_dir: the folder ``cifar-10-batches-bin`` or ``cifar-100-binary``, or the one that holds it.
        download: fetch the official archive into data_dir if files are missing.
        image_size: see `fflfast.data.open_data`.

    Raises:
        ValueError, DataError: files missing or damaged, named.
    """
    layout = _LAYOUTS[name]

    def fetch(folder: Path) -> None:
        download_file(name, _URL.format(_ARCHIVES[name]), folder, layout.md5, extract=True)

    files = (*layout.train, *layout.test, layout.names)
    folder = locate(name, data_dir, (layout.folder,), files, download=download, fetch=fetch)
    names = (folder / layout.names).read_text(encoding="utf-8", errors="replace").split()
    if len(names) != layout.labels[-1]:
        raise DataError(
            f"{folder / layout.names}: expected {layout.labels[-1]} class names, found {len(names)}; "
            "unpack the archive again"
        )
    return array_bundle(
        name,
        _read(folder, layout.train, layout.labels, 50_000),
        _read(folder, layout.test, layout.labels, 10_000),
        class_names=names,
        mean=layout.mean,
        std=layout.std,
        image_size=image_size,
        pad=4,
        flip=True,
    )


def _read(folder: Path, files: Sequence[str], labels: tuple[int, ...], official: int) -> tuple[_Stacked, np.ndarray]:
    parts, targets = [], []
    for file in files:
        records = _map_records(folder / file, labels)
        parts.append(records[:, len(labels) :].reshape(-1, 3, 32, 32))
        targets.append(np.array(records[:, len(labels) - 1]))
    images = _Stacked(parts)
    if len(images) != official:
        _log.warning("%s holds %d images in %s, the official set %d", folder, len(images), ", ".join(files), official)
    return images, np.concatenate(targets)


def _map_records(path: Path, labels: tuple[int, ...]) -> np.ndarray:
    size, record = path.stat().st_size, len(labels) + _PIXELS
    if size == 0 or size % record:
        raise DataError(
            f"{path}: expected whole records of {record} bytes, found {size} bytes; the file is cut short "
            "or of another data set, unpack the official binary version again"
        )
    records = np.memmap(path, dtype=np.uint8, mode="r").reshape(-1, record)
    for place, classes in enumerate(labels):
        wrong = np.flatnonzero(records[:, place] >= classes)
        if len(wrong):
            raise DataError(
                f"{path}: expected labels 0 … {classes - 1} in byte {place} of each record, but record "
                f"{wrong[0]} has {records[wrong[0], place]}; the file is damaged, unpack it again"
            )
    return records


class _Stacked:
    """Arrays one after the other, indexed as one, without copying them together."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = parts
        self.ends = np.cumsum([len(part) for part in parts])
        self.shape = (int(self.ends[-1]), *parts[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        if len(self.parts) == 1:
            return np.asarray(self.parts[0][index])
        out = np.empty((len(index), *self.shape[1:]), dtype=np.uint8)
        of = np.searchsorted(self.ends, index, side="right")
        for number, part in enumerate(self.parts):
            rows = np.flatnonzero(of == number)
            out[rows] = part[index[rows] - (self.ends[number] - len(part))]
        return out
