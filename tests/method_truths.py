"""What tests of methods share: small cohorts and batches, and the formulas of a loss in plain float64.

`assert_learns` holds a method against a formula that a test writes down from the outputs of the sub-networks: loss,
terms and the gradient of every parameter. What a method detaches shows in those gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fflfast import models
from fflfast.cohort import Cohort, CohortOutput, Learner, StepState
from fflfast.data import Batch

CLASSES = 5


def kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """T² · KL(softmax(teacher/T) ‖ softmax(student/T)) of logits (B, …, C), mean over the B rows; detaches nothing."""
    log_t, log_s = (F.log_softmax(z / temperature, -1) for z in (teacher, student))
    return temperature**2 * (log_t.exp() * (log_t - log_s)).sum() / max(len(student), 1)


def ce(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of logits (B, C), mean over the rows; the target holds class indices or probabilities."""
    hot = target if target.is_floating_point() else F.one_hot(target, logits.shape[-1])
    return -(hot.to(logits.dtype) * F.log_softmax(logits, -1)).sum() / max(len(logits), 1)


def make_cohort(
    n: int = 2,
    arch: str | Sequence[str] = "tiny",
    *,
    trunk: bool = False,
    classes: int = CLASSES,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Cohort:
    """N sub-networks in training mode, with a trunk split off where each network is split by default.

    Args:
        n: how many; ignored where ``arch`` lists them.
        arch: one name for all, or one a sub-network.
        trunk: whether they share their low layers, which needs one architecture.
        classes, dtype, seed: of the networks and their weights.
    """
    torch.manual_seed(seed)
    names = [arch] * n if isinstance(arch, str) else list(arch)
    nets = [models.create(name, classes) for name in names]
    if not trunk:
        return Cohort(nets).to(dtype)
    pairs = [models.split(net, net.default_split) for net in nets]
    return Cohort([above for _, above in pairs], pairs[0][0]).to(dtype)


def batch(
    rows: int = 6,
    size: int = 8,
    classes: int = CLASSES,
    views: int = 1,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Batch:
    """Normal images (rows, 3, size, size), class indices, and the places 0 … rows−1; several views make a tuple."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(rows, 3, size, size, generator=generator, dtype=torch.float64) for _ in range(views)]
    target = torch.randint(classes, (rows,), generator=generator)
    given = [image.to(dtype) for image in images]
    return Batch(given[0] if views == 1 else tuple(given), target, torch.arange(rows))


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """The gradient of every parameter by name, zeros where there is none."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in module.named_parameters()}


def assert_learns(
    learner: Learner,
    given: Batch,
    formula: Callable[[Learner, CohortOutput], Sequence[tuple[float, Tensor]]],
    state: StepState | None = None,
    *,
    rtol: float = 1e-9,
) -> None:
    """Hold the loss, the terms and every gradient of a step in float64 against a formula.

    Args:
        learner: in float64; it takes no gradient along and stays as it is.
        given: a batch in float64.
        formula: of a copy of the learner and its cohort's output with a graph, returns weight and value of each term,
            in the order of ``learner.term_names``.
        state: of the step.
        rtol: the relative difference that is allowed.
    """
    ours, truth = deepcopy(learner), deepcopy(learner)
    got = ours(given, state)
    got.loss.backward()
    output = truth.cohort(given.images, truth.method.beside(given.images))
    weighted = formula(truth, output)
    expected = torch.stack([weight * value for weight, value in weighted]).sum()
    expected.backward()
    terms = torch.stack([value.detach() for _, value in weighted])
    assert len(learner.term_names) == len(terms)
    torch.testing.assert_close(got.terms, terms, rtol=rtol, atol=1e-12)
    torch.testing.assert_close(got.loss.detach(), expected.detach(), rtol=rtol, atol=1e-12)
    wanted = gradients(truth)
    for name, gradient in gradients(ours).items():
        floor = rtol * float(wanted[name].abs().max()) + 1e-13
        torch.testing.assert_close(
            gradient, wanted[name], rtol=rtol, atol=floor, msg=lambda text, n=name: f"{n}: {text}"
        )


def assert_learns_in_bf16(learner: Learner, given: Batch) -> None:
    """A step under bf16 autocast: the loss is close to that in float32, and every gradient is there and finite."""
    exact = deepcopy(learner)(given).loss.item()
    learner = deepcopy(learner)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = learner(given)
    assert got.loss.dtype == torch.float32
    assert abs(got.loss.item() - exact) < 0.03 * abs(exact)
    got.loss.backward()
    for name, parameter in learner.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


def assert_takes_no_image(learner: Learner, views: int = 1, size: int = 8) -> None:
    """A share without images, its norms evaluating as in training: loss and terms 0, every gradient there and 0."""
    learner = deepcopy(learner)
    for module in learner.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    got = learner(batch(0, size, views=views))
    got.loss.backward()
    assert got.loss.item() == 0
    assert not got.terms.any()
    for name, parameter in learner.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name
