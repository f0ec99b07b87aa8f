"""What the fusion kernels share: device functions on tiles of pixels × channels.

A tile has pixels as rows, flattened over (b, h, w), and channels of one feature map as columns. Names: `p` flat pixels
(P in all), `c` channels of the virtual concatenation, `K` the `Plan`, BLOCK sizes powers of two.

The depthwise convolution takes its nine taps as nine loads at shifted addresses, of which one comes from memory and
eight from the L1 cache: Triton cannot shift registers between pixels. Wherever h and z are formed again, these very
functions form them, nine fma over the taps in row order and one for the norm, so that masks agree bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Triton's language is a subset of Python without types.
# mypy: ignore-errors
# ruff: noqa: RET505, SIM108 - what is known when compiling is chosen by if and else, and only then left out


@triton.jit
def rounded(values, K: tl.constexpr):
    """float32 → the features' dtype, to nearest even, as `.to` does wherever it is not interpreted."""
    result = values
    if K.interpreted:
        bits = values.to(tl.int32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        result = tl.where(values == values, bits.to(tl.float32, bitcast=True), values)
    return result.to(K.dtype)


@triton.jit
def product(a, b, acc, K: tl.constexpr):
    """acc + a·b in float32, for a and b in the features' dtype."""
    if K.interpreted:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=K.precision)


@triton.jit
def relu(z):
    """max(z, 0), NaN where z is, as torch's."""
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_start(p, width, K: tl.constexpr):
    """Offsets of rows p of a row-major (P, width)."""
    if K.wide:
        return p.to(tl.int64) * width
    else:
        return p * width


@triton.jit
def select_map(maps, strides, block, BLOCK: tl.constexpr, STARTS: tl.constexpr, K: tl.constexpr):
    """(feature map: pointer and strides b c h w; the block's first channel in it; its channels; its first channel c).

    The map is selected by scalar choices, not by a branch, so that N maps do not make N copies of a kernel.
    """
    data = maps[0]
    sb = strides[0]
    sc = strides[1]
    sh = strides[2]
    sw = strides[3]
    start = block * 0
    count = start + K.channels[0]
    first = start
    for k in tl.static_range(1, len(maps)):
        here = block >= STARTS[k]
        data = tl.where(here, maps[k], data)
        sb = tl.where(here, strides[4 * k], sb)
        sc = tl.where(here, strides[4 * k + 1], sc)
        sh = tl.where(here, strides[4 * k + 2], sh)
        sw = tl.where(here, strides[4 * k + 3], sw)
        start = tl.where(here, STARTS[k], start)
        count = tl.where(here, K.channels[k], count)
        first = tl.where(here, K.first[k], first)
    return (data, sb, sc, sh, sw), (block - start) * BLOCK, count, first


@triton.jit
def load_taps(weight, c, here, K: tl.constexpr):
    """The nine taps of a contiguous (C, 1, 3, 3) for channels c, in row order, rounded to the features' dtype."""
    taps = ()
    for t in tl.static_range(9):
        w = tl.load(weight + c * 9 + t, mask=here, other=0.0)
        taps = taps + (rounded(w.to(tl.float32), K).to(tl.float32),)
    return taps


@triton.jit
def spread(rows, columns, K: tl.constexpr):
    """Rows and columns as the two dimensions of a tile in memory order: pixels last where width is inner."""
    if K.inner == 2:
        return rows[None, :], columns[:, None]
    else:
        return rows[:, None], columns[None, :]


@triton.jit
def upright(tile, K: tl.constexpr):
    """A tile in memory order as pixels × channels, and back."""
    if K.inner == 2:
        return tl.trans(tile)
    else:
        return tile


@triton.jit
def address(feature, p, local, K: tl.constexpr):
    """(pointers to pixels p × channels in memory order, image rows i, image columns j)."""
    data, sb, sc, sh, sw = feature
    q = p % (K.height * K.width)
    b = p // (K.height * K.width)
    i = q // K.width
    j = q % K.width
    if K.wide:
        b = b.to(tl.int64)
    channels = local
    pixels = b * sb
    if K.wide:
        pixels += i.to(tl.int64) * sh
    else:
        pixels += i * sh
    if K.inner == 2:
        pixels += j
    elif K.wide:
        pixels += j.to(tl.int64) * sw
    else:
        pixels += j * sw
    if K.inner != 1:
        if K.wide:
            channels = local.to(tl.int64) * sc
        else:
            channels = local * sc
    rows, columns = spread(pixels * K.unit, channels, K)
    return data + rows + columns, i, j


@triton.jit
def depthwise(feature, p, there, local, here, taps, K: tl.constexpr):
    """h of pixels p (where `there`) × channels (where `here`), float32; zeros beyond an image and where masked."""
    _, _, _, sh, sw = feature
    at, i, j = address(feature, p, local, K)
    h = tl.zeros(at.shape, tl.float32)
    for u in tl.static_range(-1, 2):
        for v in tl.static_range(-1, 2):
            inside = there & (i + u >= 0) & (i + u < K.height) & (j + v >= 0) & (j + v < K.width)
            rows, columns = spread(inside, here, K)
            if K.inner == 2:
                step = u * sh + v
            else:
                step = u * sh + v * sw
            x = tl.load(at + step * K.unit, mask=rows & columns, other=0.0).to(tl.float32)
            _, w = spread(inside, taps[3 * u + v + 4], K)
            h = tl.fma(x, tl.broadcast_to(w, x.shape), h)
    return upright(h, K)
