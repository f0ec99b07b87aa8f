"""KD: its formula in float64, and a teacher that stays frozen, apart from the learner's own state."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from method_truths import CLASSES, assert_learns, batch, ce, kl, make_cohort

from fflfast.cohort import Learner
from fflfast.methods import resolve
from fflfast.models import create

KD = resolve("kd")


class Teacher(torch.nn.Module):
    """Logits of a tiny network, and how often it was asked."""

    def __init__(self, seed: int = 9, classes: int = CLASSES) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.network = create("tiny", classes).eval()
        self.training = False
        self.calls = 0

    def forward(self, images):
        self.calls += 1
        return self.network(images)[0]


def learner(n: int = 1, **changes) -> Learner:
    given = {"teacher": Teacher(), **changes}
    options = KD.Options(**given.pop("options", {}))
    cohort = make_cohort(n)
    return Learner(cohort, KD(cohort, CLASSES, options, **given))


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"alpha": 0.3, "temperature": 2.0}], ids=["default", "given"])
def test_the_loss_is_the_formula(n, options):
    alpha, temperature = options.get("alpha", 0.9), options.get("temperature", 4.0)
    own = learner(n, options=options).double()

    def formula(truth, output):
        teacher = copy.deepcopy(own.method.teacher)(given.images).detach()
        return [
            *((1 - alpha, ce(z, given.target)) for z in output.logits),
            *((alpha, kl(teacher, z, temperature)) for z in output.logits),
        ]

    given = batch(dtype=torch.float64)
    assert_learns(own, given, formula)


def test_the_teacher_is_asked_once_and_learns_nothing():
    own = learner(3)
    own.train()
    teacher = own.method.teacher
    teacher.requires_grad_(True)
    before = copy.deepcopy(teacher.state_dict())
    own(batch()).loss.backward()
    assert teacher.calls == 1
    assert not teacher.network.training
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert own.term_names == ("ce/sub0", "ce/sub1", "ce/sub2", *(f"kl/teacher→sub{k}" for k in range(3)))


def test_the_teacher_moves_along_but_is_no_state():
    own = learner(2)
    names = {name for name, _ in own.named_parameters()} | own.state_dict().keys()
    assert {name for name in names if not name.startswith("cohort.")} == {"method.teacher_fingerprint"}
    own.to(torch.float64)
    assert {p.dtype for p in own.method.teacher.parameters()} == {torch.float64}


def test_another_teachers_students_are_refused():
    own, other = learner(), learner(teacher=Teacher(seed=10))
    state = own.state_dict()
    learner().load_state_dict(state)
    learner(teacher=None).load_state_dict(state)
    with pytest.raises(RuntimeError, match="another teacher trained these students"):
        other.load_state_dict(state)


def test_without_a_teacher_it_predicts_and_does_not_train():
    own = learner(2, teacher=None).eval()
    assert list(own.predict(batch().images)) == ["sub0", "sub1", "ensemble"]
    with pytest.raises(ValueError, match="KD: has no teacher"):
        own(batch())


def test_the_weights_follow_alpha():
    options = KD.Options(alpha=0.25)
    assert (options.kl_weight, options.ce_weight) == (0.25, 0.75)
    assert KD.Options(**dataclasses.asdict(options)) == options
    assert KD.Options(alpha=0.9).kl_weight == KD.Options().kl_weight
    assert KD.Options(alpha=0.5, kl_weight=2.0) == KD.Options(kl_weight=0.5, ce_weight=0.5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": 1.5}, "alpha must be a number from 0 to 1, got 1.5"),
        ({"alpha": True}, "alpha must be a number from 0 to 1, got True"),
    ],
    ids=["range", "kind"],
)
def test_wrong_options(options, words):
    with pytest.raises(ValueError, match=words):
        KD.Options(**options)


@pytest.mark.parametrize(
    ("teacher", "error", "words"),
    [
        (Teacher(classes=7), ValueError, r"expected logits \(6, 5\) of the teacher, got \(6, 7\)"),
        (lambda images: images, TypeError, "expected a teacher that is an nn.Module, got function"),
    ],
    ids=["classes", "type"],
)
def test_wrong_teachers(teacher, error, words):
    with pytest.raises(error, match=words):
        learner(teacher=teacher)(batch())


@pytest.mark.parametrize("rows", [0, 6])
def test_in_bf16_and_without_images(rows):
    own = learner(2)
    own.train(rows > 0)  # batch norms cannot take the statistics of no image
    with torch.autocast("cpu", torch.bfloat16):
        output = own(batch(rows))
    output.loss.backward()
    assert torch.isfinite(output.terms).all()
    assert rows or float(output.loss.detach()) == 0
    assert all(p.grad is not None for p in own.parameters())


def test_the_fingerprint_is_of_weights_whatever_they_are_called():
    teacher = Teacher()
    renamed = torch.nn.ModuleDict({"other": copy.deepcopy(teacher.network)})
    changed = copy.deepcopy(teacher)
    changed.network.fc.bias.data[0] += 1e-6
    prints = [KD(make_cohort(1), CLASSES, teacher=t).teacher_fingerprint for t in (teacher, renamed, changed)]
    assert torch.equal(prints[0], prints[1])
    assert not torch.equal(prints[0], prints[2])
