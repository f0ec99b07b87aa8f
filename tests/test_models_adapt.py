"""Any classifier as a sub-network: feature map, logits, names, modes, composition."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision.models
from torch import nn

from fflfast.models import adapt, create


def adapted(net, **kwargs):
    return adapt(net, verbose=False, **kwargs)


def input_of(path):
    """The feature map as what a module of the network is given, by a hook."""

    def truth(net, x):
        seen = []
        with net.get_submodule(path).register_forward_pre_hook(lambda m, args: seen.append(args[0].clone())):
            net(x)
        return seen[0]

    return truth


def output_of(path, function=lambda y: y):
    def truth(net, x):
        seen = []
        with net.get_submodule(path).register_forward_hook(lambda m, args, out: seen.append(out.clone())):
            net(x)
        return function(seen[0])

    return truth


def forward_features(net, x):
    return net.forward_features(x)


def convnext():
    config = torchvision.models.convnext.CNBlockConfig
    return torchvision.models.ConvNeXt([config(16, 32, 1), config(32, 48, 1), config(48, None, 1)], num_classes=5)


def swin():
    return torchvision.models.SwinTransformer([4, 4], 24, [1, 1], [2, 2], [4, 4], num_classes=5)


def torchvision_net(name, **kwargs):
    return lambda: torchvision.models.get_model(name, weights=None, num_classes=5, **kwargs)


def timm_net(name, **kwargs):
    return lambda: timm.create_model(name, num_classes=5, **kwargs)


# Name: (how to build it, its feature map); large ones are made shallow and narrow by their own arguments.
NETWORKS = {
    "torchvision/resnet18": (torchvision_net("resnet18"), input_of("avgpool")),
    "torchvision/mobilenet_v2": (torchvision_net("mobilenet_v2"), output_of("features")),
    "torchvision/mobilenet_v3_small": (torchvision_net("mobilenet_v3_small"), input_of("avgpool")),
    "torchvision/efficientnet_b0": (torchvision_net("efficientnet_b0"), input_of("avgpool")),
    "torchvision/densenet": (
        lambda: torchvision.models.DenseNet(16, (2, 2, 2, 2), 32, num_classes=5),
        output_of("features", F.relu),
    ),
    "torchvision/shufflenet_v2_x0_5": (torchvision_net("shufflenet_v2_x0_5"), output_of("conv5")),
    "torchvision/mnasnet0_5": (torchvision_net("mnasnet0_5"), output_of("layers")),
    "torchvision/alexnet": (torchvision_net("alexnet"), input_of("avgpool")),
    "torchvision/squeezenet1_1": (torchvision_net("squeezenet1_1"), input_of("classifier.3")),
    "torchvision/convnext": (convnext, input_of("avgpool")),
    "torchvision/regnet_y_400mf": (torchvision_net("regnet_y_400mf"), input_of("avgpool")),
    "torchvision/swin": (swin, input_of("avgpool")),
    "torchvision/googlenet": (torchvision_net("googlenet", init_weights=False), input_of("avgpool")),
    "timm/resnet10t": (timm_net("resnet10t"), forward_features),
    "timm/mobilenetv3_small_050": (timm_net("mobilenetv3_small_050"), input_of("global_pool")),
    "timm/efficientnet_lite0": (timm_net("efficientnet_lite0"), forward_features),
    "timm/convnext_atto": (timm_net("convnext_atto", depths=(1, 1, 1, 1)), forward_features),
    "timm/regnety_002": (timm_net("regnety_002"), forward_features),
    "timm/densenet": (
        lambda: timm.models.DenseNet(16, (2, 2, 2, 2), num_classes=5),
        forward_features,
    ),
    "timm/swin": (
        timm_net("swin_tiny_patch4_window7_224", embed_dim=24, depths=(1,) * 4, num_heads=(2,) * 4),
        lambda net, x: net.forward_features(x).permute(0, 3, 1, 2),
    ),
    "timm/vit": (timm_net("vit_tiny_patch16_224", depth=1), None),
    "timm/mixer": (timm_net("mixer_s32_224"), None),
}


def build(name):
    torch.manual_seed(0)
    return NETWORKS[name][0]()


def small_image(name):
    return torch.randn(2, 3, 224, 224) if name in ("timm/swin", "timm/vit", "timm/mixer") else torch.randn(2, 3, 64, 64)


def same_state(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_the_libraries(name):
    net = build(name)
    before = copy.deepcopy(net)
    rng = torch.random.get_rng_state()
    sub = adapted(net)

    assert torch.equal(torch.random.get_rng_state(), rng)
    assert all(a.training and b.training for a, b in zip(net.modules(), sub.modules(), strict=False))
    assert same_state(net, before)
    assert list(sub.state_dict()) == list(net.state_dict())
    assert [n for n, _ in sub.named_buffers()] == [n for n, _ in net.named_buffers()]
    assert all(a is b for a, b in zip(net.parameters(), sub.parameters(), strict=True))

    x = small_image(name)
    sub.eval()
    net.eval()
    with torch.no_grad():
        logits, features = sub(x)
        torch.testing.assert_close(logits, net(x), rtol=0, atol=0)
        truth = NETWORKS[name][1]
        if truth is None:
            assert features is None
            assert sub.feature_channels is None
        else:
            torch.testing.assert_close(features, truth(net, x), rtol=0, atol=0)
            assert features.shape[1] == sub.feature_channels
    assert sub.num_classes == 5


@pytest.mark.parametrize(
    ("name", "dropout"),
    [
        ("torchvision/mobilenet_v3_small", 0.5),
        ("torchvision/googlenet", 0.0),  # its auxiliary heads, which we leave out, would draw random numbers
        ("timm/mobilenetv3_small_050", 0.5),
    ],
)
def test_training_mode_is_the_networks_own(name, dropout):
    """Dropout, batch statistics and auxiliary heads: same random draws, same updates, same gradients."""
    net = build(name)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    if hasattr(net, "drop_rate"):
        net.drop_rate = dropout  # F.dropout in the root's forward
    reference = copy.deepcopy(net).train()
    sub = adapted(net).train()
    x = small_image(name)
    torch.manual_seed(1)
    expected = reference(x)
    expected = expected if isinstance(expected, torch.Tensor) else expected[0]
    torch.manual_seed(1)
    logits, _ = sub(x)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    expected.square().sum().backward()
    logits.square().sum().backward()
    for (key, p), q in zip(sub.named_parameters(), reference.parameters(), strict=True):
        if not key.startswith("aux"):
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0)
    for (key, a), b in zip(sub.named_buffers(), reference.buffers(), strict=True):
        if not key.startswith("aux"):
            assert torch.equal(a, b), key
    sub.eval()
    torch.testing.assert_close(sub(x)[0], sub(x)[0], rtol=0, atol=0)


def test_every_module_runs_once():
    net = torchvision.models.mobilenet_v3_small(num_classes=5)
    sub = adapted(net).eval()
    calls = []
    for name, module in net.named_modules():
        if name and not list(module.children()):
            module.register_forward_hook(lambda m, a, o, name=name: calls.append(name))
    sub(torch.randn(1, 3, 64, 64))
    assert len(calls) == len(set(calls)) > 50


def test_deep_copies_are_apart():
    sub = adapted(create("torchvision/mnasnet0_5", 3).train())
    twin = copy.deepcopy(sub)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(sub.eval()(x)[0], twin.eval()(x)[0])
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert sub(x)[0].abs().sum() > 0
    assert twin(x)[0].abs().sum() == 0


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/resnet10t"])
def test_a_small_example_does_not_mislead(name):
    """At 32 pixels the last map is a single pixel; which one it is must not depend on that."""
    sub = adapted(build(name), example=torch.zeros(2, 3, 32, 32)).eval()
    assert sub.feature_channels == 512
    assert sub(torch.zeros(2, 3, 32, 32))[1].shape == (2, 512, 1, 1)


def test_the_plan_names_heads_that_learn_nothing():
    sub = adapted(build("torchvision/googlenet"))
    assert sub.plan.notes == ("auxiliary outputs are left out: aux1, aux2 get no gradient",)


def test_sub_networks_come_back_as_they_are():
    net = create("tiny", 3)
    assert adapt(net) is net
