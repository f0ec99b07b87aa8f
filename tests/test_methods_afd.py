"""AFD: the loss and its gradients against plain float64, and who learns from which term."""

from __future__ import annotations

import pytest
import torch
from method_truths import CLASSES, assert_learns, batch, ce, kl, make_cohort
from steps import Reads
from torch import nn

from fflfast import models
from fflfast.cohort import Cohort, Learner, StepState
from fflfast.methods import resolve
from fflfast.methods.afd import AFD, AFDOptions

DOUBLE = torch.float64


class Large(nn.Module):
    """A network whose feature map, 6 channels of 4 × 4, is larger than that of "tiny", 16 of 2 × 2."""

    feature_channels = 6

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.Linear(6, CLASSES)

    def forward(self, x):
        feature_map = self.conv(x).relu()
        return self.head(feature_map.mean((2, 3))), feature_map


def learner(cohort, **options):
    torch.manual_seed(1)
    method = AFD(cohort, CLASSES, AFDOptions(**{"discriminator_channels": 5, **options}))
    return Learner(cohort, method).to(next(cohort.parameters()).dtype)


def judged(discriminator, x, *, fixed=False):
    """D(x) in (0, 1) as its docstring has it, from the weights alone; ``fixed``: no gradient reaches them."""
    weights = [p.detach() if fixed else p for p in discriminator.parameters()]
    for kernel, bias, scale, shift in (weights[:4], weights[4:8]):
        x = nn.functional.conv2d(x, kernel, bias, padding=1)
        centred = x - x.mean((1, 2, 3), keepdim=True)
        x = centred / (centred.square().mean((1, 2, 3), keepdim=True) + 1e-5).sqrt()
        x = x * scale[:, None, None] + shift[:, None, None]
        x = torch.where(x > 0, x, 0.2 * x)
    score = nn.functional.conv2d(x, weights[8], weights[9], padding=1).mean((1, 2, 3))
    return 1 / (1 + (-score).exp())


def smaller(x):
    """4 × 4 → 2 × 2 by means."""
    return x.unflatten(3, (2, 2)).unflatten(2, (2, 2)).mean((3, 5))


def formula(target, *, temperature, kl_weight=1.0, ce_weight=1.0, weight):
    def terms(truth, output):
        z, n = output.logits, len(output.logits)
        method, fooling, telling = truth.method, [], []
        for k in range(n):
            real, fake = output.features[k - 1].detach(), output.features[k]
            if real.shape[1] != fake.shape[1]:
                fake = nn.functional.conv2d(fake, method.transfers[k].weight)
            if real.shape[2:] != fake.shape[2:]:
                real, fake = (smaller(x) if x.shape[3] == 4 else x for x in (real, fake))
            discriminator = method.discriminators[k]
            fooling.append(((1 - judged(discriminator, fake, fixed=True)) ** 2).mean())
            telling.append(
                ((1 - judged(discriminator, real)) ** 2).mean() + (judged(discriminator, fake.detach()) ** 2).mean()
            )
        return [
            *((ce_weight, ce(x, target)) for x in z),
            *((kl_weight, kl(z[k - 1].detach(), z[k], temperature)) for k in range(n)),
            *((weight, term) for term in fooling),
            *((1.0, term) for term in telling),
        ]

    return terms


@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_loss_is_its_formula(n):
    given = batch(dtype=DOUBLE)
    assert_learns(
        learner(make_cohort(n, dtype=DOUBLE), adversarial_weight=0.7),
        given,
        formula(given.target, temperature=3.0, weight=0.7),
    )


def test_unlike_networks_meet_in_channels_and_size():
    torch.manual_seed(0)
    nets = [models.create("tiny", CLASSES), Large(), models.create("tiny", CLASSES)]
    given = batch(dtype=DOUBLE)
    own = learner(Cohort(nets).to(DOUBLE), adversarial_weight=0.4)
    shapes = [None if isinstance(t, nn.Identity) else tuple(t.weight.shape) for t in own.method.transfers]
    assert shapes == [None, (16, 6, 1, 1), (6, 16, 1, 1)]  # learns from: tiny, tiny, large
    state = StepState(kl_weight=0.5, ce_weight=0.75, temperature=2.0)
    assert_learns(own, given, formula(given.target, temperature=2.0, kl_weight=0.5, ce_weight=0.75, weight=0.4), state)


def test_each_term_moves_one_side_alone():
    own = learner(make_cohort(3))
    output = own.cohort(batch().images)
    terms = own.method.extra_terms(output, batch(), None)
    for k in range(3):
        maps = torch.autograd.grad(terms[k][1], output.features, retain_graph=True, allow_unused=True)
        assert [g is not None and bool(g.any()) for g in maps] == [j == k for j in range(3)]
        weights = [p for d in own.method.discriminators for p in d.parameters()]
        assert torch.autograd.grad(terms[k][1], weights, retain_graph=True, allow_unused=True) == (None,) * 30
        assert (
            torch.autograd.grad(terms[3 + k][1], output.features, retain_graph=True, allow_unused=True) == (None,) * 3
        )
        moved = torch.autograd.grad(terms[3 + k][1], weights, retain_graph=True, allow_unused=True)
        assert [g is not None for g in moved] == [j == k for j in range(3) for _ in range(10)]


def test_networks_fool_and_discriminators_tell():
    own, given = learner(make_cohort(2, dtype=DOUBLE)), batch(dtype=DOUBLE)
    method = own.method

    def values():
        return [value for _, value in method.extra_terms(own.cohort(given.images), given, None)]

    for chosen, parameters in ((slice(2), own.cohort.parameters()), (slice(2, 4), method.parameters())):
        before = torch.stack(values()[chosen])
        moving = list(parameters)
        for p, g in zip(moving, torch.autograd.grad(before.sum(), moving, allow_unused=True), strict=True):
            if g is not None:  # the classifiers have no part in it
                p.data.sub_(g, alpha=1e-4)
        assert (torch.stack(values()[chosen]) < before).all()


def test_discriminators_have_an_optimizer_of_their_own():
    own = learner(make_cohort(2), discriminator_lr=3e-5, discriminator_weight_decay=0.2)
    options = own.method.parameter_options()
    assert options == {"discriminators": {"optimizer": "adam", "lr": 3e-5, "weight_decay": 0.2}}
    names = {name for name, _ in own.method.named_parameters()}
    assert all(name.startswith("discriminators.") for name in names)
    assert AFD.shared_stages == -1
    assert resolve("afd") is AFD


def test_names_of_terms_and_outputs():
    own = learner(make_cohort(3))
    assert own.term_names[-6:] == (
        "adversarial/sub2→sub0", "adversarial/sub0→sub1", "adversarial/sub1→sub2",
        "discriminator/sub0", "discriminator/sub1", "discriminator/sub2",
    )  # fmt: skip
    with torch.no_grad():
        assert list(own.eval().predict(batch().images)) == ["sub0", "sub1", "sub2", "ensemble"]


def test_an_empty_share_gives_zeros_with_a_graph():
    own = learner(make_cohort(2)).eval()
    out = own(batch(0))
    assert out.loss == 0
    assert not out.terms.any()
    out.loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in own.parameters())


def test_under_autocast_scores_are_in_float32():
    own, given = learner(make_cohort(2)), batch()
    plain = own(given)
    with torch.autocast("cpu", torch.bfloat16):
        out = own(given)
        values = [value for _, value in own.method.extra_terms(own.cohort(given.images), given, None)]
    assert all(value.dtype == torch.float32 for value in values)
    torch.testing.assert_close(out.terms[4:], plain.terms[4:], rtol=0.02, atol=0.01)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in own.parameters())


def test_a_step_asks_the_device_nothing():
    own = learner(make_cohort(2))
    with Reads() as reads:
        own(batch()).loss.backward()
    assert reads.count == 0


@pytest.mark.parametrize(
    "options",
    [{"adversarial_weight": -1.0}, {"discriminator_channels": 0}, {"discriminator_channels": 2.5},
     {"discriminator_lr": -1e-5}, {"discriminator_weight_decay": float("nan")}],
)  # fmt: skip
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match=f"AFDOptions: {next(iter(options))}"):
        AFDOptions(**options)


def test_networks_without_feature_maps_are_refused():
    nets = [models.create("tiny", CLASSES), Large()]
    nets[1].feature_channels = None
    with pytest.raises(ValueError, match=r"AFD: sub-network 1 .*no spatial feature map"):
        AFD(Cohort(nets), CLASSES)
    with pytest.raises(ValueError, match="at least 2"):
        AFD(Cohort(nets[:1]), CLASSES)
