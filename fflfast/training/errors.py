"""How a run ends that cannot go on."""

from __future__ import annotations

__all__ = ["ProcessLost", "TrainingError", "is_told_elsewhere", "tell_elsewhere"]


class TrainingError(RuntimeError):
    """A run that cannot go on; its last good checkpoint stands."""


class ProcessLost(TrainingError):
    """Another process of the run is gone, so that what this one waits for will never come.

    Attributes:
        reason: which process, where, and how it is known to be gone.
    """

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(f"{reason}; {remedy}" if remedy else reason)
        self.reason = reason


def tell_elsewhere(error: BaseException) -> None:
    """Mark an error as one that process 0 raises too, so that a user reads it once."""
    error._fflfast_told_elsewhere = True  # type: ignore[attr-defined]


def is_told_elsewhere(error: BaseException) -> bool:
    """Whether process 0 raises this error too, and is the one to print it."""
    return getattr(error, "_fflfast_told_elsewhere", False)
