"""How it is measured: times of whole calls through autograd, in turns.

Gradients are fresh: those of the call before are dropped inside the timed region, because giving memory back and
touching new pages is part of what a training step pays. Variants take turns, so that a slow moment of the machine falls
on all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fflfast.streams import streams_of

from .calls import Call, context

__all__ = [
    "Data",
    "DeviceClock",
    "Times",
    "engine_only",
    "gradients",
    "host_clock",
    "measure_graph",
    "measure_host",
    "measure_times",
    "once",
    "one_pass",
    "trained",
]


class Data(Protocol):
    """One set of inputs."""

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What a variant is called with."""

    @property
    def leaves(self) -> Sequence[Tensor]:
        """Tensors that get gradients, beside a variant's own parameters; where none does, one that shows the device."""

    @property
    def grad(self) -> Tensor | None:
        """What the backward starts from; None for a scalar."""


@dataclass(frozen=True)
class Times:
    """Seconds of one call."""

    median: float
    least: float
    p20: float
    p80: float
    repetitions: int

    @staticmethod
    def of(samples: list[float]) -> Times:
        ordered = sorted(samples)
        at = lambda share: ordered[round(share * (len(ordered) - 1))]  # noqa: E731
        return Times(statistics.median(ordered), ordered[0], at(0.2), at(0.8), len(ordered))


# ---- one call -------------------------------------------------------------------------------------------------


def trained(call: Call, data: Data) -> list[Tensor]:
    """What gets gradients: leaves of the data, then the parameters of a variant that is a module."""
    parameters: Iterable[Tensor] = call.parameters() if isinstance(call, torch.nn.Module) else ()
    return [*data.leaves, *parameters]


def once(call: Call, data: Data) -> tuple[Tensor, list[Tensor]]:
    """Result of one call and the gradients, as `trained` orders them."""
    leaves = trained(call, data)
    _drop(leaves)
    value = call(*data.arguments)
    value.backward(data.grad)
    found = []
    for leaf in leaves:
        assert leaf.grad is not None
        found.append(leaf.grad)
    _drop(leaves)
    return value.detach(), found


def one_pass(mode: str, call: Call, data: Data) -> object:
    """One call in a mode; returns what has to stay alive until its memory is counted."""
    if "backward" in mode:
        return once(call, data)
    with torch.no_grad():
        return call(*data.arguments)


def gradients(call: Call, data: Data) -> tuple[Tensor, ...]:
    """The gradients of one call, past the leaves' own; its result alone where nothing gets any."""
    leaves = trained(call, data)
    if not any(leaf.requires_grad for leaf in leaves):
        with torch.no_grad():
            return (call(*data.arguments),)
    return torch.autograd.grad(call(*data.arguments), leaves, data.grad)


def _drop(leaves: Sequence[Tensor]) -> None:
    for leaf in leaves:
        leaf.grad = None


def _timed(mode: str, call: Call, data: Data, clock: Callable[[Callable[[], object]], float]) -> float:
    """Seconds of one call in a mode; the forward of mode backward stays outside the clock."""
    if "backward" not in mode:
        return clock(lambda: one_pass(mode, call, data))
    leaves = trained(call, data)

    def step() -> None:
        _drop(leaves)
        call(*data.arguments).backward(data.grad)

    if mode == "forward+backward":
        return clock(step)
    value = call(*data.arguments)

    def backward() -> None:
        _drop(leaves)
        value.backward(data.grad)

    return clock(backward)


# ---- time -----------------------------------------------------------------------------------------------------


def host_clock(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class DeviceClock:
    """GPU time between two events. The stream is kept busy first, so that no gap of the host's making is counted."""

    def __init__(self, host_seconds: float) -> None:
        # A little more than the host needs to enqueue the call, in cycles of some 2 GHz.
        self._cycles = int(min(max(4e9 * host_seconds, 2e5), 2e8))

    def __call__(self, call: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(self._cycles)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def measure_times(
    calls: Mapping[str, Call], sets: Sequence[Data], mode: str, *, budget: float, least: int = 5
) -> dict[str, Times]:
    """Times of each variant in turns of some milliseconds, within a budget of seconds for all together.

    A turn begins with a call that is not timed: the gradients that the first timed one drops are then its own.
    `sets` are equal inputs at different addresses; calls go round them, so that a GPU's L2 cache holds none.
    """
    on_gpu = sets[0].leaves[0].is_cuda
    clocks: dict[str, Callable[[Callable[[], object]], float]] = {}
    turns: dict[str, int] = {}
    cost = 0.0
    for name, call in calls.items():
        with context(call):
            for _ in range(2):
                _timed(mode, call, sets[0], host_clock)
            clocks[name] = host_clock
            if on_gpu:
                torch.cuda.synchronize()
                clocks[name] = DeviceClock(min(_timed(mode, call, sets[0], host_clock) for _ in range(3)))
            # A call's own cost with what surrounds it, the forward of mode backward for one.
            each = host_clock(lambda call=call, name=name: _timed(mode, call, sets[0], clocks[name]))  # type: ignore[misc]
        turns[name] = max(1, min(100, round(5e-3 / each)))
        cost += (turns[name] + 1) * each
    rounds = max(least, min(200, int(budget / cost)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for round_ in range(rounds):
        for name in order[round_ % len(order) :] + order[: round_ % len(order)]:
            call, clock, n = calls[name], clocks[name], turns[name]
            with context(call):
                _timed(mode, call, sets[round_ % len(sets)], clock)
                total = sum(_timed(mode, call, sets[(round_ * n + k) % len(sets)], clock) for k in range(n))
            samples[name].append(total / n)
    for call in calls.values():
        for data in sets:
            _drop(trained(call, data))
    return {name: Times.of(found) for name, found in samples.items()}


def measure_graph(call: Call, sets: Sequence[Data], *, replays: int = 50) -> Times | None:
    """GPU time of a call, with its backward if any, in a CUDA graph of one a set; None where it cannot be captured."""

    def run() -> list[tuple[Tensor, ...]]:
        return [gradients(call, data) for data in sets]

    streams = streams_of(sets[0].leaves[0].device)
    try:
        with context(call):
            with streams.aside():
                run()
            replay = streams.record(run)
    except Exception as error:  # a refused capture is a result too: a synchronising peer has no time in a graph
        print(f"  not capturable: {str(error).splitlines()[0][:120]}")
        return None
    clock = DeviceClock(1e-4)
    samples = [clock(replay) / len(sets) for _ in range(replays)]
    return Times.of(samples[replays // 5 :])


def measure_host(call: Call, data: Data, *, calls: int = 200, rounds: int = 9) -> Times:
    """Host time to enqueue a call on a GPU, with its backward, if any, and autograd's engine."""

    def many() -> None:
        for _ in range(calls):
            gradients(call, data)

    samples = []
    with context(call):
        gradients(call, data)
        for _ in range(rounds):
            torch.cuda.synchronize()
            samples.append(host_clock(many) / calls)
    return Times.of(samples)


class _Nothing(torch.autograd.Function):
    """What autograd itself costs: as many inputs and gradients, no work."""

    @staticmethod
    def forward(ctx, value, gradients, *leaves):  # type: ignore[no-untyped-def]
        ctx.gradients = gradients
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return (None, None, *ctx.gradients)


def engine_only(data: Data) -> Call:
    """A variant that does nothing, to subtract autograd's engine from host times."""
    value = torch.zeros((), device=data.leaves[0].device) if data.grad is None else torch.zeros_like(data.grad)
    nothing = [torch.zeros_like(leaf) for leaf in data.leaves]
    return lambda *arguments: _Nothing.apply(value, nothing, *data.leaves)
