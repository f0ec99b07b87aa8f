"""How close to float64 `distill_loss` and `fuse_features` have to be, and how close a result came.

The rule: the error against float64 may be four times that of the same formula written with PyTorch's operators in
float32, plus a floor. For loss and terms the floor is 1e-6 of the value. A gradient of the loss is judged element by
element, relative to s = [μ ce (p + y) + λT Σ_e w (p_s + p_t)] / n, the size of what was added up, so that an error in
the tail of a distribution shows; its floor is one unit in the last place of the output dtype. Whatever the fusion
returns is judged by the largest element of its tensor. What is infinite or NaN has to be the same in both.
`fflfast doctor` and the benchmarks judge by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .graph import DistillGraph

__all__ = ["LossSettings", "gradient_scale", "gradient_share", "plain_distill_loss", "tensor_share", "value_share"]


class LossSettings(NamedTuple):
    """The keyword arguments of `distill_loss`, as numbers."""

    temperature: float = 1.0
    kl_weight: float = 1.0
    ce_weight: float = 1.0
    label_smoothing: float = 0.0
    ignore_index: int = -100
    target_eps: float = 0.0
    reduction: str = "mean"


def plain_distill_loss(
    logits: Sequence[Tensor], target: Tensor | None, graph: DistillGraph, settings: LossSettings
) -> tuple[Tensor, Tensor]:
    """(loss, terms) in the logits' own dtype, one PyTorch operator at a time, differentiable by autograd.

    Written from the formula and apart from the operators' reference, so that each can be wrong alone. Rows that do
    not count are taken out first; those with a class index out of range are NaN.
    """
    counted, bad = _rows(logits[0], target, settings)
    z = [t.reshape(-1, t.shape[-1])[counted] for t in logits]
    if bad is not None:
        poison = torch.zeros(len(bad), 1, dtype=z[0].dtype, device=z[0].device).masked_fill(bad[:, None], torch.nan)
        z = [t + poison for t in z]
    u = z + [_mixture(row, z) for row in graph.mixtures]
    rows, weights = [], []
    for i in graph.ce_terms:
        assert target is not None  # a graph with CE terms comes with one
        rows.append(_cross_entropy(z[i], _select(target, counted, z[i]), settings.label_smoothing))
        weights.append(settings.ce_weight * graph.ce_weights[i])
    for edge in graph.edges:
        teacher = u[edge.teacher].detach() if edge.detach else u[edge.teacher]
        rows.append(_kl(teacher, z[edge.student], settings))
        weights.append(settings.kl_weight * edge.weight)
    each = sum((w * r for w, r in zip(weights, rows, strict=True) if w != 0), 0.0 * z[0].detach().new_zeros(len(z[0])))
    count = _count(counted, settings)
    terms = torch.stack([r.sum() for r in rows]) / (max(len(counted), 1) if settings.reduction == "none" else count)
    if settings.reduction == "none":
        full = each.new_zeros(logits[0][..., 0].numel()).index_put((counted,), each)
        return full.reshape(logits[0].shape[:-1]), terms.detach()
    # The empty sum ties the loss to the logits where no row counts.
    return each.sum() / count + sum(t[:0].sum() for t in z), terms.detach()


def gradient_scale(
    logits: Sequence[Tensor], target: Tensor | None, graph: DistillGraph, settings: LossSettings
) -> list[Tensor]:
    """s of the rule in float64, one tensor of the logits' shape a logits tensor; 0 in rows that do not count."""
    counted, _ = _rows(logits[0], target, settings)
    z = [t.detach().reshape(-1, t.shape[-1])[counted].double() for t in logits]
    u = z + [_mixture(row, z) for row in graph.mixtures]
    scales = [torch.zeros_like(t) for t in z]
    for i in graph.ce_terms:
        assert target is not None
        y = _select(target, counted, z[i])
        y = y.double() if y.is_floating_point() else F.one_hot(y, z[i].shape[-1]).double()
        y = y * (1 - settings.label_smoothing) + settings.label_smoothing / y.shape[-1]
        scales[i] += abs(settings.ce_weight * graph.ce_weights[i]) * (F.softmax(z[i], -1) * y.sum(-1, True) + y)
    eps = settings.target_eps
    for teacher, student, weight, detach in graph.edges:
        p_t, p_s = (F.softmax(u[d] / settings.temperature, -1) for d in (teacher, student))
        share = (1 + eps * p_t.shape[-1]) * p_s + p_t + eps
        share *= abs(settings.kl_weight * weight) * settings.temperature
        scales[student] += share
        if not detach:
            row = [float(j == teacher) for j in range(len(z))] if teacher < len(z) else graph.mixtures[teacher - len(z)]
            for j, a in enumerate(row):
                scales[j] += a * share
    count = _count(counted, settings)
    full = [s.new_zeros(logits[0].numel() // s.shape[-1], s.shape[-1]) for s in scales]
    return [f.index_copy_(0, counted, s / count).reshape(t.shape) for f, s, t in zip(full, scales, logits, strict=True)]


def value_share(got: Tensor, plain: Tensor, exact: Tensor) -> float:
    """Worst error of a loss or of terms as a share of what the rule allows: at most 1 passes."""
    if got.shape != exact.shape:
        return torch.inf
    floor = 1e-14 if got.dtype == torch.float64 else 1e-6
    got, plain, exact = (t.detach().double().cpu() for t in (got, plain, exact))
    baseline = _largest((plain - exact).abs())
    return _worst_share(got, exact, 4 * baseline + floor * exact.abs())


def gradient_share(got: Tensor, plain: Tensor, exact: Tensor, scale: Tensor) -> float:
    """Worst error of a gradient as a share of what the rule allows: at most 1 passes."""
    if got.shape != exact.shape:
        return torch.inf
    limits = torch.finfo(got.dtype)
    got, plain, exact, scale = (t.detach().double().cpu() for t in (got, plain, exact, scale))
    scale = scale.nan_to_num(0.0).clamp(min=1e-300)
    baseline = _largest((plain - exact).abs() / scale)
    # float64 is measured against itself, so its baseline is zero. Subnormals of the output have an absolute step.
    allowed = limits.eps * exact.abs() + (4 * baseline + 4e-15) * scale
    return _worst_share(got, exact, allowed.clamp(min=limits.smallest_normal * limits.eps))


def tensor_share(got: Tensor, plain: Sequence[Tensor], exact: Tensor, floor: float) -> float:
    """Worst error of a tensor as a share of what is allowed where elements are judged by the largest among them.

    Four times the worst error of PyTorch's operators, which `plain` has in several orders of summation, plus `floor`
    of the largest value.
    """
    if any(t.shape != exact.shape for t in (got, *plain)):
        return torch.inf
    got, exact = (t.detach().double().cpu() for t in (got, exact))
    baseline = max(_largest((t.detach().double().cpu() - exact).abs()) for t in plain)
    allowed = torch.full_like(exact, 4 * baseline + floor * _largest(exact.abs()))
    return _worst_share(got, exact, allowed)


def _rows(like: Tensor, target: Tensor | None, settings: LossSettings) -> tuple[Tensor, Tensor | None]:
    """(indices of the counted rows, which of them have a class index out of range or None)."""
    if target is None or target.is_floating_point():
        return torch.arange(like[..., 0].numel(), device=like.device), None
    y = target.reshape(-1)
    counted = (y != settings.ignore_index).nonzero().squeeze(-1)
    y = y[counted]
    return counted, (y < 0) | (y >= like.shape[-1])


def _select(target: Tensor, counted: Tensor, like: Tensor) -> Tensor:
    if target.is_floating_point():
        return target.reshape(-1, target.shape[-1])[counted].to(like.dtype)
    return target.reshape(-1)[counted].clamp(0, like.shape[-1] - 1)


def _count(counted: Tensor, settings: LossSettings) -> int:
    return max(len(counted), 1) if settings.reduction in ("mean", "batchmean") else 1


def _mixture(row: Sequence[float], z: Sequence[Tensor]) -> Tensor:
    # Zero coefficients are left out: 0·(−inf) is NaN.
    return torch.stack([a * t for a, t in zip(row, z, strict=True) if a != 0]).sum(0)


def _cross_entropy(z: Tensor, y: Tensor, smoothing: float) -> Tensor:
    log_p = F.log_softmax(z, -1)
    if y.is_floating_point():
        y = y * (1 - smoothing) + smoothing / y.shape[-1]
        return -(y * log_p).masked_fill(y == 0, 0.0).sum(-1)
    right = log_p.gather(-1, y[:, None]).squeeze(-1)
    return -right if smoothing == 0 else -((1 - smoothing) * right + smoothing * log_p.mean(-1))


def _kl(teacher: Tensor, student: Tensor, settings: LossSettings) -> Tensor:
    temperature = settings.temperature
    log_q, log_s = F.log_softmax(teacher / temperature, -1), F.log_softmax(student / temperature, -1)
    q = log_q.exp()
    if settings.target_eps:
        q = q + settings.target_eps
        log_q = q.log()
    # Masked before the product, so that autograd never meets 0·(−inf − (−inf)).
    ratio = (log_q - log_s).masked_fill(q == 0, 0.0)
    return temperature**2 * (q * ratio).sum(-1)


def _largest(error: Tensor) -> float:
    finite = error[error.isfinite()]
    return float(finite.max()) if finite.numel() else 0.0


def _worst_share(got: Tensor, exact: Tensor, allowed: Tensor) -> float:
    finite = exact.isfinite()
    same = torch.where(finite, got.isfinite(), (got == exact) | (got.isnan() & exact.isnan()))
    if not bool(same.all()):
        return torch.inf
    error, allowed = (got - exact).abs()[finite], allowed[finite]
    # Where nothing is allowed, only equality passes.
    share = torch.where(error == 0, 0.0, error / allowed)
    return float(share.max()) if share.numel() else 0.0
