"""What the fusion kernels are compiled for: the feature maps' sizes, layout and dtype.

Channels, height and width are known to the compiler: divisions by them become multiplications, and tiles that need no
mask have none. The batch, strides and statistics are run-time values, so that a model compiles once for each spatial
size, whatever its batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from . import interpreted

__all__ = ["ANY", "CHANNELS", "WIDTH", "Plan", "first_blocks", "plan", "strides"]

# Which stride of every feature map is 1: the tile is loaded along that dimension.
ANY, CHANNELS, WIDTH = 0, 1, 2

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Plan(NamedTuple):
    """What the kernels know of the feature maps at compile time.

    Attributes:
        channels: C_k of each map.
        first: the channel of the virtual concatenation that each map begins with.
        total: C, the number of channels.
        height, width: H and W.
        inner: CHANNELS, WIDTH or ANY.
        unit: a power of two that divides every stride but the inner one, and every C_k where channels are inner;
            strides are given in this unit, which is how the compiler learns how wide it may load.
        wide: whether offsets need 64 bits.
        dtype: of the features, of what the products take, and of what is stored.
        precision: of products of float32.
        interpreted: Triton's interpreter cuts bfloat16 off instead of rounding, and multiplies its bits as integers.
    """

    channels: tuple[int, ...]
    first: tuple[int, ...]
    total: int
    height: int
    width: int
    inner: int
    unit: int
    wide: bool
    dtype: tl.dtype
    precision: str
    interpreted: bool


def strides(features: Sequence[Tensor]) -> tuple[int, int, tuple[int, ...]]:
    """(inner, unit, the strides (b, c, h, w) of every map in that unit, but the inner one, which is 1)."""
    every = [
        tuple(s if n > 1 else 0 for n, s in zip(x.shape, x.stride(), strict=True)) for x in features
    ]  # the stride of a dimension of size 1 is never used
    inner = ANY
    for dimension, kind in ((3, WIDTH), (1, CHANNELS)):
        if all(x.shape[dimension] == 1 or x.stride(dimension) == 1 for x in features):
            inner = kind
    if inner != CHANNELS:
        return inner, 1, tuple(s for steps in every for s in steps)
    units = 0
    for x, (b, _, h, w) in zip(features, every, strict=True):
        units |= b | h | w | x.shape[1]
    unit = min(units & -units, UNIT_BYTES // features[0].element_size())
    return inner, unit, tuple(s // unit for b, _, h, w in every for s in (b, 0, h, w))


# How much of a pixel one thread loads at a time: 16 bytes would be as quick, but nine taps' weights for as many
# channels and nine sums of the depthwise weight's gradient do not fit into a thread's registers.
UNIT_BYTES = 8


def _reach(x: Tensor) -> int:
    """The largest offset of an element of x."""
    return sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))


def plan(features: Sequence[Tensor], outputs: int, inner: int, unit: int, tf32: bool) -> Plan:
    """The plan of a call; one object for equal arguments."""
    batch, _, height, width = features[0].shape
    channels = tuple(x.shape[1] for x in features)
    reach = max(batch * height * width * max(sum(channels), outputs), *(_reach(x) for x in features))
    # A tile may lie beyond the last pixel by its own size and by a row of taps.
    wide = reach + 4096 * max(sum(channels), outputs) >= 2**31
    return _plan(channels, height, width, inner, unit, wide, features[0].dtype, tf32)


@lru_cache(maxsize=1024)
def _plan(
    channels: tuple[int, ...],
    height: int,
    width: int,
    inner: int,
    unit: int,
    wide: bool,
    dtype: torch.dtype,
    tf32: bool,
) -> Plan:
    first = tuple(sum(channels[:k]) for k in range(len(channels)))
    return Plan(
        channels, first, sum(channels), height, width, inner, unit, wide, DTYPES[dtype], "tf32" if tf32 else "ieee",
        interpreted() and dtype == torch.bfloat16,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def first_blocks(channels: tuple[int, ...], block: int) -> tuple[int, ...]:
    """The first channel block of each map, and behind them their number: a block never straddles two maps."""
    starts = [0]
    for count in channels:
        starts.append(starts[-1] + -(-count // block))
    return tuple(starts)
