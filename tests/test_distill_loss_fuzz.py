"""distill_loss on random graphs and nasty rows against a scalar evaluation in Python, one row and class at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operator_backends import NAMES
from truth import run

from fflfast import DistillGraph, distill_loss

INF = math.inf
# Triton's interpreter and the emulation of CUDA are slower by orders of magnitude.
SLOW = [name for name in ("triton", "emulated") if name in NAMES]
NATIVE = [name for name in NAMES if name not in SLOW]


def log_softmax(row):
    top = max(row)
    if top == -INF:
        return [math.nan] * len(row)
    total = top + math.log(math.fsum(math.exp(v - top) for v in row))
    return [v - total for v in row]


def scalar_row(logits, y, graph, temperature, kl_weight, ce_weight, smoothing, eps):
    """(loss, gradients) of one row; logits are M lists of C floats, y a class."""
    classes = range(len(logits[0]))
    mixed = [[sum(a * z[c] for a, z in zip(m, logits, strict=True) if a != 0) for c in classes] for m in graph.mixtures]
    u = [*logits, *mixed]
    loss, grads = 0.0, [[0.0 for _ in classes] for _ in logits]
    for i, weight in enumerate(graph.ce_weights):
        if weight == 0:
            continue
        log_p = log_softmax(logits[i])
        target = [(c == y) * (1 - smoothing) + smoothing / len(classes) for c in classes]
        loss += ce_weight * weight * -sum(t * lp for t, lp in zip(target, log_p, strict=True) if t != 0)
        for c in classes:
            grads[i][c] += ce_weight * weight * (math.exp(log_p[c]) - target[c])
    for t, s, weight, detach in graph.edges:
        log_t = log_softmax([v / temperature for v in u[t]])
        log_s = log_softmax([v / temperature for v in u[s]])
        p = [math.exp(v) for v in log_t]
        q = [v + eps for v in p]
        ratio = [(math.log(b) if eps else a) - d if b != 0 else 0.0 for a, b, d in zip(log_t, q, log_s, strict=True)]
        loss += kl_weight * weight * temperature**2 * sum(b * r for b, r in zip(q, ratio, strict=True) if b != 0)
        w = kl_weight * weight * temperature
        for c in classes:
            grads[s][c] += w * ((1 + eps * len(classes)) * math.exp(log_s[c]) - q[c])
        if not detach:
            mean = sum(a * r for a, r in zip(p, ratio, strict=True) if a != 0)
            row = [float(j == t) for j in range(len(logits))] if t < len(logits) else graph.mixtures[t - len(logits)]
            for c in classes:
                for j, a in enumerate(row):
                    if a != 0:
                        share = p[c] * (ratio[c] - mean) if p[c] != 0 else 0.0
                        grads[j][c] += w * a * (math.nan if math.isinf(mean) else share)
    return loss, grads


@st.composite
def graphs(draw):
    m = draw(st.integers(1, 4))
    weight = st.sampled_from([0.0, 0.5, 1.0, 2.0])
    ce = [draw(weight) for _ in range(m)]
    mixtures = [[draw(weight) for _ in range(m)] for _ in range(draw(st.integers(0, 2)))]
    mixtures = [row for row in mixtures if any(row)]
    ends = [(t, s) for t in range(m + len(mixtures)) for s in range(m) if t != s]
    chosen = draw(st.lists(st.sampled_from(ends), max_size=4, unique=True)) if ends else []
    edges = [(t, s, draw(st.sampled_from([-0.5, 0.25, 1.0])), draw(st.booleans())) for t, s in chosen]
    return DistillGraph(m, ce, mixtures, edges)


logit = st.one_of(st.floats(-30, 30), st.sampled_from([0.0, -INF, 1e4, -1e4]))


@st.composite
def cases(draw):
    graph = draw(graphs())
    rows, classes = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    values = [[[draw(logit) for _ in range(classes)] for _ in range(rows)] for _ in range(graph.num_logits)]
    target = [draw(st.sampled_from([-100, *range(classes)])) for _ in range(rows)]
    return graph, values, target


settings_of_a_case = given(
    case=cases(),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    kl_weight=st.sampled_from([0.3, 1.0]),
    smoothing=st.sampled_from([0.0, 0.1]),
    eps=st.sampled_from([0.0, 1e-7, 0.01]),
    reduction=st.sampled_from(["none", "sum"]),
)
# The backend stays the same for all examples of one test.
SUPPRESSED = [HealthCheck.function_scoped_fixture]


@pytest.mark.parametrize("backend", NATIVE, indirect=True)
@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=SUPPRESSED)
@settings_of_a_case
def test_random_graphs_and_rows(backend, **case):
    check(**case)


@pytest.mark.parametrize("backend", SLOW, indirect=True)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=SUPPRESSED)
@settings_of_a_case
def test_random_graphs_and_rows_in_slow_motion(backend, **case):
    check(**case)


def check(case, temperature, kl_weight, smoothing, eps, reduction):
    graph, values, target = case
    logits = [torch.tensor(z, dtype=torch.float64) for z in values]
    # λ and T that float32 holds exactly, as scalars are kept in the accumulation dtype anyway.
    loss, _, grads = run(
        distill_loss, logits, torch.tensor(target), graph, temperature=temperature, kl_weight=kl_weight,
        label_smoothing=smoothing, target_eps=eps, reduction=reduction,
    )  # fmt: skip
    total = 0.0
    for r, y in enumerate(target):
        if y == -100:
            assert reduction == "sum" or loss[r] == 0
            assert all((g[r] == 0).all() for g in grads)
            continue
        expected, gradients = scalar_row([z[r] for z in values], y, graph, temperature, kl_weight, 1.0, smoothing, eps)
        total += expected
        if reduction == "none":
            assert loss[r].item() == pytest.approx(expected, rel=1e-9, abs=1e-9, nan_ok=True)
        for got, wanted in zip(grads, gradients, strict=True):
            # A row without a single class, or a teacher that wants the impossible, has no gradient at all.
            if not any(math.isnan(v) for v in wanted):
                assert got[r].tolist() == pytest.approx(wanted, rel=1e-8, abs=1e-8)
            else:
                assert got[r].isnan().any()
    if reduction == "sum":
        assert loss.item() == pytest.approx(total, rel=1e-9, abs=1e-9, nan_ok=True)
