"""What differs between the processes of a run: the buffers of its norms and the states of its random generators.

DistributedDataParallel keeps parameters equal. The running statistics of a sub-network's norms see the images of one
process alone; they are averaged before a test, or after each step on request. Between two averages a checkpoint holds
those of every process beside their average, so that the same number of processes goes on bit for bit, and any other
number, a test and an export take the average. What a method says to be ``replicated`` is the same everywhere already
and may be large, such as a memory of all images: it is left out of this.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .checkpoint import Snapshot, under
from .processes import Processes

__all__ = ["average_buffers", "gather_state", "own_buffers", "own_state"]


def own_buffers(learner: nn.Module) -> dict[str, Tensor]:
    """Return the buffers in which processes may differ, by name: all but those that the method keeps equal itself."""
    equal = {f"method.{name}" for name in getattr(getattr(learner, "method", None), "replicated", ())}
    return {name: buffer for name, buffer in learner.named_buffers() if name not in equal}


@torch.no_grad()
def average_buffers(learner: nn.Module, processes: Processes) -> None:
    """Replace each of a learner's `own_buffers` by its mean over the processes, or its maximum if it is of integers.

    In place, with one all-reduce for each of the two kinds and no host synchronisation. Every process calls it, and
    all have the same bits afterwards. The mean is taken in float64, so that float32 buffers that are equal already
    (those of a synchronised norm, or of one in eval mode) stay as they are.
    """
    if processes.count == 1:
        return
    own = own_buffers(learner).values()
    floating = [buffer for buffer in own if buffer.is_floating_point()]
    integers = [buffer for buffer in own if not buffer.is_floating_point()]
    if floating:
        means = [buffer.double() for buffer in floating]
        processes.sum_(means)
        torch._foreach_div_(means, processes.count)
        torch._foreach_copy_(floating, means)
    if integers:
        flat = torch.cat([buffer.reshape(-1).long() for buffer in integers])
        processes.max_(flat)
        parts = flat.split([buffer.numel() for buffer in integers])
        torch._foreach_copy_(integers, [part.view(b.shape) for part, b in zip(parts, integers, strict=True)])


def gather_state(tensors: Mapping[str, Tensor], random: Snapshot, processes: Processes) -> Snapshot | None:
    """Return what a checkpoint holds because the run has several processes; None on all but process 0.

    Every process calls it; it waits for the device.

    Args:
        tensors: what may differ between processes, by its name in the checkpoint.
        random: the generators of this process, as `checkpoint.get_random_state` returns them.

    Returns:
        Tensors: of each name that does differ, ``NAME``, the mean over the processes (the maximum, of integers), and
        ``processR/NAME``, that of process R; of all but process 0 ``processR/random/KEY``. Info: ``processes``, with
        the info of the generators of each. `own_state` takes it apart again.
    """
    own = {name: tensor.detach().cpu() for name, tensor in tensors.items()} if processes.count > 1 else {}
    gathered = processes.gather((own, random))
    if gathered is None:
        return None
    (first, _), *others = gathered
    merged: dict[str, Tensor] = {}
    for name, tensor in first.items():
        values = [tensor, *(theirs[name] for theirs, _ in others)]
        if not all(torch.equal(tensor, value) for value in values[1:]):
            merged |= {f"process{rank}/{name}": value for rank, value in enumerate(values)}
            stack = torch.stack(values)
            merged[name] = stack.double().mean(0).to(tensor.dtype) if stack.is_floating_point() else stack.amax(0)
    for rank, (_, generators) in enumerate(others, start=1):
        merged |= {f"process{rank}/random/{key}": state for key, state in generators.tensors.items()}
    return Snapshot(merged, {"processes": [generators.info for _, generators in gathered]})


def own_state(snapshot: Snapshot, processes: Processes) -> Snapshot:
    """Return a checkpoint as this process restores it, without what belongs to the others.

    As many processes as saved it each get their own tensors back. Of another number all get the means; the generators
    of a process that was not there then are left out: no tensors ``random/KEY``, and info ``random`` is None.
    """
    tensors, info = snapshot
    generators = info.get("processes", [info["random"]])
    own = under(tensors, f"process{processes.rank}/")
    if len(generators) != processes.count:
        own = {f"random/{key}": state for key, state in under(own, "random/").items()}
    shared = {name: tensor for name, tensor in tensors.items() if not _is_of_one(name)}
    mine = dict(info)
    mine.pop("processes", None)
    if processes.rank > 0:
        shared = {name: tensor for name, tensor in shared.items() if not name.startswith("random/")}
        mine["random"] = generators[processes.rank] if processes.rank < len(generators) else None
    return Snapshot({**shared, **own}, mine)


def _is_of_one(name: str) -> bool:
    head, _, rest = name.partition("/")
    return bool(rest) and head.startswith("process") and head.removeprefix("process").isdigit()
