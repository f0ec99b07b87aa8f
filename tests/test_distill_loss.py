"""distill_loss against independent evaluations: numbers, reductions, targets."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from truth import GRAPHS, assert_contract, plain_loss, random_logits, run, target_for

from fflfast import DistillGraph, distill_loss, kd_loss, kl_div_with_logits

FFL = GRAPHS["ffl2"]
INF = math.inf

pytestmark = pytest.mark.usefixtures("route", "backend")


# ---- numbers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", GRAPHS)
def test_every_graph_meets_the_contract(name, dtype):
    graph = GRAPHS[name]
    logits = random_logits(graph.num_logits, (5, 11), dtype)
    assert_contract(
        distill_loss, logits, target_for(graph, (5, 11)), graph, temperature=3.0, kl_weight=0.3, ce_weight=0.7
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.7, 20.0])
@pytest.mark.parametrize("reduction", ["none", "mean", "batchmean", "sum"])
@pytest.mark.parametrize("num_classes", [1, 2, 100, 1003])
def test_temperatures_reductions_and_class_counts(temperature, reduction, num_classes):
    logits = random_logits(3, (4, num_classes))
    assert_contract(
        distill_loss, logits, target_for(FFL, (4, num_classes)), FFL, temperature=temperature, reduction=reduction
    )


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4])
@pytest.mark.parametrize("shift", [0.0, -1e4, 1e4])
def test_extreme_logits(scale, shift):
    logits = [z + shift for z in random_logits(3, (6, 50), scale=scale)]
    assert_contract(distill_loss, logits, target_for(FFL, (6, 50)), FFL, temperature=3.0)


@pytest.mark.parametrize("label_smoothing", [0.1, 1.0])
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_label_smoothing_and_soft_targets(label_smoothing, soft):
    logits = random_logits(3, (6, 9))
    target = torch.rand(6, 9) * 2 if soft else target_for(FFL, (6, 9))
    if soft:
        target[0] = F.one_hot(torch.tensor(3), 9)
    ours = run(distill_loss, logits, target, FFL, label_smoothing=label_smoothing, temperature=2.0)
    plain = run(plain_loss, [z.double() for z in logits], target, FFL, label_smoothing=label_smoothing, temperature=2.0)
    torch.testing.assert_close(ours[0].double(), plain[0], rtol=1e-6, atol=1e-6)
    for g, p in zip(ours[2], plain[2], strict=True):
        torch.testing.assert_close(g.double(), p, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_equals_cross_entropy_for_one_network(reduction, soft):
    (z,) = random_logits(1, (7, 10), torch.float64)
    target = torch.rand(7, 10, dtype=torch.float64) if soft else torch.tensor([1, 2, -100, 4, 9, 0, -100])
    kwargs = {"label_smoothing": 0.2, "reduction": reduction}
    loss, terms = distill_loss([z], target, GRAPHS["single"], **kwargs)
    torch.testing.assert_close(loss, F.cross_entropy(z, target, **kwargs), rtol=1e-13, atol=0)
    summed = "sum" if reduction == "sum" else "mean"
    expected = F.cross_entropy(z, target, label_smoothing=0.2, reduction=summed)
    torch.testing.assert_close(terms, expected[None], rtol=1e-13, atol=0)


@pytest.mark.filterwarnings("ignore:reduction. 'mean'")
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
def test_kl_div_with_logits_equals_kl_div(reduction):
    s, t = random_logits(2, (5, 12), torch.float64)
    expected = F.kl_div((s / 4).log_softmax(1), (t / 4).softmax(1), reduction=reduction) * 16
    torch.testing.assert_close(
        kl_div_with_logits(s, t, temperature=4.0, reduction=reduction), expected, rtol=1e-12, atol=0
    )


def test_kl_div_with_logits_none_is_one_value_a_row():
    s, t = random_logits(2, (2, 3, 12), torch.float64)
    expected = (F.kl_div((s / 4).log_softmax(-1), (t / 4).softmax(-1), reduction="none") * 16).sum(-1)
    torch.testing.assert_close(
        kl_div_with_logits(s, t, temperature=4.0, reduction="none"), expected, rtol=1e-12, atol=0
    )
    mean = kl_div_with_logits(s, t, temperature=4.0, reduction="mean")
    torch.testing.assert_close(mean, expected.sum() / s.numel(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("detach", [True, False])
def test_kl_div_with_logits_detaches_the_teacher_on_request(detach):
    s, t = (z.requires_grad_() for z in random_logits(2, (2, 3), torch.float64))
    kl_div_with_logits(s, t, detach_teacher=detach).backward()
    assert s.grad is not None
    assert (t.grad is None) == detach or not t.grad.any()
    if not detach:
        assert torch.autograd.gradcheck(lambda a, b: kl_div_with_logits(a, b, detach_teacher=False), (s, t))


def test_kd_loss_weighs_kl_by_alpha_and_ce_by_the_rest():
    s, t = random_logits(2, (5, 12), torch.float64)
    y = torch.tensor([0, 1, 2, 3, 11])
    kl = F.kl_div((s / 4).log_softmax(1), (t / 4).softmax(1), reduction="batchmean") * 16
    expected = 0.1 * F.cross_entropy(s, y) + 0.9 * kl
    torch.testing.assert_close(kd_loss(s, t, y, temperature=4.0, alpha=0.9), expected, rtol=1e-12, atol=0)
    as_tensor = kd_loss(s, t, y, temperature=torch.tensor(4.0), alpha=torch.tensor(0.9, dtype=torch.float64))
    torch.testing.assert_close(as_tensor, expected, rtol=1e-12, atol=0)


def test_target_eps_reproduces_the_original_formula():
    logits = random_logits(3, (8, 100), torch.float64)
    y = target_for(FFL, (8, 100))
    got = run(distill_loss, logits, y, FFL, temperature=3.0, target_eps=1e-7)
    expected = run(plain_loss, logits, y, FFL, temperature=3.0, target_eps=1e-7)
    exact = run(plain_loss, logits, y, FFL, temperature=3.0)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-13, atol=0)
    for g, e in zip(got[2], expected[2], strict=True):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-16)
    assert (got[0] - exact[0]).abs() > 1e-7


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_gradcheck_with_trainable_teachers(reduction):
    # Without detached teachers the numerical derivative is the whole one.
    graph = DistillGraph(
        3, (1, 0.5, 0), ((0.25, 0.5, 0.75),), ((2, 0, 0.7, False), (3, 1, 1.3, False), (0, 2, -0.4, False))
    )
    logits = [z.requires_grad_() for z in random_logits(3, (2, 3), torch.float64, scale=1.0)]
    y = torch.tensor([2, -100])

    def loss(*z):
        return distill_loss(
            z, y, graph, temperature=1.7, label_smoothing=0.1, target_eps=0.01, reduction=reduction
        ).loss

    assert torch.autograd.gradcheck(loss, logits)


def test_what_is_detached_gets_no_gradient():
    graph = DistillGraph(2, (0, 0), (), ((1, 0, 1.0),))
    logits = [z.requires_grad_() for z in random_logits(2, (3, 5))]
    distill_loss(logits, None, graph).loss.backward()
    assert logits[0].grad.abs().max() > 0
    assert not logits[1].grad.any()
