"""Cohort, learner and the methods: who runs when, who gets which gradient, what each loss is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fflfast import DistillGraph, methods, models
from fflfast.cohort import Cohort, Learner, StepState
from fflfast.methods import DML, FFL, DMLOptions, FFLOptions, Method, Single


class Counting(nn.Module):
    """A sub-network that counts its calls; `stages` and `spatial` choose what it returns."""

    def __init__(self, channels=4, num_classes=5, in_channels=3, stages=False, spatial=True):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        self.calls, self.stages, self.spatial = 0, stages, spatial

    def forward(self, x):
        self.calls += 1
        f = F.relu(self.norm(self.conv(x)))
        out = (self.fc(f.mean((2, 3))), f if self.spatial else None)
        return (*out, [f]) if self.stages else out


class Trunk(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.calls, self.batch = 0, 0

    def forward(self, x):
        self.calls += 1
        self.batch = len(x)
        return F.relu(self.conv(x))


def batch(size=4, num_classes=5):
    generator = torch.Generator().manual_seed(0)
    return SimpleNamespace(
        images=torch.randn(size, 3, 8, 8, generator=generator),
        target=torch.randint(num_classes, (size,), generator=generator),
    )


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "trunk"])
@pytest.mark.parametrize("n", [2, 3])
def test_every_part_runs_exactly_once_a_step(n, shared):
    trunk = Trunk() if shared else None
    cohort = Cohort([Counting(in_channels=6 if shared else 3) for _ in range(n)], trunk)
    learner = Learner(cohort, FFL(cohort, 5))
    for net in cohort.sub_networks:
        net.calls = 0
    if trunk:
        trunk.calls = 0
    learner(batch()).loss.backward()
    assert [net.calls for net in cohort.sub_networks] == [1] * n
    assert trunk is None or trunk.calls == 1
    assert all(p.grad is not None for p in learner.parameters())


def test_views_go_to_their_sub_networks_and_through_the_trunk_at_once():
    torch.manual_seed(0)
    views = [torch.randn(4, 3, 8, 8) for _ in range(2)]
    plain = Cohort([Counting(), Counting()]).eval()
    out = plain(views)
    for k, net in enumerate(plain.sub_networks):
        assert torch.equal(out.logits[k], net(views[k])[0])
    shared = Cohort([Counting(in_channels=6), Counting(in_channels=6)], Trunk()).eval()
    out = shared(views)
    assert shared.trunk.calls == 1
    assert shared.trunk.batch == 8
    for k, net in enumerate(shared.sub_networks):
        torch.testing.assert_close(out.logits[k], net(shared.trunk(views[k]))[0])
    with pytest.raises(ValueError, match="expected 2 views"):
        plain(views[:1])
    with pytest.raises(ValueError, match="one shape"):
        shared([views[0], views[1][:2]])


def test_runner_gets_the_thunks_and_decides_their_order():
    cohort = Cohort([Counting(), Counting(), Counting()]).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = cohort(x)

    def backwards(thunks):
        return [thunk() for thunk in thunks[::-1]][::-1]

    cohort.runner = backwards
    for a, b in zip(cohort(x).logits, expected.logits, strict=True):
        assert torch.equal(a, b)


def test_stages_are_handed_on():
    out = Cohort([Counting(stages=True), Counting()])(torch.randn(2, 3, 8, 8))
    assert torch.equal(out.stages[0][0], out.features[0])
    assert out.stages[1] == ()


def test_probing_finds_channels_and_changes_nothing():
    cohort = Cohort([Counting(4), Counting(7), Counting(2, spatial=False)])
    cohort.sub_networks[1].eval()
    before = {k: v.clone() for k, v in cohort.state_dict().items()}
    random_state = torch.get_rng_state()
    assert cohort.feature_channels == (4, 7, None)
    assert all(torch.equal(v, before[k]) for k, v in cohort.state_dict().items())
    assert [net.training for net in cohort.sub_networks] == [True, False, True]
    assert torch.equal(torch.get_rng_state(), random_state)


class Odd(Counting):
    """Draws random numbers, and gives tokens instead of a map, or fails."""

    def forward(self, x):
        if self.stages:
            raise AttributeError("no attribute 'missing'")
        torch.rand(1)
        logits, _ = super().forward(x)
        return logits, x.flatten(2).transpose(1, 2)


def test_probing_meets_odd_networks():
    cohort = Cohort([Counting(), Odd()])
    random_state = torch.get_rng_state()
    assert cohort.feature_channels == (4, None)
    assert torch.equal(torch.get_rng_state(), random_state)
    with pytest.raises(ValueError, match="no attribute 'missing'"):
        _ = Cohort([Counting(), Odd(stages=True)]).feature_channels


def test_learner_refuses_a_method_that_owns_the_cohort():
    class Greedy(DML):
        def __init__(self, cohort, num_classes):
            super().__init__(cohort, num_classes)
            self.cohort = cohort

    cohort = Cohort([Counting(), Counting()])
    with pytest.raises(ValueError, match="parameters of the cohort"):
        Learner(cohort, Greedy(cohort, 5))
    with pytest.raises(TypeError, match="graph"):
        Learner(cohort, nn.Linear(2, 2))
    with pytest.raises(ValueError, match="label_smoothing"):
        Learner(cohort, DML(cohort, 5), label_smoothing=1.5)


def test_ffl_names_the_network_whose_map_is_missing():
    cohort = Cohort([Counting(), Counting(spatial=False)])
    for net in cohort.sub_networks:
        net.feature_channels = 4
    learner = Learner(cohort, FFL(cohort, 5))
    with pytest.raises(ValueError, match="sub-network 1 returned None"):
        learner(batch())


def test_cohort_errors():
    net = Counting()
    with pytest.raises(ValueError, match="at least one"):
        Cohort([])
    with pytest.raises(ValueError, match="given twice"):
        Cohort([net, net])
    with pytest.raises(TypeError, match=r"nn\.Module"):
        Cohort([net, 3])
    with pytest.raises(TypeError, match="must return"):
        Cohort([nn.Conv2d(3, 3, 1)])(torch.randn(1, 3, 4, 4))


# ---- methods


def test_ffl_loss_is_the_papers():
    torch.manual_seed(0)
    cohort = Cohort([Counting(), Counting()])
    learner = Learner(cohort, FFL(cohort, 5, FFLOptions(target_eps=1e-7))).double()
    b = batch()
    b.images = b.images.double()
    state = StepState(kl_weight=0.3, temperature=3.0)
    out = learner(b, state)
    z1, z2, zf = (out.logits[k].detach().requires_grad_() for k in ("sub0", "sub1", "fused"))

    def kl(pred, label):
        t = F.softmax(label.detach() / 3, 1) + 1e-7
        return 9 * (t * (t.log() - F.log_softmax(pred / 3, 1))).sum() / len(t)

    terms = [F.cross_entropy(z, b.target) for z in (z1, z2, zf)] + [kl(z1, zf), kl(z2, zf), kl(zf, (z1 + z2) / 2)]
    expected = sum(terms[:3]) + torch.tensor(0.3).double() * sum(terms[3:])
    torch.testing.assert_close(out.loss.detach(), expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(out.terms, torch.stack(terms).detach(), rtol=1e-12, atol=0)
    assert learner.term_names[3:] == ("kl/fused→sub0", "kl/fused→sub1", "kl/ensemble→fused")


def test_fused_gradient_reaches_every_sub_network_and_the_trunk():
    cohort = Cohort([Counting(in_channels=6), Counting(in_channels=6)], Trunk())
    method = FFL(cohort, 5)
    fused = method.fused_logits(cohort(batch().images))
    fused.square().sum().backward()
    for part in (cohort.trunk, *cohort.sub_networks):
        assert part.conv.weight.grad.abs().max() > 0
    assert cohort.sub_networks[0].fc.weight.grad is None


def test_predict_names_order_and_ensemble():
    cohort = Cohort([Counting(), Counting(), Counting()])
    learner = Learner(cohort, FFL(cohort, 5)).eval()
    out = learner.predict(batch().images)
    assert list(out) == ["sub0", "sub1", "sub2", "ensemble", "fused"]
    torch.testing.assert_close(out["ensemble"], (out["sub0"] + out["sub1"] + out["sub2"]) / 3)
    dml = Learner(cohort, DML(cohort, 5)).eval()
    assert list(dml.predict(batch().images)) == ["sub0", "sub1", "sub2", "ensemble"]


def test_dml_is_cross_entropy_and_mutual_kl_at_temperature_one():
    cohort = Cohort([Counting(spatial=False), Counting(spatial=False), Counting(spatial=False)])
    learner = Learner(cohort, DML(cohort, 5), label_smoothing=0.1)
    b = batch()
    out = learner(b)
    z = [out.logits[f"sub{k}"].detach() for k in range(3)]
    expected = sum(F.cross_entropy(t, b.target, label_smoothing=0.1) for t in z)
    for i in range(3):
        for j in range(3):
            if i != j:
                expected += F.kl_div(z[i].log_softmax(1), z[j].softmax(1), reduction="batchmean") / 2
    torch.testing.assert_close(out.loss.detach(), expected)


def test_single_is_plain_training():
    cohort = Cohort([Counting()])
    learner = Learner(cohort, Single(cohort, 5))
    b = batch()
    out = learner(b)
    torch.testing.assert_close(out.loss.detach(), F.cross_entropy(out.logits["sub0"].detach(), b.target))
    assert list(learner.predict(b.images)) == ["sub0"]


def test_probabilities_as_target():
    cohort = Cohort([Counting(), Counting()])
    b = batch()
    b.target = torch.rand(4, 5).softmax(1)
    Learner(cohort, FFL(cohort, 5))(b).loss.backward()


def test_state_replaces_options_and_is_read_at_each_step():
    cohort = Cohort([Counting(), Counting()]).eval()
    learner = Learner(cohort, FFL(cohort, 5)).eval()
    b, state = batch(), StepState(temperature=3.0)
    full = learner(b)
    assert torch.equal(full.loss, learner(b, state).loss)
    state.kl_weight.zero_()
    torch.testing.assert_close(learner(b, state).loss, full.terms[:3].sum())


@pytest.mark.parametrize(
    ("depth", "trunk", "total"),
    [(20, 66_128, 506_748), (32, 112_592, 849_148), (56, 205_520, 1_533_948), (110, 414_608, 3_074_748)],
)
def test_parameter_totals_of_the_paper(depth, trunk, total):
    parts = [models.split(models.create(f"resnet{depth}", 100), "layer3") for _ in range(2)]
    cohort = Cohort([p[1] for p in parts], parts[0][0])
    learner = Learner(cohort, FFL(cohort, 100))
    assert sum(p.numel() for p in cohort.trunk.parameters()) == trunk
    assert sum(p.numel() for p in learner.parameters()) == total


def test_unlike_architectures_train_together():
    nets = [models.create(name, 5) for name in ("tiny", "resnet20", "wrn_16_2")]
    cohort = Cohort(nets)
    learner = Learner(cohort, FFL(cohort, 5))
    shapes = [f.shape for f in cohort(torch.randn(2, 3, 16, 16)).features]
    assert len({s[1:] for s in shapes}) > 1
    generator = torch.Generator().manual_seed(0)
    b = SimpleNamespace(images=torch.randn(8, 3, 16, 16, generator=generator), target=torch.arange(8) % 5)
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = learner(b).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_methods_refuse_what_they_cannot_do():
    pair = Cohort([Counting(), Counting()])
    with pytest.raises(ValueError, match=r"sub-network 1 .* no spatial feature map"):
        FFL(Cohort([Counting(), Counting(spatial=False)]), 5)
    with pytest.raises(ValueError, match="at least 2"):
        FFL(Cohort([Counting()]), 5)
    with pytest.raises(ValueError, match="at most 1"):
        Single(pair, 5)
    with pytest.raises(TypeError, match="FFLOptions"):
        FFL(pair, 5, DMLOptions())
    with pytest.raises(ValueError, match="num_classes"):
        FFL(pair, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.0},
        {"temperature": "3"},
        {"kl_weight": float("nan")},
        {"ramp_up_epochs": -1.0},
        {"fusion_channels": 0},
        {"fusion_channels": 1.5},
        {"target_eps": float("inf")},
        {"target_eps": -1.0},
        {"fusion_weight_decay": -1.0},
    ],
    ids=str,
)
def test_options_are_checked(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        FFLOptions(**change)


class Own(Method):
    """A user's method in a file of the user's."""

    def __init__(self, cohort, num_classes, options=None):
        super().__init__(cohort, num_classes, options)
        self.graph = DistillGraph.oem(len(cohort))


def test_resolve():
    assert methods.resolve("ffl") is FFL
    assert methods.resolve(f"{__name__}:Own") is Own
    cohort = Cohort([Counting(), Counting()])
    Learner(cohort, Own(cohort, 5))(batch()).loss.backward()
    for name, message in (
        ("flf", "did you mean 'ffl'"),
        ("no.such.module:X", "cannot import"),
        ("math:sqrt", "subclass of"),
        (f"{__name__}:Missing", "cannot import"),
    ):
        with pytest.raises(ValueError, match=message):
            methods.resolve(name)


def test_ffl_weight_decay_is_told_to_the_optimizer():
    cohort = Cohort([Counting(), Counting()])
    assert FFL(cohort, 5).parameter_options() == {"fusion": {"weight_decay": 1e-5}}
