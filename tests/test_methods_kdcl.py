"""KDCL: the formula of each form in float64, one view a network, and the convex problem of the linear form."""

from __future__ import annotations

import itertools

import pytest
import torch
from method_truths import CLASSES, assert_learns, batch, ce, kl, make_cohort

from fflfast.cohort import Learner
from fflfast.methods import resolve

KDCL = resolve("kdcl")


def learner(n: int = 2, ensemble: str = "min_logit", arch="tiny", dtype: torch.dtype = torch.float32) -> Learner:
    cohort = make_cohort(n, arch, dtype=dtype)
    return Learner(cohort, KDCL(cohort, CLASSES, KDCL.Options(ensemble=ensemble)))


def naive(z, target):
    return min(z, key=lambda own: float(ce(own, target)))


def min_logit(z, target):
    rows = [[own[b] - own[b, target[b]] for own in z] for b in range(len(target))]
    return torch.stack([torch.stack(row).min(0).values for row in rows])


def test_the_names():
    own = learner(3)
    assert own.method.num_views == 3
    assert own.method.output_names == ("sub0", "sub1", "sub2")
    assert own.term_names[3:] == ("kl/teacher→sub0", "kl/teacher→sub1", "kl/teacher→sub2")


@pytest.mark.parametrize(
    ("n", "arch"), [(2, "tiny"), (3, "tiny"), (4, "tiny"), (2, ["tiny", "resnet8"])], ids=["2", "3", "4", "unlike"]
)
@pytest.mark.parametrize("form", [naive, min_logit], ids=lambda form: form.__name__)
def test_the_loss_is_the_formula(n, arch, form):
    given = batch(views=n, dtype=torch.float64)

    def formula(truth, output):
        teacher = form([z.detach() for z in output.logits], given.target)
        return [
            *((1.0, ce(z, given.target)) for z in output.logits),
            *((1.0, kl(teacher, z, 3.0)) for z in output.logits),
        ]

    assert_learns(learner(n, form.__name__, arch, torch.float64), given, formula)


def logits(n: int, seed: int, scale: float):
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(1, 64, CLASSES, generator=generator, dtype=torch.float64)
    own = torch.randn(n, 64, CLASSES, generator=generator, dtype=torch.float64)
    target = torch.randint(CLASSES, (64,), generator=generator)
    z = scale * (common + (0.2 + torch.rand(n, 1, 1, generator=generator, dtype=torch.float64)) * own)
    z[:, torch.arange(64), target] += scale * torch.rand(n, 1, generator=generator, dtype=torch.float64)
    return tuple(z), target


def simplex(n: int, parts: int):
    """Every point of the simplex whose coordinates are multiples of 1/parts."""
    for point in itertools.product(range(parts + 1), repeat=n - 1):
        if sum(point) <= parts:
            yield torch.tensor([*point, parts - sum(point)], dtype=torch.float64) / parts


@pytest.mark.parametrize(("n", "parts"), [(2, 400), (3, 60), (4, 24)])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("soft", [False, True], ids=["classes", "probabilities"])
def test_the_linear_form_has_the_lowest_cross_entropy(n, parts, scale, soft):
    z, target = logits(n, seed=n, scale=scale)
    if soft:
        target = torch.nn.functional.one_hot(target, CLASSES).double() * 0.8 + 0.2 / CLASSES
    stacked = torch.stack(z)
    lowest = min(float(ce(torch.tensordot(alpha, stacked, 1), target)) for alpha in simplex(n, parts))
    for own in (z, tuple(part.float() for part in z)):
        teacher = learner(n, "linear").method.teacher_logits(own, target)
        assert teacher.dtype == own[0].dtype
        assert float(ce(teacher.double(), target)) <= lowest * 1.001


def test_the_linear_form_is_a_convex_combination_that_is_taught_detached():
    given = batch(views=3, dtype=torch.float64)

    def formula(truth, output):
        z = torch.stack(output.logits).detach()
        teacher = truth.method.teacher_logits(output.logits, given.target)
        alpha = torch.linalg.lstsq(z.flatten(1).T, teacher.flatten()[:, None]).solution
        assert float(alpha.min()) > -1e-9
        torch.testing.assert_close(alpha.sum(), torch.ones((), dtype=torch.float64))
        torch.testing.assert_close(torch.tensordot(alpha[:, 0], z, 1), teacher)
        return [
            *((1.0, ce(own, given.target)) for own in output.logits),
            *((1.0, kl(teacher.detach(), own, 3.0)) for own in output.logits),
        ]

    assert_learns(learner(3, "linear", dtype=torch.float64), given, formula)


def test_autocast_does_not_round_the_search():
    z, target = logits(3, seed=3, scale=1.0)
    z = tuple(part.float() for part in z)
    method = learner(3, "linear").method
    expected = method.teacher_logits(z, target)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(method.teacher_logits(z, target), expected)


def test_of_equal_networks_any_combination_will_do():
    z, target = logits(1, seed=0, scale=1.0)
    for form in ("naive", "linear"):
        teacher = learner(2, form).method.teacher_logits((z[0], z[0]), target)
        torch.testing.assert_close(teacher, z[0])


def test_min_logit_needs_classes():
    own = learner()
    soft = torch.full((6, CLASSES), 1 / CLASSES)
    with pytest.raises(ValueError, match="min_logit needs one class an image, got probabilities"):
        own(batch(views=2)._replace(target=soft))
    settings = {"options": {"ensemble": "min_logit"}, "mixup": 0.2, "cutmix": 0.0}
    assert "take --options.ensemble linear" in KDCL.refusal(settings)
    assert KDCL.refusal({**settings, "options": {"ensemble": "naive"}}) is None
    assert KDCL.refusal({**settings, "mixup": 0.0}) is None


def test_wrong_options():
    with pytest.raises(ValueError, match="ensemble must be one of naive, linear, min_logit, got 'best'"):
        KDCL.Options(ensemble="best")


@pytest.mark.parametrize("form", ["naive", "linear", "min_logit"])
@pytest.mark.parametrize("rows", [0, 6])
def test_in_bf16_and_without_images(rows, form):
    own = learner(3, form)
    own.train(rows > 0)
    with torch.autocast("cpu", torch.bfloat16):
        output = own(batch(rows, views=3))
    output.loss.backward()
    assert torch.isfinite(output.terms).all()
    assert rows or float(output.loss.detach()) == 0
    assert all(p.grad is not None for p in own.parameters())


@pytest.mark.parametrize("form", ["naive", "linear", "min_logit"])
def test_ignored_rows_decide_nothing(form):
    method = learner(2, form).method
    z, target = logits(2, 5, 3.0)
    holes = target.clone()
    holes[::3] = -100
    counted = holes >= 0
    z = torch.stack(z)
    z[:, ~counted] *= 50
    whole = method.teacher_logits(tuple(z), holes)[counted]
    part = method.teacher_logits(tuple(z[:, counted]), holes[counted])
    torch.testing.assert_close(whole, part, rtol=1e-5, atol=1e-5)
