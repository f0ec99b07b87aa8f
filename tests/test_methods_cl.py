"""CL: its formula in float64, and the trunk's rescaled gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from method_truths import CLASSES, assert_learns, batch, ce, gradients, kl, make_cohort

from fflfast.cohort import Learner
from fflfast.methods import resolve

CL = resolve("cl")


def learner(n: int, arch="tiny", trunk: bool = False, dtype: torch.dtype = torch.float32) -> Learner:
    cohort = make_cohort(n, arch, trunk=trunk, dtype=dtype)
    return Learner(cohort, CL(cohort, CLASSES))


def formula_of(given):
    def formula(truth, output):
        z = output.logits
        others = [sum(z[j].detach() for j in range(len(z)) if j != i) / (len(z) - 1) for i in range(len(z))]
        return [
            *((0.5, ce(own, given.target)) for own in z),
            *((0.5, kl(teacher, own, 2.0)) for teacher, own in zip(others, z, strict=True)),
        ]

    return formula


@pytest.mark.parametrize(
    ("n", "arch"), [(2, "tiny"), (3, "tiny"), (4, "tiny"), (2, ["tiny", "resnet8"])], ids=["2", "3", "4", "unlike"]
)
def test_the_loss_is_the_formula(n, arch):
    given = batch(dtype=torch.float64)
    assert_learns(learner(n, arch, dtype=torch.float64), given, formula_of(given))


@pytest.mark.parametrize("n", [2, 3])
def test_shared_layers_get_the_mean_of_what_the_heads_send(n):
    given = batch(dtype=torch.float64)
    own = learner(n, trunk=True, dtype=torch.float64)
    plain = copy.deepcopy(own)
    plain.cohort.trunk_gradient_scale = 1.0
    own(given).loss.backward()
    output = plain.cohort(given.images)
    sum(weight * value for weight, value in formula_of(given)(plain, output)).backward()
    wanted = gradients(plain)
    assert any(name.startswith("cohort.trunk.") for name in wanted)
    for name, gradient in gradients(own).items():
        scale = 1 / n if name.startswith("cohort.trunk.") else 1.0
        torch.testing.assert_close(gradient, scale * wanted[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rows", [0, 6])
def test_in_bf16_and_without_images(rows):
    own = learner(3, trunk=True)
    own.train(rows > 0)
    with torch.autocast("cpu", torch.bfloat16):
        output = own(batch(rows))
    output.loss.backward()
    assert torch.isfinite(output.terms).all()
    assert rows or float(output.loss.detach()) == 0
    assert all(p.grad is not None for p in own.parameters())
