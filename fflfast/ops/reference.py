"""The plain-PyTorch definition of every operator: the specification that each backend is tested against.

Everything runs in float32, or in float64 when the inputs are float64, and handles −inf logits, ignored rows and
targets that only the device can check without synchronising. Nothing here is tuned for speed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..graph import DistillGraph

__all__ = ["batch_norm", "distill_loss", "distill_loss_backward", "fuse_features"]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- distill_loss ---------------------------------------------------------------------------------------------


def _distributions(logits: Sequence[Tensor], graph: DistillGraph) -> list[Tensor]:
    """The M+V logits u_d in the accumulation dtype. A mixture skips zero coefficients, as 0·(−inf) is NaN."""
    z = [t.to(accumulation_dtype(t.dtype)) for t in logits]
    for row in graph.mixtures:
        terms = [a * z[j] for j, a in enumerate(row) if a != 0.0]
        z.append(sum(terms[1:], terms[0]))
    return z


def _row_state(logits: Tensor, target: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """(counted rows as bool, rows whose class index is out of range as bool or None), each of shape (...)."""
    if target is None or target.is_floating_point():
        return torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device), None
    counted = target != ignore_index
    return counted, counted & ((target < 0) | (target >= logits.shape[-1]))


def _target_probabilities(target: Tensor, like: Tensor, label_smoothing: float) -> Tensor:
    """The target as probabilities (..., C): one-hot rows or the given ones, smoothed as F.cross_entropy does."""
    num_classes = like.shape[-1]
    if target.is_floating_point():
        y = target.to(like.dtype)
    else:
        safe = target.clamp(0, num_classes - 1).unsqueeze(-1)
        y = torch.zeros_like(like, memory_format=torch.contiguous_format).scatter(-1, safe, 1.0)
    return y if label_smoothing == 0.0 else y * (1.0 - label_smoothing) + label_smoothing / num_classes


def _beside(logits: Tensor, *scalars: Tensor) -> list[Tensor]:
    """The scalars on the logits' device. Multiplying reads a CPU scalar at launch; copying it would synchronise."""
    one = torch.ones((), dtype=accumulation_dtype(logits.dtype), device=logits.device)
    return [one * s for s in scalars]


def _weighted(weight: Tensor, value: Tensor) -> Tensor:
    """weight·value, where a weight of zero removes the value even when that is infinite or NaN."""
    return torch.where(weight == 0, torch.zeros((), dtype=value.dtype, device=value.device), weight * value)


def _teaching(u_teacher: Tensor, u_student: Tensor, temperature: Tensor, eps: float) -> tuple[Tensor, ...]:
    """(q, p_t, p_s, ℓ) of one edge, each (..., C): q = p_t + ε, ℓ = log q − log p_s, with ℓ = 0 where q = 0."""
    log_t = torch.log_softmax(u_teacher / temperature, -1)
    log_s = torch.log_softmax(u_student / temperature, -1)
    p_t = log_t.exp()
    q = p_t + eps if eps else p_t
    log_ratio = (q.log() if eps else log_t) - log_s
    return q, p_t, log_s.exp(), torch.where(q == 0, torch.zeros_like(q), log_ratio)


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
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """Loss (rows of shape (...) for reduction none, else 0-dim) and terms (num_terms,) of a distillation graph.

    Formula: the docstring of `fflfast.graph`. The logits are of one shape and dtype; T, λ and μ are 0-dim.
    """
    u = _distributions(logits, graph)
    temperature, kl_weight, ce_weight = _beside(u[0], temperature, kl_weight, ce_weight)
    counted, bad = _row_state(u[0], target, ignore_index)
    rows: list[Tensor] = []
    weights: list[Tensor] = []
    if graph.ce_terms:
        assert target is not None  # checked by the public function
        y = _target_probabilities(target, u[0], label_smoothing)
        for i in graph.ce_terms:
            log_p = torch.log_softmax(u[i], -1)
            rows.append(-torch.where(y == 0, torch.zeros_like(y), y * log_p).sum(-1))
            weights.append(ce_weight * graph.ce_weights[i])
    for edge in graph.edges:
        q, _, _, log_ratio = _teaching(u[edge.teacher], u[edge.student], temperature, target_eps)
        rows.append(temperature * temperature * (q * log_ratio).sum(-1))
        weights.append(kl_weight * edge.weight)

    zero = torch.zeros((), dtype=u[0].dtype, device=u[0].device)
    if bad is not None:
        rows = [torch.where(bad, zero / zero, r) for r in rows]
    rows = [torch.where(counted, r, zero) for r in rows]
    loss = zero.expand(counted.shape)
    for w, r in zip(weights, rows, strict=True):
        loss = loss + _weighted(w, r)
    if bad is not None:
        loss = torch.where(bad, zero / zero, loss)
    terms = torch.stack([r.sum() for r in rows]) if rows else zero.expand(0)
    count = counted.sum().clamp(min=1).to(u[0].dtype)
    if reduction != "sum":
        terms = terms / count
    if reduction == "none":
        return loss.clone(memory_format=torch.contiguous_format), terms
    return loss.sum() / count if reduction == "mean" else loss.sum(), terms


def distill_loss_backward(
    grad_loss: Tensor,
    logits: Sequence[Tensor],
    target: Tensor | None,
    temperature: Tensor,
    kl_weight: Tensor,
    ce_weight: Tensor,
    graph: DistillGraph,
    label_smoothing: float,
    ignore_index: int,
    target_eps: float,
    reduction: str,
    needs_grad: Sequence[bool],
) -> list[Tensor]:
    """∂L/∂z_i of shape (..., C) in the dtype of z_i, an empty tensor where `needs_grad` is False.

    ∂L/∂z_i = [μ ce_i (Σ_c y_c · softmax(z_i) − y) + λ T Σ_{e: s(e)=i} w_e ((1+εC) p_i − (p_t+ε))] / n, and for a
    trainable teacher ∂L/∂u_t += λ T w · p_t ⊙ (ℓ − ⟨p_t, ℓ⟩) / n, spread over a mixture by its coefficients.
    """
    u = _distributions(logits, graph)
    temperature, kl_weight, ce_weight = _beside(u[0], temperature, kl_weight, ce_weight)
    counted, bad = _row_state(u[0], target, ignore_index)
    dtype, num_classes = u[0].dtype, u[0].shape[-1]
    zero = torch.zeros((), dtype=dtype, device=u[0].device)
    scale = grad_loss.to(dtype)
    if reduction == "mean":
        scale = scale / counted.sum().clamp(min=1).to(dtype)
    scale = scale.expand(counted.shape).unsqueeze(-1)  # (..., 1): what one row's loss weighs in the whole
    grads: list[Tensor | None] = [None] * len(logits)

    def add(i: int, weight: Tensor, value: Tensor) -> None:
        if needs_grad[i]:
            share, so_far = _weighted(weight * scale, value), grads[i]
            grads[i] = share if so_far is None else so_far + share

    if graph.ce_terms:
        assert target is not None
        y = _target_probabilities(target, u[0], label_smoothing)
        mass = y.sum(-1, keepdim=True) if target.is_floating_point() else torch.ones_like(zero)
        for i in graph.ce_terms:
            add(i, ce_weight * graph.ce_weights[i], mass * torch.softmax(u[i], -1) - y)
    for edge in graph.edges:
        q, p_t, p_s, log_ratio = _teaching(u[edge.teacher], u[edge.student], temperature, target_eps)
        weight = kl_weight * temperature * edge.weight
        add(edge.student, weight, (1.0 + target_eps * num_classes) * p_s - q)
        if not edge.detach:
            log_ratio = torch.where(p_t == 0, zero, log_ratio)
            mean = (p_t * log_ratio).sum(-1, keepdim=True)
            # A student without mass where the teacher has some: the loss is +inf there and has no gradient.
            mean = torch.where(mean.isinf(), zero / zero, mean)
            gradient = p_t * (log_ratio - mean)
            if edge.teacher < graph.num_logits:
                add(edge.teacher, weight, gradient)
            else:
                for j, a in enumerate(graph.mixtures[edge.teacher - graph.num_logits]):
                    if a != 0.0:
                        add(j, weight * a, gradient)

    results = []
    for i, z in enumerate(logits):
        if not needs_grad[i]:
            results.append(z.new_empty(0))
            continue
        g = grads[i]
        g = zero.expand(z.shape) if g is None else torch.where(counted.unsqueeze(-1), g, zero)
        if bad is not None:
            g = torch.where(bad.unsqueeze(-1), zero / zero, g)
        results.append(g.to(z.dtype).contiguous())
    return results


# ---- fuse_features --------------------------------------------------------------------------------------------


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    training: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Functional 2-d batch norm of x (B, C, H, W): (y, batch mean (C,), biased batch variance (C,)).

    Outside training the running statistics normalise and both statistics are None. Nothing is updated in place.
    """
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps), None, None
    # With momentum 1 the buffers of torch's own operator come out as the batch statistics, the variance unbiased.
    channels, dtype = x.shape[1], accumulation_dtype(x.dtype)
    mean = torch.zeros(channels, dtype=dtype, device=x.device)
    var = torch.ones(channels, dtype=dtype, device=x.device)
    y = F.batch_norm(x, mean, var, weight, bias, True, 1.0, eps)
    count = x.shape[0] * x.shape[2] * x.shape[3]
    return y, mean, var * ((count - 1) / count)


def fuse_features(
    features: Sequence[Tensor],
    depthwise_weight: Tensor,
    depthwise_norm: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, float, bool],
    pointwise_weight: Tensor,
    pointwise_norm: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, float, bool],
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Pooled fused features (B, C_out) and (mean, variance) of both norms; differentiable by autograd.

    virtual concat → depthwise 3×3 → BN → ReLU → pointwise 1×1 → BN → ReLU → global average pool. Both the
    depthwise convolution and its norm work on one channel at a time, so each feature map passes them alone; the
    pointwise product is the sum of one product a feature map.
    """
    y: Tensor | None = None
    means, variances = [], []
    start = 0
    weight, bias, running_mean, running_var, eps, training = depthwise_norm

    def own(t: Tensor | None, stop: int) -> Tensor | None:
        return None if t is None else t[start:stop]

    for x in features:
        stop = start + x.shape[1]
        h = F.conv2d(x, depthwise_weight[start:stop], padding=1, groups=x.shape[1])
        h, mean, var = batch_norm(
            h, own(weight, stop), own(bias, stop), own(running_mean, stop), own(running_var, stop), eps, training
        )
        part = F.conv2d(F.relu(h), pointwise_weight[:, start:stop])
        y = part if y is None else y + part
        means.append(mean)
        variances.append(var)
        start = stop
    assert y is not None  # at least one feature map, checked by the public function
    y, mean, var = batch_norm(y, *pointwise_norm)
    statistics = (
        torch.cat([m for m in means if m is not None]) if training else None,
        torch.cat([v for v in variances if v is not None]) if training else None,
        mean,
        var,
    )
    return F.relu(y).mean((2, 3)), statistics
