"""Training: one config for Python, YAML and the command line; runs that resume bit for bit; evaluation and export.

from fflfast.training import TrainConfig, train, evaluate
result = train(TrainConfig(data="digits", arch=["resnet20", "resnet20"], method="ffl"))
evaluate(result.folder)
"""

from __future__ import annotations

from .build import resolve
from .checkpoint import CheckpointError
from .config import ConfigError, TrainConfig
from .evaluation import evaluate, export
from .loop import TrainingError
from .plots import plot
from .run import RunResult, train
from .signals import Stopped

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
