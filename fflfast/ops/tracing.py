"""What an operator must know of its call before it takes the short way past the dispatcher."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

__all__ = ["is_exported", "is_traced", "is_transformed"]


def is_traced(tensor: Tensor) -> bool:
    """Whether the call is being traced, or the tensor has no values to look at."""
    return (
        torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter) or is_in_torch_dispatch_mode()
    )


def is_transformed(tensors: Iterable[Tensor]) -> bool:
    """Whether torch.func or forward-mode differentiation is at work on the tensors, which a kernel would not see."""
    if torch._C._are_functorch_transforms_active():
        return True
    level = forward_ad._current_level
    return level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def is_exported() -> bool:
    """Whether torch.export is at work, whose result must run where fflfast is not installed."""
    # The flag behind torch.compiler.is_exporting, which Dynamo 2.10 takes for true whatever it compiles.
    return torch.compiler._is_exporting_flag
