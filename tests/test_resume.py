"""Interrupted runs: killed, stopped or damaged anywhere, they end in the same bits as a run that nobody touched."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from training_runs import SMALL, STEPS, assert_same, flags, run, small, start, tensors

from fflfast.cli import main
from fflfast.tasks import Classification
from fflfast.training import ConfigError, Stopped, TrainConfig, checkpoint, loop, train
from fflfast.training.step import TrainStep

NOISY = {"method": "training_runs:Noisy", "checkpoint_every": 2}


@pytest.fixture(autouse=True)
def _one_thread():
    """Compute with as many threads as the killed processes did: another number may round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """Folder of a run that nobody disturbed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("untouched") / "run"
    run(folder, **NOISY)
    torch.set_num_threads(threads)
    return folder


def _records(folder):
    """Return metrics.jsonl without what depends on the clock."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in record.items() if k not in ("seconds", "images_per_second")} for record in records]


def _assert_as_untouched(folder, untouched):
    for name in ("last.safetensors", "best.safetensors"):
        assert_same(tensors(folder, name), tensors(untouched, name))
    assert _records(folder) == _records(untouched)
    csv = [(f / "metrics.csv").read_text(encoding="utf-8").splitlines() for f in (folder, untouched)]
    assert len(csv[0]) == len(csv[1]) == 1 + SMALL["epochs"]


def _at_call(owner, name, number, action):
    """Let ``action`` happen just before the ``number``-th call of a function."""
    original = getattr(owner, name)
    calls = 0

    def counted(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == number:
            action()
        return original(*arguments, **options)

    setattr(owner, name, counted)


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _cut_and_die():
    """Leave half of the file that is being written."""
    for file in Path.cwd().glob("*/*.tmp"):
        os.truncate(file, file.stat().st_size // 2)
    _die()


KILLS = {
    "before-the-first-step": (TrainStep, "__call__", 1, _die),
    "within-an-epoch": (TrainStep, "__call__", 8, _die),
    "at-the-last-step": (TrainStep, "__call__", 3 * STEPS, _die),
    "in-the-test": (Classification, "metric", 3, _die),
    "in-a-write": (os, "fsync", 11, _cut_and_die),
    "before-a-sync": (os, "fsync", 13, _die),
    "before-the-old-file-moves": (os, "replace", 12, _die),
    "between-the-renames": (os, "replace", 13, _die),
    "after-the-renames": (os, "fsync", 14, _die),
}


def kill_all():
    """Run in a process of its own, without threads: a child for each kill."""
    run(Path("warm-up"))  # so that what is imported late is imported once
    for name, how in KILLS.items():
        child = os.fork()
        if child == 0:
            _at_call(*how)
            train(small(Path(name), **NOISY), quiet=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(name, os.waitstatus_to_exitcode(status))


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Folder that holds one killed run for each way to die."""
    folder = tmp_path_factory.mktemp("killed")
    process = start("-c", "import test_resume; test_resume.kill_all()", cwd=folder)
    out, err = process.communicate(timeout=120)
    assert out.split() == [part for name in KILLS for part in (name, str(-signal.SIGKILL))], err
    return folder


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
@pytest.mark.parametrize("how", KILLS)
def test_a_killed_run_goes_on_bit_for_bit(killed, untouched, how):
    folder = killed / how
    assert tensors(folder, "previous.safetensors" if how == "between-the-renames" else "last.safetensors")
    train(TrainConfig(resume=str(folder)), quiet=True)
    _assert_as_untouched(folder, untouched)


@pytest.mark.parametrize(
    ("owner", "name", "call", "signum"),
    [
        (TrainStep, "__call__", 1, signal.SIGTERM),
        (TrainStep, "__call__", 7, signal.SIGINT),
        (TrainStep, "__call__", STEPS, signal.SIGTERM),
        (Classification, "metric", 3, signal.SIGTERM),
        (checkpoint, "write", 4, signal.SIGTERM),
    ],
    ids=["first-step", "within-an-epoch-int", "last-step-of-an-epoch", "test", "save"],
)
def test_a_stopped_run_saves_and_goes_on_bit_for_bit(tmp_path, monkeypatch, untouched, owner, name, call, signum):
    before = signal.getsignal(signum)
    monkeypatch.setattr(owner, name, getattr(owner, name))  # restores it afterwards
    _at_call(owner, name, call, lambda: os.kill(os.getpid(), signum))
    with pytest.raises(Stopped) as stopped:
        train(small(tmp_path / "run", **NOISY), quiet=True)
    assert stopped.value.code == {signal.SIGTERM: 143, signal.SIGINT: 130}[signum]
    assert signal.getsignal(signum) is before
    monkeypatch.undo()
    train(TrainConfig(resume=str(tmp_path / "run")), quiet=True)
    _assert_as_untouched(tmp_path / "run", untouched)


def test_a_second_interrupt_does_not_wait(tmp_path, monkeypatch):
    def twice(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(TrainStep, "set_schedule", twice)
    with pytest.raises(KeyboardInterrupt):
        train(small(tmp_path / "run"), quiet=True)


def test_the_command_exits_with_143(tmp_path):
    folder = tmp_path / "run"
    process = start("-m", "fflfast", "train", *flags(small(folder, epochs=100_000)))
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_size:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143, err
    assert err == ""
    assert out.splitlines()[-1] == f"stopped by SIGTERM, all saved; go on with --resume {folder}"
    assert checkpoint.read(folder / checkpoint.LAST).info["position"]["epoch"] >= 0


@pytest.fixture
def half(tmp_path, monkeypatch):
    """Folder of a run stopped in its second epoch."""
    monkeypatch.setattr(TrainStep, "__call__", TrainStep.__call__)
    _at_call(TrainStep, "__call__", 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        train(small(tmp_path / "half", **NOISY), quiet=True)
    monkeypatch.undo()
    return tmp_path / "half"


@pytest.mark.parametrize(
    "changes", [{"workers": 2}, {"checkpoint_every": 0, "device": "cpu"}], ids=["workers", "saves"]
)
def test_what_does_not_matter_may_change(half, untouched, changes):
    train(TrainConfig(resume=str(half), **changes), quiet=True)
    _assert_as_untouched(half, untouched)


def test_the_same_command_goes_on_with_resume_auto(half, untouched, capsys):
    assert main(["train", *flags(small(half, **NOISY)), "--resume", "auto"]) == 0
    assert f"continuing {half} at epoch 2, step 2 of {STEPS}" in capsys.readouterr().out
    _assert_as_untouched(half, untouched)


def test_resume_auto_begins_where_there_is_nothing(tmp_path, untouched):
    train(small(tmp_path / "new", **NOISY, resume="auto"), quiet=True)
    _assert_as_untouched(tmp_path / "new", untouched)


def test_resume_auto_begins_again_where_there_is_no_checkpoint_yet(tmp_path, untouched):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.yaml").write_text("killed while writ", encoding="utf-8")
    train(small(tmp_path / "new", **NOISY, resume="auto"), quiet=True)
    _assert_as_untouched(tmp_path / "new", untouched)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": 0.01}, ["lr 0.1, got 0.01"]),
        ({"epochs": 9}, ["epochs 3, got 9", "start a new one"]),
        ({"arch": ["tiny"]}, ["arch ['tiny', 'tiny'], got ['tiny']"]),
        ({"seed": 4}, ["seed 0, got 4"]),
        ({"options": {"temperature": 2.0}}, ["options", "got {'temperature': 2.0}"]),
        ({"data": "digits"}, ["data synthetic, got digits"]),
        ({"out": "elsewhere"}, ["--out is elsewhere"]),
        ({"workers": -1}, ["--workers: expected 0 or above, got -1"]),
        ({"device": "meta"}, ["--device meta", "cuda:N"]),
        ({"out": "o" * 300}, ["--resume", "--out is ooo"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_matters_may_not_change(half, changes, words):
    before = {file.name: file.read_bytes() for file in half.iterdir()}
    with pytest.raises(ConfigError) as error:
        train(TrainConfig(resume=str(half), **changes), quiet=True)
    assert all(word in str(error.value) for word in words)
    assert {file.name: file.read_bytes() for file in half.iterdir()} == before


def test_the_last_step_of_an_epoch_is_saved_before_its_test(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "score_split", lambda *arguments, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(small(tmp_path / "run"), quiet=True)
    position = checkpoint.read(tmp_path / "run" / checkpoint.LAST).info["position"]
    assert (position["epoch"], position["step"]) == (0, STEPS)


DAMAGE = {
    "no utf-8": b"\xff\xfe\n",
    "no object": b"3\n",
    "no record": b'{"kind": "epoch"}\n',
    "no numbers": b'{"kind": "epoch", "epoch": null, "step": "x"}\n',
    "no json": b"{{{\n",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_log_blocks_no_resume_and_loses_no_other_line(half, untouched, damage):
    log = half / "metrics.jsonl"
    log.write_bytes(damage + log.read_bytes())
    train(TrainConfig(resume=str(half)), quiet=True)
    _assert_as_untouched(half, untouched)


def test_other_data_under_the_same_name_is_noticed(half, monkeypatch):
    from fflfast.training import run as run_module

    open_bundle = run_module.open_bundle

    def fewer(config):
        data = open_bundle(config)
        data.train.images, data.train.targets = data.train.images[:-1], data.train.targets[:-1]
        return data

    monkeypatch.setattr(run_module, "open_bundle", fewer)
    with pytest.raises(ConfigError, match=r"not what the run began with .*train_images"):
        train(TrainConfig(resume=str(half)), quiet=True)


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_taken(half, untouched, capsys):
    last = half / checkpoint.LAST
    last.write_bytes(last.read_bytes()[:-1000])
    train(TrainConfig(resume=str(half)))
    assert f"warning: {last} is damaged" in capsys.readouterr().out
    assert (half / "last.damaged").exists()
    _assert_as_untouched(half, untouched)


def test_a_finished_run_says_so(untouched, capsys):
    before = tensors(untouched)
    assert main(["train", "--resume", str(untouched)]) == 0
    assert f"{untouched} is finished: 3 epochs" in capsys.readouterr().out
    assert_same(tensors(untouched), before)


def test_an_interrupted_baseline_goes_on(tmp_path, monkeypatch):
    expected = tmp_path / "expected"
    run(expected, baseline=True)
    monkeypatch.setattr(TrainStep, "__call__", TrainStep.__call__)
    _at_call(TrainStep, "__call__", 3 * STEPS + 8, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        train(small(tmp_path / "run", baseline=True), quiet=True)
    monkeypatch.undo()
    result = train(TrainConfig(resume=str(tmp_path / "run")), quiet=True)
    assert result.baseline.keys() == {"tiny"}
    assert_same(tensors(tmp_path / "run" / "baseline-tiny"), tensors(expected / "baseline-tiny"))
    assert (tmp_path / "run" / "summary.json").exists()


def test_channels_last_goes_on_bit_for_bit(tmp_path, monkeypatch):
    """Optimizer state must come back in the memory order of its parameter, which a fused optimizer relies on."""
    options = {"channels_last": True, "amp": "bf16"}
    expected = run(tmp_path / "expected", **options)
    monkeypatch.setattr(TrainStep, "__call__", TrainStep.__call__)
    _at_call(TrainStep, "__call__", 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        train(small(tmp_path / "run", **options), quiet=True)
    monkeypatch.undo()
    train(TrainConfig(resume=str(tmp_path / "run")), quiet=True)
    assert_same(tensors(tmp_path / "run"), expected)
