"""The losses and the fusion as modules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from . import functional
from .functional import DistillLossOutput, FusionStatistics, NormParams, Scalar
from .graph import DistillGraph

__all__ = ["DistillLoss", "FeatureFusion", "KDLoss", "KLDivWithLogitsLoss"]


class DistillLoss(nn.Module):
    """`fflfast.distill_loss` with its settings kept.

    Args:
        graph: who teaches whom.
        temperature, kl_weight, ce_weight, label_smoothing, ignore_index, target_eps, reduction: as
            `fflfast.distill_loss`; the first three can be given anew in each call.
    """

    def __init__(
        self,
        graph: DistillGraph,
        *,
        temperature: Scalar = 1.0,
        kl_weight: Scalar = 1.0,
        ce_weight: Scalar = 1.0,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        target_eps: float = 0.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.graph = graph
        self.temperature, self.kl_weight, self.ce_weight = temperature, kl_weight, ce_weight
        self.label_smoothing, self.ignore_index = label_smoothing, ignore_index
        self.target_eps, self.reduction = target_eps, reduction

    def forward(
        self,
        logits: Sequence[Tensor],
        target: Tensor | None = None,
        *,
        temperature: Scalar | None = None,
        kl_weight: Scalar | None = None,
        ce_weight: Scalar | None = None,
    ) -> DistillLossOutput:
        """Loss and terms of M logits tensors (..., C) and a target, see `fflfast.distill_loss`."""
        return functional.distill_loss(
            logits,
            target,
            self.graph,
            temperature=self.temperature if temperature is None else temperature,
            kl_weight=self.kl_weight if kl_weight is None else kl_weight,
            ce_weight=self.ce_weight if ce_weight is None else ce_weight,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            target_eps=self.target_eps,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return f"terms={list(self.graph.term_names)}, temperature={self.temperature}, reduction={self.reduction!r}"


class KLDivWithLogitsLoss(nn.Module):
    """`fflfast.kl_div_with_logits` with its settings kept.

    Args:
        temperature, reduction, detach_teacher: as `fflfast.kl_div_with_logits`.
    """

    def __init__(self, *, temperature: Scalar = 1.0, reduction: str = "batchmean", detach_teacher: bool = True) -> None:
        super().__init__()
        self.temperature, self.reduction, self.detach_teacher = temperature, reduction, detach_teacher

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """T²·KL of two logits tensors (..., C), see `fflfast.kl_div_with_logits`."""
        return functional.kl_div_with_logits(
            student,
            teacher,
            temperature=self.temperature,
            reduction=self.reduction,
            detach_teacher=self.detach_teacher,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}, detach_teacher={self.detach_teacher}"


class KDLoss(nn.Module):
    """`fflfast.kd_loss` with its settings kept.

    Args:
        temperature, alpha, label_smoothing, ignore_index, reduction: as `fflfast.kd_loss`; the first two can be given
            anew in each call.
    """

    def __init__(
        self,
        *,
        temperature: Scalar,
        alpha: Scalar,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.temperature, self.alpha = temperature, alpha
        self.label_smoothing, self.ignore_index, self.reduction = label_smoothing, ignore_index, reduction

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor,
        *,
        temperature: Scalar | None = None,
        alpha: Scalar | None = None,
    ) -> Tensor:
        """(1−α)·CE + α·T²·KL of two logits tensors (..., C) and a target, see `fflfast.kd_loss`."""
        return functional.kd_loss(
            student,
            teacher,
            target,
            temperature=self.temperature if temperature is None else temperature,
            alpha=self.alpha if alpha is None else alpha,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, alpha={self.alpha}, reduction={self.reduction!r}"


class FeatureFusion(nn.Module):
    """The fusion module: N feature maps to the logits of the fused classifier (arXiv 1904.09058).

    virtual concat → depthwise 3×3 → BN → ReLU → pointwise 1×1 → BN → ReLU → global average pool → linear. The
    weights belong to plain torch modules, so the state dict is that of the eager composition. Convolutions start
    from N(0, √(2/(k²·C_out))), norms from 1 and 0, the classifier from `nn.Linear`'s default.

    Args:
        in_channels: channels C_k of the N feature maps.
        out_channels: C_out of the pointwise convolution.
        num_classes: K.

    Shapes:
        N feature maps (B, C_k, H_k, W_k) → logits (B, K). Different sizes are brought to the smallest H and W by
        adaptive average pooling first.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int, num_classes: int) -> None:
        super().__init__()
        self.in_channels = tuple(in_channels) if isinstance(in_channels, Iterable) else ()
        sizes = (*self.in_channels, out_channels, num_classes)
        if not self.in_channels or not all(isinstance(n, int) and n >= 1 for n in sizes):
            raise ValueError(
                "FeatureFusion: expected a sequence of positive ints as in_channels, and positive ints as out_channels "
                f"and num_classes, got {in_channels!r}, {out_channels!r}, {num_classes!r}"
            )
        total = sum(self.in_channels)
        self.depthwise = nn.Conv2d(total, total, 3, padding=1, groups=total, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(total)
        self.pointwise = nn.Conv2d(total, out_channels, 1, bias=False)
        self.pointwise_norm = nn.BatchNorm2d(out_channels)
        self.classifier = nn.Linear(out_channels, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights."""
        for conv in (self.depthwise, self.pointwise):
            nn.init.normal_(conv.weight, 0.0, math.sqrt(2.0 / (conv.kernel_size[0] ** 2 * conv.out_channels)))
        self.depthwise_norm.reset_parameters()
        self.pointwise_norm.reset_parameters()
        self.classifier.reset_parameters()

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits (B, num_classes) of N feature maps (B, C_k, H_k, W_k)."""
        got = tuple(x.shape[1] if isinstance(x, Tensor) and x.dim() == 4 else None for x in features)
        if got != self.in_channels:
            raise ValueError(f"FeatureFusion: expected feature maps with {self.in_channels} channels, got {got}")
        for norm in (self.depthwise_norm, self.pointwise_norm):
            if norm.training and isinstance(norm, nn.SyncBatchNorm):
                raise ValueError(
                    "FeatureFusion: its norms cannot be synchronised across processes yet, and a SyncBatchNorm would "
                    "silently use this process's batch; convert the cohort alone, not the method"
                )
        pooled, statistics = functional.fuse_features(
            features,
            self.depthwise.weight,
            _norm_params(self.depthwise_norm),
            self.pointwise.weight,
            _norm_params(self.pointwise_norm),
        )
        values = features[0].shape[0] * min(x.shape[2] for x in features) * min(x.shape[3] for x in features)
        self._update_running(statistics, values)
        # Autocast would do this cast by itself; features in a dtype of their own need it too.
        return nn.functional.linear(
            pooled, self.classifier.weight.to(pooled.dtype), self.classifier.bias.to(pooled.dtype)
        )

    @torch.no_grad()
    def _update_running(self, statistics: FusionStatistics, values: int) -> None:
        """Fold the batch statistics of `values` elements a channel into the running ones, as nn.BatchNorm2d does."""
        for norm, mean, var in (
            (self.depthwise_norm, statistics.depthwise_mean, statistics.depthwise_var),
            (self.pointwise_norm, statistics.pointwise_mean, statistics.pointwise_var),
        ):
            if mean is None or var is None or not (norm.training and norm.track_running_stats):
                continue
            if norm.running_mean is None or norm.running_var is None:
                continue
            momentum: float | Tensor | None = norm.momentum
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
                if momentum is None:  # a cumulative average, kept on the device
                    momentum = norm.num_batches_tracked.to(mean.dtype).reciprocal()
            if momentum is None:
                momentum = 0.0
            for running, batch in ((norm.running_mean, mean), (norm.running_var, var * (values / (values - 1)))):
                running.lerp_(batch.to(running.dtype), _as_weight(momentum, running))

    def extra_repr(self) -> str:
        return f"in_channels={self.in_channels}"


def _as_weight(momentum: float | Tensor, running: Tensor) -> float | Tensor:
    return momentum.to(running.dtype) if isinstance(momentum, Tensor) else momentum


def _norm_params(norm: nn.BatchNorm2d) -> NormParams:
    # nn.BatchNorm2d uses the batch where it trains or where it keeps no running statistics.
    training = norm.training or (norm.running_mean is None and norm.running_var is None)
    return NormParams(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, training)
