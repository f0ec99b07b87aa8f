"""Widths of our own networks, and the outputs of their stages."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from fflfast.cohort import Cohort
from fflfast.models import SubNetwork, adapt, create, export_sub_network, load_exported, split
from fflfast.models.densenet import SmallDenseNet
from fflfast.models.wide_resnet import WideResNet

FAMILIES = ("resnet8", "wrn_16_2", "wrn_20_8", "cifar_vgg16_bn", "densenet40_12")


def count(module):
    return sum(p.numel() for p in module.parameters())


def stage_outputs(net, x):
    """Logits, feature map and what each stage's module returned, from a plain forward."""
    seen = {}
    hooks = [
        net.get_submodule(name).register_forward_hook(lambda _, __, out, n=name: seen.update({n: out.clone()}))
        for name in net.stage_names
    ]
    logits, features = net(x)
    for hook in hooks:
        hook.remove()
    return logits, features, [seen[name] for name in net.stage_names]


def assert_same(got, expected):
    assert len(got) == 3
    for a, b in zip((got[0], got[1], *got[2]), (expected[0], expected[1], *expected[2]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


# ---- widths


@pytest.mark.parametrize(
    ("name", "stem", "channels"),
    [
        ("resnet32@3/4", 16, (12, 24, 48)),
        ("resnet32@3/5", 16, (9, 19, 38)),  # 9.6, 19.2, 38.4
        ("resnet32@0.2", 16, (3, 6, 12)),  # 3.2, 6.4, 12.8
        ("resnet32@1/100", 16, (1, 1, 1)),
        ("resnet32@2", 16, (32, 64, 128)),
        ("tiny@1/3", 4, (1, 2, 5)),
        ("wrn_16_2@0.5", 16, (16, 32, 64)),
        ("wrn_20_8@3/4", 16, (48, 96, 192)),
        ("cifar_vgg16_bn@1/3", 64, (42, 85, 170, 170)),
        ("densenet40_12@2/3", 24, (24 + 6 * 8, 36 + 6 * 8, 42 + 6 * 8)),
    ],
)
def test_channels(name, stem, channels):
    net = create(name, 5)
    net.return_stages = True
    first = next(m for m in net.modules() if isinstance(m, nn.Conv2d))
    logits, features, stages = net(torch.randn(2, 3, 16, 16))
    assert first.out_channels == stem
    assert tuple(stage.shape[1] for stage in stages) == channels
    assert features.shape[1] == net.feature_channels == channels[-1]
    assert (logits.shape, net.arch, net.num_classes) == ((2, 5), name, 5)


def test_inner_widths():
    assert create("wrn_20_8@3/4", 5).layer2[0].conv2.weight.shape[:2] == (192, 192)
    assert create("densenet40_12@2/3", 5).block2[1].conv1.out_channels == 4 * 8
    assert [m.in_features for m in create("cifar_vgg16_bn@1/3", 5).classifier if hasattr(m, "in_features")] == [170] * 3


@pytest.mark.parametrize(("width", "channels"), [("", (16, 32, 64)), ("@4/5", (12, 25, 51)), ("@1/5", (3, 6, 12))])
def test_parameters_of_a_resnet(width, channels):
    """Counted from the layer table: a 3×3 convolution without bias and batch norm has 9·a·b + 2·b parameters."""
    total, before = 9 * 3 * 16 + 2 * 16, 16
    for stage, c in enumerate(channels):
        total += 9 * before * c + 2 * c + 9 * c * c + 2 * c + 2 * 2 * (9 * c * c + 2 * c)
        if stage or before != c:
            total += before * c + 2 * c
        before = c
    assert count(create(f"resnet20{width}", 100)) == total + before * 100 + 100


@pytest.mark.parametrize("width", ["1", "4/4", "1.0", "01"])
@pytest.mark.parametrize("name", FAMILIES)
def test_full_width_is_the_plain_network(name, width):
    states = []
    for full in (name, f"{name}@{width}"):
        torch.manual_seed(1)
        states.append(create(full, 5).state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_every_width_has_the_same_stem(name):
    x = torch.randn(2, 3, 16, 16)
    nets = [create(f"{name}@{width}", 5) for width in ("1", "3/4", "1/2", "1/12")]
    parts = [split(net, net.stage_names[0]) for net in nets]
    shapes = [{key: tensor.shape for key, tensor in trunk.state_dict().items()} for trunk, _ in parts]
    assert shapes[0]
    assert all(shape == shapes[0] for shape in shapes)
    out = Cohort([rest for _, rest in parts], parts[0][0])(x)
    assert [z.shape for z in out.logits] == [(2, 5)] * 4


@pytest.mark.parametrize("at", ["stem", "default"])
@pytest.mark.parametrize(
    "name", ["resnet8@3/5", "wrn_16_2@0.3", "wrn_20_8@1/7", "cifar_vgg16_bn@1/9", "densenet40_12@7/12", "tiny@3/4"]
)
def test_an_exported_width_comes_back_to_the_bit(tmp_path, name, at):
    torch.manual_seed(0)
    net = create(name, 6)
    trunk, rest = split(net, net.stage_names[0] if at == "stem" else net.default_split)
    x = torch.randn(4, 3, 16, 16)
    rest(trunk(x))  # moves the batch statistics
    with torch.no_grad():
        expected = rest.eval()(trunk.eval()(x))[0]
        file = export_sub_network(rest, trunk, tmp_path / "sub0.safetensors", metadata={"data": "digits"})
        plain = create(name, 6).eval()
        plain.load_state_dict(load_file(file), strict=True)
        assert torch.equal(plain(x)[0], expected)
        module, metadata = load_exported(file)
        assert torch.equal(module(x), expected)
    assert metadata == {"arch": name, "num_classes": 6, "data": "digits"}
    with safe_open(file, framework="pt") as content:
        assert json.loads(content.metadata()["fflfast"])["arch"] == name


@pytest.mark.parametrize(
    "width", ["", "0", "0/3", "3/0", "-1/2", "1/-2", " 1/2", "half", "1e-1", "1/2/3", ".5", "nan", "½"]
)
def test_widths_that_are_none(width):
    with pytest.raises(ValueError, match=r"the width behind @ must be a fraction or decimal above 0, such as 3/4"):
        create(f"resnet8@{width}", 5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet33@1/2", r"only our own networks take a width, not 'resnet33@1/2'; did you mean resnet32"),
        ("torchvision/resnet18@1/2", r"only our own networks take a width"),
        ("timm/lcnet_050@0.5", r"only our own networks take a width"),
        ("@1/2", r"only our own networks take a width, not '@1/2'; our own are tiny"),
    ],
)
def test_networks_without_widths(name, message):
    with pytest.raises(ValueError, match=message):
        create(name, 5)


def test_no_published_weights_of_a_width():
    with pytest.raises(ValueError, match="no published weights of 'resnet8@1/2'"):
        create("resnet8@1/2", 5, pretrained=True)


# ---- stages


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", FAMILIES)
def test_stages_are_what_their_modules_return(name, training):
    torch.manual_seed(0)
    net = create(f"{name}@1/8", 5).train(training)
    x = torch.randn(2, 3, 16, 16)
    assert len(net(x)) == 2
    with torch.no_grad():
        expected = stage_outputs(copy.deepcopy(net), x)
        net.return_stages = True
        assert_same(copy.deepcopy(net)(x), expected)
    sum(stage.square().mean() for stage in net(x)[2]).backward()
    first = net.get_submodule(net.stage_names[0])
    assert all(float(p.grad.abs().sum()) > 0 for p in first.parameters() if p.dim() == 4)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_split_keeps_the_stages_above_it(name, when):
    torch.manual_seed(0)
    net = create(f"{name}@1/8", 5).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = stage_outputs(net, x)
        net.return_stages = when == "before"
        for k, at in enumerate(net.stage_names):
            trunk, rest = split(net, at)
            assert rest.stage_names == net.stage_names[k:]
            assert rest.return_stages is (when == "before")
            shared = trunk(x)
            assert isinstance(shared, torch.Tensor)
            rest.return_stages = True
            whole = (expected[0], expected[1], expected[2][k:])
            assert_same(rest(shared), whole)
            assert_same(copy.deepcopy(rest)(shared), whole)
            rest.return_stages = False
            plain = rest(shared)
            assert len(plain) == 2
            assert torch.equal(plain[0], expected[0])
    assert net.return_stages is (when == "before")


def test_a_stage_that_a_split_goes_through_stays_above():
    net = create("resnet20@1/4", 5).eval()
    net.return_stages = True
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        _, _, stages = net(x)
        for at in ("layer2.1", "layer2.0.conv1"):
            trunk, rest = split(net, at)
            assert rest.stage_names == ("layer2", "layer3")
            for got, expected in zip(rest(trunk(x))[2], stages[1:], strict=True):
                assert torch.equal(got, expected)
        middle, top = split(rest, "layer3", example=trunk(x))
        assert (top.stage_names, top.return_stages) == (("layer3",), True)
        assert torch.equal(top(middle(trunk(x)))[2][0], stages[2])


def test_training_a_split_network_trains_its_modes_alike():
    """In training mode too the third value is that of the modules, and the running statistics move once."""
    net = create("tiny", 5)
    whole = copy.deepcopy(net)
    trunk, rest = split(net, "layer1")
    rest.return_stages = True
    x = torch.randn(4, 3, 8, 8)
    got, expected = rest(trunk(x)), stage_outputs(whole, x)
    assert_same(got, expected)
    assert int(net.layer3[0].bn1.num_batches_tracked) == 1
    got[2][0].square().sum().backward()
    assert float(net.conv1.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize(
    "build",
    [
        lambda: create("tiny", 5),
        lambda: WideResNet(5, depth=10, widening=1),
        lambda: create("cifar_vgg16_bn@1/32", 5),
        lambda: SmallDenseNet(5, depth=10, growth=4),
    ],
    ids=["resnet", "wide", "vgg", "densenet"],
)
def test_stages_of_compiled_networks(build):
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = build().eval()
    trunk, rest = split(net, net.stage_names[1])
    x = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(rest, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        shared = trunk(x)
        assert len(compiled(shared)) == 2
        rest.return_stages = True
        for a, b in zip(compiled(shared)[2], rest(shared)[2], strict=True):
            torch.testing.assert_close(a, b)
        net.return_stages = True
        whole = torch.compile(net, fullgraph=True, backend="aot_eager")
        for a, b in zip(whole(x)[2], net(x)[2], strict=True):
            torch.testing.assert_close(a, b)


def test_a_cohort_knows_the_shapes_of_its_stages():
    nets = [create("tiny", 5), create("tiny@1/2", 5), create("tiny", 5)]
    nets[0].return_stages = nets[1].return_stages = True
    cohort = Cohort(nets)
    before = {name: tensor.clone() for name, tensor in cohort.state_dict().items()}
    wide = ((4, 32, 32), (8, 16, 16), (16, 8, 8))
    half = ((2, 32, 32), (4, 16, 16), (8, 8, 8))
    assert cohort.stage_shapes == (wide, half, ())
    assert all(torch.equal(tensor, before[name]) for name, tensor in cohort.state_dict().items())
    assert cohort.training


def test_networks_of_others_have_no_stages():
    net = adapt(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), verbose=False)
    assert net.stage_names == ()
    _, rest = split(net, "1")
    assert (rest.stage_names, rest.return_stages) == ((), False)


def test_a_network_may_split_itself():
    class Own(SubNetwork):
        def forward(self, x):
            return x.mean((2, 3)), x

        def split_at(self, name):
            if name != "middle":
                raise ValueError(f"only at 'middle', not at '{name}'")
            return nn.Identity(), self

    net = Own()
    trunk, rest = split(net, "middle")
    assert isinstance(trunk, nn.Identity)
    assert rest is net
    with pytest.raises(ValueError, match="only at 'middle'"):
        split(net, "top")
