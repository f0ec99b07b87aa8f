"""`python -m benchmarks.methods`, and what all matrices of runs share: what is trained, in which order, the table."""

from __future__ import annotations

import argparse
import csv
import json
import signal
import threading

import pytest
from test_benchmarks import module, on_path  # noqa: F401 (a fixture)

from fflfast import methods

DOCUMENT = "before\n\n<!-- methods: begin -->\n\nNot run yet.\n\n<!-- methods: end -->\n\nafter\n"


@pytest.fixture
def matrix():
    return module("matrix")


@pytest.fixture
def asked(tmp_path):
    """What the command is asked for: tiny networks on a hundred digits."""
    (tmp_path / "results.md").write_text(DOCUMENT, encoding="utf-8")
    return argparse.Namespace(
        data="digits", arch="tiny", teacher="resnet8", data_dir=None, runs=tmp_path / "runs", device="cpu", amp="off",
        minutes=None, csv=tmp_path / "new" / "scores.csv", results=tmp_path / "results.md",
        changes={"epochs": 1, "limit_train": 100, "limit_test": 50},
    )  # fmt: skip


def finished(matrix, row, seed, scores, main, **summary):
    known = {"images_per_second": 1000.0, "seconds": 10.0, "epochs": 3, "config_hash": "c0ffee", **summary}
    known |= {"scores": {k: {"accuracy": v / 100} for k, v in scores.items()}, "best": {"output": main}}
    config = module("matrix").TrainConfig(out=f"runs/{row}-seed{seed}", arch=["tiny"] * max(1, len(scores) - 1))
    return matrix.Run(matrix.Job(row, seed, config), known, "commit abc, one core")


def test_the_table_has_mean_deviation_and_the_gap_seed_by_seed(matrix):
    runs = [
        finished(matrix, "single", 0, {"sub0": 80.0}, "sub0", images_per_second=2000.4),
        finished(matrix, "single", 1, {"sub0": 82.0}, "sub0"),
        finished(matrix, "dml", 0, {"sub0": 81.0, "sub1": 83.0, "ensemble": 84.0}, "ensemble"),
        finished(matrix, "dml", 1, {"sub0": 81.0, "sub1": 81.0, "ensemble": 82.0}, "ensemble"),
        finished(matrix, "ffl", 1, {"sub0": 83.0, "sub1": 84.0, "fused": 85.0}, "fused"),
    ]
    jobs = [run.job for run in runs]
    lines = matrix.common_table(runs, [("seeds are", lambda found: "+".join(str(r.job.seed) for r in found))])
    assert lines.splitlines()[2:] == [
        "| single | 0+1 | sub0 | 81.00 ± 1.41 | – | 81.00 ± 1.41 | – | – | 2 | 1,500 | 10 |",
        "| dml | 0+1 | ensemble | 83.00 ± 1.41 | +2.00 ± 2.83 | 81.50 ± 0.71 | +0.50 ± 2.12 | 83.00 ± 1.41 | 2 | 1,000 "
        "| 10 |",
        "| ffl | 1 | fused | 85.00 | +3.00 | 83.50 | +1.50 | – | 1 | 1,000 | 10 |",
    ]
    assert matrix.footer(runs, jobs) == ["commit abc, one core."]
    assert matrix.footer(runs[:4], jobs)[0] == "Not all of it: 4 of 5 runs are finished."
    assert matrix.common_table([]) == "Not run yet."
    alone = matrix.common_table(runs[2:3])
    assert "| 84.00 | – | 82.00 | – | 84.00 |" in alone


def test_a_document_keeps_what_stands_around_the_markers(matrix, tmp_path):
    file = tmp_path / "a.md"
    file.write_text(DOCUMENT, encoding="utf-8")
    matrix.Document(file, "methods").write("new\ntable")
    assert file.read_text(encoding="utf-8") == DOCUMENT.replace("Not run yet.", "new\ntable")


@pytest.mark.parametrize(
    "text",
    ["none", f"{DOCUMENT}{DOCUMENT}", "<!-- methods: end --> <!-- methods: begin -->", "<!-- methods: begin -->"],
    ids=["none", "twice", "reversed", "one"],
)
def test_a_document_without_one_pair_of_markers(matrix, tmp_path, text):
    (tmp_path / "a.md").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="expected one line <!-- methods: begin -->"):
        matrix.Document(tmp_path / "a.md", "methods")


@pytest.mark.parametrize("name", ["methods", "table", "pose", "paper"])
def test_the_markers_are_in_the_repository(matrix, name):
    assert "x" in matrix.Document(matrix.DOCUMENT, name).replaced("x")


def test_every_classification_method_is_in_the_matrix_and_its_runs_can_start(matrix, asked):
    from fflfast.training import resolve

    wanted = {name for name in methods.available() if methods.resolve(name).task == "classification"}
    assert set(matrix.CLASSIFICATION) == wanted
    jobs = module("methods").jobs(asked, matrix.CLASSIFICATION, [0, 1])
    assert {job.config.method for job in jobs} == wanted
    assert len({job.folder for job in jobs}) == len(jobs) == 2 * (len(wanted) + 1)
    for job in jobs:
        if job.needs is None and job.seed == 0:
            config = resolve(job.config).config
            assert (config.optimizer, config.lr, config.epochs, config.batch_size) == ("sgd", 0.1, 1, 64), job.row
        elif job.needs is not None:
            assert jobs[jobs.index(job) - 1].folder == job.needs


def test_what_is_missing_is_trained_and_a_teacher_before_its_student(matrix, asked, monkeypatch, capsys):
    command = module("methods")
    trained = []
    train = module("accuracy").train
    monkeypatch.setattr(module("accuracy"), "train", lambda config: (trained.append(config.out), train(config)))
    assert command.run(asked, ["single", "kd"], [0]) == 0
    folders = [str(asked.runs / name) for name in ("single-seed0", "resnet8-seed0", "kd-seed0")]
    assert trained == folders
    text = asked.results.read_text(encoding="utf-8")
    assert text.startswith("before\n\n<!-- methods: begin -->\n\n| method |")
    assert text.endswith("<!-- methods: end -->\n\nafter\n")
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert list(rows) == ["method", "single", "single, resnet8, teaches kd", "kd"]
    summary = json.loads((asked.runs / "kd-seed0" / "summary.json").read_text(encoding="utf-8"))
    assert f"| sub0 | {100 * summary['scores']['sub0']['accuracy']:.2f} |" in rows["kd"]
    with asked.csv.open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert [(row["row"], row["seed"], row["output"]) for row in found] == [
        ("single", "0", "sub0"), ("single, resnet8, teaches kd", "0", "sub0"), ("kd", "0", "sub0")
    ]  # fmt: skip

    assert command.run(asked, ["dml", "kd"], [0]) == 0
    assert trained[3:] == [str(asked.runs / "dml-seed0")]
    assert "| dml | 2 | ensemble |" in asked.results.read_text(encoding="utf-8")
    assert "run 1 of 3: dml-seed0" in capsys.readouterr().out

    asked.changes = asked.changes | {"epochs": 2}
    with pytest.raises(SystemExit, match="other settings"):
        command.run(asked, ["dml"], [0])


def test_a_run_that_fails_does_not_stop_the_others(matrix, asked, capsys):
    asked.changes = asked.changes | {"lr": 1e30}
    assert module("methods").run(asked, ["single", "kd"], [0]) == 1
    err = capsys.readouterr().err
    assert "benchmarks.methods: single-seed0: " in err
    assert "benchmarks.methods: kd-seed0: needs the run" in err
    assert "Not run yet." in asked.results.read_text(encoding="utf-8")


def test_a_run_that_cannot_start_ends_the_command(matrix, asked, capsys):
    asked.data = "cifar100"
    assert module("methods").run(asked, ["single", "dml"], [0]) == 1
    assert capsys.readouterr().err.count("benchmarks.methods: ") == 1


def test_the_time_is_up_within_a_run_and_the_next_call_goes_on(matrix, asked, monkeypatch, capsys):
    command, before = module("methods"), signal.getsignal(signal.SIGTERM)
    asked.changes = asked.changes | {"epochs": 4}
    asked.minutes = 60.0
    timers = []

    class Timer(threading.Timer):
        def __init__(self, seconds, function):
            super().__init__(seconds, function)
            timers.append((seconds, function))

    monkeypatch.setattr(matrix.threading, "Timer", Timer)
    from fflfast.training import loop

    step, steps = loop.TrainStep.__call__, []

    def counted(self, *arguments, **options):
        steps.append(1)
        if len(steps) == 3:
            timers[0][1]()  # the hour is over
        return step(self, *arguments, **options)

    monkeypatch.setattr(loop.TrainStep, "__call__", counted)
    assert command.run(asked, ["single", "dml"], [0]) == matrix.TIME_IS_UP
    assert timers[0][0] == 3600
    assert signal.getsignal(signal.SIGTERM) == before
    assert "the same command goes on" in capsys.readouterr().out
    assert len(steps) == 3
    assert not (asked.runs / "dml-seed0").exists()
    asked.minutes = None
    assert command.run(asked, ["single", "dml"], [0]) == 0
    assert len(steps) == 2 * 4 * 2  # two batches an epoch; none of the run that was stopped twice
    assert "continuing" in capsys.readouterr().out


def test_the_time_is_up_between_two_runs(matrix, asked, monkeypatch):
    class AtOnce(threading.Timer):
        def start(self):
            self.function()

    monkeypatch.setattr(matrix.threading, "Timer", AtOnce)
    asked.minutes = 1.0
    assert module("methods").run(asked, ["single"], [0]) == matrix.TIME_IS_UP
    assert not asked.runs.exists()


def test_a_signal_that_is_not_the_clocks_ends_the_command(matrix, asked, monkeypatch):
    from fflfast.training import Stopped

    def train(config):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(module("accuracy"), "train", train)
    asked.minutes = 60.0
    with pytest.raises(Stopped):
        module("methods").run(asked, ["single"], [0])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--only", "fll"], "--only: expected names among single, "),
        (["--seeds", "one"], "--seeds: expected whole numbers"),
    ],
)
def test_wrong_flags(monkeypatch, capsys, flags, words):
    monkeypatch.setattr("sys.argv", ["benchmarks.methods", *flags])
    with pytest.raises(SystemExit) as stop:
        module("methods").main()
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
