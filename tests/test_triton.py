"""The Triton kernels of distill_loss beyond what every backend's tests ask: both forms, every border of the policy.

Without a GPU the kernels run under Triton's interpreter (tests/conftest.py sets TRITON_INTERPRET).
"""

from __future__ import annotations

import math

import pytest
import torch
from truth import EPS, GRAPHS, assert_contract, random_logits, target_for

from fflfast import DistillGraph, kernels
from fflfast.ops import reference

if (reason := kernels.available()) is not None:
    pytest.skip(reason, allow_module_level=True)

from fflfast.kernels import distill_loss as triton_loss
from fflfast.kernels import launch
from fflfast.kernels.plan import columns

FFL, TRAINABLE, INF = GRAPHS["ffl2"], GRAPHS["trainable"], math.inf
NONE, MEAN, SUM = 0, 1, 2
NAMES = ("none", "mean", "sum")
# Tiles of 2 rows × 16 classes: everything wider takes two sweeps.
SMALL_TILE = launch.Tile(2, 16, 4)

# The interpreter computes with NumPy, which warns of what IEEE arithmetic defines.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture
def two_sweeps(monkeypatch):
    monkeypatch.setattr(launch, "tile", lambda *case: SMALL_TILE)


def scalars(dtype, *values):
    acc = reference.accumulation_dtype(dtype)
    return tuple(torch.tensor(v, dtype=acc) for v in (values or (3.0, 0.7, 1.3)))


def every(graph):
    return (1 << graph.num_logits) - 1


def base_form(logits, target, graph, reduction=MEAN, grad=None, needs=None, stu=(0.0, -100, 0.0), values=()):
    """(loss, terms, statistics, gradients) with (label_smoothing, ignore_index, target_eps) = stu."""
    t = scalars(logits[0].dtype, *values)
    loss, terms, statistics = triton_loss.distill_loss(logits, target, *t, graph, *stu, reduction, 0)
    grad = torch.ones_like(loss) if grad is None else grad
    needs = every(graph) if needs is None else needs
    grads = triton_loss.distill_loss_backward(grad, logits, target, statistics, *t, graph, *stu, reduction, needs)
    return loss, terms, statistics, grads


def fast_form(logits, target, graph, reduction=MEAN, stu=(0.0, -100, 0.0), values=()):
    t = scalars(logits[0].dtype, *values)
    loss, terms, *grads = triton_loss.distill_loss(logits, target, *t, graph, *stu, reduction, every(graph))
    return loss, terms, grads


def exact(logits, target, graph, reduction=MEAN, stu=(0.0, -100, 0.0), values=()):
    """The definition in float64."""
    z = [t.double() for t in logits]
    y = target.double() if target is not None and target.is_floating_point() else target
    t = scalars(torch.float64, *values)
    name = NAMES[reduction]
    loss, terms, statistics = reference.distill_loss(z, y, *t, graph, *stu, name)
    grads = reference.distill_loss_backward(
        torch.ones_like(loss), z, y, statistics, *t, graph, *stu, name, [True] * graph.num_logits
    )
    return loss, terms, statistics, grads


def assert_bits(got, expected):
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == e.dtype
        assert torch.equal(g.nan_to_num(nan=17.0), e.nan_to_num(nan=17.0))
        assert torch.equal(g.isnan(), e.isnan())


def assert_close(got, expected, rtol=2e-5, atol=2e-6):
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g.double(), e, rtol=rtol, atol=atol, equal_nan=True)


def assert_both_forms(logits, target, graph, reduction=MEAN, **kwargs):
    """Base form against the definition, fast form against the base form bit for bit."""
    dtype = logits[0].dtype
    loss, terms, statistics, grads = base_form(logits, target, graph, reduction, **kwargs)
    want = exact(logits, target, graph, reduction, **kwargs)
    assert_close([loss, terms], want[:2])
    if all((z < INF).all() for z in logits):  # else a row is NaN, and its sums may be anything that makes it so
        assert_close([statistics], [want[2]])
    low = {} if dtype == torch.float32 else {"rtol": 2 * EPS[dtype], "atol": 1e-6}
    assert_close(grads, want[3], **low)
    if reduction != NONE:
        fast = fast_form(logits, target, graph, reduction, **kwargs)
        assert_bits([*fast[:2], *fast[2]], [loss, terms, *grads])


class Loss(torch.autograd.Function):
    """The base form with autograd, for the tolerance rule."""

    @staticmethod
    def forward(ctx, target, graph, stu, values, *logits):
        loss, terms, statistics, _ = base_form([z.detach() for z in logits], target, graph, MEAN, None, 0, stu, values)
        ctx.rest = (target, graph, stu, values)
        ctx.save_for_backward(statistics, *logits)
        ctx.mark_non_differentiable(terms)
        return loss, terms

    @staticmethod
    def backward(ctx, grad, _):
        statistics, *logits = ctx.saved_tensors
        target, graph, stu, values = ctx.rest
        t = scalars(logits[0].dtype, *values)
        grads = triton_loss.distill_loss_backward(grad, logits, target, statistics, *t, graph, *stu, MEAN, every(graph))
        return None, None, None, None, *grads


def with_autograd(
    logits, target, graph, *, temperature, kl_weight, ce_weight, label_smoothing=0.0, ignore_index=-100, target_eps=0.0
):
    stu = (label_smoothing, ignore_index, target_eps)
    return Loss.apply(target, graph, stu, (temperature, kl_weight, ce_weight), *logits)


# ---- both forms, one sweep and two


@pytest.mark.parametrize("name", GRAPHS)
def test_two_sweeps_of_every_graph(name, two_sweeps):
    graph = GRAPHS[name]
    logits = random_logits(graph.num_logits, (5, 37))
    y = target_for(graph, (5, 37))
    if y is not None:
        y[2] = -100
    assert_both_forms(logits, y, graph)


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("num_classes", [16, 17, 40])
def test_two_sweeps_hold_the_contract(dtype, num_classes, two_sweeps):
    logits = random_logits(3, (4, num_classes), dtype)
    settings = {"temperature": 3.0, "kl_weight": 0.7, "ce_weight": 1.3}
    assert_contract(with_autograd, logits, target_for(FFL, (4, num_classes)), FFL, **settings)


@pytest.mark.parametrize("target", ["none", "index", "soft"])
@pytest.mark.parametrize(
    ("smoothing", "eps", "reduction"), [(0.0, 0.0, NONE), (0.2, 0.0, MEAN), (0.0, 1e-3, SUM), (0.2, 1e-3, MEAN)]
)
@pytest.mark.parametrize("tile", ["own", "small"])
def test_targets_and_options(monkeypatch, tile, target, smoothing, eps, reduction):
    if tile == "small":
        monkeypatch.setattr(launch, "tile", lambda *case: SMALL_TILE)
    graph = GRAPHS["okdhp2"] if target == "none" else TRAINABLE
    logits = random_logits(3, (3, 21))
    y = None
    if target == "index":
        y = torch.tensor([20, -100, 0])
    elif target == "soft":
        y = torch.softmax(random_logits(1, (3, 21), seed=5)[0], 1)
        y[:, 3] = 0.0
    assert_both_forms(logits, y, graph, reduction, stu=(smoothing, -100, eps))


@pytest.mark.parametrize(
    ("graph", "num_classes", "dtype"),
    [  # one class, a padded tile, and both sides of: narrow tiles, several rows a program, one row, two sweeps
        *[("single", c, torch.float32) for c in (1, 2, 32, 33, 2048, 2049, 8192, 8193)],
        *[("ffl2", c, torch.float32) for c in (1, 3, 10, 128, 129, 2049, 4096, 4097)],
        *[("ffl2", c, torch.bfloat16) for c in (1000, 1025, 6000)],
        *[("pcl3", c, torch.float16) for c in (1024, 1025)],
    ],
)
def test_borders_of_the_policy(graph, num_classes, dtype):
    graph = GRAPHS[graph]
    logits = random_logits(graph.num_logits, (2, num_classes), dtype)
    assert_both_forms(logits, target_for(graph, (2, num_classes)), graph)


def test_float64_is_computed_in_float64():
    logits = random_logits(3, (3, 2050), torch.float64)
    y = target_for(TRAINABLE, (3, 2050))
    stu = (0.1, -100, 1e-7)
    got, want = base_form(logits, y, TRAINABLE, stu=stu, values=(1.1, 0.3, 0.7)), exact(
        logits, y, TRAINABLE, stu=stu, values=(1.1, 0.3, 0.7)
    )  # fmt: skip
    assert_close([*got[:3], *got[3]], [*want[:3], *want[3]], rtol=1e-12, atol=1e-14)


# ---- many rows


@pytest.mark.parametrize("reduction", [NONE, MEAN, SUM])
def test_programs_that_take_several_blocks_of_rows(monkeypatch, two_sweeps, reduction):
    monkeypatch.setattr(launch, "MAX_PROGRAMS", 2)
    assert_both_forms(random_logits(3, (9, 10)), target_for(FFL, (9, 10)), FFL, reduction)


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 200])
def test_rows_are_counted_by_a_kernel_of_its_own(monkeypatch, rows):
    for name, value in (("COUNT_IN_KERNEL", 0), ("COUNT_BLOCK", 16), ("COUNT_PROGRAMS", 4)):
        monkeypatch.setattr(launch, name, value)
    y = target_for(FFL, (rows, 4))
    y[1::3] = -100
    assert_both_forms(random_logits(3, (rows, 4)), y, FFL)


def test_no_counted_row():
    y = torch.full((3,), -100)
    logits = [torch.full_like(z, math.nan) for z in random_logits(3, (3, 5))]
    loss, terms, statistics, grads = base_form(logits, y, FFL)
    assert loss == 0
    assert statistics[0] == 1
    assert not terms.any()
    assert not any(g.any() for g in grads)
    fast = fast_form(logits, y, FFL)
    assert_bits([*fast[:2], *fast[2]], [loss, terms, *grads])


# ---- masks and other things that are not numbers


@pytest.mark.parametrize("graph", [FFL, TRAINABLE], ids=["ffl", "trainable"])
def test_masks_by_tile(two_sweeps, graph):
    logits = random_logits(3, (9, 40))
    for z in logits:
        z[0, :16] = -INF  # the first tile
        z[1, 16:32] = -INF  # the second
        z[2, 32:] = -INF  # the last, which is padded
        z[3, :39] = -INF  # one class is left
    logits[0][4, :17] = -INF  # in one tensor alone, so that the loss is infinite
    logits[1][5] = -INF  # a dead row: NaN
    logits[2][6, 33] = math.nan
    logits[0][7, 3] = INF
    y = torch.tensor([20, 3, 8, 39, 30, 1, 2, 7, 40])  # the last one does not exist
    loss, terms, statistics, grads = base_form(logits, y, graph, NONE)
    want = exact(logits, y, graph, NONE)
    width = columns(graph).width
    assert statistics[1 + 5 * width + columns(graph).tempered_sum_at + 1].isnan()  # of the dead row
    assert_close([loss, terms, *grads], [*want[:2], *want[3]])
    assert loss[8].isnan()
    assert all(g[8].isnan().all() for g in grads)
    assert loss[:4].isfinite().all()
    assert loss[4] == INF
    assert loss[5:].isnan().all()
    # Rows do not disturb each other: the sum over the healthy ones is finite when the others are ignored.
    y[4:] = -100
    assert_both_forms(logits, y, graph)


def test_maxima_that_grow_by_far_more_than_an_exponential_holds(two_sweeps):
    logits = [z + torch.linspace(-5000.0, 5000.0, 50) for z in random_logits(3, (2, 50))]
    assert_both_forms(logits, target_for(FFL, (2, 50)), FFL)
    # A student that is masked where the teacher's mass fades away: that mass is exactly zero in the end.
    student, teacher = (torch.zeros(1, 40), torch.zeros(1, 40))
    student[:, :16] = -INF
    teacher[:, 30] = 5000.0
    loss = base_form([student, teacher], None, DistillGraph(2, (0, 0), (), ((1, 0, 1.0),)), values=(1.0, 1.0, 1.0))[0]
    assert loss == pytest.approx(math.log(24))


@pytest.mark.parametrize("offset", [-30000.0, 0.0, 30000.0])
def test_very_negative_and_very_large_logits(two_sweeps, offset):
    logits = [z + offset for z in random_logits(3, (3, 33))]
    settings = {"temperature": 3.0, "kl_weight": 0.7, "ce_weight": 1.3}
    assert_contract(with_autograd, logits, target_for(FFL, (3, 33)), FFL, **settings)


def test_a_weight_of_zero_removes_what_is_not_finite(two_sweeps):
    logits = random_logits(3, (2, 20))
    logits[2][0] = -INF
    y = target_for(FFL, (2, 20))
    loss, terms, _, grads = base_form(logits, y, FFL, values=(3.0, 0.0, 0.0))
    assert loss == 0
    assert terms.isnan().any()
    assert not any(g.any() for g in grads)


# ---- layouts, scalars and gradients


def test_row_strides_of_each_tensor_and_of_the_target(two_sweeps):
    wide = [torch.randn(4, 64), torch.randn(4, 48), torch.randn(1, 40)]
    logits = [wide[0][:, :34], wide[1][:, 5:39], wide[2][:, :34].expand(4, 34)]
    soft = torch.softmax(torch.randn(4, 70), 1)[:, 30:64]
    assert_both_forms(logits, target_for(FFL, (4, 34)), FFL)
    assert_both_forms(logits, soft, FFL)
    for z, before in zip(wide, [z.clone() for z in wide], strict=True):
        assert torch.equal(z, before)


def test_scalars_by_pointer_and_by_value_are_the_same(monkeypatch):
    logits, y = random_logits(3, (3, 10)), target_for(TRAINABLE, (3, 10))
    expected = base_form(logits, y, TRAINABLE, stu=(0.1, -100, 1e-3))
    seen = []

    def pointers(z, *values):
        seen.append(values)
        return tuple(torch.as_tensor(v, dtype=torch.float32) for v in values), 0b11111

    monkeypatch.setattr(triton_loss, "_scalars", pointers)
    got = base_form(logits, y, TRAINABLE, stu=(0.1, -100, 1e-3))
    assert len(seen) == 2
    assert_bits([*got[:3], *got[3]], [*expected[:3], *expected[3]])


@pytest.mark.parametrize("reduction", [NONE, MEAN, SUM])
def test_grad_loss_and_the_gradients_asked_for(reduction):
    logits, y = random_logits(3, (4, 10)), target_for(FFL, (4, 10))
    ones = base_form(logits, y, FFL, reduction)[3]
    grad = torch.tensor([2.0, 0.5, 0.0, -4.0]) if reduction == NONE else torch.tensor(0.5)
    grads = base_form(logits, y, FFL, reduction, grad, needs=0b101)[3]
    assert grads[1].shape == (0,)
    factor = grad.unsqueeze(1) if reduction == NONE else grad
    for i in (0, 2):
        assert torch.equal(grads[i], ones[i] * factor)  # powers of two
    if reduction != NONE:
        fast = triton_loss.distill_loss(logits, y, *scalars(torch.float32), FFL, 0.0, -100, 0.0, reduction, 0b100)
        assert [g.numel() for g in fast[2:]] == [0, 0, 40]
        assert torch.equal(fast[4], ones[2])


@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_scale_gradients(monkeypatch, dtype):
    monkeypatch.setattr(launch, "SCALE_BLOCK", 16)
    monkeypatch.setattr(launch, "SCALE_PROGRAMS", 2)
    for shape in ((5, 21), (4, 8), (1, 1)):
        grads = [*random_logits(2, shape, dtype), torch.empty(0, dtype=dtype)]
        before = [g.clone() for g in grads]
        for factor in (1.0, 0.3, math.nan):
            factor = scalars(dtype, factor)[0]
            triton_loss.scale_gradients(factor, grads)
            before = [b.to(factor.dtype).mul(factor).to(dtype) for b in before]
            # The interpreter cuts bfloat16 off instead of rounding.
            rtol = EPS[dtype] if dtype == torch.bfloat16 and factor != 1.0 else 0.0
            for g, b in zip(grads, before, strict=True):
                torch.testing.assert_close(g, b, rtol=rtol, atol=0.0, equal_nan=True)
            before = [g.clone() for g in grads]
    triton_loss.scale_gradients(scalars(dtype, 2.0)[0], [torch.empty(0, dtype=dtype)])


def test_bits_repeat():
    logits, y = random_logits(3, (7, 100)), target_for(FFL, (7, 100))
    first, second = base_form(logits, y, FFL), base_form(logits, y, FFL)
    assert_bits([*first[:3], *first[3]], [*second[:3], *second[3]])
