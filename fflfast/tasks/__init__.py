"""What is specific to a task: target encoding and metrics."""

from fflfast.tasks.classification import Classification, Score

__all__ = ["Classification", "Score"]
