"""What a caller of the losses can get wrong, told on what the host can see without synchronising.

The way through is as short as it can be: at 128 rows of 100 classes it takes longer than a kernel does.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .graph import DistillGraph
from .ops import distill_loss as _op

__all__ = [
    "Scalar",
    "cached_settings",
    "check_classes",
    "checked_logits",
    "checked_settings",
    "checked_target",
    "is_number",
    "scalar",
]

Scalar = float | Tensor
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def checked_logits(op: str, logits: Sequence[Tensor], graph: DistillGraph) -> list[Tensor]:
    if not isinstance(graph, DistillGraph):
        raise TypeError(f"{op}: graph must be a DistillGraph, got {type(graph).__name__}; e.g. DistillGraph.ffl(2)")
    if isinstance(logits, Tensor) or not isinstance(logits, Sequence):
        raise TypeError(f"{op}: logits must be a sequence of {graph.num_logits} tensors, got {type(logits).__name__}")
    if len(logits) != graph.num_logits:
        raise ValueError(
            f"{op}: the graph has {graph.num_logits} logits tensors ({', '.join(graph.logit_names)}), got {len(logits)}"
        )
    if _as_usual(logits):
        return list(logits)
    dtype: torch.dtype | None = None
    for name, z in zip(graph.logit_names, logits, strict=True):
        if not isinstance(z, Tensor) or not z.is_floating_point():
            kind = z.dtype if isinstance(z, Tensor) else type(z).__name__
            raise TypeError(f"{op}: logits {name!r} must be a floating-point tensor, got {kind}")
        if z.dtype not in _DTYPES or z.layout != torch.strided:
            raise TypeError(
                f"{op}: logits {name!r} must be a dense tensor of float16, bfloat16, float32 or float64, got {z.dtype} "
                f"{z.layout}"
            )
        if z.dim() == 0 or z.shape[-1] == 0:
            raise ValueError(f"{op}: logits {name!r} must have shape (..., C) with C ≥ 1, got {tuple(z.shape)}")
        if z.shape != logits[0].shape:
            raise ValueError(
                f"{op}: all logits must have one shape, got {tuple(logits[0].shape)} for {graph.logit_names[0]!r} and "
                f"{tuple(z.shape)} for {name!r}; slice or pad the classes before the call"
            )
        if z.device != logits[0].device:
            raise ValueError(
                f"{op}: all logits must be on one device, got {logits[0].device} and {z.device} ({name!r})"
            )
        dtype = z.dtype if dtype is None else torch.promote_types(dtype, z.dtype)
    return [_savable(z.to(dtype)) for z in logits]


def _as_usual(logits: Sequence[Tensor]) -> bool:
    """Whether nothing is to be said or converted, at the least cost; what follows words errors and promotes dtypes."""
    first = logits[0]
    if not isinstance(first, Tensor) or first.dtype not in _DTYPES or torch.compiler.is_compiling():
        return False
    shape, dtype, device = first.shape, first.dtype, first.device
    if len(shape) == 0 or shape[-1] == 0:
        return False
    for z in logits:
        if (
            not isinstance(z, Tensor)
            or z.dtype is not dtype
            or z.shape != shape
            or z.device != device
            or z.layout is not torch.strided
            or z.is_inference()
        ):
            return False
    return True


def checked_settings(
    graph: DistillGraph, label_smoothing: float, ignore_index: int, target_eps: float, reduction: str
) -> _op.LossOptions:
    """What is fixed when a loss is written down."""
    if isinstance(ignore_index, (bool, Tensor)) or not hasattr(ignore_index, "__index__"):
        raise TypeError(f"distill_loss: ignore_index must be an int, got {ignore_index!r}")
    ignore_index = int(ignore_index)
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"distill_loss: ignore_index must fit int64, got {ignore_index}")
    label_smoothing = _in_range("distill_loss", "label_smoothing", label_smoothing, 0.0, 1.0)
    target_eps = _in_range("distill_loss", "target_eps", target_eps, 0.0, math.inf)
    if reduction not in ("none", "mean", "batchmean", "sum"):
        raise ValueError(f"distill_loss: reduction must be none, mean, batchmean or sum, got {reduction!r}")
    return _op.LossOptions(
        graph, label_smoothing, ignore_index, target_eps, "mean" if reduction == "batchmean" else reduction
    )


# In a training step the settings are those of the step before. Typed, so that True is not taken for 1.
cached_settings = lru_cache(maxsize=256, typed=True)(checked_settings)


def checked_target(op: str, target: Tensor | None, like: Tensor, graph: DistillGraph) -> Tensor | None:
    if target is None:
        if graph.needs_target:
            raise ValueError(f"{op}: the graph has cross-entropy terms, so target must be given, got None")
        return None
    if not isinstance(target, Tensor):
        raise TypeError(f"{op}: target must be a tensor or None, got {type(target).__name__}")
    if target.device != like.device:
        raise ValueError(f"{op}: target must be on the logits' device {like.device}, got {target.device}")
    if target.is_floating_point():
        if target.shape != like.shape:
            raise ValueError(
                f"{op}: target probabilities must have the logits' shape {tuple(like.shape)}, got "
                f"{tuple(target.shape)}; class indices must be int64"
            )
        if target.requires_grad:
            raise ValueError(f"{op}: target must not require grad; detach it, or make it a teacher with detach=False")
        return _savable(target)
    if target.dtype != torch.int64:
        raise TypeError(
            f"{op}: target must hold class indices as int64 or probabilities as floats, got {target.dtype}; "
            "call target.long()"
        )
    if target.shape != like.shape[:-1]:
        raise ValueError(
            f"{op}: class indices must have the shape {tuple(like.shape[:-1])} of the rows of logits "
            f"{tuple(like.shape)}, got {tuple(target.shape)}"
        )
    return _savable(target)


def check_classes(op: str, target: Tensor, num_classes: int, ignore_index: int) -> None:
    bad = (target != ignore_index) & ((target < 0) | (target >= num_classes))
    if bool(bad.any()):
        raise ValueError(
            f"{op}: class indices must be in [0, {num_classes}) or ignore_index={ignore_index}, got "
            f"{int(target[bad][0])}"
        )


def _savable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one from inference mode (a frozen teacher, say), which autograd cannot save.

    Traced tensors are left alone: torch.compile cannot ask where they come from.
    """
    if torch.compiler.is_compiling() or not tensor.is_inference() or torch.is_inference_mode_enabled():
        return tensor
    return tensor.clone()


def is_number(value: object) -> bool:
    # A traced float passes the first test; torch 2.10 cannot ask it for attributes.
    if isinstance(value, (int, float)):
        return not isinstance(value, bool)
    return hasattr(value, "__float__") and not isinstance(value, Tensor)


def _in_range(op: str, name: str, value: float, low: float, high: float) -> float:
    if not is_number(value):
        raise TypeError(f"{op}: {name} must be a number, got {value!r}")
    if not low <= value <= min(high, sys.float_info.max):  # math.isfinite cannot be traced with a dynamic float
        raise ValueError(f"{op}: {name} must be a finite number in [{low:g}, {high:g}], got {value}")
    return float(value)


def scalar(name: str, value: Scalar, like: Tensor, dtype: torch.dtype, traced: bool) -> Tensor:
    """T, λ or μ as a 0-dim tensor of `dtype`, where it is or on the CPU."""
    if not traced and type(value) is float:
        return _constant(name, value, dtype)
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.is_complex() or value.dtype == torch.bool:
            raise ValueError(
                f"distill_loss: {name} must be a number or a real 0-dim tensor, got {value.dtype} {tuple(value.shape)}"
            )
        if value.requires_grad:
            raise ValueError(f"distill_loss: {name} must not require grad (it gets none); pass {name}.detach()")
        if value.device.type != "cpu" and value.device != like.device:
            raise ValueError(f"distill_loss: {name} must be on the CPU or on {like.device}, got {value.device}")
        if value.device.type == "cpu" and not traced and not _op.is_traced(value):
            _check_value(name, value.item(), dtype)
        return _savable(value.to(dtype))
    if not is_number(value):
        raise TypeError(f"distill_loss: {name} must be a number or a 0-dim tensor, got {value!r}")
    _check_value(name, value, dtype)
    if not traced:
        return _constant(name, float(value), dtype)
    # Any other way to make a tensor of a float recompiles at each new value.
    return torch.ones((), dtype=dtype, device="cpu") * value


@lru_cache(maxsize=256)
def _constant(name: str, value: float, dtype: torch.dtype) -> Tensor:
    """A checked number as a tensor on the CPU. Operators only read it, so that equal numbers may share one."""
    _check_value(name, value, dtype)
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device="cpu")


def _check_value(name: str, value: float, dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    if name == "temperature" and not value >= limits.tiny:
        raise ValueError(f"distill_loss: {name} must be greater than 0 (at least {limits.tiny:.3g}), got {value}")
    if not (-limits.max <= value <= limits.max):
        raise ValueError(f"distill_loss: {name} must be finite in {dtype}, got {value}")
