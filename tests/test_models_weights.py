"""First weights from a file."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file

from fflfast.models import create, load_weights


def state(name="tiny", classes=10, **changes):
    torch.manual_seed(7)
    weights = dict(create(name, classes).state_dict())
    weights.update(changes)
    return weights


def same(net, weights, but=()):
    return all(torch.equal(tensor, weights[n]) for n, tensor in net.state_dict().items() if n not in but)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_formats(tmp_path, suffix):
    weights, file = state(), tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(weights, file)
    net = create("tiny", 10)
    report = load_weights(net, file)
    assert same(net, weights)
    assert set(report.loaded) == set(weights)
    assert report.skipped == ()


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_usual_wrappings(tmp_path, key, prefix):
    weights, file = state(), tmp_path / "weights.pt"
    torch.save({key: {prefix + name: tensor for name, tensor in weights.items()}, "epoch": 3}, file)
    net = create("tiny", 10)
    load_weights(net, str(file))
    assert same(net, weights)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("tiny", ["fc.weight", "fc.bias"]),
        ("cifar_vgg16_bn", ["classifier.4.weight", "classifier.4.bias"]),
        ("torchvision/mobilenet_v3_small", ["classifier.3.weight", "classifier.3.bias"]),
        ("torchvision/squeezenet1_1", ["classifier.1.weight", "classifier.1.bias"]),
        ("timm/regnety_002", ["head.fc.weight", "head.fc.bias"]),
    ],
)
def test_a_head_for_other_classes_is_skipped_and_named(tmp_path, name, head):
    weights, file = state(name, classes=11), tmp_path / "weights.safetensors"
    save_file(weights, file)
    net = create(name, 5)
    report = load_weights(net, file)
    assert list(report.skipped) == head
    assert same(net, weights, but=head)
    assert "another class count, not loaded: " + ", ".join(head) in str(report)


def test_other_dtypes_are_converted(tmp_path):
    weights, file = {n: t.half() if t.is_floating_point() else t for n, t in state().items()}, tmp_path / "w.pt"
    torch.save(weights, file)
    net = create("tiny", 10)
    load_weights(net, file)
    assert net.fc.weight.dtype == torch.float32
    assert torch.equal(net.fc.weight, weights["fc.weight"].float())


def test_old_files_without_batch_counters(tmp_path):
    weights, file = {n: t for n, t in state().items() if "num_batches" not in n}, tmp_path / "w.pt"
    torch.save(weights, file)
    report = load_weights(create("tiny", 10), file)
    assert len(report.loaded) == len(weights)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (state("resnet8"), "does not fit tiny: it has other shapes for conv1.weight, .* and .* more"),
        (state(**{"conv1.weight": torch.zeros(4, 3, 5, 5)}), "other shapes for conv1.weight$"),
        (state(**{"conv1.weight": torch.zeros(10, 3, 3, 3)}), "other shapes for conv1.weight$"),
        (state(**{"fc.weight": torch.zeros(10, 99)}), "other shapes for fc.weight$"),
        (state(**{"extra.weight": torch.zeros(1)}), "has the unknown extra.weight"),
        ({n: t for n, t in state().items() if n != "fc.bias"}, "lacks fc.bias"),
        ({}, "lacks conv1.weight"),
        (state(**{"fc.bias": torch.full((10,), torch.nan)}), "values that are not finite in fc.bias"),
        (state(**{"fc.bias": torch.full((10,), torch.inf)}), "values that are not finite in fc.bias"),
        (state(**{"bn1.running_var": torch.full((4,), torch.nan)}), "values that are not finite in bn1.running_var"),
    ],
    ids=["network", "kernel", "channels", "features", "extra", "missing", "empty", "nan", "inf", "nan-statistics"],
)
def test_what_does_not_fit_changes_nothing(tmp_path, weights, message):
    file = tmp_path / "weights.pt"
    torch.save(weights, file)
    net = create("tiny", 10)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_weights(net, file)
    assert same(net, before)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_file_is_not_run(tmp_path):
    file, trap = tmp_path / "weights.pt", tmp_path / "trap"
    torch.save({"conv1.weight": Payload(str(trap))}, file)
    with pytest.raises(ValueError, match="damaged or holds more than tensors"):
        load_weights(create("tiny", 10), file)
    assert not trap.exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("content", [b"", b"no weights at all", b"junk", None], ids=["empty", "text", "junk", "cut"])
def test_damaged_files(tmp_path, suffix, content):
    file = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state(), file)
    file.write_bytes(file.read_bytes()[:2000] if content is None else content)
    with pytest.raises(ValueError, match="weights"):
        load_weights(create("tiny", 10), file)


@pytest.mark.parametrize("content", [[1, 2], {"a": 3}, torch.zeros(3)], ids=["list", "numbers", "tensor"])
def test_what_is_no_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="is no state dict"):
        load_weights(create("tiny", 10), tmp_path / "w.pt")


def test_missing_file_and_unknown_format(tmp_path):
    with pytest.raises(ValueError, match=r"no weights file .*gone\.pt"):
        load_weights(create("tiny", 10), tmp_path / "gone.pt")
    (tmp_path / "weights.h5").write_bytes(b"")
    with pytest.raises(ValueError, match=r"ends in \.safetensors, \.pt or \.pth, not weights\.h5"):
        load_weights(create("tiny", 10), tmp_path / "weights.h5")
