"""`python -m benchmarks.train` and its alternatives: rows, tables, goals, and ways that compute the same."""

from __future__ import annotations

import sys

import pytest
import torch
from bench_runs import CPU, resolved
from test_benchmarks import module, on_path  # noqa: F401 (a fixture)

from fflfast.bench import Result, Row, Variant
from fflfast.training import ConfigError, resolve


@pytest.fixture
def train():
    return module("train.__main__")


@pytest.fixture
def case():
    cases = module("train.cases")
    return cases.Case("small", ("tiny", "tiny"), 10, "synthetic", 8, 24, "off", goals={"times_naive": 2})


def result_of(naive=0.4, serial=0.16, floor=0.15):
    rows = [
        Row(Variant("naive"), [naive] * 3, 5.0, 2_000_000, 90),
        Row(Variant("ours", "serial"), [serial] * 3, 5.0, None, 60),
        Row(Variant("floor", "serial"), [floor] * 3, 4.0, 1_000_000, 50),
    ]
    rates = {"loader": 1e6, "step": 150.0, "end_to_end": 149.0}
    return Result(resolved(channels_last=True), CPU, 4, rows, {"graph": "no graphs here"}, rates, steps=12)


def kept(train, tmp_path, case, result):
    """The rows as they come back from the file."""
    report = module("report")
    made = report.provenance(CPU, "benchmarks.train")
    report.write(tmp_path / "train.csv", [{**row, **made} for row in train.rows_of(case, result)], train.FIELDS)
    return report.read(tmp_path / "train.csv")


def test_rows(train, case, tmp_path):
    rows = {row["variant"]: row for row in kept(train, tmp_path, case, result_of())}
    assert list(rows) == ["naive", "serial", "floor serial", "graph"]
    serial = rows["serial"]
    assert (serial["case"], serial["batch"], serial["layout"]) == (
        "small, batch 24, off, channels_last",
        "24",
        "channels_last",
    )
    assert (serial["images_per_second"], serial["times_naive"], serial["step_ms"]) == ("150", "2.5", "160")
    assert float(serial["overhead_percent"]) == pytest.approx(100 / 15, rel=1e-4)
    assert (serial["peak_mb"], serial["launches"], serial["launches_are"]) == ("", "60", "operator calls")
    assert (serial["steps"], serial["end_to_end_images_per_second"]) == ("12", "149")
    assert rows["naive"]["end_to_end_images_per_second"] == ""
    assert (rows["graph"]["not_measured"], rows["graph"]["step_ms"]) == ("no graphs here", "")


@pytest.mark.parametrize(
    ("goals", "lines"),
    [
        ({"times_naive": 2}, ["- goal 2 times the naive loop: met, 2.5 (serial)"]),
        ({"times_naive": 3}, ["- goal 3 times the naive loop: missed, 2.5 (serial)"]),
        (
            {"times_naive": 2.5, "overhead_percent": 6},
            [
                "- goal 2.5 times the naive loop: met, 2.5 (serial)",
                "- goal 6 % over the floor: missed, 6.67 % (serial)",
            ],
        ),
        ({"overhead_percent": 7}, ["- goal 7 % over the floor: met, 6.67 % (serial)"]),
        ({}, []),
    ],
)
def test_the_table_and_its_goals(train, case, tmp_path, goals, lines):
    import dataclasses

    text = train.table(kept(train, tmp_path, dataclasses.replace(case, goals=goals), result_of()))
    assert text.startswith("### small, batch 24, off, channels_last\n\n| variant | arithmetic |")
    assert "| serial | float32 channels_last | 150 | 160 (160 … 160) | 2.50 | +6.7 % | – | 60 |" in text
    assert "- graph not measured: no graphs here" in text
    assert "- serial, images/s: loader alone 1,000,000, step alone 150, end to end 149" in text
    assert [line for line in text.splitlines() if line.startswith("- goal")] == lines
    assert "python -m benchmarks.train" in text.splitlines()[-1]


def test_the_command_keeps_what_was_measured_when_a_case_cannot_be(train, case, tmp_path, monkeypatch, capsys):
    asked = []

    def measure(config, **options):
        asked.append((config.amp, options["steps"], options["num_classes"], options["variants"]))
        if config.amp == "bf16":
            raise ConfigError("no such thing here")
        return result_of()

    import dataclasses

    monkeypatch.setattr(train, "measure", measure)
    monkeypatch.setattr(train, "cases", lambda device: (dataclasses.replace(case, amp="bf16"), case))
    monkeypatch.setattr(sys, "argv", ["train", "--out", str(tmp_path), "--steps", "7", "--variants", "naive,serial"])
    assert train.main() == 0
    assert asked == [("bf16", 7, 10, ["naive", "serial"]), ("off", 7, 10, ["naive", "serial"])]
    out = capsys.readouterr().out
    assert "left out: no such thing here" in out
    assert (tmp_path / "train.md").read_text(encoding="utf-8").strip() in out
    monkeypatch.setattr(sys, "argv", ["train", "--table", str(tmp_path / "train.csv")])
    assert train.main() == 0
    assert capsys.readouterr().out == (tmp_path / "train.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_case_can_be_configured(device):
    for case in module("train.cases").cases(torch.device(device)):
        if case.amp != "fp16":  # which only a GPU has
            config = resolve(case.config(CPU)).config
            assert (config.amp, config.batch_size, len(config.arch)) == (case.amp, case.batch_size, len(case.arch))
            assert config.trunk == ("layer3" if "shared" in case.label else "none")


def test_cases_have_names_of_their_own():
    cases = module("train.cases").cases(torch.device("cuda"))
    assert len({case.name for case in cases}) == len(cases)


# ---- alternatives ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["grouped", "vmap", "threads"])
@pytest.mark.parametrize("count", [2, 3])
def test_every_way_computes_what_serial_does(kind, count):
    alternatives = module("train.alternatives")
    networks = alternatives.tails(count, "resnet8", 5, CPU)
    x = torch.randn(6, 32, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    data = alternatives.Data(x, torch.arange(6) % 5)
    serial, other = alternatives.make("serial", networks), alternatives.make(kind, networks)
    assert alternatives.error_of(other, serial, data) < 1e-5
    # It trains weights of its own, all of them.
    assert sum(p.numel() for p in other.parameters()) == sum(p.numel() for p in serial.parameters())
    loss = other(*data.arguments)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in other.parameters())
    # Weights that differ from network to network show in the result: no network was taken twice.
    with torch.no_grad():
        for p in networks[-1].parameters():
            p.mul_(1.5)
    assert alternatives.error_of(alternatives.make(kind, networks), serial, data) > 1e-3


def test_the_command_of_the_alternatives(tmp_path, monkeypatch, capsys):
    alternatives, report = module("train.alternatives"), module("report")
    arguments = ["--out", str(tmp_path), "--arch", "tiny", "--batch", "4", "--budget", "0.01"]
    monkeypatch.setattr(sys, "argv", ["alternatives", *arguments])
    assert alternatives.main() == 0
    rows = report.read(tmp_path / "alternatives.csv")
    assert [(row["networks"], row["amp"], row["variant"]) for row in rows] == [
        (count, amp, kind)
        for count in "24"
        for amp in ("off", "bf16")
        for kind in ("serial", "grouped", "vmap", "threads")
    ]
    assert all(float(row["times_serial"]) == 1 for row in rows if row["variant"] == "serial")
    assert all(row["peak_mb"] == "" for row in rows if row["variant"] == "threads")
    assert (tmp_path / "alternatives.md").read_text(encoding="utf-8").strip() in capsys.readouterr().out
