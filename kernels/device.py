"""Where Triton's kernels are launched, and the counters with which a launch's programs find out who is last."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["of", "tickets"]

# A launch takes one counter for each group of programs that sum something together.
COUNTERS = 8192

_counters: dict[tuple[torch.device, int], Tensor] = {}


def of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make that the tensor's."""
    if tensor.is_cpu:
        return nullcontext()
    device = torch.get_device_module(tensor.device)
    return nullcontext() if device.current_device() == tensor.device.index else device.device(tensor.device)


def tickets(like: Tensor, count: int) -> Tensor:
    """At least `count` counters of zero beside `like`, which each launch leaves at zero.

    Launches of one stream run one after the other, so that a stream has counters for good. A captured launch may be
    replayed beside any other: it has counters of its own, set to zero by the graph it is a part of.
    """
    if like.is_cpu:
        stream = 0
    else:
        module = torch.get_device_module(like.device)
        if count > COUNTERS or (like.is_cuda and module.is_current_stream_capturing()):
            return torch.zeros(count, dtype=torch.int32, device=like.device)
        stream = module.current_stream(like.device).stream_id
    key = (like.device, stream)
    if key not in _counters or _counters[key].numel() < count:
        _counters[key] = torch.zeros(max(count, COUNTERS), dtype=torch.int32, device=like.device)
    return _counters[key]
