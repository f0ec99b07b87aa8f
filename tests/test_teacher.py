"""A frozen teacher from a run, a file or a library: the same logits, refused where it does not fit, found again."""

from __future__ import annotations

import dataclasses
import re
import shutil

import pytest
import torch
from training_runs import SMALL, assert_same, flags, run, small, tensors

from fflfast import models
from fflfast.cli import main
from fflfast.training import ConfigError, TrainConfig, export, train
from fflfast.training import teacher as teachers
from fflfast.training.build import open_bundle
from fflfast.training.evaluation import load_run
from fflfast.training.teacher import load_teacher

KD = {"method": "kd", "arch": ["tiny"], "epochs": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "run"
    train(small(folder, epochs=1), quiet=True)
    export(folder)
    return folder


@pytest.fixture(scope="module")
def data():
    return open_bundle(TrainConfig(**{key: SMALL[key] for key in ("data", "image_size")}))


@pytest.fixture(scope="module")
def images():
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("", "fused"),
        ("last.safetensors", "fused"),
        ("export/fused.pt2", "fused"),
        ("export/sub1.safetensors", "sub1"),
    ],
    ids=["run", "checkpoint", "program", "sub-network"],
)
def test_a_teacher_says_what_the_file_holds(trained, data, images, name, output):
    teacher = load_teacher(str(trained / name), data)
    _, learner, _ = load_run(trained)
    expected = learner.eval().predict(images)[output]
    torch.testing.assert_close(teacher(images), expected, rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.train().training


def test_another_normalisation_is_undone(trained, data, images):
    teacher = load_teacher(str(trained), data)
    other = dataclasses.replace(data, mean=(10.0, 20.0, 30.0), std=(50.0, 60.0, 70.0))
    pixels = images * torch.tensor(data.std).view(3, 1, 1) + torch.tensor(data.mean).view(3, 1, 1)
    seen = (pixels - torch.tensor(other.mean).view(3, 1, 1)) / torch.tensor(other.std).view(3, 1, 1)
    got = load_teacher(str(trained), other)(seen)
    torch.testing.assert_close(got, teacher(images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"class_names": tuple("abcdefghij")}, "knows other classes|are not the same"),
        ({"image_size": 9}, "was trained on 8×8 images, and the run has 9×9; .*--image-size 8"),
    ],
    ids=["classes", "size"],
)
def test_a_teacher_of_something_else_is_refused(trained, data, change, words):
    with pytest.raises(ConfigError, match=f"--teacher .*({words})"):
        load_teacher(str(trained), dataclasses.replace(data, **change))


def test_a_program_stays_on_the_cpu(trained, data):
    with pytest.raises(ConfigError, match="runs on the CPU it was traced on; give the run's folder"):
        load_teacher(str(trained / "export/fused.pt2"), data, "cuda")


def test_names_and_files_that_are_none(trained, data, tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"weights")
    for name, words in (
        ("no/run", "no such folder or file; give a run's folder"),
        (str(tmp_path / "weights.pth"), "ends in .safetensors or .pt2"),
        (str(tmp_path), "holds no last.safetensors"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_teacher(name, data)


@pytest.mark.parametrize(
    ("names", "about", "accepted"),
    [
        (tuple("abcdefghij"), tuple("abcdefghij"), True),
        (tuple("abcdefghij"), tuple("jihgfedcba"), False),
        (tuple("abcdefghij"), tuple("abcdefghijk"), False),
        (tuple(f"n{k:08}" for k in range(1000)), tuple(f"name {k}" for k in range(1000)), True),
        (tuple(f"class {k}" for k in range(1000)), tuple(f"name {k}" for k in range(1000)), False),
    ],
    ids=["same", "other order", "other number", "ImageNet's folders", "other names"],
)
def test_published_weights_are_of_these_classes(data, images, monkeypatch, names, about, accepted):
    asked, build = [], models.create

    def create(name, num_classes, *, pretrained, image_size):
        asked.append((name, num_classes, pretrained, image_size))
        torch.manual_seed(3)
        return build("tiny", num_classes)

    published = teachers._Published(len(about), about, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    monkeypatch.setitem(teachers._LIBRARIES, "timm", lambda name: published)
    monkeypatch.setattr(teachers.models, "create", create)
    bundle = dataclasses.replace(data, class_names=names, num_classes=len(names), mean=(127.5,) * 3, std=(63.75,) * 3)
    if not accepted:
        with pytest.raises(ConfigError, match=r"timm/net.tag: its published weights know \d+ classes"):
            load_teacher("timm/net.tag", bundle)
        assert asked == []  # nothing was downloaded
        return
    teacher = load_teacher("timm/net.tag", bundle)
    assert asked == [("timm/net.tag", len(about), True, 8)]
    assert teacher(images).shape == (5, len(about))
    assert teacher.same


@pytest.mark.parametrize(("name", "mean"), [("resnet18", (0.485, 0.456, 0.406)), ("googlenet", (0.5, 0.5, 0.5))])
def test_what_torchvision_says_of_its_weights(name, mean):
    pytest.importorskip("torchvision")
    about = teachers._of_torchvision(name)
    assert (about.classes, about.names[0], tuple(about.mean)) == (1000, "tench", mean)


def test_what_timm_says_of_its_weights():
    pytest.importorskip("timm")
    about = teachers._of_timm("resnet18.a1_in1k")
    assert (about.classes, tuple(about.mean)) == (1000, (0.485, 0.456, 0.406))
    with pytest.raises(ValueError, match="timm knows no published weights"):
        teachers._of_timm("nobody")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "kd"}, "--method kd: needs a frozen network that teaches"),
        ({"method": "kd", "teacher": "no/run"}, "no/run: no such folder or file; give a run's folder"),
        ({"method": "dml", "teacher": "RUN"}, "no frozen network teaches in --method dml"),
    ],
    ids=["missing", "nowhere", "not wanted"],
)
def test_wrong_settings(trained, tmp_path, capsys, changes, words):
    changes = {key: str(trained) if value == "RUN" else value for key, value in changes.items()}
    assert main(["train", *flags(small(tmp_path / "out", **changes))]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_run_goes_on_with_its_teacher_wherever_it_lies_and_with_no_other(trained, tmp_path, capsys):
    whole = run(tmp_path / "whole", **{**KD, "epochs": 2}, teacher=str(trained))
    assert not any("network" in name for name in whole if name.startswith("learner/method."))
    folder = tmp_path / "run"
    train(small(folder, **{**KD, "epochs": 2}, teacher=str(trained), nan="raise"), quiet=True)
    shutil.copy(folder / "previous.safetensors", folder / "last.safetensors")
    before = tensors(folder)

    other = tmp_path / "other"
    train(small(other, epochs=1, seed=1), quiet=True)
    assert main(["train", "--resume", str(folder), "--teacher", str(other)]) == 2
    err = capsys.readouterr().err
    assert re.search(r"--teacher \S*other: is not the network that taught the run", err)
    assert_same(tensors(folder), before)

    moved = tmp_path / "moved"
    shutil.copytree(trained, moved)
    assert main(["train", "--resume", str(folder), "--teacher", str(moved)]) == 0
    assert_same(tensors(folder), whole)
    out = capsys.readouterr().out
    assert "taught by" in out


def test_eval_and_the_baseline_need_no_teacher(trained, tmp_path, capsys):
    gone = tmp_path / "gone"
    shutil.copytree(trained, gone)
    result = train(small(tmp_path / "run", **KD, teacher=str(gone), baseline=True), quiet=True)
    shutil.rmtree(gone)
    assert main(["eval", str(tmp_path / "run")]) == 0
    assert f"{result.scores['sub0'].correct} / " in capsys.readouterr().out
    assert main(["eval", str(tmp_path / "run" / "baseline-tiny")]) == 0
    assert list(result.baseline) == ["tiny"]
