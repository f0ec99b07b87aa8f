"""The kernels of the fusion's backward: the two products, then the gradients of the feature maps and their weights.

With g = ∂L/∂pooled/(H·W) every pixel of an image has the same gradient, so that dy is formed from y and a row of g:

    dy = scale2·g·1[z₂ > 0] − c₀ − (y − mean2)·c₁,    c₀ = scale2·dβ2/n,    c₁ = scale2·rstd2·dγ2/n

(the last two only where the norm trains), and likewise dh from dh⁺ = Wᵀ·dy·1[z > 0] and ĥ.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .fusion_product_kernels import grouped
from .fusion_statistics_kernels import fold
from .fusion_sums import count_of, is_last, scale_shift, sum_programs
from .fusion_tiles import (
    address,
    depthwise,
    load_taps,
    product,
    relu,
    rounded,
    row_start,
    select_map,
    spread,
    upright,
)

# Triton's language is a subset of Python without types.
# mypy: ignore-errors
# ruff: noqa: SIM102


@triton.jit
def through_norm(norm, sums, c, here, width, TRAINING: tl.constexpr, BY_POINTER: tl.constexpr):
    """(c₀, c₁) of channels c for the norm's sums (2, width), zeros where it is frozen; c₁ goes with v − mean."""
    _, rstd, scale, _ = scale_shift(norm, c, here, BY_POINTER)
    c0 = tl.zeros(c.shape, tl.float32)
    c1 = c0
    if TRAINING:
        count = count_of(norm[2], BY_POINTER)
        c0 = scale * (tl.load(sums + c, mask=here, other=0.0) / count)
        c1 = scale * (tl.load(sums + width + c, mask=here, other=0.0) / count)
    return c0, c1, rstd


@triton.jit
def prepare_dy(
    norm, sums, vectors, outputs: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr, TRAINING: tl.constexpr,
    BY_POINTER: tl.constexpr,
):  # fmt: skip
    """scale, shift, scale/(H·W), mean, c₀ and c₁ of all O channels to vectors (6, O), the same from every program."""
    for start in range(0, outputs, BLOCK):
        o = start + tl.arange(0, BLOCK)
        here = o < outputs
        mean, _, scale, shift = scale_shift(norm, o, here, BY_POINTER)
        c0, c1, rstd = through_norm(norm, sums, o, here, outputs, TRAINING, BY_POINTER)
        tl.store(vectors + o, scale, mask=here)
        tl.store(vectors + outputs + o, shift, mask=here)
        tl.store(vectors + 2 * outputs + o, scale / PIXELS, mask=here)
        tl.store(vectors + 3 * outputs + o, mean, mask=here)
        tl.store(vectors + 4 * outputs + o, c0, mask=here)
        tl.store(vectors + 5 * outputs + o, c1 * rstd, mask=here)
    tl.debug_barrier()


@triton.jit
def load_dy(
    grad, y, vectors, b, rows, there, o, here, outputs: tl.constexpr, TRAINING: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """dy (pixels, outputs o) in the features' dtype; b the pixels' images, `rows` their places in y."""
    inside = there[:, None] & here[None, :]
    v = tl.load(y + rows[:, None] + o[None, :], mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + row_start(b, outputs, K)[:, None] + o[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(vectors + o, mask=here, other=0.0)[None, :]
    shift = tl.load(vectors + outputs + o, mask=here, other=0.0)[None, :]
    per_pixel = tl.load(vectors + 2 * outputs + o, mask=here, other=0.0)[None, :]
    z = tl.fma(v, tl.broadcast_to(scale, v.shape), tl.broadcast_to(shift, v.shape))
    dy = tl.where(z <= 0.0, 0.0, per_pixel * g)  # a NaN is active, as for ReLU's gradient in PyTorch
    if TRAINING:
        mean = tl.load(vectors + 3 * outputs + o, mask=here, other=0.0)[None, :]
        c0 = tl.load(vectors + 4 * outputs + o, mask=here, other=0.0)[None, :]
        c1 = tl.load(vectors + 5 * outputs + o, mask=here, other=0.0)[None, :]
        dy = dy - c0 - (v - mean) * c1
    return rounded(dy, K)


@triton.jit(do_not_specialize=["strides", "num_pixels", "row_units"])
def backward_product_kernel(
    grad,  # (B, O)
    maps, strides, depthwise_weight, norm1,
    weight,  # (O, C)
    y, norm2, sums2,  # (P, O); the second norm and its sums (2, O)
    vectors,  # room for (6, O)
    dz,  # (P, C): dh⁺
    hat,  # (P, C): ĥ, or None where no kernel wants it
    dy,  # (P, O), or None where the pointwise weight needs no gradient
    partials, sums1, tickets,  # (2, tiles of pixels, C), (2, C)
    num_pixels,
    row_units,  # C / ROW_UNIT
    outputs: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, STARTS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, LANES: tl.constexpr, ROW_UNIT: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
    BLOCK: tl.constexpr, SUM_ROWS: tl.constexpr, TRAINING: tl.constexpr, BY_POINTER: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """dh⁺ = Wᵀ·dy·1[z > 0] with its sums Σ dh⁺ and Σ dh⁺·ĥ; ĥ and dy are left for the kernels that follow.

    One program a tile of pixels × channels of one map. The prologue forms dy from y and grad; the epilogue forms h
    from the feature map by nine taps, once for every pixel, ROWS × COLUMNS of the tile at a time. Bytes: y and grad
    once for each block of channels (from the L2 cache but for the first), x once; writes dh⁺, ĥ, dy. Launches: 1.
    """
    num_tiles = tl.cdiv(num_pixels, PIXELS)
    tile, block = grouped(tl.program_id(0), num_tiles, STARTS[len(maps)], GROUP)
    p = tile * PIXELS + tl.arange(0, PIXELS)
    there = p < num_pixels
    b = p // (K.height * K.width)
    feature, offset, count, origin = select_map(maps, strides, block, CHANNELS, STARTS, K)
    here = offset + tl.arange(0, CHANNELS) < count
    c = origin + offset + tl.arange(0, CHANNELS)
    prepare_dy(norm2, sums2, vectors, outputs, K.height * K.width, BLOCK, TRAINING >> 1, BY_POINTER >> 1)
    acc = tl.zeros((PIXELS, CHANNELS), tl.float32)
    rows = row_start(p, outputs, K)
    for start in tl.range(0, outputs, OUTPUTS, num_stages=STAGES):
        o = start + tl.arange(0, OUTPUTS)
        here_o = o < outputs
        d = load_dy(grad, y, vectors, b, rows, there, o, here_o, outputs, TRAINING >> 1, K)
        if dy is not None:
            if block == 0:
                tl.store(dy + rows[:, None] + o[None, :], d, mask=there[:, None] & here_o[None, :])
        w = tl.load(weight + o[:, None] * K.total + c[None, :], mask=here_o[:, None] & here[None, :], other=0.0)
        if w.dtype != K.dtype:
            w = rounded(w, K)
        acc = product(d, w, acc, K)

    # Read back from the cache by the threads that form h: beside the accumulators there is no room for nine taps.
    row = row_start(p, K.total, K)[:, None]
    tl.store(dz + row + c[None, :], rounded(acc, K), mask=there[:, None] & here[None, :])
    tl.debug_barrier()
    stop = tl.minimum(tile * PIXELS + PIXELS, num_pixels)
    for part in range(0, CHANNELS, COLUMNS):
        local = offset + part + tl.arange(0, COLUMNS)
        store_masked(
            feature, depthwise_weight, norm1, dz, hat, partials, tile, num_tiles, stop, local, count, origin,
            row_units * ROW_UNIT, PIXELS, ROWS, LANES, BY_POINTER & 1, K,
        )  # fmt: skip
    if is_last(tickets + block, num_tiles):
        for i in tl.static_range(2):
            total = sum_programs(partials + i * num_tiles * K.total, c, here, K.total, num_tiles, SUM_ROWS)
            tl.store(sums1 + i * K.total + c, total, mask=here)


@triton.jit
def store_masked(
    feature, depthwise_weight, norm, dz, hat, partials, tile, num_tiles, stop, local, count, origin, width,
    PIXELS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, BY_POINTER: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """A tile of Wᵀ·dy in dz becomes dh⁺ for the channels `local` of one map, with its sums; ĥ to `hat`."""
    here = local < count
    c = origin + local
    taps = load_taps(depthwise_weight, c, here, K)
    mean, rstd, scale, shift = scale_shift(norm, c, here, BY_POINTER)
    d_bias = tl.zeros((LANES, local.shape[0]), tl.float32)
    d_weight = tl.zeros((LANES, local.shape[0]), tl.float32)
    for first in range(tile * PIXELS, stop, ROWS):
        p = first + tl.arange(0, ROWS)
        there = p < stop
        h = depthwise(feature, p, there, local, here, taps, K)
        z = tl.fma(h, tl.broadcast_to(scale[None, :], h.shape), tl.broadcast_to(shift[None, :], h.shape))
        at = row_start(p, width, K)[:, None] + c[None, :]
        inside = there[:, None] & here[None, :]
        value = tl.where(z <= 0.0, 0.0, tl.load(dz + at, mask=inside, other=0.0).to(tl.float32))
        tl.store(dz + at, rounded(value, K), mask=inside)
        normal = (h - mean[None, :]) * rstd[None, :]
        if hat is not None:
            tl.store(hat + at, rounded(normal, K), mask=inside)
        d_bias += fold(value, LANES)
        d_weight += fold(tl.where(inside, value * normal, 0.0), LANES)
    tl.store(partials + tile * K.total + c, tl.sum(d_bias, 0), mask=here)
    tl.store(partials + (num_tiles + tile) * K.total + c, tl.sum(d_weight, 0), mask=here)


@triton.jit(do_not_specialize=["num_pixels", "pixels_each"])
def weight_gradient_kernel(
    hat, dy,  # (P, C) ĥ, (P, O)
    weight, bias,  # of the first norm, (C,) or None
    partials,  # (tiles, splits, CHANNELS, OUTPUTS) float32, or None for one split
    gradient,  # (O, C)
    tickets,
    num_pixels,
    pixels_each,  # of a split
    outputs: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, STAGES: tl.constexpr, ROWS: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """dW = dyᵀ·a with a = relu(weight1·ĥ + bias1), as its transpose: a is the factor that is formed in registers.

    One program a tile of channels × outputs and a part of the pixels; the last of a tile adds the parts in order.
    Bytes: ĥ once for each tile of outputs, dy once for each tile of channels (from the L2 cache but for the first).
    Launches: 1.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    columns: tl.constexpr = (K.total + CHANNELS - 1) // CHANNELS
    c = tile % columns * CHANNELS + tl.arange(0, CHANNELS)
    o = tile // columns * OUTPUTS + tl.arange(0, OUTPUTS)
    here = c < K.total
    here_o = o < outputs
    scale = tl.full((CHANNELS,), 1.0, tl.float32)
    shift = tl.zeros((CHANNELS,), tl.float32)
    if weight is not None:
        scale = tl.load(weight + c, mask=here, other=0.0)
    if bias is not None:
        shift = tl.load(bias + c, mask=here, other=0.0)
    start = split * pixels_each
    stop = tl.minimum(start + pixels_each, num_pixels)
    acc = tl.zeros((CHANNELS, OUTPUTS), tl.float32)
    for first in tl.range(start, stop, PIXELS, num_stages=STAGES):
        p = first + tl.arange(0, PIXELS)
        there = p < stop
        at = hat + row_start(p, K.total, K)[:, None] + c[None, :]
        h = tl.load(at, mask=there[:, None] & here[None, :], other=0.0).to(tl.float32)
        z = tl.fma(h, tl.broadcast_to(scale[None, :], h.shape), tl.broadcast_to(shift[None, :], h.shape))
        at = dy + row_start(p, outputs, K)[:, None] + o[None, :]
        d = tl.load(at, mask=there[:, None] & here_o[None, :], other=0.0)
        acc = product(tl.trans(rounded(relu(z), K)), d, acc, K)
    if partials is None:
        at = gradient + o.to(tl.int64)[None, :] * K.total + c[:, None]
        store_gradient(at, acc, here[:, None] & here_o[None, :], K)
    else:
        columns_of = tl.arange(0, OUTPUTS)[None, :]
        size: tl.constexpr = CHANNELS * OUTPUTS
        own = partials + tl.cast(tile, tl.int64) * splits * size
        tl.store(own + split * size + tl.arange(0, CHANNELS)[:, None] * OUTPUTS + columns_of, acc)
        if is_last(tickets + tile, splits):
            for row in range(0, CHANNELS, ROWS):
                rows = row + tl.arange(0, ROWS)[:, None]
                total = tl.zeros((ROWS, OUTPUTS), tl.float32)
                for i in range(splits):
                    total += tl.load(own + i * size + rows * OUTPUTS + columns_of, cache_modifier=".cg")
                c_i = tile % columns * CHANNELS + rows
                at = gradient + o.to(tl.int64)[None, :] * K.total + c_i
                store_gradient(at, total, (c_i < K.total) & here_o[None, :], K)


@triton.jit
def store_gradient(at, value, mask, K: tl.constexpr):
    """A weight's gradient in the weight's dtype: float32 or the features'."""
    if at.dtype.element_ty != tl.float32:
        value = rounded(value, K)
    tl.store(at, value, mask=mask)


@triton.jit(do_not_specialize=["strides", "gradient_strides", "num_pixels", "pixels_each", "row_units"])
def backward_inputs_kernel(
    maps, strides,  # N pointers and 4 N strides in units of K.unit
    gradients, gradient_strides,  # the same of the gradients, looked at where NEEDS has a bit, in units of G.unit
    weight,  # (C, 1, 3, 3)
    norm, sums,  # the first norm and its sums (2, C)
    dz, hat,  # (P, C): dh⁺, and ĥ or None where the norm is frozen
    partials,  # (programs along 1, 9, C), or None where the weight needs no gradient
    weight_gradient,  # (C, 1, 3, 3)
    tickets,
    num_pixels,
    pixels_each,
    row_units,  # C / ROW_UNIT
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, LANES: tl.constexpr, ROW_UNIT: tl.constexpr, STARTS: tl.constexpr,
    ROWS: tl.constexpr, NEEDS: tl.constexpr, BY_POINTER: tl.constexpr, K: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """dx and the depthwise weight's gradient from the same nine neighbours of dh:

        dh[q] = scale·dh⁺[q] − c₀ − ĥ[q]·c₁,  dx[p] = Σ_t w_t·dh[p − t],  dw_t = Σ_p x[p]·dh[p − t].

    Both are sums over t of one tile of dh, so that x is read at p alone and nothing is convolved twice.
    Bytes: dh⁺, ĥ and x once (taps from the L1 cache), writes dx. Launches: 1.
    """
    block = tl.program_id(0)
    split = tl.program_id(1)
    feature, offset, count, origin = select_map(maps, strides, block, CHANNELS, STARTS, K)
    target, _offset, _count, _origin = select_map(gradients, gradient_strides, block, CHANNELS, STARTS, G)
    wanted = block * 0 + (NEEDS & 1)
    for k in tl.static_range(1, len(maps)):
        wanted = tl.where(block >= STARTS[k], (NEEDS >> k) & 1, wanted)
    local = offset + tl.arange(0, CHANNELS)
    here = local < count
    c = origin + local
    taps = load_taps(weight, c, here, K)
    _mean, _rstd, scale, _shift = scale_shift(norm, c, here, BY_POINTER)
    c0, c1, _rstd = through_norm(norm, sums, c, here, K.total, hat is not None, BY_POINTER)
    acc = ()
    for _tap in tl.static_range(9):
        acc = acc + (tl.zeros((LANES, CHANNELS), tl.float32),)
    stop = tl.minimum(split * pixels_each + pixels_each, num_pixels)
    for first in range(split * pixels_each, stop, PIXELS):
        p = first + tl.arange(0, PIXELS)
        there = p < stop
        at, i, j = address(feature, p, local, K)
        rows, columns = spread(there, here, K)
        x = tl.zeros((PIXELS, CHANNELS), tl.float32)
        if partials is not None:
            x = upright(tl.load(at, mask=rows & columns, other=0.0), K).to(tl.float32)
        dx = tl.zeros((PIXELS, CHANNELS), tl.float32)
        sums_of_taps = ()
        for u in tl.static_range(-1, 2):
            for v in tl.static_range(-1, 2):
                inside = there & (i - u >= 0) & (i - u < K.height) & (j - v >= 0) & (j - v < K.width)
                inside = inside[:, None] & here[None, :]
                from_q = row_start(p - (u * K.width + v), row_units * ROW_UNIT, K)[:, None] + c[None, :]
                d = scale[None, :] * tl.load(dz + from_q, mask=inside, other=0.0).to(tl.float32)
                if hat is not None:
                    normal = tl.load(hat + from_q, mask=inside, other=0.0).to(tl.float32)
                    d = tl.where(inside, d - c0[None, :] - normal * c1[None, :], 0.0)
                dx += taps[3 * u + v + 4][None, :] * d
                if partials is not None:
                    sums_of_taps = sums_of_taps + (acc[3 * u + v + 4] + fold(x * d, LANES),)
        if partials is not None:
            acc = sums_of_taps
        if wanted != 0:
            out, _i, _j = address(target, p, local, G)
            rows, columns = spread(there, here, G)
            tl.store(out, upright(rounded(dx, K), G), mask=rows & columns)
    if partials is not None:
        programs = tl.num_programs(1)
        for t in tl.static_range(9):
            tl.store(partials + (split * 9 + t) * K.total + c, tl.sum(acc[t], 0), mask=here)
        if is_last(tickets + block, programs):
            for t in tl.static_range(9):
                total = sum_programs(partials + t * K.total, c, here, 9 * K.total, programs, ROWS)
                store_gradient(weight_gradient + c * 9 + t, total, here, K)
