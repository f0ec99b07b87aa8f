"""The Triton backend of `fuse_features`: what prepares and launches the kernels of each stage.

The stages are those of `ops.fusion_reference`, with the same arguments and results. Nothing here waits for the device:
a count on the CPU is passed by value, one on the device as a pointer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import device
from . import fusion_launch as launch
from .fusion_backward_kernels import backward_inputs_kernel, backward_product_kernel, weight_gradient_kernel
from .fusion_plan import CHANNELS, UNIT_BYTES, Plan, first_blocks, plan, strides
from .fusion_product_kernels import inference_kernel, pointwise_kernel
from .fusion_statistics_kernels import (
    backward_pool_kernel,
    depthwise_statistics_kernel,
    pool_kernel,
    update_running_kernel,
)

if TYPE_CHECKING:
    from ..ops.fusion_reference import Norm

__all__ = [
    "backward_inputs",
    "backward_pool",
    "backward_sums",
    "depthwise_statistics",
    "inference",
    "pointwise",
    "pool",
    "update_running",
]


def depthwise_statistics(features: Sequence[Tensor], depthwise_weight: Tensor) -> list[Tensor]:
    """[moments (2, C)], and where `pointwise` will want it h (P, C), which 16 bits hold less its centre (C,)."""
    x = features[0]
    inner, unit, steps = strides(features)
    k = plan(features, 1, inner, unit, False)
    num_pixels = _num_pixels(x)
    by_width = inner != CHANNELS
    tile = launch.BY_WIDTH if by_width else launch.sweep(k.channels, unit, launch.STATISTICS_PIXELS)
    starts = first_blocks(k.channels, tile.channels)
    programs, each = launch.parts(starts[-1], num_pixels, tile.pixels)
    kept, centre = None, None
    if launch.keeps(k.total, x.element_size()):
        kept = x.new_empty(num_pixels, k.total)
        if x.element_size() == 2:
            centre = _float32(x, k.total)
    moments = _float32(x, 2, k.total)
    row_unit = _row_unit(k)
    with device.of(x):
        depthwise_statistics_kernel[(starts[-1], programs)](
            tuple(features), steps, depthwise_weight.contiguous(), num_pixels, each, k.total // row_unit, kept, centre,
            _float32(x, 3, programs, k.total), moments, device.tickets(x, starts[-1]), tile.pixels, tile.channels,
            tile.lanes, row_unit, starts, launch.SUM_ROWS, k, num_warps=tile.warps,
        )  # fmt: skip
    return [t for t in (moments, kept, centre) if t is not None]


def pointwise(
    features: Sequence[Tensor], depthwise_weight: Tensor, norm1: Norm, pointwise_weight: Tensor, kept: Sequence[Tensor],
    statistics: bool, tf32: bool,
) -> list[Tensor]:  # fmt: skip
    """[y (B, H·W, O) in the features' dtype; moments (2, O) of y as stored, or an empty tensor]."""
    x = features[0]
    inner, unit, steps = strides(features)
    outputs = pointwise_weight.shape[0]
    k = plan(features, outputs, inner, unit, tf32)
    num_pixels = _num_pixels(x)
    kind = launch.kind(x.element_size(), tf32)
    tile = launch.product(num_pixels, outputs, (launch.TILES if kept else launch.FORMING)[kind])
    channels = tile.inner if kept else launch.block_of(k.channels, tile.inner)
    weight = _matrix(pointwise_weight, x.dtype, tile)
    tiles, columns = -(-num_pixels // tile.rows), -(-outputs // tile.columns)
    y = x.new_empty(x.shape[0], x.shape[2] * x.shape[3], outputs)
    moments = _float32(x, 2, outputs) if statistics else _float32(x, 0)
    h, centre = (*kept, None, None)[:2]
    norm, by_pointer = _norm(norm1, x)
    with device.of(x):
        pointwise_kernel[(tiles * columns,)](
            tuple(features), steps, depthwise_weight.contiguous(), h, centre, norm, _float32(x, 2, k.total),
            weight, y, _float32(x, 3, tiles, outputs) if statistics else None, moments,
            device.tickets(x, columns), num_pixels, outputs, tile.rows, channels, tile.columns,
            first_blocks(k.channels, channels), launch.GROUP, tile.stages, launch.PREPARE,
            launch.SUM_ROWS, launch.lanes(tile), by_pointer, k, num_warps=tile.warps,
        )  # fmt: skip
    return [y, moments]


def pool(y: Tensor, norm2: Norm) -> list[Tensor]:
    """[pooled (B, O) in y's dtype; (2, B, O): how many pixels are active, and the sum of ŷ over them]."""
    batch, pixels, outputs = y.shape
    pooled, active = y.new_empty(batch, outputs), _float32(y, 2, batch, outputs)
    norm, by_pointer = _norm(norm2, y)
    k = plan([y.view(batch, outputs, pixels, 1)], outputs, CHANNELS, 1, False)
    with device.of(y):
        pool_kernel[(batch, -(-outputs // launch.POOL_CHANNELS))](
            y, norm, pooled, active, pixels, outputs, min(launch.POOL_PIXELS, launch.power(pixels)),
            launch.POOL_CHANNELS, by_pointer, k, num_warps=launch.POOL_WARPS,
        )  # fmt: skip
    return [pooled, active]


def inference(
    features: Sequence[Tensor], depthwise_weight: Tensor, norm1: Norm, pointwise_weight: Tensor, norm2: Norm, tf32: bool
) -> Tensor:
    """pooled (B, O) of two frozen norms."""
    x = features[0]
    batch, _, height, width = x.shape
    inner, unit, steps = strides(features)
    outputs = pointwise_weight.shape[0]
    k = plan(features, outputs, inner, unit, tf32)
    tile = launch.product(_num_pixels(x), outputs, launch.INFERENCE[launch.kind(x.element_size(), tf32)])
    pixels = min(launch.power(height * width), tile.rows)
    images = tile.rows // pixels
    row_unit = _row_unit(k)
    channels = launch.block_of(k.channels, launch.MOST_COLUMNS)
    rows, _, _ = launch.epilogue(tile, channels, row_unit)
    starts = first_blocks(k.channels, channels)
    programs, shares = launch.persistent(-(-batch // images), -(-outputs // tile.columns))
    room = x.new_empty(programs * shares, -(-height * width // pixels) * tile.rows, k.total)
    pooled = x.new_empty(batch, outputs)
    one, pointer1 = _norm(norm1, x)
    two, pointer2 = _norm(norm2, x)
    with device.of(x):
        inference_kernel[(programs, shares)](
            tuple(features), steps, depthwise_weight.contiguous(), one, _matrix(pointwise_weight, x.dtype, tile), two,
            room, pooled, batch, k.total // row_unit, outputs, images, pixels, tile.inner, tile.columns, starts, rows,
            channels, row_unit, tile.stages, pointer1 | pointer2 << 1, k, num_warps=tile.warps,
        )  # fmt: skip
    return pooled


def backward_pool(grad: Tensor, active: Tensor, pixels: int) -> Tensor:
    """(2, O): the gradients of the second norm's bias and weight, from grad (B, O)."""
    batch, outputs = grad.shape
    sums = _float32(grad, 2, outputs)
    blocks = -(-outputs // launch.IMAGE_CHANNELS)
    programs, each = launch.parts(blocks, batch, launch.IMAGES)
    with device.of(grad):
        backward_pool_kernel[(blocks, programs)](
            grad, active, _float32(grad, 2, programs, outputs), sums, device.tickets(grad, blocks), batch, each, pixels,
            outputs, launch.IMAGES, launch.IMAGE_CHANNELS, num_warps=launch.IMAGE_WARPS,
        )  # fmt: skip
    return sums


def backward_sums(
    grad: Tensor, features: Sequence[Tensor], depthwise_weight: Tensor, norm1: Norm, pointwise_weight: Tensor,
    y: Tensor, norm2: Norm, sums2: Tensor, needs_weight: bool, tf32: bool,
) -> list[Tensor]:  # fmt: skip
    """[(2, C): the gradients of the first norm's bias and weight; that of the pointwise weight; dh⁺ and mostly ĥ]."""
    x = features[0]
    inner, unit, steps = strides(features)
    outputs = pointwise_weight.shape[0]
    k = plan(features, outputs, inner, unit, tf32)
    num_pixels, kind = _num_pixels(x), launch.kind(x.element_size(), tf32)
    tile = launch.product(num_pixels, k.total, launch.BACKWARD[kind])
    channels = launch.block_of(k.channels, tile.columns)
    tiles, starts = -(-num_pixels // tile.rows), first_blocks(k.channels, channels)
    dz = x.new_empty(num_pixels, k.total)
    hat = x.new_empty(num_pixels, k.total) if norm1.training or needs_weight else None
    dy = x.new_empty(num_pixels, outputs) if needs_weight else None
    sums1 = _float32(x, 2, k.total)
    one, pointer1 = _norm(norm1, x)
    two, pointer2 = _norm(norm2, x)
    row_unit = _row_unit(k)
    epilogue = launch.epilogue(tile, channels, row_unit)
    with device.of(x):
        backward_product_kernel[(tiles * starts[-1],)](
            grad, tuple(features), steps, depthwise_weight.contiguous(), one,
            _matrix(pointwise_weight, x.dtype, tile), y, two, sums2, _float32(x, 6, outputs), dz, hat, dy,
            _float32(x, 2, tiles, k.total), sums1, device.tickets(x, starts[-1]), num_pixels,
            k.total // row_unit, outputs, tile.rows, channels, tile.inner, starts, *epilogue, row_unit, launch.GROUP,
            tile.stages, launch.PREPARE, launch.SUM_ROWS, norm1.training | norm2.training << 1,
            pointer1 | pointer2 << 1, k, num_warps=tile.warps,
        )  # fmt: skip
        weight_gradient = pointwise_weight.new_empty(0)
        if needs_weight:
            weight_gradient = torch.empty_like(pointwise_weight, memory_format=torch.contiguous_format)
            tile, splits = launch.weight_gradient(k.total, outputs, num_pixels, kind)
            each = -(-num_pixels // (splits * tile.inner)) * tile.inner
            splits = -(-num_pixels // each)
            tiles = -(-k.total // tile.rows) * -(-outputs // tile.columns)
            weight_gradient_kernel[(tiles, splits)](
                hat, dy, _vector(norm1.weight), _vector(norm1.bias),
                _float32(x, tiles, splits, tile.rows, tile.columns) if splits > 1 else None, weight_gradient,
                device.tickets(x, tiles), num_pixels, each, outputs, tile.inner, tile.rows, tile.columns, tile.stages,
                launch.SUM_ROWS, k, num_warps=tile.warps,
            )  # fmt: skip
    return [t for t in (sums1, weight_gradient, dz, hat) if t is not None]


def backward_inputs(
    features: Sequence[Tensor], depthwise_weight: Tensor, norm1: Norm, sums1: Tensor, kept: Sequence[Tensor], needs: int
) -> list[Tensor]:
    """[the gradients of the N feature maps; that of the depthwise weight]; an empty tensor where a bit is not set."""
    x = features[0]
    gradients = [torch.empty_like(f) if needs >> i & 1 else f.new_empty(0) for i, f in enumerate(features)]
    needs_weight = bool(needs >> len(features) & 1)
    weight_gradient = depthwise_weight.new_empty(0)
    if needs_weight:
        weight_gradient = torch.empty_like(depthwise_weight, memory_format=torch.contiguous_format)
    if not needs:
        return [*gradients, weight_gradient]
    inner, unit, steps = strides(features)
    k = plan(features, 1, inner, unit, False)
    num_pixels = _num_pixels(x)
    # A gradient that nobody wants is given the strides of its feature map and is not written.
    targets = [g if g.numel() else f for g, f in zip(gradients, features, strict=True)]
    target_inner, target_unit, target_steps = strides(targets)
    row_unit = _row_unit(k)
    tile = launch.sweep(k.channels, row_unit, launch.GRADIENT_PIXELS)
    starts = first_blocks(k.channels, tile.channels)
    programs, each = launch.parts(starts[-1], num_pixels, tile.pixels)
    norm, by_pointer = _norm(norm1, x)
    with device.of(x):
        backward_inputs_kernel[(starts[-1], programs)](
            tuple(features), steps, tuple(targets), target_steps, depthwise_weight.contiguous(), norm, sums1, kept[0],
            kept[1] if norm1.training else None, _float32(x, programs, 9, k.total) if needs_weight else None,
            weight_gradient, device.tickets(x, starts[-1]), num_pixels, each, k.total // row_unit, tile.pixels,
            tile.channels, tile.lanes, row_unit, starts, launch.SUM_ROWS, needs & (1 << len(features)) - 1, by_pointer,
            k, plan(targets, 1, target_inner, target_unit, False), num_warps=tile.warps,
        )  # fmt: skip
    return [*gradients, weight_gradient]


def update_running(
    moments: Sequence[Tensor], counts: Sequence[Tensor], running: Sequence[Tensor], batches: Sequence[Tensor],
    momentum: Sequence[float],
) -> None:  # fmt: skip
    """Fold batch moments into running statistics in place, as nn.BatchNorm2d does."""
    x = moments[0]
    numbers = [_count(count, x) for count in counts]
    with device.of(x):
        update_running_kernel[(len(moments),)](
            tuple(moments), tuple(number for number, _ in numbers), tuple(running),
            tuple(b if b.numel() else None for b in batches), tuple(map(float, momentum)),
            tuple(m.shape[1] for m in moments), launch.UPDATE_BLOCK,
            sum(bit << i for i, (_, bit) in enumerate(numbers)), num_warps=launch.UPDATE_WARPS,
        )  # fmt: skip


def _num_pixels(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


def _float32(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _row_unit(k: Plan) -> int:
    """What divides the rows of a (P, C), up to what a thread takes of them at a time."""
    return min(k.total & -k.total, UNIT_BYTES * 8 // k.dtype.primitive_bitwidth)


def _matrix(weight: Tensor, dtype: torch.dtype, tile: launch.Product) -> Tensor:
    """(O, C, 1, 1) as (O, C), which both of its memory formats are; rounded here where the policy says so."""
    matrix = weight.reshape(weight.shape[:2]).contiguous()
    return matrix.to(dtype) if launch.casts(tile) else matrix


def _vector(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def _count(count: Tensor, like: Tensor) -> tuple[Tensor | float, int]:
    """A count as kernels take it, and whether that is a pointer."""
    return (float(count), 0) if count.is_cpu else (count, 1)


def _norm(norm: Norm, like: Tensor) -> tuple[tuple[Tensor | float | None, ...], int]:
    """(mean, m2, count, weight, bias, eps) as kernels take it, and whether the count is a pointer."""
    count, by_pointer = _count(norm.count, like)
    vectors = [_vector(v) for v in (norm.mean, norm.m2, norm.weight, norm.bias)]
    return (*vectors[:2], count, *vectors[2:], norm.eps), by_pointer
