"""An exponential moving average of the weights, kept on the device beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .buffers import own_buffers
from .packed import Packed

__all__ = ["Averages"]


class Averages:
    """Averages of what a learner learns: its trainable parameters and floating-point buffers.

    Other buffers are copied as they are. What keeps its own value: frozen parameters (a teacher, peers that are an
    average themselves), buffers that are not saved, and what the method keeps equal over the processes by itself (a
    memory of the images is no weight, and large).

    Update t, counted from 0, moves each average by w_t = max(1 − decay, 1/(t + 1)) towards the value: the plain mean at
    first, then exponential, so that the start of the training is forgotten as fast as it can be. t is counted on the
    device: an update neither waits for it nor depends on the host, and may sit in a CUDA graph.

    Args:
        learner: on its device; its parameters and buffers may change in place only.
        decay: in [0, 1).

    Attributes:
        updates: int64, 0-dim: how many there were.

    Raises:
        ValueError: decay out of range.
    """

    def __init__(self, learner: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"Averages: expected a decay from 0 to below 1, got {decay!r}")
        self.decay = decay
        saved = learner.state_dict().keys()  # a buffer that is not saved is rebuilt, not learned
        held: dict[str, Tensor] = {name: p for name, p in learner.named_parameters() if p.requires_grad}
        held |= {name: buffer for name, buffer in own_buffers(learner).items() if name in saved}
        self._learned = Packed({name: tensor for name, tensor in held.items() if tensor.is_floating_point()})
        self._counted = Packed({name: tensor for name, tensor in held.items() if not tensor.is_floating_point()})
        self._means, self._copies = self._learned.read(), self._counted.read()
        device = next(iter(held.values())).device
        self.updates = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, bad: Tensor | None = None) -> None:
        """Take in the values of the learner; where ``bad``, a 0-dim bool, change nothing."""
        weight = (self.updates + 1).reciprocal().clamp(min=1 - self.decay)
        for mean, now in zip(self._means, self._learned.read(), strict=True):
            if bad is None:
                mean.lerp_(now, weight.to(mean.dtype))
            else:
                # A weight of zero instead would turn −0 into 0.
                torch.where(bad, mean, mean.lerp(now, weight.to(mean.dtype)), out=mean)
        self._counted.read(out=self._copies)  # what was left out of a bad step is back at its old value here
        self.updates.add_(1 if bad is None else ~bad)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the learner the averages in place, and its own values, the same bits, back afterwards."""
        own = self._learned.read(), self._counted.read()
        try:
            self._learned.write(self._means)
            self._counted.write(self._copies)
            yield
        finally:
            self._learned.write(own[0])
            self._counted.write(own[1])

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds: averages by the names of the learner's state_dict, and ``updates``.

        They are the averages themselves, not copies.
        """
        return {**self._learned.views(self._means), **self._counted.views(self._copies), "updates": self.updates}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` returned, in place; KeyError where one is missing."""
        for name, own in self.tensors().items():
            own.copy_(tensors[name])

    def state(self) -> list[Tensor]:
        """Return the tensors that `update` changes, few and large."""
        return [*self._means, *self._copies, self.updates]
