"""The streams of a device, and a cohort's runner that forks its sub-networks onto them and joins them again."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, Protocol, TypeVar

import torch

from .cohort import serial

__all__ = ["POOL", "DeviceStreams", "ForkJoin", "streams_of"]

POOL = 4
"""Side streams of a device: few and long-lived, because each keeps a memory pool and a cuBLAS workspace of its own."""

Result = TypeVar("Result")
Runner = Callable[[Sequence[Callable[[], Any]]], list[Any]]


class DeviceStreams(Protocol):
    """What fork, join and capture need of a device."""

    def ambient(self) -> Any:
        """Return the stream that work goes to now."""

    def sides(self, count: int) -> Sequence[Any]:
        """Return the side streams that ``count`` thunks use, `POOL` at most, the same ones every time."""

    def wait(self, waiter: Any, waited: Any) -> None:
        """Let all that ``waiter`` gets from now on start after all that ``waited`` has got so far."""

    def on(self, stream: Any) -> AbstractContextManager:
        """Send work to ``stream`` while entered."""

    def aside(self) -> AbstractContextManager:
        """Send work to the stream of warm-up and capture while entered, in the order of the ambient stream."""

    def refuse_waiting(self) -> AbstractContextManager:
        """Raise where the host waits for the device while entered."""

    def record(self, step: Callable[[], Any]) -> Callable[[], Any]:
        """Return what repeats ``step`` and returns its result; whether ``step`` has run by then is open."""

    def finish(self) -> None:
        """Wait until all work is done."""


class HostStreams:
    """A device without streams: work is done in the order of the calls, which keeps every promise of streams."""

    def ambient(self) -> int:
        return -1

    def sides(self, count: int) -> Sequence[int]:
        return range(min(count, POOL))

    def wait(self, waiter: int, waited: int) -> None:
        return

    def on(self, stream: int) -> AbstractContextManager:
        return nullcontext()

    def aside(self) -> AbstractContextManager:
        return nullcontext()

    def refuse_waiting(self) -> AbstractContextManager:
        return nullcontext()

    def record(self, step: Callable[[], Any]) -> Callable[[], Any]:
        return step

    def finish(self) -> None:
        return


class CudaStreams:
    """The side streams and the capture stream of one CUDA device.

    DDP under a graph, warm-up and capture use one stream, because autograd accumulates a gradient on the stream on
    which its accumulator was made: one made elsewhere would pull a stream into the capture that is not part of it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._capture, *self._sides = (torch.cuda.Stream(device) for _ in range(1 + POOL))

    def ambient(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    def sides(self, count: int) -> Sequence[torch.cuda.Stream]:
        return self._sides[:count]

    def wait(self, waiter: torch.cuda.Stream, waited: torch.cuda.Stream) -> None:
        waiter.wait_stream(waited)

    def on(self, stream: torch.cuda.Stream) -> AbstractContextManager:
        return torch.cuda.stream(stream)

    @contextmanager
    def aside(self) -> Iterator[None]:
        ambient = self.ambient()
        self._capture.wait_stream(ambient)
        try:
            with torch.cuda.stream(self._capture):
                yield
        finally:
            ambient.wait_stream(self._capture)

    @contextmanager
    def refuse_waiting(self) -> Iterator[None]:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def record(self, step: Callable[[], Any]) -> Callable[[], Any]:
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        # What the collector would free in mid-capture (pinned memory, events, another graph) calls into the driver.
        gc.collect()
        collecting = gc.isenabled()
        gc.disable()
        try:
            # A capture that fails leaves its stream current; the outer context puts the ambient one back.
            # thread_local: what the threads of a loader do meanwhile is none of the capture's business.
            with (
                torch.cuda.stream(self._capture),
                torch.cuda.graph(graph, pool=pool, stream=self._capture, capture_error_mode="thread_local"),
            ):
                result = step()
        except Exception:
            self._recover(pool)
            raise
        finally:
            if collecting:
                gc.enable()

        def replay() -> Any:
            graph.replay()
            return result

        return replay

    def _recover(self, pool: Any) -> None:
        """Undo what a broken capture leaves behind in the process, which goes on with another plan.

        The allocator keeps believing in the capture and frees no block that two streams used; older versions of
        PyTorch also leave the generator's state in capture, where it refuses every draw, so it gets a fresh one.
        """
        with suppress(RuntimeError):  # it was ended properly
            torch._C._cuda_endAllocateToPool(self.device.index, pool)
        generator = torch.cuda.default_generators[self.device.index]
        generator.graphsafe_set_state(torch.Generator(self.device).graphsafe_get_state())

    def finish(self) -> None:
        torch.cuda.synchronize(self.device)


_cuda_streams: dict[int, CudaStreams] = {}


def streams_of(device: torch.device) -> DeviceStreams:
    """Return a device's streams: of a CUDA device the same ones in the whole process."""
    if device.type != "cuda":
        return HostStreams()
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _cuda_streams:
        _cuda_streams[index] = CudaStreams(torch.device("cuda", index))
    return _cuda_streams[index]


class ForkJoin:
    """A cohort's runner: thunk k on side stream k mod `POOL`, all joined into the ambient stream before it returns.

    The caching allocator gives a block out again as soon as the host lets go of it, to work of the stream that
    allocated it, and knows nothing of other streams that still use it. Two kinds of blocks cross streams here: what
    the thunks read (the trunk's output or the images, of the ambient stream's pool, read on side streams in forward
    and backward) and what they return (of a side stream's pool, read by fusion and loss on the ambient one). Both
    are held until the step is over and the ambient stream has waited for every side stream:

    - a block of the ambient pool then goes to later work of the ambient stream, which has waited for its readers;
    - a block of a side pool goes to later work of that side stream, which begins with the next fork, where the side
      stream waits for all that the ambient one has read.

    Gradients that cross streams in the backward pass are recorded on the reading stream by autograd itself, and those
    of parameters are let go at the end of a step, which is before a fork.

    Outside of a step it forks only without gradients: then nothing runs on a side stream behind the join, and nothing
    needs holding. With gradients nobody could say when their backward pass is over, so that thunks run serially.

    Args:
        streams: of the device.
        found: the runner that this one replaces.
    """

    def __init__(self, streams: DeviceStreams, found: Runner) -> None:
        self.found = found
        self._streams = streams
        self._held: list[Any] | None = None
        self._used = 0

    def __call__(self, thunks: Sequence[Callable[[], Result]]) -> list[Result]:
        """Run the thunks and return their results in order."""
        # Dynamo must never trace streams: where someone compiles a whole learner, it sees the serial runner.
        if torch.compiler.is_compiling() or len(thunks) < 2 or (self._held is None and torch.is_grad_enabled()):
            return serial(thunks)
        streams = self._streams
        ambient, sides = streams.ambient(), streams.sides(len(thunks))
        results: list[Result] = []
        if self._held is not None:
            self._held.append((list(thunks), results))  # a thunk holds its input
            self._used = max(self._used, len(sides))
        for side in sides:
            streams.wait(side, ambient)
        try:
            for k, thunk in enumerate(thunks):
                with streams.on(sides[k % len(sides)]):
                    results.append(thunk())
        finally:
            for side in sides:
                streams.wait(ambient, side)
        return list(results)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Hold what crosses streams until this is left; forks also where gradients are needed."""
        self._held, self._used = [], 0
        try:
            yield
        finally:
            ambient = self._streams.ambient()
            for side in self._streams.sides(self._used):
                self._streams.wait(ambient, side)
            self._held = None

    def __reduce__(self) -> tuple[Callable[[], Runner], tuple[()]]:
        return _serial_runner, ()  # a cohort that is copied or pickled runs serially


def _serial_runner() -> Runner:
    return serial
