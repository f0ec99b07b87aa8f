"""The kernels of the fusion that are bound by memory or by their launch: statistics, pool, running moments."""

from __future__ import annotations

import triton
import triton.language as tl

from .fusion_sums import (
    count_of,
    is_last,
    scale_shift,
    store_moments,
    store_partial,
    sum_programs,
)
from .fusion_tiles import depthwise, load_taps, relu, rounded, row_start, select_map

# Triton's language is a subset of Python without types.
# mypy: ignore-errors


@triton.jit
def fold(tile, LANES: tl.constexpr):
    """(pixels, channels) → (LANES, channels): sums that a thread can take alone where its rows are LANES apart."""
    return tl.sum(tile.reshape(tile.shape[0] // LANES, LANES, tile.shape[1]), 0)


@triton.jit
def mean_of_rows(feature, start, num_pixels, local, here, taps, ROWS: tl.constexpr, K: tl.constexpr):
    """The mean of h over pixels start … start + ROWS."""
    p = start + tl.arange(0, ROWS)
    there = p < num_pixels
    h = depthwise(feature, p, there, local, here, taps, K)
    return tl.sum(h, 0) / tl.minimum(num_pixels - start, ROWS).to(tl.float32)


@triton.jit(do_not_specialize=["strides", "num_pixels", "pixels_each", "row_units"])
def depthwise_statistics_kernel(
    maps,  # N pointers
    strides,  # 4 N strides in units of K.unit
    weight,  # (C, 1, 3, 3)
    num_pixels,  # P
    pixels_each,  # of a program
    row_units,  # C / ROW_UNIT
    kept,  # (P, C) in the features' dtype, or None
    centre,  # (C,) subtracted from what is kept, or None
    partials,  # (3, programs along 1, C)
    moments,  # (2, C)
    tickets,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, LANES: tl.constexpr, ROW_UNIT: tl.constexpr, STARTS: tl.constexpr,
    ROWS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Mean and M2 of h, each channel's over all pixels; with `kept` also h itself, less its centre.

    A program sweeps its pixels for one block of channels with sums shifted by the mean of its first LANES pixels.
    16-bit h is kept less the mean of the first LANES pixels of all, so that what is rounded is of the size of the
    deviations and not of the mean.

    Bytes: reads x once, and h is written where it is kept. Launches: 1.
    """
    block = tl.program_id(0)
    split = tl.program_id(1)
    feature, offset, count, origin = select_map(maps, strides, block, CHANNELS, STARTS, K)
    local = offset + tl.arange(0, CHANNELS)
    here = local < count
    c = origin + local
    taps = load_taps(weight, c, here, K)
    start = split * pixels_each
    stop = tl.minimum(start + pixels_each, num_pixels)
    k = mean_of_rows(feature, start, num_pixels, local, here, taps, LANES, K)
    less = k
    if centre is not None:
        less = mean_of_rows(feature, start * 0, num_pixels, local, here, taps, LANES, K)
        if split == 0:
            tl.store(centre + c, less, mask=here)
    s1 = tl.zeros((LANES, CHANNELS), tl.float32)
    s2 = tl.zeros((LANES, CHANNELS), tl.float32)
    for first in range(start, stop, PIXELS):
        p = first + tl.arange(0, PIXELS)
        there = p < stop
        h = depthwise(feature, p, there, local, here, taps, K)
        if kept is not None:
            value = h
            if centre is not None:
                value = h - less[None, :]
            at = kept + row_start(p, row_units * ROW_UNIT, K)[:, None] + c[None, :]
            tl.store(at, rounded(value, K), mask=there[:, None] & here[None, :])
        off = tl.where(there[:, None], h - k[None, :], 0.0)
        s1 += fold(off, LANES)
        s2 += fold(off * off, LANES)
    programs = tl.num_programs(1)
    store_partial(partials, split, programs, c, here, K.total, k, tl.sum(s1, 0), tl.sum(s2, 0))
    if is_last(tickets + block, programs):
        store_moments(partials, moments, c, here, K.total, programs, pixels_each, num_pixels, ROWS)


@triton.jit(do_not_specialize=["num_pixels"])
def pool_kernel(
    y,  # (B, H·W, O)
    norm,
    pooled,  # (B, O)
    active,  # (2, B, O)
    num_pixels,  # H·W
    outputs: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, BY_POINTER: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Norm → ReLU → mean over the image, and the two numbers that stand for y in the second norm's backward sums.

    One program an image and block of channels: images along the first dimension of the grid, as the others end at
    65,535. Bytes: reads y once. Launches: 1.
    """
    image = tl.program_id(0)
    o = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    here = o < outputs
    mean, rstd, scale, shift = scale_shift(norm, o, here, BY_POINTER)
    total = tl.zeros((PIXELS, CHANNELS), tl.float32)
    count = tl.zeros((PIXELS, CHANNELS), tl.float32)
    hats = tl.zeros((PIXELS, CHANNELS), tl.float32)
    base = y + image.to(tl.int64) * num_pixels * outputs
    for first in range(0, num_pixels, PIXELS):
        q = first + tl.arange(0, PIXELS)
        inside = (q < num_pixels)[:, None] & here[None, :]
        v = tl.load(base + q[:, None] * outputs + o[None, :], mask=inside, other=0.0).to(tl.float32)
        z = tl.fma(v, tl.broadcast_to(scale[None, :], v.shape), tl.broadcast_to(shift[None, :], v.shape))
        is_active = inside & ~(z <= 0.0)
        total += tl.where(inside, relu(z), 0.0)
        count += tl.where(is_active, 1.0, 0.0)
        hats += tl.where(is_active, (v - mean[None, :]) * rstd[None, :], 0.0)
    at = image.to(tl.int64) * outputs + o
    tl.store(pooled + at, rounded(tl.sum(total, 0) / num_pixels, K), mask=here)
    tl.store(active + at, tl.sum(count, 0), mask=here)
    tl.store(active + tl.num_programs(0).to(tl.int64) * outputs + at, tl.sum(hats, 0), mask=here)


@triton.jit(do_not_specialize=["batch", "images_each", "pixels"])
def backward_pool_kernel(
    grad,  # (B, O)
    active,  # (2, B, O)
    partials,  # (2, programs along 1, O)
    sums,  # (2, O)
    tickets,
    batch,
    images_each,
    pixels,  # H·W
    outputs: tl.constexpr,
    IMAGES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dβ = Σ_b g·count₊ and dγ = Σ_b g·S₊ with g = grad/(H·W). Bytes: 2.5 numbers an image and channel. Launches: 1."""
    block = tl.program_id(0)
    split = tl.program_id(1)
    programs = tl.num_programs(1)
    o = block * CHANNELS + tl.arange(0, CHANNELS)
    here = o < outputs
    d_bias = tl.zeros((IMAGES, CHANNELS), tl.float32)
    d_weight = tl.zeros((IMAGES, CHANNELS), tl.float32)
    stop = tl.minimum(split * images_each + images_each, batch)
    for first in range(split * images_each, stop, IMAGES):
        b = first + tl.arange(0, IMAGES)
        inside = (b < stop)[:, None] & here[None, :]
        at = b.to(tl.int64)[:, None] * outputs + o[None, :]
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) / pixels
        d_bias += g * tl.load(active + at, mask=inside, other=0.0)
        d_weight += g * tl.load(active + batch.to(tl.int64) * outputs + at, mask=inside, other=0.0)
    tl.store(partials + split * outputs + o, tl.sum(d_bias, 0), mask=here)
    tl.store(partials + (programs + split) * outputs + o, tl.sum(d_weight, 0), mask=here)
    if is_last(tickets + block, programs):
        for i in tl.static_range(2):
            total = sum_programs(partials + i * programs * outputs, o, here, outputs, programs, IMAGES)
            tl.store(sums + i * outputs + o, total, mask=here)


@triton.jit(do_not_specialize=["sizes"])
def update_running_kernel(
    moments,  # of each norm (2, C_i)
    counts,  # of each norm a number, or a pointer where BY_POINTER has its bit
    running,  # running mean and variance of each norm
    batches,  # of each norm a counter, or None
    momentum,  # of each norm, negative for None: the cumulative average
    sizes,  # C_i
    BLOCK: tl.constexpr, BY_POINTER: tl.constexpr,
):  # fmt: skip
    """running ← (1 − m)·running + m·batch for mean and unbiased variance; one program a norm. Launches: 1."""
    for i in tl.static_range(len(moments)):
        if tl.program_id(0) == i:
            m = momentum[i] * tl.full((), 1.0, tl.float32)
            if batches[i] is not None:
                seen = tl.load(batches[i]) + 1
                m = tl.where(m < 0.0, 1.0 / seen.to(tl.float32), m)
                tl.debug_barrier()  # one thread writes what all have read
                tl.store(batches[i], seen)
            unbiased = count_of(counts[i], (BY_POINTER >> i) & 1) - 1.0
            for first in range(0, sizes[i], BLOCK):
                c = first + tl.arange(0, BLOCK)
                here = c < sizes[i]
                for part in tl.static_range(2):
                    new = tl.load(moments[i] + part * sizes[i] + c, mask=here, other=0.0)
                    if part == 1:
                        new = new / unbiased
                    old = tl.load(running[2 * i + part] + c, mask=here, other=0.0)
                    tl.store(running[2 * i + part] + c, old * (1.0 - m) + new * m, mask=here)
