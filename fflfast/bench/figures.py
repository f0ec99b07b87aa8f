"""The figures of a training step: rates and ratios from times, peak memory, launches."""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["LAUNCHES_ON_CPU", "LAUNCHES_ON_GPU", "PeakMemory", "count_launches", "overhead", "ratio", "spread"]

LAUNCHES_ON_GPU = "launches"
LAUNCHES_ON_CPU = "operator calls"

_LAUNCH = re.compile(r"(cuda|cu|hip)(Ext)?(Module)?(Launch(Cooperative)?Kernel|Memcpy|Memset|GraphLaunch)")


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Return how many times slower the first is: the median over blocks of seconds that were measured side by side."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def overhead(times: Sequence[float], floor: Sequence[float]) -> float:
    """Return by which share of the floor's time the others exceed it, 0.06 for 6 %."""
    return ratio(times, floor) - 1


def spread(times: Sequence[float]) -> tuple[float, float, float]:
    """Return median, 20th and 80th percentile (the nearest of the samples)."""
    ordered = sorted(times)
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8))
    return statistics.median(ordered), low, high


class PeakMemory:
    """Most memory in use since it was made, above what was in use then.

    On a CUDA device that of PyTorch's tensors (`torch.cuda.max_memory_allocated`), elsewhere the resident memory of
    this process as Linux counts it; None where neither is to be had.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._start: int | None
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._start = torch.cuda.memory_allocated(device)
        else:
            _forget_peak()
            self._start = _resident("VmRSS")

    def read(self) -> int | None:
        """Return the bytes."""
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _resident("VmHWM")
        return None if peak is None or self._start is None else max(0, peak - self._start)


def _forget_peak() -> None:
    """Let the kernel's record of the largest size begin anew: opening the data is no part of a step."""
    if sys.platform == "linux":
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:  # not permitted: the peak then is that of the process since its start
            return


def _resident(field: str) -> int | None:
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    return None if found is None else 1024 * int(found[1])


def count_launches(step: Callable[[], object], device: torch.device) -> int:
    """Return what one step asks of the device.

    On a CUDA device the calls that the host makes to launch a kernel, a copy, a fill or a graph; elsewhere the
    operators that Python and autograd call, not those that these call in turn.
    """
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        step()
        if on_gpu:
            torch.cuda.synchronize(device)
    events: Iterable[Any] = profile.events() or ()
    if on_gpu:
        return sum(_LAUNCH.match(event.name) is not None for event in events)
    return sum(_is_operator(event) and not _within_operator(event) for event in events)


def _is_operator(event: Any) -> bool:
    return "::" in event.name and not event.name.startswith("autograd::")


def _within_operator(event: Any) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if _is_operator(parent):
            return True
        parent = parent.cpu_parent
    return False
