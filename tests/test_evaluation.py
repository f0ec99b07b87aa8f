"""Commands that read a run: eval and export, and what they say to wrong arguments, damaged files and full disks."""

from __future__ import annotations

import errno
import os
import shutil

import pytest
import torch
from training_runs import run

from fflfast.cli import main
from fflfast.models import load_exported
from fflfast.training import ConfigError, evaluate, evaluation, export


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a finished run that was tested on 60 images, with its exported files."""
    folder = tmp_path_factory.mktemp("evaluation") / "run"
    run(folder, epochs=2)
    export(folder)
    return folder


@pytest.fixture
def damaged(trained, tmp_path):
    """Copy of the run with an empty last.safetensors."""
    folder = tmp_path / "run"
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("export"))
    (folder / "last.safetensors").write_bytes(b"")
    return folder


@pytest.mark.parametrize("command", ["eval", "export"])
def test_older_weights_are_never_taken_silently(damaged, capsys, command):
    assert main([command, str(damaged)]) == 0
    err = capsys.readouterr().err
    assert err.startswith(f"fflfast: warning: {damaged / 'last.safetensors'} is damaged")
    assert err.endswith("took previous.safetensors\n")
    assert err.count("\n") == 1


def test_no_warning_where_nothing_is_wrong(trained, capsys):
    assert main(["eval", str(trained)]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export", "NOWHERE"], "does not exist"),
        (["export", "JUNK"], "no checkpoint of fflfast train"),
        (["export", "EMPTY"], "holds no last.safetensors"),
        (["export", "RUN/export/sub0.safetensors"], "no checkpoint of fflfast train"),
        (["export", "RUN/last.safetensors", "--weights", "best"], "leave it away"),
        (["export", "RUN", "--out", "JUNK"], "--out"),
        (["export", "RUN", "--out", "JUNK/below"], "--out"),
        (["export", "RUN", "--out", "/proc/nowhere"], "--out /proc/nowhere"),
        (["export", "RUN", "--out", "x" * 300], "--out xxx"),
        (["export", "RUN", "--out", "a\0b"], "--out"),
        (["eval", "EMPTY"], "holds no last.safetensors"),
        (["eval", "EMPTY", "--weights", "best"], "holds no best.safetensors"),
        (["eval", "x" * 300], "does not exist"),
        (["eval", "RUN", "--limit-test", "-5"], "--limit-test: expected at least 1 image, got -5"),
        (["eval", "RUN", "--limit-test", "0"], "--limit-test: expected at least 1 image, got 0"),
        (["eval", "RUN", "--workers", "-1"], "--workers: expected 0 or above, got -1"),
        (["eval", "RUN/best.safetensors", "--weights", "best"], "leave it away"),
        (["eval", "RUN/export/sub0.safetensors", "--weights", "best"], "leave it away"),
    ],
    ids=lambda value: "-".join(part[:20] for part in value) if isinstance(value, list) else "",
)
def test_wrong_arguments_are_one_line_and_write_nothing(trained, tmp_path, monkeypatch, capsys, arguments, words):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "JUNK").write_text("junk")
    monkeypatch.chdir(tmp_path)
    assert main([part.replace("RUN", str(trained)) for part in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fflfast: error: ")
    assert err.count("\n") == 1
    assert words in err
    assert sorted(os.listdir(tmp_path)) == ["EMPTY", "JUNK"]
    assert os.listdir("EMPTY") == []


def test_best_weights_that_are_not_there(damaged, capsys):
    (damaged / "best.safetensors").unlink()
    assert main(["eval", str(damaged), "--weights", "best"]) == 2
    assert "holds no best.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "output"), [("sub0.safetensors", "sub0"), ("fused.pt2", "fused")])
def test_an_exported_file_is_tested_on_the_images_of_its_run(trained, name, output):
    file = trained / "export" / name
    assert load_exported(file)[1]["limit_test"] == 60
    assert evaluate(file)[output] == evaluate(trained)[output]
    assert evaluate(file, limit_test=7)[output].total == 7


def test_a_program_runs_on_the_cpu_and_another_device_is_refused(trained, monkeypatch):
    monkeypatch.setattr(evaluation, "select_device", lambda name: torch.device("meta"))
    assert evaluate(trained / "export" / "fused.pt2")["fused"].total == 60
    with pytest.raises(ConfigError, match=r"--device cuda: a \.pt2 program runs where it was traced"):
        evaluate(trained / "export" / "fused.pt2", device="cuda")


def test_a_full_disk_is_one_line_and_leaves_no_part_of_a_file(trained, tmp_path, monkeypatch, capsys):
    def refuse(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    assert main(["export", str(trained), "--out", str(tmp_path / "new")]) == 1
    err = capsys.readouterr().err
    assert f"cannot write into {tmp_path / 'new'}: No space left on device; free the disk" in err
    assert err.count("\n") == 1
    assert os.listdir(tmp_path / "new") == []
