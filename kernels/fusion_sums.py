"""Norms and sums of the fusion kernels: scale and shift of a batch norm, moments, and sums over programs.

**Sums over programs.** Every program leaves its partial sums in memory and takes a ticket; the one with the last ticket
adds the partial sums of all in a fixed order, so that bits repeat whatever order the programs ran in, and returns the
counter to zero. The barrier orders a program's threads before its ticket, the ticket (acquire and release) orders
programs, and the last program reads past the L1 cache.

**Moments.** A program knows its n values by (k, Σ(v − k), Σ(v − k)²) for a k that is close to their mean: the mean of
its first values, or of all of them. From these

    d = (k − k₀) + Σ(v − k)/n,    D = Σ n·d / Σ n,    mean = k₀ + D,
    M2 = Σ [Σ(v − k)² − (Σ(v − k))²/n + n·(d − D)²]

with k₀ the first program's k: Chan's formula without ever rounding a mean to the size of the values. What a shift by
the mean of the first m of n values costs is bounded whatever the values are: those m are at most √(n/m) deviations from
the mean of all, so that M2 loses n/m units in the last place at worst.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Triton's language is a subset of Python without types.
# mypy: ignore-errors
# ruff: noqa: RET505 - what is known when compiling is chosen by if and else, and only then left out


@triton.jit
def count_of(count, BY_POINTER: tl.constexpr):
    """The number of values behind a norm's M2, wherever it is kept."""
    if BY_POINTER:
        return tl.load(count)
    else:
        return count


@triton.jit
def scale_of(norm, c, here, BY_POINTER: tl.constexpr):
    """(mean, rstd, scale) of channels c; the shift is bias − mean·scale."""
    mean, m2, count, weight, _, eps = norm
    centre = tl.load(mean + c, mask=here, other=0.0)
    spread = tl.load(m2 + c, mask=here, other=0.0)
    rstd = 1.0 / tl.sqrt_rn(spread / count_of(count, BY_POINTER) + eps)
    scale = rstd
    if weight is not None:
        scale = rstd * tl.load(weight + c, mask=here, other=0.0)
    return centre, rstd, scale


@triton.jit
def bias_of(norm, c, here, like):
    """The bias of channels c, zeros where the norm has none."""
    bias = norm[4]
    if bias is not None:
        return tl.load(bias + c, mask=here, other=0.0)
    else:
        return tl.zeros(like.shape, tl.float32)


@triton.jit
def scale_shift(norm, c, here, BY_POINTER: tl.constexpr):
    """(mean, rstd, scale, shift) of channels c, the same bits in every kernel: no compiler has a sum to fuse."""
    mean, rstd, scale = scale_of(norm, c, here, BY_POINTER)
    return mean, rstd, scale, tl.fma(-mean, scale, bias_of(norm, c, here, mean))


@triton.jit
def prepare_affine(norm, centre, vectors, C: tl.constexpr, BLOCK: tl.constexpr, BY_POINTER: tl.constexpr):
    """scale and shift of all C channels to vectors (2, C), for a loop that has no time to form them.

    Every program writes the same bits to the same place before it reads them, so that none waits for another. Where
    values come less a `centre` (C,), the shift has it.
    """
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        here = c < C
        mean, _, scale = scale_of(norm, c, here, BY_POINTER)
        less = -mean
        if centre is not None:
            less += tl.load(centre + c, mask=here, other=0.0)
        tl.store(vectors + c, scale, mask=here)
        tl.store(vectors + C + c, tl.fma(less, scale, bias_of(norm, c, here, mean)), mask=here)
    tl.debug_barrier()


@triton.jit
def is_last(ticket, programs):
    """Whether all `programs` have come here before; everything they have stored is then there to be read."""
    tl.debug_barrier()
    last = tl.atomic_add(ticket, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(ticket, 0)
    tl.debug_barrier()
    return last


@triton.jit
def sum_programs(partials, c, here, step, programs, ROWS: tl.constexpr):
    """Σ over programs of `partials` (programs rows, `step` apart) at columns c, in one order."""
    total = tl.zeros((ROWS, c.shape[0]), tl.float32)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)
        at = partials + row[:, None] * step + c[None, :]
        total += tl.load(at, mask=(row < programs)[:, None] & here[None, :], other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit
def store_partial(partials, row, programs, c, here, step, k, s1, s2):
    """One program's (k, Σ(v − k), Σ(v − k)²) into partials (3, programs, step)."""
    at = partials + row * step + c
    tl.store(at, k, mask=here)
    tl.store(at + programs * step, s1, mask=here)
    tl.store(at + 2 * programs * step, s2, mask=here)


@triton.jit
def store_moments(
    partials, moments, c, here, step, programs, rows_each, num_rows, ROWS: tl.constexpr
):  # fmt: skip
    """Mean and M2 into moments (2, step) from all programs' partials (3, programs, step).

    Program r has rows r·rows_each and on, rows_each of them or what is left of num_rows.
    """
    k0 = tl.load(partials + c, mask=here, other=0.0, cache_modifier=".cg")
    drift = tl.zeros((ROWS, c.shape[0]), tl.float32)
    for start in range(0, programs, ROWS):
        d, _, n, inside = load_partial(partials, k0, start, c, here, step, programs, rows_each, num_rows, ROWS)
        drift += tl.where(inside, n * d, 0.0)
    mean = tl.sum(drift, 0) / num_rows
    spread = tl.zeros((ROWS, c.shape[0]), tl.float32)
    for start in range(0, programs, ROWS):
        d, m2, n, inside = load_partial(partials, k0, start, c, here, step, programs, rows_each, num_rows, ROWS)
        off = d - mean[None, :]
        spread += tl.where(inside, m2 + n * off * off, 0.0)
    tl.store(moments + c, k0 + mean, mask=here)
    m2 = tl.sum(spread, 0)
    tl.store(moments + step + c, tl.where(m2 < 0.0, 0.0, m2), mask=here)


@triton.jit
def load_partial(partials, k0, start, c, here, step, programs, rows_each, num_rows, ROWS: tl.constexpr):
    """(d, the program's own M2, n, which of these exist) of ROWS programs from `start` on."""
    row = start + tl.arange(0, ROWS)
    inside = (row < programs)[:, None] & here[None, :]
    left = tl.minimum(num_rows - row * rows_each, rows_each)
    n = tl.where(row < programs, left, 1).to(tl.float32)[:, None]
    at = partials + row[:, None] * step + c[None, :]
    k = tl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
    s1 = tl.load(at + programs * step, mask=inside, other=0.0, cache_modifier=".cg")
    s2 = tl.load(at + 2 * programs * step, mask=inside, other=0.0, cache_modifier=".cg")
    return (k - k0[None, :]) + s1 / n, s2 - s1 * (s1 / n), n, inside
