"""`fflfast bench train`: which loops, in turns, each in a process of its own; what it prints and what it refuses."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from typing import ClassVar

import pytest
from bench_runs import CPU, SMALL, resolved

from fflfast.bench import Result, Variant, measure, report
from fflfast.bench import worker as workers
from fflfast.bench.subject import Job
from fflfast.bench.variants import choose
from fflfast.cli import main
from fflfast.training import ConfigError

# ---- which variants -------------------------------------------------------------------------------------------

REASON = {"streams": "no streams here", "graph": "no graphs here"}


@pytest.mark.parametrize(
    ("names", "left_out", "options", "chosen", "refused"),
    [
        (None, REASON, {}, ["naive", "serial", "floor serial"], ["streams", "graph"]),
        (None, {}, {}, ["naive", "serial", "streams", "graph", "floor serial", "floor streams", "floor graph"], []),
        (None, REASON, {"compile": True},
         ["naive", "serial", "serial compiled", "floor serial", "floor serial compiled"], ["streams", "graph"]),
        (["graph", "floor"], {}, {}, ["graph", "floor graph"], []),
        (["naive", "floor"], REASON, {}, ["naive", "floor serial"], []),
        (["streams"], REASON, {}, [], ["streams"]),
        (None, REASON, {"alone": True}, ["naive", "serial"], ["streams", "graph", "floor"]),
    ],
    ids=["cpu", "gpu", "compile", "one", "no ours", "refused", "single"],
)  # fmt: skip
def test_variants(names, left_out, options, chosen, refused):
    variants, reasons = choose(names, left_out, **{"compile": False, "alone": False, **options})
    assert [variant.name for variant in variants] == chosen
    assert list(reasons) == refused
    assert all(reasons[name] == left_out.get(name, reasons[name]) for name in reasons)


# ---- workers in turns -----------------------------------------------------------------------------------------


class FakeWorker:
    """Answers as a worker would, with times that are known, and fails where it is told to."""

    log: ClassVar[list[tuple]] = []
    failing: ClassVar[dict[tuple[str, str], str]] = {}
    SECONDS: ClassVar[dict[str, float]] = {
        "naive": 0.4,
        "serial": 0.2,
        "streams": 0.1,
        "floor serial": 0.16,
        "floor streams": 0.08,
    }

    def __init__(self, job):
        self.name, self.blocks = job.variant.name, 0

    def _fail(self, what):
        if (self.name, what) in self.failing:
            raise workers.Refused(self.failing[self.name, what])

    def wait(self):
        self._fail("build")

    def ask(self, method, *arguments, **options):
        self._fail(method)
        self.log.append((self.name, method, *arguments, *options.values()))
        if method == "block":
            self.blocks += 1
            return self.SECONDS[self.name] * self.blocks  # slower and slower, all alike
        if method == "pass_through":
            return 1000.0 if not options["step"] else 200.0
        return {"warm_up": 1.5, "facts": {"peak_bytes": 10**6, "launches": 7}}[method]


@pytest.fixture
def fakes(monkeypatch):
    @contextlib.contextmanager
    def started(job):
        yield FakeWorker(job)

    monkeypatch.setattr(sys.modules["fflfast.bench.measure"], "started", started)
    monkeypatch.setattr(FakeWorker, "log", [])
    monkeypatch.setattr(FakeWorker, "failing", {})
    return FakeWorker


def test_blocks_take_turns_and_another_begins_each_round(fakes):
    lines = []
    result = measure(resolved(), steps=12, variants=["naive", "serial", "streams", "floor"], tell=lines.append)
    blocks = [(name, *steps) for name, method, *steps in fakes.log if method == "block"]
    order = ["naive", "serial", "streams", "floor serial", "floor streams"]
    # Twelve steps in ten rounds: the first two have one more.
    assert blocks[:50] == [(order[(r + k) % 5], 2 if r < 2 else 1) for r in range(10) for k in range(5)]
    assert [row.variant.name for row in result.rows] == order
    assert lines[0] == "starting 5 processes"
    found = {row.variant.name: result.figures(row) for row in result.rows}
    assert found["streams"]["times_naive"] == pytest.approx(4)
    assert found["streams"]["overhead_percent"] == pytest.approx(25)
    assert found["serial"]["overhead_percent"] == pytest.approx(25)
    assert found["naive"]["step_ms"] == pytest.approx(400 * 5.5)
    assert found["naive"]["first_loss"] == 1.5
    # of the fastest, in three passes of five steps whose median step took 0.1 · 12 s
    assert result.rates == {"loader": 1000.0, "step": pytest.approx(24 / (0.1 * 12)), "end_to_end": 200.0}
    assert {name for name, method, *_ in fakes.log if method == "pass_through"} == {"streams"}


def test_long_measurements_have_longer_blocks(fakes):
    result = measure(resolved(), steps=200, variants=["naive"])
    assert fakes.log.count(("naive", "block", 20)) == 10
    assert result.block == 20
    assert result.rates == {}


@pytest.mark.parametrize("moment", ["build", "warm_up", "block", "facts"])
def test_one_that_fails_costs_the_others_nothing(fakes, moment):
    fakes.failing["streams", moment] = "no luck"
    result = measure(resolved(), steps=3, variants=["naive", "serial", "streams", "floor"])
    assert result.refused == {"streams": "no luck"}
    assert [row.variant.name for row in result.rows] == ["naive", "serial", "floor serial", "floor streams"]
    assert all(len(row.seconds) == 3 for row in result.rows)
    assert result.fastest.variant.name == "serial"
    assert "streams not measured: no luck" in report.footnotes(result)


def test_the_plan_of_the_config_is_the_one_measured(fakes, monkeypatch):
    monkeypatch.setattr(fakes, "SECONDS", {**fakes.SECONDS, "graph": 0.1, "floor graph": 0.1})
    result = measure(resolved(plan="graph"), steps=1)
    assert [row.variant.name for row in result.rows] == ["naive", "graph", "floor graph"]


def test_on_a_cpu_streams_and_graphs_are_left_out_with_the_reason(fakes):
    result = measure(resolved(), steps=1)
    assert [row.variant.name for row in result.rows] == ["naive", "serial", "floor serial"]
    assert list(result.refused) == ["streams", "graph"]
    assert "no streams" in result.refused["streams"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variants": ["fast"]}, "--variants: expected names among naive"),
        ({"steps": 0}, "--steps: expected at least 1"),
    ],
)
def test_wrong_questions(fakes, options, words):
    with pytest.raises(ConfigError, match=words):
        measure(resolved(), **options)


def test_several_processes_are_refused(fakes, monkeypatch):
    config = resolved()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process"):
        measure(config)


# ---- real processes -------------------------------------------------------------------------------------------


def test_the_command(tmp_path, capfd):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items() if name != "data"]
    files = ["--out", str(tmp_path / "out"), "--json", str(tmp_path / "b.json")]
    own = ["--steps", "2", "--variants", "naive,serial,floor", *files]
    assert main(["bench", "train", "--arch", "tiny", "--arch", "tiny", "--channels-last", *flags, *own]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    found = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))
    assert found == json.loads((tmp_path / "out" / "bench.json").read_text(encoding="utf-8"))
    assert (tmp_path / "out" / "bench.md").read_text(encoding="utf-8") in out
    assert found["config"]["data"] == "synthetic"  # the default
    rows = {row["variant"]: row for row in found["variants"]}
    assert list(rows) == ["naive", "serial", "floor serial"]
    assert (rows["naive"]["layout"], rows["serial"]["layout"]) == ("NCHW", "channels_last")
    assert rows["naive"]["first_loss"] == pytest.approx(rows["serial"]["first_loss"], rel=1e-4)
    assert rows["floor serial"]["first_loss"] < rows["serial"]["first_loss"]
    for row in rows.values():
        assert len(row["block_seconds"]) == 2
        assert row["images_per_second"] == pytest.approx(24e3 / row["step_ms"])
        assert row["launches"] > 50
        assert row["peak_mb"] is None or 0 < row["peak_mb"] < 500
    assert rows["floor serial"]["launches"] < rows["serial"]["launches"]
    assert all(value > 0 for value in found["images_per_second"].values())
    assert list(found["images_per_second"]) == ["loader", "step", "end_to_end"]
    for text in ("| serial |", "loader alone", "× naive", "over floor"):
        assert text in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "expected fflfast bench train"),
        (["trian"], "got 'trian'"),
        (["train"], "--arch"),
        (["train", "--arch", "tiny", "--steps", "many"], "--steps"),
        (["train", "--arch", "tiny", "--arch", "tiny", "--variants", "serial,slow"], "'slow'"),
        (["train", "--arch", "tiny", "--no-such-flag", "1"], "--no-such-flag"),
        (["train", "--arch", "tiny", "--method", "single", "--json", "/dev/null/b.json"], "/dev/null/b.json"),
    ],
    ids=["nothing", "typo", "no network", "steps", "variant", "flag", "file"],
)
def test_wrong_commands(capsys, arguments, words):
    assert main(["bench", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fflfast: error: ")
    assert err.count("\n") == 1
    assert words in err


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "train", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(text in out for text in ("--variants", "--steps", "--json", "--batch-size", "published FFL code"))


def test_a_worker_that_dies_is_a_refusal():
    job = Job(Variant("naive"), resolved(), None, 1)
    with workers.started(job) as worker:
        worker.wait()
        with pytest.raises(workers.Refused, match="no attribute 'nothing'"):
            worker.ask("nothing")
        assert worker.ask("block", 1) > 0  # goes on
        os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(workers.Refused, match=r"exit code -9.*memory"):
            worker.ask("block", 1)
    assert not worker._process.is_alive()


def test_a_job_that_cannot_be_built_says_why():
    with (
        workers.started(Job(Variant("naive"), resolved(mixup=0.3), None, 1)) as worker,
        pytest.raises(workers.Refused, match="does not mix"),
    ):
        worker.wait()


def test_reports_of_nothing():
    result = Result(resolved(), CPU, 1, refused={"naive": "no"})
    assert "naive not measured: no" in report.markdown(result)


def test_an_interrupt_is_the_parents_alone():
    before = signal.getsignal(signal.SIGINT)
    with workers.started(Job(Variant("naive"), resolved(), None, 1)) as worker:
        assert signal.getsignal(signal.SIGINT) is before
        os.kill(worker._process.pid, signal.SIGINT)  # while it imports
        worker.wait()
        os.kill(worker._process.pid, signal.SIGINT)
        assert worker.ask("block", 1) > 0
