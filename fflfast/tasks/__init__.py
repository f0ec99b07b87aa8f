"""What is specific to a task: how a batch is made ready, and what is measured. The trainer names no task."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import Metric, Score, Task
from .classification import Classification

if TYPE_CHECKING:
    from ..data import Keypoints

__all__ = ["Classification", "Metric", "Score", "Task", "task_of"]


def task_of(
    name: str,
    num_classes: int,
    *,
    seed: int = 0,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    pad: int = 0,
    flip: bool = False,
    keypoints: Keypoints | None = None,
    image_size: int = 0,
    rotation: float = 0.0,
    scale: float = 0.0,
    flip_test: bool = True,
) -> Task:
    """Return the task of a data set.

    Args:
        name: "classification" or "pose".
        num_classes: K classes, or J joints.
        seed: of augmentation and mixing.
        mixup, cutmix: alphas of the mixing ratio's Beta distribution; 0 is off. Classification only.
        pad: pixels of reflection padding before a random crop. Classification only.
        flip: mirror training images at random.
        keypoints: names and pairs of the joints. Pose only, as what follows.
        image_size: side of what a network sees, in pixels.
        rotation: largest turn of a training image, in degrees.
        scale: largest change of its size, relative.
        flip_test: average a test image's answer with that of its mirror image.

    Raises:
        ValueError: no such task, or pose without its keypoints.
    """
    if name == "classification":
        return Classification(num_classes, seed=seed, mixup=mixup, cutmix=cutmix, pad=pad, flip=flip)
    if name != "pose":
        raise ValueError(f"task: expected classification or pose, got {name!r}")
    if keypoints is None:
        raise ValueError("task pose: expected the keypoints of the data set, got none")
    from .pose import Pose

    return Pose(keypoints, image_size, seed=seed, rotation=rotation, scale=scale, flip=flip, flip_test=flip_test)
