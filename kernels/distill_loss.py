"""The Triton backend of `distill_loss`: what prepares and launches the kernels.

Same contracts as the native libraries' private operators, with the `DistillGraph` in place of their table. Nothing
here waits for the device: a scalar on the CPU is passed by value, one on the device as a pointer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..graph import DistillGraph
from . import device, launch
from .distill_loss_kernels import backward_kernel, count_kernel, finish_kernel, forward_kernel, scale_kernel
from .plan import INDEX, NO_TARGET, PROBABILITIES, Plan, plan

__all__ = ["distill_loss", "distill_loss_backward", "scale_gradients"]

NONE, MEAN, SUM = 0, 1, 2


def distill_loss(
    logits: Sequence[Tensor],
    target: Tensor | None,
    temperature: Tensor,
    kl_weight: Tensor,
    ce_weight: Tensor,
    graph: DistillGraph,
    label_smoothing: float,
    ignore_index: int,
    target_eps: float,
    reduction: int,
    gradients: int,
) -> list[Tensor]:
    """[loss, terms, statistics], or with the gradients that the bits ask for [loss, terms, g_0 … g_{M−1}].

    Args:
        logits: M tensors (R, C) of one dtype with class stride 1 and any row stride, R ≥ 1, C ≥ 1.
        target: None, class indices (R,) int64, or probabilities (R, C) in the accumulation dtype.
        temperature, kl_weight, ce_weight: 0-dim in the accumulation dtype, on the CPU or beside the logits.
        graph: who teaches whom.
        label_smoothing, ignore_index, target_eps: as `fflfast.distill_loss`.
        reduction: 0 none, 1 mean, 2 sum.
        gradients: bit i is set where the gradient of logits i is wanted, for a gradient of the loss of 1.

    Returns:
        loss (R,) for none, else 0-dim; terms (num_terms,); statistics flat as csrc/distill_graph.h says; gradients
        contiguous (R, C), an empty tensor (0,) where none is wanted.
    """
    z = logits[0]
    num_rows = z.shape[0]
    scalars, by_pointer = _scalars(z, temperature, kl_weight, ce_weight, label_smoothing, target_eps)
    k, warps = _plan(graph, logits, target, label_smoothing, target_eps, by_pointer)
    arguments = _tensors(logits, target, k.vec)
    acc = scalars_dtype(z.dtype)
    num_programs = launch.programs(-(-num_rows // k.rows))
    terms = z.new_empty(graph.num_terms, dtype=acc)
    loss = z.new_empty((num_rows,) if reduction == NONE else (), dtype=acc)
    partials = z.new_empty((graph.num_terms + 2) * num_programs, dtype=acc)
    statistics = None if gradients else z.new_empty(1 + num_rows * k.columns.width, dtype=acc)
    grads = _empty_gradients(logits, gradients)
    with device.of(z):
        count, counts, num_counts = 0, None, 0
        if gradients and reduction == MEAN:
            count = 1
            if k.target == INDEX:
                count = 3
                if num_rows > launch.COUNT_IN_KERNEL:
                    count = 2
                    counts, num_counts = _count(target, num_rows, ignore_index)
        forward_kernel[(num_programs,)](
            *arguments, *scalars, ignore_index, num_rows, z.shape[1] // k.vec, loss if reduction == NONE else None,
            partials, statistics, grads, counts, num_counts, count,
            launch.COUNT_PROGRAMS if count == 2 else launch.COUNT_BLOCK, gradients, k, num_warps=warps,
        )  # fmt: skip
        finish_kernel[(graph.num_terms + 1,)](
            partials, None if reduction == NONE else loss, terms, statistics, num_programs, reduction == MEAN,
            reduction != SUM, graph.num_terms, launch.SUM_BLOCK, num_warps=launch.FEWEST_WARPS,
        )  # fmt: skip
    return [loss, terms, statistics] if statistics is not None else [loss, terms, *grads]


def distill_loss_backward(
    grad_loss: Tensor,
    logits: Sequence[Tensor],
    target: Tensor | None,
    statistics: Tensor,
    temperature: Tensor,
    kl_weight: Tensor,
    ce_weight: Tensor,
    graph: DistillGraph,
    label_smoothing: float,
    ignore_index: int,
    target_eps: float,
    reduction: int,
    needs_grad: int,
) -> list[Tensor]:
    """The M gradients from the base form's statistics, contiguous (R, C), empty (0,) where the bit is not set.

    Args:
        grad_loss: 0-dim, or (R,) for reduction none, in the accumulation dtype.
        statistics: the third result of `distill_loss` for the same arguments.
        needs_grad: bit i is set where the gradient of logits i is wanted.
    """
    grads = _empty_gradients(logits, needs_grad)
    if needs_grad:
        z = logits[0]
        scalars, by_pointer = _scalars(z, temperature, kl_weight, ce_weight, label_smoothing, target_eps)
        k, warps = _plan(graph, logits, target, label_smoothing, target_eps, by_pointer)
        with device.of(z):
            backward_kernel[(launch.programs(-(-z.shape[0] // k.rows)),)](
                *_tensors(logits, target, k.vec), *scalars, ignore_index, z.shape[0], z.shape[1] // k.vec, grad_loss,
                statistics, grads, reduction == NONE, reduction == MEAN, needs_grad, k, num_warps=warps,
            )  # fmt: skip
    return list(grads)


def scale_gradients(grad_loss: Tensor, gradients: Sequence[Tensor]) -> None:
    """g ← g·grad_loss in place, for gradients of one size; empty ones are skipped, and a factor of 1 costs nothing."""
    filled = tuple(g for g in gradients if g.numel())
    if filled:
        size = filled[0].numel()
        vec = min(size & -size, 16 // filled[0].element_size())
        with device.of(filled[0]):
            scale_kernel[(min(-(-size // launch.SCALE_BLOCK), launch.SCALE_PROGRAMS),)](
                grad_loss, filled, size // vec, vec, launch.SCALE_BLOCK, num_warps=launch.FEWEST_WARPS
            )


def scalars_dtype(dtype: torch.dtype) -> torch.dtype:
    """The accumulation dtype of logits of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scalars(z: Tensor, *scalars: Tensor | float) -> tuple[tuple[Tensor | float, ...], int]:
    """Numbers and pointers for the kernels, and which of them are pointers, as bits.

    Triton passes a Python number as float32. For float64 every scalar therefore becomes a tensor; `torch.full` fills
    it by a kernel, where a copy from the host would synchronise.
    """
    double = z.dtype == torch.float64
    arguments: list[Tensor | float] = []
    by_pointer = 0
    for bit, scalar in enumerate(scalars):
        if isinstance(scalar, Tensor) and scalar.device == z.device and (double or not z.is_cpu):
            by_pointer |= 1 << bit
            arguments.append(scalar)
        elif double:
            by_pointer |= 1 << bit
            arguments.append(torch.full((), float(scalar), dtype=z.dtype, device=z.device))
        else:
            arguments.append(float(scalar))
    return tuple(arguments), by_pointer


def _plan(
    graph: DistillGraph,
    logits: Sequence[Tensor],
    target: Tensor | None,
    label_smoothing: float,
    target_eps: float,
    by_pointer: int,
) -> tuple[Plan, int]:
    """What the kernels are compiled for, and their number of warps."""
    z = logits[0]
    num_classes, size = z.shape[1], z.element_size()
    kind = NO_TARGET
    units = num_classes
    for t in logits:
        units |= t.stride(0)
    if target is not None and graph.needs_target:
        kind = PROBABILITIES if target.is_floating_point() else INDEX
        if kind == PROBABILITIES:
            units |= target.stride(0)
    elif target is not None and not target.is_floating_point():
        # No term looks at the class, but ignored and bad rows are still what they are.
        kind = INDEX
    vec = min(units & -units, 16 // size)
    tile = launch.tile(num_classes, size, graph.num_logits + graph.num_mixtures + len(graph.edges), vec)
    k = plan(
        graph, kind, label_smoothing != 0.0 and graph.needs_target, target_eps != 0.0, by_pointer, size == 8,
        tile.rows, tile.block, num_classes <= tile.block, vec,
    )  # fmt: skip
    return k, tile.warps


def _tensors(logits: Sequence[Tensor], target: Tensor | None, vec: int) -> tuple[object, ...]:
    """The kernels' first arguments: pointers and strides in units of `vec` elements."""
    stride = target.stride(0) // vec if target is not None and target.dim() == 2 else 0
    return tuple(logits), tuple(t.stride(0) // vec for t in logits), target, stride


def _empty_gradients(logits: Sequence[Tensor], wanted: int) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(z, memory_format=torch.contiguous_format) if (wanted >> i) & 1 else z.new_empty(0)
        for i, z in enumerate(logits)
    )


def _count(target: Tensor | None, num_rows: int, ignore_index: int) -> tuple[Tensor, int]:
    """Partial counts of the counted rows, and how many there are."""
    assert target is not None
    each = launch.COUNT_BLOCK * -(-num_rows // (launch.COUNT_BLOCK * launch.COUNT_PROGRAMS))
    num_counts = -(-num_rows // each)
    counts = torch.empty(num_counts, dtype=torch.int32, device=target.device)
    count_kernel[(num_counts,)](target, counts, num_rows, each, ignore_index, launch.COUNT_BLOCK)
    return counts, num_counts
