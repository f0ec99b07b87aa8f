"""Splits that lie in memory or in a memory map, and the data sets that need no files."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .batch import CropKey, DataBundle, DataError

__all__ = ["ArraySplit", "ImageArray", "array_bundle", "digits", "synthetic", "synthetic_imagenet"]


class ImageArray(Protocol):
    """What a split needs of an array of images, uint8 (n, C, H, W): shape, length, gathering."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: np.ndarray, /) -> np.ndarray: ...


class ArraySplit:
    """A split over an array of images, a memory map or not.

    Args:
        name: for messages.
        images: uint8 (n, C, H, W), C = 1 or 3, n ≥ 1, H = W.
        targets: integers (n,), 0 … num_classes − 1.
        num_classes: K.
        image_size: images are resized to it when read (bilinear, antialiased); None keeps them.

    Raises:
        ValueError: images of another shape.
        DataError: no image, or a target out of range, named.
    """

    fixed = True
    chunk: int | None = None

    def __init__(
        self,
        name: str,
        images: ImageArray,
        targets: np.ndarray,
        num_classes: int,
        image_size: int | None = None,
    ) -> None:
        if len(images.shape) != 4 or images.shape[1] not in (1, 3) or images.shape[2] != images.shape[3]:
            raise ValueError(f"{name}: expected images (n, 1 or 3, H, H), got {images.shape}")
        if len(images) == 0:
            raise DataError(f"{name}: expected at least one image, found none")
        if len(targets) != len(images):
            raise DataError(f"{name}: {len(images)} images but {len(targets)} labels; these do not belong together")
        targets = targets.astype(np.int64)
        wrong = np.flatnonzero((targets < 0) | (targets >= num_classes))
        if len(wrong):
            raise DataError(
                f"{name}: expected labels 0 … {num_classes - 1}, but image {wrong[0]} has label {targets[wrong[0]]} "
                f"({len(wrong)} such labels); the file is damaged or of another data set"
            )
        self.name, self.images = name, images
        self.targets = torch.from_numpy(targets)
        size = images.shape[-1] if image_size is None else image_size
        self.shape = (images.shape[1], size, size)

    def __len__(self) -> int:
        return len(self.images)

    def fill(self, views: Sequence[Tensor], index: Tensor, crop: CropKey | None) -> dict[int, str]:
        """Write images ``index`` into every view; nothing is random here and nothing can fail."""
        images = np.asarray(self.images[index.numpy()])
        if images.shape[-2:] != self.shape[-2:]:
            resized = interpolate(torch.from_numpy(images), self.shape[-2:], mode="bilinear", antialias=True)
            images = resized.numpy()
        for view in views:
            np.copyto(view.numpy(), images)
        return {}


def array_bundle(
    name: str,
    train: tuple[ImageArray, np.ndarray],
    test: tuple[ImageArray, np.ndarray],
    *,
    class_names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int | None,
    pad: int,
    flip: bool,
) -> DataBundle:
    """Bundle two pairs of (images, targets); ``pad`` is for their own size and grows with image_size."""
    parts = [
        ArraySplit(f"{name} {part}", *arrays, len(class_names), image_size)
        for part, arrays in (("train", train), ("test", test))
    ]
    own, size = train[0].shape[-1], parts[0].shape[-1]
    return DataBundle(
        name,
        parts[0],
        parts[1],
        len(class_names),
        tuple(class_names),
        (mean[0], mean[1], mean[2]),
        (std[0], std[1], std[2]),
        size,
        {"pad": min(size - 1, round(pad * size / own)), "flip": flip},
    )


def digits(image_size: int | None = None) -> DataBundle:
    """Open scikit-learn's 1,797 handwritten digits: gray, 8 × 8, ten classes; nothing is downloaded.

    Of each class, in file order, the first two thirds train and the rest test: 1,195 and 602
    images, never reshuffled. Values 0 … 16 become 0 … 255. (E. Alpaydin, C. Kaynak: Optical
    Recognition of Handwritten Digits, UCI, 1998.)

    Raises:
        ValueError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("data 'digits' comes with scikit-learn; install it: pip install scikit-learn") from error
    images, targets = load_digits(return_X_y=True)
    images = np.rint(images.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    in_train = np.zeros(len(targets), dtype=bool)
    for label in range(10):
        places = np.flatnonzero(targets == label)
        in_train[places[: len(places) * 2 // 3]] = True
    train = images[in_train]
    return array_bundle(
        "digits",
        (train, targets[in_train]),
        (images[~in_train], targets[~in_train]),
        class_names=[str(label) for label in range(10)],
        mean=[float(train.mean())] * 3,
        std=[float(train.std())] * 3,
        image_size=image_size,
        pad=1,
        flip=False,
    )


def synthetic(
    image_size: int | None = None,
    *,
    seed: int = 0,
    num_classes: int = 10,
    num_train: int = 1024,
    num_test: int = 256,
    distinct: int | None = None,
) -> DataBundle:
    """Make a data set that a network can learn: per class a coarse random colour pattern, under
    noise, RGB, 32 × 32.

    A pure function of its arguments, by default 1,024 + 256 images of ten classes in turn. It
    serves tests and measurements of speed; accuracies on it mean nothing.

    Args:
        image_size: side in pixels; None for 32.
        seed: of patterns and noise.
        num_classes, num_train, num_test: how many classes and images.
        distinct: how many different images each split has, a multiple of num_classes: image i shows
            the pixels of image i mod ``distinct``, so that any number of images needs the memory of
            these few alone. None makes all of them different.

    Raises:
        ValueError: fewer than one class or image, or a ``distinct`` that would give an image two labels.
    """
    if min(num_classes, num_train, num_test) < 1:
        raise ValueError("num_classes, num_train, num_test: expected at least 1 each")
    if distinct is not None and (distinct < 1 or distinct % num_classes):
        raise ValueError(f"distinct: expected a multiple of the {num_classes} classes, got {distinct}")
    size = 32 if image_size is None else image_size

    def noise(stream: int, *shape: int) -> np.ndarray:
        generator = np.random.Philox(key=np.array([seed, stream], dtype=np.uint64))
        count = int(np.prod(shape))
        return generator.random_raw(-(-count // 8)).astype("<u8", copy=False).view(np.uint8)[:count].reshape(shape)

    patterns = noise(0, num_classes, 3, 4, 4)
    place = np.arange(size) * 4 // size
    patterns = patterns[:, :, place[:, None], place] // 2

    def part(stream: int, count: int) -> tuple[ImageArray, np.ndarray]:
        targets = np.arange(count) % num_classes
        different = count if distinct is None else min(count, distinct)
        images = noise(stream, different, 3, size, size)
        images >>= 1  # in place: fresh memory costs more than the arithmetic
        for label in range(num_classes):
            images[label::num_classes] += patterns[label]
        return images if different == count else _Repeated(images, count), targets

    return array_bundle(
        "synthetic",
        part(1, num_train),
        part(2, num_test),
        class_names=[f"class {label}" for label in range(num_classes)],
        mean=[127.0] * 3,
        std=[52.0] * 3,
        image_size=None,
        pad=4,
        flip=False,
    )


def synthetic_imagenet(image_size: int | None = None, *, seed: int = 0) -> DataBundle:
    """Make a synthetic data set of ImageNet's shape, to measure what a machine could do with images that cost nothing.

    224 × 224, 1,000 classes, 12,800 + 1,000 images. Each split has one image a class, repeated: 300 MB in all. They
    are mirrored and not shifted, as ImageNet's are where they are cropped when they are decoded.
    """
    bundle = synthetic(
        224 if image_size is None else image_size, seed=seed, num_classes=1000, num_train=12_800, num_test=1000,
        distinct=1000,
    )  # fmt: skip
    return dataclasses.replace(bundle, name="synthetic-imagenet", recipe={"pad": 0, "flip": True})


class _Repeated:
    """Few images again and again, without copies of them: image i is image i mod their number."""

    def __init__(self, images: np.ndarray, count: int) -> None:
        self.images = images
        self.shape = (count, *images.shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        return self.images[index % len(self.images)]
