"""How it is measured: times, launches, peak memory and errors against float64.

Times are of whole calls through autograd with fresh gradients: those of the call before are dropped inside the timed
region, because giving memory back and touching new pages is part of what a training step pays. Variants take turns, so
that a slow moment of the machine falls on all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fflfast.accuracy import gradient_scale, plain_distill_loss

from .cases import Case, Data
from .variants import Loss, context

__all__ = [
    "MODES",
    "Times",
    "copy_seconds",
    "engine_only",
    "errors",
    "launches",
    "measure_graph",
    "measure_host",
    "measure_times",
    "once",
    "peak_bytes",
]

MODES = ("forward+backward", "forward", "backward")


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


def once(loss: Loss, data: Data) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of one call."""
    _drop(data)
    value = loss(data.logits, data.target)
    value.backward()
    gradients = []
    for z in data.logits:
        assert z.grad is not None
        gradients.append(z.grad)
    _drop(data)
    return value.detach(), gradients


def _drop(data: Data) -> None:
    for z in data.logits:
        z.grad = None


def _step(loss: Loss, data: Data) -> None:
    _drop(data)
    loss(data.logits, data.target).backward()


def _forward(loss: Loss, data: Data) -> None:
    with torch.no_grad():
        loss(data.logits, data.target)


def _timed(mode: str, loss: Loss, data: Data, clock: Callable[[Callable[[], object]], float]) -> float:
    """Seconds of one call in a mode; the forward of mode backward stays outside the clock."""
    if mode == "forward":
        return clock(lambda: _forward(loss, data))
    if mode == "forward+backward":
        return clock(lambda: _step(loss, data))
    value = loss(data.logits, data.target)

    def backward() -> None:
        _drop(data)
        value.backward()

    return clock(backward)


# ---- time -----------------------------------------------------------------------------------------------------


def _host_clock(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class _DeviceClock:
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
    losses: Mapping[str, Loss], sets: list[Data], mode: str, *, budget: float, least: int = 5
) -> dict[str, Times]:
    """Times of each variant in turns of some milliseconds, within a budget of seconds for all together.

    A turn begins with a call that is not timed: the gradients that the first timed one drops are then its own.
    `sets` are equal inputs at different addresses; calls go round them, so that a GPU's L2 cache holds none.
    """
    on_gpu = sets[0].logits[0].is_cuda
    clocks: dict[str, Callable[[Callable[[], object]], float]] = {}
    turns: dict[str, int] = {}
    cost = 0.0
    for name, loss in losses.items():
        with context(loss):
            for _ in range(2):
                _timed(mode, loss, sets[0], _host_clock)
            _synchronize(on_gpu)
            host = min(_timed(mode, loss, sets[0], _host_clock) for _ in range(3))
            clocks[name] = _DeviceClock(host) if on_gpu else _host_clock
            # A call's own cost with what surrounds it, the forward of mode backward for one.
            each = _host_clock(lambda loss=loss, name=name: _timed(mode, loss, sets[0], clocks[name]))  # type: ignore[misc]
        turns[name] = max(1, min(100, round(5e-3 / each)))
        cost += (turns[name] + 1) * each
    rounds = max(least, min(200, int(budget / cost)))
    samples: dict[str, list[float]] = {name: [] for name in losses}
    order = list(losses)
    for round_ in range(rounds):
        for name in order[round_ % len(order) :] + order[: round_ % len(order)]:
            loss, clock, n = losses[name], clocks[name], turns[name]
            with context(loss):
                _timed(mode, loss, sets[round_ % len(sets)], clock)
                total = sum(_timed(mode, loss, sets[(round_ * n + k) % len(sets)], clock) for k in range(n))
            samples[name].append(total / n)
    for data in sets:
        _drop(data)
    return {name: Times.of(found) for name, found in samples.items()}


def measure_graph(loss: Loss, sets: list[Data], *, replays: int = 50) -> Times | None:
    """GPU time of one forward and backward inside a CUDA graph of one call a set; None where it cannot be captured."""

    def run() -> list[tuple[Tensor, ...]]:
        return [torch.autograd.grad(loss(d.logits, d.target), d.logits) for d in sets]

    try:
        with context(loss):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                run()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                kept = run()
    except Exception as error:  # a refused capture is a result too: a synchronising peer has no time in a graph
        print(f"  not capturable: {str(error).splitlines()[0][:120]}")
        return None
    clock = _DeviceClock(1e-4)
    samples = [clock(graph.replay) / len(sets) for _ in range(replays)]
    del kept
    return Times.of(samples[replays // 5 :])


def measure_host(loss: Loss, data: Data, *, calls: int = 200, rounds: int = 9) -> Times:
    """Host time to enqueue one forward and backward on a GPU, autograd's engine included."""

    def step() -> None:
        torch.autograd.grad(loss(data.logits, data.target), data.logits)

    def many() -> None:
        for _ in range(calls):
            step()

    samples = []
    with context(loss):
        step()
        for _ in range(rounds):
            torch.cuda.synchronize()
            samples.append(_host_clock(many) / calls)
    return Times.of(samples)


class _Nothing(torch.autograd.Function):
    """What autograd itself costs: as many inputs and gradients, no work."""

    @staticmethod
    def forward(ctx, loss, gradients, *logits):  # type: ignore[no-untyped-def]
        ctx.gradients = gradients
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return (None, None, *ctx.gradients)


def engine_only(data: Data) -> Loss:
    """A variant that does nothing, to subtract autograd's engine from host times."""
    loss, gradients = torch.zeros((), device=data.target.device), [torch.zeros_like(z) for z in data.logits]
    return lambda logits, target: _Nothing.apply(loss, gradients, *logits)


def copy_seconds(case: Case, device: torch.device, mode: str) -> float:
    """What copying `case.minimal_bytes(mode)` takes, into memory that is already there.

    On a CPU tensors of the case's own shape are copied; on a GPU it is the share of a copy of 4 GB, because a small
    copy measures its launch.
    """
    if device.type == "cpu":
        source = [torch.zeros(case.rows, case.num_classes, dtype=case.dtype) for _ in range(case.graph.num_logits)]
    else:
        source = [torch.zeros(1 << 31, dtype=torch.uint8, device=device)]
    target = [torch.ones_like(t) for t in source]

    def copy() -> None:
        for a, b in zip(source, target, strict=True):
            b.copy_(a)

    clock: Callable[[Callable[[], object]], float] = _host_clock if device.type == "cpu" else _DeviceClock(1e-4)
    estimate = min(clock(copy) for _ in range(3))
    n = max(1, round(1e-3 / estimate))

    def many() -> None:
        for _ in range(n):
            copy()

    seconds = statistics.median(clock(many) / n for _ in range(9 if estimate > 0.1 else 25))
    return seconds * case.minimal_bytes(mode) / sum(2 * t.nbytes for t in source)


def _synchronize(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


# ---- memory and launches --------------------------------------------------------------------------------------


def peak_bytes(loss: Loss, data: Data) -> int:
    """Most bytes of tensors beside the inputs during one forward and backward, the gradients among them.

    As PyTorch's allocator counts them: exact, also where the C library would serve a small tensor from memory that it
    kept back, which the size of the process cannot tell. What native code takes elsewhere is not in it.
    """
    with context(loss):
        once(loss, data)
        if data.target.is_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            kept = once(loss, data)
            torch.cuda.synchronize()
            del kept
            return torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            kept = once(loss, data)
        del kept
    return _peak_of(profile)


def _peak_of(profile: torch.profiler.profile) -> int:
    from torch._C._profiler import _EventType

    events = list(profile.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    changes = []
    while events:
        event = events.pop()
        events += event.children
        if event.tag == _EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    total = peak = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        total += size
        peak = max(peak, total)
    return peak


def launches(loss: Loss, data: Data) -> int | None:
    """Kernels, copies and fills that one forward and backward enqueue on a GPU."""
    if not data.target.is_cuda:
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with context(loss):
        once(loss, data)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as profile:
            once(loss, data)
            torch.cuda.synchronize()
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    # A range that somebody named shows up beside the kernels in it.
    return sum(not getattr(event, "is_user_annotation", False) for event in on_device)


# ---- error ----------------------------------------------------------------------------------------------------


def errors(
    case: Case, data: Data, results: Mapping[str, tuple[Tensor, list[Tensor]]]
) -> dict[str, tuple[float, float]]:
    """(relative error of the loss, largest error of a gradient relative to s of the contract), against float64."""
    settings = case.settings._replace(reduction="sum")
    exact_loss, worst = 0.0, dict.fromkeys(results, 0.0)
    step = max(1, (1 << 22) // case.num_classes)
    for start in range(0, case.rows, step):
        part = slice(start, start + step)
        leaves = [z.detach()[part].double().requires_grad_() for z in data.logits]
        target = data.target[part]
        loss, _ = plain_distill_loss(leaves, target, case.graph, settings)
        loss.backward()
        exact_loss += float(loss.detach()) / case.rows
        scales = gradient_scale(leaves, target, case.graph, settings)
        for name, (_, gradients) in results.items():
            for g, z, s in zip(gradients, leaves, scales, strict=True):
                assert z.grad is not None
                ratio = ((g[part].double() * case.rows - z.grad).abs() / s.clamp(min=1e-300)).max()
                worst[name] = max(worst[name], float(ratio))
    return {
        name: (abs(float(loss.double()) - exact_loss) / abs(exact_loss), worst[name])
        for name, (loss, _) in results.items()
    }
