"""The processes of a run under torchrun: who is who, what they tell each other, and how they end together."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import socket
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ..data import DataError
from .checkpoint import CheckpointError
from .config import ConfigError
from .errors import ProcessLost, TrainingError, tell_elsewhere
from .heartbeat import Heartbeat, meet
from .signals import Stopped
from .torchrun import Place, choose_backend, connect, read_environment, survey

__all__ = ["SINGLE", "Processes", "start"]

Result = TypeVar("Result")

TIMEOUT = timedelta(hours=1)
"""How long a process waits for the others in one operation.

Longer than one process may download, compile, test or save while the others wait: a process that died is noticed by the
heartbeat long before.
"""

START = timedelta(minutes=5)
"""How long the processes wait for all to have started."""

_END_SECONDS = 10.0

_KINDS = {kind.__name__: kind for kind in (ConfigError, CheckpointError, DataError, TrainingError)}
"""Errors whose message is one line for the user, and which keep their type on every process."""

_COMMUNICATION = re.compile(r"gloo|nccl|(?P<broken>connection (closed|reset|refused)|broken pipe)", re.IGNORECASE)
"""What the messages of RuntimeErrors of a backend have; ``broken`` where a connection is."""


class Processes:
    """One process that trains alone; under torchrun `start` gives one that knows the others.

    Every process calls the same methods in the same order.

    Attributes:
        rank, count: number of this process and of all.
        local_rank: number among those of this machine.
        backend: of `torch.distributed`: "gloo", "cpu:gloo,cuda:nccl", or None for a single process.
        device_name: the device of this process, or None where the config alone decides.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    backend: str | None = None
    device_name: str | None = None

    @property
    def main(self) -> bool:
        """Whether this is process 0, who alone writes and prints."""
        return self.rank == 0

    def saved(self, checkpoint: Path) -> None:
        """Remember the last good checkpoint, for the message in case a process is lost."""

    def broadcast(self, value: Result) -> Result:
        """Return process 0's value, which must be picklable, on every process."""
        return value

    def gather(self, value: Result) -> list[Result] | None:
        """Return the values of all processes, which must be picklable, on process 0, and None on the others."""
        return [value]

    def survey(self, report: str, patience: timedelta = TIMEOUT) -> list[str] | None:
        """Return the reports of all processes, by rank; None where one did not come within ``patience``.

        No collective: whoever failed where the others still wait for it can say so, and go on after its patience.
        """
        return [report]

    def together(self, action: Callable[[], Result]) -> Result:
        """Run an action on every process and return its own result; where it raises on one, every process raises.

        The error of another process comes as the same type if it is an error for users (ConfigError, CheckpointError,
        DataError, TrainingError), else as TrainingError, and names the process. `is_told_elsewhere` holds for it on all
        but process 0. The action must not wait for another process where it may fail.
        """
        return action()

    def only_main(self, action: Callable[[], Result]) -> Result:
        """Run an action on process 0 while the others wait; its result (picklable) or its error reaches all."""
        return action()

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their sums over all processes, in place, the same bits everywhere.

        One all-reduce for all tensors of a dtype and device; no host synchronisation on CUDA.
        """

    def max_(self, tensor: Tensor) -> None:
        """Replace a tensor by its largest values over all processes, in place; no host synchronisation on CUDA."""

    def agree(self, signum: int | None) -> int | None:
        """Tell a signal number, or None, and return the largest that any process told in the call before, or None.

        The answer is one call old, so that no process waits for the slowest in each step, yet all get the same answer
        after the same step. A single process gets its own at once.
        """
        return signum

    def settle(self) -> int | None:
        """Wait for what the last `agree` asked, if it is not answered yet, and return that answer."""
        return None

    def barrier(self) -> None:
        """Wait until all processes are here."""

    def wrap(self, learner: nn.Module) -> nn.Module:
        """Return the module whose forward and backward make all processes take the mean of their gradients.

        Buffers are left to each process (see `buffers`). Build it in the context that the execution plan asks for.
        """
        return learner

    def guarded(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the errors of a broken connection, raised anywhere, become ProcessLost.

        Other errors pass. The methods of this class do this by themselves.
        """
        return contextlib.nullcontext()


SINGLE = Processes()
"""The process of a run without torchrun."""


@contextlib.contextmanager
def start(device_name: str, *, plan: str) -> Iterator[Processes]:
    """Join the processes that torchrun started, or give `SINGLE` where there is only one.

    While entered, each process watches the others; one that is lost ends all of them within 30 seconds, whatever
    they wait for. At the end the processes part, also after an error, and none waits for ever.

    Args:
        device_name: auto, cpu or cuda; each process takes the GPU of its local rank.
        plan: name of the execution plan, or "auto": a graph of a step with NCCL in it needs a setting of NCCL.

    Raises:
        ConfigError: a part of torchrun's environment is missing or wrong, or this device is not for several processes.
        ProcessLost: not all processes started.
    """
    place = read_environment()
    if place is None:
        yield SINGLE
        return
    try:
        backend, device = choose_backend(device_name, place)
    except ConfigError as error:
        if place.rank:
            tell_elsewhere(error)
        raise
    if "nccl" in backend:
        torch.cuda.set_device(device)
        if plan in ("graph", "auto"):
            # PyTorch's recipe for DDP in a graph: its watchdog thread would ask for events during the capture.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    processes = _Several(place, backend, device)
    try:
        yield processes
    except BaseException as error:
        processes.end(error)
        raise
    processes.end(None)


class _Several(Processes):
    """One of several processes."""

    def __init__(self, place: Place, backend: str, device_name: str) -> None:
        self.rank, self.count, self.local_rank = place.rank, place.count, place.local_rank
        self.backend, self.device_name = backend, device_name
        self._checkpoint: Path | None = None
        self._pending: tuple[dist.Work, Tensor] | None = None
        self._keeps_store = self.main and not place.by_torchrun
        stores = connect(place, ("heartbeat", "group", "survey"), START)
        self._place, self._store, self._surveys = place, stores[2], 0
        hosts = meet(stores[0], self.rank, self.count, socket.gethostname(), START)
        keeper = f"torchrun on {place.address}" if place.by_torchrun else f"process 0 of {self.count} on {hosts[0]}"
        self._heartbeat = Heartbeat(stores[0], self.rank, hosts, remedy=self._remedy, keeper=keeper)
        self._heartbeat.start()
        try:
            with self.guarded():
                dist.init_process_group(
                    backend, timeout=TIMEOUT, store=stores[1], rank=self.rank, world_size=self.count
                )
        except BaseException as error:
            self.end(error)
            raise

    def _remedy(self) -> str:
        if self._checkpoint is None:
            return "nothing is saved yet; start the run again"
        again = f"start all processes again with --resume {self._checkpoint.parent}"
        return f"the last checkpoint is {self._checkpoint}; {again}"

    def saved(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint

    def broadcast(self, value: Result) -> Result:
        box = [value if self.main else None]
        with self.guarded():
            dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[return-value]

    def survey(self, report: str, patience: timedelta = TIMEOUT) -> list[str] | None:
        self._surveys += 1
        return survey(self._store, str(self._surveys), self._place, report, patience)

    def gather(self, value: Result) -> list[Result] | None:
        values: list[Any] | None = [None] * self.count if self.main else None
        with self.guarded():
            dist.gather_object(value, values)
        return values

    def together(self, action: Callable[[], Result]) -> Result:
        own: Exception | None = None
        report: tuple[str, str] | None = None
        try:
            result = action()
        except ProcessLost:
            raise
        except Exception as error:
            own, report = error, self._report(error)
        reports: list[tuple[str, str] | None] = [None] * self.count
        with self.guarded():
            dist.all_gather_object(reports, report)
        first = next((r for r in reports if r is not None), None)
        if first is not None:
            self._raise(own, first)
        return result

    def only_main(self, action: Callable[[], Result]) -> Result:
        own: Exception | None = None
        outcome: tuple[Any, tuple[str, str] | None] = (None, None)
        if self.main:
            try:
                outcome = (action(), None)
            except ProcessLost:
                raise
            except Exception as error:
                own, outcome = error, (None, self._report(error))
        result, report = self.broadcast(outcome)
        if report is not None:
            self._raise(own, report)
        return result

    def _report(self, error: Exception) -> tuple[str, str]:
        """Return kind and message of an error for the other processes."""
        kind = next((name for name, known in _KINDS.items() if isinstance(error, known)), None)
        text = str(error) if kind else f"{type(error).__name__}: {error}"
        return kind or TrainingError.__name__, f"{self._heartbeat.name(self.rank)}: {text}"

    def _raise(self, own: Exception | None, report: tuple[str, str]) -> None:
        error = own or _KINDS[report[0]](report[1])
        if not self.main:
            tell_elsewhere(error)
        raise error

    @torch.no_grad()
    def sum_(self, tensors: Iterable[Tensor]) -> None:
        groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for group in groups.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            with self.guarded():
                dist.all_reduce(flat)
            for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
                tensor.copy_(part.view(tensor.shape))

    @torch.no_grad()
    def max_(self, tensor: Tensor) -> None:
        with self.guarded():
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)

    def agree(self, signum: int | None) -> int | None:
        before = self.settle()
        told = torch.tensor(signum or 0)
        with self.guarded():
            self._pending = dist.all_reduce(told, op=dist.ReduceOp.MAX, async_op=True), told
        return before

    def settle(self) -> int | None:
        if self._pending is None:
            return None
        (work, told), self._pending = self._pending, None
        with self.guarded():
            work.wait()
        return int(told) or None

    def barrier(self) -> None:
        with self.guarded():
            dist.all_reduce(torch.zeros(1))  # not dist.barrier, which may take the device

    def wrap(self, learner: nn.Module) -> nn.Module:
        # A 1 × 1 convolution in channels-last order has two ways to name the same strides; DDP copies, and warns.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
        with self.guarded(), warnings.catch_warnings():
            # What newer versions of PyTorch offer instead still gives process 0's buffers to all when it is built.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return nn.parallel.DistributedDataParallel(learner, broadcast_buffers=False, gradient_as_bucket_view=True)

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        try:
            yield
        except TrainingError:
            raise
        except RuntimeError as error:
            text = " ".join(str(error).split())
            network = isinstance(error, dist.DistNetworkError)
            if not (network or isinstance(error, dist.DistError) or _COMMUNICATION.search(text)):
                raise
            self._heartbeat.spare()
            reason = self._heartbeat.culprit()
            if reason is None:
                if not (network or any(match["broken"] for match in _COMMUNICATION.finditer(text))):
                    raise  # all are well, and so is the network: say, NCCL has no memory left
                reason = f"the connection to another process broke ({text[:200]})"
            raise ProcessLost(reason, self._remedy()) from error

    def end(self, error: BaseException | None) -> None:
        """Leave the group. ``error`` is why, None for a normal end; a signal to stop has reached all, too."""
        together = error is None or isinstance(error, Stopped)
        if self._pending is not None and together:
            with contextlib.suppress(RuntimeError):
                self._pending[0].wait(timedelta(seconds=_END_SECONDS))
        self._pending = None
        same = self._heartbeat.leave(None if together else error, together=together, keeps_store=self._keeps_store)
        if same and error is not None:
            tell_elsewhere(error)
        if not dist.is_initialized():
            return
        # A backend may wait for its peers to the last: NCCL does for kernels that are under way.
        last_resort = threading.Timer(_END_SECONDS, os._exit, (1,))
        last_resort.daemon = True
        last_resort.start()
        try:
            dist.destroy_process_group()
            gc.collect()  # what is in a cycle with a wrapped learner keeps threads that must end before the interpreter
        finally:
            last_resort.cancel()
