"""`python -m benchmarks.table`, `.pose` and `.cost`: which runs they are made of, and what their tables say."""

from __future__ import annotations

import argparse
import sys

import pytest
import torch
from test_benchmark_methods import finished
from test_benchmarks import ROOT, module, on_path  # noqa: F401 (a fixture)

from fflfast import methods


@pytest.fixture
def table():
    return module("table")


def asked(tmp_path, name, **changes):
    """What a command is asked for: small networks on few images."""
    (tmp_path / "results.md").write_text(f"<!-- {name}: begin -->\n<!-- {name}: end -->\n", encoding="utf-8")
    settings = {
        "data": "digits", "data_dir": None, "device": "cpu", "amp": "off", "runs": tmp_path / "runs", "minutes": None,
        "csv": None, "results": tmp_path / "results.md", "archs": ("tiny",),
        "changes": {"epochs": 1, "limit_train": 100, "limit_test": 50},
    }  # fmt: skip
    return argparse.Namespace(**{**settings, **changes})


def everything(table, options):
    return table.jobs(options, module("matrix").CLASSIFICATION, table.ARCHS, table.RECIPES, table.SEEDS)


def test_the_runs_of_the_matrix(table, tmp_path):
    jobs = everything(table, asked(tmp_path, "table", changes={}))
    assert len({job.folder for job in jobs}) == len(jobs)
    kinds = {(job.table, job.config.method) for job in jobs}
    names = [name for name in methods.available() if methods.resolve(name).task == "classification"]
    assert len(kinds) == 2 * 2 * len(names)
    count = {
        job.folder.name: len(job.config.arch) for job in jobs if job.seed == 1 and job.table.startswith("resnet32")
    }
    assert [count[f"resnet32-own-{m}-seed1"] for m in ("single", "kd", "ffl", "one", "okddip", "mcl_okd", "oem")] == [
        1, 1, 2, 3, 4, 4, 5
    ]  # fmt: skip
    assert {count[f"resnet32-common-{m}-seed1"] for m in ("ffl", "dml", "cl", "pcl", "mcl_okd", "oem")} == {3}
    for job in jobs:
        own = "own recipe" in job.table
        assert (job.config.lr is None) == own, "a recipe of one's own is left to the method's class"
        assert job.config.epochs == (None if own else 300)
        if job.needs is not None:
            taught_by = next(other for other in jobs if other.folder == job.needs)
            assert jobs.index(taught_by) < jobs.index(job)
            assert taught_by.config.arch == (["resnet110"] if "resnet32" in job.table else ["wrn_20_8"])
            assert (taught_by.config.lr, taught_by.seed) == (job.config.lr, job.seed)


def test_every_run_of_the_matrix_can_start(table, tmp_path):
    """On synthetic images: the method takes these networks and this recipe."""
    from fflfast.training import resolve

    options = asked(tmp_path, "table", data="synthetic", changes={})
    for job in everything(table, options):
        if job.seed == 1 and job.needs is None and job.table.startswith("resnet32"):
            config = resolve(job.config).config
            wanted = methods.resolve(config.method).recipe if "own" in job.table else module("table").COMMON
            assert (config.lr, config.batch_size) == (wanted["lr"], wanted["batch_size"]), job.folder.name


def test_published_figures_stand_beside_full_runs_alone(table):
    matrix = module("matrix")

    def of(row, score):
        run = finished(matrix, row, 1, {"sub0": score, "sub1": score, "fused": score}, "fused")
        job = matrix.Job(row, 1, run.job.config, table="resnet32, own recipe")
        return matrix.Run(job, run.summary, run.made_with)

    runs = [of("ffl", 72.5), of("oem", 70.0)]
    text = table.tables(runs, everything=[run.job for run in runs])
    assert "### resnet32, own recipe" in text
    assert "| ffl | 2 | 72.18 a | fused | 72.50 |" in text
    assert "| oem | 2 | – | fused | 70.00 |" in text
    assert "arXiv 2006.04147" in text
    short = table.tables(runs, everything=[run.job for run in runs], shortened=True)
    assert short.startswith("**Shortened.**")
    assert "72.18" not in short
    assert table.tables([], everything=[]) == "Not run yet."


def test_published_figures_are_of_methods_and_networks_that_are_there(table):
    assert set(table.PUBLISHED) == set(table.ARCHS)
    for figures in table.PUBLISHED.values():
        assert set(figures) <= set(module("matrix").CLASSIFICATION)


def test_parts_of_the_matrix_in_any_order(table, tmp_path):
    options = asked(tmp_path, "table")
    assert table.run(options, ["dml"], ["tiny"], ["common"], [2]) == 0
    assert table.run(options, ["single"], ["tiny"], ["own", "common"], [1]) == 0
    text = options.results.read_text(encoding="utf-8")
    assert text.index("### tiny, own recipe") < text.index("### tiny, common recipe")
    assert "| dml | 3 | – | ensemble |" in text
    assert "Not all of it: 3 of " in text
    assert {path.name for path in options.runs.iterdir()} == {
        "tiny-common-dml-seed2", "tiny-own-single-seed1", "tiny-common-single-seed1"
    }  # fmt: skip


def test_pose(tmp_path):
    from pose_data import write_lspet

    pose = module("pose")
    write_lspet(tmp_path / "data")
    options = asked(tmp_path, "pose", data="lspet", data_dir=str(tmp_path / "data"), arch="hourglass2@1/32")
    options.changes = {"epochs": 1, "image_size": 32, "batch_size": 4}
    assert pose.run(options, ["alone", "okdhp"], [0]) == 0
    text = options.results.read_text(encoding="utf-8")
    assert "| okdhp | 3 | ensemble |" in text
    assert "| alone | 1 | sub0 |" in text


def test_pose_at_the_size_of_the_docs(tmp_path):
    pose = module("pose")
    branches, alone = pose.jobs(asked(tmp_path, "pose", arch=pose.ARCH, changes={}), ("okdhp", "alone"), [0])
    assert (branches.config.arch, alone.config.arch) == (["hourglass2@1/4"] * 3, ["hourglass2@1/4"])
    same = {"arch": None, "out": None}
    assert branches.config.to_dict() | same == alone.config.to_dict() | same


def test_the_cost_of_a_step(tmp_path):
    from benchmarks import cost

    options = argparse.Namespace(
        data="synthetic", arch="tiny", batch_size=8, steps=2, device="cpu", amp="off", plan="serial", out=tmp_path,
        document=tmp_path / "a.md",
    )  # fmt: skip
    options.document.write_text("<!-- cost: begin -->\n<!-- cost: end -->\n", encoding="utf-8")
    assert cost.run(options, ["kd"]) == 0
    (row,) = module("report").read(tmp_path / "cost.csv")
    step, floor = float(row["step_ms"]), float(row["floor_ms"])
    assert step > 0
    assert floor > 0
    assert row["not_measured"] == ""
    assert f"| `kd` | tiny | {step:.4g} (" in options.document.read_text(encoding="utf-8")


def test_the_markers_of_the_costs():
    module("matrix").Document(ROOT / "docs" / "methods.md", "cost")


def test_a_method_that_was_not_measured_says_why():
    cost = module("cost")
    row = dict.fromkeys(cost.FIELDS, "1") | {"method": "mcl_okd", "arch": "a a", "not_measured": "no room"}
    assert "| `mcl_okd` | a a | not measured: no room | – |" in cost.table([row])


def test_costs_on_a_device_that_is_not_here(monkeypatch, tmp_path, capsys):
    cost = module("cost")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["cost", "--device", "cuda", "--out", str(tmp_path / "out")])
    assert cost.main() == 1
    assert capsys.readouterr().err == "benchmarks.cost: no CUDA device; --device cpu measures the CPU\n"
    assert not (tmp_path / "out").exists()
