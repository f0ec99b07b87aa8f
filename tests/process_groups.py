"""What groups of two forked processes do for tests/test_processes.py, and how they are to end."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from forked import fork_all
from torch import distributed as dist
from torch import nn

from fflfast.data import DataError
from fflfast.training import ConfigError, checkpoint, heartbeat
from fflfast.training.buffers import average_buffers, gather_state, own_buffers, own_state
from fflfast.training.checkpoint import Snapshot
from fflfast.training.errors import ProcessLost, TrainingError, is_told_elsewhere
from fflfast.training.processes import SINGLE, Processes, start
from fflfast.training.signals import Stopped


def group():
    return start("cpu", plan="serial")


def raised(action):
    """The error of an action: its type, its text, and whether process 0 tells it."""
    try:
        action()
    except Exception as error:
        return type(error), str(error), is_told_elsewhere(error)
    return None


def fail_on(ranks, error, rank):
    def action():
        if rank in ranks:
            raise error
        return f"done by {rank}"

    return action


def talk():
    """Every method of Processes, twice over: a second group in the same process finds no traces of the first."""
    for _ in range(2):
        with group() as p:
            assert (p.count, p.backend, p.device_name, p.main) == (2, "gloo", "cpu", p.rank == 0)
            exchange(p)
            together(p)
            agree(p)
            buffers(p)
            gradients(p)
        assert not dist.is_initialized()
        assert not any("heartbeat" in thread.name for thread in threading.enumerate())


def exchange(p):
    assert p.broadcast({"of": p.rank}) == {"of": 0}
    assert p.gather((p.rank, None)) == ([(0, None), (1, None)] if p.main else None)
    a, b, c = torch.full((2, 3), 1.5 + p.rank), torch.tensor(p.rank), torch.full((), 0.25, dtype=torch.float64)
    strided = torch.full((4, 3), float(p.rank)).t()
    p.sum_([a, b, c, strided])
    assert torch.equal(a, torch.full((2, 3), 4.0))
    assert torch.equal(b, torch.tensor(1))
    assert c.item() == 0.5
    assert torch.equal(strided, torch.ones(3, 4))
    p.sum_([])
    most = torch.tensor([p.rank, 5 - p.rank])
    p.max_(most)
    assert most.tolist() == [1, 5]
    p.barrier()


def together(p):
    where = [f"process {rank} of 2 on {os.uname().nodename}: " for rank in range(2)]
    assert p.together(lambda: p.rank + 1) == p.rank + 1
    for kind in (ConfigError, checkpoint.CheckpointError, DataError, TrainingError):
        other = kind, where[1] + "no such folder", False
        own = kind, "no such folder", True
        assert raised(lambda k=kind: p.together(fail_on([1], k("no such folder"), p.rank))) == (
            own if p.rank else other
        )
    told = bool(p.rank)
    mine = TrainingError, f"{where[0]}ZeroDivisionError: by zero", True
    expected = mine if p.rank else (ZeroDivisionError, "by zero", False)
    assert raised(lambda: p.together(fail_on([0], ZeroDivisionError("by zero"), p.rank))) == expected
    both = [ValueError(f"of {p.rank}"), f"of {p.rank}"]
    assert raised(lambda: p.together(fail_on([0, 1], both[0], p.rank))) == (ValueError, both[1], told)
    # What only one process does.
    assert p.only_main(lambda: f"done by {p.rank}") == "done by 0"
    expected = (ConfigError, where[0] + "full", True) if p.rank else (ConfigError, "full", False)
    assert raised(lambda: p.only_main(fail_on([0], ConfigError("full"), p.rank))) == expected
    assert p.only_main(fail_on([1], ConfigError("full"), p.rank)) == "done by 0"
    # An error of this process alone stays what it is.
    with pytest.raises(RuntimeError, match=r"^size mismatch$"), p.guarded():
        raise RuntimeError("size mismatch")
    with pytest.raises(ConfigError, match="gloo"), p.guarded():
        raise ConfigError("gloo is not a fruit")


def agree(p):
    # Both learn of a signal in the call after the one that told it, whoever got it.
    told = [p.agree(signum) for signum in (None, 15 if p.rank else None, None, 2 if p.main else None, None)]
    assert told == [None, None, 15, None, 2]
    assert p.settle() is None
    assert p.agree(15 if p.rank else None) is None
    assert p.settle() == 15
    assert p.settle() is None


def buffers(p):
    torch.manual_seed(0)
    learner = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(2).double(), nn.BatchNorm1d(2))
    learner[2].eval()
    same = [buffer.clone() for buffer in learner[2].buffers()]
    rows = [torch.randn(4 + rank, 3) * (rank + 1) for rank in range(2)]
    for _ in range(p.rank + 1):
        learner[1](learner[0](rows[p.rank])[:, :2].double())
    mine = {f"learner/{name}": b.clone() for name, b in learner.named_buffers()}
    everyone = [None, None]
    dist.all_gather_object(everyone, mine)
    generator = checkpoint.get_random_state(torch.device("cpu"))
    torch.manual_seed(p.rank)
    random = checkpoint.get_random_state(torch.device("cpu"))
    extra = gather_state(mine, random, p)
    average_buffers(learner, p)
    now = {f"learner/{name}": b for name, b in learner.named_buffers()}
    for name, buffer in now.items():
        if "num_batches" in name:
            assert buffer == max(e[name] for e in everyone)
        else:
            mean = torch.stack([e[name].double() for e in everyone]).mean(0)
            assert torch.equal(buffer, mean.to(buffer.dtype))
    assert now["learner/0.num_batches_tracked"] == 2
    for buffer, before in zip(learner[2].buffers(), same, strict=True):
        assert torch.equal(buffer, before)
    memory = nn.Module()
    memory.method = nn.BatchNorm1d(2)
    memory.method.replicated = ("running_mean", "num_batches_tracked")
    memory.method.running_mean.fill_(p.rank)  # no method does this: it shows that nobody looks
    memory.method.running_var.fill_(p.rank)
    average_buffers(memory, p)
    assert own_buffers(memory).keys() == {"method.running_var"}
    assert memory.method.running_mean.tolist() == [p.rank] * 2
    assert memory.method.running_var.tolist() == [0.5] * 2
    assert (extra is None) == (p.rank == 1)
    snapshot = p.broadcast(extra)
    assert not any(name.startswith("learner/2") for name in snapshot.tensors)  # equal on both
    base = Snapshot({**mine, "random/cpu": random.tensors["cpu"]}, {"random": random.info, "position": 7})
    saved = Snapshot({**base.tensors, **snapshot.tensors}, {**base.info, **snapshot.info})
    saved = p.broadcast(saved)
    # The same number of processes: each has its own again.
    tensors, info = own_state(saved, p)
    assert tensors.keys() - {"random/numpy"} == base.tensors.keys()
    assert all(torch.equal(tensors[name], mine[name]) for name in mine)
    assert torch.equal(tensors["random/cpu"], random.tensors["cpu"])
    assert info == {"random": random.info, "position": 7}
    # Fewer, and more: the means, and generators only for those who had some.
    for place, known in ((SINGLE, 0), (Place(1, 3), 1), (Place(2, 3), None)):
        tensors, info = own_state(saved, place)
        assert all(torch.equal(tensors[name], now[name]) for name in now)
        assert tensors.keys() - {"random/numpy"} == (base.tensors.keys() if known is not None else now.keys())
        assert (info["random"] is None) == (known is None)
        if known is not None:
            torch.manual_seed(known)
            assert torch.equal(tensors["random/cpu"], torch.get_rng_state())
    checkpoint.set_random_state(generator, torch.device("cpu"))


class Place(Processes):
    """A process of another run."""

    def __init__(self, rank, count):
        self.rank, self.count = rank, count


def gradients(p):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    x, weight = torch.randn(8, 3), [0.25, 0.75]
    parallel = p.wrap(module)
    before = [b.clone() for b in module.buffers()]
    for _ in range(2):  # DDP arranges its buckets anew after the first
        module.zero_grad(set_to_none=True)
        module[1].eval()
        rows = slice(0, 2) if p.rank == 0 else slice(2, 8)
        (parallel(x[rows]).square().mean() * weight[p.rank] * p.count).backward()
    got = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    module(x).square().mean().backward()
    for mine, parameter in zip(got, module.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad)
    assert all(torch.equal(a, b) for a, b in zip(before, module.buffers(), strict=True))


def beating_fast(action):
    """An action within a group, whose heartbeat is ten times as fast."""

    def run():
        heartbeat.BEAT, heartbeat.GRACE = 0.1, 1.0
        with group() as p:
            p.saved(Path("runs/a/last.safetensors"))
            p.barrier()  # all have met: what follows does not happen while some still start
            try:
                action(p)
            except ProcessLost as error:
                print("fflfast: error:", error, file=sys.stderr)
                raise SystemExit(1) from error

    return run


def die(p, rank):
    if p.rank == rank:
        os.kill(os.getpid(), signal.SIGKILL)


def killed_in_collective(p):
    die(p, 1)
    p.barrier()


def killed_in_backward(p):
    module = p.wrap(nn.Linear(3, 4))
    out = module(torch.ones(2, 3)).sum()
    die(p, 1)
    with p.guarded():
        out.backward()


def killed_while_the_other_is_busy(p):
    die(p, 1)
    time.sleep(60)


def killed_who_keeps_the_store(p):
    die(p, 0)
    time.sleep(60)


def killed_while_a_signal_is_agreed_on(p):
    p.agree(None)
    die(p, 0)
    for _ in range(3):
        p.agree(15)
    raise AssertionError("agreed with the dead")


def failed_while_the_other_is_busy(p):
    if p.rank == 1:
        raise OSError("disk full")
    time.sleep(60)


def failed_with_nobody_waiting(p):
    if p.rank == 0:
        raise OSError("disk full")
    time.sleep(60)


def busy_for_long(p):
    """Longer than the silence that counts as lost: a compilation, say, that keeps the interpreter busy, or a save."""
    until = time.monotonic() + 2 * heartbeat.SILENCE * heartbeat.BEAT
    if p.main:
        while time.monotonic() < until:
            sorted(range(10_000), key=lambda x: -x)
    else:
        time.sleep(until - time.monotonic())
    p.barrier()


def stopped(p):
    while (signum := p.agree(signal.SIGTERM if p.rank else None)) is None:
        pass
    raise Stopped(signum)


def left_behind(p):
    """An error on one process while the other leaves normally."""
    if p.rank == 1:
        raise ConfigError("odd")


def lopsided(p):
    """One process takes part in an operation that the other has left out."""
    if p.main:
        p.barrier()


LOST = "process {0} of 2 on {1} is lost"
ENDS = {
    # name: (action, exit codes, the survivor, what it says, the most seconds that it takes)
    "collective": (killed_in_collective, [1, -9], 0, LOST.format(1, "{0}"), 15),
    "backward": (killed_in_backward, [1, -9], 0, LOST.format(1, "{0}"), 15),
    "busy": (killed_while_the_other_is_busy, [1, -9], 0, LOST.format(1, "{0}") + ": no sign of life for 2 s", 15),
    "store": (killed_who_keeps_the_store, [-9, 1], 1, "process 0 of 2 on {0}, which keeps the store of the", 15),
    "agree": (killed_while_a_signal_is_agreed_on, [-9, 1], 1, "process 0 of 2 on {0}", 15),
    "failed": (failed_while_the_other_is_busy, [1, 1], 0, "process 1 of 2 on {0} failed with OSError: disk full", 15),
    "failed-0": (failed_with_nobody_waiting, [1, 1], 1, "process 0 of 2 on {0} failed with OSError: disk full", 15),
    "lopsided": (lopsided, [1, 0], 0, "process 1 of 2 on {0} left the run before its end", 15),
}
OTHERS = {"busy-for-long": (busy_for_long, [0, 0]), "stopped": (stopped, [143, 143]), "left": (left_behind, [0, 1])}


def drive():
    actions = {name: beating_fast(action) for name, (action, *_) in {**ENDS, **OTHERS}.items()}
    fork_all({"talk": talk, **actions})
