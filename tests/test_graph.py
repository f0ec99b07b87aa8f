"""DistillGraph: builders against the published formulas, checks, names."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fflfast import DistillGraph


def test_ffl_is_the_papers_graph():
    g = DistillGraph.ffl(2)
    assert g.num_logits == 3
    assert g.ce_weights == (1, 1, 1)
    assert g.mixtures == ((0.5, 0.5, 0),)
    assert set(g.edges) == {(2, 0, 1, True), (2, 1, 1, True), (3, 2, 1, True)}
    assert g.term_names == ("ce/sub0", "ce/sub1", "ce/fused", "kl/fused→sub0", "kl/fused→sub1", "kl/ensemble→fused")


@pytest.mark.parametrize("n", [2, 3, 5])
def test_dml_has_every_ordered_pair_with_total_weight_one_a_student(n):
    g = DistillGraph.dml(n)
    assert {(e.teacher, e.student) for e in g.edges} == {(j, i) for i in range(n) for j in range(n) if i != j}
    for i in range(n):
        assert sum(e.weight for e in g.edges if e.student == i) == pytest.approx(1.0)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_builders_have_the_sizes_of_their_methods(n):
    expected = {  # name: (M, V, edges, CE terms, trainable teachers)
        "ffl": (n + 1, 1, n + 1, n + 1, 0),
        "cl": (n, n, n, n, 0),
        "one": (n + 1, 0, n, n + 1, 0),
        "pcl": (2 * n + 1, 0, n * n, n + 1, 0),
        "okddip": (2 * n + 1, 1, n + 1, n + 1, n),
        "mcl_okd": (n, 1, 1, n, 0),
        "oem": (n, 1, n, n, 0),
        "afd": (n, 0, n, n, 0),
        "kdcl": (n + 1, 0, n, n, 0),
        "okdhp": (n + 1, 0, n, 0, n),
    }
    for name, sizes in expected.items():
        g = getattr(DistillGraph, name)(n)
        trainable = sum(not e.detach for e in g.edges)
        assert (g.num_logits, g.num_mixtures, len(g.edges), len(g.ce_terms), trainable) == sizes, name
        for row in g.mixtures:
            assert sum(row) == pytest.approx(1.0)
        assert len(g.term_names) == g.num_terms == len(g.ce_terms) + len(g.edges)


def test_cl_teacher_leaves_the_student_out():
    g = DistillGraph.cl(3)
    for e in g.edges:
        assert g.mixtures[e.teacher - 3][e.student] == 0
    assert g.mixtures[0] == (0, 0.5, 0.5)


def test_frozen_hashable_equal_and_readable_back():
    g = DistillGraph(2, [1, 0], [[0.5, 0.5]], [[2, 0, 1, False], (1, 0, 2.0)], ["a", "b"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        g.num_logits = 3
    same = eval(repr(g), {"DistillGraph": DistillGraph})
    assert same == g
    assert hash(same) == hash(g)
    assert DistillGraph.from_key(g.key) == g
    assert g != DistillGraph.kd()
    assert g.names == ("a", "b", "mix0")


def test_replace_builds_and_checks_anew():
    g = dataclasses.replace(DistillGraph.kd(), names=("small", "large"))
    assert g.term_names == ("ce/small", "kl/large→small")
    with pytest.raises(ValueError, match="names"):
        dataclasses.replace(g, names=("a",))


def test_prints_who_is_taught_by_whom():
    text = str(DistillGraph.okddip(2))
    assert "attention0 (1, with gradient)" in text
    assert "= 0.5·sub0 + 0.5·sub1" in text


def test_zero_ce_weight_has_no_term():
    assert DistillGraph.kd().term_names == ("ce/student", "kl/teacher→student")
    assert not DistillGraph.okdhp(2).needs_target


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, ()), "at least 1"),
        ((2, (1,)), "must have 2 entries"),
        ((2, (1, float("nan"))), r"ce_weights\[1\] must be finite"),
        ((2, (1, 1), ((0.5, -0.5),)), "no negative"),
        ((2, (1, 1), ((0, 0),)), "all zero"),
        ((2, (1, 1), ((0.5,),)), r"mixtures\[0\] must have 2"),
        ((2, (1, 1), (), ((2, 0, 1),)), "teacher 2"),
        ((2, (1, 1), (), ((-1, 0, 1),)), "teacher -1"),
        ((2, (1, 1), ((0.5, 0.5),), ((0, 2, 1),)), "student 2"),
        ((2, (1, 1), (), ((0, 0, 1),)), "teach itself"),
        ((2, (1, 1), (), ((0, 1, float("inf")),)), "finite"),
        ((2, (1, 1), (), ((0, 1, 1), (0, 1, 2))), "twice"),
        ((2, (1, 1), (), ((0, 1),)), "teacher, student, weight"),
        ((2, (1, 1), (), ({"teacher": 0, "student": 1, "weight": 1},)), "teacher, student, weight"),
        ((2, (1, 1), (), (), ("a", "a")), "differ"),
        ((2, (1, 1), (), (), ("a",)), "names must have"),
    ],
)
def test_bad_values_raise_value_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        DistillGraph(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        (2.0, (1, 1)),
        (True, (1,)),
        (2, (1, "1")),
        (2, 1.0),
        (2, (1, 1), (), ((0, 1.5, 1),)),
        (2, (1, 1), (), ((0, 1, 1, 1),)),
        (2, (1, 1), (), (), "ab"),
        (2, (1, 1), 5),
        (2, (1, 1), (), 5),
        (2, (1, 1), (), (), 5),
    ],
    ids=repr,
)
def test_bad_types_raise_type_error(arguments):
    with pytest.raises(TypeError, match="DistillGraph"):
        DistillGraph(*arguments)


@pytest.mark.parametrize("builder", ["ffl", "dml", "cl", "one", "pcl", "okddip", "mcl_okd", "oem", "afd", "kdcl"])
def test_builders_refuse_one_network(builder):
    with pytest.raises(ValueError, match="at least 2"):
        getattr(DistillGraph, builder)(1)


def test_numbers_of_other_libraries_are_taken():
    import numpy as np

    g = DistillGraph(np.int64(2), np.ones(2), (), ((np.int64(0), 1, torch.tensor(0.5)),))
    assert g.edges[0].weight == 0.5
    assert isinstance(g.num_logits, int)
