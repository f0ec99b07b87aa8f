"""OEM: the ensemble and the widest student teach students of falling width."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from method_truths import CLASSES, assert_learns, batch, ce, gradients, kl
from safetensors.torch import load_file
from training_runs import small

from fflfast import models
from fflfast.cohort import Cohort, Learner, StepState
from fflfast.methods.oem import OEM, OEMOptions
from fflfast.training import export, train
from fflfast.training.evaluation import load_run


def cohort_of(names, at="layer1", dtype=torch.float32):
    torch.manual_seed(0)
    nets = [models.create(name, CLASSES) for name in names]
    for net in nets:
        net.return_stages = True
    if at is None:
        return Cohort(nets).to(dtype)
    pairs = [models.split(net, at) for net in nets]
    return Cohort([rest for _, rest in pairs], pairs[0][0]).to(dtype)


def learner_of(names, at="layer1", dtype=torch.float32, label_smoothing=0.0, **options):
    cohort = cohort_of(names, at, dtype)
    return Learner(cohort, OEM(cohort, CLASSES, OEMOptions(**options)).to(dtype), label_smoothing=label_smoothing)


def formula(*, temperature, kl_weight, ce_weight, feature_weight, detach):
    """The loss as the paper has it, in the order of the terms."""

    def weighted(learner, output):
        z = output.logits
        mean = (sum(z) / len(z)).detach()
        terms = [(ce_weight, ce(each, given.target)) for each in z]
        terms += [(kl_weight, kl(mean, each, temperature)) for each in z]
        for adapters, stages in zip(learner.method.adapters, output.stages[1:], strict=True):
            error = torch.zeros((), dtype=torch.float64)
            for adapt, stage, target in zip(adapters, stages, output.stages[0], strict=True):
                target = target.detach() if detach else target
                matrix = adapt.weight[:, :, 0, 0]
                adapted = torch.einsum("oc,bchw->bohw", matrix, stage) + adapt.bias[:, None, None]
                error = error + ((adapted - target) ** 2).mean()
            terms.append((feature_weight, error))
        return terms

    given = batch(dtype=torch.float64)
    return given, weighted


PAPER = {"temperature": 2.0, "kl_weight": 0.15, "ce_weight": 0.7, "feature_weight": 0.15, "detach": True}


@pytest.mark.parametrize("at", ["layer1", "layer3", None], ids=["stem", "two stages shared", "no trunk"])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_loss_and_gradients(count, at):
    """In float64, with the paper's weights; where the trunk has stages the students do not compare them."""
    names = ["tiny"] * count if at == "layer3" else OEM.architectures(["tiny"] * count)
    learner = learner_of(names, at, torch.float64)
    assert [len(each) for each in learner.method.adapters] == [1 if at == "layer3" else 3] * (count - 1)
    given, weighted = formula(**PAPER)
    assert_learns(learner, given, weighted)
    assert learner.term_names == (
        *(f"ce/sub{j}" for j in range(count)),
        *(f"kl/ensemble→sub{j}" for j in range(count)),
        *(f"mse/sub0→sub{j}" for j in range(1, count)),
    )


def test_student_0_learns_from_the_maps_where_the_code_lets_it():
    learner = learner_of(["tiny", "tiny@1/2"], dtype=torch.float64, detach_features=False)
    assert_learns(learner, *formula(**{**PAPER, "detach": False}))


def test_weights_of_options_and_state():
    learner = learner_of(["tiny", "tiny@1/2"], dtype=torch.float64, feature_weight=0.4)
    state = StepState(kl_weight=0.3, ce_weight=1.5, temperature=1.25)  # exact in float32 but for 0.3
    weights = {"temperature": 1.25, "kl_weight": float(state.kl_weight), "ce_weight": 1.5}
    assert_learns(learner, *formula(**weights, feature_weight=0.4, detach=True), state)


@pytest.mark.parametrize("name", ["wrn_16_2@1/8", "cifar_vgg16_bn@1/32", "densenet40_12@1/4", "wrn_20_8@1/16"])
def test_every_family(name):
    base, _, width = name.partition("@")
    net = models.create(name, CLASSES)
    learner = learner_of([name, f"{base}@{width}0"], net.stage_names[0], torch.float64)
    assert len(learner.method.adapters[0]) == len(net.stage_names)
    assert_learns(learner, *formula(**PAPER), rtol=1e-8)


def test_unlike_networks_with_stages_of_one_size():
    learner = learner_of(["tiny", "resnet14@1/8"], None, torch.float64)
    assert_learns(learner, *formula(**PAPER))


@pytest.mark.parametrize("detach", [True, False])
def test_who_learns_from_the_feature_terms(detach):
    learner = learner_of(["tiny", "tiny@1/2"], None, ce_weight=0.0, kl_weight=0.0, detach_features=detach)
    learner(batch()).loss.backward()
    found = {name: float(g.abs().sum()) for name, g in gradients(learner).items()}
    student_0 = sum(v for name, v in found.items() if name.startswith("cohort.sub_networks.0.layer"))
    assert (student_0 == 0.0) is detach
    for part in ("cohort.sub_networks.1.layer1", "cohort.sub_networks.1.layer3", "method.adapters.0.2"):
        assert all(v > 0 for name, v in found.items() if name.startswith(part) and name.endswith("conv1.weight"))
    assert found["method.adapters.0.0.bias"] > 0


def test_half_precision_maps_are_compared_in_float32():
    learner = learner_of(["tiny", "tiny@1/2"])
    expected = deepcopy(learner)(batch()).terms
    with torch.autocast("cpu", torch.bfloat16):
        output = learner(batch())
    assert output.terms.dtype == torch.float32
    torch.testing.assert_close(output.terms, expected, rtol=0.05, atol=0.02)
    output.loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in learner.parameters())


def test_an_empty_share_of_a_batch():
    learner = learner_of(["tiny", "tiny@1/2"]).eval()
    output = learner(batch(rows=0))
    assert float(output.loss.detach()) == 0.0
    assert bool((output.terms == 0).all())
    output.loss.backward()
    assert all(bool((g == 0).all()) for g in gradients(learner).values())
    assert all(p.grad is not None for p in learner.method.parameters())


def test_channels_last_changes_no_term():
    learner = learner_of(["tiny", "tiny@1/2"], dtype=torch.float64)
    given = batch(dtype=torch.float64)
    expected = deepcopy(learner)(given).terms
    learner.to(memory_format=torch.channels_last)
    given = given._replace(images=given.images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(learner(given).terms, expected)


def test_adapters():
    learner = learner_of(OEM.architectures(["resnet8"] * 3))
    shapes = [[tuple(a.weight.shape) for a in each] for each in learner.method.adapters]
    assert shapes == [
        [(16, 10, 1, 1), (32, 21, 1, 1), (64, 42, 1, 1)],
        [(16, 5, 1, 1), (32, 10, 1, 1), (64, 21, 1, 1)],
    ]
    assert all(a.bias is not None for each in learner.method.adapters for a in each)


def test_predictions_need_no_adapter():
    learner = learner_of(["tiny", "tiny@1/2"]).eval()
    images = batch().images
    with torch.no_grad():
        found = learner.predict(images)
        for p in learner.method.parameters():
            p.fill_(torch.nan)
        again = learner.predict(images)
    assert tuple(found) == ("sub0", "sub1", "ensemble")
    assert all(torch.equal(found[name], again[name]) for name in found)
    torch.testing.assert_close(found["ensemble"], (found["sub0"] + found["sub1"]) / 2)


@pytest.mark.parametrize(
    ("names", "built"),
    [
        (["resnet32"] * 2, ["resnet32", "resnet32@1/2"]),
        (["resnet32"] * 4, ["resnet32", "resnet32@3/4", "resnet32@1/2", "resnet32@1/4"]),
        (["wrn_16_2"] * 5, ["wrn_16_2", *(f"wrn_16_2@{k}/5" for k in (4, 3, 2, 1))]),
        (["resnet32@3/4"] * 2, ["resnet32@3/4"] * 2),
        (["resnet32", "resnet32@0.3"], ["resnet32", "resnet32@0.3"]),
        (["resnet20", "resnet32"], ["resnet20", "resnet32"]),
        (["torchvision/resnet18"] * 2, ["torchvision/resnet18"] * 2),
        (["resnet32"], ["resnet32"]),
        ([], []),
    ],
)
def test_architectures(names, built):
    assert OEM.architectures(names) == built
    assert OEM.architectures(built) == built


class Maps(torch.nn.Module):
    """A sub-network whose stages have the given shapes."""

    feature_channels = None

    def __init__(self, *shapes):
        super().__init__()
        self.shapes = shapes
        self.fc = torch.nn.Linear(3, CLASSES)

    def forward(self, x):
        return self.fc(x.mean((2, 3))), None, tuple(x.new_ones(len(x), *shape) for shape in self.shapes)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([], [], r"sub-network 0 returns no stages.*set return_stages = True"),
        ([(4, 8, 8)], [], r"stages of sub-network 1 must be maps, as many and as large.* 8×8, got none"),
        ([(4, 8, 8)], [(4, 8, 8), (8, 4, 4)], r"8×8, got 8×8, 4×4; take widths of one architecture"),
        ([(4, 8, 8)], [(4, 4, 4)], r"8×8, got 4×4"),
        ([(4, 8, 8)], [(4, 8, 1)], r"8×8, got 8×1"),
        ([(4,)], [(4,)], r"must be maps"),
    ],
)
def test_stages_that_cannot_be_compared(first, second, message):
    with pytest.raises(ValueError, match=f"OEM: .*{message}"):
        OEM(Cohort([Maps(*first), Maps(*second)]), CLASSES)


def test_maps_of_another_size_than_on_the_first_trial():
    """What a network gives for a small blank image may agree where what it gives for another size does not."""

    class Odd(Maps):
        def forward(self, x):
            shapes = self.shapes if x.shape[-1] == 32 else [(4, 8, 1)]
            return self.fc(x.mean((2, 3))), None, tuple(x.new_ones(len(x), *shape) for shape in shapes)

    cohort = Cohort([Maps((4, 8, 8)), Odd((4, 8, 8))])
    learner = Learner(cohort, OEM(cohort, CLASSES))
    learner(batch(size=32))
    with pytest.raises(ValueError, match="8×8, got 8×1"):
        learner(batch(size=16))


def test_one_student_is_no_ensemble():
    with pytest.raises(ValueError, match="OEM: needs at least 2 sub-networks, got 1"):
        OEM(cohort_of(["tiny"]), CLASSES)


def test_options_are_numbers():
    with pytest.raises(ValueError, match="OEMOptions: feature_weight must be a finite number"):
        OEMOptions(feature_weight=float("nan"))


def test_the_feature_term_is_the_mean_over_all_elements():
    """By hand: maps of ones, an adapter of zeros with bias 3: (3 − 1)² = 4 a stage."""
    cohort = Cohort([Maps((4, 8, 8), (6, 2, 2)), Maps((2, 8, 8), (3, 2, 2))])
    method = OEM(cohort, CLASSES, OEMOptions(ce_weight=0.0, kl_weight=0.0, feature_weight=0.5))
    for adapt in method.adapters[0]:
        torch.nn.init.zeros_(adapt.weight)
        torch.nn.init.constant_(adapt.bias, 3.0)
    output = Learner(cohort, method)(batch(rows=3))
    assert float(output.loss.detach()) == 0.5 * (4.0 + 4.0)
    assert float(output.terms[-1]) == 8.0


def test_a_run_exports_every_width(tmp_path):
    """What is exported is a plain network of that width: strict, and the same logits to the bit."""
    train(small(tmp_path / "run", method="oem", arch=["tiny"] * 4, epochs=1), quiet=True)
    config, learner, _ = load_run(tmp_path / "run")
    assert config.arch == ["tiny", "tiny@3/4", "tiny@1/2", "tiny@1/4"]
    assert (config.trunk, config.optimizer, config.lr, config.weight_decay) == ("layer1", "adam", 1e-3, 1e-5)
    assert config.options["feature_weight"] == 0.15
    images = batch().images
    with torch.no_grad():
        expected = learner.eval().predict(images)
        files = export(tmp_path / "run", tmp_path / "export")
        assert [file.name for file in files] == [f"sub{j}.safetensors" for j in range(4)]
        for j, (file, arch) in enumerate(zip(files, config.arch, strict=True)):
            net = models.create(arch, expected["sub0"].shape[1]).eval()
            net.load_state_dict(load_file(file), strict=True)
            assert torch.equal(net(images)[0], expected[f"sub{j}"])
            module, metadata = models.load_exported(file)
            assert torch.equal(module(images), expected[f"sub{j}"])
            assert metadata["arch"] == arch
