"""Curves: what is drawn of unfinished and damaged runs, and where the file goes."""

from __future__ import annotations

import json
import os

import pytest

from fflfast.cli import main
from fflfast.training import ConfigError, plot

EPOCHS = [
    {
        "kind": "epoch",
        "epoch": epoch,
        "step": 4 * (epoch + 1),
        "loss": 2.0,
        "ce/sub0": 2.0 - epoch / 2,
        "test_accuracy/sub0": 0.5 + epoch / 10,
    }
    for epoch in range(2)
]


def _record(folder, text):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def _lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def folder(tmp_path):
    """Folder of a run with two epochs."""
    return _record(tmp_path / "run", _lines(*EPOCHS))


@pytest.fixture
def labels(monkeypatch):
    """Labels of the curves drawn so far."""
    from matplotlib.axes import Axes

    found, original = [], Axes.plot

    def draw(self, *args, **options):
        found.append(options["label"])
        return original(self, *args, **options)

    monkeypatch.setattr(Axes, "plot", draw)
    return found


def test_a_baseline_in_its_first_epoch_is_left_out(folder, labels):
    _record(folder / "baseline-a", _lines(*EPOCHS))
    _record(folder / "baseline-b", "")
    _record(folder / "baseline-c", _lines({"kind": "train", "epoch": 0, "step": 3, "loss": 1.0}))
    (folder / "baseline-d").mkdir()
    plot([folder])
    assert labels == ["ce/sub0", "sub0", "a alone"]


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe\n",
        _lines({"epoch": 0}),
        "3\n",
        _lines({"kind": "epoch", "epoch": "x", "step": 4}),
        _lines({"kind": "epoch", "epoch": 0, "step": 4}),
        _lines(EPOCHS[0] | {"loss": None}),
        _lines(EPOCHS[0] | {"loss": 10**400}),
        '{"kind": "epoch", "epoch": 0, "step": 4, "test_accuracy/sub0": NaN}',
        _lines(EPOCHS[0], {"kind": "epoch", "epoch": 1, "step": 8}),
        "",
    ],
    ids=["bytes", "no-kind", "number", "text", "no-output", "null", "huge", "nan", "lacks-values", "empty"],
)
def test_a_damaged_record_is_one_line(tmp_path, capsys, content):
    folder = _record(tmp_path / "run", content)
    assert main(["plot", str(folder)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"fflfast: error: {folder}")
    assert err.count("\n") == 1
    assert os.listdir(folder) == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "out", ["there", "new", "new/curves.xyz", "new/", "x.png", "a\0b.png", "x" * 300 + ".png", "metrics.jsonl/x.png"]
)
def test_an_unusable_out_writes_nothing(folder, monkeypatch, out):
    (folder / "there").mkdir()
    (folder / "x.png").mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match=r"^--out "):
        plot([folder], out)
    assert sorted(os.listdir(folder)) == ["metrics.jsonl", "there", "x.png"]
    assert os.listdir("there") == []


def test_the_file_is_where_it_says(folder, tmp_path):
    file = plot([folder], tmp_path / "new" / "A.PNG")
    assert file == tmp_path / "new" / "A.PNG"
    assert os.listdir(tmp_path / "new") == ["A.PNG"]
    assert file.read_bytes().startswith(b"\x89PNG")


def test_scores_go_by_the_name_that_the_records_have(tmp_path, labels, monkeypatch):
    """The trainer writes what the task calls its metric; a plot takes the name from there."""
    from matplotlib.axes import Axes

    axes = []
    monkeypatch.setattr(Axes, "set_ylabel", lambda self, label: axes.append(label))
    epochs = [{key.replace("accuracy", "PCK@0.2"): value for key, value in e.items()} for e in EPOCHS]
    epochs = [{**e, "test_PCK@0.2/fused": 0.1, "train_PCK@0.2/sub0": 1} for e in epochs]
    plot([_record(tmp_path / "run", _lines(*epochs))])
    assert labels == ["ce/sub0", "sub0", "fused"]
    assert axes == ["loss term, mean of the epoch", "test PCK@0.2 %"]
