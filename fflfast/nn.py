"""The losses and the fusion as modules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from . import functional
from .functional import DistillLossOutput, NormParams, Scalar
from .graph import DistillGraph
from .ops.fuse_features import Fused, fuse, update_running
from .ops.fusion_arguments import prepare

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
        sync_batch_norm, process_group: with sync_batch_norm the norms in training take the statistics of the batches
            of all processes of the `torch.distributed` group (None: all there are), which may differ in size. The same
            as `nn.SyncBatchNorm.convert_sync_batchnorm`, which works here too, but which DistributedDataParallel
            refuses on a CPU.

    Shapes:
        N feature maps (B, C_k, H_k, W_k) → logits (B, K). Different sizes are brought to the smallest H and W by
        adaptive average pooling first.

    The four modules before the classifier hold weights and settings: their own forward is not called, so hooks on them
    do not run. Running statistics are updated as `nn.BatchNorm2d` does.

    Raises:
        ValueError, TypeError: sizes that are no positive ints; in forward, feature maps that do not fit, or a module
            that was replaced by one that computes something else.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        num_classes: int,
        *,
        sync_batch_norm: bool = False,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        self.in_channels = tuple(in_channels) if isinstance(in_channels, Iterable) else ()
        sizes = (*self.in_channels, out_channels, num_classes)
        if not self.in_channels or not all(isinstance(n, int) and n >= 1 for n in sizes):
            raise ValueError(
                "FeatureFusion: expected a sequence of positive ints as in_channels, and positive ints as out_channels "
                f"and num_classes, got {in_channels!r}, {out_channels!r}, {num_classes!r}"
            )
        total = sum(self.in_channels)
        self.sync_batch_norm, self.process_group = sync_batch_norm, process_group
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
        pooled = self.pooled(features)
        classifier = self.classifier
        if isinstance(classifier, nn.Linear) and classifier.weight.dtype != pooled.dtype:
            # Autocast would cast by itself; features in a dtype of their own need it too.
            bias = None if classifier.bias is None else classifier.bias.to(pooled.dtype)
            return nn.functional.linear(pooled, classifier.weight.to(pooled.dtype), bias)
        return classifier(pooled)

    def pooled(self, features: Sequence[Tensor]) -> Tensor:
        """What the classifier gets: pooled features (B, C_out). Updates the running statistics in training."""
        self._check_modules()
        if isinstance(features, Sequence) and all(isinstance(x, Tensor) and x.dim() == 4 for x in features):
            got = tuple(x.shape[1] for x in features)
            if got != self.in_channels:
                raise ValueError(f"FeatureFusion: expected feature maps with {self.in_channels} channels, got {got}")
        case = prepare(
            features,
            self.depthwise.weight,
            self._norm_params(self.depthwise_norm),
            self.pointwise.weight,
            self._norm_params(self.pointwise_norm),
        )
        fused = fuse(case)
        self._update_running(fused)
        return fused.pooled

    def _check_modules(self) -> None:
        """Nothing but the settings below reaches the operator, so that anything else would be computed wrongly."""
        for name, size, padding, groups in (
            ("depthwise", (3, 3), (1, 1), sum(self.in_channels)),
            ("pointwise", (1, 1), (0, 0), 1),
        ):
            conv = getattr(self, name)
            if not isinstance(conv, nn.Conv2d) or conv.bias is not None or (
                (conv.kernel_size, conv.padding, conv.groups, conv.stride, conv.dilation)
                != (size, padding, groups, (1, 1), (1, 1))
            ) or (padding != (0, 0) and conv.padding_mode != "zeros"):  # fmt: skip
                raise TypeError(
                    f"FeatureFusion: expected {name} to be an nn.Conv2d with kernel_size={size}, padding={padding}, "
                    f"groups={groups}, stride and dilation 1 and no bias, got {conv}; write another fusion as a module "
                    "of its own"
                )
        for name in ("depthwise_norm", "pointwise_norm"):
            norm = getattr(self, name)
            if not isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm)):
                raise TypeError(
                    f"FeatureFusion: expected {name} to be an nn.BatchNorm2d or nn.SyncBatchNorm, got {norm}; to "
                    "freeze a norm call its eval()"
                )

    def _update_running(self, fused: Fused) -> None:
        """Fold the statistics of a batch into the running ones, as nn.BatchNorm2d does."""
        norms = []
        for which, norm in enumerate((self.depthwise_norm, self.pointwise_norm)):
            mean, var = norm.running_mean, norm.running_var
            if norm.training and norm.track_running_stats and mean is not None and var is not None:
                norms.append((which, mean, var, norm.num_batches_tracked, norm.momentum))
        if norms:
            update_running(fused, norms)

    def _norm_params(self, norm: nn.BatchNorm2d) -> NormParams:
        # nn.BatchNorm2d uses the batch where it trains or where it keeps no running statistics.
        training = norm.training or (norm.running_mean is None and norm.running_var is None)
        group = None
        # Evaluation stays this process's own, as it may run on one alone.
        if norm.training and dist.is_available() and dist.is_initialized():
            if isinstance(norm, nn.SyncBatchNorm):
                group = norm.process_group if norm.process_group is not None else dist.group.WORLD
            elif self.sync_batch_norm:
                group = self.process_group if self.process_group is not None else dist.group.WORLD
        return NormParams(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, training, group)

    def extra_repr(self) -> str:
        synchronised = ", sync_batch_norm=True" if self.sync_batch_norm else ""
        return f"in_channels={self.in_channels}{synchronised}"
