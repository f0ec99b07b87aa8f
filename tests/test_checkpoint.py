"""Checkpoint files: what is written comes back, damage is seen, and no crash or full disk costs the old file."""

from __future__ import annotations

import errno
import os
import random

import numpy as np
import pytest
import safetensors.torch
import torch

from fflfast.training import checkpoint
from fflfast.training.checkpoint import CheckpointError, Snapshot

SNAPSHOT = Snapshot({"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2])}, {"x": 0.1, "names": ["é→"]})


def _folder(tmp_path, count=2):
    """Write ``count`` snapshots one after the other, numbered from 1."""
    for number in range(1, count + 1):
        snapshot = Snapshot(SNAPSHOT.tensors, {"number": number})
        checkpoint.write(tmp_path / checkpoint.LAST, snapshot, keep=tmp_path / checkpoint.PREVIOUS)
    return tmp_path


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(1.5, dtype=torch.bfloat16),
        torch.tensor([], dtype=torch.float16),
        torch.randn(3, 4, dtype=torch.float64).t(),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.zeros(1).expand(5),
        torch.tensor([True, False]),
        torch.tensor([-(2**63), 2**63 - 1]),
        torch.tensor([float("nan"), float("-inf"), -0.0]).view(torch.int32),
    ],
    ids=["scalar", "empty", "transposed", "channels-last", "expanded", "bool", "int64", "special-bits"],
)
def test_tensors_come_back_bit_for_bit(tmp_path, tensor):
    checkpoint.write(tmp_path / "c", Snapshot({"t": tensor}, {}))
    back = checkpoint.read(tmp_path / "c").tensors["t"]
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    assert torch.equal(back, tensor)


def test_info_and_shared_memory_come_back(tmp_path):
    tensor = torch.ones(4)
    checkpoint.write(tmp_path / "c", Snapshot({"t": tensor, "same": tensor, "part": tensor[1:3]}, SNAPSHOT.info))
    back = checkpoint.read(tmp_path / "c")
    assert back.info == SNAPSHOT.info
    assert back.tensors["part"].tolist() == [1, 1]


def test_the_file_is_plain_safetensors(tmp_path):
    checkpoint.write(tmp_path / "c", SNAPSHOT)
    assert torch.equal(safetensors.torch.load_file(tmp_path / "c")["a"], SNAPSHOT.tensors["a"])


def test_the_one_before_is_kept_and_no_temporary_file_stays(tmp_path):
    _folder(tmp_path, 3)
    assert sorted(os.listdir(tmp_path)) == [checkpoint.LAST, checkpoint.PREVIOUS]
    assert checkpoint.read(tmp_path / checkpoint.LAST).info["number"] == 3
    assert checkpoint.read(tmp_path / checkpoint.PREVIOUS).info["number"] == 2


@pytest.mark.parametrize("where", [0.0, 0.2, 0.6, 0.999], ids=["length", "header", "info", "tensors"])
def test_one_changed_bit_is_seen_and_the_previous_file_is_read(tmp_path, where):
    last = _folder(tmp_path) / checkpoint.LAST
    content = bytearray(last.read_bytes())
    content[int(where * len(content))] ^= 1
    last.write_bytes(content)
    snapshot, path, warnings = checkpoint.load_latest(tmp_path)
    assert snapshot.info["number"] == 1
    assert path.name == checkpoint.PREVIOUS
    assert len(warnings) == 1
    assert str(last) in warnings[0]


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.99])
def test_a_file_cut_short_is_seen(tmp_path, kept):
    last = _folder(tmp_path) / checkpoint.LAST
    content = last.read_bytes()
    last.write_bytes(content[: int(kept * len(content))])
    assert checkpoint.load_latest(tmp_path)[0].info["number"] == 1
    with pytest.raises(CheckpointError, match=f"{checkpoint.LAST} is damaged"):
        checkpoint.read(last)


def test_swapped_tensors_are_seen(tmp_path):
    """The checksum covers names, not bytes alone."""
    path = tmp_path / "c"
    checkpoint.write(path, Snapshot({"a": torch.zeros(2), "b": torch.ones(2)}, {}))
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    safetensors.torch.save_file({"a": torch.ones(2), "b": torch.zeros(2)}, path, metadata)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        checkpoint.read(path)


def test_no_checkpoint_at_all(tmp_path):
    with pytest.raises(CheckpointError, match=r"last\.safetensors does not exist"):
        checkpoint.load_latest(tmp_path)


def test_somebody_elses_file(tmp_path):
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match="no checkpoint of fflfast train"):
        checkpoint.read(tmp_path / "weights.safetensors")


def test_another_format_version_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    checkpoint.write(tmp_path / "c", SNAPSHOT)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="expected checkpoint format 1, got 99"):
        checkpoint.read(tmp_path / "c")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_files(tmp_path, monkeypatch, call):
    _folder(tmp_path)

    def refuse(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpoint.write(tmp_path / checkpoint.LAST, SNAPSHOT, keep=tmp_path / checkpoint.PREVIOUS)
    assert checkpoint.load_latest(tmp_path)[0].info["number"] == 2
    assert sorted(os.listdir(tmp_path)) == [checkpoint.LAST, checkpoint.PREVIOUS]


def test_not_a_number_in_the_info_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError):
        checkpoint.write(tmp_path / "c", Snapshot({}, {"loss": float("nan")}))
    assert not list(tmp_path.iterdir())


def test_random_generators_go_on_where_they_were(tmp_path):
    cpu = torch.device("cpu")

    def draw():
        return torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()

    draw()  # leaves half of a pair of normal numbers waiting in NumPy's and Python's generators
    state = checkpoint.get_random_state(cpu)
    checkpoint.write(tmp_path / "c", state)
    expected = [draw(), draw()]
    checkpoint.set_random_state(checkpoint.read(tmp_path / "c"), cpu)
    assert [draw(), draw()] == expected
