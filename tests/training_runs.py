"""Small training runs for the tests of the trainer: two tiny networks on a few images of 8 × 8, under a second."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from fflfast.methods import FFL
from fflfast.training import TrainConfig, train

REPOSITORY = Path(__file__).parent.parent
SMALL = {
    "data": "synthetic",
    "image_size": 8,
    "pad": 1,
    "arch": ["tiny", "tiny"],
    "limit_train": 100,
    "limit_test": 60,
    "batch_size": 24,
    "epochs": 3,
}
STEPS = 5  # an epoch: four batches of 24 and one of 4


class Noisy(FFL):
    """FFL with dropout on the logits in training, so that a run depends on torch's generator at every step."""

    def joint_logits(self, output, batch):
        return [torch.dropout(z, 0.2, self.training) for z in super().joint_logits(output, batch)]


def small(out: Path, **changes) -> TrainConfig:
    """Return the config of a small run in ``out``."""
    return TrainConfig(**{**SMALL, "out": str(out), **changes})


def run(out: Path, **changes) -> dict[str, torch.Tensor]:
    """Train a small run and return every tensor of its last checkpoint."""
    train(small(out, **changes), quiet=True)
    return tensors(out)


def tensors(folder: Path, name: str = "last.safetensors") -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint, read without the code under test."""
    return load_file(folder / name)


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Assert that two sets of tensors have the same names and the same bits."""
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert different == []


def flags(config: TrainConfig) -> list[str]:
    """Return the command-line flags of a small config."""
    given = [(f"--{k.replace('_', '-')}", v) for k, v in config.to_dict().items() if v != getattr(TrainConfig(), k)]
    pairs = [(flag, x) for flag, v in given for x in (v if isinstance(v, list) else [v])]
    return [part for flag, value in pairs for part in (flag, str(value).lower() if value is True else str(value))]


def start(*command: str, cwd: Path | None = None) -> subprocess.Popen:
    """Start this interpreter on the repository's package, one thread, output piped as text."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    return subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
