"""What the Triton kernels know of a call when they are compiled: the graph and the options, as one hashable value."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import triton.language as tl

from ..graph import DistillGraph, Edge

__all__ = ["Columns", "Plan", "columns", "plan"]

# Kinds of target.
NO_TARGET, INDEX, PROBABILITIES = 0, 1, 2


class Columns(NamedTuple):
    """Where a row's statistics stand (csrc/distill_graph.h): maxima first, then from these columns on."""

    tempered_sum_at: int  # M + V numbers Σ_c exp((u − max)/T)
    plain_sum_at: int  # M numbers Σ_c exp(z − max)
    ratio_at: int  # E numbers ⟨p_t, ℓ⟩
    width: int


class Plan(NamedTuple):
    """The constexpr argument of the kernels; T, λ, μ, α, ε and all sizes are run-time values and not part of it.

    Attributes:
        ce, mixtures, edges: the graph.
        tempered: for each of the M + V distributions whether an edge has it.
        used: for each distribution whether an edge or a CE term has it.
        loaded: for each logits tensor whether a used distribution needs it.
        num_terms: how many terms the loss has.
        columns: the layout of the statistics.
        target: NO_TARGET, INDEX or PROBABILITIES.
        smooth: whether the label smoothing α is not zero.
        eps: whether the target's ε is not zero.
        by_pointer: bit k is set where scalar k of (T, λ, μ, α, ε) is a pointer to a number rather than a number.
        acc: the accumulation dtype.
        rows, block: the tile.
        one_tile: whether a row fits one tile, so that it is read once.
        vec: a power of two that divides every row stride and the number of classes; both are given in this unit, which
            is how the compiler learns how wide it may load.
    """

    ce: tuple[float, ...]
    mixtures: tuple[tuple[float, ...], ...]
    edges: tuple[Edge, ...]
    tempered: tuple[bool, ...]
    used: tuple[bool, ...]
    loaded: tuple[bool, ...]
    num_terms: int
    columns: Columns
    target: int
    smooth: bool
    eps: bool
    by_pointer: int
    acc: tl.dtype
    rows: int
    block: int
    one_tile: bool
    vec: int


def columns(graph: DistillGraph) -> Columns:
    """The statistics' columns of a graph."""
    m, d = graph.num_logits, graph.num_logits + graph.num_mixtures
    return Columns(d, 2 * d, 2 * d + m, 2 * d + m + len(graph.edges))


@lru_cache(maxsize=1024)
def plan(
    graph: DistillGraph,
    target: int,
    smooth: bool,
    eps: bool,
    by_pointer: int,
    double: bool,
    rows: int,
    block: int,
    one_tile: bool,
    vec: int,
) -> Plan:
    """The plan of a call; one object for equal arguments."""
    m = graph.num_logits
    ends = {d for edge in graph.edges for d in edge[:2]}
    tempered = tuple(d in ends for d in range(m + graph.num_mixtures))
    used = tuple(t or (d < m and graph.ce_weights[d] != 0.0) for d, t in enumerate(tempered))
    loaded = tuple(
        used[i] or any(row[i] != 0.0 and used[m + v] for v, row in enumerate(graph.mixtures)) for i in range(m)
    )
    acc = tl.float64 if double else tl.float32
    return Plan(
        graph.ce_weights, graph.mixtures, graph.edges, tempered, used, loaded, graph.num_terms, columns(graph), target,
        smooth, eps, by_pointer, acc, rows, block, one_tile, vec,
    )  # fmt: skip
