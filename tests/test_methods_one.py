"""ONE: the loss against its formula in float64, what the gate is trained by, and what the method refuses."""

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
from fflfast.methods import MethodOptions
from fflfast.methods.one import ONE


def learner_of(n=3, dtype=torch.float32, **options):
    cohort = make_cohort(n, trunk=True, dtype=dtype)
    return Learner(cohort, ONE(cohort, CLASSES, MethodOptions(**options)).to(dtype))


def ensemble(method, output):
    """Σ_k g_k·z_k, g = softmax(ReLU(BN(W·pool(h) + b))), with the statistics of the batch."""
    pooled = output.trunk_features.mean((2, 3))
    x = pooled @ method.gate.weight.T + method.gate.bias
    x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
    x = (method.gate_norm.weight * x + method.gate_norm.bias).clamp(min=0).exp()
    return sum(g[:, None] * z for g, z in zip((x / x.sum(1, keepdim=True)).T, output.logits, strict=True))


@pytest.mark.parametrize("n", [2, 3, 4])
def test_loss_terms_and_gradients_are_the_formulas(n):
    given, state = batch(dtype=torch.float64), StepState(kl_weight=0.25, ce_weight=0.5, temperature=2.0)

    def formula(learner, output):
        z = [*output.logits, ensemble(learner.method, output)]
        terms = [(0.5, ce(t, given.target)) for t in z]
        return terms + [(0.25, kl(z[n].detach(), t, 2.0)) for t in z[:n]]

    learner = learner_of(n, torch.float64)
    torch.nn.init.normal_(learner.method.gate_norm.weight)
    torch.nn.init.normal_(learner.method.gate_norm.bias)
    assert_learns(learner, given, formula, state)


def test_distillation_trains_the_branches_and_leaves_the_gate_alone():
    learner = learner_of()
    learner(batch(), StepState(ce_weight=0.0, temperature=3.0)).loss.backward()
    moved = {name for name, gradient in gradients(learner).items() if gradient.any()}
    assert not any(name.startswith("method.gate") for name in moved)
    assert {f"cohort.sub_networks.{k}.fc.weight" for k in range(3)} <= moved


def test_every_image_has_weights_that_sum_to_one():
    learner = learner_of()
    output = learner.cohort(batch().images)
    gates = learner.method.gates(output)
    assert gates.shape == (6, 3)
    assert (gates >= 0).all()
    torch.testing.assert_close(gates.sum(1), torch.ones(6))
    assert (gates[0] != gates[1]).any()


def test_predict_gives_the_gated_ensemble_and_changes_nothing():
    learner = learner_of().eval()
    images = batch().images
    before = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    with torch.no_grad():
        named = learner.predict(images)
        gates = learner.method.gates(learner.cohort(images))
    assert list(named) == ["sub0", "sub1", "sub2", "ensemble"]
    expected = sum(gates[:, k, None] * named[f"sub{k}"] for k in range(3))
    torch.testing.assert_close(named["ensemble"], expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.state_dict().items())
    assert learner.method.main_output in named


def test_in_bf16_in_channels_last_and_without_images():
    learner = learner_of()
    assert_learns_in_bf16(learner, batch(16))
    assert_takes_no_image(learner)
    given = batch()
    other = given._replace(images=given.images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(learner(other).loss, learner(given).loss)


def test_a_cohort_without_a_trunk_is_refused():
    with pytest.raises(ValueError, match=r"ONE: its gate reads the trunk .* split equal networks"):
        ONE(make_cohort(2), CLASSES)
    assert "--trunk auto" in ONE.refusal({"trunk": "none"})
    assert ONE.refusal({"trunk": "layer3"}) is None
    with pytest.raises(ValueError, match="at least 2"):
        ONE(make_cohort(1, trunk=True), CLASSES)


def test_a_trunk_that_gives_no_map_is_named():
    learner = learner_of()
    output = learner.cohort(batch().images)
    tokens = output._replace(trunk_features=output.trunk_features.flatten(2))
    with pytest.raises(ValueError, match=r"ONE: expected a trunk that gives feature maps .* got shape \(6, 8, 16\)"):
        learner.method.gates(tokens)


def test_name_and_recipe():
    assert methods.resolve("one") is ONE
    assert ONE.recipe["weight_decay"] == 1e-4
    assert (MethodOptions().temperature, MethodOptions().ramp_up_epochs) == (3.0, 80.0)
