"""PCL: the loss against its formula in float64, and averages that follow the weights, bit for bit or not at all."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from method_truths import (
    CLASSES,
    assert_learns,
    assert_learns_in_bf16,
    assert_takes_no_image,
    batch,
    ce,
    kl,
    make_cohort,
)

from fflfast import methods
from fflfast.cohort import Learner, StepState
from fflfast.methods.pcl import PCL, PCLOptions

UNLIKE = ("tiny", "resnet8", "wrn_16_2")


def learner_of(n=3, dtype=torch.float32, *, arch="tiny", trunk=True, **options):
    cohort = make_cohort(n, arch, trunk=trunk and arch == "tiny", dtype=dtype)
    learner = Learner(cohort, PCL(cohort, CLASSES, PCLOptions(**options)).to(dtype))
    move(learner.method.ema)  # so that averages and weights differ
    return learner


@torch.no_grad()
def move(module):
    """Change every parameter, as a step would."""
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.05)


def bits(tensors):
    return [t.detach().clone().contiguous().reshape(-1).view(torch.uint8) for t in tensors]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def averaged_logits(ema, views):
    """Logits of the averaged peers, each on its view; a trunk sees all views in one batch."""
    if ema.trunk is not None:
        views = ema.trunk(torch.cat(views)).chunk(len(views))
    return [net(view)[0].detach() for net, view in zip(ema.sub_networks, views, strict=True)]


@pytest.mark.parametrize(
    ("n", "arch", "trunk"),
    [(2, "tiny", True), (3, "tiny", True), (4, "tiny", True), (3, "tiny", False), (3, UNLIKE, False)],
    ids=str,
)
def test_loss_terms_and_gradients_are_the_formulas(n, arch, trunk):
    given, state = batch(views=n, dtype=torch.float64), StepState(kl_weight=0.25, ce_weight=0.5, temperature=2.0)

    def formula(learner, output):
        z, head = output.logits, learner.method.head
        together = torch.cat([f.mean((2, 3)) for f in output.features], 1) @ head.weight.T + head.bias
        averaged = averaged_logits(learner.method.ema, given.images)
        terms = [(0.5, ce(t, given.target)) for t in (*z, together)]
        terms += [(0.25, kl(together.detach(), t, 2.0)) for t in z]
        others = [(i, k) for i in range(n) for k in range(n) if k != i]
        return terms + [(0.25 / (n - 1), kl(averaged[k], z[i], 2.0)) for i, k in others]

    learner = learner_of(n, torch.float64, arch=arch, trunk=trunk)
    assert_learns(learner, given, formula, state)


def test_the_head_learns_from_its_labels_alone_and_every_peer_from_the_head():
    learner = learner_of()
    learner(batch(views=3), StepState(ce_weight=0.0, temperature=3.0)).loss.backward()
    assert not learner.method.head.weight.grad.any()
    output = learner.cohort(batch(views=3).images)
    learner.zero_grad()
    learner.method.ensemble_logits(output).square().sum().backward()
    for part in (learner.cohort.trunk, *learner.cohort.sub_networks):
        assert next(part.parameters()).grad.abs().max() > 0


def test_averaged_networks_run_once_a_step_in_training_mode_and_get_no_gradient():
    learner = learner_of()
    ema, calls = learner.method.ema, []
    for part in (ema.trunk, *ema.sub_networks, learner.cohort.trunk, *learner.cohort.sub_networks):
        part.register_forward_hook(lambda module, inputs, output: calls.append(module))
    before = deepcopy(ema.state_dict())
    learner(batch(views=3)).loss.backward()
    assert sorted(map(id, calls)) == sorted(
        id(part) for c in (ema, learner.cohort) for part in (c.trunk, *c.sub_networks)
    )
    assert all(p.grad is None and not p.requires_grad for p in ema.parameters())
    after = ema.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "running" in name or "num_batches" in name}


def test_one_tensor_stands_for_views_that_are_alike():
    learner = learner_of()
    given = batch(views=1)
    alike = given._replace(images=(given.images,) * 3)
    torch.testing.assert_close(deepcopy(learner)(given).terms, deepcopy(learner)(alike).terms)


def test_averages_follow_the_weights_as_the_formula_says():
    learner = learner_of(2, decay=0.7)
    expected = [p.detach().double() for p in learner.method.ema.parameters()]
    buffers = bits(learner.method.ema.buffers())
    for t in range(6):
        move(learner.cohort)
        learner.method.after_step()
        d = min(1 - 1 / (t + 1), 0.7)
        expected = [
            d * mean + (1 - d) * p.detach().double()
            for mean, p in zip(expected, learner.cohort.parameters(), strict=True)
        ]
        for got, wanted in zip(learner.method.ema.parameters(), expected, strict=True):
            torch.testing.assert_close(got.detach().double(), wanted, rtol=1e-5, atol=1e-6)
        if t == 0:
            assert same(bits(learner.method.ema.parameters()), bits(learner.cohort.parameters()))
    assert learner.method.updates.item() == 6
    assert same(bits(learner.method.ema.buffers()), buffers)


def test_a_step_that_was_left_out_leaves_every_bit_and_a_good_one_says_so_in_no_bit():
    learner = learner_of(2)
    for steps in range(2):
        torch.nn.init.constant_(next(learner.method.ema.parameters()), -0.0)
        before = bits(learner.method.state_dict().values())
        learner.method.after_step(torch.tensor(True))
        assert same(bits(learner.method.state_dict().values()), before)
        other = deepcopy(learner)
        learner.method.after_step(torch.tensor(False))
        other.method.after_step()
        assert same(bits(learner.method.state_dict().values()), bits(other.method.state_dict().values()))
        assert learner.method.updates.item() == steps + 1
        move(learner.cohort)


def test_averages_change_in_place_and_those_of_a_copy_follow_the_copy():
    learner = learner_of(2)
    places = [t.data_ptr() for t in learner.method.state_dict().values()]
    learner.method.after_step()
    learner.method.after_step(torch.tensor(False))
    assert [t.data_ptr() for t in learner.method.state_dict().values()] == places
    other = deepcopy(learner)
    move(other.cohort)
    before = bits(learner.method.ema.parameters())
    other.method.after_step()
    assert same(bits(learner.method.ema.parameters()), before)
    assert not same(bits(other.method.ema.parameters()), before)


def test_a_learner_that_was_loaded_goes_on_with_the_same_bits():
    first, second = learner_of(2), learner_of(2)
    for _ in range(3):
        move(first.cohort)
        first.method.after_step()
    second.load_state_dict(first.state_dict())
    for learner in (first, second):
        torch.manual_seed(7)
        move(learner.cohort)
        learner(batch(views=2)).loss.backward()
        learner.method.after_step()
    assert same(bits(first.state_dict().values()), bits(second.state_dict().values()))


def test_predict_shows_peers_ensemble_and_averages():
    learner = learner_of().eval()
    images = batch().images
    with torch.no_grad():
        named = learner.predict(images)
        averaged = learner.method.ema(images).logits
        output = learner.cohort(images)
        head = learner.method.head(torch.cat([f.mean((2, 3)) for f in output.features], 1))
    assert list(named) == ["sub0", "sub1", "sub2", "ensemble", "ema0", "ema1", "ema2"]
    assert all(torch.equal(named[f"ema{k}"], averaged[k]) for k in range(3))
    torch.testing.assert_close(named["ensemble"], head)
    assert (named["ema0"] != named["sub0"]).any()
    assert learner.method.main_output == "ema0"


@pytest.mark.parametrize("arch", ["tiny", UNLIKE], ids=str)
def test_in_bf16_and_without_images(arch):
    learner = learner_of(arch=arch)
    assert_learns_in_bf16(learner, batch(16, views=3))
    assert_takes_no_image(learner, views=3)


def test_it_says_what_it_cannot_take():
    assert "averages its peers itself" in PCL.refusal({"ema": 0.99, "teacher": None})
    assert "own ensemble and averages" in PCL.refusal({"ema": 0.0, "teacher": "runs/resnet110"})
    assert PCL.refusal({"ema": 0.0, "teacher": None}) is None
    with pytest.raises(ValueError, match="at least 2"):
        PCL(make_cohort(1), CLASSES)
    for decay in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="PCLOptions: decay"):
            PCLOptions(decay=decay)


def test_name_views_and_recipe():
    assert methods.resolve("pcl") is PCL
    assert learner_of(4).method.num_views == 4
    assert PCL.recipe["weight_decay"] == 5e-4
    assert PCLOptions().decay == 0.999
