"""Classifiers of one's own as sub-networks: odd forwards, refusals, composition."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fflfast.models import adapt, create


def adapted(net, **kwargs):
    return adapt(net, verbose=False, **kwargs)


class Net(nn.Module):
    """A body of convolutions that the cases below finish in their own way."""

    def __init__(self, in_channels=3, classes=4):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 6, 3, 2, 1)
        self.bn = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, 2, 1)
        self.fc = nn.Linear(8, classes)

    def body(self, x):
        return F.relu(self.conv2(F.relu(self.bn(self.conv1(x)))))


class Functional(Net):
    def forward(self, x):
        x = F.hardswish(self.conv2(F.relu(self.bn(self.conv1(x)))))
        x = F.avg_pool2d(x, x.shape[-2:])
        x = F.dropout(x, 0.3, self.training)
        return self.fc(x.view(x.size(0), -1))


class TwoPools(Net):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        x = self.body(x)
        return self.fc(torch.cat((F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)), 1).flatten(1))


class Gated(Net):
    """Squeeze and excitation at the end: its pooling is not the last one."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.body(x)
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.fc(x.mean((-2, -1)))


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Gated()

    def forward(self, x, scale=None):
        return self.model(x if scale is None else x * scale)


class FlattenThenInPlace(Net):
    """No pooling; what follows the flattened map writes into it."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5, inplace=True)
        self.fc = nn.Linear(8 * 8 * 8, 4)

    def forward(self, x):
        return self.fc(self.drop(F.hardswish(self.conv2(self.conv1(x))).flatten(1)))


class Tail(nn.Module):
    def forward(self, x):
        return F.max_pool2d(x, 2)


class LeNet(Net):
    """The last pooling leaves a map and hides at the end of a module."""

    def __init__(self):
        super().__init__()
        self.tail = nn.Sequential(nn.ReLU(), Tail())
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(8 * 4 * 4, 4)

    def forward(self, x):
        return self.fc(self.drop(self.tail(self.conv2(self.bn(self.conv1(x))))).flatten(1))


class RootState(Net):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((1, 8, 1, 1), 2.0))
        self.register_buffer("shift", torch.tensor(0.5), persistent=False)

    def forward(self, x):
        return self.fc((self.body(x) * self.scale + self.shift).mean((2, 3)))


class Ignored(Net):
    """Changes in place whose results nobody takes."""

    def forward(self, x):
        x = self.conv2(self.bn(self.conv1(x)))
        x.mul_(2)
        F.relu(x, inplace=True)
        return {"logits": self.fc(x.mean((2, 3))), "aux": x.sum()}


class Exchange(nn.Module):
    """Takes a list of maps and changes the list."""

    def forward(self, maps):
        maps[1] = F.relu(maps[1] + F.max_pool2d(maps[0], 2))
        return maps


class Lists(Net):
    def __init__(self):
        super().__init__()
        self.expand = nn.Conv2d(6, 8, 1)
        self.exchange = Exchange()

    def forward(self, x):
        x = self.conv1(x)
        maps = self.exchange([self.expand(x), self.conv2(x)])
        return self.fc(maps[1].mean((2, 3)))


class Attention(nn.Module):
    """Pools the map as a sequence of tokens, as CLIP's networks do."""

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        return (tokens.softmax(1) * tokens).sum(1)


class AttentionPool(Net):
    def __init__(self):
        super().__init__()
        self.pool = Attention()

    def forward(self, x):
        return self.fc(self.pool(self.body(x)))


CASES = {
    "lists": (Lists, lambda n, x: F.relu(n.conv2(n.conv1(x)) + F.max_pool2d(n.expand(n.conv1(x)), 2))),
    "attention-pool": (AttentionPool, lambda n, x: n.body(x)),
    "functional": (Functional, lambda n, x: F.hardswish(n.conv2(F.relu(n.bn(n.conv1(x)))))),
    "two-pools": (TwoPools, lambda n, x: n.body(x)),
    "gated": (Gated, lambda n, x: (f := n.body(x)) * torch.sigmoid(n.gate(f.mean((2, 3), keepdim=True)))),
    "nested": (Nested, lambda n, x: CASES["gated"][1](n.model, x)),
    "flatten": (FlattenThenInPlace, lambda n, x: F.hardswish(n.conv2(n.conv1(x)))),
    "lenet": (LeNet, lambda n, x: F.relu(n.conv2(n.bn(n.conv1(x))))),
    "root-state": (RootState, lambda n, x: n.body(x) * 2 + 0.5),
    "ignored-in-place": (Ignored, lambda n, x: F.relu(n.conv2(n.bn(n.conv1(x)))) * 2),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", CASES)
def test_networks_of_ones_own(case, training):
    cls, truth = CASES[case]
    net = cls()
    sub = adapted(net).train(training)
    net.train(training)
    reference = copy.deepcopy(net)
    x = torch.randn(3, 3, 32, 32)
    torch.manual_seed(5)
    logits, features = sub(x)
    torch.manual_seed(5)
    expected = reference(x)
    torch.testing.assert_close(logits, expected["logits"] if isinstance(expected, dict) else expected)
    torch.testing.assert_close(features, truth(reference, x))
    features.sum().backward()  # not detached
    first = net.model.conv1 if case == "nested" else net.conv1
    assert first.weight.grad is not None
    assert sub.state_dict().keys() == net.state_dict().keys()


def test_the_feature_map_keeps_its_values_when_a_view_of_it_is_changed():
    sub = adapted(FlattenThenInPlace()).train()
    _, features = sub(torch.randn(4, 3, 32, 32))
    assert (features == 0).float().mean() < 0.01  # dropout would leave half of them


def test_dtype_moves_all_of_it():
    sub = adapted(RootState()).double().eval()
    logits, features = sub(torch.randn(2, 3, 32, 32, dtype=torch.float64))
    assert logits.dtype == features.dtype == torch.float64


def test_threads_do_not_mix_their_feature_maps():
    sub = adapted(Functional()).eval()
    inputs = [torch.randn(2, 3, 32, 32) for _ in range(8)]
    with torch.no_grad():
        alone = [sub(x) for x in inputs]
    results: dict[int, list] = {i: [] for i in range(8)}

    def work(i):
        with torch.no_grad():
            results[i] = [sub(inputs[i]) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, (logits, features) in enumerate(alone):
        assert len(results[i]) == 20
        assert all(torch.equal(a, logits) and torch.equal(b, features) for a, b in results[i])


@pytest.mark.parametrize(
    "make",
    [lambda: adapted(Functional()), lambda: adapted(LeNet()), lambda: create("tiny", 4)],
    ids=["functional", "lenet", "own"],
)
def test_compiles_without_a_graph_break(make):
    sub = make()
    compiled = torch.compile(copy.deepcopy(sub), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 32, 32)
    for mode in (False, True, False):
        sub.train(mode)
        compiled.train(mode)
        torch.manual_seed(0)
        expected = sub(x)
        torch.manual_seed(0)
        for a, b in zip(compiled(x), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_exports():
    sub = adapted(Functional()).eval()
    x = torch.randn(3, 3, 32, 32)
    program = torch.export.export(sub, (x,)).module()
    for a, b in zip(program(x), sub(x), strict=True):
        torch.testing.assert_close(a, b)


def test_an_example_for_unusual_images():
    class Odd(Net):
        def __init__(self):
            super().__init__(in_channels=1)
            self.fc = nn.Linear(8 * 5 * 5, 4)

        def forward(self, x):
            return self.fc(self.body(x).flatten(1))

    with pytest.raises(ValueError, match=r"takes no image of 128, .*give adapt\(\) an example"):
        adapted(Odd())
    sub = adapted(Odd(), example=torch.zeros(7, 1, 20, 20))
    assert sub.plan.image == (1, 20, 20)
    assert sub.plan.feature_shape == (8, 5, 5)


def test_a_classifier_without_maps():
    sub = adapted(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10), nn.ReLU(), nn.Linear(10, 4)))
    logits, features = sub(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 4)
    assert features is None
    assert sub.feature_channels is None


class Branches(Net):
    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3))) if x.sum() > 0 else None


class Constant(Net):
    def forward(self, x):
        return self.fc((self.body(x) * torch.tensor([2.0])).mean((2, 3)))


class Dense(Net):
    def forward(self, x):
        return self.body(x)


class Clash(Net):
    def __init__(self):
        super().__init__()
        self.plan = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.fc(self.plan(self.body(x)).mean((2, 3)))


class Nothing(Net):
    def forward(self, x):
        return None


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Branches, "cannot follow the forward of Branches.*write a sub-network yourself"),
        (Constant, "makes a constant tensor; register it as a buffer"),
        (Dense, r"must return logits \(B, classes\).*got \(1, 8, 32, 32\)"),
        (Clash, "a part called 'plan'"),
        (Nothing, "Nothing returns no logits"),
    ],
)
def test_refusals(cls, message):
    net = cls()
    with pytest.raises(ValueError, match=message):
        adapted(net)
    assert all(module.training for module in net.modules())


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"expects a torch\.nn\.Module, got str"):
        adapted("resnet18")
    with pytest.raises(ValueError, match="must be a batch of images"):
        adapted(Functional(), example=torch.zeros(3, 32, 32))


def test_the_plan_is_printed_to_stderr_and_kept(capsys):
    sub = adapt(Functional())
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"{sub.plan}\n"
    assert "8 × 32 × 32" in err
    assert "logits       4, from fc" in err
    adapt(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)))
    assert "methods that fuse feature maps will refuse it" in capsys.readouterr().err
