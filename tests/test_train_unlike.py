"""Networks that differ in channels and in the size of their feature maps learn together, from train to export."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from fflfast.cli import main
from fflfast.training import evaluate

OUTPUTS = ["sub0", "sub1", "ensemble", "fused"]


def image_folder(root, classes=2, train=8, test=3):
    """Images of 80 × 70 pixels, each class of a shade of its own."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", test)):
        for k in range(classes):
            folder = root / split / f"class{k}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(80 * k, 80 * k + 60, (70, 80, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def synthetic(tmp_path, size):
    return ["--data", "synthetic", "--image-size", str(size), "--limit-train", "16", "--limit-test", "8", "--pad", "1"]


def folder_of_64(tmp_path):
    return ["--data", "imagefolder", "--data-dir", str(image_folder(tmp_path / "images")), "--image-size", "64"]


RUNS = {
    # 64 and 128 channels of 4 × 4
    "unequal channels": (["resnet32", "wrn_16_2"], lambda folder: synthetic(folder, 16)),
    # 512 and 576 channels of 2 × 2
    "adapted networks": (["resnet18", "mobilenet_v3_small"], folder_of_64),
    # 64 channels of 16 × 16, 576 of 2 × 2
    "unequal sizes": (["resnet8", "mobilenet_v3_small"], lambda folder: synthetic(folder, 64)),
}


@pytest.mark.parametrize("name", RUNS)
def test_train_evaluate_export(name, tmp_path, capsys):
    arch, data = RUNS[name]
    out = tmp_path / "run"
    flags = [part for network in arch for part in ("--arch", network)]
    flags += [*data(tmp_path), "--method", "ffl", "--epochs", "1", "--batch-size", "8", "--log-every", "1"]
    assert main(["train", *flags, "--out", str(out)]) == 0, capsys.readouterr().err
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [value for line in lines for key, value in line.items() if key.startswith(("loss", "ce/", "kl/"))]
    assert len(losses) >= 2 * 7
    assert all(math.isfinite(value) for value in losses)
    trained = load_file(out / "last.safetensors")
    # Every channel of every network's maps has taught the fusion something.
    bias = trained["learner/method.fusion.depthwise_norm.bias"]
    assert trained["learner/method.fusion.depthwise.weight"].shape[0] == len(bias)
    assert bias.count_nonzero() > 0.9 * len(bias)
    assert trained["learner/method.fusion.depthwise_norm.num_batches_tracked"] == 2
    assert all(value.isfinite().all() for value in trained.values() if value.is_floating_point())
    scores = evaluate(out)
    assert list(scores) == OUTPUTS
    capsys.readouterr()
    assert main(["export", str(out)]) == 0
    files = capsys.readouterr().out.split()
    assert [file.rpartition("/")[2] for file in files] == ["sub0.safetensors", "sub1.safetensors", "fused.pt2"]
    for file, output in zip(files, ("sub0", "sub1", "fused"), strict=True):
        images = tmp_path / "images" if "imagefolder" in flags else None  # a file does not know where they lie
        assert evaluate(file, data_dir=images) == {output: scores[output]}
