"""What a loader yields and what it reads from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

__all__ = ["Batch", "CropKey", "DataBundle", "DataError", "Split"]


class DataError(ValueError):
    """A data set on disk is missing, incomplete or damaged; the message names the file and the remedy."""


class Batch(NamedTuple):
    """One batch: images, their targets, and their places in the data set.

    Attributes:
        images: uint8 (B, C, H, W) from a loader, C = 1 or 3, floats after augmentation; a tuple of
            such tensors where N views of each image were asked for.
        target: int64 (B,) class indices.
        index: int64 (B,) places in the split, from which augmentation draws its randomness.
    """

    images: Tensor | tuple[Tensor, ...]
    target: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which a batch does not need


class CropKey(NamedTuple):
    """What random crops depend on, besides the image's index and the view."""

    seed: int
    epoch: int


class Split(Protocol):
    """A training or test set that a `fflfast.data.Loader` reads; thread-safe.

    Attributes:
        name: for messages, such as ``"cifar10 train"``.
        targets: int64 (n,).
        shape: (C, H, W) of every image.
        chunk: how many images one worker takes at a time, None for a whole batch.
    """

    name: str
    targets: Tensor
    shape: tuple[int, int, int]
    chunk: int | None

    def __len__(self) -> int: ...

    def fill(self, views: Sequence[Tensor], index: Tensor, crop: CropKey | None) -> dict[int, str]:
        """Write images ``index`` (b,) into every view, uint8 (b, C, H, W).

        ``crop`` None reads for evaluation. Returns {row: what is wrong with which file} for the
        rows left unwritten.
        """


@dataclass(frozen=True)
class DataBundle:
    """A data set, ready to train on.

    Attributes:
        name: as given to `fflfast.data.open_data`.
        train, test: the two splits.
        num_classes: K.
        class_names: K names, in the order of the class indices.
        mean, std: of the channels (R, G, B), in units of pixel values 0 … 255.
        image_size: height and width in pixels.
        recipe: default augmentation, the ``pad`` and ``flip`` of `fflfast.ops.augment.augment`.
    """

    name: str
    train: Split
    test: Split
    num_classes: int
    class_names: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: int
    recipe: Mapping[str, Any]
