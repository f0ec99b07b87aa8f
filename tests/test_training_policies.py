"""What a run does about steps that are not finite, with averaged weights, plans and where its data lies."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from training_runs import SMALL, STEPS, assert_same, run, small, tensors

from fflfast.methods import FFL
from fflfast.training import ConfigError, Stopped, TrainConfig, TrainingError, checkpoint, evaluate, train
from fflfast.training.files import alone_in, replace_text
from fflfast.training.loop import Trainer
from fflfast.training.step import TrainStep


class Poisoned(FFL):
    """FFL whose loss is not a number at the steps of ``poisoned``, counted over the process."""

    poisoned: frozenset[int] = frozenset()
    taken = 0

    def joint_logits(self, output, batch):
        logits = super().joint_logits(output, batch)
        if self.training and torch.is_grad_enabled():  # not in the trial before a run
            type(self).taken += 1
            if self.taken - 1 in self.poisoned:
                logits[0] = logits[0] * torch.nan
        return logits


@pytest.fixture
def poison(monkeypatch):
    def at(*steps):
        monkeypatch.setattr(Poisoned, "poisoned", frozenset(steps))
        monkeypatch.setattr(Poisoned, "taken", 0)
        return {"method": "test_training_policies:Poisoned"}

    return at


def _records(folder, kind):
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def test_raise_stops_at_the_first_loss_that_is_not_finite(tmp_path, poison):
    with pytest.raises(TrainingError, match="by step 5 of epoch 1 the loss is not finite"):
        train(small(tmp_path / "run", **poison(2)), quiet=True)
    assert checkpoint.load_latest(tmp_path / "run")[0].info["position"]["step"] == 0


def test_skip_leaves_exactly_that_step_out(tmp_path, poison, monkeypatch, capsys):
    """The same run in which the step's inputs never reach the learner gives the same bits."""
    train(small(tmp_path / "run", nan="skip", **poison(2, 7)))
    assert "1 of the last 5 steps" in capsys.readouterr().out
    take_step = TrainStep.__call__

    def leave_out(self, inputs, *, epoch, step, **others):
        if (epoch, step) in ((0, 2), (1, 2)):
            self.state.step.add_(1)
            return None
        return take_step(self, inputs, epoch=epoch, step=step, **others)

    monkeypatch.setattr(TrainStep, "__call__", leave_out)
    run(tmp_path / "expected", nan="skip", **poison())
    assert_same(tensors(tmp_path / "run"), tensors(tmp_path / "expected"))
    skipped = [record["skipped_steps"] for record in _records(tmp_path / "run", "train")]
    assert skipped == [1, 1, 0]
    kept = [{k: v for k, v in r.items() if k not in ("seconds",)} for r in _records(tmp_path / "run", "epoch")]
    assert kept == [
        {k: v for k, v in r.items() if k not in ("seconds",)} for r in _records(tmp_path / "expected", "epoch")
    ]


def test_a_run_that_only_skips_ends(tmp_path, poison):
    with pytest.raises(TrainingError, match="the last 50 steps had to be skipped"):
        train(small(tmp_path / "run", nan="skip", epochs=20, **poison(*range(200))), quiet=True)


def test_rollback_takes_the_last_checkpoint_and_goes_on_with_other_images(tmp_path, poison, capsys):
    train(small(tmp_path / "run", nan="rollback", log_every=1, checkpoint_every=2, **poison(STEPS + 2)))
    out = capsys.readouterr().out
    assert "by step 3 of epoch 2 the loss is not finite" in out
    assert "back to the weights of epoch 2, step 2" in out
    (record,) = _records(tmp_path / "run", "rollback")
    assert (record["epoch"], record["step"], record["to_step"]) == (1, STEPS + 3, STEPS + 2)
    last = checkpoint.load_latest(tmp_path / "run")[0]
    assert last.info["position"]["epoch"] == SMALL["epochs"]
    assert all(bool(t.isfinite().all()) for t in last.tensors.values() if t.is_floating_point())


def test_rollback_gives_up_where_it_does_not_help(tmp_path, poison):
    with pytest.raises(TrainingError, match="after 3 returns to the last checkpoint"):
        train(small(tmp_path / "run", nan="rollback", log_every=1, **poison(*range(1, 100))), quiet=True)
    assert checkpoint.load_latest(tmp_path / "run")[0].tensors


def test_the_policy_changes_nothing_where_all_is_finite(tmp_path):
    expected = run(tmp_path / "raise")
    for nan in ("skip", "rollback"):
        assert_same(run(tmp_path / nan, nan=nan), expected)


@pytest.mark.parametrize("nan", ["skip", "rollback"])
def test_a_failed_run_goes_on_under_another_policy(tmp_path, poison, nan):
    with pytest.raises(TrainingError):
        train(small(tmp_path / "run", **poison(STEPS + 1)), quiet=True)
    result = train(TrainConfig(resume=str(tmp_path / "run"), nan=nan), quiet=True)
    assert result.scores["fused"].total == SMALL["limit_test"]


def test_averaged_weights_are_tested_saved_and_go_on(tmp_path, monkeypatch):
    expected = run(tmp_path / "expected", ema=0.9)
    assert any(name.startswith("average/") for name in expected)
    take_step = TrainStep.__call__
    calls = iter(range(10**6))

    def stop_at_seven(self, *arguments, **options):
        if next(calls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(self, *arguments, **options)

    monkeypatch.setattr(TrainStep, "__call__", stop_at_seven)
    with pytest.raises(Stopped):
        train(small(tmp_path / "run", ema=0.9), quiet=True)
    monkeypatch.undo()
    result = train(TrainConfig(resume=str(tmp_path / "run")), quiet=True)
    assert_same(tensors(tmp_path / "run"), expected)
    assert evaluate(tmp_path / "run") == result.scores
    plain = run(tmp_path / "plain")
    weights = {name for name in plain if name.startswith("learner/")}
    assert_same({k: expected[k] for k in weights}, {k: plain[k] for k in weights})  # the average only looks on
    assert not all(torch.equal(expected[k.replace("learner/", "average/")], expected[k]) for k in weights)


@pytest.mark.parametrize("plan", ["serial", "streams", "graph"])
def test_every_plan_trains_the_same_run(tmp_path, plan):
    expected = run(tmp_path / "auto", method="training_runs:Noisy", clip_norm=1.0)
    assert_same(run(tmp_path / plan, plan=plan, method="training_runs:Noisy", clip_norm=1.0), expected)
    assert checkpoint.read(tmp_path / plan / checkpoint.LAST).info["plan"] == {"name": plan, "device": "cpu"}
    assert json.loads((tmp_path / "auto" / "plan.json").read_text(encoding="utf-8"))["plan"] == "serial"
    assert not (tmp_path / plan / "plan.json").exists()


@pytest.mark.parametrize("device", ["cpu", "cuda"], ids=["same-device", "other-device"])
def test_a_run_goes_on_by_the_plan_that_was_chosen_on_this_kind_of_device(tmp_path, monkeypatch, device):
    folder = tmp_path / "run"
    run(folder, epochs=2)
    stopped = checkpoint.read(folder / checkpoint.PREVIOUS)  # before the last test
    assert stopped.info["plan"] == {"name": "serial", "device": "cpu"}
    chosen = {**stopped.info, "plan": {"name": "streams", "device": device}}
    checkpoint.write(folder / checkpoint.LAST, checkpoint.Snapshot(stopped.tensors, chosen))
    train(TrainConfig(resume=str(folder)), quiet=True)
    plan = checkpoint.read(folder / checkpoint.LAST).info["plan"]
    assert plan == {"name": "streams" if device == "cpu" else "serial", "device": "cpu"}


def test_a_plan_may_be_given_on_resume(tmp_path):
    folder = tmp_path / "run"
    run(folder, epochs=2)
    (folder / checkpoint.PREVIOUS).replace(folder / checkpoint.LAST)
    train(TrainConfig(resume=str(folder), plan="graph"), quiet=True)
    assert checkpoint.read(folder / checkpoint.LAST).info["plan"]["name"] == "graph"


def test_where_the_data_lies_changes_no_bit(tmp_path):
    options = {"mixup": 0.2, "label_smoothing": 0.1}
    expected = run(tmp_path / "host", data_on="host", workers=2, **options)
    assert_same(run(tmp_path / "device", data_on="device", **options), expected)


def test_files_that_are_decoded_cannot_lie_on_a_device(tmp_path):
    from PIL import Image

    for part in ("train", "val"):
        for name in ("a", "b"):
            folder = tmp_path / "data" / part / name
            folder.mkdir(parents=True)
            for k in range(3):
                Image.new("RGB", (10, 10), (40 * k, 0, 0)).save(folder / f"{k}.png")
    options = {"data": "imagefolder", "data_dir": str(tmp_path / "data"), "pad": 0, "limit_train": None}
    with pytest.raises(ConfigError, match="--data-on device: imagefolder train is decoded"):
        train(small(tmp_path / "run", data_on="device", **options), quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"accumulate": 13}, "--accumulate: expected parts of at least 2 images of a batch of 24"),
        ({"accumulate": 0}, "--accumulate: expected at least 1"),
        ({"ema": 1.0}, "--ema: expected a number from 0 to below 1"),
        ({"clip_norm": -1.0}, "--clip-norm: expected a finite number, 0 or above"),
        ({"nan": "ignore"}, "--nan"),
        ({"plan": "fast"}, "--plan"),
        ({"sync_buffers": "never"}, "--sync-buffers"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(tmp_path, changes, words):
    with pytest.raises(ConfigError) as error:
        train(small(tmp_path / "run", **changes), quiet=True)
    assert words in str(error.value)
    assert not (tmp_path / "run").exists()


def test_accumulated_parts_and_clipping_train(tmp_path):
    got = run(tmp_path / "run", accumulate=3, clip_norm=0.5, ema=0.99, nan="skip")
    assert all(bool(t.isfinite().all()) for t in got.values() if t.is_floating_point())


def test_a_checkpoint_from_before_these_settings_goes_on(tmp_path):
    """Earlier versions saved fewer settings, no plan and no counts of steps."""
    expected = run(tmp_path / "expected")
    train(small(tmp_path / "run", epochs=3), quiet=True)
    file = tmp_path / "run" / checkpoint.LAST
    first = tmp_path / "run" / checkpoint.PREVIOUS
    snapshot = checkpoint.read(first)
    config = {k: v for k, v in snapshot.info["config"].items() if k not in (
        "plan", "data_on", "accumulate", "clip_norm", "ema", "nan", "sync_buffers")}  # fmt: skip
    losses = {k: v for k, v in snapshot.info["losses"].items() if k in ("sums", "images", "totals", "total_images")}
    info = {k: v for k, v in snapshot.info.items() if k != "plan"} | {"config": config, "losses": losses}
    checkpoint.write(file, checkpoint.Snapshot(snapshot.tensors, info))
    train(TrainConfig(resume=str(tmp_path / "run")), quiet=True)
    assert_same(tensors(tmp_path / "run"), expected)


def test_a_folder_takes_one_run_at_a_time(tmp_path):
    pytest.importorskip("fcntl")
    run(tmp_path / "run", epochs=1)
    with alone_in(tmp_path / "run"), pytest.raises(ConfigError, match="another process is training there"):
        train(TrainConfig(resume=str(tmp_path / "run")), quiet=True)
    train(TrainConfig(resume=str(tmp_path / "run")), quiet=True)


def test_the_same_run_may_start_again_where_it_died_before_its_first_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "save", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(small(tmp_path / "run"), quiet=True)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="not an empty folder"):
        train(small(tmp_path / "run", seed=5), quiet=True)
    train(small(tmp_path / "run"), quiet=True)


def test_a_text_file_is_replaced_whole(tmp_path, monkeypatch):
    file = tmp_path / "summary.json"
    replace_text(file, "old")
    monkeypatch.setattr(os, "fsync", lambda handle: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        replace_text(file, "new, cut sho")
    assert file.read_text(encoding="utf-8") == "old"
