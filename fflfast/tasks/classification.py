"""Image classification: one class per image, measured by accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..ops import augment
from ..ops.mix import prepare_mix

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


class Summing(Protocol):
    """What a metric needs of the processes that share its images."""

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their sums over all processes, in place."""


class Accuracy:
    """Counts right answers on the device, in place; the host learns them only when it reads.

    Args:
        names: of the outputs that it judges, empty for all that the first update brings.
        device: where to count, so that the memory is there before the first update; None: where the first logits lie.
    """

    def __init__(self, names: Sequence[str] = (), device: torch.device | str | None = None) -> None:
        self.names = tuple(names)
        self._counts: Tensor | None = None  # int64: right answers by name, then the images
        if device is not None:
            self._allocate(device)

    def _allocate(self, device: torch.device | str) -> Tensor:
        self._counts = torch.zeros(len(self.names) + 1, dtype=torch.int64, device=device)
        return self._counts

    @torch.no_grad()
    def update(self, logits: Mapping[str, Tensor], target: Tensor, bad: Tensor | None = None) -> None:
        """Count one batch: logits of shape (B, K) by name, target int64 (B,). A row of NaN is never right.

        Where ``bad``, a 0-dim bool, nothing is counted.
        """
        self.names = self.names or tuple(logits)
        top, index = torch.stack([logits[name].detach().float() for name in self.names]).max(dim=-1)
        correct = ((index == target) & ~top.isnan()).sum(dim=-1)
        counts = self._allocate(correct.device) if self._counts is None else self._counts
        if bad is None:
            counts[-1].add_(target.shape[0])
        else:
            correct = correct.masked_fill(bad, 0)
            counts[-1].add_(~bad, alpha=target.shape[0])
        counts[:-1].add_(correct)

    def tensors(self) -> list[Tensor]:
        """Return what `update` changes."""
        return [] if self._counts is None else [self._counts]

    def read(self, processes: Summing | None = None) -> dict[str, Score]:
        """Return the score of every name so far, empty if there was no image; waits for the device.

        Args:
            processes: over whose images the scores are; each of them calls this, and all get the same. A process that
                may see no batch needs its names from the start.
        """
        if self._counts is None:
            return {}
        counts = self._counts
        if processes is not None:
            counts = counts.clone()
            processes.sum_([counts])
        *correct, total = counts.tolist()
        return {name: Score(n, total) for name, n in zip(self.names, correct, strict=True)} if total else {}

    def reset(self) -> None:
        """Begin anew, as if nothing had been counted."""
        if self._counts is not None:
            self._counts.zero_()

    def state(self) -> dict[str, Any]:
        """Return this process's state as JSON values; waits for the device."""
        *correct, total = [0] if self._counts is None else self._counts.tolist()
        return {"names": self.names, "correct": correct, "total": total}

    @staticmethod
    def share(states: Sequence[Mapping[str, Any]], rank: int, count: int) -> dict[str, Any]:
        """Return what process ``rank`` of ``count`` loads of the states that processes saved, one each.

        As many processes as then get their own back; of another number the first takes all.
        """
        if len(states) == count:
            return dict(states[rank])
        seen = [state for state in states if state["total"]] if rank == 0 else []
        correct = [sum(numbers) for numbers in zip(*(state["correct"] for state in seen), strict=True)]
        names = next((state["names"] for state in states if state["names"]), ())
        return {"names": names, "correct": correct, "total": sum(state["total"] for state in seen)}

    def load(self, state: Mapping[str, Any], device: torch.device | str | None = None) -> None:
        """Put back what `state` returned, in place; ``device`` says where to count if no batch has said it yet."""
        self.names = self.names or tuple(state["names"])
        if not self.names:
            return
        counts = self._allocate(device or "cpu") if self._counts is None else self._counts
        correct = state["correct"] or [0] * len(self.names)
        counts.copy_(torch.tensor([*correct, state["total"]], dtype=torch.int64))


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

    def prepare(self, device: torch.device | str) -> None:
        """Bring to a device what `encode` needs there."""
        prepare_mix(device, mixup_alpha=self.mixup, cutmix_alpha=self.cutmix)

    def encode(
        self, images: Tensor, target: Tensor, *, epoch: int | Tensor, step: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return images and target of a training batch, mixed where mixup or CutMix is on (then target is (B, K)).

        ``epoch`` and ``step`` (within the epoch) are ints or 0-dim integer tensors.
        """
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

    def metric(self, names: Sequence[str] = (), device: torch.device | str | None = None) -> Accuracy:
        """Return a fresh metric of the outputs ``names``, see `Accuracy`."""
        return Accuracy(names, device)
