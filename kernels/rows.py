"""The row arithmetic that the forward and the backward kernel share: device functions on (rows, classes) tiles.

Names: `u` a tuple of the M + V distributions' logits as tiles, `m` their row maxima, `s` Σ exp((u − m)/T), `r`
Σ exp(z − m), `k` ⟨p_t, ℓ⟩ of each edge, `y` a tile of target probabilities, `K` the `Plan`. Tuples have one entry for
each distribution, tensor or edge, zeros where the graph has no use for it; what is not used is not computed.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Triton's language is a subset of Python without types and without unpacking into tuples.
# mypy: ignore-errors
# ruff: noqa: SIM102, SIM108


@triton.jit
def number(scalar, BIT: tl.constexpr, K: tl.constexpr):
    """Scalar argument number BIT in the accumulation dtype, wherever it is kept."""
    if (K.by_pointer >> BIT) & 1:
        value = tl.load(scalar)
    else:
        value = tl.full((), scalar, K.acc)
    return value


@triton.jit
def finite(m):
    """The maximum as something to subtract: −inf − (−inf) would be NaN where a tile is masked out altogether."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def load_index(target, rows, here, ignore_index, num_columns):
    """(counted, bad, class index that is safe to read) of rows with class indices."""
    y = tl.load(target + rows, mask=here, other=0)
    counted = here & (y != ignore_index)
    bad = counted & ((y < 0) | (y >= num_columns))
    return counted, bad, tl.where(counted & (bad == 0), y, 0).to(tl.int32)


@triton.jit
def load_tiles(z, z_stride, rows, columns, here, K: tl.constexpr):
    """u_d for every distribution in use, −inf outside the tensor. A mixture skips zeros, as 0·(−inf) is NaN."""
    ROWS: tl.constexpr = K.rows
    BLOCK: tl.constexpr = K.block
    u = ()
    for i in tl.static_range(len(z)):
        if K.loaded[i]:
            at = z[i] + (rows * z_stride[i] * K.vec)[:, None] + columns[None, :]
            u = u + (tl.load(at, mask=here, other=float("-inf")).to(K.acc),)
        else:
            u = u + (tl.zeros((1, 1), K.acc),)
    for v in tl.static_range(len(K.mixtures)):
        mixed = tl.zeros((1, 1), K.acc)
        if K.used[len(z) + v]:
            mixed = tl.zeros((ROWS, BLOCK), K.acc)
            for j in tl.static_range(len(z)):
                if K.mixtures[v][j] != 0.0:
                    mixed += K.mixtures[v][j] * u[j]
        u = u + (mixed,)
    return u


@triton.jit
def load_soft(target, target_stride, rows, columns, here, smoothing, num_columns, K: tl.constexpr):
    """y'_c = y_c(1 − α) + α/C as a tile, 0 outside; for class indices only what the smoothing spreads, α/C."""
    ROWS: tl.constexpr = K.rows
    BLOCK: tl.constexpr = K.block
    y = tl.zeros((1, 1), K.acc)
    if K.target == 2:
        at = target + (rows * target_stride * K.vec)[:, None] + columns[None, :]
        y = tl.load(at, mask=here, other=0.0).to(K.acc)
        if K.smooth:
            y = tl.where(here, y * (1.0 - smoothing) + smoothing / num_columns, 0.0)
    elif K.smooth:
        y = tl.where(here, smoothing / num_columns, tl.zeros((ROWS, BLOCK), K.acc))
    return y


@triton.jit
def no_rows(K: tl.constexpr):
    """The state of `accumulate` before anything was read."""
    ROWS: tl.constexpr = K.rows
    zero = tl.zeros((ROWS,), K.acc)
    m = ()
    s = ()
    r = ()
    b = ()
    a = ()
    for _ in tl.static_range(len(K.used)):
        m = m + (zero + float("-inf"),)
        s = s + (zero,)
    for _ in tl.static_range(len(K.ce)):
        r = r + (zero,)
        b = b + (zero,)
    for _ in tl.static_range(len(K.edges)):
        a = a + (zero,)
    return m, s, r, a, b, zero


@triton.jit
def accumulate(u, y, state, inv_t, FIRST: tl.constexpr, K: tl.constexpr):
    """One tile more in the online statistics of each row.

    With x_d = (u_d − m_d)/T and the maxima so far: s_d = Σ exp(x_d), r_i = Σ exp(z_i − m_i), the mass of the target
    Σ y', b_i = Σ y'(z_i − m_i), and a_e = Σ exp(x_t)(x_t − x_s), from which KL_e = a_e/s_t − log s_t + log s_s. When
    a maximum grows by δ, sums of exponentials shrink by exp(−δ/T), and what is linear in z − m moves by δ times its
    weight. A teacher without mass adds nothing, whatever the student holds.
    """
    ROWS: tl.constexpr = K.rows
    m, s, r, a, b, mass = state
    top = ()
    shift = ()
    decay = ()
    x = ()
    e = ()
    new_s = ()
    zero = tl.zeros((ROWS,), K.acc)
    for d in tl.static_range(len(u)):
        top_d = m[d]
        shift_d = zero
        decay_d = zero
        x_d = u[d]
        e_d = u[d]
        s_d = s[d]
        if K.used[d]:
            if FIRST:
                top_d = tl.max(u[d], 1)
            else:
                top_d = tl.maximum(m[d], tl.max(u[d], 1))
                shift_d = finite(top_d) - finite(m[d])
                decay_d = tl.exp((m[d] - finite(top_d)) * inv_t)
            if K.tempered[d]:
                x_d = (u[d] - finite(top_d)[:, None]) * inv_t
                e_d = tl.exp(x_d)
                s_d = tl.sum(e_d, 1)
                if not FIRST:
                    s_d += s[d] * decay_d
        top = top + (top_d,)
        shift = shift + (shift_d,)
        decay = decay + (decay_d,)
        x = x + (x_d,)
        e = e + (e_d,)
        new_s = new_s + (s_d,)

    new_r = ()
    new_b = ()
    for i in tl.static_range(len(K.ce)):
        r_i = r[i]
        b_i = b[i]
        if K.ce[i] != 0.0:
            below = u[i] - finite(top[i])[:, None]
            r_i = tl.sum(tl.exp(below), 1)
            if not FIRST:
                r_i += r[i] * tl.exp(m[i] - finite(top[i]))
            if K.target == 2 or K.smooth:
                b_i = tl.sum(tl.where(y == 0.0, 0.0, y * below), 1)
                if not FIRST:
                    b_i += b[i] - mass * shift[i]
        new_r = new_r + (r_i,)
        new_b = new_b + (b_i,)

    new_a = ()
    for edge in tl.static_range(len(K.edges)):
        a_e = a[edge]
        if not K.eps:
            e_t = e[K.edges[edge].teacher]
            ratio = x[K.edges[edge].teacher] - x[K.edges[edge].student]
            a_e = tl.sum(tl.where(e_t == 0.0, 0.0, e_t * ratio), 1)
            if not FIRST:
                decay_t = decay[K.edges[edge].teacher]
                moved = (shift[K.edges[edge].teacher] - shift[K.edges[edge].student]) * inv_t
                a_e += tl.where(decay_t == 0.0, 0.0, decay_t * (a[edge] - s[K.edges[edge].teacher] * moved))
        new_a = new_a + (a_e,)

    if K.target == 2 or K.smooth:
        mass += tl.sum(y, 1)
    return top, new_s, new_r, new_a, new_b, mass


@triton.jit
def mark_dead(m, sums):
    """NaN in place of the sums of distributions that are −inf throughout a row: these have no softmax."""
    marked = ()
    for d in tl.static_range(len(sums)):
        marked = marked + (tl.where(m[d] == float("-inf"), float("nan"), sums[d]),)
    return marked


@triton.jit
def accumulate_eps(u, m, s, kl, k, here, inv_t, eps, K: tl.constexpr):
    """One tile more in KL_e = Σ q(log q − log p_s), q = p_t + ε, and in ⟨p_t, ℓ⟩ for the trainable teachers."""
    new_kl = ()
    new_k = ()
    for edge in tl.static_range(len(K.edges)):
        p, ratio = teacher_ratio(u, m, s, inv_t, eps, edge, K)
        new_kl = new_kl + (kl[edge] + tl.sum(tl.where(here, (p + eps) * ratio, 0.0), 1),)
        k_e = k[edge]
        if not K.edges[edge].detach:
            k_e += tl.sum(tl.where(p == 0.0, 0.0, p * ratio), 1)
        new_k = new_k + (k_e,)
    return new_kl, new_k


@triton.jit
def teacher_ratio(u, m, s, inv_t, eps, EDGE: tl.constexpr, K: tl.constexpr):
    """p_t and ℓ = log(p_t + ε) − log p_s of one edge, as tiles."""
    p = probability(u[K.edges[EDGE].teacher], m[K.edges[EDGE].teacher], s[K.edges[EDGE].teacher], inv_t)
    if K.eps:
        log_q = tl.log(p + eps)
    else:
        log_q = log_probability(u[K.edges[EDGE].teacher], m[K.edges[EDGE].teacher], s[K.edges[EDGE].teacher], inv_t)
    return p, log_q - log_probability(
        u[K.edges[EDGE].student], m[K.edges[EDGE].student], s[K.edges[EDGE].student], inv_t
    )


@triton.jit
def probability(u, m, s, inv_t):
    """softmax(u/T) of one distribution, as a tile."""
    return tl.exp((u - finite(m)[:, None]) * inv_t) * (1.0 / s)[:, None]


@triton.jit
def log_probability(u, m, s, inv_t):
    """log softmax(u/T) of one distribution, as a tile."""
    return (u - finite(m)[:, None]) * inv_t - tl.log(s)[:, None]


@triton.jit
def store_gradients(
    grads, u, m, s, r, k, rows, columns, here, counted, y, label, mass, scale, t, inv_t, kl_weight, ce_weight,
    smoothing, eps, num_columns, NEEDS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """∂L/∂z_i of one tile, for every tensor whose bit of NEEDS is set.

    scale·[μ ce_i (Σ_c y'_c softmax(z_i) − y') + λT Σ_{e: s(e)=i} w_e ((1+εC) p_i − (p_t+ε))
           + λT Σ_e w_e a_i p_t(ℓ − k_e)],
    the last sum over trainable teachers of which z_i is a part of a_i. A weight of zero removes its part even where
    that is NaN; `scale` is NaN in rows with a bad target.
    """
    ROWS: tl.constexpr = K.rows
    BLOCK: tl.constexpr = K.block
    p = ()
    for d in tl.static_range(len(u)):
        p_d = u[d]
        if K.tempered[d]:
            p_d = probability(u[d], m[d], s[d], inv_t)
        p = p + (p_d,)
    teach = ()
    for edge in tl.static_range(len(K.edges)):
        v_e = tl.zeros((1, 1), K.acc)
        if not K.edges[edge].detach:
            p_e, ratio = teacher_ratio(u, m, s, inv_t, eps, edge, K)
            k_e = tl.where(tl.abs(k[edge]) == float("inf"), float("nan"), k[edge])
            v_e = p_e * (tl.where(p_e == 0.0, 0.0, ratio) - k_e[:, None])
        teach = teach + (v_e,)

    for i in tl.static_range(len(grads)):
        if (NEEDS >> i) & 1:
            grad = tl.zeros((ROWS, BLOCK), K.acc)
            for edge in tl.static_range(len(K.edges)):
                if K.edges[edge].weight != 0.0:
                    if K.edges[edge].student == i:
                        p_t = p[K.edges[edge].teacher]
                        if K.eps:
                            grad += K.edges[edge].weight * ((1.0 + eps * num_columns) * p[i] - (p_t + eps))
                        else:
                            grad += K.edges[edge].weight * (p[i] - p_t)
                    if not K.edges[edge].detach:
                        if K.edges[edge].teacher == i:
                            grad += K.edges[edge].weight * teach[edge]
                        elif K.edges[edge].teacher >= len(grads):
                            if K.mixtures[K.edges[edge].teacher - len(grads)][i] != 0.0:
                                share = K.mixtures[K.edges[edge].teacher - len(grads)][i] * teach[edge]
                                grad += K.edges[edge].weight * share
            grad = tl.where(kl_weight == 0.0, 0.0, kl_weight * t * grad)
            if K.ce[i] != 0.0:
                plain = tl.exp(u[i] - finite(m[i])[:, None]) * (1.0 / r[i])[:, None]
                if K.target == 2:
                    plain = plain * mass[:, None] - y
                else:
                    right = tl.where(columns[None, :] == label[:, None], 1.0 - smoothing, 0.0)
                    plain = plain - right - y
                grad += tl.where(ce_weight == 0.0, 0.0, ce_weight * K.ce[i] * plain)
            grad = tl.where(counted[:, None], grad * scale[:, None], 0.0)
            at = grads[i] + (rows * num_columns)[:, None] + columns[None, :]
            tl.store(at, grad.to(grads[i].dtype.element_ty), mask=here)


@triton.jit
def store_statistics(statistics, m, s, r, k, rows, here, K: tl.constexpr):
    """Every number of the rows' statistics, zeros for what the graph does not use."""
    ROWS: tl.constexpr = K.rows
    zero = tl.zeros((ROWS,), K.acc)
    at = statistics + 1 + rows * K.columns.width
    for d in tl.static_range(len(K.used)):
        tl.store(at + d, m[d] if K.used[d] else zero, mask=here)
        tl.store(at + K.columns.tempered_sum_at + d, s[d] if K.tempered[d] else zero, mask=here)
    for i in tl.static_range(len(K.ce)):
        tl.store(at + K.columns.plain_sum_at + i, r[i] if K.ce[i] != 0.0 else zero, mask=here)
    for e in tl.static_range(len(K.edges)):
        tl.store(at + K.columns.ratio_at + e, zero if K.edges[e].detach else k[e], mask=here)


@triton.jit
def load_statistics(statistics, rows, here, K: tl.constexpr):
    """(m, s, r, k) as the forward kernel had them."""
    at = statistics + 1 + rows * K.columns.width
    m = ()
    s = ()
    r = ()
    k = ()
    for d in tl.static_range(len(K.used)):
        m = m + (tl.load(at + d, mask=here, other=0.0),)
        s = s + (tl.load(at + K.columns.tempered_sum_at + d, mask=here, other=1.0),)
    for i in tl.static_range(len(K.ce)):
        r = r + (tl.load(at + K.columns.plain_sum_at + i, mask=here, other=1.0),)
    for e in tl.static_range(len(K.edges)):
        k = k + (tl.load(at + K.columns.ratio_at + e, mask=here, other=0.0),)
    return m, s, r, k
