"""The command line on a pose run: scores of joints, pictures, COCO's file, and graphs of methods."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("PIL")
from pose_data import JOINTS, write_coco, write_lspet

from fflfast.cli import main

RUN = ["--task", "pose", "--image-size", "32", "--batch-size", "4", "--epochs", "1", "--plan", "serial"]
ARCH = ["--arch", "hourglass2@1/32"] * 2


@pytest.fixture(scope="module")
def lspet_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lspet")
    write_lspet(folder / "data")
    command = [
        "train",
        *RUN,
        *ARCH,
        "--data",
        "lspet",
        "--data-dir",
        str(folder / "data"),
        "--out",
        str(folder / "run"),
    ]
    assert main([*command, "--baseline", "--options.sigma", "1.5"]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def coco_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    write_coco(folder / "data")
    data = ["--data", "coco-keypoints", "--data-dir", str(folder / "data")]
    assert main(["train", *RUN, *ARCH[:2], *data, "--out", str(folder / "run")]) == 0
    return folder / "run"


def test_a_task_chooses_its_method(lspet_run):
    config = (lspet_run / "config.yaml").read_text(encoding="utf-8")
    assert "\nmethod: okdhp\n" in config
    assert "\n  sigma: 1.5\n" in config
    assert "\ntask: pose\n" in config
    summary = json.loads((lspet_run / "summary.json").read_text(encoding="utf-8"))
    assert summary["metric"] == "PCK@0.2"
    assert list(summary["baseline"]) == ["hourglass2@1/32"]
    baseline = (lspet_run / "baseline-hourglass2@1_32" / "config.yaml").read_text(encoding="utf-8")
    assert "\nmethod: okdhp\n" in baseline


def test_eval_shows_each_joint(lspet_run, capsys):
    assert main(["eval", str(lspet_run)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert ["output", "test", "PCK@0.2", "%", "right", "/", "all"] in lines
    table = lines[lines.index(["sub0", "sub1", "ensemble"]) + 2 :]
    assert [line[0] for line in table] == [*JOINTS, "all"]
    assert {len(line) for line in table} == {4}


def test_pictures_of_predictions(lspet_run, tmp_path, capsys):
    file = tmp_path / "seen.png"
    assert main(["plot", str(lspet_run), "--predictions", "3", "--out", str(file), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"{file}\n"
    assert file.read_bytes().startswith(b"\x89PNG")


def test_cocos_file(coco_run, tmp_path, capsys):
    pytest.importorskip("pycocotools")
    file = tmp_path / "results.json"
    assert main(["eval", str(coco_run), "--coco-json", str(file)]) == 0
    assert {"image_id", "category_id", "keypoints", "score"} <= json.loads(file.read_text(encoding="utf-8"))[0].keys()
    assert f"{file}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval", "RUN", "--coco-json", "out.json"], "lspet has no COCO annotations"),
        (["plot", "RUN", "--predictions", "0"], "expected at least 1 image, got 0"),
        (["plot", "RUN", "RUN", "--predictions", "2"], "expected one run, got 2"),
        (["plot", "RUN", "--data-dir", "x"], "--data-dir belongs to --predictions"),
        (["plot", "graph"], "METHOD"),
        (["plot", "graph", "ffll"], "did you mean 'ffl'?"),
        (["plot", "graph", "ffl", "--sub-networks", "1"], "needs at least 2"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_wrong_commands(lspet_run, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert main([str(lspet_run) if part == "RUN" else part for part in arguments]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_graph_of_a_method(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plot", "graph", "dml", "--sub-networks", "3"]) == 0
    assert capsys.readouterr().out == "dml.svg\n"
    assert "sub2" in (tmp_path / "dml.svg").read_text(encoding="utf-8")
