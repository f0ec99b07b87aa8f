"""Runs of the task pose from end to end: train, resume, eval, export, pictures and COCO results."""

from __future__ import annotations

import json
import os
import re
import signal
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
from pose_data import COCO_JOINTS, JOINTS, write_coco, write_lspet
from training_runs import assert_same, tensors

from fflfast.cli import main
from fflfast.training import ConfigError, Stopped, TrainConfig, evaluate, export, train
from fflfast.training.coco import evaluate_ap
from fflfast.training.evaluation import judge, open_subject
from fflfast.training.skeletons import draw_predictions
from fflfast.training.step import TrainStep

SMALL = {
    "arch": ["hourglass2@1/32", "hourglass2@1/32"],
    "method": "okdhp",
    "image_size": 32,
    "batch_size": 4,
    "epochs": 2,
    "workers": 0,
}


@pytest.fixture(scope="module")
def lspet_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lspet")
    write_lspet(folder / "data", 11)
    return folder / "data"


@pytest.fixture(scope="module")
def trained(lspet_dir):
    """Folder and result of a run of two epochs."""
    out = lspet_dir.parent / "run"
    return out, train(TrainConfig(data="lspet", data_dir=str(lspet_dir), out=str(out), **SMALL), quiet=True)


@pytest.fixture(scope="module")
def coco_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    write_coco(folder / "data")
    options = {**SMALL, "epochs": 1, "arch": ["hourglass1@1/32"], "image_size": 32}
    train(
        TrainConfig(data="coco-keypoints", data_dir=str(folder / "data"), out=str(folder / "run"), **options),
        quiet=True,
    )
    return folder / "run"


def test_eval_has_the_scores_of_the_run_and_of_each_joint(trained, capsys):
    out, result = trained
    assert evaluate(out) == result.scores
    assert set(result.scores) == {"sub0", "sub1", "ensemble"}
    metric, scores, details = judge(open_subject(out))
    assert metric == "PCK@0.2"
    for name, score in scores.items():
        assert set(details[name]) == set(JOINTS)
        assert score == tuple(sum(part[k] for part in details[name].values()) for k in (0, 1))
    assert main(["eval", str(out)]) == 0
    printed = capsys.readouterr().out
    assert all(joint in printed for joint in JOINTS)
    assert main(["eval", str(out), "--limit-test", "1"]) == 0


def test_flip_test_is_an_option_that_the_run_remembers(trained, lspet_dir, tmp_path):
    subject = open_subject(trained[0])
    images = subject.feed.batch(next(iter(subject.feed.inputs(0)))).images
    with torch.no_grad():
        averaged = subject.task.outputs(subject.predict, images, subject.table)["sub0"]
        once = subject.predict(subject.table[images.long(), torch.arange(3).view(3, 1, 1)])["sub0"]
    assert not torch.allclose(averaged, once, atol=1e-4)
    config = TrainConfig(data="lspet", data_dir=str(lspet_dir), out=str(tmp_path / "run"), flip_test=False, **SMALL)
    train(config, quiet=True)
    subject = open_subject(tmp_path / "run")
    with torch.no_grad():
        assert torch.equal(
            subject.task.outputs(subject.predict, images, subject.table)["sub0"],
            subject.predict(subject.table[images.long(), torch.arange(3).view(3, 1, 1)])["sub0"],
        )


def test_where_the_images_lie_and_who_reads_them_changes_nothing(trained, lspet_dir, tmp_path):
    changes = {"data_on": "host", "workers": 2}
    train(TrainConfig(data="lspet", data_dir=str(lspet_dir), out=str(tmp_path / "run"), **SMALL | changes), quiet=True)
    assert_same(tensors(tmp_path / "run"), tensors(trained[0]))


def test_a_stopped_run_goes_on_bit_for_bit(trained, lspet_dir, tmp_path, monkeypatch):
    """The stop comes within the second epoch, so that the joints counted until then have to come back too."""
    calls, step = [], TrainStep.__call__

    def stopping(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments, **options)

    monkeypatch.setattr(TrainStep, "__call__", stopping)
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        train(TrainConfig(data="lspet", data_dir=str(lspet_dir), out=str(out), **SMALL), quiet=True)
    monkeypatch.undo()
    train(TrainConfig(resume=str(out)), quiet=True)
    assert len(calls) == 4
    assert_same(tensors(out), tensors(trained[0]))
    scores = [
        {key: value for line in (folder / "metrics.jsonl").read_text().splitlines()
         for key, value in json.loads(line).items() if "PCK" in key}
        for folder in (out, trained[0])
    ]  # fmt: skip
    assert scores[0] == scores[1]
    assert any(key.startswith("train_PCK@0.2/") for key in scores[0])


def test_exported_networks_are_tested_alike(trained, lspet_dir):
    out, result = trained
    files = export(out)
    assert [file.name for file in files] == ["sub0.safetensors", "sub1.safetensors"]
    for k, file in enumerate(files):
        assert evaluate(file, data_dir=str(lspet_dir)) == {f"sub{k}": result.scores[f"sub{k}"]}


# ---- pictures -------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """Titles and lines of what is drawn."""
    from matplotlib.axes import Axes

    titles, lines = [], []
    original = Axes.plot
    monkeypatch.setattr(Axes, "set_title", lambda self, title, **options: titles.append(title))

    def plot(self, x, y, style, **options):
        lines.append((style, options["color"], x, y))
        return original(self, x, y, style, **options)

    monkeypatch.setattr(Axes, "plot", plot)
    return titles, lines


def test_predictions_are_drawn_with_the_truth(trained, capsys, drawn):
    out, result = trained
    titles, lines = drawn
    assert main(["plot", str(out), "--predictions", "4"]) == 0
    assert capsys.readouterr().out.strip() == str(out / "predictions.png")
    assert (out / "predictions.png").read_bytes().startswith(b"\x89PNG")
    counts = np.array([re.findall(r"\d+", title) for title in titles], dtype=int)
    assert tuple(counts.sum(axis=0)) == result.scores["ensemble"]
    subject = open_subject(out)
    limbs = {(a, b) for a, b in subject.data.keypoints.skeleton}
    truth = [
        tuple(sorted((round(joints[a, 0].item(), 3), round(joints[b, 0].item(), 3))))
        for joints in subject.data.test.targets
        for a, b in limbs
    ]
    shown = [tuple(sorted(round(value, 3) for value in x)) for style, _, x, _ in lines if style == ":"]
    assert sorted(shown) == sorted(truth)
    assert {colour for style, colour, *_ in lines if style == "-"} >= {"#4477aa", "#ee6677", "#ccbb44"}


def test_a_picture_of_an_exported_file_lies_beside_it(trained, lspet_dir, tmp_path):
    (file, *_) = export(trained[0], tmp_path / "export")
    assert draw_predictions(file, count=1, data_dir=str(lspet_dir)) == tmp_path / "export" / "predictions.png"
    assert draw_predictions(file, tmp_path / "a" / "b.svg", count=9, data_dir=str(lspet_dir)).exists()


def test_pictures_that_cannot_be_made(trained, tmp_path):
    with pytest.raises(ConfigError, match="--predictions: expected at least 1"):
        draw_predictions(trained[0], count=0)
    with pytest.raises(ConfigError, match=r"--out .* ends in"):
        draw_predictions(trained[0], tmp_path / "picture.xyz")
    options = {"data": "synthetic", "image_size": 8, "arch": ["tiny", "tiny"], "epochs": 1}
    train(TrainConfig(out=str(tmp_path / "run"), limit_train=10, limit_test=10, batch_size=5, **options), quiet=True)
    with pytest.raises(ConfigError, match="synthetic has none"):
        draw_predictions(tmp_path / "run")
    assert os.listdir(tmp_path) == ["run"]


# ---- coco -----------------------------------------------------------------------------------------------------


def test_coco_results_are_written_and_measured(coco_run, tmp_path, capsys):
    pytest.importorskip("pycocotools")
    figures = evaluate_ap(coco_run, tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text())
    assert [entry["image_id"] for entry in results] == [100, 101, 102, 103]
    places = np.reshape([entry["keypoints"] for entry in results], (4, len(COCO_JOINTS), 3))
    assert ((places[..., :2] > -40) & (places[..., :2] < 140)).all()
    assert 0 <= figures["AP"] <= figures["AP50"] <= 1
    assert main(["eval", str(coco_run), "--coco-json", str(tmp_path / "again.json")]) == 0
    assert (tmp_path / "again.json").read_text() == (tmp_path / "results.json").read_text()
    assert f"AP {100 * figures['AP']:.2f} AP50" in " ".join(capsys.readouterr().out.split())


def test_coco_results_that_cannot_be_written(coco_run, trained, tmp_path):
    with pytest.raises(ConfigError, match="lspet has no COCO annotations"):
        evaluate_ap(trained[0], tmp_path / "results.json")
    with pytest.raises(ConfigError, match="expected one of the outputs sub0, got 'sub7'"):
        evaluate_ap(coco_run, tmp_path / "results.json", output="sub7")
    with pytest.raises(ConfigError, match=r"--coco-json .*choose another file"):
        evaluate_ap(coco_run, tmp_path / "nowhere" / "results.json")
    assert os.listdir(tmp_path) == []


def test_without_pycocotools_the_results_are_there(coco_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(ConfigError, match=r"results.json is written; .*pycocotools"):
        evaluate_ap(coco_run, tmp_path / "results.json")
    assert len(json.loads((tmp_path / "results.json").read_text())) == 4
