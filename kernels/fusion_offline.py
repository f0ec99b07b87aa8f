"""Every variant of the fusion kernels that is compiled without a device: the launches of whole steps, written down.

A step is run on empty CPU tensors with the launches caught, so that what is compiled is what the policy chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from ..ops.fusion_reference import Norm
from . import fuse_features as stages

__all__ = ["launches"]

# A kernel's parameters with what a launch gave them.
Arguments = list[tuple[Any, Any]]
Launch = tuple[str, Any, Arguments, int]

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "nchw": lambda x: x,
    "strided": lambda x: x[:, :, :, : x.shape[3] // 2],
}


def launches() -> Iterator[Launch]:
    """(name, kernel, parameters with their arguments, warps) of each variant, once."""
    bf16, fp32 = torch.bfloat16, torch.float32
    seen: set[str] = set()
    for problem in (
        _step("bf16 (128, 2, 64, 8)", (128, (64, 64), 8), bf16),
        _step("bf16 (256, 2, 512, 7)", (256, (512, 512), 7), bf16),
        _step("bf16 (256, 3, 2048, 7)", (256, (2048,) * 3, 7), bf16),
        _step("bf16 (64, 64 + 100, 7), nchw", (64, (64, 100), 7), bf16, layout="nchw"),
        _step("fp16 (16, 8 × 24, 5), any strides", (16, (24,) * 8, 5), torch.float16, layout="strided"),
        _step("bf16 (256, 2, 512, 7), bf16 weights, frozen", (256, (512, 512), 7), bf16, weights=bf16, train=False),
        _step("fp32 (128, 2, 64, 8)", (128, (64, 64), 8), fp32),
        _step("fp32 (64, 3 × 256, 14), tf32", (64, (256,) * 3, 14), fp32, tf32=True),
        _step("fp32 (2, 5 + 3, 64), nchw", (2, (5, 3), 64), fp32, layout="nchw"),
    ):
        for name, kernel, arguments, warps in problem:
            key = repr((kernel.fn.__name__, [_kind(v) for _, v in arguments], warps))
            if key not in seen:
                seen.add(key)
                yield name, kernel, arguments, warps


def _kind(value: Any) -> Any:
    """What makes a variant: a tensor's dtype, and whether a number is one."""
    if isinstance(value, Tensor):
        return str(value.dtype)
    if type(value) is tuple:
        return tuple(map(_kind, value))
    return value if not isinstance(value, float) else "float"


def _step(
    name: str,
    shape: tuple[int, tuple[int, ...], int],
    dtype: torch.dtype,
    *,
    layout: str = "channels_last",
    weights: torch.dtype = torch.float32,
    train: bool = True,
    tf32: bool = False,
) -> list[Launch]:
    """The launches of forward, backward and update; of inference where the norms are frozen."""
    batch, channels, size = shape
    total = sum(channels)
    with torch.device("cpu"), _caught(name) as found:
        maps = [
            LAYOUTS[layout](torch.empty(batch, c, size, size * (2 if layout == "strided" else 1), dtype=dtype))
            for c in channels
        ]
        depthwise = torch.empty(total, 1, 3, 3, dtype=weights)
        matrix = torch.empty(total, total, 1, 1, dtype=weights)
        grad = torch.empty(batch, total, dtype=dtype)
        vector, count = torch.empty(2, total), torch.tensor(float(batch * size * size))
        norm = Norm(vector[0], vector[1], count, vector[0], vector[1], 1e-5, train)
        kept: list[Tensor] = []
        if train:
            moments1, *kept = stages.depthwise_statistics(maps, depthwise)
        else:
            stages.inference(maps, depthwise, norm, matrix, norm, tf32)
        y, moments2 = stages.pointwise(maps, depthwise, norm, matrix, kept, train, tf32)
        _, active = stages.pool(y, norm)
        sums2 = stages.backward_pool(grad, active, size * size)
        sums1, _, *kept = stages.backward_sums(
            grad, maps, depthwise, norm, matrix, y, norm, sums2, train, tf32
        )  # fmt: skip
        stages.backward_inputs(maps, depthwise, norm, sums1, kept, (2 << len(maps)) - 1)
        if train:
            counter = torch.zeros((), dtype=torch.int64)
            running = [t for _ in range(2) for t in vector]
            stages.update_running([moments1, moments2], [count] * 2, running, [counter] * 2, [0.1] * 2)
    return found


@contextmanager
def _caught(name: str) -> Iterator[list[Launch]]:
    """Launches are written down instead of run."""
    found: list[Launch] = []
    run = JITFunction.run

    def write_down(self: Any, *args: Any, grid: Any, warmup: bool, num_warps: int) -> None:
        found.append((f"{self.fn.__name__} {name}", self, list(zip(self.params, args, strict=True)), num_warps))

    JITFunction.run = write_down
    try:
        yield found
    finally:
        JITFunction.run = run
