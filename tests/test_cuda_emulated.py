"""The operators of the CUDA library, emulated on the host: which kernel takes what, in how many launches, on rows of
any length, place and stride. Their barriers are held by tests/test_simt_distill_loss.py."""

from __future__ import annotations

import math

import pytest
import simt_build
import torch
from truth import GRAPHS, assert_contract, random_logits, target_for

from fflfast import DistillGraph
from fflfast.ops import native, reference

FFL2 = GRAPHS["ffl2"]
ON_CHIP = ("ffl2", "dml3", "cl3", "one3", "mcl_okd3", "oem2", "afd3", "kdcl2", "kd", "single")
SCALARS = {"temperature": 3.0, "kl_weight": 0.7, "ce_weight": 0.9}


@pytest.fixture(scope="module")
def library():
    return simt_build.load_distill_loss()


@pytest.fixture(autouse=True)
def fresh(library):
    library.reset()
    yield
    library.reset()
    library.clear("tickets")


def call(form, logits, target, graph, *, temperature=1.0, kl_weight=1.0, ce_weight=1.0, label_smoothing=0.0,
         ignore_index=-100, target_eps=0.0, reduction="mean", needs=None):  # fmt: skip
    """(loss, terms, gradients for a grad_output of 1) by the base form or the fast form."""
    operators = native.operators("fflfast_emulated")
    wide = torch.float64 if logits[0].dtype == torch.float64 else torch.float32
    scalars = [torch.tensor(x, dtype=wide) for x in (temperature, kl_weight, ce_weight)]
    rest = (native.table(graph), label_smoothing, ignore_index, target_eps, native.REDUCTIONS[reduction])
    if target is not None and target.is_floating_point():
        target = target.to(wide)
    needs = (1 << len(logits)) - 1 if needs is None else needs
    if form == "fast":
        loss, terms, *gradients = operators.distill_loss(logits, target, *scalars, *rest, needs)
        return loss, terms, gradients
    loss, terms, statistics = operators.distill_loss(logits, target, *scalars, *rest, 0)
    one = torch.ones_like(loss)
    return loss, terms, operators.distill_loss_backward(one, logits, target, statistics, *scalars, *rest, needs)


def differentiable(form):
    """`call` as a function that autograd knows, for assert_contract."""

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, target, graph, settings, *logits):
            loss, terms, ctx.gradients = call(form, list(logits), target, graph, **settings)
            ctx.mark_non_differentiable(terms)
            return loss, terms

        @staticmethod
        def backward(ctx, grad_loss, _):
            return None, None, None, *ctx.gradients

    return lambda logits, target, graph, **settings: Loss.apply(target, graph, settings, *logits)


def exact(logits, target, graph, *, temperature=1.0, kl_weight=1.0, ce_weight=1.0, label_smoothing=0.0,
          ignore_index=-100, target_eps=0.0, reduction="mean"):  # fmt: skip
    """The reference in float64 on the same numbers."""
    z = [t.double() for t in logits]
    scalars = [torch.tensor(x, dtype=torch.float64) for x in (temperature, kl_weight, ce_weight)]
    rest = (graph, label_smoothing, ignore_index, target_eps, reduction)
    loss, terms, statistics = reference.distill_loss(z, target, *scalars, *rest)
    one = torch.ones_like(loss)
    return loss, terms, reference.distill_loss_backward(one, z, target, statistics, *scalars, *rest, [True] * len(z))


def assert_close(got, want, dtype):
    """Roughly, but with every NaN, infinity and zero of a masked class in its place."""
    eps = torch.finfo(dtype).eps
    for g, w in zip([got[0], got[1], *got[2]], [want[0], want[1], *want[2]], strict=True):
        scale = w[w.isfinite()].abs().max() if w.isfinite().any() else torch.tensor(0.0)
        torch.testing.assert_close(g.double(), w, rtol=1e-4 + eps, atol=2e-6 * float(scale), equal_nan=True)


def kernels(library):
    return [launch.kernel for launch in library.launches()]


# ---- the contract, form by form


@pytest.mark.parametrize("form", ["base", "fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", GRAPHS)
def test_every_graph_meets_the_contract(library, name, dtype, form):
    graph = GRAPHS[name]
    logits = random_logits(graph.num_logits, (4, 70), dtype)
    settings = {"reduction": "sum"} if dtype == torch.float16 else {}
    assert_contract(differentiable(form), logits, target_for(graph, (4, 70)), graph, **SCALARS, **settings)
    on_chip = name in ON_CHIP and dtype != torch.float64
    assert set(kernels(library)) == {"distill_rows" if on_chip else "distill_sweeps"}


@pytest.mark.parametrize("form", ["base", "fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [1, 2, 3, 7, 8, 9, 31, 64, 65, 100, 255, 257, 1000, 1025, 2049, 4099, 9001])
def test_any_number_of_classes(classes, dtype, form):
    logits = random_logits(3, (3, classes), dtype, seed=classes)
    assert_contract(differentiable(form), logits, target_for(FFL2, (3, classes)), FFL2, **SCALARS)


@pytest.mark.parametrize("form", ["base", "fast"])
@pytest.mark.parametrize(
    ("cluster", "classes", "dtype"), [(1, 9000, torch.float32), (2, 30001, torch.bfloat16), (4, 30001, torch.float32),
                                (8, 100000, torch.bfloat16)], ids=str
)  # fmt: skip
def test_rows_across_a_cluster(library, cluster, classes, dtype, form):
    logits = random_logits(3, (2, classes), dtype)
    assert_contract(differentiable(form), logits, target_for(FFL2, (2, classes)), FFL2, **SCALARS)
    assert {launch.cluster for launch in library.launches()} == {cluster}
    assert set(kernels(library)) == {"distill_rows"}


@pytest.mark.parametrize(("capability", "classes"), [(80, 30000), (90, 200000)])
def test_rows_that_do_not_fit_on_chip_are_swept(library, capability, classes):
    library.device(capability=capability, shared_per_block=(163 if capability == 80 else 227) * 1024)
    logits = random_logits(3, (1, classes))
    target = target_for(FFL2, (1, classes))
    assert_close(call("fast", logits, target, FFL2, **SCALARS), exact(logits, target, FFL2, **SCALARS), torch.float32)
    assert kernels(library) == ["distill_sweeps"]


@pytest.mark.parametrize("form", ["base", "fast"])
@pytest.mark.parametrize("classes", [5, 33, 300, 3000])
@pytest.mark.parametrize("name", ["ffl2", "trainable", "kd"])
@pytest.mark.parametrize("options", [
    {"label_smoothing": 0.1}, {"target": "soft"}, {"target": "soft", "label_smoothing": 0.2}, {"target_eps": 1e-3},
    {"kl_weight": 0.0}, {"ce_weight": 0.0}, {"reduction": "sum"},
], ids=str)  # fmt: skip
def test_options(name, classes, form, options):
    graph, options = GRAPHS[name], dict(options)
    logits = random_logits(graph.num_logits, (3, classes))
    target = target_for(graph, (3, classes))
    if options.pop("target", None):
        target = torch.softmax(random_logits(1, (3, classes), torch.float64, seed=5)[0], 1).float().double()
        target[:, 0] = 0.0
    settings = SCALARS | options
    assert_close(call(form, logits, target, graph, **settings), exact(logits, target, graph, **settings), torch.float32)


# ---- rows that are not plain


@pytest.mark.parametrize("form", ["base", "fast", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [6, 90, 1200, 30000])
@pytest.mark.parametrize("name", ["ffl2", "dml3", "trainable"])
def test_masked_ignored_and_broken_rows(library, name, classes, dtype, form):
    graph = GRAPHS[name]
    logits = random_logits(graph.num_logits, (9, classes), dtype)
    target = target_for(graph, (9, classes))
    if target is None:
        target = torch.zeros(9, dtype=torch.int64)
    for z in logits:
        z[1, ::2] = -math.inf  # masked everywhere
        z[1, target[1]] = 1.0
        z[2] = math.nan  # ignored
    target[2] = -100
    logits[0][3, : classes // 2] = -math.inf  # a student without mass where its teacher has some
    logits[0][4] = -math.inf
    logits[1][5, 1] = math.nan
    target[6] = classes  # bad
    logits[1][7, 2] = math.inf
    logits[0][8] += 60  # more would show how the mixture's logits are rounded
    settings = SCALARS | {"reduction": "none" if form == "none" else "sum"}
    got = call("base" if form == "none" else form, logits, target, graph, **settings)
    want = exact(logits, target, graph, **settings)
    assert_close(got, want, dtype)
    for g in got[2]:
        assert (g[2] == 0).all()


@pytest.mark.parametrize("form", ["base", "fast"])
@pytest.mark.parametrize("classes", [7, 101, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_at_any_place_in_memory(dtype, classes, form):
    """Contiguous rows of an odd length, rows of a padded matrix, and tensors that begin at different places."""
    target = target_for(FFL2, (4, classes))
    plain = random_logits(3, (4, classes), dtype)
    want = call(form, plain, target, FFL2, **SCALARS)
    for offsets in ((0, 0, 0), (1, 1, 1), (3, 3, 3), (0, 1, 2)):
        for pad in (0, 1, 5):
            moved = []
            for z, offset in zip(plain, offsets, strict=True):
                base = torch.full((4 * (classes + pad) + 16,), math.nan, dtype=dtype)
                moved.append(base[offset:].as_strided((4, classes), (classes + pad, 1)).copy_(z))
                assert moved[-1].data_ptr() == base.data_ptr() + offset * z.element_size()
            got = call(form, moved, target, FFL2, **SCALARS)
            # A chunk that begins elsewhere gives each thread other classes, so sums may differ in their last bits.
            assert_close(got, (want[0].double(), want[1].double(), [g.double() for g in want[2]]), dtype)


def test_row_strides_of_zero_and_beyond_31_bits():
    z = random_logits(3, (2, 300))
    target = target_for(FFL2, (2, 300))
    z[1] = z[1][:1].expand(2, 300)
    want = exact(z, target, FFL2, **SCALARS)
    far = torch.empty(2**31 + 300)  # untouched but for its two ends
    z[0] = far.as_strided((2, 300), (2**31, 1)).copy_(z[0])
    for form in ("base", "fast"):
        assert_close(call(form, z, target, FFL2, **SCALARS), want, torch.float32)


def test_logits_are_not_modified_and_only_wanted_gradients_are_made():
    z = random_logits(3, (5, 100), torch.bfloat16)
    before = [t.clone() for t in z]
    target = target_for(FFL2, (5, 100))
    for form in ("base", "fast"):
        every = call(form, z, target, FFL2, **SCALARS)[2]
        some = call(form, z, target, FFL2, **SCALARS, needs=0b101)[2]
        assert some[1].numel() == 0
        assert torch.equal(some[0], every[0])
        assert torch.equal(some[2], every[2])
    assert all(torch.equal(a, b) for a, b in zip(z, before, strict=True))


# ---- launches


def test_small_batches_take_one_launch_each_way(library):
    z = random_logits(3, (128, 100))
    target = target_for(FFL2, (128, 100))
    gradients = call("fast", z, target, FFL2, **SCALARS)[2]
    assert kernels(library) == ["distill_rows"]
    native.operators("fflfast_emulated").scale_gradients(torch.tensor(2.0), gradients)
    assert kernels(library) == ["distill_rows", "scale_gradients"]
    library.reset()
    call("base", z, target, FFL2, **SCALARS)
    assert kernels(library) == ["distill_rows", "distill_rows"]


@pytest.mark.parametrize(("rows", "launches"), [(8192, 1), (8193, 2), (50000, 2)])
def test_long_targets_are_counted_by_a_launch_of_their_own(library, rows, launches):
    z, target = random_logits(1, (rows, 2)), target_for(GRAPHS["single"], (rows, 2))
    target[::3] = -100
    library.device(sm_count=4)
    got = call("fast", z, target, GRAPHS["single"])
    assert len(library.launches()) == launches
    assert_close(got, exact(z, target, GRAPHS["single"]), torch.float32)


def test_no_row_counts():
    z, target = random_logits(3, (6, 50)), torch.full((6,), -100)
    for form in ("base", "fast"):
        loss, terms, gradients = call(form, z, target, FFL2)
        assert loss == 0
        assert (terms == 0).all()
        assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("classes", [20, 100, 3000, 30000])
def test_base_and_fast_form_give_the_same_bits(classes):
    z, target = random_logits(3, (6, classes)), target_for(FFL2, (6, classes))
    base, fast = (call(form, z, target, FFL2, **SCALARS) for form in ("base", "fast"))
    for a, b in zip([*base[:2], *base[2]], [*fast[:2], *fast[2]], strict=True):
        assert torch.equal(a, b)


def test_captured_launches_have_tickets_of_their_own_and_work_without_one_too(library):
    """Also when every counter of the library is taken, a counter then comes with the call."""
    z, target = random_logits(3, (40, 10)), target_for(FFL2, (40, 10))
    want = call("fast", z, target, FFL2, **SCALARS)
    kl = DistillGraph(2, (0, 0), (), ((1, 0, 1.0),))
    z_kl = random_logits(2, (1, 1))
    library.capturing(True)
    for _ in range(3):
        got = call("fast", z, target, FFL2, **SCALARS)
        assert all(torch.equal(a, b) for a, b in zip([*got[:2], *got[2]], [*want[:2], *want[2]], strict=True))
    for _ in range(16384):
        call("fast", z_kl, None, kl, needs=1)
    got = call("fast", z, target, FFL2, **SCALARS)
    assert all(torch.equal(a, b) for a, b in zip([*got[:2], *got[2]], [*want[:2], *want[2]], strict=True))


# ---- scaling and refusals


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_scale_gradients(library, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = random_logits(3, (3, 37), dtype)
    tensors[1] = torch.empty(0, dtype=dtype)
    tensors.append(random_logits(1, (50,), dtype)[0][3:])  # begins between two 16-byte addresses
    want = [(t.to(wide) * 0.37).to(dtype) for t in tensors]
    scale = native.operators("fflfast_emulated").scale_gradients
    scale(torch.tensor(0.37, dtype=wide), tensors)
    assert all(torch.equal(t, w) for t, w in zip(tensors, want, strict=True))
    poisoned = [torch.full((40,), math.nan, dtype=dtype)]
    scale(torch.ones((), dtype=wide), poisoned)
    assert len(library.launches()) == 2
    scale(torch.ones((), dtype=wide), [torch.empty(0, dtype=dtype)])
    assert len(library.launches()) == 2


def test_what_does_not_fit_says_so(library):
    edges = tuple((t, s, 1.0) for t in range(10) for s in range(10) if t != s)
    graph = DistillGraph(10, (0,) * 10, (), edges)
    z = random_logits(10, (2, 4), torch.float64)
    with pytest.raises(RuntimeError, match=r"90 edges of float64 logits; use the reference backend"):
        call("fast", z, None, graph)
    z = [t.float() for t in z]
    assert_close(call("fast", z, None, graph), exact(z, None, graph), torch.float32)
    with pytest.raises(RuntimeError, match="expected reduction mean or sum where gradients are wanted"):
        call("fast", z, None, graph, reduction="none")
