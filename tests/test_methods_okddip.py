"""OKDDip: the loss against its formula in float64, what is detached, whose projections are shared."""

from __future__ import annotations

import pytest
import torch
from method_truths import (
    CLASSES,
    assert_learns,
    assert_learns_in_bf16,
    assert_takes_no_image,
    batch,
    ce,
    gradients,
    kl,
    make_cohort,
)

from fflfast import methods
from fflfast.cohort import Learner, StepState
from fflfast.methods.okddip import OKDDip, OKDDipOptions

UNLIKE = ("tiny", "resnet8", "tiny", "wrn_16_2")


def learner_of(networks=4, dtype=torch.float32, *, arch="tiny", options=None):
    cohort = make_cohort(networks, arch, trunk=arch == "tiny", dtype=dtype)
    return Learner(cohort, OKDDip(cohort, CLASSES, options).to(dtype))


def mixtures(method, output):
    """x_i = Σ_j softmax_j(q_i·k_j)·z_j of the peers, image by image."""
    pooled = [f.mean((2, 3)) for f in output.features[:-1]]
    queries = [f @ method.query[str(f.shape[1])].weight.T for f in pooled]
    keys = [f @ method.key[str(f.shape[1])].weight.T for f in pooled]
    found = []
    for q in queries:
        shares = torch.stack([(q * k).sum(1) for k in keys]).exp()
        shares = shares / shares.sum(0)
        found.append(sum(a[:, None] * z for a, z in zip(shares, output.logits[:-1], strict=True)))
    return found


@pytest.mark.parametrize("both_ways", [False, True], ids=["mean_detached", "leader_teaches_peers"])
@pytest.mark.parametrize(("networks", "arch"), [(3, "tiny"), (4, "tiny"), (5, "tiny"), (4, UNLIKE)], ids=str)
def test_loss_terms_and_gradients_are_the_formulas(networks, arch, both_ways):
    given, state = batch(dtype=torch.float64), StepState(kl_weight=0.25, ce_weight=0.5, temperature=2.0)

    def formula(learner, output):
        *peers, leader = output.logits
        mean = sum(peers) / len(peers)
        terms = [(0.5, ce(z, given.target)) for z in output.logits]
        terms += [(0.25, kl(x, z, 2.0)) for x, z in zip(mixtures(learner.method, output), peers, strict=True)]
        return [*terms, (0.25, kl(mean if both_ways else mean.detach(), leader, 2.0))]

    options = OKDDipOptions(leader_teaches_peers=both_ways)
    assert_learns(learner_of(networks, torch.float64, arch=arch, options=options), given, formula, state)


def test_mixtures_train_the_attention_and_every_peer_while_the_leader_trains_alone():
    learner = learner_of()
    output = learner.cohort(batch().images)
    logits = learner.method.joint_logits(output, batch())
    sum(x.square().sum() for x in logits[4:]).backward()
    moved = {name for name, gradient in gradients(learner).items() if gradient.any()}
    assert {"method.query.16.weight", "method.key.16.weight"} <= moved
    assert {f"cohort.sub_networks.{k}.fc.weight" for k in range(3)} <= moved
    assert not any(name.startswith("cohort.sub_networks.3.") for name in moved)


def test_projections_are_shared_by_peers_of_one_size_and_an_eighth_as_long():
    cohort = make_cohort(arch=("resnet8",) * 4)
    method = OKDDip(cohort, CLASSES)
    assert [tuple(p.shape) for p in method.parameters()] == [(8, 64), (8, 64)]
    unlike = OKDDip(make_cohort(arch=UNLIKE), CLASSES)
    assert {name: tuple(p.shape) for name, p in unlike.query.named_parameters()} == {
        "16.weight": (2, 16),
        "64.weight": (2, 64),
    }


def test_attention_rows_sum_to_one():
    learner = learner_of()
    attention = learner.method.attention(learner.cohort(batch().images))
    assert attention.shape == (6, 3, 3)
    torch.testing.assert_close(attention.sum(2), torch.ones(6, 3))
    assert (attention[0] != attention[1]).any()


def test_before_the_ramp_up_every_parameter_has_a_gradient():
    learner = learner_of()
    learner(batch(), StepState(kl_weight=0.0, temperature=3.0)).loss.backward()
    assert all(p.grad is not None for p in learner.parameters())


def test_predict_tells_peers_ensemble_and_leader_apart():
    learner = learner_of().eval()
    images = batch().images
    with torch.no_grad():
        named = learner.predict(images)
        logits = learner.cohort(images).logits
    assert list(named) == ["sub0", "sub1", "sub2", "ensemble", "leader"]
    torch.testing.assert_close(named["ensemble"], sum(logits[:3]) / 3)
    assert torch.equal(named["leader"], logits[3])
    assert learner.method.main_output == "leader"


@pytest.mark.parametrize("arch", ["tiny", UNLIKE], ids=str)
def test_in_bf16_and_without_images(arch):
    learner = learner_of(arch=arch)
    assert_learns_in_bf16(learner, batch(16))
    assert_takes_no_image(learner)


def test_refusals_name_and_recipe():
    with pytest.raises(ValueError, match="OKDDip: needs at least 3 sub-networks, got 2"):
        OKDDip(make_cohort(2), CLASSES)
    assert methods.resolve("okddip") is OKDDip
    assert OKDDip.recipe["weight_decay"] == 5e-4
    assert OKDDip.recipe["epochs"] == 300
