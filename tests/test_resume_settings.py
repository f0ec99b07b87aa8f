"""Settings of a run that goes on: what counts as given, what may change, and which folder is one to go on in."""

from __future__ import annotations

import pytest
from training_runs import flags, run, small

from fflfast.cli import main
from fflfast.training import TrainConfig, resume
from fflfast.training.report import Reporter


@pytest.fixture(scope="module")
def unusual(tmp_path_factory):
    """Folder of a finished run whose settings are not the defaults."""
    folder = tmp_path_factory.mktemp("unusual") / "run"
    run(folder, seed=1, method="dml", channels_last=True, epochs=1, checkpoint_every=2, log_every=3, workers=1)
    return folder


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--seed", "0"], "seed 1, got 0"),
        (["--method", "ffl"], "method dml, got ffl"),
        (["--channels-last", "false"], "channels_last True, got False"),
        (["--limit-test", "null"], "limit_test 60, got None"),
        (["--config", "seed: 0"], "seed 1, got 0"),
    ],
    ids=["number", "text", "bool", "null", "yaml"],
)
def test_a_setting_given_at_its_default_is_given(unusual, tmp_path, capsys, given, words):
    if given[0] == "--config":
        (tmp_path / "c.yaml").write_text(given[1], encoding="utf-8")
        given = ["--config", str(tmp_path / "c.yaml")]
    assert main(["train", "--resume", str(unusual), *given]) == 2
    assert words in capsys.readouterr().err


def _resumed(asked):
    return resume.resume(asked, resume.find_snapshot(asked, Reporter(quiet=True)))


def test_what_may_change_can_be_set_back_to_its_default(unusual):
    back = {"checkpoint_every": 0, "log_every": 50, "workers": 0, "epochs": None}
    config = _resumed(TrainConfig.from_dict({"resume": str(unusual), **back}))
    assert (config.checkpoint_every, config.log_every, config.workers, config.epochs) == (0, 50, 0, 1)
    config = _resumed(TrainConfig(resume=unusual, workers=0))
    assert config.workers == 1


def test_resume_auto_leaves_a_folder_of_another_kind_alone(tmp_path, capsys):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("config.yaml", "thesis.txt"):
        (folder / name).write_text("mine", encoding="utf-8")
    assert main(["train", *flags(small(folder)), "--resume", "auto"]) == 2
    assert f"--out {folder}: exists and is not an empty folder; choose another\n" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        "config.yaml": b"mine",
        "thesis.txt": b"mine",
    }


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_nothing_to_resume(tmp_path, capsys, name):
    (tmp_path / "empty").mkdir()
    assert main(["train", "--resume", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fflfast: error: --resume")
    assert error.count("\n") == 1
