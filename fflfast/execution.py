"""Execution plans: the sub-networks of a training step one after the other, on streams, or the step as a CUDA graph.

A plan supplies the cohort's runner and runs the body of a step; it re-implements no forward. In deterministic mode
every plan gives the bits of `Serial`. docs/execution.md says which one pays when, and how memory is kept alive.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from .cohort import Cohort, Learner, serial
from .streams import ForkJoin, Runner, streams_of

__all__ = ["PLANS", "Graph", "Plan", "Serial", "Snapshot", "Streams", "create", "offered", "refusal"]

PLANS = ("serial", "streams", "graph")
"""The names of the plans, the simplest first."""

Body = Callable[[Any], Any]
Changing = Callable[[], Sequence[Tensor]]


class Snapshot:
    """The values of tensors and the states of the CPU's and the device's generator, to be put back exactly.

    Args:
        changing: returns every tensor that may change; they are copied now.
        device: whose generator is kept besides the CPU's.
    """

    def __init__(self, changing: Changing, device: torch.device) -> None:
        self._changing = changing
        self._device = device
        self._tensors = list(changing())
        self._values = [tensor.detach().clone() for tensor in self._tensors]
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back, in place."""
        if self._tensors:
            torch._foreach_copy_(self._tensors, self._values)
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)

    def check(self) -> None:
        """RuntimeError if tensors were made or replaced since, which `restore` cannot undo."""
        known = {id(tensor) for tensor in self._tensors}
        made = [tuple(tensor.shape) for tensor in self._changing() if id(tensor) not in known]
        if made:
            raise RuntimeError(
                f"a step made or replaced {len(made)} of the tensors that it changes (the first of shape {made[0]}); "
                "they must exist before the first step and change in place, because a captured graph knows addresses"
            )


class Plan:
    """How training steps run. While a plan is in use, ``learner.cohort.runner`` is its runner.

    Args:
        learner: not wrapped (under DDP the module inside).
        device: where the learner and the inputs are.
        processes: how many train together.

    Attributes:
        name: one of `PLANS`.
        warmup_steps: how often the body runs, without a trace, before the first step.
    """

    name = "serial"
    warmup_steps = 0

    def __init__(self, learner: Learner, device: torch.device | str, *, processes: int = 1) -> None:
        self.learner = learner
        self.device = torch.device(device)
        self.processes = processes
        self._found = getattr(learner.cohort.runner, "found", learner.cohort.runner)
        self._runner = self._make_runner()
        learner.cohort.runner = self._runner

    def _make_runner(self) -> Runner:
        return serial

    def construction(self) -> AbstractContextManager:
        """Return the context in which `DistributedDataParallel` must be built for this plan."""
        return nullcontext()

    def __call__(self, body: Body, inputs: Any, *, capture: bool, changing: Changing) -> Any:
        """Run one step: ``body(inputs)``.

        Args:
            body: takes inputs, returns any tree of tensors; changes tensors in place only.
            inputs: a tree of tensors on the device (nested tuples, a NamedTuple such as `Batch`).
            capture: whether this step is like most others (a full batch), so that a graph may be captured for it.
            changing: returns every tensor that the body changes in place: parameters, buffers, optimizer state,
                scaler, averages, sums of metrics, counters.

        Returns:
            What the body returned, detached; under `Graph` valid until the next call.
        """
        return _detached(body(inputs))

    def close(self) -> None:
        """Give the cohort's runner back, and all memory."""
        if self.learner.cohort.runner is self._runner:
            self.learner.cohort.runner = self._found


class Serial(Plan):
    """One sub-network after the other."""


class _Forking(Plan):
    def __init__(self, learner: Learner, device: torch.device | str, *, processes: int = 1) -> None:
        _check_buffers(learner.cohort)
        self._streams = streams_of(torch.device(device))
        super().__init__(learner, device, processes=processes)
        if processes > 1 and self.device.type == "cuda":
            # DDP fixes the stream on which gradients are accumulated, sub-networks compute them on theirs; autograd
            # orders the two, and warns unless it is told that this is meant.
            torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)

    def _make_runner(self) -> ForkJoin:
        self._forks = ForkJoin(self._streams, self._found)
        return self._forks


class Streams(_Forking):
    """Sub-networks on side streams, forked behind the trunk and joined before fusion and loss.

    On a device without streams the sub-networks run one after the other.

    Raises:
        ValueError: sub-networks share a buffer, which two streams would change at once.
    """

    name = "streams"

    def __call__(self, body: Body, inputs: Any, *, capture: bool, changing: Changing) -> Any:
        """Run one step, see `Plan.__call__`; ``capture`` and ``changing`` do not matter."""
        with self._forks.step():
            return _detached(body(inputs))


class Graph(_Forking):
    """The whole step as one CUDA graph, with the streams of `Streams` forked inside; captured once, then replayed.

    The first step with ``capture`` warms up on a side stream, puts everything back as it was, and captures. What the
    graph cannot take (other shapes, a short batch) runs eagerly and serially. On a device without graphs, body runs on
    the same static buffers after the same warm-up.

    Raises:
        RuntimeError: in the first step, if the step cannot be captured.
        ValueError: see `Streams`.
    """

    name = "graph"
    warmup_steps = 3

    def __init__(self, learner: Learner, device: torch.device | str, *, processes: int = 1) -> None:
        super().__init__(learner, device, processes=processes)
        self._recorded: _Recorded | None = None
        if processes > 1:
            self.warmup_steps = 11  # DDP measures itself in its first ten iterations

    def construction(self) -> AbstractContextManager:
        """Return the context in which `DistributedDataParallel` must be built: the stream of the capture.

        Raises:
            RuntimeError: on CUDA, several processes whose NCCL watches for errors, which breaks captures.
        """
        if self.processes == 1 or self.device.type != "cuda":
            return nullcontext()
        if os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING") != "0":
            raise RuntimeError(
                "plan graph with several processes needs TORCH_NCCL_ASYNC_ERROR_HANDLING=0 in the environment before "
                "the process group is initialised; use --plan streams or serial otherwise"
            )
        return self._streams.aside()

    def __call__(self, body: Body, inputs: Any, *, capture: bool, changing: Changing) -> Any:
        """Run one step, see `Plan.__call__`."""
        if capture and self._recorded is None:
            self._recorded = self._record(body, inputs, changing)
        if capture and self._recorded is not None and self._recorded.take(body, inputs):
            return self._recorded.replay()
        return _detached(body(inputs))

    def _record(self, body: Body, inputs: Any, changing: Changing) -> _Recorded:
        recorded = _Recorded(body, inputs)
        errors: list[Exception] = []

        def step() -> Any:
            try:
                with self._forks.step():
                    return _detached(body(recorded.inputs))
            except Exception as error:  # ending a capture that it broke raises another error
                errors.append(error)
                raise

        before = Snapshot(changing, self.device)
        try:
            with self._streams.aside():
                for _ in range(self.warmup_steps - 1):
                    step()
                # What waits for the device is found here, where it can be named and breaks nothing.
                with self._streams.refuse_waiting():
                    step()
            self._drop_gradients()  # so that the capture takes them from the graph's own memory
            recorded.replay = self._streams.record(step)
        except Exception as error:
            cause = errors[0] if errors else error
            raise RuntimeError(
                f"plan graph: this step cannot be captured ({_described(cause)}); a captured step must not wait for "
                "the device (.item(), .cpu(), a printed tensor …); use --plan streams or --plan serial"
            ) from cause
        finally:
            self._drop_gradients()
            before.restore()
        before.check()
        return recorded

    def _drop_gradients(self) -> None:
        for parameter in self.learner.parameters():
            parameter.grad = None

    def close(self) -> None:
        """Give the cohort's runner back, and all memory."""
        super().close()
        if self._recorded is not None:
            self._streams.finish()  # the last replay must be over before its graph goes
        self._recorded = None


class _Recorded:
    """A step with inputs of its own, and what repeats it."""

    replay: Callable[[], Any]

    def __init__(self, body: Body, inputs: Any) -> None:
        leaves, self._structure = tree_flatten(inputs)
        self.body = body
        self._signature = [_signature(leaf) for leaf in leaves]
        self._leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.inputs = tree_unflatten(self._leaves, self._structure)

    def take(self, body: Body, inputs: Any) -> bool:
        """Take over the inputs of a step if it is the one that was recorded, on inputs of the same kind."""
        leaves, structure = tree_flatten(inputs)
        if body != self.body or structure != self._structure or [_signature(x) for x in leaves] != self._signature:
            return False
        for own, given in zip(self._leaves, leaves, strict=True):
            if isinstance(own, Tensor):
                own.copy_(given, non_blocking=True)
        return True


def _signature(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


def _detached(result: Any) -> Any:
    """Detach a step's result: a graph that outlives its step keeps gradient nodes on the stream they were made on."""
    return tree_map_only(Tensor, Tensor.detach, result)


def _described(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f", at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), 'no message')}{where}"


def _check_buffers(cohort: Cohort) -> None:
    seen: dict[int, int] = {}
    for k, network in enumerate(cohort.sub_networks):
        for name, buffer in network.named_buffers():
            if seen.setdefault(id(buffer), k) != k:
                raise ValueError(
                    f"sub-networks {seen[id(buffer)]} and {k} share the buffer {name!r}, which two streams would "
                    "change at once; use --plan serial"
                )


def _plan_class(name: str) -> type[Plan]:
    for kind in (Serial, Streams, Graph):
        if kind.name == name:
            return kind
    raise ValueError(f"plan must be one of {', '.join(PLANS)}, got {name!r}")


def refusal(name: str, device: torch.device | str, *, processes: int = 1, backend: str | None = None) -> str | None:
    """Return why a plan cannot run, None if it can.

    Args:
        name: one of `PLANS`.
        device: of the training.
        processes: how many train together.
        backend: of ``torch.distributed``, as in ``init_process_group``.

    Raises:
        ValueError: no such plan.
    """
    kind = torch.device(device).type
    if _plan_class(name) is Serial:
        return None
    if kind not in ("cpu", "cuda"):
        return f"a device of type {kind} has no CUDA streams and graphs"
    if name == "graph" and processes > 1 and (kind != "cuda" or "nccl" not in (backend or "")):
        return (
            f"several processes can be captured with NCCL on CUDA only, these use {backend or 'no backend'} on {kind}"
        )
    return None


def offered(
    device: torch.device | str, *, processes: int = 1, backend: str | None = None
) -> tuple[tuple[str, str | None], ...]:
    """Return each plan's name, and why a choice by measurement leaves it out (None: it takes part)."""
    on_host = torch.device(device).type == "cpu"
    reasons = {
        name: refusal(name, device, processes=processes, backend=backend)
        or ("a CPU has no streams: runs as serial" if on_host and name != "serial" else None)
        for name in PLANS
    }
    return tuple(reasons.items())


def create(name: str, learner: Learner, device: torch.device | str, *, processes: int = 1) -> Plan:
    """Return the plan of a name, in use from now on.

    Raises:
        ValueError: no such plan, or see `Streams`.
    """
    return _plan_class(name)(learner, device, processes=processes)
