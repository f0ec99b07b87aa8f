"""Two processes on gloo: what they tell each other, and that none is left waiting when one fails or is killed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from process_groups import ENDS, OTHERS, Place, group
from torch import distributed as dist
from torch import nn
from training_runs import start as start_python

from fflfast.training import ConfigError, checkpoint, heartbeat, processes
from fflfast.training.buffers import average_buffers, gather_state, own_state
from fflfast.training.checkpoint import Snapshot
from fflfast.training.errors import ProcessLost, is_told_elsewhere
from fflfast.training.processes import SINGLE, Processes, start

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """Folder and record of all groups of two processes."""
    folder = tmp_path_factory.mktemp("ends")
    process = start_python("-c", "import process_groups; process_groups.drive()", cwd=folder)
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    return folder, json.loads((folder / "ends.json").read_text(encoding="utf-8"))


def errors(folder, name, rank):
    return (folder / f"{name}-{rank}.err").read_text(encoding="utf-8")


def test_what_processes_tell_each_other(ends):
    folder, record = ends
    assert record["talk"]["codes"] == [0, 0], "".join(errors(folder, "talk", rank) for rank in range(2))


@pytest.mark.parametrize("name", ENDS)
def test_no_process_waits_for_one_that_is_gone(ends, name):
    folder, record = ends
    _, codes, survivor, said, seconds = ENDS[name]
    text = errors(folder, name, survivor)
    assert record[name]["codes"] == codes, text
    assert record[name]["seconds"][survivor] < seconds
    line = next((line for line in text.splitlines() if line.startswith("fflfast: error: ")), text)
    assert said.format(os.uname().nodename) in line
    remedy = "the last checkpoint is runs/a/last.safetensors; start all processes again with --resume runs/a"
    assert line.endswith(remedy)
    assert text.count("fflfast: error: ") == 1


@pytest.mark.parametrize("name", OTHERS)
def test_processes_end_as_they_should(ends, name):
    folder, record = ends
    assert record[name]["codes"] == OTHERS[name][1], errors(folder, name, 0) + errors(folder, name, 1)
    assert record[name]["seconds"] < [5, 5]


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    def set_to(**changes):
        for name in TORCHRUN:
            monkeypatch.delenv(name, raising=False)
        for name, value in {**TORCHRUN, **changes}.items():
            if value is not None:
                monkeypatch.setenv(name, value)

    return set_to


@pytest.mark.parametrize("size", [None, "", "1"])
def test_one_process_is_single(environment, size):
    environment(WORLD_SIZE=size)
    with start("cpu", plan="auto") as p:
        assert p is SINGLE
    assert (p.rank, p.count, p.main, p.backend, p.device_name) == (0, 1, True, None, None)
    x = torch.ones(2)
    p.sum_([x])
    p.max_(x)
    p.barrier()
    p.saved(Path("x"))
    assert torch.equal(x, torch.ones(2))
    assert (p.broadcast(3), p.gather(3), p.together(lambda: 4), p.only_main(lambda: 5)) == (3, [3], 4, 5)
    assert (p.agree(None), p.agree(15), p.settle()) == (None, 15, None)
    module = nn.Linear(2, 2)
    assert p.wrap(module) is module
    with pytest.raises(RuntimeError, match="Connection closed by peer"), p.guarded():
        raise RuntimeError("Connection closed by peer")


def test_a_checkpoint_of_one_process_is_for_any_number():
    norm = nn.BatchNorm1d(2)
    random = checkpoint.get_random_state(torch.device("cpu"))
    tensors = {f"learner/{name}": b for name, b in norm.named_buffers()} | {"random/cpu": random.tensors["cpu"]}
    extra = gather_state(tensors, random, SINGLE)
    assert extra == Snapshot({}, {"processes": [random.info]})
    for info in ({"random": random.info}, {"random": random.info, **extra.info}):
        assert own_state(Snapshot(tensors, info), SINGLE) == Snapshot(tensors, {"random": random.info})
        mine, mine_info = own_state(Snapshot(tensors, info), Place(1, 2))
        assert mine.keys() == tensors.keys() - {"random/cpu"}
        assert mine_info == {"random": None}
    average_buffers(norm, SINGLE)


WRONG = {
    **{f"no {name}": {name: None} for name in TORCHRUN if name != "WORLD_SIZE"},
    "empty": {"MASTER_ADDR": ""},
    "words": {"WORLD_SIZE": "two"},
    "rank": {"RANK": "2"},
    "negative": {"RANK": "-1"},
    "local rank": {"LOCAL_RANK": "2"},
    "port": {"MASTER_PORT": "99999"},
}


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG)
def test_half_an_environment_is_an_error(environment, changes):
    environment(**changes)
    (name,) = changes
    with pytest.raises(ConfigError) as error, start("cpu", plan="serial"):
        pass
    assert name in str(error.value)
    assert "torchrun" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("device", "gpus", "words"),
    [
        ("cuda", 1, ["has 1 GPUs", "LOCAL_RANK 1", "--nproc-per-node 1"]),
        ("auto", 1, ["has 1 GPUs"]),
        ("cuda", 0, ["has 0 GPUs", "--device cpu"]),
        ("cuda:1", 2, ["--device cuda:1", "take --device cuda or"]),
        ("mps", 0, ["--device mps"]),
    ],
)
def test_a_device_that_is_not_for_several(environment, monkeypatch, device, gpus, words):
    environment()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ConfigError) as error, start(device, plan="serial"):
        pass
    assert all(word in str(error.value) for word in words)
    assert is_told_elsewhere(error.value)  # this is process 1


def test_each_process_takes_a_gpu_of_its_own(environment, monkeypatch):
    """On CUDA: the device of the local rank, both backends, and what a captured graph needs of NCCL."""
    environment()
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)

    class Group(Processes):
        def __init__(self, place, backend, device_name):
            taken.append((backend, device_name, os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING")))

        def end(self, error):
            taken.append(error)

    monkeypatch.setattr(processes, "_Several", Group)
    for plan, setting in (("serial", None), ("auto", "0")):
        with start("cuda", plan=plan):
            pass
        assert taken == ["cuda:1", ("cpu:gloo,cuda:nccl", "cuda:1", setting), None]
        taken.clear()
    problem = ValueError("x")
    with pytest.raises(ValueError, match="x"), start("auto", plan="graph"):
        raise problem
    assert taken[-1] is problem


def test_a_group_of_the_callers_own_is_refused(environment, tmp_path):
    environment()
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        with pytest.raises(ConfigError, match="initialised already"), start("cpu", plan="serial"):
            pass
    finally:
        dist.destroy_process_group()


def test_processes_that_do_not_find_each_other_say_so(environment, monkeypatch):
    monkeypatch.setattr(processes, "START", heartbeat.timedelta(seconds=1))
    environment(MASTER_PORT="1")
    with pytest.raises(ProcessLost, match=r"^process 1 of 2 does not reach the others at 127.0.0.1:1 "), group():
        pass
