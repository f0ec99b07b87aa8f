"""Leave out a step whose loss or gradients are not finite, decided on the device, without a trace of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .packed import Packed

__all__ = ["StepGuard"]


class StepGuard:
    """What ``nan: skip`` does around a step: `begin` before the forward, `judge` before the optimizer, `undo` after.

    Parameters and momentum are kept by the fused optimizer itself, which does nothing where its ``found_inf`` is 1.
    A forward also moves buffers (running statistics and their counters), which are put back here. Nothing waits for the
    device, and all of it may sit in a CUDA graph.

    Args:
        learner: its buffers may change in place only.
        agree: turns a 0-dim float32 into its maximum over all processes, in place, since one process must not take a
            step that another leaves out; None for a single process.
    """

    def __init__(self, learner: nn.Module, agree: Callable[[Tensor], object] | None = None) -> None:
        self._buffers = Packed(dict(learner.named_buffers()))
        self._before = self._buffers.read()
        self._agree = agree

    def begin(self) -> None:
        """Remember the buffers."""
        self._buffers.read(out=self._before)

    @torch.no_grad()
    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Return a 0-dim float32: 1 where the loss or the norm of all gradients is not finite, on any process, else 0.

        Args:
            loss: 0-dim.
            norm: 0-dim, of the gradients of all parameters together.
        """
        bad = (torch.isfinite(loss) & torch.isfinite(norm)).logical_not().to(torch.float32)
        if self._agree is not None:
            self._agree(bad)
        return bad

    def undo(self, bad: Tensor) -> None:
        """Give the buffers the values that they had at `begin` where ``bad``, a 0-dim bool."""
        now = self._buffers.read()
        self._buffers.write([torch.where(bad, old, new) for old, new in zip(self._before, now, strict=True)])
