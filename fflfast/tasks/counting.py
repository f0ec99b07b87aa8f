"""What the metrics of all tasks share: numbers of right answers, counted on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Summing

__all__ = ["Counting"]


class Counting:
    """Counts on the device, in place; the host learns them only when it reads. See `fflfast.tasks.base.Metric`.

    Args:
        names: of the outputs that are judged, empty for all that the first update brings.
        device: where to count, so that the memory is there before the first update; None: where the first outputs lie.
        parts: shape of what is counted of each output, () for one number.
    """

    def __init__(
        self, names: Sequence[str] = (), device: torch.device | str | None = None, parts: tuple[int, ...] = ()
    ) -> None:
        self.names = tuple(names)
        self._parts = parts
        self._counts: Tensor | None = None  # int64 (n + 1, *parts): right answers by name, then of how many
        if device is not None:
            self._allocate(device)

    def _allocate(self, device: torch.device | str) -> Tensor:
        self._counts = torch.zeros((len(self.names) + 1, *self._parts), dtype=torch.int64, device=device)
        return self._counts

    def _add(self, correct: Tensor, total: Tensor | int, bad: Tensor | None) -> None:
        """Add right answers (n, *parts) and their possible number, (*parts) or one for all; nothing where ``bad``."""
        counts = self._allocate(correct.device) if self._counts is None else self._counts
        if bad is None:
            counts[-1].add_(total)
        else:
            correct = correct.masked_fill(bad, 0)
            counts[-1].add_(~bad * total)
        counts[:-1].add_(correct)

    def _read(self, processes: Summing | None) -> list[Any]:
        """Return the counts of all processes together as numbers, empty before the first update; waits."""
        if self._counts is None:
            return []
        counts = self._counts
        if processes is not None:
            counts = counts.clone()
            processes.sum_([counts])
        return counts.tolist()

    def tensors(self) -> list[Tensor]:
        """Return what `update` changes."""
        return [] if self._counts is None else [self._counts]

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
        names = next((state["names"] for state in states if state["names"]), ())
        seen = [state for state in states if state["correct"]] if rank == 0 else []
        if not seen:
            return {"names": names, "correct": [], "total": 0}
        correct, total = (
            torch.tensor([state[key] for state in seen]).sum(dim=0).tolist() for key in ("correct", "total")
        )
        return {"names": names, "correct": correct, "total": total}

    def load(self, state: Mapping[str, Any], device: torch.device | str | None = None) -> None:
        """Put back what `state` returned, in place; ``device`` says where to count if no batch has said it yet."""
        self.names = self.names or tuple(state["names"])
        if not self.names:
            return
        counts = self._allocate(device or "cpu") if self._counts is None else self._counts
        if state["correct"]:
            counts.copy_(torch.tensor([*state["correct"], state["total"]], dtype=torch.int64))
        else:
            counts.zero_()
