"""What the fusion operator takes and returns: types, checks and dtype rules."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import accumulation_dtype

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

__all__ = ["Case", "FusionOutput", "FusionStatistics", "NormParams", "prepare"]


class NormParams(NamedTuple):
    """One batch norm, as `torch.nn.functional.batch_norm` takes it.

    Attributes:
        weight, bias: affine parameters (C,), or None.
        running_mean, running_var: (C,), or None; read outside training, never written.
        eps: added to the variance.
        training: normalise with the statistics of the batch.
        process_group: the `torch.distributed` group whose processes share the statistics of their batches in training,
            as `nn.SyncBatchNorm` does; None: each process has its own.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    eps: float = 1e-5
    training: bool = False
    process_group: Any = None


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


class Case(NamedTuple):
    """A checked call: feature maps of one size and dtype, norms in the dtype of the sums."""

    features: list[Tensor]
    depthwise_weight: Tensor
    depthwise_norm: NormParams
    pointwise_weight: Tensor
    pointwise_norm: NormParams


def prepare(
    features: Sequence[Tensor],
    depthwise_weight: Tensor,
    depthwise_norm: NormParams,
    pointwise_weight: Tensor,
    pointwise_norm: NormParams,
) -> Case:
    """Check a call; bring its feature maps to one size and one dtype, the autocast dtype or their widest.

    Weights stay in float32 or in that dtype: the operator rounds them itself, so that their gradients are not rounded.
    """
    for name, norm in (("depthwise_norm", depthwise_norm), ("pointwise_norm", pointwise_norm)):
        if not isinstance(norm, tuple) or not 4 <= len(norm) <= len(NormParams._fields):
            raise TypeError(f"fuse_features: {name} must be NormParams(weight, bias, …), got {type(norm).__name__}")
    depthwise_norm, pointwise_norm = _own_group(NormParams(*depthwise_norm)), _own_group(NormParams(*pointwise_norm))
    maps = _checked(features, depthwise_weight, depthwise_norm, pointwise_weight, pointwise_norm)
    device = maps[0].device.type
    dtype = maps[0].dtype
    for x in maps[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    # Autocast leaves float64 alone, here as in torch's own operators.
    if dtype != torch.float64 and autocasts(device):
        dtype = torch.get_autocast_dtype(device)
    size = (min(x.shape[2] for x in maps), min(x.shape[3] for x in maps))
    maps = [x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in maps]
    return Case(
        [x if x.dtype == dtype else x.to(dtype) for x in maps],
        _weight_in(depthwise_weight, dtype),
        _norm_in(depthwise_norm, dtype),
        _weight_in(pointwise_weight, dtype),
        _norm_in(pointwise_norm, dtype),
    )


def _own_group(norm: NormParams) -> NormParams:
    """Without its group where that has nothing to share."""
    group = norm.process_group
    if group is None or (norm.training and torch.distributed.get_world_size(group) > 1):
        return norm
    return norm._replace(process_group=None)


def autocasts(device: str) -> bool:
    """Whether autocast is on for a device type; meta tensors have none, and is_autocast_available does not trace."""
    return device != "meta" and torch.is_autocast_enabled(device)


def no_autocast(device: str) -> contextlib.AbstractContextManager[None]:
    """Autocast off, where it is on: entering the context costs as much as a kernel."""
    return torch.autocast(device, enabled=False) if autocasts(device) else contextlib.nullcontext()


def _weight_in(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight if weight.dtype == torch.float32 and dtype != torch.float64 else weight.to(dtype)


def _norm_in(norm: NormParams, dtype: torch.dtype) -> NormParams:
    wide = accumulation_dtype(dtype)
    weight, bias, mean, var = (t if t is None or t.dtype == wide else t.to(wide) for t in norm[:4])
    return NormParams(weight, bias, mean, var, float(norm.eps), bool(norm.training), norm.process_group)


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
        if not isinstance(x, Tensor) or x.dtype not in FLOATS or x.dim() != 4 or x.layout != torch.strided:
            what = f"{x.layout} {x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(
                f"fuse_features: features[{k}] must be a dense floating-point (B, C, H, W) tensor of 16, 32 or 64 "
                f"bits, got {what}"
            )
        if min(x.shape[1:]) == 0:
            raise ValueError(f"fuse_features: features[{k}] must have C, H and W ≥ 1, got {tuple(x.shape)}")
        if x.shape[0] != maps[0].shape[0] or x.device != maps[0].device:
            raise ValueError(
                f"fuse_features: all feature maps must have one batch size and device, got {tuple(maps[0].shape)} on "
                f"{maps[0].device} and {tuple(x.shape)} on {x.device}"
            )
    for weight_name, weight in (("depthwise_weight", depthwise_weight), ("pointwise_weight", pointwise_weight)):
        if not isinstance(weight, Tensor) or weight.dtype not in FLOATS or weight.layout != torch.strided:
            what = f"{weight.layout} {weight.dtype}" if isinstance(weight, Tensor) else type(weight).__name__
            raise TypeError(f"fuse_features: {weight_name} must be a dense floating-point tensor, got {what}")
        if weight.device != maps[0].device:
            raise ValueError(f"fuse_features: {weight_name} must be on {maps[0].device}, got {weight.device}")
    channels = sum(x.shape[1] for x in maps)
    if depthwise_weight.shape != (channels, 1, 3, 3):
        raise ValueError(
            f"fuse_features: depthwise_weight must be ({channels}, 1, 3, 3) for feature maps with "
            f"{' + '.join(str(x.shape[1]) for x in maps)} channels, got {tuple(depthwise_weight.shape)}"
        )
    if pointwise_weight.dim() != 4 or pointwise_weight.shape[1:] != (channels, 1, 1) or not len(pointwise_weight):
        raise ValueError(
            f"fuse_features: pointwise_weight must be (C_out ≥ 1, {channels}, 1, 1), "
            f"got {tuple(pointwise_weight.shape)}"
        )
    height, width = min(x.shape[2] for x in maps), min(x.shape[3] for x in maps)
    for name, norm, size in (
        ("depthwise_norm", depthwise_norm, channels),
        ("pointwise_norm", pointwise_norm, pointwise_weight.shape[0]),
    ):
        _check_norm(name, norm, size, maps[0].device)
        if norm.training and norm.process_group is None and maps[0].shape[0] * height * width <= 1:
            raise ValueError(
                "Expected more than 1 value per channel when training, got input size "
                f"{torch.Size((maps[0].shape[0], size, height, width))}"
            )
    return maps


def _check_norm(name: str, norm: NormParams, size: int, device: torch.device) -> None:
    if not norm.training and (norm.running_mean is None or norm.running_var is None):
        raise ValueError(f"fuse_features: {name} needs running_mean and running_var outside training")
    if not norm.eps >= 0:
        raise ValueError(f"fuse_features: {name}.eps must be 0 or more, got {norm.eps}")
    for field, value in zip(NormParams._fields[:4], norm[:4], strict=True):
        if value is not None and (not isinstance(value, Tensor) or value.dtype not in FLOATS):
            what = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"fuse_features: {name}.{field} must be a floating-point tensor or None, got {what}")
        if value is not None and value.shape != (size,):
            raise ValueError(f"fuse_features: {name}.{field} must have shape ({size},), got {tuple(value.shape)}")
        if value is not None and value.device != device:
            raise ValueError(f"fuse_features: {name}.{field} must be on {device} as the features, got {value.device}")
