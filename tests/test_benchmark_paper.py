"""`python -m benchmarks.paper` goes on where it stopped and keeps the table of docs/results.md."""

from __future__ import annotations

import argparse
import json

import pytest
from test_benchmarks import ROOT, module, on_path  # noqa: F401 (a fixture)
from training_runs import start

DOCUMENT = "# Results\n\nbefore\n\n<!-- paper: begin -->\n\nNot run yet.\n\n<!-- paper: end -->\n\nafter\n"


@pytest.fixture
def paper(monkeypatch):
    return module("paper")


def finished(paper, method, seed, accuracies, seconds=600.0):
    """A run whose outputs have these accuracies, of 10,000 images."""
    names = ("sub0",) if method == "single" else ("sub0", "sub1", "ensemble", "fused")
    scores = {name: {"accuracy": value / 100} for name, value in zip(names, accuracies, strict=True)}
    summary = {"scores": scores, "seconds": seconds, "best": {"output": names[-1]}}
    matrix = module("matrix")
    return matrix.Run(matrix.Job(method, seed, None), summary, "commit abc, torch 2, one GPU")


@pytest.fixture
def all_runs(paper):
    return [
        run
        for seed, shift in ((1, -0.5), (2, 0.0), (3, 0.5))
        for run in (
            finished(paper, "ffl", seed, (72 + shift, 73 + shift, 74 + shift, 75 + shift), 600.0),
            finished(paper, "single", seed, (70.0 + shift,), 300.0 + seed),
        )
    ]


def test_the_table_of_all_runs(paper, all_runs):
    text = paper.table(all_runs)
    assert text.splitlines() == [
        "| output | test accuracy % | published | seeds | training time an epoch | of 300 epochs |",
        "|---|---|---|---|---|---|",
        "| sub-networks | 72.50 ± 0.50 | 72.18 ± 0.11 | 3 | 2 s | 10 min |",
        "| ensemble | 74.00 ± 0.50 | – | 3 | 2 s | 10 min |",
        "| fused | 75.00 ± 0.50 | 74.44 | 3 | 2 s | 10 min |",
        "| ResNet-32 alone | 70.00 ± 0.50 | – | 3 | 1.01 s | 5.03 min |",
        "",
        "commit abc, torch 2, one GPU.",
    ]


def test_a_part_says_what_is_missing(paper, all_runs):
    text = paper.table(all_runs[:3])
    assert "| fused | 74.75 ± 0.35 | 74.44 | 2 |" in text
    assert "| ResNet-32 alone | 69.50 | – | 1 |" in text
    assert "so far ffl seed 1, single seed 1, ffl seed 2." in text
    assert paper.table([]) == "Not run yet."


def test_other_seeds_are_named(paper, all_runs):
    assert "Not the whole of seeds 1, 2, 3" in paper.table(all_runs, seeds=(1, 2, 4))


def test_a_shortened_schedule_is_called_so_and_stands_beside_nothing_published(paper, all_runs):
    text = paper.table(all_runs, epochs=30)
    assert text.startswith("**Shortened: 30 of 300 epochs.**")
    assert "72.18" not in text
    assert "| 20 s |" in text


def test_the_document_of_the_repository_has_its_markers():
    matrix = module("matrix")
    assert "\n\nx\n\n" in matrix.Document(matrix.DOCUMENT, "paper").replaced("x")


def options(tmp_path, **changes):
    (tmp_path / "results.md").write_text(DOCUMENT, encoding="utf-8")
    settings = {
        "data": "digits", "arch": "tiny", "data_dir": None, "runs": tmp_path / "runs", "epochs": 1, "device": "cpu",
        "amp": "off", "results": tmp_path / "results.md", "minutes": None, "csv": None,
    }  # fmt: skip
    return argparse.Namespace(**{**settings, **changes})


def test_every_missing_run_is_trained_and_no_other(paper, tmp_path, monkeypatch, capsys):
    asked = options(tmp_path)
    assert paper.run(asked, [1]) == 0
    text = asked.results.read_text(encoding="utf-8")
    assert text.startswith("# Results\n\nbefore\n\n<!-- paper: begin -->\n\n**Shortened: 1 of 300 epochs.**")
    assert text.endswith("<!-- paper: end -->\n\nafter\n")
    summary = json.loads((tmp_path / "runs/ffl-seed1/summary.json").read_text(encoding="utf-8"))
    assert f"| fused | {100 * summary['scores']['fused']['accuracy']:.2f} | – | 1 |" in text
    assert "so far ffl seed 1, single seed 1." in text
    out = capsys.readouterr().out
    assert "run 1 of 2: ffl-seed1\n" in out
    assert "run 2 of 2: single-seed1\n" in out

    trained = []
    train = module("accuracy").train
    monkeypatch.setattr(module("accuracy"), "train", lambda config: (trained.append(config.out), train(config)))
    assert paper.run(asked, [1, 2]) == 0
    assert trained == [str(tmp_path / "runs/ffl-seed2"), str(tmp_path / "runs/single-seed2")]
    text = asked.results.read_text(encoding="utf-8")
    assert "± " in text.partition("| fused |")[2].splitlines()[0]

    with pytest.raises(SystemExit, match="other settings"):
        paper.run(options(tmp_path, epochs=2), [1])


def test_an_interrupted_run_goes_on(paper, tmp_path):
    """Killed in the second of its epochs, as a machine that is taken away: the same weights in the end."""
    from safetensors.torch import load_file

    asked = options(tmp_path, runs=tmp_path / "killed", epochs=3)
    code = (
        "import argparse, os; from pathlib import Path\n"
        "from benchmarks import paper; from fflfast.training import loop\n"
        f"asked = argparse.Namespace(data='digits', arch='tiny', data_dir=None, runs=Path({str(asked.runs)!r}),\n"
        f"    epochs=3, device='cpu', amp='off', minutes=None, csv=None, results=Path({str(asked.results)!r}))\n"
        "step = loop.TrainStep.__call__\n"
        "def dying(self, *arguments, epoch, **options):\n"
        "    if epoch == 1 and options['step'] == 3: os._exit(9)\n"
        "    return step(self, *arguments, epoch=epoch, **options)\n"
        "loop.TrainStep.__call__ = dying\n"
        "raise SystemExit(paper.run(asked, [1]))\n"
    )
    process = start("-c", code, cwd=ROOT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 9, err + out
    whole = options(tmp_path, runs=tmp_path / "whole", epochs=3)
    for each in (asked, whole):
        assert paper.run(each, [1]) == 0
    found, expected = (load_file(each.runs / "ffl-seed1" / "last.safetensors") for each in (asked, whole))
    assert found.keys() == expected.keys()
    learned = [key for key in expected if key.startswith(("learner/", "optimizer/"))]
    assert learned
    assert all(found[key].equal(expected[key]) for key in learned)
