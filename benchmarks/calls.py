"""What is measured, whatever the operator: calls, those who can make them, and the backends among these."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fflfast

__all__ = ["Call", "Variant", "available_backends", "context", "under"]

# A function or a module from a data set's arguments to a tensor.
Call = Callable[..., Tensor]
# A name and a factory from a case to a call, so that nothing is compiled or imported before its turn.
Variant = tuple[str, Callable[[Any], Call]]


def under(backend: str, call: Call) -> Call:
    """The call with its backend forced, without paying for a context manager in each one."""
    call.context = lambda: fflfast.use_backend(backend)  # type: ignore[attr-defined]
    return call


def context(call: Call) -> contextlib.AbstractContextManager[Any]:
    """What has to be open while a variant runs, its backward included."""
    return getattr(call, "context", contextlib.nullcontext)()


def available_backends(device: torch.device) -> list[str]:
    """Ours that can run on a device; the reference only where there is nothing else, as it is no competitor."""
    elsewhere = ("cuda", "triton") if device.type == "cpu" else ("cpu",)
    ours = [name for name, state in fflfast.backends().items() if state == "available" and name not in elsewhere]
    return ours if len(ours) == 1 else [name for name in ours if name != "reference"]
