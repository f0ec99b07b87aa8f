"""The kernel of the augmentation: shift, mirror and look up each pixel on its way from uint8 to the network's input.

For row r and column q of the result, with (top, left) and flipped drawn from the hash of (seed, epoch, index, view):

    q' = W − 1 − q if flipped, else q
    out[b, c, r, q] = table[images[b, c, reflect(r + top − pad, H), reflect(q' + left − pad, W)], c]
    reflect(x, n) = (n − 1) − |(n − 1) − |x||

which is what padding by reflection, cropping and mirroring give, without a padded image in memory. The hash is the
reference's, in uint32, where products wrap as the reference's masks have it; a draw below n is the high half of a
64-bit product. Every program draws for its image anew: some hundred integer operations on one number.

Bytes of an image of H × W: C·H·W read and 3·H·W·e written, e = size of an element of the table, which itself stays in
the L1 cache (a channel's 256 values are adjacent: 256·e bytes, where (256, 3) in rows would make every lane of a warp
read another line). Launches: 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Triton's language is a subset of Python without types.
# mypy: ignore-errors
# ruff: noqa: SIM108 - what is known when compiling is chosen by if and else, and only then left out


@triton.jit
def scramble(x):
    """The bijection [16 21f0aaad 15 735a2d97 15] of ops/counters.py on uint32."""
    x = (x ^ (x >> 16)) * tl.full((), 0x21F0AAAD, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), 0x735A2D97, tl.uint32)
    return x ^ (x >> 15)


@triton.jit
def absorb(state, word):
    """The hash with one 64-bit word more."""
    step = tl.full((), 0x9E3779B9, tl.uint32)
    state = scramble((state ^ word.to(tl.uint32)) + step)
    return scramble((state ^ (word >> 32).to(tl.uint32)) + step)


@triton.jit
def below(key, STREAM: tl.constexpr, BOUND: tl.constexpr):
    """A draw from 0 … BOUND − 1, int32."""
    state = absorb(tl.full((), 0, tl.uint32), key.to(tl.uint64))
    draw = absorb(state, tl.full((), STREAM, tl.uint64))
    return ((draw.to(tl.uint64) * BOUND) >> 32).to(tl.int32)


@triton.jit
def load_word(word, BY_POINTER: tl.constexpr):
    """A counter, int64: a number, or what a pointer points to."""
    if BY_POINTER:
        value = tl.load(word).to(tl.int64)
    else:
        value = word * tl.full((), 1, tl.int64)
    return value


@triton.jit
def reflect(place, LENGTH: tl.constexpr):
    return (LENGTH - 1) - tl.abs((LENGTH - 1) - tl.abs(place))


@triton.jit(do_not_specialize=["image_step", "index_step", "seed", "epoch", "view"])
def augment_kernel(
    images,  # (B, C, H, W) uint8
    image_step,  # strides of images: from image to image,
    steps,  # and over channel (0 where there is one), row and column
    index,  # (B,) int64, or None: nothing is drawn
    index_step,
    seed,
    epoch,
    view,  # numbers, or pointers where BY_POINTER has its bit
    table,  # (256, 3)
    table_steps,
    out,  # (B, 3, H, W), or (B, H, W, 3) where CHANNELS_LAST
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr, FLIP: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BY_POINTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK adjacent numbers of one image. Bytes and launches: see above."""
    PIXELS: tl.constexpr = HEIGHT * WIDTH
    PROGRAMS: tl.constexpr = (3 * PIXELS + BLOCK - 1) // BLOCK  # of an image
    image = (tl.program_id(0) // PROGRAMS).to(tl.int64)
    place = tl.program_id(0) % PROGRAMS * BLOCK + tl.arange(0, BLOCK)
    there = place < 3 * PIXELS
    if CHANNELS_LAST:
        channel = place % 3
        pixel = place // 3
    else:
        channel = place // PIXELS
        pixel = place % PIXELS
    row = pixel // WIDTH
    column = pixel % WIDTH
    if index is not None:
        key = absorb(tl.full((), 0, tl.uint32), load_word(seed, BY_POINTER & 1))
        key = absorb(key, load_word(epoch, (BY_POINTER >> 1) & 1))
        key = absorb(key, tl.load(index + image * index_step))
        key = absorb(key, load_word(view, (BY_POINTER >> 2) & 1))
        if FLIP:
            column = tl.where(below(key, 2, 2) == 1, WIDTH - 1 - column, column)
        if PAD > 0:
            row = reflect(row + (below(key, 0, 2 * PAD + 1) - PAD), HEIGHT)
            column = reflect(column + (below(key, 1, 2 * PAD + 1) - PAD), WIDTH)
    source = images + image * image_step + (channel * steps[0] + row * steps[1] + column * steps[2])
    value = tl.load(source, mask=there, other=0).to(tl.int32)
    looked_up = tl.load(table + (value * table_steps[0] + channel * table_steps[1]), mask=there)
    tl.store(out + image * (3 * PIXELS) + place, looked_up, mask=there)
