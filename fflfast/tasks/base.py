"""What the trainer knows of a task: how a batch is made ready, and what is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..data import Batch

__all__ = ["Metric", "Score", "Summing", "Task"]


class Score(NamedTuple):
    """How many of how many answers were right."""

    correct: int
    total: int

    @property
    def value(self) -> float:
        """The share of right answers, 0 to 1 (0 for none at all)."""
        return self.correct / self.total if self.total else 0.0

    def __str__(self) -> str:
        return f"{100 * self.value:.2f}"


class Summing(Protocol):
    """What a metric needs of the processes that share its images."""

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their sums over all processes, in place."""


class Metric(Protocol):
    """Counts right answers on the device, in place; the host learns them only when it reads.

    Attributes:
        names: of the outputs that are judged.
    """

    names: tuple[str, ...]

    def update(self, outputs: Mapping[str, Tensor], target: Tensor, bad: Tensor | None = None) -> None:
        """Count one batch; where ``bad``, a 0-dim bool, nothing."""

    def tensors(self) -> list[Tensor]:
        """Return what `update` changes."""

    def read(self, processes: Summing | None = None) -> dict[str, Score]:
        """Return the score of every output so far, empty if there was no image; waits for the device."""

    def details(self, processes: Summing | None = None) -> dict[str, dict[str, Score]]:
        """Return by output the scores of its parts (pose: joints), empty where a task has none; waits likewise."""

    def reset(self) -> None:
        """Begin anew, as if nothing had been counted."""

    def state(self) -> dict[str, Any]:
        """Return this process's state as JSON values; waits for the device."""

    def share(self, states: Sequence[Mapping[str, Any]], rank: int, count: int) -> dict[str, Any]:
        """Return what process ``rank`` of ``count`` loads of the states that processes saved, one each."""

    def load(self, state: Mapping[str, Any], device: torch.device | str | None = None) -> None:
        """Put back what `state` returned, in place."""


class Task(Protocol):
    """What is specific to a task.

    Attributes:
        name: as in ``--task``.
        metric_name: what scores are called in records and tables.
        mixes: whether training batches mix neighbouring images, so that no image has one right answer.
    """

    name: str
    metric_name: str

    @property
    def mixes(self) -> bool: ...

    def prepare(self, device: torch.device | str) -> None:
        """Bring to a device what a step needs there."""

    def training_batch(
        self, batch: Batch, table: Tensor, *, epoch: Tensor, step: Tensor, views: int, channels_last: bool
    ) -> Batch:
        """Augment, normalise and encode a batch of uint8 images by operations of the device alone.

        A pure function of (seed, epoch, index, view), and for what mixes images of the step within its epoch.

        Args:
            batch: uint8 images (B, C, H, W), or a tuple of ``views`` such tensors; targets as the data set has them.
            table: float (256, 3), see `fflfast.ops.augment.normalization_table`.
            epoch, step: 0-dim int64 tensors.
            views: how many views of each image; more than one gives a tuple of images.
            channels_last: memory order of the result.
        """

    def metric(self, names: Sequence[str] = (), device: torch.device | str | None = None) -> Metric:
        """Return a fresh metric of the outputs ``names``; empty: those that the first update brings."""

    def outputs(
        self, predict: Callable[[Tensor], Mapping[str, Tensor]], images: Tensor, table: Tensor
    ) -> Mapping[str, Tensor]:
        """Return what is judged in a test, by output, of uint8 images (B, C, H, W), with ``predict`` of float ones."""
