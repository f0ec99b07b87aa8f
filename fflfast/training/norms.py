"""Batch norms of a process that may have no image in a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..nn import FeatureFusion

__all__ = ["evaluating", "own_norms"]


def own_norms(learner: nn.Module) -> list[nn.Module]:
    """Return the batch norms whose statistics are those of one process, so that they cannot train on no image."""
    together = {
        norm
        for module in learner.modules()
        if isinstance(module, FeatureFusion) and module.sync_batch_norm
        for norm in module.modules()
    }
    norms = (module for module in learner.modules() if isinstance(module, _BatchNorm))
    return [norm for norm in norms if not isinstance(norm, nn.SyncBatchNorm) and norm not in together]


@contextmanager
def evaluating(norms: Sequence[nn.Module]) -> Iterator[None]:
    """Let norms use their running statistics while entered: there is nothing to take statistics of."""
    training = [norm for norm in norms if norm.training]
    for norm in training:
        norm.training = False
    try:
        yield
    finally:
        for norm in training:
            norm.training = True
