"""Checkpoints: one safetensors file with its JSON part and a checksum inside, replaced atomically, never pickle."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

__all__ = [
    "BEST",
    "LAST",
    "PREVIOUS",
    "CheckpointError",
    "Snapshot",
    "get_random_state",
    "load_latest",
    "read",
    "set_random_state",
    "under",
    "write",
]

LAST, PREVIOUS, BEST = "last.safetensors", "previous.safetensors", "best.safetensors"
FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged or of another format; the message names the file and the remedy."""


class Snapshot(NamedTuple):
    """What one file holds: tensors by name and anything JSON can say."""

    tensors: dict[str, Tensor]
    info: dict[str, Any]


def write(path: Path, snapshot: Snapshot, *, keep: Path | None = None) -> None:
    """Write a snapshot so that a crash at any moment leaves the old file or the new one, whole; ``keep`` gets the old.

    The bytes go to a temporary file in the same folder, which is synced to disk and then renamed; then the folder is
    synced. Raises CheckpointError where the disk refuses, with the old file untouched.
    """
    info = json.dumps(snapshot.info, allow_nan=False)
    # A copy of each: the format refuses tensors that share memory, and the device may go on computing.
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in snapshot.tensors.items()}
    metadata = {"format": str(FORMAT), "info": info, "sha256": _digest(tensors, info)}
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(safetensors.torch.save(tensors, metadata))
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error}; free the disk, then go on with --resume") from error


def read(path: Path) -> Snapshot:
    """Read and verify a snapshot; CheckpointError where it is missing, cut short, altered or of another format."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; expected a checkpoint written by fflfast train") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged and cannot be read: {error}") from error
    if "sha256" not in metadata or "info" not in metadata:
        raise CheckpointError(f"{path} is no checkpoint of fflfast train: its header lacks the checksum")
    if metadata.get("format") != str(FORMAT):
        raise CheckpointError(
            f"{path}: expected checkpoint format {FORMAT}, got {metadata.get('format')}; "
            "read it with the fflfast version that wrote it"
        )
    if _digest(tensors, metadata["info"]) != metadata["sha256"]:
        raise CheckpointError(f"{path} is damaged: its content does not match its checksum")
    return Snapshot(tensors, json.loads(metadata["info"]))


def load_latest(folder: Path) -> tuple[Snapshot, Path, list[str]]:
    """Return the newest good snapshot of a run, its file, and one warning for each newer file that is not good."""
    warnings: list[str] = []
    for name in (LAST, PREVIOUS):
        try:
            return read(folder / name), folder / name, warnings
        except CheckpointError as error:
            warnings.append(str(error))
    raise CheckpointError("; ".join(warnings))


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def get_random_state(device: torch.device) -> Snapshot:
    """Return the state of the generators of Python, NumPy and torch (the CPU's and the device's)."""
    algorithm, keys, *position = np.random.get_state(legacy=True)
    tensors = {"numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)), "cpu": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    return Snapshot(tensors, {"python": random.getstate(), "numpy": [algorithm, *position]})


def set_random_state(snapshot: Snapshot, device: torch.device) -> None:
    """Put back what `get_random_state` returned."""
    version, internal, gauss = snapshot.info["python"]
    random.setstate((version, tuple(internal), gauss))
    algorithm, *position = snapshot.info["numpy"]
    np.random.set_state((algorithm, snapshot.tensors["numpy"].numpy().astype(np.uint32), *position))
    torch.set_rng_state(snapshot.tensors["cpu"])
    if device.type == "cuda" and "cuda" in snapshot.tensors:
        torch.cuda.set_rng_state(snapshot.tensors["cuda"], device)


def _digest(tensors: Mapping[str, Tensor], info: str) -> str:
    digest = hashlib.sha256(info.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return  # only there can a folder be opened and synced
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
