"""Learning rate and ramp-up as pure functions of the position in the run."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["learning_rate_factor", "ramp_up", "rescale_milestones"]


def learning_rate_factor(
    schedule: str,
    step: int,
    steps_per_epoch: int,
    *,
    epochs: int,
    milestones: Sequence[int] = (),
    gamma: float = 0.1,
    warmup_epochs: float = 0.0,
) -> float:
    """Return what the peak learning rate is multiplied by at ``step``, counted from 0 over the whole run.

    ``multistep``: gamma to the number of milestones (epochs) reached. ``cosine``: (1 + cos(π·t))/2, where t runs from 0
    at the end of the warm-up to 1 at the end of the run (Loshchilov and Hutter, arXiv 1608.03983, without restarts).
    The warm-up multiplies either by 1/W, 2/W, …, 1 over its W steps.
    """
    epoch = step / steps_per_epoch
    if schedule == "cosine":
        length = max(epochs - warmup_epochs, 1e-12)
        factor = (1 + math.cos(math.pi * min(max(epoch - warmup_epochs, 0.0) / length, 1.0))) / 2
    elif schedule == "multistep":
        factor = gamma ** sum(epoch >= milestone for milestone in milestones)
    else:
        raise ValueError(f"schedule: expected 'multistep' or 'cosine', got {schedule!r}")
    warmup_steps = warmup_epochs * steps_per_epoch
    return factor * min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else factor


def ramp_up(epoch: int, length: float) -> float:
    """Return exp(−5(1 − min(e, R)/R)²), the weight of the teaching terms at epoch e from 0; 1 for R = 0.

    R is ``length`` in epochs. From Laine and Aila, arXiv 1610.02242, as FFL uses it (arXiv 1904.09058, R = 80).
    """
    if length <= 0:
        return 1.0
    return math.exp(-5.0 * (1.0 - min(epoch, length) / length) ** 2)


def rescale_milestones(milestones: Sequence[int], epochs: int, reference: int) -> list[int]:
    """Return the milestones of a run of ``reference`` epochs in proportion for ``epochs``: rising, at least 1."""
    return sorted({max(1, round(milestone * epochs / reference)) for milestone in milestones})
