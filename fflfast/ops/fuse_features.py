"""The operator of the fusion module: types, checks, dtype rules and backend choice.

The reference composition is differentiated by autograd and traced by torch.compile and torch.export as it stands.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .backends import Implementation, choose

__all__ = ["FusionOutput", "FusionStatistics", "NormParams", "fuse_features"]

IMPLEMENTATIONS: dict[str, Implementation] = {
    "reference": Implementation({"forward": reference.fuse_features}, lambda *case: None),
}


class NormParams(NamedTuple):
    """One batch norm, as `torch.nn.functional.batch_norm` takes it.

    Attributes:
        weight, bias: affine parameters (C,), or None.
        running_mean, running_var: (C,), or None; read outside training, never written.
        eps: added to the variance.
        training: normalise with the statistics of the batch.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    eps: float = 1e-5
    training: bool = False


class FusionStatistics(NamedTuple):
    """Batch mean and biased variance of both norms, float32 (float64 for float64); None for a norm not in training."""

    depthwise_mean: Tensor | None
    depthwise_var: Tensor | None
    pointwise_mean: Tensor | None
    pointwise_var: Tensor | None


class FusionOutput(NamedTuple):
    """Pooled fused features (B, C_out) and the batch statistics, which the caller folds into running ones."""

    pooled: Tensor
    statistics: FusionStatistics


def fuse_features(
    features: Sequence[Tensor],
    depthwise_weight: Tensor,
    depthwise_norm: NormParams,
    pointwise_weight: Tensor,
    pointwise_norm: NormParams,
) -> FusionOutput:
    """Fuse N feature maps without concatenating them (Feature Fusion Learning, arXiv 1904.09058).

    virtual concat → depthwise 3×3 (padding 1) → BN → ReLU → pointwise 1×1 → BN → ReLU → global average pool.

    Args:
        features: N ≥ 1 feature maps (B, C_k, H_k, W_k). Where sizes differ, each is first brought to the smallest
            H and W by adaptive average pooling.
        depthwise_weight: (ΣC_k, 1, 3, 3).
        depthwise_norm: batch norm over ΣC_k channels.
        pointwise_weight: (C_out, ΣC_k, 1, 1).
        pointwise_norm: batch norm over C_out channels.

    Returns:
        FusionOutput(pooled, statistics). The computation runs in the autocast dtype, else in the features' widest
        dtype; weights are cast to it, norms stay in float32 (float64 for float64 features). Functional: running
        statistics are not updated.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; fewer than two values per channel in training.
    """
    depthwise_norm, pointwise_norm = NormParams(*depthwise_norm), NormParams(*pointwise_norm)
    maps = _checked(features, depthwise_weight, depthwise_norm, pointwise_weight, pointwise_norm)
    device = maps[0].device.type
    dtype = maps[0].dtype
    for x in maps[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    # Autocast leaves float64 alone, here as in torch's own operators. Meta tensors have none, and torch 2.10 cannot
    # trace torch.amp.is_autocast_available.
    may_autocast = device != "meta"
    if may_autocast and dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    size = (min(x.shape[2] for x in maps), min(x.shape[3] for x in maps))
    maps = [x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in maps]
    with torch.autocast(device, enabled=False) if may_autocast else contextlib.nullcontext():
        arguments = (
            [x.to(dtype) for x in maps],
            depthwise_weight.to(dtype),
            _norm_in(depthwise_norm, dtype),
            pointwise_weight.to(dtype),
            _norm_in(pointwise_norm, dtype),
        )
        chosen = choose("fuse_features", IMPLEMENTATIONS, *arguments)
        pooled, statistics = chosen.functions["forward"](*arguments)
    return FusionOutput(pooled, FusionStatistics(*statistics))


def _norm_in(norm: NormParams, dtype: torch.dtype) -> NormParams:
    wide = reference.accumulation_dtype(dtype)
    weight, bias, mean, var = (None if t is None else t.to(wide) for t in norm[:4])
    return NormParams(weight, bias, mean, var, norm.eps, norm.training)


def _checked(
    features: Sequence[Tensor],
    depthwise_weight: Tensor,
    depthwise_norm: NormParams,
    pointwise_weight: Tensor,
    pointwise_norm: NormParams,
) -> list[Tensor]:
    if isinstance(features, Tensor) or not isinstance(features, Sequence) or len(features) == 0:
        raise TypeError("fuse_features: features must be a non-empty sequence of feature maps (B, C, H, W)")
    maps = list(features)
    for k, x in enumerate(maps):
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() != 4:
            what = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"fuse_features: features[{k}] must be a floating-point (B, C, H, W) tensor, got {what}")
        if min(x.shape[1:]) == 0:
            raise ValueError(f"fuse_features: features[{k}] must have C, H and W ≥ 1, got {tuple(x.shape)}")
        if x.shape[0] != maps[0].shape[0] or x.device != maps[0].device:
            raise ValueError(
                f"fuse_features: all feature maps must have one batch size and device, got {tuple(maps[0].shape)} on "
                f"{maps[0].device} and {tuple(x.shape)} on {x.device}"
            )
    channels = sum(x.shape[1] for x in maps)
    if depthwise_weight.shape != (channels, 1, 3, 3):
        raise ValueError(
            f"fuse_features: depthwise_weight must be ({channels}, 1, 3, 3) for feature maps with "
            f"{' + '.join(str(x.shape[1]) for x in maps)} channels, got {tuple(depthwise_weight.shape)}"
        )
    if pointwise_weight.dim() != 4 or pointwise_weight.shape[1:] != (channels, 1, 1):
        raise ValueError(
            f"fuse_features: pointwise_weight must be (C_out, {channels}, 1, 1), got {tuple(pointwise_weight.shape)}"
        )
    for weight_name, weight in (("depthwise_weight", depthwise_weight), ("pointwise_weight", pointwise_weight)):
        if weight.device != maps[0].device:
            raise ValueError(f"fuse_features: {weight_name} must be on {maps[0].device}, got {weight.device}")
    height, width = min(x.shape[2] for x in maps), min(x.shape[3] for x in maps)
    for name, norm, size in (
        ("depthwise_norm", depthwise_norm, channels),
        ("pointwise_norm", pointwise_norm, pointwise_weight.shape[0]),
    ):
        if not norm.training and (norm.running_mean is None or norm.running_var is None):
            raise ValueError(f"fuse_features: {name} needs running_mean and running_var outside training")
        for field, value in zip(NormParams._fields[:4], norm[:4], strict=True):
            if value is not None and value.shape != (size,):
                raise ValueError(f"fuse_features: {name}.{field} must have shape ({size},), got {tuple(value.shape)}")
            if value is not None and value.device != maps[0].device:
                raise ValueError(
                    f"fuse_features: {name}.{field} must be on {maps[0].device} as the features, got {value.device}"
                )
        if norm.training and maps[0].shape[0] * height * width <= 1:
            raise ValueError(
                "Expected more than 1 value per channel when training, got input size "
                f"{torch.Size((maps[0].shape[0], size, height, width))}"
            )
    return maps
