"""Runs of two processes on two GPUs, by torchrun and NCCL; what a CPU can show is in test_torchrun.py."""

from __future__ import annotations

import json
import os
import time

import pytest
import torch
from test_torchrun import TESTS, TORCHRUN, assert_equal_to_rounding, records
from training_runs import assert_same, start, tensors

from fflfast.training import checkpoint

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

RUNS = str(TESTS / "distributed_runs.py")


def run(folder, launcher, *arguments, **changes):
    """Start a run and wait for it: exit code, stderr and seconds."""
    started = time.monotonic()
    changes = json.dumps({"device": "cuda", "deterministic": True, **changes})
    process = start(*launcher, RUNS, *arguments, changes, cwd=folder)
    _, err = process.communicate(timeout=300)
    return process.returncode, err, time.monotonic() - started


@pytest.mark.parametrize("plan", ["serial", "streams", "graph"])
def test_two_gpus_compute_what_one_does(tmp_path, plan):
    for launcher in ((), TORCHRUN):
        code, err, _ = run(tmp_path, launcher, "frozen", "plain", plan=plan)
        assert code == 0, err
    assert_equal_to_rounding(tmp_path, "plain")


def test_every_plan_computes_the_same_on_two_gpus(tmp_path):
    for plan in ("serial", "streams", "graph"):
        code, err, _ = run(tmp_path, TORCHRUN, "whole", plan, plan=plan)
        assert code == 0, err
    for plan in ("streams", "graph"):
        assert_same(tensors(tmp_path / plan), tensors(tmp_path / "serial"))
        assert records(tmp_path / plan) == records(tmp_path / "serial")


@pytest.mark.parametrize("plan", ["serial", "graph"])
def test_a_process_that_waits_in_nccl_ends_when_the_other_is_killed(tmp_path, plan):
    code, err, seconds = run(tmp_path, TORCHRUN, "killed", "run", plan=plan)
    assert code != 0
    assert seconds < 120  # starting CUDA and NCCL included
    assert f"process 1 of 2 on {os.uname().nodename}" in err
    assert "the last checkpoint is run/last.safetensors" in err
    checkpoint.load_latest(tmp_path / "run")
