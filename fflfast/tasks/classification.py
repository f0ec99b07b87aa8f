"""Image classification: one class per image, measured by accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import augment

__all__ = ["Accuracy", "Classification", "Score"]


class Score(NamedTuple):
    """How many of how many images were classified right."""

    correct: int
    total: int

    @property
    def value(self) -> float:
        """The share of right answers, 0 to 1 (0 for no images)."""
        return self.correct / self.total if self.total else 0.0

    def __str__(self) -> str:
        return f"{100 * self.value:.2f}"


class Accuracy:
    """Counts right answers on the device; the host learns them only when it reads."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.correct: Tensor | None = None
        self.total = 0

    @torch.no_grad()
    def update(self, logits: Mapping[str, Tensor], target: Tensor) -> None:
        """Count one batch: logits of shape (B, K) by name, target int64 (B,). A row of NaN is never right."""
        top, index = torch.stack([z.detach().float() for z in logits.values()]).max(dim=-1)
        correct = ((index == target) & ~top.isnan()).sum(dim=-1)
        self.names = tuple(logits)
        self.correct = correct if self.correct is None else self.correct + correct
        self.total += target.shape[0]

    def read(self) -> dict[str, Score]:
        """Return the score of every name so far; waits for the device."""
        if self.correct is None:
            return {}
        return {name: Score(int(n), self.total) for name, n in zip(self.names, self.correct.tolist(), strict=True)}

    def state(self) -> dict[str, Any]:
        """Return the state as JSON values; waits for the device."""
        correct = None if self.correct is None else self.correct.tolist()
        return {"names": self.names, "correct": correct, "total": self.total}

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Put back what `state` returned."""
        correct = state["correct"]
        self.names, self.total = tuple(state["names"]), state["total"]
        self.correct = None if correct is None else torch.tensor(correct, device=device)


class Classification:
    """Target encoding and metric of classification; what the trainer knows of a task is this interface.

    Args:
        num_classes: K.
        seed: of the mixing.
        mixup, cutmix: alphas of the Beta distribution that the mixing ratio is drawn from; 0 is off.
    """

    metric_name = "accuracy"

    def __init__(self, num_classes: int, *, seed: int = 0, mixup: float = 0.0, cutmix: float = 0.0) -> None:
        self.num_classes = num_classes
        self.seed = seed
        self.mixup = mixup
        self.cutmix = cutmix

    @property
    def mixes(self) -> bool:
        """Whether training batches are mixed, so that no image has one right answer."""
        return self.mixup > 0 or self.cutmix > 0

    def encode(self, images: Tensor, target: Tensor, *, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Return images and target of a training batch, mixed where mixup or CutMix is on (then target is (B, K))."""
        if not self.mixes:
            return images, target
        return augment.mix(
            images,
            target,
            self.num_classes,
            seed=self.seed,
            epoch=epoch,
            step=step,
            mixup_alpha=self.mixup,
            cutmix_alpha=self.cutmix,
        )

    def metric(self) -> Accuracy:
        """Return a fresh metric."""
        return Accuracy()
