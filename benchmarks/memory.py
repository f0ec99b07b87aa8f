"""What a call takes beside time: peak memory, memory saved for the backward, kernel launches."""

from __future__ import annotations

import torch
from torch import Tensor

from .calls import Call, context
from .measure import Data, one_pass, trained

__all__ = ["launches", "peak_bytes", "saved_bytes"]

STEP = "forward+backward"


def peak_bytes(call: Call, data: Data, mode: str = STEP) -> int:
    """Most bytes of tensors beside the inputs during one call in a mode, the gradients among them.

    As PyTorch's allocator counts them: exact, also where the C library would serve a small tensor from memory that it
    kept back, which the size of the process cannot tell. What native code takes elsewhere is not in it.
    """
    with context(call):
        one_pass(mode, call, data)
        if data.leaves[0].is_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            kept = one_pass(mode, call, data)
            torch.cuda.synchronize()
            del kept
            return torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            kept = one_pass(mode, call, data)
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


def saved_bytes(call: Call, data: Data) -> int:
    """Bytes that autograd holds between a forward and its backward, the inputs among them, parameters not."""
    sizes: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return t

    with context(call), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        value = call(*data.arguments)
    own = trained(call, data)[len(data.leaves) :]
    for parameter in own:
        sizes.pop(parameter.untyped_storage().data_ptr(), None)
    del value  # until here, so that no address was given out twice
    return sum(sizes.values())


def launches(call: Call, data: Data, mode: str = STEP) -> int | None:
    """Kernels, copies and fills that one call in a mode enqueues on a GPU."""
    if not data.leaves[0].is_cuda:
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with context(call):
        one_pass(mode, call, data)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as profile:
            one_pass(mode, call, data)
            torch.cuda.synchronize()
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    # A range that somebody named shows up beside the kernels in it.
    return sum(not getattr(event, "is_user_annotation", False) for event in on_device)
