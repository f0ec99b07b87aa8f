"""OKDHP: the loss against its formula in float64, what learns from what, and what the method refuses."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from method_truths import assert_learns, assert_learns_in_bf16, gradients, make_cohort

from fflfast import methods, models
from fflfast.cohort import Cohort, Learner, StepState
from fflfast.data import Batch
from fflfast.methods.okdhp import OKDHP, OKDHPOptions

JOINTS = 3


def learner_of(names=("hourglass2",) * 2, at="stack1", dtype=torch.float32, **options):
    torch.manual_seed(0)
    nets = [models.create(f"{name}@1/32", JOINTS) for name in names]
    if len(nets) == 1:
        cohort = Cohort(nets)
    else:
        pairs = [models.split(net, at) for net in nets]
        cohort = Cohort([branch for _, branch in pairs], pairs[0][0])
    return Learner(cohort, OKDHP(cohort, JOINTS, OKDHPOptions(**options))).to(dtype)


def batch(rows=4, size=32, dtype=torch.float32, seed=0):
    """Images and joints, some of which are hidden and some of which lie outside."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(rows, 3, size, size, generator=generator, dtype=torch.float64)
    places = torch.rand(rows, JOINTS, 2, generator=generator, dtype=torch.float64) * 1.2 * size - 0.1 * size
    seen = (torch.rand(rows, JOINTS, 1, generator=generator) < 0.7).to(torch.float64)
    return Batch(images.to(dtype), torch.cat([places, seen], -1).to(dtype), torch.arange(rows))


def targets(joints, cells, size, sigma):
    """G and v: Gaussians around the joints' nearest cells, for those that are seen and within 3σ of the map."""
    centre = ((joints[..., :2] + 0.5) * cells / size - 0.5 + 0.5).floor()
    away = torch.arange(cells, dtype=torch.float64) - centre[..., None]  # (B, J, 2, cells)
    near = (away.abs() <= 3 * sigma).to(torch.float64)
    shape = near * torch.exp(-(away**2) / (2 * sigma**2))
    v = (joints[..., 2] > 0) * near.amax(-1).prod(-1)
    return shape[:, :, 1, :, None] * shape[:, :, 0, None, :] * v[..., None, None], v


def unit(fau, stem):
    """Weights (B, N, J) with the convolutions' norms on the statistics of the batch, as code and figure draw it."""
    maps = []
    for conv, norm, _ in fau.convs:
        x = F.conv2d(stem, conv.weight, conv.bias, padding=conv.kernel_size[0] // 2)
        x = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
        maps.append((norm.weight[:, None, None] * x + norm.bias[:, None, None]).clamp(min=0))
    if fau.mix is None:
        v = sum(maps).mean(-1).mean(-1)
    else:  # 1×1 convolutions, concatenation, pool; beside it pool, 1×1 convolution
        mixed = [F.conv2d(x, m.weight[:, :, None, None], m.bias) for x, m in zip(maps, fau.mix, strict=False)]
        v = torch.cat([torch.cat(mixed, 1).mean((2, 3)), stem.mean((2, 3)) @ fau.mix[3].weight.T + fau.mix[3].bias], 1)
    a = v @ fau.reduce.weight.T + fau.reduce.bias
    branches, joints = fau.shape
    scores = [
        a @ fau.select.weight[n * joints : (n + 1) * joints].T + fau.select.bias[n * joints : (n + 1) * joints]
        for n in range(branches)
    ]
    return torch.stack(scores, 1).softmax(1)


def divergence(teacher, student, v, temperature):
    """T²/(B·h·w) · Σ KL of softmaxes over the pixels of maps times v, joint by joint as the published code has it."""
    total = torch.zeros((), dtype=torch.float64)
    for j in range(teacher.shape[1]):
        log_t, log_s = (
            F.log_softmax(maps[:, j].flatten(1) * v[:, j, None] / temperature, 1) for maps in (teacher, student)
        )
        total = total + (log_t.exp() * (log_t - log_s)).sum()
    return temperature**2 * total / len(teacher) / teacher[0, 0].numel()


def formula_of(given, mu=1.0, lam=1.0, ens=1.0, temperature=1.0, sigma=2.0):
    def formula(learner, output):
        heads = [*output.trunk_stages[1:]]
        for stages, last in zip(output.stages, output.logits, strict=True):
            heads += [*stages, last]
        size = given.images.shape[-1]
        truth, v = targets(given.target, heads[0].shape[-1], size, sigma)

        def error(maps):
            return (
                0.5 * sum(((maps - truth) * v[..., None, None])[:, j].square().mean() for j in range(JOINTS)) / JOINTS
            )

        terms = [(mu, error(maps)) for maps in heads]
        if len(output.logits) == 1:
            return terms
        a = unit(learner.method.fau, output.trunk_stages[0])
        m = sum(a[:, n, :, None, None] * maps for n, maps in enumerate(output.logits))
        return [*terms, (ens, error(m)), *((lam, divergence(m, maps, v, temperature)) for maps in heads)]

    return formula


@pytest.mark.parametrize("fau", ["code", "figure"])
@pytest.mark.parametrize(
    ("names", "at"),
    [
        (("hourglass2",) * 3, "stack1"),
        (("hourglass2",) * 2, "stack0"),  # only the stem is shared
        (("hourglass2", "hourglass4"), "stack1"),
        (("mobilepose",) * 4, "decoder"),
    ],
)
def test_loss_terms_and_gradients_are_the_formulas(names, at, fau):
    given = batch(dtype=torch.float64)
    learner = learner_of(names, at, torch.float64, fau=fau, ensemble_weight=0.7, sigma=1.0)
    assert (learner.method.fau.mix is None) == (fau == "code")
    for _, norm, _ in learner.method.fau.convs:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    state = StepState(kl_weight=30.0, ce_weight=0.5, temperature=2.0)  # λ so large that the divergence shows
    assert_learns(learner, given, formula_of(given, 0.5, 30.0, 0.7, 2.0, 1.0), state, rtol=1e-7)


def test_one_branch_alone_learns_the_joints_at_every_stack():
    given = batch(dtype=torch.float64)
    learner = learner_of(("hourglass4",), None, torch.float64)
    assert learner.term_names == ("mse/sub0.0", "mse/sub0.1", "mse/sub0.2", "mse/sub0")
    assert_learns(learner, given, formula_of(given), rtol=1e-7)
    assert list(learner.predict(given.images)) == ["sub0"] == list(learner.method.output_names)
    assert learner.method.main_output == "sub0"
    assert not list(learner.method.parameters())


def test_names_of_shared_and_own_stacks():
    learner = learner_of(("hourglass4", "hourglass6"), "stack2")
    heads = ["shared0", "shared1", "sub0.0", "sub0", "sub1.0", "sub1.1", "sub1.2", "sub1"]
    expected = [*(f"mse/{head}" for head in (*heads, "ensemble")), *(f"kl/ensemble→{head}" for head in heads)]
    assert list(learner.term_names) == expected
    output = learner(batch())
    assert len(output.terms) == len(expected)
    assert tuple(output.logits) == learner.method.output_names == ("sub0", "sub1", "ensemble")


def test_the_divergence_alone_trains_branches_and_unit_and_hidden_joints_train_nothing():
    given, state = batch(), StepState(ce_weight=0.0)
    learner = learner_of(ensemble_weight=0.0)
    learner(given, state).loss.backward()
    moved = {name for name, gradient in gradients(learner).items() if gradient.any()}
    assert {"method.fau.select.weight", "method.fau.convs.0.0.weight"} <= moved
    assert {f"cohort.sub_networks.{b}.stack1.score.weight" for b in range(2)} <= moved
    assert "cohort.trunk.stack0.score.weight" in moved
    hidden = given._replace(target=given.target * torch.tensor([1.0, 1.0, 0.0]))
    learner = learner_of()
    got = learner(hidden)
    got.loss.backward()
    assert got.loss.item() == 0
    assert not got.terms.any()
    assert not any(gradient.any() for gradient in gradients(learner).values())


@pytest.mark.parametrize("fau", ["code", "figure"])
def test_predict_gives_branches_and_weighed_ensemble_and_changes_nothing(fau):
    learner = learner_of(fau=fau).eval()
    images = batch().images
    before = deepcopy(learner.state_dict())
    with torch.no_grad():
        named = learner.predict(images)
        output = learner.cohort(images)
        weights = learner.method.fau(output.trunk_stages[0])
    assert list(named) == ["sub0", "sub1", "ensemble"]
    torch.testing.assert_close(weights.sum(1), torch.ones(4, JOINTS))
    assert (weights > 0).all()
    assert (weights[0] != weights[1]).any()
    expected = sum(weights[:, k, :, None, None] * named[f"sub{k}"] for k in range(2))
    torch.testing.assert_close(named["ensemble"], expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.state_dict().items())
    assert learner.method.main_output in named


def test_one_image_bf16_channels_last_and_none():
    learner = learner_of()
    assert learner(batch(1, 128)).loss.isfinite()
    assert_learns_in_bf16(learner, batch())
    given = batch()
    other = given._replace(images=given.images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(learner(other).loss, learner(given).loss)
    learner.eval()  # a share of a batch that has no image evaluates its norms
    got = learner(batch(0))
    got.loss.backward()
    assert got.loss.item() == 0
    assert not got.terms.any()
    assert all(p.grad is not None and not p.grad.any() for p in learner.parameters())


def test_it_learns():
    """The error of every head falls, the ensemble's too, on a batch that is seen again and again."""
    learner, given = learner_of(kl_weight=2.0), batch(8)
    optimizer = torch.optim.Adam(learner.parameters(), lr=3e-3)
    first = learner(given).terms
    for _ in range(25):
        optimizer.zero_grad()
        learner(given).loss.backward()
        optimizer.step()
    last = learner(given).terms
    assert (last[:4] < 0.5 * first[:4]).all()


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"sub-network 0 \(SmallResNet\) does not say how many"):
        OKDHP(make_cohort(2), JOINTS)
    nets = [models.create("hourglass1@1/64", JOINTS) for _ in range(2)]
    with pytest.raises(ValueError, match=r"reads the stem that the branches share, and these share none; split"):
        OKDHP(Cohort(nets), JOINTS)
    assert "--trunk auto" in OKDHP.refusal({"arch": ["hourglass2"] * 2, "trunk": "none"})
    assert OKDHP.refusal({"arch": ["hourglass2"], "trunk": "none"}) is None
    assert OKDHP.refusal({"arch": ["hourglass2"] * 2, "trunk": "stack1"}) is None
    for options, message in (({"sigma": 0.0}, "sigma must be greater"), ({"fau": "paper"}, "fau must be one of code")):
        with pytest.raises(ValueError, match=message):
            OKDHPOptions(**options)
    learner, given = learner_of(), batch()
    with pytest.raises(ValueError, match=r"expected a target \(4, 3, 3\) .* got \(4,\)"):
        learner(given._replace(target=torch.zeros(4, dtype=torch.int64)))
    learner.label_smoothing = 0.1
    with pytest.raises(ValueError, match="label_smoothing must be 0"):
        learner(given)
    output = learner.cohort(given.images)
    short = output._replace(trunk_stages=output.trunk_stages[:1])
    with pytest.raises(ValueError, match=r"expected 3 heatmaps \(shared0, sub0, sub1\), got 2"):
        learner.method(short, given)
    for wrong in (output.logits[1][:, :, 1:], output.logits[1][:, 1:], output.logits[1].flatten(2)):
        with pytest.raises(ValueError, match=r"heatmaps \(4, 3, 8, 8\) of every stack, got .* for sub1"):
            learner.method(output._replace(logits=(output.logits[0], wrong)), given)


def test_name_and_recipe():
    assert methods.resolve("okdhp") is OKDHP
    assert (OKDHP.task, OKDHP.alone) == ("pose", "okdhp")
    assert {key: OKDHP.recipe[key] for key in ("epochs", "batch_size", "lr", "milestones")} == {
        "epochs": 150,
        "batch_size": 16,
        "lr": 2.5e-4,
        "milestones": (90, 120),
    }
    options = OKDHPOptions()
    assert (options.temperature, options.kl_weight, options.ramp_up_epochs) == (1.0, 2.0, 90.0)
