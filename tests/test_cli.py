"""The commands as a person meets them: help, output on a terminal and in a pipe, and files that eval reads back."""

from __future__ import annotations

import io
import re

import pytest
import torch
from rich.console import Console
from training_runs import flags, run, small, start

from fflfast import cli
from fflfast.cli import main
from fflfast.training import ConfigError, TrainConfig, evaluate, export, plot, report, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a finished run with its baseline."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    train(TrainConfig(data="digits", arch=["tiny", "tiny"], epochs=2, baseline=True, out=str(folder)), quiet=True)
    return folder


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]], ids=["nothing", "help", "h"])
def test_help_of_all(capsys, arguments):
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("train", "eval", "export", "plot", "143"))


def test_version(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_an_installed_script_finds_methods_in_the_working_folder(tmp_path):
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "script.py"
    script.write_text("import sys\nfrom fflfast.cli import main\nsys.exit(main())\n", encoding="utf-8")
    (tmp_path / "mine.py").write_text("from fflfast.methods import FFL as Mine\n", encoding="utf-8")
    process = start(str(script), "train", "--method", "mine:Mine", "--help", cwd=tmp_path)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert "--options.fusion-channels" in out


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=["disk", "ctrl-c"],
)
def test_no_traceback_from_outside(monkeypatch, capsys, error, code, words):
    def fail(argv):
        raise error

    monkeypatch.setitem(cli._COMMANDS, "train", fail)
    assert main(["train"]) == code
    err = capsys.readouterr().err
    assert err.startswith("fflfast: error: ")
    assert err.count("\n") == 1
    assert words in err


@pytest.mark.parametrize("method", ["ffl", "dml"])
def test_help_documents_every_flag_and_the_methods_options(capsys, method):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--method", method, "--help"])
    assert stop.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    for name in TrainConfig().to_dict():
        if name != "options":
            # the flag, its value, and after it at least one word of explanation
            assert re.search(rf"--{name.replace('_', '-')} [^-\s]\S*( --\S+ \S+)? [a-zA-Z]", out), name
    assert re.search(r"--options\.temperature TEMPERATURE \S+", out)
    assert ("--options.fusion-weight-decay" in out) == (method == "ffl")
    assert "null" not in out


@pytest.mark.parametrize("command", ["eval", "export", "plot"])
def test_help_of_each(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "default" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "unknown command 'trian'; expected one of train, eval, export, plot"),
        (["eval"], "path"),
        (["eval", "no/run"], "no/run does not exist"),
        (["eval", "RUN", "--weights", "worst"], "--weights"),
        (["eval", "RUN", "--data", "synthetic"], "trained on 10 classes of digits"),
        (["eval", "RUN", "--wieghts", "best"], "--wieghts"),
        (["export", "no/run"], "no/run"),
        (["plot", "no/run"], "no/run"),
        (["plot", "RUN", "--out", "curves.xyz"], "curves.xyz"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_wrong_commands(trained, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert main([str(trained) if part == "RUN" else part for part in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fflfast: error: ")
    assert err.count("\n") == 1
    assert words in err
    assert list(tmp_path.iterdir()) == []


def test_plain_lines_in_a_pipe(tmp_path):
    process = start("-m", "fflfast", "train", *flags(small(tmp_path / "run", epochs=2)), "--baseline")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert err == ""
    assert "\x1b" not in out
    assert "\r" not in out
    assert len(re.findall(r"^epoch [12]/2  loss \d+\.\d{4}  test accuracy %  sub0 \d", out, re.MULTILINE)) == 4
    table = out[out.index("synthetic, ffl, 2 epochs") :]
    for name in ("sub0", "sub1", "ensemble", "fused", "alone"):
        assert re.search(rf"^\s+{name}\s.*\d+\.\d\d\s+\d+ / 60\s*$", table, re.MULTILINE), name


def test_live_view_on_a_terminal(tmp_path, monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=140, highlight=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(report, "Console", lambda **options: console)
    train(small(tmp_path / "run"))
    out = screen.getvalue()
    assert "\x1b[" in out
    assert "images/s" in out
    assert "kl/fused→sub0" in out
    assert "epoch 3/3" in out
    assert not re.search(r"epoch 3/3  loss", out)  # the plain line


def _lines(out):
    found = re.findall(r"^\s+(sub\d|ensemble|fused)\s+(\S+)\s+(\d+ / \d+)\s*$", out, re.MULTILINE)
    return {name: (accuracy, count) for name, accuracy, count in found}


def test_every_exported_file_has_the_runs_accuracy_to_the_last_digit(trained, capsys):
    assert main(["eval", str(trained)]) == 0
    expected = _lines(capsys.readouterr().out)
    assert list(expected) == ["sub0", "sub1", "ensemble", "fused"]
    assert main(["export", str(trained)]) == 0
    files = capsys.readouterr().out.split()
    assert [file.rpartition("/")[2] for file in files] == ["sub0.safetensors", "sub1.safetensors", "fused.pt2"]
    for file, name in zip(files, ("sub0", "sub1", "fused"), strict=True):
        assert main(["eval", file]) == 0
        assert _lines(capsys.readouterr().out) == {name: expected[name]}


def test_eval_is_what_the_run_said(trained):
    import json

    summary = json.loads((trained / "summary.json").read_text(encoding="utf-8"))
    assert {k: tuple(v) for k, v in evaluate(trained).items()} == {
        name: (score["correct"], score["total"]) for name, score in summary["scores"].items()
    }
    alone = evaluate(trained / "baseline-tiny")["sub0"]
    assert alone.correct == summary["baseline"]["tiny"]["correct"]
    best = evaluate(trained, weights="best")["fused"]
    assert best.value == summary["best"]["accuracy"]
    assert evaluate(trained / "last.safetensors") == evaluate(trained)


def test_eval_of_a_damaged_run_falls_back(trained, tmp_path):
    folder = tmp_path / "run"
    run(folder)
    (folder / "last.safetensors").write_bytes(b"")
    assert evaluate(folder)["fused"].total == 60
    assert (folder / "last.safetensors").exists()


def test_export_elsewhere_and_of_a_method_without_fusion(tmp_path):
    run(tmp_path / "run", method="dml")
    files = export(tmp_path / "run", tmp_path / "new" / "folder", weights="best")
    assert [file.name for file in files] == ["sub0.safetensors", "sub1.safetensors"]


def test_eval_of_somebody_elses_weights(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match=r"w\.safetensors"):
        evaluate(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("name", "magic"), [("a.png", b"\x89PNG\r\n\x1a\n"), ("sub/a.svg", b"<?xml"), ("a.pdf", b"%PDF")]
)
def test_plot(trained, tmp_path, name, magic):
    file = plot([trained, trained / "baseline-tiny"], tmp_path / name)
    assert file.read_bytes().startswith(magic)


def test_plot_by_default_lies_in_the_run(trained, capsys):
    assert main(["plot", str(trained)]) == 0
    assert capsys.readouterr().out == f"{trained / 'curves.png'}\n"
    assert (trained / "curves.png").stat().st_size > 10_000
