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


def _cross_entropy(log_p: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """CE per row as F.cross_entropy has it: −Σ_c y_c log p_c, where y_c = 0 contributes 0 whatever log p_c is."""
    if target.is_floating_point():
        y = _smoothed(target.to(log_p.dtype), smoothing)
        return -(y * log_p).masked_fill_(y == 0, 0.0).sum(-1)
    safe = target.clamp(0, log_p.shape[-1] - 1).unsqueeze(-1)
    right = log_p.gather(-1, safe).squeeze(-1)
    return -right if smoothing == 0.0 else -((1.0 - smoothing) * right + smoothing * log_p.mean(-1))


def _cross_entropy_gradient(p: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Σ_c y_c · p − y, written over p."""
    if target.is_floating_point():
        y = _smoothed(target.to(p.dtype), smoothing)
        return p.mul_(y.sum(-1, keepdim=True)).sub_(y)
    safe = target.clamp(0, p.shape[-1] - 1).unsqueeze(-1)
    if smoothing:
        p.sub_(smoothing / p.shape[-1])
    return p.scatter_add_(-1, safe, torch.full_like(safe, smoothing - 1.0, dtype=p.dtype))


def _smoothed(y: Tensor, smoothing: float) -> Tensor:
    return y if smoothing == 0.0 else y * (1.0 - smoothing) + smoothing / y.shape[-1]


def _beside(logits: Tensor, *scalars: Tensor) -> list[Tensor]:
    """The scalars on the logits' device. Multiplying reads a CPU scalar at launch; copying it would synchronise."""
    one = torch.ones((), dtype=accumulation_dtype(logits.dtype), device=logits.device)
    return [one * s for s in scalars]


def _weighted(weight: Tensor, value: Tensor) -> Tensor:
    """weight·value, where a weight of zero removes the value even when that is infinite or NaN."""
    return torch.where(weight == 0, torch.zeros((), dtype=value.dtype, device=value.device), weight * value)


def _log_ratio(q: Tensor, log_q: Tensor, log_s: Tensor) -> Tensor:
    """ℓ = log q − log p_s of one edge, 0 where the teacher has no mass."""
    return (log_q - log_s).masked_fill_(q == 0, 0.0)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (rows of shape (...) for reduction none, else 0-dim), terms (num_terms,) and row statistics of a graph.

    Formula: the docstring of `fflfast.graph`. The logits are of one shape and dtype; T, λ and μ are 0-dim. The
    statistics are what a kernel's backward starts from, see `row_statistics`.
    """
    u = _distributions(logits, graph)
    temperature, kl_weight, ce_weight = _beside(u[0], temperature, kl_weight, ce_weight)
    counted, bad = _row_state(u[0], target, ignore_index)
    rows: list[Tensor] = []
    weights: list[Tensor] = []
    for i in graph.ce_terms:
        assert target is not None  # checked by the public function
        rows.append(_cross_entropy(torch.log_softmax(u[i], -1), target, label_smoothing))
        weights.append(ce_weight * graph.ce_weights[i])
    used = {d for edge in graph.edges for d in edge[:2]}
    log_p = {d: torch.log_softmax(u[d] / temperature, -1) for d in used}
    for edge in graph.edges:
        log_q, log_s = log_p[edge.teacher], log_p[edge.student]
        q = log_q.exp()
        if target_eps:
            q += target_eps
            log_q = q.log()
        rows.append(temperature * temperature * _log_ratio(q, log_q, log_s).mul_(q).sum(-1))
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
    statistics = row_statistics(u, count, temperature, graph, target_eps)
    if reduction == "none":
        return loss.clone(memory_format=torch.contiguous_format), terms, statistics
    return loss.sum() / count if reduction == "mean" else loss.sum(), terms, statistics


def statistics_size(logits: Tensor, graph: DistillGraph) -> int:
    """How many numbers `row_statistics` has for logits of this shape."""
    rows = 1
    for size in logits.shape[:-1]:
        rows *= size
    return 1 + rows * (2 * (graph.num_logits + graph.num_mixtures) + graph.num_logits + len(graph.edges))


def row_statistics(u: Sequence[Tensor], count: Tensor, temperature: Tensor, graph: DistillGraph, eps: float) -> Tensor:
    """n, then for each row: max_c u_d and Σ_c exp((u_d − max)/T) of each distribution, Σ_c exp(z_i − max) of each
    logits tensor, and ⟨p_t, ℓ⟩ of each edge that trains its teacher. What the graph does not use is zero.
    """
    zero = torch.zeros_like(u[0][..., 0])
    used = {d for edge in graph.edges for d in edge[:2]}
    top = {d: u[d].amax(-1, keepdim=True) for d in used | set(graph.ce_terms)}
    everything = range(len(u))
    columns = [top[d].squeeze(-1) if d in top else zero for d in everything]
    columns += [((u[d] - top[d]) / temperature).exp().sum(-1) if d in used else zero for d in everything]
    columns += [(u[i] - top[i]).exp().sum(-1) if i in graph.ce_terms else zero for i in range(graph.num_logits)]
    columns += [zero if e.detach else _mean_ratio(u[e.teacher], u[e.student], temperature, eps)[2] for e in graph.edges]
    rows = torch.stack(columns, -1) if columns else zero.expand(0)
    return torch.cat([count.reshape(1), rows.reshape(-1)])


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
    reduction: str,
    needs_grad: Sequence[bool],
) -> list[Tensor]:
    """∂L/∂z_i of shape (..., C) in the dtype of z_i, an empty tensor where `needs_grad` is False.

    The definition does without the statistics, of which it reads nothing.

    ∂L/∂z_i = [μ ce_i (Σ_c y_c · softmax(z_i) − y) + λ T Σ_{e: s(e)=i} w_e ((1+εC) p_i − (p_t+ε))] / n, and for a
    trainable teacher ∂L/∂u_t += λ T w · p_t ⊙ (ℓ − ⟨p_t, ℓ⟩) / n, spread over a mixture by its coefficients.
    """
    u = _distributions(logits, graph)
    temperature, kl_weight, ce_weight = _beside(u[0], temperature, kl_weight, ce_weight)
    counted, bad = _row_state(u[0], target, ignore_index)
    dtype, num_classes = u[0].dtype, u[0].shape[-1]
    scale = grad_loss.to(dtype)
    if reduction == "mean":
        scale = scale / counted.sum().clamp(min=1).to(dtype)
    # What one row's loss weighs in the whole: (..., 1), or 0-dim where all rows weigh the same.
    scale = scale.unsqueeze(-1) if reduction == "none" else scale
    grads = [torch.zeros_like(z, memory_format=torch.contiguous_format) for z in u[: len(logits)]]

    for i in graph.ce_terms:
        if needs_grad[i]:
            assert target is not None
            gradient = _cross_entropy_gradient(torch.softmax(u[i], -1), target, label_smoothing)
            grads[i] += _weighted(ce_weight * graph.ce_weights[i], gradient) * scale
    used = {d for edge in graph.edges for d in edge[:2]}
    p = {d: torch.softmax(u[d] / temperature, -1) for d in used}
    for edge in graph.edges:
        p_t, p_s = p[edge.teacher], p[edge.student]
        weight = kl_weight * temperature * edge.weight
        if needs_grad[edge.student]:
            gradient = ((1.0 + target_eps * num_classes) * p_s - target_eps if target_eps else p_s) - p_t
            grads[edge.student] += _weighted(weight, gradient) * scale
        if not edge.detach:
            gradient = _teacher_gradient(u[edge.teacher], u[edge.student], temperature, target_eps)
            row = [float(j == edge.teacher) for j in range(len(logits))]
            if edge.teacher >= graph.num_logits:
                row = list(graph.mixtures[edge.teacher - graph.num_logits])
            for j, a in enumerate(row):
                if a != 0.0 and needs_grad[j]:
                    grads[j] += _weighted(weight * a, gradient) * scale

    results = []
    for i, z in enumerate(logits):
        if not needs_grad[i]:
            results.append(z.new_empty(0))
            continue
        g = grads[i].masked_fill_(~counted.unsqueeze(-1), 0.0)
        if bad is not None:
            g.masked_fill_(bad.unsqueeze(-1), float("nan"))
        results.append(g.to(z.dtype))
    return results


def _mean_ratio(u_t: Tensor, u_s: Tensor, temperature: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(p_t, ℓ, ⟨p_t, ℓ⟩) of one edge whose teacher is trained."""
    p_t = torch.softmax(u_t / temperature, -1)
    log_q = (p_t + eps).log() if eps else torch.log_softmax(u_t / temperature, -1)
    # Where p_t = 0 there is nothing to gain, whatever ε makes of ℓ there.
    log_ratio = _log_ratio(p_t, log_q, torch.log_softmax(u_s / temperature, -1))
    return p_t, log_ratio, (p_t * log_ratio).sum(-1)


def _teacher_gradient(u_t: Tensor, u_s: Tensor, temperature: Tensor, eps: float) -> Tensor:
    """p_t ⊙ (ℓ − ⟨p_t, ℓ⟩), what a trainable teacher gets of one edge before its weight."""
    p_t, log_ratio, mean = _mean_ratio(u_t, u_s, temperature, eps)
    # A student without mass where the teacher has some: the loss is +inf there and has no gradient.
    return p_t * (log_ratio - mean.masked_fill(mean.isinf(), float("nan")).unsqueeze(-1))


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
