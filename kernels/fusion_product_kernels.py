"""The kernels of the fusion around the forward matrix product: pointwise for training, inference in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from .fusion_sums import is_last, prepare_affine, scale_shift, store_moments, store_partial
from .fusion_tiles import depthwise, load_taps, product, relu, rounded, row_start, select_map

# Triton's language is a subset of Python without types.
# mypy: ignore-errors


@triton.jit
def grouped(program, num_tiles, num_columns, GROUP: tl.constexpr):
    """(tile of pixels, tile of columns): GROUP tiles of pixels go through all columns before the next, so that what
    runs at one time shares both factors in the L2 cache."""
    per_group = GROUP * num_columns
    first = program // per_group * GROUP
    size = tl.minimum(num_tiles - first, GROUP)
    return first + program % per_group % size, program % per_group // size


@triton.jit
def load_weight(weight, c, here_c, o, here_o, K: tl.constexpr):
    """Wᵀ (channels, outputs) of a contiguous (O, C), rounded to the features' dtype."""
    w = tl.load(weight + o[None, :] * K.total + c[:, None], mask=here_c[:, None] & here_o[None, :], other=0.0)
    if w.dtype != K.dtype:
        w = rounded(w, K)
    return w


@triton.jit
def activated(h, vectors, c, here, K: tl.constexpr):
    """a = relu(scale·h + shift) in the features' dtype, for h (pixels, channels) in float32."""
    scale = tl.load(vectors + c, mask=here, other=0.0)
    shift = tl.load(vectors + K.total + c, mask=here, other=0.0)
    z = tl.fma(h, tl.broadcast_to(scale[None, :], h.shape), tl.broadcast_to(shift[None, :], h.shape))
    return rounded(relu(z), K)


@triton.jit
def multiply_maps(
    maps, strides, depthwise_weight, vectors, weight, p, there, o, here_o, CHANNELS: tl.constexpr,
    STARTS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """y (pixels p, outputs o) in float32, with h formed from the feature maps one block of channels after the other."""
    acc = tl.zeros((p.shape[0], o.shape[0]), tl.float32)
    for block in tl.range(0, STARTS[len(maps)], num_stages=1):
        feature, offset, count, origin = select_map(maps, strides, block, CHANNELS, STARTS, K)
        local = offset + tl.arange(0, CHANNELS)
        here = local < count
        c = origin + local
        taps = load_taps(depthwise_weight, c, here, K)
        h = depthwise(feature, p, there, local, here, taps, K)
        a = activated(h, vectors, c, here, K)
        acc = product(a, load_weight(weight, c, here, o, here_o, K), acc, K)
    return acc


@triton.jit(do_not_specialize=["strides", "num_pixels"])
def pointwise_kernel(
    maps, strides, depthwise_weight,  # N pointers, 4 N strides in units of K.unit, (C, 1, 3, 3)
    kept, centre,  # (P, C) h less its centre (C,), or None and None
    norm1, vectors,  # the norm of h; room for (2, C) float32
    weight,  # (O, C)
    y,  # (P, O)
    partials, moments, tickets,  # (3, tiles of pixels, O), (2, O), or None where no moments are wanted
    num_pixels,
    outputs: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, STARTS: tl.constexpr, GROUP: tl.constexpr,
    STAGES: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, BY_POINTER: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """y = W·relu(scale1·h + shift1) and the moments of y as stored.

    One program a tile of pixels × outputs. h is formed from the feature maps in the prologue, or read where it was
    kept, which pays where there is more than one tile of outputs. Bytes: reads x (or h) once for each tile of outputs,
    from the L2 cache but for the first; writes y. Launches: 1.
    """
    num_tiles = tl.cdiv(num_pixels, PIXELS)
    tile, column = grouped(tl.program_id(0), num_tiles, tl.cdiv(outputs, OUTPUTS), GROUP)
    p = tile * PIXELS + tl.arange(0, PIXELS)
    there = p < num_pixels
    o = column * OUTPUTS + tl.arange(0, OUTPUTS)
    here_o = o < outputs
    prepare_affine(norm1, centre, vectors, K.total, BLOCK, BY_POINTER)
    if kept is None:
        acc = multiply_maps(
            maps, strides, depthwise_weight, vectors, weight, p, there, o, here_o, CHANNELS, STARTS, K
        )  # fmt: skip
    else:
        acc = tl.zeros((PIXELS, OUTPUTS), tl.float32)
        rows = kept + row_start(p, K.total, K)
        for start in tl.range(0, K.total, CHANNELS, num_stages=STAGES):
            c = start + tl.arange(0, CHANNELS)
            here = c < K.total
            h = tl.load(rows[:, None] + c[None, :], mask=there[:, None] & here[None, :], other=0.0).to(tl.float32)
            a = activated(h, vectors, c, here, K)
            acc = product(a, load_weight(weight, c, here, o, here_o, K), acc, K)
    value = rounded(acc, K)
    at = y + row_start(p, outputs, K)[:, None] + o[None, :]
    tl.store(at, value, mask=there[:, None] & here_o[None, :])
    if partials is not None:
        tl.debug_barrier()
        stop = tl.minimum(tile * PIXELS + PIXELS, num_pixels)
        store_tile_sums(y, partials, tile, num_tiles, stop, column, outputs, PIXELS, OUTPUTS, LANES, K)
        if is_last(tickets + column, num_tiles):
            store_moments(partials, moments, o, here_o, outputs, num_tiles, PIXELS, num_pixels, ROWS)


@triton.jit
def store_tile_sums(
    y, partials, tile, num_tiles, stop, column, outputs: tl.constexpr, PIXELS: tl.constexpr, OUTPUTS: tl.constexpr,
    LANES: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The sums of a tile of y that this program has just stored, shifted by the mean of its first LANES rows.

    Read back from the cache: in the layout of the product a row sum is a chain of exchanges between threads, in that of
    a load a thread has its columns to itself.
    """
    o = column * OUTPUTS + tl.arange(0, OUTPUTS)
    here = o < outputs
    k = tl.zeros((OUTPUTS,), tl.float32)
    s1 = tl.zeros((LANES, OUTPUTS), tl.float32)
    s2 = tl.zeros((LANES, OUTPUTS), tl.float32)
    start = tile * PIXELS
    for first in range(start, stop, LANES):
        p = first + tl.arange(0, LANES)
        at = y + row_start(p, outputs, K)[:, None] + o[None, :]
        inside = (p < stop)[:, None] & here[None, :]
        value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if first == start:
            k = tl.sum(value, 0) / tl.minimum(stop - start, LANES).to(tl.float32)
        off = tl.where(inside, value - k[None, :], 0.0)
        s1 += off
        s2 += off * off
    store_partial(partials, tile, num_tiles, o, here, outputs, k, tl.sum(s1, 0), tl.sum(s2, 0))


@triton.jit(do_not_specialize=["strides", "batch", "row_units"])
def inference_kernel(
    maps, strides, depthwise_weight, norm1, weight, norm2,
    room,  # (programs, rows of their images, C) in the features' dtype
    pooled,  # (B, O)
    batch,
    row_units,  # C / ROW_UNIT
    outputs: tl.constexpr,
    IMAGES: tl.constexpr, PIXELS: tl.constexpr, INNER: tl.constexpr, OUTPUTS: tl.constexpr, STARTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROW_UNIT: tl.constexpr, STAGES: tl.constexpr, BY_POINTER: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """pooled = mean over H·W of relu(scale2·(W·a) + shift2), with neither h nor y in memory.

    A program takes IMAGES images at a time, forms their a once into a room of its own, which stays in the L2 cache and
    is used again for the next images, and multiplies it by the weight, one tile of outputs after the other. A tile has
    PIXELS rows of each image, so that pooling is a sum over rows; an image of more pixels is swept and its sum kept.
    With few images the outputs are shared among programs, each of which forms a. Bytes: x and W once. Launches: 1.
    """
    size: tl.constexpr = K.height * K.width
    tiles: tl.constexpr = (size + PIXELS - 1) // PIXELS
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    own = room + tl.cast(program, tl.int64) * (tiles * IMAGES * PIXELS * K.total)
    row = tl.arange(0, IMAGES * PIXELS)
    for group in range(tl.program_id(0), tl.cdiv(batch, IMAGES), tl.num_programs(0)):
        first = group * IMAGES
        form_images(
            maps, strides, depthwise_weight, norm1, own, first, batch, row_units * ROW_UNIT, IMAGES, PIXELS, STARTS,
            ROWS, COLUMNS, BY_POINTER & 1, K,
        )  # fmt: skip
        tl.debug_barrier()
        for column in range(tl.program_id(1), tl.cdiv(outputs, OUTPUTS), tl.num_programs(1)):
            o = column * OUTPUTS + tl.arange(0, OUTPUTS)
            here_o = o < outputs
            total = tl.zeros((IMAGES, OUTPUTS), tl.float32)
            for tile in range(tiles):
                acc = tl.zeros((IMAGES * PIXELS, OUTPUTS), tl.float32)
                for start in tl.range(0, K.total, INNER, num_stages=STAGES):
                    c = start + tl.arange(0, INNER)
                    here = c < K.total
                    at = own + (tile * IMAGES * PIXELS + row)[:, None] * K.total + c[None, :]
                    a = tl.load(at, mask=tl.broadcast_to(here[None, :], at.shape), other=0.0)
                    acc = product(a, load_weight(weight, c, here, o, here_o, K), acc, K)
                _mean, _rstd, scale, shift = scale_shift(norm2, o, here_o, BY_POINTER >> 1)
                z = tl.fma(acc, tl.broadcast_to(scale[None, :], acc.shape), tl.broadcast_to(shift[None, :], acc.shape))
                r = tl.where((tile * PIXELS + row % PIXELS < size)[:, None], relu(z), 0.0)
                total += tl.sum(r.reshape(IMAGES, PIXELS, OUTPUTS), 1)
            b = first + tl.arange(0, IMAGES)
            at = pooled + b.to(tl.int64)[:, None] * outputs + o[None, :]
            tl.store(at, rounded(total / size, K), mask=(b < batch)[:, None] & here_o[None, :])
        tl.debug_barrier()


@triton.jit
def form_images(
    maps, strides, depthwise_weight, norm, room, first, batch, width, IMAGES: tl.constexpr, PIXELS: tl.constexpr,
    STARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BY_POINTER: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """a of images first … first + IMAGES into room (rows, width): PIXELS of each image, then the next PIXELS."""
    size: tl.constexpr = K.height * K.width
    for block in range(STARTS[len(maps)]):
        feature, offset, count, origin = select_map(maps, strides, block, COLUMNS, STARTS, K)
        local = offset + tl.arange(0, COLUMNS)
        here = local < count
        c = origin + local
        taps = load_taps(depthwise_weight, c, here, K)
        _mean, _rstd, scale, shift = scale_shift(norm, c, here, BY_POINTER)
        for start in range(0, (size + PIXELS - 1) // PIXELS * IMAGES * PIXELS, ROWS):
            row = start + tl.arange(0, ROWS)
            image = first + row // PIXELS % IMAGES
            q = row // (IMAGES * PIXELS) * PIXELS + row % PIXELS
            there = (q < size) & (image < batch)
            h = depthwise(feature, image * size + q, there, local, here, taps, K)
            z = tl.fma(h, tl.broadcast_to(scale[None, :], h.shape), tl.broadcast_to(shift[None, :], h.shape))
            at = room + (row * width)[:, None] + c[None, :]
            tl.store(at, rounded(relu(z), K), mask=tl.broadcast_to(here[None, :], z.shape))
