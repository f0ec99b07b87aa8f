"""Who teaches whom: the data structure from which every loss of online distillation is built.

Given M logits tensors z_0 … z_{M-1} and V mixtures u_{M+v} = Σ_j A[v][j]·z_j (u_i = z_i for i < M),

    L = μ · Σ_i ce_i · CE(z_i, y)  +  λ · Σ_e w_e · T² · KL( softmax(u_t(e)/T) ‖ softmax(z_s(e)/T) )

A `DistillGraph` holds ce, A and the edges (t, s, w, detach). The temperature T, the weights λ (kl_weight)
and μ (ce_weight) are run-time values and not part of it.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple, TypeVar

__all__ = ["DistillGraph", "Edge"]

T = TypeVar("T")


class Edge(NamedTuple):
    """One teaching relation: distribution `teacher` (any of M+V) teaches logits tensor `student` (any of M)."""

    teacher: int
    student: int
    weight: float = 1.0
    detach: bool = True


@dataclass(frozen=True, init=False, repr=False)
class DistillGraph:
    """Who teaches whom among M logits tensors and V mixtures of them; frozen, hashable, checked when built.

    Args:
        num_logits: M, the number of logits tensors.
        ce_weights: M finite numbers; a weight of zero means that this tensor has no cross-entropy term.
        mixtures: V rows of M finite, non-negative coefficients, at least one of them positive. Mixture v is
            distribution M+v; as a virtual teacher it has the logits Σ_j mixtures[v][j]·z_j.
        edges: ``(teacher, student, weight[, detach=True])`` each; teacher in [0, M+V), student in [0, M).
            ``detach=False`` lets the gradient of the KL flow into the teacher too.
        names: M+V names of the distributions, or M names (mixtures are then called mix0, mix1, …), or None
            (sub0, sub1, …). By convention sub-networks come first, then the fused classifier or leader, then
            tensors that only teach.

    Attributes:
        names: the M+V names, filled in where none were given.
        ce_terms: the logits tensors that have a cross-entropy term, in the order of the terms.
        term_names: ``ce/<logits>`` for each non-zero CE weight, then ``kl/<teacher>→<student>`` for each edge.
        key: the graph as one line of text, which `from_key` reads back; operators carry it in their schema.

    Raises:
        ValueError: a count, index, weight or name that does not fit.
        TypeError: an entry of the wrong type.
    """

    num_logits: int
    ce_weights: tuple[float, ...]
    mixtures: tuple[tuple[float, ...], ...]
    edges: tuple[Edge, ...]
    names: tuple[str, ...]
    # Derived when built rather than on demand: torch.compile does not trace functools.cached_property.
    ce_terms: tuple[int, ...] = field(init=False, compare=False)
    term_names: tuple[str, ...] = field(init=False, compare=False)
    key: str = field(init=False, compare=False)

    def __init__(
        self,
        num_logits: int,
        ce_weights: Sequence[float],
        mixtures: Sequence[Sequence[float]] = (),
        edges: Sequence[Sequence[float]] = (),
        names: Sequence[str] | None = None,
    ) -> None:
        m = _integer(num_logits, "num_logits")
        if m < 1:
            raise ValueError(f"DistillGraph: num_logits must be at least 1, got {m}")
        ce = _numbers(ce_weights, m, "ce_weights")
        rows = tuple(_mixture(row, m, v) for v, row in enumerate(_sequence(mixtures, "mixtures")))
        arrows = tuple(_edge(e, m, m + len(rows), k) for k, e in enumerate(_sequence(edges, "edges")))
        full_names = _names(names, m, len(rows))
        seen: set[tuple[int, int]] = set()
        for edge in arrows:
            if (edge.teacher, edge.student) in seen:
                raise ValueError(
                    f"DistillGraph: the edge {full_names[edge.teacher]}→{full_names[edge.student]} stands twice; "
                    "give it once, with one weight"
                )
            seen.add((edge.teacher, edge.student))
        ce_terms = tuple(i for i, w in enumerate(ce) if w != 0.0)
        terms = [f"ce/{full_names[i]}" for i in ce_terms]
        terms += [f"kl/{full_names[e.teacher]}→{full_names[e.student]}" for e in arrows]
        # A frozen dataclass is filled through object.__setattr__.
        object.__setattr__(self, "num_logits", m)
        object.__setattr__(self, "ce_weights", ce)
        object.__setattr__(self, "mixtures", rows)
        object.__setattr__(self, "edges", arrows)
        object.__setattr__(self, "names", full_names)
        object.__setattr__(self, "ce_terms", ce_terms)
        object.__setattr__(self, "term_names", tuple(terms))
        object.__setattr__(self, "key", str((m, ce, rows, tuple(tuple(e) for e in arrows), full_names)))

    def __hash__(self) -> int:
        return hash(self.key)  # which a string computes once

    @property
    def num_mixtures(self) -> int:
        """V, the number of mixtures."""
        return len(self.mixtures)

    @property
    def logit_names(self) -> tuple[str, ...]:
        """The names of the M logits tensors."""
        return self.names[: self.num_logits]

    @property
    def num_terms(self) -> int:
        """How many terms the loss has."""
        return len(self.term_names)

    @property
    def needs_target(self) -> bool:
        """Whether any logits tensor has a cross-entropy term."""
        return len(self.ce_terms) > 0

    @staticmethod
    @lru_cache(maxsize=1024)
    def from_key(key: str) -> DistillGraph:
        """The graph whose `key` this is; one object a key."""
        return DistillGraph(*ast.literal_eval(key))

    def __str__(self) -> str:
        n = self.names
        rows = [("distribution", "kind", "CE weight", "taught by (weight)")]
        for i in range(self.num_logits):
            teachers = ", ".join(
                f"{n[e.teacher]} ({e.weight:g}{'' if e.detach else ', with gradient'})"
                for e in self.edges
                if e.student == i
            )
            rows.append((n[i], "logits", f"{self.ce_weights[i]:g}", teachers or "–"))
        for v, row in enumerate(self.mixtures):
            formula = " + ".join(f"{a:.4g}·{n[j]}" for j, a in enumerate(row) if a != 0.0)
            rows.append((n[self.num_logits + v], "mixture", "–", f"= {formula}"))
        widths = [max(len(r[c]) for r in rows) for c in range(4)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)).rstrip() for r in rows]
        lines.insert(1, "  ".join("─" * w for w in widths))
        return "\n".join(lines)

    def __repr__(self) -> str:
        edges = tuple(tuple(e) if not e.detach else tuple(e)[:3] for e in self.edges)
        return (
            f"DistillGraph(num_logits={self.num_logits}, ce_weights={self.ce_weights}, "
            f"mixtures={self.mixtures}, edges={edges}, names={self.names})"
        )

    # ---- one builder a method; λ, μ and T of the papers are run-time values (formulas: the docstrings)

    @classmethod
    def ffl(cls, num_sub_networks: int) -> DistillGraph:
        """Feature Fusion Learning (arXiv 1904.09058): fused → each sub-network, mean of the N → fused, CE on all."""
        n = _at_least(num_sub_networks, 2, "ffl")
        edges = [Edge(n, i) for i in range(n)] + [Edge(n + 1, n)]
        names = (*_subs(n), "fused", "ensemble")
        return cls(n + 1, (1.0,) * (n + 1), (_mean(range(n), n + 1),), tuple(edges), names)

    @classmethod
    def dml(cls, num_sub_networks: int) -> DistillGraph:
        """Deep Mutual Learning (CVPR 2018): each teaches each other one with weight 1/(N−1), CE on all."""
        n = _at_least(num_sub_networks, 2, "dml")
        edges = [Edge(j, i, 1.0 / (n - 1)) for i in range(n) for j in range(n) if j != i]
        return cls(n, (1.0,) * n, (), tuple(edges), _subs(n))

    @classmethod
    def cl(cls, num_sub_networks: int) -> DistillGraph:
        """Collaborative Learning (NeurIPS 2018): mean of the others → each; the paper has μ = λ = 0.5."""
        n = _at_least(num_sub_networks, 2, "cl")
        mixtures = tuple(_mean([j for j in range(n) if j != i], n) for i in range(n))
        edges = tuple(Edge(n + i, i) for i in range(n))
        return cls(n, (1.0,) * n, mixtures, edges, (*_subs(n), *(f"others{i}" for i in range(n))))

    @classmethod
    def one(cls, num_sub_networks: int) -> DistillGraph:
        """ONE (NeurIPS 2018): the gated ensemble is a given tensor with its own CE and teaches each, detached."""
        n = _at_least(num_sub_networks, 2, "one")
        edges = tuple(Edge(n, i) for i in range(n))
        return cls(n + 1, (1.0,) * (n + 1), (), edges, (*_subs(n), "ensemble"))

    @classmethod
    def pcl(cls, num_sub_networks: int) -> DistillGraph:
        """PCL (AAAI 2021): M = 2N+1: N peers, the ensemble head (CE), N EMA peers that teach with weight 1/(N−1)."""
        n = _at_least(num_sub_networks, 2, "pcl")
        edges = [Edge(n, i) for i in range(n)]
        edges += [Edge(n + 1 + k, i, 1.0 / (n - 1)) for i in range(n) for k in range(n) if k != i]
        names = (*_subs(n), "ensemble", *(f"ema{k}" for k in range(n)))
        return cls(2 * n + 1, (1.0,) * (n + 1) + (0.0,) * n, (), tuple(edges), names)

    @classmethod
    def okddip(cls, num_peers: int) -> DistillGraph:
        """OKDDip (AAAI 2020): M = 2N+1: N peers, the leader, N given attention mixtures that teach with gradient.

        L = Σ CE(z_i) + CE(leader) + λ [Σ KL(x_i → z_i) + KL(mean of the peers → leader)].
        """
        n = _at_least(num_peers, 2, "okddip")
        edges = [Edge(n + 1 + i, i, detach=False) for i in range(n)] + [Edge(2 * n + 1, n)]
        names = (*_subs(n), "leader", *(f"attention{i}" for i in range(n)), "ensemble")
        m = 2 * n + 1
        return cls(m, (1.0,) * (n + 1) + (0.0,) * n, (_mean(range(n), m),), tuple(edges), names)

    @classmethod
    def mcl_okd(cls, num_sub_networks: int) -> DistillGraph:
        """MCL-OKD (arXiv 2006.04093), the logit part: mean of all → the last sub-network, CE on all."""
        n = _at_least(num_sub_networks, 2, "mcl_okd")
        names = (*_subs(n), "ensemble")
        return cls(n, (1.0,) * n, (_mean(range(n), n),), (Edge(n, n - 1),), names)

    @classmethod
    def oem(cls, num_sub_networks: int) -> DistillGraph:
        """OEM (ECCV 2020), the logit part: mean of all → each; the paper has μ = 0.7, λ = 0.15, T = 2."""
        n = _at_least(num_sub_networks, 2, "oem")
        edges = tuple(Edge(n, i) for i in range(n))
        return cls(n, (1.0,) * n, (_mean(range(n), n),), edges, (*_subs(n), "ensemble"))

    @classmethod
    def afd(cls, num_sub_networks: int) -> DistillGraph:
        """AFD (ICML 2020), the logit part: two teach each other; more teach in a ring 0 → 1 → … → N−1 → 0."""
        n = _at_least(num_sub_networks, 2, "afd")
        edges = tuple(Edge((i - 1) % n, i) for i in range(n))
        return cls(n, (1.0,) * n, (), edges, _subs(n))

    @classmethod
    def kdcl(cls, num_sub_networks: int) -> DistillGraph:
        """KDCL (CVPR 2020): a given teacher tensor (naive, linear or minimum logit) → each, detached."""
        n = _at_least(num_sub_networks, 2, "kdcl")
        edges = tuple(Edge(n, i) for i in range(n))
        return cls(n + 1, (1.0,) * n + (0.0,), (), edges, (*_subs(n), "teacher"))

    @classmethod
    def okdhp(cls, num_heads: int) -> DistillGraph:
        """OKDHP (ICCV 2021), the pixelwise part: rows of H·W, the given ensemble teaches each with gradient."""
        n = _at_least(num_heads, 2, "okdhp")
        edges = tuple(Edge(n, i, detach=False) for i in range(n))
        return cls(n + 1, (0.0,) * (n + 1), (), edges, (*_subs(n), "ensemble"))

    @classmethod
    def kd(cls) -> DistillGraph:
        """Knowledge distillation (Hinton et al. 2015): logits (student, teacher), teacher frozen; μ = 1−α, λ = α."""
        return cls(2, (1.0, 0.0), (), (Edge(1, 0),), ("student", "teacher"))

    @classmethod
    def single(cls) -> DistillGraph:
        """One network with cross-entropy alone: what every method is compared with."""
        return cls(1, (1.0,), (), (), _subs(1))


def _subs(n: int) -> tuple[str, ...]:
    return tuple(f"sub{i}" for i in range(n))


def _mean(of: Iterable[int], length: int) -> tuple[float, ...]:
    """Coefficients of the mean over the tensors `of`, as one row of a mixture matrix."""
    members = list(of)
    return tuple(1.0 / len(members) if j in members else 0.0 for j in range(length))


def _at_least(value: int, least: int, builder: str) -> int:
    n = _integer(value, f"DistillGraph.{builder}: the number of sub-networks")
    if n < least:
        raise ValueError(f"DistillGraph.{builder}: needs at least {least} sub-networks, got {n}")
    return n


def _integer(value: object, what: str) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"DistillGraph: {what} must be an int, got {value!r}")
    return value.__index__()


def _number(value: object, what: str) -> float:
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise TypeError(f"DistillGraph: {what} must be a number, got {value!r}")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"DistillGraph: {what} must be finite, got {number}")
    return number


def _numbers(values: Sequence[float], length: int, what: str) -> tuple[float, ...]:
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        raise TypeError(f"DistillGraph: {what} must be a sequence of {length} numbers, got {values!r}")
    numbers = tuple(_number(v, f"{what}[{i}]") for i, v in enumerate(values))
    if len(numbers) != length:
        raise ValueError(f"DistillGraph: {what} must have {length} entries, one a logits tensor, got {len(numbers)}")
    return numbers


def _sequence(value: Iterable[T], what: str) -> Iterable[T]:
    if not isinstance(value, Iterable):
        raise TypeError(f"DistillGraph: {what} must be a sequence, got {value!r}")
    return value


def _mixture(row: Sequence[float], m: int, v: int) -> tuple[float, ...]:
    numbers = _numbers(row, m, f"mixtures[{v}]")
    if min(numbers) < 0.0:
        raise ValueError(f"DistillGraph: mixtures[{v}] must have no negative coefficient, got {numbers}")
    if max(numbers) == 0.0:
        raise ValueError(f"DistillGraph: mixtures[{v}] is all zero; give at least one positive coefficient")
    return numbers


def _edge(edge: Sequence[object], m: int, count: int, k: int) -> Edge:
    if isinstance(edge, (str, Mapping)) or not isinstance(edge, Sequence) or len(edge) not in (3, 4):
        raise ValueError(f"DistillGraph: edges[{k}] must be (teacher, student, weight[, detach]), got {edge!r}")
    teacher, student = _integer(edge[0], f"edges[{k}].teacher"), _integer(edge[1], f"edges[{k}].student")
    if not 0 <= teacher < count:
        raise ValueError(
            f"DistillGraph: edges[{k}] has teacher {teacher}; it must be in [0, {count}): "
            f"{m} logits tensors, then {count - m} mixtures"
        )
    if not 0 <= student < m:
        raise ValueError(f"DistillGraph: edges[{k}] has student {student}; it must be one of the {m} logits tensors")
    if teacher == student:
        raise ValueError(f"DistillGraph: edges[{k}] lets distribution {teacher} teach itself")
    detach = edge[3] if len(edge) == 4 else True
    if not isinstance(detach, bool):
        raise TypeError(f"DistillGraph: edges[{k}].detach must be True or False, got {detach!r}")
    return Edge(teacher, student, _number(edge[2], f"edges[{k}].weight"), detach)


def _names(names: Sequence[str] | None, m: int, v: int) -> tuple[str, ...]:
    if names is None:
        names = _subs(m)
    if isinstance(names, str) or not all(isinstance(n, str) and n for n in _sequence(names, "names")):
        raise TypeError(f"DistillGraph: names must be a sequence of non-empty strings, got {names!r}")
    full = tuple(names)
    if len(full) == m:
        full += tuple(f"mix{i}" for i in range(v))
    if len(full) != m + v:
        raise ValueError(
            f"DistillGraph: names must have {m} entries (the logits tensors) or {m + v} (mixtures too), got {len(full)}"
        )
    if len(set(full)) != len(full):
        raise ValueError(f"DistillGraph: names must differ from each other, got {full}")
    return full
