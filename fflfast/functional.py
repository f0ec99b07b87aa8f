"""The losses and the fusion as functions: tensors in, tensors out.

Everything a caller can get wrong is checked before the operators, which may rely on it (`loss_arguments`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .graph import DistillGraph
from .loss_arguments import (
    Scalar,
    cached_settings,
    check_classes,
    checked_logits,
    checked_settings,
    checked_target,
    is_number,
    scalar,
)
from .ops import distill_loss as _op
from .ops.fuse_features import fuse_features
from .ops.fusion_arguments import FusionOutput, FusionStatistics, NormParams
from .ops.reference import accumulation_dtype

__all__ = [
    "DistillLossOutput",
    "FusionOutput",
    "FusionStatistics",
    "NormParams",
    "distill_loss",
    "fuse_features",
    "kd_loss",
    "kl_div_with_logits",
]


class DistillLossOutput(NamedTuple):
    """What `distill_loss` returns.

    Attributes:
        loss: 0-dim, or one value a row (...) for reduction none; float32 (float64 for float64 logits).
        terms: (num_terms,), detached, in the order of ``graph.term_names``: each plain CE and each T²·KL without
            any weight, a mean over the counted rows (reductions none and mean) or a sum (reduction sum).
    """

    loss: Tensor
    terms: Tensor


def distill_loss(
    logits: Sequence[Tensor],
    target: Tensor | None,
    graph: DistillGraph,
    *,
    temperature: Scalar = 1.0,
    kl_weight: Scalar = 1.0,
    ce_weight: Scalar = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    target_eps: float = 0.0,
    reduction: str = "mean",
) -> DistillLossOutput:
    """Cross-entropy and distillation of a whole cohort in one operator.

    L = μ · Σ_i ce_i · CE(z_i, y)  +  λ · Σ_e w_e · T² · KL( softmax(u_t(e)/T) ‖ softmax(z_s(e)/T) )

    over the edges e of `graph` (T² keeps the gradient's size, Hinton et al. 2015; the graphs: `DistillGraph`).

    Args:
        logits: M tensors of one shape (..., C) on one device, floating point, in the graph's order. Mixed dtypes
            are promoted to the widest. Those without requires_grad get no gradient. −inf masks a class.
        target: class indices, int64 of shape (...), or probabilities of shape (..., C), or None where the graph
            has no CE term.
        graph: who teaches whom.
        temperature: T > 0. Like λ and μ a number or a 0-dim tensor, on the CPU or on the logits' device.
        kl_weight: λ; a weight of zero removes its terms even where they are infinite.
        ce_weight: μ, likewise.
        label_smoothing: in [0, 1], as in `torch.nn.functional.cross_entropy`.
        ignore_index: rows with this class index add to no term and are not counted.
        target_eps: added to the teacher's probabilities without renormalising (the original FFL code has 1e-7); a
            class that is masked in the student then has an infinite loss, as the teacher's ε is mass.
        reduction: none = per row; mean or batchmean = sum over rows ÷ counted rows, 0 if none is; sum.

    Returns:
        DistillLossOutput(loss, terms).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, counts or values that do not fit. A class index out of
            range raises in eager code on the CPU; on a device and in compiled code it makes that row's loss and
            gradients NaN.
        RuntimeError: when differentiated twice, in forward mode, or by torch.func.

    Example:
        >>> graph = DistillGraph.ffl(2)
        >>> z = [torch.randn(8, 10, requires_grad=True) for _ in range(3)]  # sub0, sub1, fused
        >>> loss, terms = distill_loss(z, torch.randint(10, (8,)), graph, temperature=3.0, kl_weight=0.5)
        >>> loss.backward()
    """
    logits = checked_logits("distill_loss", logits, graph)
    traced = _op.is_traced(logits[0])
    settings = checked_settings if traced else cached_settings
    options = settings(graph, label_smoothing, ignore_index, target_eps, reduction)
    target = checked_target("distill_loss", target, logits[0], graph)
    dtype = accumulation_dtype(logits[0].dtype)
    scalars = (
        scalar("temperature", temperature, logits[0], dtype, traced),
        scalar("kl_weight", kl_weight, logits[0], dtype, traced),
        scalar("ce_weight", ce_weight, logits[0], dtype, traced),
    )
    if traced or target is None or not target.is_cpu or target.is_floating_point():
        return DistillLossOutput(*_op.distill_loss(logits, target, scalars, options, traced))
    if options.reduction == "none":
        check_classes("distill_loss", target, logits[0].shape[-1], options.ignore_index)
    output = DistillLossOutput(*_op.distill_loss(logits, target, scalars, options, traced))
    # A class out of range makes the whole loss NaN, so that a good batch need not be looked through.
    if options.reduction != "none" and math.isnan(output.loss.item()):
        check_classes("distill_loss", target, logits[0].shape[-1], options.ignore_index)
    return output


_KL_GRAPHS = {
    detach: DistillGraph(2, (0.0, 0.0), (), ((1, 0, 1.0, detach),), ("student", "teacher")) for detach in (True, False)
}
_KD_GRAPH = DistillGraph.kd()


def kl_div_with_logits(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: Scalar = 1.0,
    reduction: str = "batchmean",
    detach_teacher: bool = True,
) -> Tensor:
    """T² · KL( softmax(teacher/T) ‖ softmax(student/T) ) from two logits tensors.

    For 2-d input it equals ``F.kl_div(log_softmax(student/T), softmax(teacher/T), reduction=…) * T**2``.

    Args:
        student: logits (..., C); a row is one index of the leading dimensions.
        teacher: logits of the same shape.
        temperature: T > 0, a number or a 0-dim tensor.
        reduction: none = per row, shape (...) (`F.kl_div` gives elements); mean = ÷ number of elements, as
            `F.kl_div` has it; batchmean = ÷ number of rows; sum. An empty batch gives 0.
        detach_teacher: whether the teacher gets no gradient.

    Returns:
        The divergence in float32 (float64 for float64 logits), 0-dim or (...).

    Raises:
        ValueError, TypeError: as `distill_loss`.
    """
    if reduction not in ("none", "mean", "batchmean", "sum"):
        raise ValueError(f"kl_div_with_logits: reduction must be none, mean, batchmean or sum, got {reduction!r}")
    loss = distill_loss(
        (student, teacher), None, _KL_GRAPHS[bool(detach_teacher)], temperature=temperature, reduction=reduction
    ).loss
    return loss / student.shape[-1] if reduction == "mean" else loss


def kd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    temperature: Scalar,
    alpha: Scalar,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Knowledge distillation: (1−α)·CE(student, target) + α·T²·KL(teacher ‖ student), the teacher detached.

    Hinton, Vinyals, Dean 2015, arXiv 1503.02531. Note that α weights the KL here.

    Args:
        student: logits (..., C).
        teacher: logits of the same shape.
        target: class indices int64 (...), or probabilities (..., C).
        temperature: T > 0, a number or a 0-dim tensor.
        alpha: α, a number or a 0-dim tensor.
        label_smoothing, ignore_index, reduction: as `distill_loss`; ignored rows count in neither term.

    Returns:
        The loss in float32 (float64 for float64 logits), 0-dim or (...).

    Raises:
        ValueError, TypeError: as `distill_loss`.
    """
    if not isinstance(alpha, Tensor) and not is_number(alpha):
        raise TypeError(f"kd_loss: alpha must be a number or a 0-dim tensor, got {alpha!r}")
    if isinstance(alpha, Tensor) and alpha.requires_grad:
        raise ValueError("kd_loss: alpha must not require grad (it gets none); pass alpha.detach()")
    return distill_loss(
        (student, teacher),
        target,
        _KD_GRAPH,
        temperature=temperature,
        kl_weight=alpha,
        ce_weight=1.0 - alpha,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
    ).loss
