"""What a profile of one step says of the device: which kernel ran when, on which stream, for which part of the step.

All of it is read from the Chrome trace that torch.profiler exports, whose fields its viewers rely on.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = [
    "OTHER",
    "PREFIX",
    "REST",
    "UNKNOWN",
    "Figures",
    "Kernel",
    "covered",
    "figures_of",
    "kernels_of",
    "kind_of",
    "lanes",
    "parts_of",
]

Event = Mapping[str, Any]
Interval = tuple[int, int]

PREFIX = "timeline: "
"""In front of a part's name, the name of its range in the profile."""
REST = "rest"
"""The part of what no range names: augmentation and metrics, say."""
UNKNOWN = "unknown"
"""The part of what nothing ties to the host."""
OTHER = "other"
"""The kind of what goes by another name."""
_OPTIMIZER = "Optimizer.step"
_NODE = "autograd::engine::evaluate_function: "
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_KINDS = (
    ("ours", r"fflfast|^[a-z_]+_kernel$"),  # Triton's carry the bare names of their functions
    ("optimizer", r"multi_tensor_apply"),
    ("norm", r"batch_?norm|bn_(fw|bw)|welford"),
    ("change of layout", r"nchw ?tonhwc|nhwc ?tonchw"),
    ("convolution, product", r"conv|gemm|cutlass|cudnn|xmma|wgrad|dgrad|fprop|nvjet"),
    ("reduction", r"reduce"),
    ("elementwise", r"elementwise|pointwise|^triton_poi"),
)


class Kernel(NamedTuple):
    """A kernel, copy or fill on the device.

    Attributes:
        name, category: as the trace has them.
        stream: number of its stream as the trace names it; "?" where it does not.
        start, end: in nanoseconds, start ≤ end.
        launch: what ties it to the call of the host that asked for it; None where nothing does.
    """

    name: str
    category: str
    stream: str
    start: int
    end: int
    launch: int | None = None

    @property
    def interval(self) -> Interval:
        return self.start, self.end


def kernels_of(events: Iterable[Event]) -> list[Kernel]:
    """Return what ran on the device, in the order of its start."""
    found = []
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in _DEVICE:
            arguments = event.get("args", {})
            # In the trace's rows a stream is a thread of the device.
            stream = str(arguments.get("stream", event.get("tid", "?")))
            start, end = _interval(event)
            found.append(Kernel(event["name"], event["cat"], stream, start, end, arguments.get("correlation")))
    return sorted(found, key=lambda kernel: kernel.interval)


def _interval(event: Event) -> Interval:
    # Whole nanoseconds, which is what the trace's microseconds are of: a sum of floats would make neighbours overlap.
    start = round(1e3 * event["ts"])
    return start, start + max(0, round(1e3 * event.get("dur", 0)))


# ---- how much at once -----------------------------------------------------------------------------------------


def covered(groups: Iterable[Iterable[Interval]], least: int = 1) -> int:
    """Return the time in which at least this many groups have one of their intervals open; touching is no overlap."""
    changes = sorted(change for group in groups for start, end in _merged(group) for change in ((start, 1), (end, -1)))
    total = depth = before = 0
    for time, change in changes:
        if depth >= least:
            total += time - before
        depth, before = depth + change, time
    return total


def _merged(intervals: Iterable[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def lanes(kernels: Sequence[Kernel]) -> list[int]:
    """Return a lane for each kernel, from 0: the lowest in which nothing else runs meanwhile."""
    free: list[int] = []  # when each lane ends
    found = [0] * len(kernels)
    for place in sorted(range(len(kernels)), key=lambda place: kernels[place].interval):
        kernel = kernels[place]
        lane = next((lane for lane, end in enumerate(free) if end <= kernel.start), len(free))
        free[lane : lane + 1] = [kernel.end]
        found[place] = lane
    return found


@dataclass(frozen=True)
class Figures:
    """What a step's kernels, copies and fills amount to; all 0 where nothing ran.

    Attributes:
        span_ms: from the first one's start to the last one's end.
        kernel_ms: sum of their times.
        busy_ms: time in which at least one ran.
        overlap: ``kernel_ms`` ÷ ``busy_ms``.
        two_streams: share of the span in which at least two streams ran.
        two_kernels: share of the span in which at least two kernels ran, be it on one stream: a profile may show
            those of a graph on that of its launch.
        kernels, streams: how many.
    """

    span_ms: float = 0.0
    kernel_ms: float = 0.0
    busy_ms: float = 0.0
    overlap: float = 0.0
    two_streams: float = 0.0
    two_kernels: float = 0.0
    kernels: int = 0
    streams: int = 0


def figures_of(kernels: Sequence[Kernel]) -> Figures:
    """Return the figures of what ran in one step."""
    intervals = [kernel.interval for kernel in kernels]
    span = max((end for _, end in intervals), default=0) - min((start for start, _ in intervals), default=0)
    streams: dict[str, list[Interval]] = {}
    for kernel in kernels:
        streams.setdefault(kernel.stream, []).append(kernel.interval)
    total, busy = sum(end - start for start, end in intervals), covered([intervals])
    return Figures(
        span_ms=span / 1e6,
        kernel_ms=total / 1e6,
        busy_ms=busy / 1e6,
        overlap=total / busy if busy else 0.0,
        two_streams=covered(streams.values(), 2) / span if span else 0.0,
        two_kernels=covered(([interval] for interval in intervals), 2) / span if span else 0.0,
        kernels=len(kernels),
        streams=len(streams),
    )


# ---- whose ----------------------------------------------------------------------------------------------------


def kind_of(kernel: Kernel) -> str:
    """Return what a kernel does, as its name tells."""
    if kernel.category != "kernel":
        return "copy" if kernel.category == "gpu_memcpy" else "fill"
    return next((kind for kind, words in _KINDS if re.search(words, kernel.name, re.IGNORECASE)), OTHER)


class _Host:
    """Ranges of the profile and nodes of autograd, by the thread that they ran on."""

    def __init__(self, events: Iterable[Event]) -> None:
        self.ranges: dict[Any, list[tuple[int, int, str]]] = {}
        self.nodes: dict[Any, list[tuple[int, int, int]]] = {}
        forward: list[tuple[int, int, Any]] = []
        self.launches: dict[int, tuple[str, int, Any]] = {}
        for event in events:
            if event.get("ph") != "X":
                continue
            kind, name, arguments = event.get("cat"), event["name"], event.get("args", {})
            thread, (start, end) = event.get("tid"), _interval(event)
            number = arguments.get("Sequence number", -1)
            if kind == "user_annotation" and (part := _part_of_range(name)):
                self.ranges.setdefault(thread, []).append((start, end, part))
            elif kind == "cpu_op" and number >= 0 and name.startswith(_NODE):
                self.nodes.setdefault(thread, []).append((start, end, number))
            elif kind == "cpu_op" and number >= 0 and not arguments.get("Fwd thread id"):
                forward.append((start, number, thread))
            elif kind in _LAUNCHES and "correlation" in arguments:
                self.launches[arguments["correlation"]] = name, start, thread
        for nodes in self.nodes.values():
            nodes.sort()
        # An operator that makes no node bears the number of the next one, which the last operator of a number makes.
        self.made_by = {number: self._range_at(start, thread) for start, number, thread in sorted(forward, key=_start)}

    def part_at(self, time: int, thread: Any) -> str:
        """Return whose the host's doing at a time was: that of the innermost range, else of the node's forward."""
        if part := self._range_at(time, thread):
            return part
        nodes = self.nodes.get(thread, [])
        place = bisect.bisect_right(nodes, time, key=_start) - 1
        if place >= 0 and time <= nodes[place][1]:
            return self.made_by.get(nodes[place][2]) or REST
        return REST

    def _range_at(self, time: int, thread: Any) -> str | None:
        inside = [one for one in self.ranges.get(thread, ()) if one[0] <= time <= one[1]]
        return max(inside, key=lambda one: (one[0], -one[1]))[2] if inside else None


def _start(what: tuple[int, Any, Any]) -> int:
    return what[0]


def _part_of_range(name: str) -> str | None:
    if name.startswith(PREFIX):
        return name.removeprefix(PREFIX)
    return "optimizer" if name.startswith(_OPTIMIZER) else None


def parts_of(events: Iterable[Event], kernels: Iterable[Kernel]) -> Iterator[str]:
    """Yield the part of the step that each kernel belongs to, `UNKNOWN` where the trace does not tell.

    A forward is told by the range that its launch was in, a backward by the node of autograd that launched it, which
    bears the number of the operator that made it. Kernels of a graph all have one launch, which tells nothing.
    """
    host = _Host(events)
    for kernel in kernels:
        launch = None if kernel.launch is None else host.launches.get(kernel.launch)
        if launch is None or "GraphLaunch" in launch[0]:
            yield UNKNOWN
        else:
            yield host.part_at(*launch[1:])
