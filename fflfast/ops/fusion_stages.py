"""The order of the stages of the fusion operator, and what processes exchange between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .fusion_arguments import NormParams
from .fusion_reference import Norm
from .reference import accumulation_dtype

__all__ = ["BatchNorm", "Gradients", "Saved", "allows_tf32", "backward", "forward", "values_of"]

Stages = Mapping[str, Callable[..., Any]]


class BatchNorm(NamedTuple):
    """One norm of a checked call, with its process group by name, as a registered operator takes it."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None  # the running statistics of a frozen norm; None in training, where they are not read
    var: Tensor | None
    eps: float
    training: bool
    group: str | None

    @classmethod
    def of(cls, norm: NormParams) -> BatchNorm:
        weight, bias, mean, var, eps, training, group = norm
        name = None if group is None else group.group_name
        return cls(weight, bias, *((None, None) if training else (mean, var)), eps, training, name)

    def frozen(self) -> Norm:
        assert self.mean is not None  # both checked by the public function
        assert self.var is not None
        return Norm(self.mean, self.var, _kept_count(1, self.mean.dtype), self.weight, self.bias, self.eps, False)

    def filled(self, moments: Tensor, count: Tensor) -> Norm:
        """As the stages take it, with the moments of the batch where it trains."""
        if not self.training:
            return self.frozen()
        mean, m2 = moments.unbind()
        return Norm(mean, m2, count, self.weight, self.bias, self.eps, True)

    def without_tensors(self) -> BatchNorm:
        return self._replace(weight=None, bias=None, mean=None, var=None)

    def with_tensors(self, weight: Any, bias: Any, mean: Any, var: Any) -> BatchNorm:
        return self._replace(weight=weight, bias=bias, mean=mean, var=var)


class Saved(NamedTuple):
    """What a forward pass returns: pooled, then what its backward needs beside its arguments.

    y is (B, H·W, C_out), active (2, B, C_out); moments (2, C) are empty for a frozen norm.
    """

    pooled: Tensor
    y: Tensor
    active: Tensor
    moments1: Tensor
    count1: Tensor
    moments2: Tensor
    count2: Tensor


def values_of(features: Sequence[Tensor]) -> int:
    """How many values of a channel this process's batch has."""
    x = features[0]
    return x.shape[0] * x.shape[2] * x.shape[3]


def count_of(values: int, dtype: torch.dtype) -> Tensor:
    """A count as the kernels take it: on the CPU, so that it is read at launch."""
    return torch.tensor(float(values), dtype=dtype, device="cpu")


@lru_cache(maxsize=256)
def _kept_count(values: int, dtype: torch.dtype) -> Tensor:
    """The same, made once. Not in inference mode, whose tensors could not be saved for a later backward."""
    with torch.inference_mode(False):
        return count_of(values, dtype)


def allows_tf32() -> bool:
    """Whether PyTorch's own switch lets float32 products round their factors to tf32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _group(name: str) -> Any:
    resolve: Any = dist.distributed_c10d._resolve_process_group
    return resolve(name)


def combine_moments(moments: Tensor, count: Tensor, group: str | None) -> tuple[Tensor, Tensor]:
    """The moments of all processes' values from those of each, and their count on the moments' device.

    Chan's formula: mean = Σ nᵢ meanᵢ / n and M2 = Σ M2ᵢ + Σ nᵢ (meanᵢ − mean)², in float64 and in the same order on
    every process, so that all get the same bits. A process without values has nᵢ = 0 and adds nothing.
    """
    if group is None:
        return moments, count
    mine = torch.cat([moments.flatten().double(), count.to(moments.device, torch.float64).view(1)])
    size = dist.get_world_size(_group(group))
    gathered = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(gathered, mine, group=_group(group))
    parts = torch.stack(gathered)
    means, m2s = parts[:, :-1].view(size, 2, -1).unbind(1)
    counts = parts[:, -1:]
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    m2 = m2s.sum(0) + (counts * (means - mean).square()).sum(0)
    return torch.stack([mean, m2]).to(moments.dtype), total.to(moments.dtype)


def _combine_sums(sums: Tensor, norm: BatchNorm) -> Tensor:
    """The two sums of a norm's backward over all processes; the parameters' own gradients stay each process's."""
    if norm.group is None:
        return sums
    total = sums.clone()
    dist.all_reduce(total, group=_group(norm.group))
    return total


def forward(
    stages: Stages, features: Sequence[Tensor], depthwise_weight: Tensor, pointwise_weight: Tensor, one: BatchNorm,
    two: BatchNorm,
) -> Saved:  # fmt: skip
    """Three passes over memory: the depthwise output's statistics, the pointwise product, the pool."""
    dtype = accumulation_dtype(features[0].dtype)
    count1 = count2 = _kept_count(values_of(features), dtype)
    kept: Sequence[Tensor] = []
    if one.training:
        moments1, *kept = stages["depthwise_statistics"](features, depthwise_weight)
        moments1, count1 = combine_moments(moments1, count1, one.group)
    else:
        moments1 = features[0].new_empty(0, dtype=dtype)
    norm1 = one.filled(moments1, count1)
    y, moments2 = stages["pointwise"](
        features, depthwise_weight, norm1, pointwise_weight, kept, two.training, allows_tf32()
    )
    if two.training:
        moments2, count2 = combine_moments(moments2, count2, two.group)
    pooled, active = stages["pool"](y, two.filled(moments2, count2))
    return Saved(pooled, y, active, moments1, count1, moments2, count2)


class Gradients(NamedTuple):
    """What a backward pass returns, an empty tensor where nothing is wanted.

    sums1, sums2: (2, C) of this process: the gradients of a norm's bias and of its weight.
    """

    depthwise_weight: Tensor
    sums1: Tensor
    pointwise_weight: Tensor
    sums2: Tensor
    features: list[Tensor]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Gradients:
        """From one flat sequence."""
        return cls(tensors[0], tensors[1], tensors[2], tensors[3], list(tensors[4:]))

    def split(self, needs: Sequence[bool]) -> list[Tensor | None]:
        """In the order of the leaves: depthwise weight, its norm's weight and bias, the same of pointwise, maps."""
        every = [
            self.depthwise_weight, *_weight_bias(self.sums1), self.pointwise_weight, *_weight_bias(self.sums2),
            *self.features,
        ]  # fmt: skip
        return [g if need else None for g, need in zip(every, needs, strict=True)]


def _weight_bias(sums: Tensor) -> tuple[Tensor, Tensor]:
    return (sums[1], sums[0]) if sums.numel() else (sums, sums)


def backward(
    stages: Stages, grad: Tensor, features: Sequence[Tensor], depthwise_weight: Tensor, pointwise_weight: Tensor,
    one: BatchNorm, two: BatchNorm, saved: Saved, needs: Sequence[bool],
) -> Gradients:  # fmt: skip
    """Gradients of the six parameters and of the feature maps; needs has the order of `Gradients.split`."""
    grad = grad.contiguous()
    norm1, norm2 = one.filled(saved.moments1, saved.count1), two.filled(saved.moments2, saved.count2)
    pixels = features[0].shape[2] * features[0].shape[3]
    sums2 = stages["backward_pool"](grad, saved.active, pixels)
    # Processes exchange sums in step with each other, so that none may leave early where there is a group.
    if any((*needs[:4], *needs[6:])) or one.group is not None or two.group is not None:
        total2 = _combine_sums(sums2, two)
        sums1, weight_gradient, *kept = stages["backward_sums"](
            grad, features, depthwise_weight, norm1, pointwise_weight, saved.y, norm2, total2, needs[3], allows_tf32()
        )
        total1 = _combine_sums(sums1, one)
        if bits := sum(1 << k for k, need in enumerate((*needs[6:], needs[0])) if need):
            *maps, depthwise_gradient = stages["backward_inputs"](features, depthwise_weight, norm1, total1, kept, bits)
            return Gradients(depthwise_gradient, sums1, weight_gradient, sums2, maps)
    else:
        sums1, weight_gradient = sums2.new_empty(0), pointwise_weight.new_empty(0)
    maps = [x.new_empty(0) for x in features]
    return Gradients(depthwise_weight.new_empty(0), sums1, weight_gradient, sums2, maps)
