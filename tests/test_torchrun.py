"""Runs of two processes: the same numbers as one process, and no run is lost, whichever process ends when and how."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from distributed_runs import FROZEN, GOOD, KILLED, NOISY, SPOILED, STOPPED, WRONG
from training_runs import assert_same, flags, small, start, tensors

from fflfast.training import checkpoint, evaluate

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs fork, SIGKILL and gloo")

TESTS = Path(__file__).parent
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder with every run of distributed_runs.drive."""
    folder = tmp_path_factory.mktemp("runs")
    process = start("-c", "import distributed_runs; distributed_runs.drive()", cwd=folder)
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    return folder


@pytest.fixture(autouse=True)
def _one_thread():
    """Compute with as many threads as the runs did."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ends(runs, name, phase=1):
    return json.loads((runs / f"ends-{phase}.json").read_text(encoding="utf-8"))[name]


def said(runs, name, kind="err"):
    """What the two processes wrote; older versions of gloo greet on stdout."""
    texts = [(runs / f"{name}-{rank}.{kind}").read_text(encoding="utf-8") for rank in range(2)]
    return ["".join(line for line in text.splitlines(True) if not line.startswith("[Gloo] ")) for text in texts]


def records(folder):
    """metrics.jsonl without what depends on the clock."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in ("seconds", "images_per_second")} for x in lines]


def order(runs, name, count):
    """The images of each step, those of all processes one after the other."""
    files = [(runs / f"{name}-order-{rank}.jsonl").read_text(encoding="utf-8") for rank in range(count)]
    steps = zip(*([json.loads(line) for line in text.splitlines()] for text in files), strict=True)
    return [[parts[0][0], [image for _, images in parts for image in images]] for parts in steps]


def assert_as_untouched(folder, runs):
    for name in ("last.safetensors", "best.safetensors"):
        assert_same(tensors(folder, name), tensors(runs / "untouched", name))
    assert records(folder) == records(runs / "untouched")


def assert_equal_to_rounding(runs, name):
    """Losses, weights and momentum of NAME-1 and NAME-2 to rounding; accuracies exactly."""
    one, two = (tensors(runs / f"{name}-{count}") for count in (1, 2))
    assert all(key.startswith("process1/random/") for key in two if key not in one)
    for key in one:
        if not key.startswith("random/"):
            a, b = one[key].double(), two[key].double()
            assert (a - b).abs().max() <= 3e-4 * a.abs().max() + 1e-6, key
    for a, b in zip(records(runs / f"{name}-1"), records(runs / f"{name}-2"), strict=True):
        exact = [key for key in a if "accuracy" in key or key == "kind"]
        assert {key: a.pop(key) for key in exact} == {key: b.pop(key) for key in exact}
        assert b == pytest.approx(a, rel=3e-4, abs=1e-6)


@pytest.mark.parametrize("name", FROZEN)
def test_two_processes_compute_what_one_does(runs, name):
    """Also where the last batch has 3 images, which are all of process 0."""
    assert ends(runs, f"{name}-2")["codes"] == [0, 0], said(runs, f"{name}-2")
    assert_equal_to_rounding(runs, name)


def test_two_processes_see_the_images_in_the_order_of_one(runs):
    whole = order(runs, "single", 1)
    assert len(whole) == 10
    assert order(runs, "untouched", 2) == whole


def test_process_0_alone_writes(runs):
    assert ends(runs, "untouched")["codes"] == [0, 0]
    assert {p.name for p in (runs / "untouched").iterdir()} == {p.name for p in (runs / "single").iterdir()}
    out = said(runs, "untouched", "out")
    assert "on 2 processes" in out[0]
    assert out[1] == ""
    assert said(runs, "untouched") == ["", ""]
    summary = json.loads((runs / "untouched" / "summary.json").read_text(encoding="utf-8"))
    assert [score["total"] for score in summary["scores"].values()] == [60] * 4


@pytest.mark.parametrize("name", GOOD)
def test_all_processes_end_with_the_same_weights(runs, name):
    assert ends(runs, name)["codes"] == [0, 0], said(runs, name)
    learners = [torch.load(runs / f"{name}-weights-{rank}.pt") for rank in range(2)]
    if name == "averaged":  # then the means of the statistics are in the averaged weights alone
        learners = [{key: w for key, w in weights.items() if "running_" not in key} for weights in learners]
    assert_same(*learners)


def test_the_networks_alone_are_trained_by_all_processes_too(runs):
    summary = json.loads((runs / "baseline" / "summary.json").read_text(encoding="utf-8"))
    assert summary["baseline"]["tiny"]["total"] == 60
    assert tensors(runs / "baseline" / "baseline-tiny")


@pytest.mark.parametrize("name", ["untouched", "averaged"])
@pytest.mark.parametrize("weights", ["last", "best"])
def test_a_checkpoint_scores_what_the_run_said(runs, name, weights):
    """What two processes tested, each with its share, is what the file holds: the mean of their statistics."""
    epochs = [record for record in records(runs / name) if record["kind"] == "epoch"]
    scores = evaluate(runs / name, weights=weights, device="cpu")
    main = "test_accuracy/fused"
    record = epochs[-1] if weights == "last" else max(epochs, key=lambda epoch: epoch[main])
    assert {f"test_accuracy/{k}": score.value for k, score in scores.items()} == {
        key: value for key, value in record.items() if key.startswith("test_")
    }


def test_between_two_tests_each_process_has_statistics_of_its_own(runs):
    saved = tensors(runs / "stopped-in-training")
    own = [name for name in saved if name.startswith("process1/learner/")]
    assert own
    assert all("running_" in name for name in own)
    assert not any("fusion" in name for name in own)  # synchronised: the same on both
    for name in own:
        mine, other = saved[name.replace("process1", "process0")], saved[name]
        assert torch.equal(saved[name.removeprefix("process1/")], (mine.double() + other.double()).div(2).float())
    assert evaluate(runs / "stopped-in-training", device="cpu")


def test_statistics_that_are_synchronised_in_each_step_never_differ(runs):
    """The checkpoint before the last is that of the last step, before the test."""
    own = {
        name: [key for key in tensors(runs / name, checkpoint.PREVIOUS) if key.startswith("process1/learner/")]
        for name in ("untouched", "synchronised")
    }
    assert own["untouched"]
    assert own["synchronised"] == []


def test_a_step_that_is_bad_on_one_process_is_skipped_by_all(runs):
    skipped = [record["skipped_steps"] for record in records(runs / "skip") if record["kind"] == "train"]
    assert skipped == [1, 1]
    rollbacks = [record for record in records(runs / "rollback") if record["kind"] == "rollback"]
    assert len(rollbacks) == 1


@pytest.mark.parametrize("how", KILLED)
def test_when_one_process_is_killed_the_others_end_and_the_run_goes_on(runs, how):
    name = f"killed-{how}"
    dead = 0 if how.startswith("main") else 1
    end, text = ends(runs, name), said(runs, name)[1 - dead]
    assert end["codes"][dead] == -signal.SIGKILL
    assert end["codes"][1 - dead] == 1
    assert end["seconds"][1 - dead] < 30
    line = next(line for line in text.splitlines() if line.startswith("fflfast: error: "))
    assert line.startswith(f"fflfast: error: process {dead} of 2 on {os.uname().nodename}")
    assert line.endswith(
        f" lost; the last checkpoint is {name}/last.safetensors; start all processes again with --resume {name}"
    )
    assert "Traceback" not in text
    checkpoint.load_latest(runs / name)
    assert ends(runs, f"again-{name}", 2)["codes"] == [0, 0], said(runs, f"again-{name}")
    assert_as_untouched(runs / f"again-{name}", runs)


@pytest.mark.parametrize("how", STOPPED)
def test_a_signal_to_one_process_saves_and_stops_all_and_the_run_goes_on_bit_for_bit(runs, how):
    name = f"stopped-{how}"
    code = STOPPED[how][0]
    assert ends(runs, name)["codes"] == [code, code], said(runs, name)
    assert said(runs, name) == ["", ""]
    out = said(runs, name, "out")
    stopped = f"stopped by {signal.Signals(code - 128).name}, all saved; go on with --resume {name}"
    assert out[0].splitlines()[-1] == stopped
    assert out[1] == ""
    assert ends(runs, f"again-{name}", 2)["codes"] == [0, 0], said(runs, f"again-{name}")
    assert_as_untouched(runs / f"again-{name}", runs)


def test_another_number_of_processes_goes_on_with_the_same_images(runs):
    whole = order(runs, "single", 1)
    first, then = order(runs, "stopped-in-training", 2), order(runs, "fewer", 1)
    assert len(first) == 8  # all know of a signal one step after the one in which it came
    assert first + then == whole
    assert ends(runs, "more", 2)["codes"] == [0, 0], said(runs, "more")
    first, then = order(runs, "stopped-single", 1), order(runs, "more", 2)
    assert len(first) == 7
    assert first + then == whole
    for name in ("fewer", "stopped-single"):
        last = records(runs / name)[-1]
        assert (last["kind"], last["epoch"], last["step"]) == ("epoch", 1, 10)


@pytest.mark.parametrize("name", SPOILED)
def test_an_error_of_one_process_ends_all_and_is_told_once(runs, name):
    end, texts = ends(runs, name), said(runs, name)
    assert end["codes"] == [1, 1]
    assert max(end["seconds"]) < 10
    told = [line for text in texts for line in text.splitlines() if line.startswith("fflfast: error: ")]
    if name == "disk":
        assert told == [line for line in texts[0].splitlines() if "cannot write disk/" in line]
    elif name == "raise":
        assert told == [line for line in texts[0].splitlines() if "the loss is not finite" in line]
    else:  # one process alone: it says so itself, and the other why it ends
        assert "process 1 of 2" in texts[0]
        assert "failed with OSError: [Errno 28] No space left on device; the last checkpoint is alone/" in texts[0]
        assert "No space left on device" in texts[1]
        assert len(told) == 2
    assert len(told) == (2 if name == "alone" else 1)
    if name != "raise":
        assert ends(runs, f"again-{name}", 2)["codes"] == [0, 0], said(runs, f"again-{name}")
        assert_as_untouched(runs / f"again-{name}", runs)


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_start_is_told_once_and_writes_nothing(runs, name):
    assert ends(runs, f"wrong-{name}")["codes"] == [2, 2], said(runs, f"wrong-{name}")
    text, other = said(runs, f"wrong-{name}")
    assert text.startswith(f"fflfast: error: --{name}")
    assert text.count("\n") == 1
    assert other == ""
    assert not (runs / f"wrong-{name}").exists()


def test_a_graph_under_gloo_is_refused_with_the_reason(runs):
    assert "NCCL" in said(runs, "wrong-plan")[0]


def test_under_torchrun_a_killed_run_tells_why_and_goes_on(runs, tmp_path):
    process = start(*TORCHRUN, str(TESTS / "distributed_runs.py"), "killed", "run", "{}", cwd=tmp_path)
    started = time.monotonic()
    out, err = process.communicate(timeout=90)
    assert process.returncode != 0
    assert time.monotonic() - started < 45
    told = [line for line in err.splitlines() if "fflfast: error: " in line]
    assert len(told) == 1, out + err
    assert f"process 1 of 2 on {os.uname().nodename} is lost; the last checkpoint is run/last.safetensors; " in told[0]
    checkpoint.load_latest(tmp_path / "run")
    command = ("train", *flags(small(Path("run"), **NOISY)), "--resume", "auto")
    process = start(*TORCHRUN, "-m", "fflfast", *command, cwd=tmp_path)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    assert out.count("continuing run at epoch 2") == 1
    assert_as_untouched(tmp_path / "run", runs)


def test_under_torchrun_sigterm_saves_and_stops(tmp_path):
    folder = tmp_path / "run"
    command = ("train", *flags(small(folder, epochs=2000, device="cpu")))
    process = start(*TORCHRUN, "-m", "fflfast", *command, cwd=tmp_path)
    try:
        log, until = folder / "metrics.jsonl", time.monotonic() + 60
        while not (log.exists() and log.stat().st_size) and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert out.splitlines()[-1] == f"stopped by SIGTERM, all saved; go on with --resume {folder}", err
    assert "fflfast: error" not in err
    assert checkpoint.read(folder / checkpoint.LAST).info["position"]["epoch"] >= 0
