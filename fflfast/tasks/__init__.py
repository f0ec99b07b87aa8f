"""What is specific to a task: target encoding and metrics. The trainer gets its task from `task_of` and names none."""

from __future__ import annotations

from .classification import Classification, Score

__all__ = ["Classification", "Score", "Task", "task_of"]

Task = Classification


def task_of(num_classes: int, *, seed: int = 0, mixup: float = 0.0, cutmix: float = 0.0) -> Task:
    """The task of a data set with K = `num_classes` classes: classification, for every data set there is.

    Args:
        num_classes: K.
        seed: of the mixing.
        mixup, cutmix: alphas of the mixing ratio's Beta distribution; 0 is off.
    """
    return Classification(num_classes, seed=seed, mixup=mixup, cutmix=cutmix)
