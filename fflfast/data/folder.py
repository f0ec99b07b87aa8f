"""Folders of image files, one folder per class, decoded in the loader's threads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .batch import CropKey, DataBundle, DataError
from .decode import PHOTO_MEAN, PHOTO_STD, SUFFIXES, read_rgb, resize
from .order import random_resized_crop_boxes

__all__ = ["FolderSplit", "imagefolder"]

_TEST_NAMES = ("val", "validation", "test")
_LONGEST = 8  # sides of evaluation images beyond 8 : 1 are cut first, or resizing would need gigabytes


class FolderSplit:
    """Image files with class indices.

    To train, a random box (`fflfast.data.random_resized_crop_boxes`) is resized to image_size
    × image_size; to evaluate, the shorter side is resized to image_size · 8/7 and the centre is cut
    out (224 from 256). Both bilinear with antialiasing, on uint8.

    Args:
        name: for messages.
        files: paths, n ≥ 1.
        targets: class indices, n.
        image_size: in pixels.
    """

    fixed = False
    chunk: int | None = 4

    def __init__(self, name: str, files: Sequence[str], targets: Sequence[int], image_size: int) -> None:
        self.name, self.files = name, files
        self.targets = torch.tensor(targets, dtype=torch.int64, device="cpu")
        self.shape = (3, image_size, image_size)

    def __len__(self) -> int:
        return len(self.files)

    def fill(self, views: Sequence[Tensor], index: Tensor, crop: CropKey | None) -> dict[int, str]:
        """Decode images ``index`` once each, write a crop into every view; see `Split`."""
        failed = {}
        for row, place in enumerate(index.tolist()):
            image = read_rgb(self.files[place])
            if isinstance(image, str):
                failed[row] = image
                continue
            for number, view in enumerate(views):
                cut = self._centre(image) if crop is None else self._random(image, place, crop, number)
                np.copyto(view[row].numpy(), cut.numpy())
        return failed

    def _random(self, image: Tensor, place: int, crop: CropKey, view: int) -> Tensor:
        boxes = random_resized_crop_boxes(
            torch.tensor([place], device="cpu"),
            torch.tensor([image.shape[-2:]], device="cpu"),
            seed=crop.seed,
            epoch=crop.epoch,
            view=view,
        )
        top, left, height, width = boxes[0].tolist()
        return resize(image[:, top : top + height, left : left + width], *self.shape[1:])

    def _centre(self, image: Tensor) -> Tensor:
        size = self.shape[-1]
        shorter = min(image.shape[-2:])
        for dim in (1, 2):
            surplus = image.shape[dim] - _LONGEST * shorter
            if surplus > 0:
                image = image.narrow(dim, surplus // 2, _LONGEST * shorter)
        resized = round(size * 8 / 7)
        height, width = (resized * side // shorter for side in image.shape[-2:])
        image = resize(image, height, width)
        top, left = round((height - size) / 2), round((width - size) / 2)
        return image[:, top : top + size, left : left + size]


def imagefolder(data_dir: Path | None, *, download: bool = False, image_size: int | None = None) -> DataBundle:
    """Open ``data_dir/train/CLASS/…`` and ``data_dir/val/CLASS/…`` (or validation, or test: the
    first that exists).

    Classes are the sorted names of train's folders; files lie in them at any depth, hidden ones are
    passed over. Files are opened only when they are read. Channel statistics are ImageNet's.

    Raises:
        ValueError: no data_dir, or a request to download.
        DataError: folders missing or empty, or a class that train does not have, named.
    """
    if download:
        raise ValueError("imagefolder is made of your own files and cannot be downloaded; leave out --download")
    if data_dir is None:
        raise ValueError(
            "imagefolder needs a folder of train/CLASS/IMAGE and val/CLASS/IMAGE; give --data-dir (data_dir)"
        )
    train_dir = data_dir / "train"
    test_dir = next((data_dir / name for name in _TEST_NAMES if (data_dir / name).is_dir()), None)
    if not train_dir.is_dir() or test_dir is None:
        wanted = "train" if not train_dir.is_dir() else "val (or validation, or test)"
        raise DataError(
            f"imagefolder: no folder {wanted} in {data_dir}; expected train/CLASS/IMAGE and val/CLASS/IMAGE"
        )
    classes = _classes(train_dir)
    unknown = sorted(set(_classes(test_dir)) - set(classes))
    if unknown:
        raise DataError(
            f"imagefolder: {test_dir} has {len(unknown)} class folder(s) that {train_dir} lacks, such as "
            f"{unknown[0]!r}; both need the same classes"
        )
    size = 224 if image_size is None else image_size
    splits = []
    for part, folder in (("train", train_dir), ("test", test_dir)):
        files, targets = [], []
        for label, name in enumerate(classes):
            found = _image_files(folder / name)
            if part == "train" and not found:
                raise DataError(
                    f"imagefolder: no image ({', '.join(SUFFIXES)}) in {folder / name}; add some or remove the folder"
                )
            files += found
            targets += [label] * len(found)
        if not files:
            raise DataError(f"imagefolder: no image ({', '.join(SUFFIXES)}) in {folder}; the test split needs some")
        splits.append(FolderSplit(f"imagefolder {part}", files, targets, size))
    return DataBundle(
        name="imagefolder",
        train=splits[0],
        test=splits[1],
        num_classes=len(classes),
        class_names=tuple(classes),
        mean=PHOTO_MEAN,
        std=PHOTO_STD,
        image_size=size,
        recipe={"pad": 0, "flip": True},
    )


def _classes(folder: Path) -> list[str]:
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise DataError(f"imagefolder: no class folder in {folder}; expected {folder.name}/CLASS/IMAGE")
    return classes


def _image_files(folder: Path) -> list[str]:
    found = []
    seen: set[str] = set()
    for parent, subfolders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link back to a folder above would list its images again and again
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        found += [
            os.path.join(parent, name)
            for name in sorted(files)
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    return found
