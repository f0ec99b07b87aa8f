"""What torchrun tells a process: its place among the others, the device that is its own, and where all meet."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed as dist

from .config import ConfigError
from .errors import ProcessLost

__all__ = ["Place", "choose_backend", "connect", "read_environment"]

_servers: dict[tuple[str, int], dist.Store] = {}
"""Stores that this process keeps: to its very end, since another process may ask until its own."""

_groups = 0
"""How many times this process has met the others, so that each time has names of its own in a store."""


@dataclass(frozen=True)
class Place:
    """What torchrun tells a process."""

    rank: int
    count: int
    local_rank: int
    address: str
    port: int

    @property
    def by_torchrun(self) -> bool:
        """Whether torchrun itself keeps the store where the processes meet; else process 0 does."""
        return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def read_environment() -> Place | None:
    """Return this process's place, None where it is the only one."""
    environment = os.environ
    if environment.get("WORLD_SIZE", "") in ("", "1"):
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    remedy = "start the run with torchrun, or unset WORLD_SIZE for a single process"
    if missing := [name for name in names if not environment.get(name)]:
        raise ConfigError(
            f"WORLD_SIZE={environment['WORLD_SIZE']} asks for several processes, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set; {remedy}"
        )
    try:
        rank, count, local_rank, port = (int(environment[n]) for n in (*names[:3], names[4]))
    except ValueError:
        rank = count = local_rank = port = -1
    if not (0 <= rank < count and 0 <= local_rank < count and 0 < port < 1 << 16):
        given = ", ".join(f"{name}={environment[name]}" for name in names)
        raise ConfigError(f"expected RANK and LOCAL_RANK below WORLD_SIZE and a port number, got {given}; {remedy}")
    return Place(rank, count, local_rank, environment["MASTER_ADDR"], port)


def choose_backend(device_name: str, place: Place) -> tuple[str, str]:
    """Return the backend of `torch.distributed` and the device of this process."""
    if not dist.is_available() or not dist.is_gloo_available():
        raise ConfigError("this PyTorch was built without torch.distributed on gloo; start the run without torchrun")
    if dist.is_initialized():
        raise ConfigError("torch.distributed is initialised already; a run starts and ends it by itself")
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device_name == "auto" else device_name
    if kind == "cpu":
        return "gloo", "cpu"
    if kind != "cuda":
        raise ConfigError(
            f"--device {device_name}: under torchrun each process takes a GPU of its own, or all the CPU; "
            "take --device cuda or --device cpu"
        )
    gpus = torch.cuda.device_count()
    if place.local_rank >= gpus:
        raise ConfigError(
            f"--device {device_name}: this machine has {gpus} GPUs, too few for the process of LOCAL_RANK "
            f"{place.local_rank}; take --nproc-per-node {gpus or 1}, or --device cpu"
        )
    if not dist.is_nccl_available():
        raise ConfigError(f"--device {device_name}: this PyTorch was built without NCCL; take one process")
    return "cpu:gloo,cuda:nccl", f"cuda:{place.local_rank}"


def connect(place: Place, names: Sequence[str], patience: timedelta) -> list[dist.Store]:
    """Return stores that the processes share, one connection each, so that none waits for what another one does.

    Every process calls it equally often. Raises ProcessLost where no store answers within ``patience``.
    """
    global _groups
    _groups += 1
    address, port = place.address, place.port
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        if place.rank == 0 and not place.by_torchrun and (address, port) not in _servers:
            _servers[address, port] = dist.TCPStore(address, port, None, True, patience, wait_for_workers=False)
        return [
            dist.PrefixStore(f"fflfast/{attempt}/{_groups}/{name}", dist.TCPStore(address, port, None, False, patience))
            for name in names
        ]
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        who = f"process {place.rank} of {place.count}"
        raise ProcessLost(f"{who} does not reach the others at {address}:{port} ({reason})") from error


def survey(store: dist.Store, question: str, place: Place, report: str, patience: timedelta) -> list[str] | None:
    """Tell the others a report and return those of all, by rank; None where one did not come within ``patience``.

    Unlike a collective it ends while a process waits in an operation that this one never entered.
    """
    keys = [f"{question}/{rank}" for rank in range(place.count)]
    try:
        store.set(keys[place.rank], report)
        store.wait(keys, patience)
        return [answer.decode() for answer in store.multi_get(keys)]
    except RuntimeError:
        return None
