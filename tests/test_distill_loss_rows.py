"""distill_loss on rows that do not count, masked logits, and any layout in memory."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from truth import GRAPHS, random_logits, run, target_for

from fflfast import DistillGraph, distill_loss, kd_loss, kl_div_with_logits

FFL = GRAPHS["ffl2"]
INF = math.inf

pytestmark = pytest.mark.usefixtures("route", "backend")


# ---- rows that do not count


def test_ignored_rows_are_exact_zeros_whatever_they_hold():
    logits = random_logits(3, (6, 8))
    y = torch.tensor([1, -7, 3, -7, 0, 7])
    clean = run(distill_loss, [z[y != -7] for z in logits], y[y != -7], FFL, temperature=3.0)
    for z in logits:
        z[1], z[3] = math.nan, -INF
    for reduction in ("mean", "sum", "none"):
        loss, terms, grads = run(distill_loss, logits, y, FFL, temperature=3.0, ignore_index=-7, reduction=reduction)
        assert loss.isfinite().all()
        assert terms.isfinite().all()
        for g in grads:
            assert (g[y == -7] == 0).all()
            assert g.isfinite().all()
        if reduction == "none":
            assert (loss[y == -7] == 0).all()
        if reduction == "mean":
            torch.testing.assert_close(loss, clean[0])
            torch.testing.assert_close(terms, clean[1])
            torch.testing.assert_close(grads[0][y != -7], clean[2][0])


def test_ignore_index_may_be_a_valid_class():
    logits = random_logits(1, (4, 5), torch.float64)
    y = torch.tensor([2, 2, 0, 4])
    got = distill_loss(logits, y, GRAPHS["single"], ignore_index=2).loss
    torch.testing.assert_close(got, F.cross_entropy(logits[0], y, ignore_index=2), rtol=1e-13, atol=0)


def test_a_target_can_mask_rows_of_a_graph_without_ce():
    s, t = random_logits(2, (4, 6), torch.float64)
    graph = DistillGraph(2, (0, 0), (), ((1, 0, 1.0),))
    got = distill_loss([s, t], torch.tensor([-100, 1, -100, 2]), graph).loss
    kept = kl_div_with_logits(s[[1, 3]], t[[1, 3]])
    torch.testing.assert_close(got, kept, rtol=1e-13, atol=0)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(0, 5), (3, 5), (2, 0, 5)], ids=str)
def test_no_counted_row_gives_zero_with_a_graph(reduction, shape):
    logits = [z.requires_grad_() for z in random_logits(3, shape)]
    y = torch.full(shape[:-1], -100)
    loss, terms = distill_loss(logits, y, FFL, reduction=reduction)
    assert (loss == 0).all()
    assert (terms == 0).all()
    loss.sum().backward()
    for z in logits:
        assert z.grad.shape == shape
        assert not z.grad.any()


# ---- masked logits


def test_masked_classes_are_as_if_they_were_not_there():
    keep = torch.tensor([0, 2, 3, 6])
    logits = random_logits(3, (5, 7), torch.float64)
    y = keep[torch.tensor([0, 1, 2, 3, 0])]
    small = torch.tensor([0, 1, 2, 3, 0])
    masked = [z.clone() for z in logits]
    for z in masked:
        z[:, [1, 4, 5]] = -INF
    graph = GRAPHS["trainable"]
    got = run(distill_loss, masked, y, graph, temperature=2.0)
    expected = run(distill_loss, [z[:, keep].contiguous() for z in logits], small, graph, temperature=2.0)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-12, atol=0)
    for g, e in zip(got[2], expected[2], strict=True):
        assert (g[:, [1, 4, 5]] == 0).all()
        torch.testing.assert_close(g[:, keep], e, rtol=1e-10, atol=1e-15)


def test_mixture_skips_networks_with_zero_coefficient():
    # 0·(−inf) would be NaN: the third tensor is masked and not part of the mixture.
    graph = DistillGraph(3, (0, 0, 0), ((0.5, 0.5, 0.0),), ((3, 0, 1.0, False),))
    logits = random_logits(3, (2, 4), torch.float64)
    logits[2][:] = -INF
    loss, _, grads = run(distill_loss, logits, None, graph)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in grads)
    assert not grads[2].any()


def test_student_without_mass_where_the_teacher_has_some():
    student, teacher = random_logits(2, (3, 4), torch.float64)
    student[1, 2] = -INF
    fixed, free = (DistillGraph(2, (0, 0), (), ((1, 0, 1.0, detach),)) for detach in (True, False))
    loss, terms, grads = run(distill_loss, [student, teacher], None, fixed)
    assert loss == INF
    assert terms[0] == INF
    assert grads[0].isfinite().all()
    torch.testing.assert_close(grads[0][1], (student[1].softmax(0) - teacher[1].softmax(0)) / 3)
    _, _, grads = run(distill_loss, [student, teacher], None, free)
    assert grads[1][1].isnan().all()
    assert grads[1][[0, 2]].isfinite().all()
    rows = distill_loss([student, teacher], None, fixed, reduction="none").loss
    assert rows[1] == INF
    assert rows[[0, 2]].isfinite().all()


def test_a_weight_of_zero_removes_an_infinite_term():
    student, teacher = random_logits(2, (3, 4), torch.float64)
    student[1, 2] = -INF
    y = torch.tensor([0, 0, 0])
    loss, _, grads = run(distill_loss, [student, teacher], y, DistillGraph.kd(), kl_weight=0.0)
    torch.testing.assert_close(loss, F.cross_entropy(student, y))
    assert grads[0].isfinite().all()


def test_a_counted_row_that_is_all_masked_is_nan_and_alone():
    logits = random_logits(3, (4, 6))
    for z in logits:
        z[2] = -INF
    y = torch.tensor([0, 1, 2, 3])
    loss, _, grads = run(distill_loss, logits, y, FFL, reduction="none")
    assert loss[2].isnan()
    assert loss[[0, 1, 3]].isfinite().all()
    for g in grads:
        assert g[2].isnan().all()
        assert g[[0, 1, 3]].isfinite().all()


def test_masked_target_class_gives_infinite_ce_and_finite_gradients():
    (z,) = random_logits(1, (2, 4), torch.float64)
    z[0, 1] = -INF
    loss, _, (grad,) = run(distill_loss, [z], torch.tensor([1, 2]), GRAPHS["single"])
    assert loss == INF
    torch.testing.assert_close(grad, (z.softmax(1) - F.one_hot(torch.tensor([1, 2]), 4)) / 2)


def test_soft_target_without_mass_on_a_masked_class():
    (z,) = random_logits(1, (1, 4), torch.float64)
    z[0, 1] = -INF
    y = torch.tensor([[0.5, 0.0, 0.25, 0.25]], dtype=torch.float64)
    loss = distill_loss([z], y, GRAPHS["single"]).loss
    torch.testing.assert_close(loss, F.cross_entropy(z[:, [0, 2, 3]], y[:, [0, 2, 3]]))


def test_trainable_teacher_with_eps_and_a_class_masked_in_the_teacher():
    # p_t = 0 there, so the teacher's gradient has nothing to gain from log ε − log p_s.
    graph = DistillGraph(2, (0, 0), (), ((1, 0, 1.0, False),))
    student, teacher = random_logits(2, (2, 4), torch.float64)
    teacher[:, 3] = -INF
    _, _, grads = run(distill_loss, [student, teacher], None, graph, target_eps=0.01)
    assert (grads[1][:, 3] == 0).all()
    plain = [student.clone().requires_grad_(), teacher[:, :3].clone().requires_grad_()]
    p = plain[1].softmax(1) + 0.01
    log_s = plain[0].log_softmax(1)
    rest = 0.01 * (math.log(0.01) - log_s[:, 3])
    ((p * (p.log() - log_s[:, :3])).sum(1) + rest).mean().backward()
    torch.testing.assert_close(grads[0], plain[0].grad, rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(grads[1][:, :3], plain[1].grad, rtol=1e-10, atol=1e-15)


def test_class_masked_in_student_and_teacher_with_trainable_teacher_and_eps_is_infinite():
    graph = DistillGraph(2, (0, 0), (), ((1, 0, 1.0, False),))
    logits = random_logits(2, (2, 4), torch.float64)
    for z in logits:
        z[:, 3] = -INF
    loss, _, grads = run(distill_loss, logits, None, graph, target_eps=0.01)
    assert loss == INF
    assert grads[0].isfinite().all()
    assert grads[1].isfinite().all()


# ---- layouts


@pytest.mark.parametrize(
    "layout",
    [
        lambda z: z.t().contiguous().t(),
        lambda z: torch.cat([z, z + 1], 1)[:, : z.shape[1]],
        lambda z: torch.stack([z, z], -1)[..., 0],
        lambda z: z.flip(0),
        lambda z: z[:1].expand_as(z),
    ],
    ids=["class_dim_strided", "row_stride", "both_strided", "flipped", "expanded"],
)
def test_any_stride(layout):
    logits = [layout(z) for z in random_logits(3, (6, 13), torch.float64)]
    y = target_for(FFL, (6, 13))
    got = run(distill_loss, logits, y, FFL, temperature=3.0)
    expected = run(distill_loss, [z.contiguous() for z in logits], y, FFL, temperature=3.0)
    for g, e in zip((got[0], got[1], *got[2]), (expected[0], expected[1], *expected[2]), strict=True):
        assert torch.equal(g, e)


@pytest.mark.parametrize("shape", [(7,), (2, 3, 7), (2, 1, 3, 7)], ids=str)
def test_any_leading_dimensions(shape):
    logits = random_logits(3, shape, torch.float64)
    y = target_for(FFL, shape)
    got = run(distill_loss, logits, y, FFL, temperature=3.0, reduction="none")
    flat = run(distill_loss, [z.reshape(-1, 7) for z in logits], y.reshape(-1), FFL, temperature=3.0, reduction="none")
    assert got[0].shape == shape[:-1]
    assert torch.equal(got[0].reshape(-1), flat[0])
    assert torch.equal(got[2][0].reshape(-1, 7), flat[2][0])


def test_mixed_dtypes_are_promoted_and_gradients_come_back_in_their_own():
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    logits = [z.to(d).requires_grad_() for z, d in zip(random_logits(3, (4, 9)), dtypes, strict=True)]
    y = target_for(FFL, (4, 9))
    loss = distill_loss(logits, y, FFL, temperature=3.0).loss
    loss.backward()
    assert loss.dtype == torch.float32
    wide = [z.detach().float().requires_grad_() for z in logits]
    same = distill_loss(wide, y, FFL, temperature=3.0).loss
    same.backward()
    assert torch.equal(loss, same)
    for z, w in zip(logits, wide, strict=True):
        assert z.grad.dtype == z.dtype
        assert torch.equal(z.grad, w.grad.to(z.dtype))


def test_row_stride_beyond_int32():
    # Two rows 2³¹ elements apart in memory that is never touched between them.
    stride, num_classes = 2**31, 17
    storage = torch.empty(stride + num_classes, dtype=torch.bfloat16)
    far = storage.as_strided((2, num_classes), (stride, 1))
    logits = random_logits(2, (2, num_classes), torch.bfloat16)
    far.copy_(logits[0])
    graph = DistillGraph.dml(2)
    y = torch.tensor([3, 16])
    leaf = far.detach().requires_grad_()
    loss = distill_loss([leaf, logits[1]], y, graph).loss
    (gradient,) = torch.autograd.grad(loss, leaf)
    expected = run(distill_loss, logits, y, graph)
    assert torch.equal(loss.detach(), expected[0])
    assert torch.equal(gradient, expected[2][0])


def test_gradients_and_rows_are_contiguous_and_own_their_memory():
    logits = [z.transpose(0, 1).requires_grad_() for z in random_logits(3, (3, 2, 7))]
    y = torch.zeros(3, 2, dtype=torch.int64).t()
    loss = distill_loss(logits, y, FFL, reduction="none").loss
    assert loss.is_contiguous()
    empty = distill_loss(logits, y, DistillGraph(3, (0, 0, 0)), reduction="none").loss
    assert empty.untyped_storage().nbytes() == empty.numel() * 4
    for gradient in torch.autograd.grad(loss.sum(), logits):
        assert gradient.is_contiguous()


def test_teacher_and_target_from_inference_mode():
    s, _ = random_logits(2, (5, 12))
    s.requires_grad_()
    with torch.inference_mode():
        t = random_logits(2, (5, 12))[1]
        y = torch.arange(5)
        temperature = torch.tensor(3.0)
    loss = kd_loss(s, t, y, temperature=temperature, alpha=0.5)
    loss.backward()
    same = kd_loss(s, t.clone(), y.clone(), temperature=3.0, alpha=0.5)
    assert torch.equal(loss, same)
