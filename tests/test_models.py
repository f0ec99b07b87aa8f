"""Our own networks and networks by name."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fflfast import models
from fflfast.models import create, split


def count(module):
    return sum(p.numel() for p in module.parameters())


# resnet: FFL's paper code; wrn_16_2, wrn_40_2: the 0.70 M and 2.26 M of the distillation literature;
# the others counted by hand from the layer tables.
TOTALS = {
    "resnet20": (278_324, 66_128),
    "resnet32": (472_756, 112_592),
    "resnet56": (861_620, 205_520),
    "resnet110": (1_736_564, 414_608),
    "wrn_16_2": (703_284, None),
    "wrn_40_2": (2_255_156, None),
    "cifar_vgg16_bn": (14_714_688 + 8_448 + 2 * (512 * 512 + 512) + 512 * 100 + 100, None),
    "densenet40_12": (188_092, None),
}


@pytest.mark.parametrize("name", TOTALS)
def test_parameter_totals(name):
    total, trunk = TOTALS[name]
    net = create(name, 100)
    assert count(net) == total
    if trunk is not None:
        assert count(split(net, net.default_split)[0]) == trunk


def test_wrn_20_8_counts_twenty_layers():
    net = create("wrn_20_8", 100)
    on_path = [m for n, m in net.named_modules() if isinstance(m, torch.nn.Conv2d) and "downsample" not in n]
    assert len(on_path) + 1 == 20
    assert [net.layer1[0].conv2.out_channels, net.layer3[1].conv2.out_channels] == [128, 512]
    assert net.feature_channels == 256


def test_tiny_has_a_few_thousand_parameters():
    assert count(create("tiny", 10)) < 6_000


@pytest.mark.parametrize("name", ["tiny", "resnet20", "wrn_16_2", "cifar_vgg16_bn", "densenet40_12"])
@pytest.mark.parametrize("size", [8, 33], ids=lambda s: f"{s}px")
def test_contract_at_any_image_size(name, size):
    net = create(name, 7).eval()
    with torch.no_grad():
        logits, features = net(torch.randn(2, 3, size, size))
        pool = F.adaptive_max_pool2d if name == "cifar_vgg16_bn" else F.adaptive_avg_pool2d
        head = net.classifier if name == "cifar_vgg16_bn" else net.fc
        torch.testing.assert_close(logits, head(pool(features, 1).flatten(1)))
    assert logits.shape == (2, 7)
    assert features.shape[:2] == (2, net.feature_channels)
    assert features.min() >= 0
    assert (net.arch, net.num_classes) == (name, 7)


def test_vgg_on_32_pixels_is_the_usual_one():
    net = create("cifar_vgg16_bn", 10).eval()
    with torch.no_grad():
        logits, features = net(torch.randn(2, 3, 32, 32))
        torch.testing.assert_close(logits, net.classifier(F.max_pool2d(features, 2).flatten(1)))


def test_resnet_state_dict_names():
    names = {n.rpartition(".")[0] for n in create("resnet20", 10).state_dict()}
    blocks = {f"layer{s}.{b}.{part}" for s in (1, 2, 3) for b in range(3) for part in ("conv1", "bn1", "conv2", "bn2")}
    shortcuts = {f"layer{s}.0.downsample.{i}" for s in (2, 3) for i in (0, 1)}
    assert names == {"conv1", "bn1", "fc"} | blocks | shortcuts


def norm(x, state, name):
    keys = ("running_mean", "running_var", "weight", "bias")
    mean, var, weight, bias = (state[f"{name}.{key}"][:, None, None] for key in keys)
    return (x - mean) / torch.sqrt(var + 1e-5) * weight + bias


def disturb(net):
    for name, tensor in net.state_dict().items():
        if "running" in name or "bn" in name:
            tensor.copy_(torch.rand_like(tensor.float()) + 0.5)
    return net.double().eval()


def test_resnet_forward_against_its_formula():
    net = disturb(create("resnet8", 5))
    state = net.state_dict()

    def block(x, name, stride):
        y = norm(F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1), state, f"{name}.bn1")
        y = norm(F.conv2d(y.clamp(min=0), state[f"{name}.conv2.weight"], padding=1), state, f"{name}.bn2")
        if f"{name}.downsample.0.weight" in state:
            x = F.conv2d(x, state[f"{name}.downsample.0.weight"], stride=stride)
            x = norm(x, state, f"{name}.downsample.1")
        return (x + y).clamp(min=0)

    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    y = norm(F.conv2d(x, state["conv1.weight"], padding=1), state, "bn1").clamp(min=0)
    for name, stride in (("layer1.0", 1), ("layer2.0", 2), ("layer3.0", 2)):
        y = block(y, name, stride)
    with torch.no_grad():
        logits, features = net(x)
    torch.testing.assert_close(features, y)
    torch.testing.assert_close(logits, y.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"])


def test_wide_resnet_block_against_its_formula():
    block = disturb(create("wrn_16_2", 5)).layer2[0]
    state = block.state_dict()
    x = torch.randn(2, 32, 8, 8, dtype=torch.float64)
    active = norm(x, state, "bn1").clamp(min=0)
    y = norm(F.conv2d(active, state["conv1.weight"], stride=2, padding=1), state, "bn2").clamp(min=0)
    y = F.conv2d(y, state["conv2.weight"], padding=1) + F.conv2d(active, state["shortcut.weight"], stride=2)
    with torch.no_grad():
        torch.testing.assert_close(block(x), y)


@pytest.mark.parametrize("name", ["resnet32", "wrn_16_2", "cifar_vgg16_bn", "densenet40_12"])
def test_initial_weights(name):
    torch.manual_seed(0)
    for module in create(name, 10).modules():
        if isinstance(module, torch.nn.Conv2d):
            std = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            samples = module.weight.numel()
            assert module.weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * samples))
            assert abs(module.weight.mean().item()) < 5 * std / math.sqrt(samples)
        elif isinstance(module, torch.nn.BatchNorm2d):
            assert bool((module.weight == 1).all())
            assert bool((module.bias == 0).all())


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("mnasnet0_5", "torchvision/mnasnet0_5"),
        ("torchvision/resnet18", "torchvision/resnet18"),
        ("timm/lcnet_050", "timm/lcnet_050"),
        ("lcnet_050.ra2_in1k", "timm/lcnet_050.ra2_in1k"),
    ],
)
def test_names_of_other_libraries(name, arch):
    net = create(name, 4, image_size=64).eval()
    with torch.no_grad():
        logits, features = net(torch.randn(2, 3, 64, 64))
    assert (net.arch, net.num_classes, logits.shape) == (arch, 4, (2, 4))
    assert features.shape == (2, net.feature_channels, 2, 2)
    assert create(net.arch, 4).state_dict().keys() == net.state_dict().keys()


def test_image_size_reaches_a_vision_transformer():
    net = create("timm/vit_tiny_patch16_224", 4, image_size=32).eval()
    with torch.no_grad():
        logits, features = net(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 4)
    assert features is None
    assert net.feature_channels is None


def test_own_names_come_first():
    assert "resnet20" in models.available()
    assert type(create("densenet40_12", 10)).__module__ == "fflfast.models.densenet"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet33", "did you mean .*resnet32"),
        ("timm/lcnet_05", "did you mean .*timm/lcnet_050"),
        ("torchvision/resnet20", "did you mean .*torchvision/resnet"),
        ("qqqqqqqq", "our own are .*tiny"),
        ("", "no network is called ''"),
        ("nobody/resnet20", "no network is called 'nobody/resnet20'"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        create(name, 10)


@pytest.mark.parametrize("num_classes", [0, -3, 2.0, True, "10", None])
def test_bad_num_classes(num_classes):
    with pytest.raises(ValueError, match="num_classes must be a whole number"):
        create("tiny", num_classes)


def test_a_network_instead_of_a_name():
    with pytest.raises(TypeError, match=r"give adapt\(\)"):
        create(torch.nn.Linear(2, 2), 10)


def test_no_pretrained_weights_of_our_own():
    with pytest.raises(ValueError, match="no published weights of 'resnet32'"):
        create("resnet32", 10, pretrained=True)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_missing_library(monkeypatch, library):
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, library, None)
    assert create("tiny", 3).num_classes == 3
    with pytest.raises(ValueError, match=f"pip install {library}"):
        create(f"{library}/resnet18", 3)
    with pytest.raises(ValueError, match=f"{library} not installed, so not searched"):
        create("no_such_network", 3)


def test_pretrained_takes_all_but_the_head(monkeypatch):
    import torchvision.models

    source = torchvision.models.mnasnet0_5(num_classes=6)
    original = torchvision.models.get_model

    def get_model(name, **kwargs):
        return source if kwargs.get("weights") == "DEFAULT" else original(name, **kwargs)

    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    net = create("torchvision/mnasnet0_5", 3, pretrained=True)
    for name, tensor in net.state_dict().items():
        if name.startswith("classifier.1"):
            assert len(tensor) == 3
        else:
            assert torch.equal(tensor, source.state_dict()[name]), name


def test_failed_download_is_one_clear_error(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(ValueError, match="cannot build mnasnet0_5: no route to host"):
        create("torchvision/mnasnet0_5", 3, pretrained=True)


def test_import_needs_no_model_library():
    code = "import sys, fflfast.models; print([m for m in ('torchvision', 'timm', 'safetensors') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
