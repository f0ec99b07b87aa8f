"""The stages of the fusion operator in plain PyTorch: the specification of each backend's kernels.

A training step of the fusion module cannot be one piece: each batch norm waits for the sums of the whole batch, forward
and backward. The stages lie between these four barriers, so that processes can combine their sums there.

x is the virtual concatenation of the feature maps (B, C, H, W), P = B·H·W, and

    h = depthwise 3×3 of x        z = scale1·h + shift1   a = relu(z)        y = W·a, rounded to x's dtype
    pooled = mean over H·W of relu(scale2·y + shift2)
    scale = weight·rstd           shift = bias − mean·scale                  rstd = 1/√(m2/count + eps)

A hat is the normalised value: ĥ = (h − mean1)·rstd1. Every function takes and returns what the backend's does; sums
are taken in float32, in float64 for float64 inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import accumulation_dtype

__all__ = ["STAGES", "Norm"]


class Norm(NamedTuple):
    """One batch norm as the stages take it.

    Attributes:
        mean, m2: (C,), over the values of all processes: mean and Σ (v − mean)².
        count: 0-dim, the number of values behind m2. A frozen norm has its running variance as m2 and a count of 1.
        weight, bias: (C,), or None.
        eps: added to the variance.
        training: whether mean and m2 depend on the input, so that the gradient goes through them.
    """

    mean: Tensor
    m2: Tensor
    count: Tensor  # type: ignore[assignment]  # the tuple's own method of this name is not wanted here
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    training: bool


def _column(values: Tensor) -> Tensor:
    return values[:, None, None]


def _scale_shift(norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(mean, rstd, scale, shift), each (C,)."""
    mean = norm.mean.to(dtype)
    rstd = (norm.m2.to(dtype) / norm.count.to(mean.device, dtype) + norm.eps).rsqrt()
    scale = rstd if norm.weight is None else rstd * norm.weight.to(dtype)
    shift = -mean * scale if norm.bias is None else norm.bias.to(dtype) - mean * scale
    return mean, rstd, scale, shift


def _moments(values: Tensor) -> Tensor:
    """(2, C): mean and M2 of (B, C, H, W); zeros of an empty batch."""
    if values.numel() == 0:
        return values.new_zeros(2, values.shape[1])
    mean = values.mean((0, 2, 3))
    # The mean is rounded; what it leaves over is taken off again (the corrected two-pass sum).
    off = values - _column(mean)
    rest = off.sum((0, 2, 3)).square() / (values.numel() // values.shape[1])
    return torch.stack([mean, (off.square().sum((0, 2, 3)) - rest).clamp(min=0)])


def _concat(features: Sequence[Tensor]) -> Tensor:
    return torch.cat([f.to(accumulation_dtype(f.dtype)) for f in features], 1)


def _rounded(weight: Tensor, like: Tensor) -> Tensor:
    """A weight as the product takes it: rounded to the features' dtype, held in the dtype of the sums."""
    return weight.to(like.dtype).to(accumulation_dtype(like.dtype))


def _depthwise(features: Sequence[Tensor], weight: Tensor) -> Tensor:
    x = _concat(features)
    return F.conv2d(x, _rounded(weight, features[0]), padding=1, groups=x.shape[1])


def _activated(features: Sequence[Tensor], weight: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """(ĥ, where z > 0, a rounded to the features' dtype), each (B, C, H, W) in the dtype of the sums."""
    h = _depthwise(features, weight)
    mean, rstd, scale, shift = _scale_shift(norm, h.dtype)
    z = h * _column(scale) + _column(shift)
    return (h - _column(mean)) * _column(rstd), _active(z), z.relu().to(features[0].dtype).to(z.dtype)


def _active(z: Tensor) -> Tensor:
    """Where ReLU hands a gradient on: z > 0, and NaN, as in PyTorch."""
    return ~(z <= 0)


def _as_map(y: Tensor, size: Sequence[int]) -> Tensor:
    """y (B, H·W, O) as (B, O, H, W) in the dtype of the sums."""
    return y.to(accumulation_dtype(y.dtype)).mT.unflatten(2, tuple(size))


def depthwise_statistics(features: Sequence[Tensor], depthwise_weight: Tensor) -> list[Tensor]:
    """[moments of h (2, C): mean, M2]; a backend may add what it wants to hand to `pointwise`."""
    return [_moments(_depthwise(features, depthwise_weight))]


def pointwise(
    features: Sequence[Tensor], depthwise_weight: Tensor, norm1: Norm, pointwise_weight: Tensor,
    kept: Sequence[Tensor], statistics: bool, tf32: bool,
) -> list[Tensor]:  # fmt: skip
    """[y (B, H·W, O) in the features' dtype; moments (2, O) of y as stored, or an empty tensor]."""
    _, _, a = _activated(features, depthwise_weight, norm1)
    y = F.conv2d(a, _rounded(pointwise_weight, features[0])).to(features[0].dtype)
    return [y.flatten(2).mT.contiguous(), _moments(y.to(a.dtype)) if statistics else a.new_empty(0)]


def pool(y: Tensor, norm2: Norm) -> list[Tensor]:
    """[pooled (B, O) in y's dtype; (2, B, O): how many pixels are active, and the sum of ŷ over them]."""
    wide = y.to(accumulation_dtype(y.dtype))
    mean, rstd, scale, shift = _scale_shift(norm2, wide.dtype)
    z = wide * scale + shift
    active = _active(z).to(wide.dtype)
    hat = (wide - mean) * rstd
    return [z.relu().mean(1).to(y.dtype), torch.stack([active.sum(1), torch.where(_active(z), hat, 0.0).sum(1)])]


def inference(
    features: Sequence[Tensor], depthwise_weight: Tensor, norm1: Norm, pointwise_weight: Tensor, norm2: Norm, tf32: bool
) -> Tensor:
    """pooled (B, O) of two frozen norms."""
    _, _, a = _activated(features, depthwise_weight, norm1)
    y = F.conv2d(a, _rounded(pointwise_weight, features[0]))
    scale, shift = _scale_shift(norm2, y.dtype)[2:]
    return (y * _column(scale) + _column(shift)).relu().mean((2, 3)).to(features[0].dtype)


def backward_pool(grad: Tensor, active: Tensor, pixels: int) -> Tensor:
    """(2, O): the gradients of the second norm's bias and weight, from grad (B, O)."""
    return (active * (grad.to(active.dtype) / pixels)).sum(1)


def _through_norm(grad: Tensor, hat: Tensor, norm: Norm, sums: Tensor) -> Tensor:
    """A gradient of a norm's output, less its mean and its share along the normalised values where the norm trains."""
    if not norm.training:
        return grad
    bias, weight = (sums / norm.count.to(sums.device, sums.dtype))[:, :, None, None]
    return grad - bias - hat * weight


def backward_sums(
    grad: Tensor, features: Sequence[Tensor], depthwise_weight: Tensor, norm1: Norm, pointwise_weight: Tensor,
    y: Tensor, norm2: Norm, sums2: Tensor, needs_weight: bool, tf32: bool,
) -> list[Tensor]:  # fmt: skip
    """[(2, C): the gradients of the first norm's bias and weight; that of the pointwise weight; that of z]."""
    size = features[0].shape[2:]
    hat, active, a = _activated(features, depthwise_weight, norm1)
    wide = _as_map(y, size)
    mean, rstd, scale, shift = (_column(part) for part in _scale_shift(norm2, wide.dtype))
    g = (grad.to(wide.dtype) / size.numel())[:, :, None, None] * _active(wide * scale + shift)
    # The products take and give what the features' dtype holds, as autograd's do.
    dy = (scale * _through_norm(g, (wide - mean) * rstd, norm2, sums2)).to(y.dtype).to(wide.dtype)
    weight = _rounded(pointwise_weight, features[0])
    dz = (F.conv_transpose2d(dy, weight) * active).to(y.dtype).to(wide.dtype)
    sums = torch.stack([dz.sum((0, 2, 3)), (dz * hat).sum((0, 2, 3))])
    dw = torch.einsum("bohw,bchw->oc", dy, a)[:, :, None, None] if needs_weight else dy.new_empty(0)
    return [sums, dw.to(pointwise_weight.dtype), dz]


def backward_inputs(
    features: Sequence[Tensor], depthwise_weight: Tensor, norm1: Norm, sums1: Tensor, kept: Sequence[Tensor], needs: int
) -> list[Tensor]:
    """[the gradients of the N feature maps; that of the depthwise weight]; an empty tensor where a bit is not set."""
    x = _concat(features)
    weight = _rounded(depthwise_weight, features[0])
    hat, _, _ = _activated(features, depthwise_weight, norm1)
    dh = _column(_scale_shift(norm1, x.dtype)[2]) * _through_norm(kept[0], hat, norm1, sums1)
    parts = F.conv_transpose2d(dh, weight, padding=1, groups=x.shape[1]).split([f.shape[1] for f in features], 1)
    grads = [
        torch.empty_like(f).copy_(part) if needs >> k & 1 else f.new_empty(0)
        for k, (part, f) in enumerate(zip(parts, features, strict=True))
    ]
    if not needs >> len(features) & 1:
        return [*grads, depthwise_weight.new_empty(0)]
    around = F.pad(x, (1, 1, 1, 1))
    rows, columns = x.shape[2:]
    taps = [(dh * around[:, :, i : i + rows, j : j + columns]).sum((0, 2, 3)) for i in range(3) for j in range(3)]
    return [*grads, torch.stack(taps, 1).view_as(depthwise_weight).to(depthwise_weight.dtype)]


def update_running(
    moments: Sequence[Tensor], counts: Sequence[Tensor], running: Sequence[Tensor], batches: Sequence[Tensor],
    momentum: Sequence[float],
) -> None:  # fmt: skip
    """Fold batch moments into running statistics in place, as nn.BatchNorm2d does.

    running holds mean and variance of each norm, batches its counter (empty: none); a negative momentum stands for
    None, the cumulative average.
    """
    for i, (moment, count, factor) in enumerate(zip(moments, counts, momentum, strict=True)):
        mean, var = running[2 * i : 2 * i + 2]
        weight: Tensor | float = factor
        if batches[i].numel():
            batches[i].add_(1)
            if factor < 0:
                weight = batches[i].to(moment.dtype).reciprocal()
        unbiased = moment[1] / (count.to(moment.device, moment.dtype) - 1)
        for old, new in ((mean, moment[0]), (var, unbiased)):
            old.copy_(old * (1 - weight) + new * weight)


STAGES: dict[str, Callable[..., Any]] = {
    stage.__name__: stage
    for stage in (
        depthwise_statistics, pointwise, pool, inference, backward_pool, backward_sums, backward_inputs, update_running
    )
}  # fmt: skip
