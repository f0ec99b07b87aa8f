"""The kernels of the Triton backend of `distill_loss`: forward, backward, and the small ones around them."""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import (
    accumulate,
    accumulate_eps,
    finite,
    load_index,
    load_soft,
    load_statistics,
    load_tiles,
    mark_dead,
    no_rows,
    number,
    store_gradients,
    store_statistics,
)

# Triton's language is a subset of Python without types and without unpacking into tuples.
# mypy: ignore-errors

# Values that change from batch to batch: whether one is 1 or a multiple of 16 is not worth a compilation.
_RUN_TIME = ["z_stride", "target_stride", "num_counts", "ignore_index", "num_rows", "column_units"]


@triton.jit(do_not_specialize=_RUN_TIME)
def forward_kernel(
    z,  # M pointers to (R, C)
    z_stride,  # M row strides in units of K.vec elements
    target,  # None, (R,) int64, or (R, C) probabilities in K.acc
    target_stride,  # of probabilities, in units of K.vec elements
    temperature, kl_weight, ce_weight, smoothing, eps,  # each a number, or a pointer where K.by_pointer says so
    ignore_index,
    num_rows,  # R
    column_units,  # C / K.vec
    loss,  # (R,) for reduction none, else None
    partials,  # (num_terms + 2, programs): the loss, each term, counted rows
    statistics,  # 1 + R·width numbers of the base form, else None
    grads,  # M pointers to contiguous (R, C), looked at where NEEDS has a bit
    counts,  # (num_counts,) partial counts of the counted rows for COUNT = 2
    num_counts,
    COUNT: tl.constexpr,  # n of the gradients: 0 no division, 1 R, 2 from `counts`, 3 counted here from `target`
    COUNT_BLOCK: tl.constexpr,
    NEEDS: tl.constexpr,  # gradients wanted, as bits
    K: tl.constexpr,
):  # fmt: skip
    """Loss and terms of each row, summed over the program's rows; statistics (base form) or gradients (fast form).

    A row's sums are collected online, tile by tile; from them follow CE_i = log R_i − (z_iy − m_i) and
    KL_e = a_e/S_t − log S_t + log S_s. The fast form then goes over the row a second time, backwards, so that what
    was read last and is still in the L2 cache is read first; a row that fits one tile stays in registers.

    Bytes a row, in units of C·element size: M (base form), 2M (fast form, one tile), 3M (fast form, more tiles); ε
    adds M where there is more than one tile. Launches: this one and `finish_kernel`; the fast form of a mean over
    more than COUNT_IN_KERNEL rows with class indices has `count_kernel` before.
    """
    ROWS: tl.constexpr = K.rows
    TERMS: tl.constexpr = K.num_terms
    t = number(temperature, 0, K)
    kl_w = number(kl_weight, 1, K)
    ce_w = number(ce_weight, 2, K)
    alpha = number(smoothing, 3, K)
    epsilon = number(eps, 4, K)
    inv_t = 1.0 / t
    num_columns = column_units * K.vec
    scale = tl.full((), 1.0, K.acc)
    if COUNT == 1:
        scale = 1.0 / tl.maximum(num_rows, 1).to(K.acc)
    if COUNT == 2:
        n = tl.sum(tl.load(counts + tl.arange(0, COUNT_BLOCK), mask=tl.arange(0, COUNT_BLOCK) < num_counts, other=0))
        scale = 1.0 / tl.maximum(n, 1).to(K.acc)
    if COUNT == 3:
        n = count_rows(target, 0, num_rows, ignore_index, COUNT_BLOCK)
        scale = 1.0 / tl.maximum(n, 1).to(K.acc)

    totals = ()
    for _ in tl.static_range(TERMS + 2):
        totals = totals + (tl.zeros((ROWS,), K.acc),)
    for block in range(tl.program_id(0), tl.cdiv(num_rows, K.rows), tl.num_programs(0)):
        rows = (block * K.rows + tl.arange(0, K.rows)).to(tl.int64)
        here = rows < num_rows
        counted = here
        bad = here & (rows < 0)
        label = tl.zeros((ROWS,), tl.int32)
        if K.target == 1:
            counted, bad, label = load_index(target, rows, here, ignore_index, num_columns)

        columns = tl.arange(0, K.block)
        inside = here[:, None] & (columns < num_columns)[None, :]
        u = load_tiles(z, z_stride, rows, columns, inside, K)
        y = load_soft(target, target_stride, rows, columns, inside, alpha, num_columns, K)
        state = accumulate(u, y, no_rows(K), inv_t, True, K)
        if not K.one_tile:
            for start in range(K.block, num_columns, K.block):
                columns_k = start + tl.arange(0, K.block)
                inside_k = here[:, None] & (columns_k < num_columns)[None, :]
                u_k = load_tiles(z, z_stride, rows, columns_k, inside_k, K)
                y_k = load_soft(target, target_stride, rows, columns_k, inside_k, alpha, num_columns, K)
                state = accumulate(u_k, y_k, state, inv_t, False, K)
        m, s, r, a, b, mass = state
        s = mark_dead(m, s)
        r = mark_dead(m, r)

        kl = ()
        k = ()
        for edge in tl.static_range(len(K.edges)):
            value = tl.zeros((ROWS,), K.acc)
            if not K.eps:
                s_t = s[K.edges[edge].teacher]
                value = a[edge] / s_t - tl.log(s_t) + tl.log(s[K.edges[edge].student])
            kl = kl + (value,)
            k = k + (value,)
        if K.eps:
            if K.one_tile:
                kl, k = accumulate_eps(u, m, s, kl, k, inside, inv_t, epsilon, K)
            else:
                for start in range(0, num_columns, K.block):
                    columns_k = start + tl.arange(0, K.block)
                    inside_k = here[:, None] & (columns_k < num_columns)[None, :]
                    u_k = load_tiles(z, z_stride, rows, columns_k, inside_k, K)
                    kl, k = accumulate_eps(u_k, m, s, kl, k, inside_k, inv_t, epsilon, K)

        terms = ()
        row_loss = tl.zeros((ROWS,), K.acc)
        for i in tl.static_range(len(K.ce)):
            if K.ce[i] != 0.0:
                log_r = tl.log(r[i])
                ce = mass * log_r - b[i]
                if K.target == 1:
                    at = z[i] + rows * z_stride[i] * K.vec + label
                    right = tl.load(at, mask=counted, other=0.0).to(K.acc)
                    hard = log_r - (right - finite(m[i]))
                    if K.smooth:
                        ce += (1.0 - alpha) * hard
                    else:
                        ce = hard
                terms = terms + (ce,)
                row_loss += tl.where(ce_w == 0.0, 0.0, ce_w * K.ce[i] * ce)
        for edge in tl.static_range(len(K.edges)):
            terms = terms + (t * t * kl[edge],)
            weight = kl_w * K.edges[edge].weight
            row_loss += tl.where(weight == 0.0, 0.0, weight * (t * t * kl[edge]))

        row_loss = tl.where(counted, tl.where(bad, float("nan"), row_loss), 0.0)
        if loss is not None:
            tl.store(loss + rows, row_loss, mask=here)
        sums = (totals[0] + row_loss,)
        for i in tl.static_range(TERMS):
            sums = sums + (totals[1 + i] + tl.where(counted, tl.where(bad, float("nan"), terms[i]), 0.0),)
        totals = sums + (totals[TERMS + 1] + tl.where(counted, 1.0, 0.0).to(K.acc),)

        if statistics is not None:
            store_statistics(statistics, m, s, r, k, rows, here, K)
        if NEEDS:
            scales = tl.where(bad, float("nan"), scale)
            if K.one_tile:
                store_gradients(
                    grads, u, m, s, r, k, rows, columns, inside, counted, y, label, mass, scales, t, inv_t, kl_w, ce_w,
                    alpha, epsilon, num_columns, NEEDS, K,
                )  # fmt: skip
            else:
                num_tiles = tl.cdiv(num_columns, K.block)
                for done in range(num_tiles):
                    columns_k = (num_tiles - 1 - done) * K.block + tl.arange(0, K.block)
                    inside_k = here[:, None] & (columns_k < num_columns)[None, :]
                    u_k = load_tiles(z, z_stride, rows, columns_k, inside_k, K)
                    y_k = load_soft(target, target_stride, rows, columns_k, inside_k, alpha, num_columns, K)
                    store_gradients(
                        grads, u_k, m, s, r, k, rows, columns_k, inside_k, counted, y_k, label, mass, scales, t, inv_t,
                        kl_w, ce_w, alpha, epsilon, num_columns, NEEDS, K,
                    )  # fmt: skip

    for i in tl.static_range(TERMS + 2):
        tl.store(partials + i * tl.num_programs(0) + tl.program_id(0), tl.sum(totals[i], 0))


@triton.jit(do_not_specialize=_RUN_TIME)
def backward_kernel(
    z, z_stride, target, target_stride,  # as for `forward_kernel`
    temperature, kl_weight, ce_weight, smoothing, eps,
    ignore_index, num_rows, column_units,
    grad_loss,  # 0-dim, or (R,) where PER_ROW
    statistics,  # of the base form
    grads,  # M pointers to contiguous (R, C), looked at where NEEDS has a bit
    PER_ROW: tl.constexpr,
    DIVIDE: tl.constexpr,  # by n, which the statistics begin with
    NEEDS: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """Gradients of the base form from the rows' statistics: the second half of the fast form on its own.

    Σ_c y'_c of probabilities is not among the statistics; where a row has more than one tile they are summed first.
    Bytes a row, in units of C·element size: 2M, and the probabilities once or twice. One launch.
    """
    ROWS: tl.constexpr = K.rows
    t = number(temperature, 0, K)
    kl_w = number(kl_weight, 1, K)
    ce_w = number(ce_weight, 2, K)
    alpha = number(smoothing, 3, K)
    epsilon = number(eps, 4, K)
    inv_t = 1.0 / t
    num_columns = column_units * K.vec
    scale = tl.full((), 1.0, K.acc)
    if DIVIDE:
        scale = 1.0 / tl.load(statistics)
    if not PER_ROW:
        scale = tl.load(grad_loss) * scale

    for block in range(tl.program_id(0), tl.cdiv(num_rows, K.rows), tl.num_programs(0)):
        rows = (block * K.rows + tl.arange(0, K.rows)).to(tl.int64)
        here = rows < num_rows
        counted = here
        bad = here & (rows < 0)
        label = tl.zeros((ROWS,), tl.int32)
        if K.target == 1:
            counted, bad, label = load_index(target, rows, here, ignore_index, num_columns)
        scales = tl.where(bad, float("nan"), scale)
        if PER_ROW:
            scales *= tl.load(grad_loss + rows, mask=here, other=0.0)
        m, s, r, k = load_statistics(statistics, rows, here, K)
        num_tiles = tl.cdiv(num_columns, K.block)
        mass = tl.zeros((ROWS,), K.acc)
        if K.target == 2:
            for done in range(num_tiles):
                columns = done * K.block + tl.arange(0, K.block)
                inside = here[:, None] & (columns < num_columns)[None, :]
                mass += tl.sum(load_soft(target, target_stride, rows, columns, inside, alpha, num_columns, K), 1)
        for done in range(num_tiles):
            columns = (num_tiles - 1 - done) * K.block + tl.arange(0, K.block)
            inside = here[:, None] & (columns < num_columns)[None, :]
            u = load_tiles(z, z_stride, rows, columns, inside, K)
            y = load_soft(target, target_stride, rows, columns, inside, alpha, num_columns, K)
            store_gradients(
                grads, u, m, s, r, k, rows, columns, inside, counted, y, label, mass, scales, t, inv_t, kl_w, ce_w,
                alpha, epsilon, num_columns, NEEDS, K,
            )  # fmt: skip


@triton.jit
def count_rows(target, start, stop, ignore_index, BLOCK: tl.constexpr):
    """How many of the rows [start, stop) are counted."""
    found = tl.zeros((BLOCK,), tl.int32)
    for first in range(start, stop, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        here = rows < stop
        found += (here & (tl.load(target + rows, mask=here, other=0) != ignore_index)).to(tl.int32)
    return tl.sum(found, 0)


@triton.jit(do_not_specialize=["num_rows", "rows_each", "ignore_index"])
def count_kernel(target, counts, num_rows, rows_each, ignore_index, BLOCK: tl.constexpr):
    """Counted rows among the `rows_each` of each program: the fast form of a mean must know n before it writes."""
    start = tl.program_id(0) * rows_each
    stop = tl.minimum(start + rows_each, num_rows)
    tl.store(counts + tl.program_id(0), count_rows(target, start, stop, ignore_index, BLOCK))


@triton.jit(do_not_specialize=["num_partials"])
def finish_kernel(
    partials,  # (NUM_TERMS + 2, num_partials)
    loss,  # 0-dim, or None for reduction none
    terms,  # (NUM_TERMS,)
    statistics,  # begins with n; or None
    num_partials,
    MEAN_LOSS: tl.constexpr,
    MEAN_TERMS: tl.constexpr,
    NUM_TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum over programs in a fixed order: program 0 has the loss, program i term i − 1.

    A second launch rather than a last program that finishes: that one needs a counter which is zero before every
    launch, so either a launch that clears it or a buffer that two streams must never share.
    """
    i = tl.program_id(0)
    n = tl.maximum(sum_column(partials + (NUM_TERMS + 1) * num_partials, num_partials, BLOCK), 1.0)
    total = sum_column(partials + i * num_partials, num_partials, BLOCK)
    if i == 0:
        if statistics is not None:
            tl.store(statistics, n)
        if loss is not None:
            if MEAN_LOSS:
                total = total / n
            tl.store(loss, total)
    else:
        if MEAN_TERMS:
            total = total / n
        tl.store(terms + i - 1, total)


@triton.jit
def sum_column(values, count, BLOCK: tl.constexpr):
    """Σ of `count` values, the same order every time."""
    total = tl.zeros((BLOCK,), values.dtype.element_ty)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(values + at, mask=at < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["units"])
def scale_kernel(
    grad_loss,  # 0-dim
    grads,  # up to 16 pointers to contiguous tensors of one size
    units,  # the size of each / VEC
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """g ← g·grad_loss for all gradients of the fast form; reads one number and leaves when that is 1. One launch."""
    factor = tl.load(grad_loss)
    if factor != 1.0:
        size = tl.cast(units, tl.int64) * VEC
        for block in range(tl.program_id(0), tl.cdiv(size, BLOCK), tl.num_programs(0)):
            at = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            here = at < size
            for i in tl.static_range(len(grads)):
                old = tl.load(grads[i] + at, mask=here)
                # Exactly 0 stays 0 whatever the factor: an ignored row gets none of an infinite grad_output.
                wide = old.to(factor.dtype)
                new = tl.where(wide == 0.0, wide, wide * factor)
                tl.store(grads[i] + at, new.to(old.dtype), mask=here)
