"""Exported files: plain weights for the libraries they came from, and the fused model as a program."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys

import pytest
import timm
import torch
import torchvision.models
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from fflfast.cohort import Cohort, Learner
from fflfast.methods import resolve
from fflfast.models import create, export_fused, export_sub_network, load_exported, split

ARCHITECTURES = [
    "tiny",
    "resnet20",
    "wrn_16_2",
    "densenet40_12",
    "torchvision/resnet18",
    "torchvision/mobilenet_v2",
    "torchvision/mobilenet_v3_small",
    "torchvision/shufflenet_v2_x0_5",
    "torchvision/squeezenet1_1",
    "torchvision/regnet_y_400mf",
    "torchvision/googlenet",
    "timm/resnet10t",
    "timm/mobilenetv3_small_050",
    "timm/convnext_atto",
    "timm/regnety_002",
    "timm/efficientnet_lite0",
]


def plain_network(arch):
    """The network as its own library builds it."""
    library, _, name = arch.rpartition("/")
    if library == "timm":
        return timm.create_model(name, num_classes=6)
    if library == "torchvision":
        extra = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
        return torchvision.models.get_model(name, weights=None, num_classes=6, **extra)
    net = create(name, 6)
    net.register_forward_hook(lambda module, args, out: out[0])
    return net


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_sub_network_loads_strictly_where_it_came_from(tmp_path, arch):
    net = create(arch, 6).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = net(x)[0]
        trunk, sub = split(net, net.default_split) if net.default_split else (None, net)
        file = export_sub_network(sub, trunk, tmp_path / "sub0.safetensors", metadata={"data": "digits"})

        plain = plain_network(arch).eval()
        plain.load_state_dict(load_file(file), strict=True)
        torch.testing.assert_close(plain(x), expected, rtol=0, atol=0)

        module, metadata = load_exported(file)
        torch.testing.assert_close(module(x), expected, rtol=0, atol=0)
    assert metadata == {"arch": arch, "num_classes": 6, "data": "digits"}
    assert [p.name for p in tmp_path.iterdir()] == ["sub0.safetensors"]


def test_a_network_that_insists_on_a_version_comes_back(tmp_path):
    net = create("torchvision/mnasnet0_5", 6).eval()
    file = export_sub_network(net, None, tmp_path / "a.safetensors", metadata={"image_size": 64})
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(load_exported(file)[0](x), net(x)[0], rtol=0, atol=0)


def test_a_trained_trunk_and_sub_network_merge(tmp_path):
    """After a step in training the file holds what was trained, batch statistics included."""
    trunk, sub = split(create("tiny", 6), "layer3")
    x = torch.randn(8, 3, 16, 16)
    optimizer = torch.optim.SGD([*trunk.parameters(), *sub.parameters()], lr=0.1)
    sub(trunk(x))[0].square().sum().backward()
    optimizer.step()
    file = export_sub_network(sub, trunk, tmp_path / "a.safetensors", metadata={})
    net = create("tiny", 6)
    net.load_state_dict(load_file(file), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(x)[0], sub.eval()(trunk.eval()(x))[0], rtol=0, atol=0)
    assert net.bn1.num_batches_tracked == 1


@pytest.mark.parametrize("change", ["channels_last", "half", "tied", "compiled"])
def test_unusual_weights(tmp_path, change):
    net = create("tiny", 6)
    expected = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    source: nn.Module = net
    if change == "channels_last":
        net.to(memory_format=torch.channels_last)
    elif change == "half":
        net.half()
        expected = {n: t.half() if t.is_floating_point() else t for n, t in expected.items()}
    elif change == "tied":
        net.layer3[0].bn2.weight = net.layer3[0].bn1.weight
    else:
        source = torch.compile(net)
    saved = load_file(export_sub_network(source, None, tmp_path / "a.safetensors", metadata={}))
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
    assert all(saved[name].dtype == tensor.dtype for name, tensor in expected.items())


def test_metadata_is_one_json_string_in_the_header(tmp_path):
    given = {"mean": [129.3, 124.1, 112.4], "image_size": 32, "data": "näme", "arch": "resnet20"}
    file = export_sub_network(create("tiny", 6), None, tmp_path / "a.safetensors", metadata=given)
    with safe_open(file, framework="pt") as content:
        header = content.metadata()
    assert json.loads(header["fflfast"]) == {**given, "num_classes": 6}


@pytest.mark.parametrize(
    ("name", "metadata", "message"),
    [
        ("a.pt", {}, r"must end in \.safetensors, got a\.pt"),
        ("gone/a.safetensors", {}, "no folder .*gone"),
        ("a.safetensors", {"mean": torch.zeros(3)}, "metadata must be JSON values"),
    ],
    ids=["suffix", "folder", "metadata"],
)
def test_bad_requests_write_nothing(tmp_path, name, metadata, message):
    with pytest.raises(ValueError, match=message):
        export_sub_network(create("tiny", 6), None, tmp_path / name, metadata=metadata)
    assert list(tmp_path.iterdir()) == []


def test_parts_of_one_network_only(tmp_path):
    trunk, _ = split(create("tiny", 6), "layer3")
    with pytest.raises(ValueError, match=r"both have .*give the parts that split\(\) made"):
        export_sub_network(create("tiny", 6), trunk, tmp_path / "a.safetensors", metadata={})


def make_learner(arches=("tiny", "tiny"), method="ffl", shared=True):
    torch.manual_seed(3)
    nets = [create(arch, 6) for arch in arches]
    trunk = None
    if shared:
        trunk = split(nets[0], "layer3")[0]
        nets = [split(net, "layer3")[1] for net in nets]
    cohort = Cohort(nets, trunk)
    learner = Learner(cohort, resolve(method)(cohort, 6))
    for _ in range(3):  # batch statistics that are not the initial ones
        learner.predict(torch.randn(8, 3, 16, 16))
    return learner


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    learner = make_learner(("tiny", "wrn_16_2"), shared=False)
    file = tmp_path_factory.mktemp("fused") / "fused.pt2"
    before = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    metadata = {"mean": [1.5], "data": "ü"}
    returned = export_fused(learner, file, example_images=torch.randn(1, 3, 16, 16), metadata=metadata)
    assert returned == file
    assert all(module.training for module in learner.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.state_dict().items())
    assert [p.name for p in file.parent.iterdir()] == ["fused.pt2"]
    return learner.eval(), file


@pytest.mark.parametrize("batch", [1, 2, 3, 17])
def test_the_program_gives_the_fused_logits_for_any_batch(fused, batch):
    learner, file = fused
    module, metadata = load_exported(file)
    x = torch.randn(batch, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(module(x), learner.predict(x)["fused"], rtol=1e-5, atol=1e-5)
    assert metadata == {"mean": [1.5], "data": "ü"}


def test_the_program_loads_without_this_library(fused, tmp_path):
    learner, file = fused
    x = torch.randn(3, 3, 16, 16)
    torch.save(x, tmp_path / "x.pt")
    code = """
import sys
sys.modules["fflfast"] = sys.modules["torchvision"] = sys.modules["timm"] = None
import torch
program = torch.export.load(sys.argv[1]).module()
torch.save(program(torch.load(sys.argv[2])), sys.argv[3])
"""
    out = tmp_path / "y.pt"
    command = [sys.executable, "-I", "-c", code, str(file), str(tmp_path / "x.pt"), str(out)]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(out), learner.predict(x)["fused"], rtol=1e-5, atol=1e-5)


def test_a_shared_trunk_exports(tmp_path):
    learner = make_learner()
    export_fused(learner, tmp_path / "f.pt2", example_images=torch.randn(4, 3, 16, 16), metadata={})
    x = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        expected = learner.eval().predict(x)["fused"]
        torch.testing.assert_close(load_exported(tmp_path / "f.pt2")[0](x), expected, rtol=1e-5, atol=1e-5)


def test_a_method_without_a_fused_classifier(tmp_path):
    with pytest.raises(ValueError, match="no fused classifier, only sub0, sub1"):
        export_fused(
            make_learner(method="dml"), tmp_path / "f.pt2", example_images=torch.zeros(2, 3, 16, 16), metadata={}
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "images",
    [torch.zeros(3, 16, 16), torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.zeros(0, 3, 16, 16), None],
    ids=["3-d", "uint8", "empty", "none"],
)
def test_bad_example_images(tmp_path, images):
    with pytest.raises(ValueError, match="example_images must"):
        export_fused(nn.Identity(), tmp_path / "f.pt2", example_images=images, metadata={})


def test_a_write_that_fails_leaves_the_old_file(fused, tmp_path, monkeypatch):
    learner, _ = fused
    target = tmp_path / "fused.pt2"
    target.write_bytes(b"old")

    def broken(handle):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="no space left"):
        export_fused(learner, target, example_images=torch.zeros(2, 3, 16, 16), metadata={})
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(os.name != "posix", reason="sets a limit that stands for a full disk")
def test_a_full_disk_does_not_end_the_process(tmp_path):
    code = """
import resource, sys, torch
from test_export import export_fused, make_learner
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    export_fused(make_learner(), sys.argv[1], example_images=torch.zeros(2, 3, 16, 16), metadata={})
except OSError as error:
    print("refused:", error.strerror)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "fused.pt2")]
    done = subprocess.run(command, cwd=os.path.dirname(__file__), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "refused: File too large\n"), done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.pt2", None, "no exported file"),
        ("a.txt", b"", r"ends in \.safetensors or \.pt2, not a\.txt"),
        ("a.pt2", b"no program", "not a readable torch.export program"),
        ("a.safetensors", b"no tensors", "not a readable safetensors file"),
    ],
)
def test_files_that_are_no_export(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_exported(tmp_path / name)


def test_a_damaged_program_is_one_error_and_no_logged_traceback(fused, tmp_path):
    damaged = tmp_path / "a.pt2"
    damaged.write_bytes(fused[1].read_bytes()[:3000])
    logged: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = logged.append  # type: ignore[method-assign]
    logger = logging.getLogger("torch.export")
    logger.addHandler(handler)
    try:
        with pytest.raises(ValueError, match=r"not a readable torch\.export program"):
            load_exported(damaged)
        assert logged == []
        assert not logger.disabled
    finally:
        logger.removeHandler(handler)


def test_plain_weights_of_others_are_refused(tmp_path):
    from safetensors.torch import save_file

    weights = create("tiny", 6).state_dict()
    save_file(weights, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="names no arch and num_classes"):
        load_exported(tmp_path / "a.safetensors")
    save_file(weights, tmp_path / "b.safetensors", {"fflfast": json.dumps({"arch": "resnet20", "num_classes": 6})})
    with pytest.raises(ValueError, match="does not hold the weights of resnet20"):
        load_exported(tmp_path / "b.safetensors")
