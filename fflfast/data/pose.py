"""Persons with labelled joints: one square cut-out a person, and where the joints lie in it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .batch import CropKey, DataBundle, DataError, Keypoints
from .decode import PHOTO_MEAN, PHOTO_STD, read_rgb, resize

__all__ = ["PersonSplit", "Persons", "keypoints_of", "pose_bundle", "read_json", "square", "within"]

_MARGIN = 1.25  # side of a cut-out in units of the person's longer side, as in the code that many follow
_LEAST = 16  # pixels of a cut-out's side, so that persons whose joints all but coincide have one


class Persons(NamedTuple):
    """The persons of one part of a data set.

    Attributes:
        files: the image file of each of the n persons.
        sizes: int64 (n, 2), height and width of the file's image.
        joints: float64 (n, J, 3), x, y and visible (0 or 1) in the file's pixels.
        boxes: int64 (n, 3), left, top and side of the square that a network shall see; may reach out of the image.
    """

    files: Sequence[str]
    sizes: np.ndarray
    joints: np.ndarray
    boxes: np.ndarray


class PersonSplit:
    """Image files of persons, cut out and resized once, never at random.

    Args:
        name: for messages.
        persons: n ≥ 1 of them.
        image_size: S, the side of what a network sees.
        context: pixels around it on each side that the images have besides, for rotating and shrinking.

    Attributes:
        targets: float32 (n, J, 3), see `fflfast.data.Keypoints`, in pixels of these images.
    """

    fixed = True
    chunk: int | None = 4

    def __init__(self, name: str, persons: Persons, image_size: int, context: int = 0) -> None:
        self.name, self.persons = name, persons
        size = image_size + 2 * context
        self.shape = (3, size, size)
        seen = persons.boxes[:, 2]
        side = np.rint(seen * (size / image_size)).astype(np.int64)
        corner = persons.boxes[:, :2] - ((side - seen) // 2)[:, None]
        self._boxes = np.concatenate([corner, side[:, None]], axis=1)
        scale = (size / side)[:, None, None]
        places = (persons.joints[..., :2] - corner[:, None] + 0.5) * scale - 0.5
        visible = (persons.joints[..., 2] > 0) & within(places, size, size)
        joints = np.concatenate([np.where(visible[..., None], places, 0.0), visible[..., None]], axis=-1)
        self.targets = torch.from_numpy(joints.astype(np.float32))

    def __len__(self) -> int:
        return len(self.persons.files)

    def in_file(self, index: Tensor, places: Tensor) -> Tensor:
        """Return where points (b, …, 2) of images ``index`` (b,) lie in the pixels of their files, float64."""
        left, top, side = torch.from_numpy(self._boxes)[index.cpu()].to(places.device).unbind(1)
        shape = (-1, *[1] * (places.dim() - 2))
        corner = torch.stack([left, top], dim=-1).view(*shape, 2)
        return (places.double() + 0.5) * (side.double() / self.shape[-1]).view(*shape, 1) - 0.5 + corner

    def fill(self, views: Sequence[Tensor], index: Tensor, crop: CropKey | None) -> dict[int, str]:
        """Decode images ``index``, write each person's cut-out into every view; black where the image ends."""
        failed = {}
        for row, place in enumerate(index.tolist()):
            image = read_rgb(self.persons.files[place])
            stated = tuple(self.persons.sizes[place].tolist())
            if not isinstance(image, str) and tuple(image.shape[1:]) != stated:
                image = (
                    f"{self.persons.files[place]!r} is {image.shape[2]}×{image.shape[1]} pixels where its annotations "
                    f"say {stated[1]}×{stated[0]}"
                )
            if isinstance(image, str):
                failed[row] = image
                continue
            person = resize(_cut(image, *self._boxes[place].tolist()), *self.shape[1:]).numpy()
            for view in views:
                np.copyto(view[row].numpy(), person)
        return failed


def pose_bundle(name: str, keypoints: Keypoints, train: PersonSplit, test: PersonSplit) -> DataBundle:
    """Bundle two splits of persons; what a network sees has the size of the test images."""
    return DataBundle(
        name,
        train,
        test,
        num_classes=len(keypoints.names),
        class_names=keypoints.names,
        mean=PHOTO_MEAN,
        std=PHOTO_STD,
        image_size=test.shape[-1],
        recipe={"pad": 0, "flip": True},
        task="pose",
        keypoints=keypoints,
    )


def keypoints_of(
    where: str, names: Sequence[str], skeleton: Sequence[tuple[str, str]], sigmas: Sequence[float] | None = None
) -> Keypoints:
    """Describe joints by their names: ``left_…`` and ``right_…`` are pairs, shoulder to hip across is the torso.

    Args:
        where: the file, for messages.
        names: of the joints.
        skeleton: pairs of names; those of joints that are not there are left out.
        sigmas: see `Keypoints`.

    Raises:
        DataError: a name that stands twice, or shoulders or hips missing, by which errors are measured.
    """
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise DataError(f"{where}: expected a name of its own for each joint, got {', '.join(map(str, names))}")
    place = {name: j for j, name in enumerate(names)}
    torso = (("left_shoulder", "right_hip"), ("right_shoulder", "left_hip"))
    missing = [name for pair in torso for name in pair if name not in place]
    if missing:
        raise DataError(
            f"{where}: no joint {', '.join(missing)} among {', '.join(names) or 'none'}; errors are measured by the "
            "length of the torso, from a shoulder to the other side's hip"
        )
    sides = ((f"left_{name.removeprefix('right_')}", name) for name in names if name.startswith("right_"))
    return Keypoints(
        tuple(names),
        tuple((place[left], place[right]) for left, right in sides if left in place),
        tuple((place[a], place[b]) for a, b in skeleton if a in place and b in place),
        tuple((place[a], place[b]) for a, b in torso),
        None if sigmas is None else tuple(sigmas),
    )


def square(left: float, top: float, right: float, bottom: float) -> tuple[int, int, int]:
    """Return (left, top, side) of the square around a rectangle, a quarter larger than its longer side."""
    side = max(_LEAST, math.ceil(_MARGIN * max(right - left, bottom - top)))
    return int((left + right - side + 1) // 2), int((top + bottom - side + 1) // 2), side


def within(places: np.ndarray, height: np.ndarray | int, width: np.ndarray | int) -> np.ndarray:
    """Say which points (…, 2) lie on the pixels of an image; NaN does not."""
    x, y = places[..., 0], places[..., 1]
    return (x >= -0.5) & (y >= -0.5) & (x < np.asarray(width) - 0.5) & (y < np.asarray(height) - 0.5)


def read_json(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        DataError: it cannot be read or is no JSON, named.
    """
    try:
        with path.open("rb") as file:
            return json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}); fetch it again") from error


def _cut(image: Tensor, left: int, top: int, side: int) -> Tensor:
    """Return the square (3, side, side) of an image, black where it reaches out of it."""
    _, height, width = image.shape
    if left >= 0 and top >= 0 and left + side <= width and top + side <= height:
        return image[:, top : top + side, left : left + side]
    cut = np.zeros((side, side, 3), np.uint8)
    rows, columns = (slice(max(start, 0), min(start + side, end)) for start, end in ((top, height), (left, width)))
    inside = image[:, rows, columns].permute(1, 2, 0).numpy()
    cut[rows.start - top :, columns.start - left :][: inside.shape[0], : inside.shape[1]] = inside
    return torch.from_numpy(cut).permute(2, 0, 1)
