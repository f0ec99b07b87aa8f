"""Small cohorts for the tests of the benchmark of training."""

from __future__ import annotations

import torch

from fflfast.training import TrainConfig, resolve

CPU = torch.device("cpu")
SMALL = {
    "data": "synthetic", "image_size": 8, "pad": 1, "limit_train": 96, "batch_size": 24, "epochs": 2, "device": "cpu",
    "lr": 0.05,
}  # fmt: skip


def resolved(**changes):
    """Return the resolved config of two tiny networks on a few images of 8 × 8."""
    return resolve(TrainConfig(**{**SMALL, "arch": ["tiny", "tiny"], **changes})).config
