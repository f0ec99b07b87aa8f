"""A network in two: trunk and sub-network."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision.models
from torch import nn

from fflfast.models import adapt, available, create, split


def merged(*parts):
    return {name: tensor for part in parts for name, tensor in part.state_dict().items()}


def check(net, trunk, sub, x):
    """The parts are the network: outputs, names, the same parameters, in both modes."""
    whole = net.state_dict()
    assert not trunk.state_dict().keys() & sub.state_dict().keys()
    assert merged(trunk, sub).keys() == whole.keys()
    assert all(tensor.data_ptr() == whole[name].data_ptr() for name, tensor in merged(trunk, sub).items())
    assert {id(p) for p in (*trunk.parameters(), *sub.parameters())} == {id(p) for p in net.parameters()}
    for training in (True, False):
        expected = copy.deepcopy(net).train(training)
        below, above = copy.deepcopy((trunk, sub))
        torch.manual_seed(0)
        logits, features = expected(x)
        torch.manual_seed(0)
        got = above.train(training)(below.train(training)(x))
        torch.testing.assert_close(got[0], logits, rtol=0, atol=0)
        torch.testing.assert_close(got[1], features, rtol=0, atol=0)
        for name, tensor in merged(below, above).items():
            assert torch.equal(tensor, expected.state_dict()[name]), name
    assert (sub.feature_channels, sub.num_classes, sub.arch) == (net.feature_channels, net.num_classes, net.arch)


CLASSIFIERS = [n for n in available() if not n.startswith(("hourglass", "mobilepose"))]


@pytest.mark.parametrize("name", [n for n in CLASSIFIERS if n not in ("resnet110", "resnet56", "wrn_40_2")])
def test_our_own_at_their_default(name):
    net = create(name, 5)
    trunk, sub = split(net, net.default_split)
    check(net, trunk, sub, torch.randn(2, 3, 16, 16))


def test_the_trunk_of_a_resnet_is_what_ffl_shares():
    trunk, sub = split(create("resnet20", 10), "layer3")
    assert {n.split(".")[0] for n in trunk.state_dict()} == {"conv1", "bn1", "layer1", "layer2"}
    assert {n.split(".")[0] for n in sub.state_dict()} == {"layer3", "fc"}
    x = torch.randn(2, 3, 32, 32)
    assert trunk(x).shape == (2, 32, 16, 16)


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("torchvision/resnet18", "layer3"),
        ("torchvision/resnet18", "layer2.1"),
        ("torchvision/mobilenet_v3_small", "features.6"),
        ("torchvision/shufflenet_v2_x0_5", "stage4"),
        ("torchvision/squeezenet1_1", "classifier"),
        ("torchvision/mnasnet0_5", "layers.10"),
        ("timm/mobilenetv3_small_050", "blocks.3"),
        ("timm/regnety_002", "s4"),
        ("timm/convnext_atto", "stages.3"),
    ],
)
def test_networks_of_the_libraries(name, at):
    net = create(name, 5)
    trunk, sub = split(net, at)
    check(net, trunk, sub, torch.randn(2, 3, 64, 64))


def test_two_sub_networks_on_one_trunk_do_not_disturb_each_other():
    """The upper part begins with an activation in place: both must still see what the trunk gave."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(3, 6, 3), nn.SiLU(inplace=True), nn.Conv2d(6, 6, 3))
            self.fc = nn.Linear(6, 4)

        def forward(self, x):
            return self.fc(self.features(x).mean((2, 3)))

    nets = [adapt(Net(), verbose=False) for _ in range(2)]
    (trunk, first), (_, second) = (split(net, "features.1") for net in nets)
    x = trunk(torch.randn(2, 3, 32, 32))
    before = x.detach().clone()
    alone = second(x.detach().clone())[0]
    torch.testing.assert_close(first(x)[0], first(before)[0])
    torch.testing.assert_close(x, before, rtol=0, atol=0)
    torch.testing.assert_close(second(x)[0], alone, rtol=0, atol=0)
    second(x)[0].sum().backward()


def test_heads_that_nothing_uses_stay_in_the_state_dict():
    net = adapt(torchvision.models.googlenet(num_classes=4, init_weights=False), verbose=False)
    trunk, sub = split(net, "inception5a")
    assert merged(trunk, sub).keys() == net.state_dict().keys()
    assert any(name.startswith("aux1") for name in sub.state_dict())


def test_dropout_in_the_trunk_follows_the_mode():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, 4, 3)
            self.conv2 = nn.Conv2d(4, 4, 3)
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            x = F.dropout(self.conv1(x), 0.5, self.training)
            return self.fc(self.conv2(x).mean((2, 3)))

    trunk, _ = split(adapt(Net(), verbose=False), "conv2")
    x = torch.randn(2, 3, 16, 16)
    assert (trunk.train()(x) == 0).any()
    assert not (trunk.eval()(x) == 0).any()


def test_a_part_can_be_split_again():
    net = create("resnet20", 10)
    trunk, sub = split(net, "layer3")
    middle, top = split(sub, "layer3.2", example=torch.zeros(1, 32, 8, 8))
    x = torch.randn(2, 3, 32, 32)
    net.eval()
    torch.testing.assert_close(top.eval()(middle.eval()(trunk.eval()(x)))[0], net(x)[0])


def test_parts_compile_and_export():
    trunk, sub = split(create("tiny", 4).eval(), "layer3")
    x = torch.randn(2, 3, 16, 16)
    expected = sub(trunk(x))
    compiled = torch.compile(lambda x: sub(trunk(x)), fullgraph=True, backend="aot_eager")
    program = torch.export.export(nn.Sequential(trunk, sub), (x,)).module()
    for got in (compiled(x), program(x)):
        torch.testing.assert_close(got[0], expected[0])
        torch.testing.assert_close(got[1], expected[1])


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("layer4", "no module 'layer4'; did you mean 'layer3'.*possible at: bn1, layer1, layer2, layer3"),
        ("", "no module ''"),
        ("conv1", "nothing would be left for the trunk"),
        ("layer2.0.conv2", "2 values cross; a split is possible at: .*layer2"),
        ("layer1.0.bn2", "2 values cross"),
        ("layer2.0.downsample.0", "2 values cross"),
    ],
)
def test_where_it_cannot_be_split(at, message):
    net = create("resnet20", 10)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        split(net, at)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(module.training for module in net.modules())


def test_every_point_that_an_error_lists_is_one():
    net = create("densenet40_12", 10)
    with pytest.raises(ValueError, match="a split is possible at") as caught:
        split(net, "block2.1.conv1")
    points = str(caught.value).split("possible at: ")[1].removesuffix(", …").split(", ")
    assert len(points) > 6
    for point in points:
        split(net, point)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 1)
        self.conv2 = nn.Conv2d(4, 4, 3)
        self.conv3 = nn.Conv2d(4, 4, 3)
        self.conv3.weight = self.conv2.weight
        self.unused = nn.Conv2d(1, 1, 1)
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(self.conv3(self.conv2(self.conv1(x))).mean((2, 3)))


def test_tied_weights_cannot_be_parted():
    net = adapt(Tied(), verbose=False)
    with pytest.raises(ValueError, match="would leave 1 tensors in both parts"):
        split(net, "conv3")
    trunk, sub = split(net, "conv2")
    assert merged(trunk, sub).keys() == net.state_dict().keys()


def test_a_module_that_the_forward_does_not_call():
    with pytest.raises(ValueError, match="'unused' is no step of the network's forward"):
        split(adapt(Tied(), verbose=False), "unused")


def test_a_plain_network_must_be_adapted_first():
    with pytest.raises(TypeError, match=r"adapt\(\) it first"):
        split(Tied(), "conv2")
