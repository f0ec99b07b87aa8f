"""The backends of the fusion operator, and which one takes a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import fusion_reference, native
from .backends import Implementation, choose, missing

__all__ = ["IMPLEMENTATIONS", "choose_stages", "has_kernels"]

# Of every device and dtype: shared memory holds three rows of pixels and more (csrc/cuda/fusion_launch_policy.h).
CUDA_WIDTH = 64


def _triton(name: str) -> Callable[..., Any]:
    """A stage of a module that is imported when first used: not every machine has Triton."""

    def stage(*arguments: Any) -> Any:
        from ..kernels import fuse_features

        return getattr(fuse_features, name)(*arguments)

    return stage


def _triton_refuses(features: Sequence[Tensor], *weights: Tensor) -> str | None:
    from .. import kernels  # when first asked for

    return kernels.available() or _common(features, *weights) or kernels.refuses_fusion(features)


def _cuda_refuses(features: Sequence[Tensor], *weights: Tensor) -> str | None:
    if features[0].device.type != "cuda":
        return "the tensors are not CUDA tensors"
    if features[0].shape[3] > CUDA_WIDTH:
        return f"the kernels hold rows of at most {CUDA_WIDTH} pixels in shared memory, got {features[0].shape[3]}"
    return native.load("cuda") or _common(features, *weights)


def _cpu_refuses(features: Sequence[Tensor], *weights: Tensor) -> str | None:
    for tensor in (*features[:1], *weights):
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            return f"the CPU kernels compute in float32, got {tensor.dtype} on {tensor.device}"
    return native.load("cpu") or _common(features, *weights)


def _common(features: Sequence[Tensor], *weights: Tensor) -> str | None:
    if not 1 <= len(features) <= 8:
        return f"the kernels take 1 to 8 feature maps, got {len(features)}"
    if features[0].dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels compute in float32, bfloat16 or float16, got {features[0].dtype}"
    return None if features[0].numel() else "the batch is empty"


IMPLEMENTATIONS: dict[str, Implementation] = {
    "cuda": Implementation(native.fusion_functions(lambda: native.fusion_operators("fflfast_cuda")), _cuda_refuses),
    "cpu": Implementation(native.fusion_functions(lambda: native.fusion_operators("fflfast_cpu")), _cpu_refuses),
    "triton": Implementation({name: _triton(name) for name in fusion_reference.STAGES}, _triton_refuses),
    "reference": Implementation(fusion_reference.STAGES, lambda *case: None),
}


def choose_stages(features: Sequence[Tensor], *weights: Tensor) -> Implementation:
    try:
        return choose("fuse_features", IMPLEMENTATIONS, features, *weights)
    except ValueError:
        # An empty batch has nothing for a kernel to do: it is no reason to refuse a forced backend.
        if features[0].numel():
            raise
        return IMPLEMENTATIONS["reference"]


def has_kernels(kind: str) -> bool:
    """Whether kernels are there for such feature maps: a look at the libraries, which must not be traced."""
    device, dtype = kind.split()
    if device == "cuda":
        return dtype != "torch.float64" and (missing("cuda") is None or missing("triton") is None)
    return device == "cpu" and dtype == "torch.float32" and missing("cpu") is None


# What torch.compiler.assume_constant_result would set; that imports Dynamo, which takes a second, with fflfast.
has_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]
