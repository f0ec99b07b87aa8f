"""Checkpoints of the original FFL code: names, logits, loss terms, gradients and optimizer steps.

The original's arithmetic is written here from its published description on the names of its state dicts.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from fflfast.cohort import StepState
from fflfast.compat import load_ffl_pytorch

DEPTH, CLASSES = 8, 10


def original_states(depth=DEPTH, num_classes=CLASSES, seed=0):
    """State dicts with the original's names and random values, running statistics included."""
    generator = torch.Generator().manual_seed(seed)
    model, module = {}, {}

    def conv(state, name, out, inner, k):
        state[f"{name}.weight"] = torch.randn(out, inner, k, k, generator=generator) * math.sqrt(2 / (k * k * out))

    def norm(state, name, n):
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(n, generator=generator)
        state[f"{name}.bias"] = 0.1 * torch.randn(n, generator=generator)
        state[f"{name}.running_mean"] = 0.1 * torch.randn(n, generator=generator)
        state[f"{name}.running_var"] = 0.5 + torch.rand(n, generator=generator)
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    def linear(state, name, inner):
        state[f"{name}.weight"] = torch.randn(num_classes, inner, generator=generator) / math.sqrt(inner)
        state[f"{name}.bias"] = 0.1 * torch.randn(num_classes, generator=generator)

    def layer(name, inner, out):
        for k in range((depth - 2) // 6):
            conv(model, f"{name}.{k}.conv1", out, inner if k == 0 else out, 3)
            norm(model, f"{name}.{k}.bn1", out)
            conv(model, f"{name}.{k}.conv2", out, out, 3)
            norm(model, f"{name}.{k}.bn2", out)
            if k == 0 and inner != out:
                conv(model, f"{name}.0.downsample.0", out, inner, 1)
                norm(model, f"{name}.0.downsample.1", out)

    conv(model, "conv1", 16, 3, 3)
    norm(model, "bn1", 16)
    for name, inner, out in (("layer1", 16, 16), ("layer2", 16, 32), ("layer3_1", 32, 64), ("layer3_2", 32, 64)):
        layer(name, inner, out)
    for name in ("classfier3_1", "classfier3_2"):
        linear(model, name, 64)
    linear(module, "fc2", 64)
    conv(module, "conv1", 128, 1, 3)
    norm(module, "bn1", 128)
    conv(module, "conv1_1", 64, 128, 1)
    norm(module, "bn1_1", 64)
    return model, module


class Original:
    """The original's forward, loss and two optimizers, on leaves named as in its state dicts."""

    def __init__(self, model, module, training):
        self.model = {k: v.clone() for k, v in model.items()}
        self.module = {k: v.clone() for k, v in module.items()}
        self.training = training
        for state in (self.model, self.module):
            for key, value in state.items():
                if "running" not in key and "tracked" not in key:
                    value.requires_grad_()

    def bn(self, s, name, x):
        mean, var = s[f"{name}.running_mean"], s[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, s[f"{name}.weight"], s[f"{name}.bias"], self.training, 0.1, 1e-5)

    def layer(self, name, x, stride):
        s, k = self.model, 0
        while f"{name}.{k}.conv1.weight" in s:
            step = stride if k == 0 else 1
            out = F.relu(self.bn(s, f"{name}.{k}.bn1", F.conv2d(x, s[f"{name}.{k}.conv1.weight"], None, step, 1)))
            out = self.bn(s, f"{name}.{k}.bn2", F.conv2d(out, s[f"{name}.{k}.conv2.weight"], None, 1, 1))
            if f"{name}.{k}.downsample.0.weight" in s:
                x = self.bn(
                    s, f"{name}.{k}.downsample.1", F.conv2d(x, s[f"{name}.{k}.downsample.0.weight"], None, step)
                )
            x = F.relu(out + x)
            k += 1
        return x

    def logits(self, x):
        s, m = self.model, self.module
        x = F.relu(self.bn(s, "bn1", F.conv2d(x, s["conv1.weight"], None, 1, 1)))
        x = self.layer("layer2", self.layer("layer1", x, 1), 2)
        maps = [self.layer("layer3_1", x, 2), self.layer("layer3_2", x, 2)]
        subs = [
            F.linear(F.avg_pool2d(f, 8).flatten(1), s[f"classfier3_{k}.weight"], s[f"classfier3_{k}.bias"])
            for k, f in enumerate(maps, 1)
        ]
        x = F.conv2d(torch.cat(maps, 1), m["conv1.weight"], None, 1, 1, groups=128)
        x = F.relu(self.bn(m, "bn1_1", F.conv2d(F.relu(self.bn(m, "bn1", x)), m["conv1_1.weight"])))
        return (*subs, F.linear(F.avg_pool2d(x, 8).flatten(1), m["fc2.weight"], m["fc2.bias"]))

    def terms(self, x, y):
        z1, z2, zf = self.logits(x)

        def kl(pred, label):
            t = F.softmax(label.detach() / 3, 1) + 1e-7
            return 9 * (t * (t.log() - F.log_softmax(pred / 3, 1))).sum() / len(t)

        ce = [F.cross_entropy(z, y) for z in (z1, z2, zf)]
        return [*ce, kl(z1, zf), kl(z2, zf), kl(zf, (z1 + z2) / 2)]

    def loss(self, x, y, weight):
        terms = self.terms(x, y)
        return sum(terms[:3]) + weight * sum(terms[3:])


NEW_NAMES = {
    "layer3_1": "cohort.sub_networks.0.layer3",
    "classfier3_1": "cohort.sub_networks.0.fc",
    "layer3_2": "cohort.sub_networks.1.layer3",
    "classfier3_2": "cohort.sub_networks.1.fc",
}
FUSION_NAMES = {
    "conv1": "depthwise",
    "bn1": "depthwise_norm",
    "conv1_1": "pointwise",
    "bn1_1": "pointwise_norm",
    "fc2": "classifier",
}


def pairs(original, tensors):
    """(original, ours) of every entry; `tensors` maps our full names to our values."""
    for key, value in original.model.items():
        first, rest = key.split(".", 1)
        yield key, value, tensors[f"{NEW_NAMES.get(first, f'cohort.trunk.{first}')}.{rest}"]
    for key, value in original.module.items():
        first, rest = key.split(".", 1)
        yield key, value, tensors[f"method.fusion.{FUSION_NAMES[first]}.{rest}"]


def data(size=6):
    generator = torch.Generator().manual_seed(1)
    return SimpleNamespace(
        images=torch.randn(size, 3, 32, 32, generator=generator),
        target=torch.randint(CLASSES, (size,), generator=generator),
    )


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item()


def test_every_value_arrives_and_eval_logits_agree():
    model, module = original_states()
    learner = load_ffl_pytorch(model, module, depth=DEPTH, num_classes=CLASSES)
    original = Original(model, module, training=False)
    assert len(learner.state_dict()) == len(model) + len(module)
    for key, theirs, ours in pairs(original, learner.state_dict()):
        assert torch.equal(theirs, ours), key
    learner.eval()
    with torch.no_grad():
        got, expected = learner.predict(data().images), original.logits(data().images)
    for name, z in zip(("sub0", "sub1", "fused"), expected, strict=True):
        assert relative(got[name], z) < 1e-6


def test_terms_gradients_and_three_steps_agree():
    model, module = original_states()
    learner = load_ffl_pytorch(model, module, depth=DEPTH, num_classes=CLASSES)
    original = Original(model, module, training=True)
    b, weight = data(), 0.2865
    state = StepState(kl_weight=weight, temperature=3.0)
    theirs = [
        torch.optim.SGD([v for v in s.values() if v.requires_grad], 0.1, 0.9, weight_decay=wd, nesterov=True)
        for s, wd in ((original.model, 1e-4), (original.module, 1e-5))
    ]
    groups = [
        {"params": list(learner.cohort.parameters()), "weight_decay": 1e-4},
        {"params": list(learner.method.parameters()), "weight_decay": 1e-5},
    ]
    ours = torch.optim.SGD(groups, 0.1, 0.9, nesterov=True)
    for step in range(3):
        for optimizer in (*theirs, ours):
            optimizer.zero_grad()
        if step == 0:
            terms = torch.stack(Original(model, module, training=True).terms(b.images, b.target)).detach()
        out = learner(b, state)
        if step == 0:
            torch.testing.assert_close(out.terms, terms, rtol=2e-6, atol=1e-6)
        expected = original.loss(b.images, b.target, weight)
        torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=0)
        out.loss.backward()
        expected.backward()
        if step == 0:
            gradients = {k: p.grad for k, p in learner.named_parameters()}
            for key, value, gradient in pairs(original, {**learner.state_dict(), **gradients}):
                if value.requires_grad:
                    assert relative(gradient, value.grad) < 2e-5, key
        for optimizer in (*theirs, ours):
            optimizer.step()
    for key, value, got in pairs(original, learner.state_dict()):
        if "tracked" not in key:
            assert relative(got, value.detach()) < 2e-5, key


def test_names_of_data_parallel_are_taken():
    model, module = original_states()
    wrapped = {f"module.{key}": value for key, value in model.items()}
    learner = load_ffl_pytorch(wrapped, module, depth=DEPTH, num_classes=CLASSES)
    assert torch.equal(learner.cohort.trunk.conv1.weight, model["conv1.weight"])


def test_checkpoint_dicts_and_missing_counters_are_taken():
    model, module = original_states()
    for state in (model, module):
        for key in [k for k in state if "tracked" in k]:
            del state[key]
    learner = load_ffl_pytorch({"epoch": 3, "state_dict": model}, {"state_dict": module}, depth=8, num_classes=CLASSES)
    assert torch.equal(learner.cohort.trunk.conv1.weight, model["conv1.weight"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a, b: (a, b, 14, CLASSES), ValueError, "are the depth and the order"),
        (lambda a, b: (a, b, 9, CLASSES), ValueError, "resnet9"),
        (lambda a, b: (a, b, 8, 100), ValueError, r"'classfier3_1.weight' of model_state must have shape \(100"),
        (lambda a, b: (b, a, 8, CLASSES), ValueError, "model_state"),
        (lambda a, b: ({**a, "extra.weight": torch.zeros(1)}, b, 8, CLASSES), ValueError, "extra"),
        (lambda a, b: (a, {**b, "extra.weight": torch.zeros(1)}, 8, CLASSES), ValueError, "extra"),
        (lambda a, b: ({}, b, 8, CLASSES), ValueError, "lacks 'conv1.weight'"),
        (lambda a, b: (a, {k: v for k, v in b.items() if k != "fc2.bias"}, 8, CLASSES), ValueError, "lacks 'fc2.bias'"),
        (lambda a, b: ([a], b, 8, CLASSES), TypeError, "model_state must be a state dict"),
        (lambda a, b: (a, {"fc2.weight": 3}, 8, CLASSES), TypeError, "module_state must be a state dict"),
    ],
)
def test_what_does_not_fit_is_named(change, error, message):
    model, module, depth, classes = change(*original_states())
    with pytest.raises(error, match=message):
        load_ffl_pytorch(model, module, depth=depth, num_classes=classes)
