"""The CUDA kernels of the distillation loss, emulated: the same bits in every order of threads, and none of their
barriers, shuffles and waits is there for nothing: each is skipped in turn, and the result must be wrong."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import pytest
import simt_build
import torch
from guarded import between_guards, died

from fflfast import DistillGraph
from fflfast.ops import native, reference

SEEDS = range(1, 5)
MUTATION_SEEDS = range(1, 25)
IGNORED = -100
TRAINABLE = DistillGraph(3, (1, 0.5, 0), ((0.25, 0.5, 0.0),), ((2, 0, 0.7, False), (3, 1, 1.3, False), (0, 2, 2.0)))


class Case(NamedTuple):
    """One loss, and the device that it runs on; few multiprocessors make each block do several rows."""

    graph: DistillGraph
    rows: int
    classes: int
    dtype: torch.dtype = torch.float32
    target: str = "index"
    smoothing: float = 0.0
    eps: float = 0.0
    reduction: str = "mean"
    first_is_bad: bool = False  # the first row's class does not exist
    capability: int = 90
    sm_count: int = 1


KD, FFL2, ONE = DistillGraph.kd(), DistillGraph.ffl(2), DistillGraph.single()
CASES = {
    "lanes-2": Case(FFL2, 1100, 3),
    "lanes-4": Case(DistillGraph.dml(3), 600, 9, reduction="sum"),
    "lanes-8-soft": Case(FFL2, 300, 20, target="soft"),
    "lanes-16-smooth": Case(KD, 200, 100, dtype=torch.bfloat16, smoothing=0.1, capability=100),
    "lanes-32": Case(FFL2, 130, 100, capability=80),
    "lanes-32-per-row": Case(FFL2, 70, 101, reduction="none"),
    "block-128": Case(KD, 20, 1500, smoothing=0.1),
    "block-256": Case(ONE, 18, 5003, target="soft"),
    "cluster-2": Case(KD, 9, 15000),
    "cluster-2-soft": Case(KD, 9, 30000, dtype=torch.float16, target="soft", capability=100),
    "cluster-4": Case(KD, 3, 50000),
    "cluster-8": Case(KD, 2, 60000, capability=100),
    "counted-apart": Case(ONE, 8300, 2, sm_count=132),
    "sweeps-double": Case(FFL2, 18, 700, dtype=torch.float64),
    "sweeps-one-warp": Case(TRAINABLE, 40, 33),
    "sweeps-trainable": Case(TRAINABLE, 18, 2100, smoothing=0.1),
    "sweeps-eps-soft": Case(FFL2, 18, 2100, dtype=torch.bfloat16, eps=1e-7, target="soft", capability=80),
    "sweeps-many": Case(DistillGraph.ffl(5), 18, 2100, dtype=torch.float16, reduction="sum", capability=100),
    "sweeps-bad": Case(FFL2, 18, 2100, eps=1e-7, reduction="sum", first_is_bad=True),
    "rows-bad": Case(FFL2, 300, 20, reduction="sum", first_is_bad=True),
    "sweeps-wide": Case(KD, 17, 16000, capability=80),
}
# Sites that may be skipped without harm, each with the reason why it stands in the source all the same.
EQUIVALENT = {
    ("distill_sweeps", 24): "a lane that reads its warp's maximum too early is outvoted by the first lane; without the "
    "barrier it would be a race all the same",
}


@pytest.fixture(scope="module")
def library():
    return simt_build.load_distill_loss()


@pytest.fixture(autouse=True)
def fresh(library):
    with simt_build.fresh(library, "tickets"):
        yield


def inputs(case):
    generator = torch.Generator().manual_seed(case.rows)
    z = [3 * torch.randn(case.rows, case.classes, generator=generator) for _ in range(case.graph.num_logits)]
    z[0][1, 2 % case.classes] = float("-inf")
    target = torch.randint(case.classes, (case.rows,), generator=generator)
    target[::3] = IGNORED
    if case.first_is_bad:
        target[0] = case.classes
    if case.target == "soft":
        target = torch.softmax(torch.randn(case.rows, case.classes, generator=generator), 1).to(accumulation(case))
    scalars = [torch.tensor(x, dtype=accumulation(case)) for x in (3.0, 0.8, 0.9)]
    return [t.to(case.dtype) for t in z], target, scalars


def accumulation(case):
    return torch.float64 if case.dtype == torch.float64 else torch.float32


def grad_of_loss(case):
    shape = (case.rows,) if case.reduction == "none" else ()
    return torch.full(shape, 0.5, dtype=accumulation(case))


def emulate(library, case, seed, place=lambda tensor: tensor):
    """Everything that the operators return for a case: by the base form, by the fast form where it exists."""
    library.device(
        sm_count=case.sm_count,
        capability=case.capability,
        shared_per_block=(163 if case.capability < 90 else 227) * 1024,
    )
    library.seed(seed)
    operators = native.operators("fflfast_emulated")
    z, target, scalars = inputs(case)
    z, target = [place(t) for t in z], place(target)
    options = (case.smoothing, IGNORED, case.eps, native.REDUCTIONS[case.reduction])
    graph, every = native.table(case.graph), (1 << len(z)) - 1
    loss, terms, statistics = operators.distill_loss(z, target, *scalars, graph, *options, 0)
    grad = grad_of_loss(case)
    results = [loss, terms, statistics]
    results += operators.distill_loss_backward(grad, z, target, statistics, *scalars, graph, *options, every)
    if case.reduction != "none" and case.dtype != torch.float16:
        fast = operators.distill_loss(z, target, *scalars, graph, *options, every)
        results += [t.clone() for t in fast]
        operators.scale_gradients(grad, fast[2:])
        results += fast[2:]
    return results


def truth(case):
    """Loss, terms and gradients in float64, by the definition of the operator."""
    z, target, scalars = inputs(case)
    z, scalars = [t.double() for t in z], [t.double() for t in scalars]
    target = target.double() if target.is_floating_point() else target
    options = (case.graph, case.smoothing, IGNORED, case.eps, case.reduction)
    loss, terms, statistics = reference.distill_loss(z, target, *scalars, *options)
    grad = grad_of_loss(case).double()
    needs = (True,) * len(z)
    return [loss, terms], reference.distill_loss_backward(grad, z, target, statistics, *scalars, *options, needs)


def bits(tensors):
    return [t.reshape(-1).view(torch.uint8).clone() for t in tensors]


def same(ours, theirs):
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def right(library):
    """Case -> (its bits in one order of threads, the (kernel, site) pairs that it visits)."""
    torch.use_deterministic_algorithms(True)
    results = {}
    for name, case in CASES.items():
        library.reset()
        results[name] = (bits(emulate(library, case, seed=0)), library.visited())
    torch.use_deterministic_algorithms(False)
    return results


def assert_close(case, ours, exact):
    """Loss, terms or a gradient against float64, roughly; tests/test_distill_loss.py holds them to the contract."""
    info = torch.finfo(case.dtype)
    smallest = info.smallest_normal * info.eps
    atol = smallest + 1e-6 * float(exact.nan_to_num(0, 0, 0).abs().max())
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4 + info.eps, atol=atol, equal_nan=True)


def assert_right(case, results):
    sums, gradients = truth(case)
    m = case.graph.num_logits
    pairs = [*zip(results[:2], sums, strict=True), *zip(results[3 : 3 + m], gradients, strict=True)]
    if len(results) > 3 + m:  # the fast form: loss, terms, gradients as they come, and scaled
        pairs += [*zip(results[3 + m : 5 + m], sums, strict=True), *zip(results[5 + 2 * m :], gradients, strict=True)]
    for ours, exact in pairs:
        assert_close(case, ours, exact)


@pytest.mark.parametrize("name", CASES)
def test_right_and_the_same_in_every_order(library, right, name):
    assert_right(CASES[name], emulate(library, CASES[name], seed=0))
    for seed in SEEDS:
        assert same(bits(emulate(library, CASES[name], seed)), right[name][0]), seed


def test_captured_launches_take_counters_of_their_own(library, right):
    library.capturing(True)
    for seed in SEEDS:
        assert same(bits(emulate(library, CASES["lanes-2"], seed)), right["lanes-2"][0])


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "begin"])
def test_a_read_outside_would_be_seen(at_end):
    guarded = between_guards(torch.arange(5.0), at_end)
    inside = guarded.data_ptr() + (16 if at_end else 0)
    assert not died(lambda: ctypes.string_at(inside, 4))
    assert died(lambda: ctypes.string_at(inside + (4 if at_end else -4), 4))


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "begin"])
@pytest.mark.parametrize("name", CASES)
def test_reads_nothing_outside_its_inputs(library, name, at_end):
    def compute():
        assert_right(CASES[name], emulate(library, CASES[name], 0, lambda t: between_guards(t, at_end)))

    assert not died(compute)


def test_cases_visit_every_site_and_cluster_size(library, right):
    visited = set().union(*(pairs for _, pairs in right.values()))
    assert {site for _, site in visited} == library.sites()
    clusters = set()
    for case in CASES.values():
        library.reset()
        emulate(library, case, seed=0)
        clusters |= {launch.cluster for launch in library.launches()}
    assert clusters == {1, 2, 4, 8}


@pytest.mark.parametrize("kernel", ["count_rows", "distill_rows", "distill_sweeps"])
def test_no_site_is_there_for_nothing(library, right, kernel):
    def is_right(name, seed):
        return same(bits(emulate(library, CASES[name], seed)), right[name][0])

    def seeds(site):
        return MUTATION_SEEDS[:4] if (kernel, site) in EQUIVALENT else MUTATION_SEEDS

    visits = {name: {site for visitor, site in pairs if visitor == kernel} for name, (_, pairs) in right.items()}
    missed = simt_build.unnoticed(library, kernel, "tickets", visits, is_right, seeds)
    assert {(kernel, site) for site in missed} == {pair for pair in EQUIVALENT if pair[0] == kernel}
