"""The operator fflfast::fuse_features: the ways to its backends, and its autograd in eager code.

Three ways lead through it. Backends with kernels run the stages of fusion_reference.py, behind one autograd.Function
in eager code and behind registered operators where something traces. The reference is a composition of PyTorch's own
operators, which autograd, torch.compile and torch.export see as such; only where processes share statistics does it
run its stages, as the kernels do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import fusion_reference, fusion_stages, reference
from .backends import Implementation
from .fusion_arguments import Case, FusionOutput, FusionStatistics, NormParams, no_autocast, prepare
from .fusion_backends import choose_stages, has_kernels
from .fusion_registered import DOUBLE_BACKWARD
from .fusion_stages import BatchNorm, Gradients, Saved
from .tracing import is_exported, is_traced, is_transformed

__all__ = ["Fused", "fuse", "fuse_features", "update_running"]


TRANSFORMED = (
    "fflfast.fuse_features: expected to be differentiated in reverse mode by autograd, got forward mode or a transform "
    "of torch.func (grad, jvp, vmap), which only the reference in eager code and one process has "
    '(fflfast.use_backend("reference"))'
)
EXPORTED = (
    "fflfast.fuse_features: expected norms without a process group in torch.export, whose file holds no exchange "
    "between processes; export the module in eval mode"
)


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
            H and W by adaptive average pooling. Any strides; they are neither copied nor concatenated.
        depthwise_weight: (ΣC_k, 1, 3, 3).
        depthwise_norm: batch norm over ΣC_k channels.
        pointwise_weight: (C_out, ΣC_k, 1, 1).
        pointwise_norm: batch norm over C_out channels.

    Returns:
        FusionOutput(pooled, statistics). The computation runs in the autocast dtype, else in the features' widest
        dtype; weights are rounded to it, norms stay in float32 (float64 for float64 features). Functional: running
        statistics are not updated. A training step saves the feature maps, y (B, C_out, H, W) and two numbers a
        sample and output channel for its backward.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; fewer than two values per channel in training.
        RuntimeError: differentiated twice, in forward mode, or by torch.func on a backend other than the reference.
    """
    case = prepare(features, depthwise_weight, depthwise_norm, pointwise_weight, pointwise_norm)
    pooled, moments, counts = fuse(case)
    statistics: list[Tensor | None] = []
    for moment, count in zip(moments, counts, strict=True):
        statistics += (None, None) if moment is None or count is None else (moment[0], moment[1] / count)
    return FusionOutput(pooled, FusionStatistics(*statistics))


class Fused(NamedTuple):
    """Pooled fused features, and of each norm in training its moments (2, C) and their 0-dim count."""

    pooled: Tensor
    moments: tuple[Tensor | None, Tensor | None]
    counts: tuple[Tensor | None, Tensor | None]


def fuse(case: Case) -> Fused:
    """Run a checked call on the backend that takes it."""
    with no_autocast(case.features[0].device.type):
        norms = (BatchNorm.of(case.depthwise_norm), BatchNorm.of(case.pointwise_norm))
        leaves = _leaves(case.features, case.depthwise_weight, norms[0], case.pointwise_weight, norms[1])
        shared = any(norm.group is not None for norm in norms)
        traced = is_traced(case.features[0])
        if is_exported():
            if shared:
                raise RuntimeError(EXPORTED)
            return _compose(case)
        if traced:
            composed = not shared and not has_kernels(_kind(case.features[0]))
        else:
            chosen = choose_stages(case.features, case.depthwise_weight, case.pointwise_weight)
            composed = not shared and chosen.functions is fusion_reference.STAGES
        if composed:
            return _compose(case)
        running = (norm[i] for norm in norms for i in (2, 3))
        if is_transformed(t for t in (*leaves, *running) if t is not None):
            raise RuntimeError(TRANSFORMED)
        return _traced(case, norms, leaves) if traced else _eager(chosen, case, norms, leaves)


def _kind(x: Tensor) -> str:
    return f"{x.device.type} {x.dtype}"


def _compose(case: Case) -> Fused:
    dtype = case.features[0].dtype
    pooled, (mean1, var1, mean2, var2) = reference.fuse_features(
        case.features, case.depthwise_weight.to(dtype), case.depthwise_norm[:6], case.pointwise_weight.to(dtype),
        case.pointwise_norm[:6],
    )  # fmt: skip
    if not (case.depthwise_norm.training or case.pointwise_norm.training):
        return Fused(pooled, (None, None), (None, None))
    # A product, because torch.tensor would make a constant of a batch size that is left open under torch.compile.
    wide = reference.accumulation_dtype(dtype)
    count = torch.ones((), dtype=wide, device="cpu") * fusion_stages.values_of(case.features)
    moments = [
        None if mean is None or var is None else torch.stack([mean, var * count])
        for mean, var in ((mean1, var1), (mean2, var2))
    ]
    return Fused(pooled, (moments[0], moments[1]), (count, count))


# ---- eager route ----------------------------------------------------------------------------------------------


def _eager(chosen: Implementation, case: Case, norms: tuple[BatchNorm, BatchNorm], leaves: Sequence[Any]) -> Fused:
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves)
    if not grad:
        if not (norms[0].training or norms[1].training):
            return Fused(_inference(chosen, case, norms), (None, None), (None, None))
        return _fused(fusion_stages.forward(chosen.functions, *_split(leaves), *norms), norms)
    call = _Call(chosen.functions, norms)
    pooled = _FuseFeatures.apply(call, *leaves)
    return _fused(call.saved._replace(pooled=pooled), norms)


def _fused(saved: Saved, norms: Sequence[BatchNorm]) -> Fused:
    trains = [norm.training for norm in norms]
    return Fused(
        saved.pooled,
        (saved.moments1 if trains[0] else None, saved.moments2 if trains[1] else None),
        (saved.count1 if trains[0] else None, saved.count2 if trains[1] else None),
    )


def _inference(chosen: Implementation, case: Case, norms: tuple[BatchNorm, BatchNorm]) -> Tensor:
    one, two = (norm.frozen() for norm in norms)
    return chosen.functions["inference"](
        case.features, case.depthwise_weight, one, case.pointwise_weight, two, fusion_stages.allows_tf32()
    )


def _leaves(features: Sequence[Tensor], dw: Tensor, one: BatchNorm, pw: Tensor, two: BatchNorm) -> list[Any]:
    """What gradients are asked for, in the order of every list of gradients here: six parameters, feature maps."""
    return [dw, one.weight, one.bias, pw, two.weight, two.bias, *features]


def _split(leaves: Sequence[Any]) -> tuple[list[Tensor], Tensor, Tensor]:
    """(features, depthwise weight, pointwise weight)."""
    return list(leaves[6:]), leaves[0], leaves[3]


class _Call:
    """What a call has beside its leaves, and where its other results go."""

    __slots__ = ("functions", "norms", "saved")
    saved: Saved

    def __init__(self, functions: Any, norms: tuple[BatchNorm, BatchNorm]) -> None:
        self.functions, self.norms = functions, norms


class _FuseFeatures(torch.autograd.Function):
    """Saves the feature maps, y and the pool's two numbers; the depthwise output is computed again."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *leaves: Any) -> Tensor:
        call.saved = saved = fusion_stages.forward(call.functions, *_split(leaves), *call.norms)
        ctx.functions, ctx.num_saved = call.functions, len(saved) - 1
        ctx.norms = tuple(norm.without_tensors() for norm in call.norms)
        running = [t for norm in call.norms for t in (norm.mean, norm.var)]
        ctx.save_for_backward(*saved[1:], *running, *leaves)
        ctx.set_materialize_grads(False)
        return saved.pooled

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[1:]
        if grad is None:
            return (None,) * (1 + len(needs))
        run = _Gradient.apply if torch.is_grad_enabled() else _Gradient.compute
        gradients = run(ctx.functions, ctx.norms, ctx.num_saved, needs, grad, *ctx.saved_tensors)
        return None, *Gradients.of(gradients).split(needs)


def _strides_as(gradient: Tensor, weight: Tensor) -> Tensor:
    """Give dimensions of one element the strides that the weight has for them; the memory is the same.

    Autograd copies, and DistributedDataParallel warns of, gradients whose strides are not those of their parameter.
    """
    same = weight.is_contiguous() and gradient.is_contiguous() and gradient.shape == weight.shape
    return gradient.as_strided(weight.shape, weight.stride()) if same else gradient


class _Gradient(torch.autograd.Function):
    """The gradients as a function of their own, so that a second derivative can say that it does not exist."""

    @staticmethod
    def compute(functions: Any, norms: Any, num_saved: int, needs: Sequence[bool], grad: Tensor, *tensors: Any) -> Any:
        saved = Saved(grad, *tensors[:num_saved])
        running, leaves = tensors[num_saved : num_saved + 4], tensors[num_saved + 4 :]
        one, two = (
            norm.with_tensors(*leaves[1 + 3 * i : 3 + 3 * i], *running[2 * i : 2 * i + 2])
            for i, norm in enumerate(norms)
        )
        with no_autocast(grad.device.type):
            *gradients, maps = fusion_stages.backward(functions, grad, *_split(leaves), one, two, saved, needs)
        for place, weight in ((0, leaves[0]), (2, leaves[3])):
            gradients[place] = _strides_as(gradients[place], weight)
        return (*gradients, *maps)

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Any, ...]:
        return _Gradient.compute(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(DOUBLE_BACKWARD)


# ---- registered route -----------------------------------------------------------------------------------------


def _flat(case: Case, norms: tuple[BatchNorm, BatchNorm]) -> tuple[Any, ...]:
    return case.features, case.depthwise_weight, *norms[0], case.pointwise_weight, *norms[1]


def _traced(case: Case, norms: tuple[BatchNorm, BatchNorm], leaves: Sequence[Any]) -> Fused:
    arguments = _flat(case, norms)
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves)
    if not (grad or norms[0].training or norms[1].training):
        return Fused(torch.ops.fflfast.fuse_features_inference(*arguments), (None, None), (None, None))
    return _fused(Saved(*torch.ops.fflfast.fuse_features(*arguments)), norms)


# ---- running statistics ---------------------------------------------------------------------------------------


@torch.no_grad()
def update_running(fused: Fused, norms: Sequence[tuple[int, Tensor, Tensor, Tensor | None, float | None]]) -> None:
    """Fold the moments of a call into running statistics, in place, as `nn.BatchNorm2d` does: one kernel for both.

    Args:
        fused: what `fuse` returned.
        norms: of each norm to be updated: which (0 depthwise, 1 pointwise), running mean and variance (C,), the 0-dim
            counter of batches or None, and the momentum; None for the cumulative average, which the counter gives.
    """
    moments, counts, running, batches, momentum = [], [], [], [], []
    for which, mean, var, counter, factor in norms:
        moment, count = fused.moments[which], fused.counts[which]
        if moment is None or count is None:
            continue
        moments.append(moment)
        counts.append(count)
        running += [mean, var]
        batches.append(moment.new_empty(0, dtype=torch.int64) if counter is None else counter)
        # Without a counter a cumulative average has no weight to give, as in nn.BatchNorm2d.
        momentum.append(factor if factor is not None else -1.0 if counter is not None else 0.0)
        if factor is not None and factor < 0:
            raise ValueError(f"update_running: expected a momentum of 0 or more, or None, got {factor}")
    if not moments:
        return
    arguments = (moments, counts, running, batches, momentum)
    like = moments[0]
    kernels = all(t.dtype == torch.float32 and t.is_contiguous() for t in running)
    kernels = kernels and all(t.dtype == torch.int64 for t in batches)
    if is_traced(like):
        if kernels and not is_exported() and has_kernels(_kind(like)):
            torch.ops.fflfast.update_running(*arguments)
        else:
            fusion_reference.update_running(*arguments)
        return
    stages = choose_stages([like[:1].view(1, -1, 1, 1)]).functions if kernels else fusion_reference.STAGES
    stages["update_running"](*arguments)
    if stages is not fusion_reference.STAGES:
        torch.autograd.graph.increment_version([t for t in (*running, *batches) if not t.is_inference()])
