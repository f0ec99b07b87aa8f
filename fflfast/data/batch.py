"""What a loader yields and what it reads from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

__all__ = ["Batch", "CropKey", "DataBundle", "DataError", "Keypoints", "Split"]


class DataError(ValueError):
    """A data set on disk is missing, incomplete or damaged; the message names the file and the remedy."""


class Batch(NamedTuple):
    """One batch: images, their targets, and their places in the data set.

    Attributes:
        images: uint8 (B, C, H, W) from a loader, C = 1 or 3, floats after augmentation; a tuple of
            such tensors where N views of each image were asked for.
        target: int64 (B,) class indices; of persons float32 (B, J, 3), their joints, see `Keypoints`.
        index: int64 (B,) places in the split, from which augmentation draws its randomness.
    """

    images: Tensor | tuple[Tensor, ...]
    target: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which a batch does not need


class CropKey(NamedTuple):
    """What random crops depend on, besides the image's index and the view."""

    seed: int
    epoch: int


class Keypoints(NamedTuple):
    """What the J joints of a data set of persons are.

    A person's target is float32 (J, 3): x, y and visible of each joint, in pixels of the image that stands beside it,
    centres of pixels at integers. Visible is 1 where the joint is labelled and lies in the image, else 0, and then x
    and y are 0 and mean nothing.

    Attributes:
        names: of the J joints, in order.
        flip_pairs: pairs of joints that a mirror image exchanges (left and right).
        skeleton: pairs of joints that a drawing connects.
        torso: pairs of joints whose distance measures a person; the first pair that is visible counts.
        sigmas: of the object keypoint similarity, one a joint, where the data set defines it.
    """

    names: tuple[str, ...]
    flip_pairs: tuple[tuple[int, int], ...]
    skeleton: tuple[tuple[int, int], ...]
    torso: tuple[tuple[int, int], ...]
    sigmas: tuple[float, ...] | None = None


class Split(Protocol):
    """A training or test set that a `fflfast.data.Loader` reads; thread-safe.

    Attributes:
        name: for messages, such as ``"cifar10 train"``.
        targets: int64 (n,), or float32 (n, J, 3) of persons.
        shape: (C, H, W) of every image.
        fixed: whether an image is the same bytes each time it is read, so that the split may lie on a device.
        chunk: how many images one worker takes at a time, None for a whole batch.
    """

    name: str
    targets: Tensor
    shape: tuple[int, int, int]
    fixed: bool
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
        num_classes: K; of persons J, the number of joints.
        class_names: K names, in the order of the class indices; of persons those of the joints.
        mean, std: of the channels (R, G, B), in units of pixel values 0 … 255.
        image_size: height and width in pixels of what a network sees. Training images of persons may be larger, so that
            rotating and shrinking them finds more of the picture.
        recipe: default augmentation, the ``pad`` and ``flip`` of `fflfast.ops.augment.augment`.
        task: what there is to learn, "classification" or "pose".
        keypoints: of a pose data set, else None.
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
    task: str = "classification"
    keypoints: Keypoints | None = None
