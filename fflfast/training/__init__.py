"""Training: one config for Python, YAML and the command line; runs that resume bit for bit; evaluation and export.

from fflfast.training import TrainConfig, train, evaluate
result = train(TrainConfig(data="digits", arch=["resnet20", "resnet20"], method="ffl"))
evaluate(result.folder)
"""

from __future__ import annotations

from fflfast.training.build import resolve
from fflfast.training.checkpoint import CheckpointError
from fflfast.training.config import ConfigError, TrainConfig
from fflfast.training.evaluation import evaluate, export
from fflfast.training.loop import TrainingError
from fflfast.training.plots import plot
from fflfast.training.run import RunResult, train
from fflfast.training.signals import Stopped

__all__ = [
    "CheckpointError",
    "ConfigError",
    "RunResult",
    "Stopped",
    "TrainConfig",
    "TrainingError",
    "evaluate",
    "export",
    "plot",
    "resolve",
    "train",
]
