"""Batches on their way to a CUDA device while the one before is in use."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Generator, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from .batch import Batch

__all__ = ["prefetch"]

_SLOTS = 3  # one batch in use, one that is ready, one that is being copied


def prefetch(batches: Iterator[Any], device: torch.device | str) -> Iterator[Any]:
    """Bring batches to a device, to a CUDA device ahead of their use.

    There, two batches are under way: a stream of its own copies them into a ring of three buffers that stay where they
    are. The consumer's stream, the current one whenever a batch is asked for, waits for a batch's copy, and a copy for
    what the consumer did with the batch before in its buffer; the host waits for nothing. A batch therefore holds until
    the next one is asked for. Give it batches in page-locked memory (``Loader(pin_memory=True)``), from which alone a
    copy takes no time of the host's. An error of the loader's comes one batch early.

    What lies on the device already, such as `ResidentLoader.inputs`, is passed through.

    Args:
        batches: `Batch` after Batch, or tensors; closed at the end, also when the consumer leaves early by ``close()``.
        device: where they go.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return batches
    if device.type == "cuda":
        return _ahead(batches, _CudaStreams(device))
    return _plain(batches, device)


def _plain(batches: Iterator[Any], device: torch.device) -> Generator[Any, None, None]:
    with _closing(batches):
        for batch in batches:
            yield _each(batch, lambda tensor: tensor.to(device))


class _Streams(Protocol):
    """The consumer's stream and the one that copies; an event is what one stream waits for on the other."""

    def empty_like(self, host: Tensor) -> Tensor:
        """Memory on the device that what the consumer did before may still use."""

    def is_there(self, tensor: Tensor) -> bool:
        """Whether a tensor lies on the device."""

    def copy(self, targets: list[Tensor], sources: list[Tensor]) -> None:
        """Copy tensors of the host on the copying stream."""

    def copied(self) -> Any:
        """Return an event of all copies so far."""

    def used(self) -> Any:
        """Return an event of all that the consumer did so far."""

    def wait_to_copy(self, event: Any) -> None:
        """Let the copying stream wait."""

    def wait_to_use(self, event: Any) -> None:
        """Let the consumer's stream wait."""


class _CudaStreams:
    def __init__(self, device: torch.device) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self.copies = _copy_stream(self.device)

    def empty_like(self, host: Tensor) -> Tensor:
        return torch.empty_like(host, device=self.device)

    def is_there(self, tensor: Tensor) -> bool:
        return tensor.device == self.device

    def copy(self, targets: list[Tensor], sources: list[Tensor]) -> None:
        # Page-locked memory that is given back while its copy is under way is kept by PyTorch until it is done.
        with torch.cuda.stream(self.copies):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)

    def copied(self) -> torch.cuda.Event:
        return self.copies.record_event()

    def used(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self.device).record_event()

    def wait_to_copy(self, event: torch.cuda.Event) -> None:
        self.copies.wait_event(event)

    def wait_to_use(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class _Slot:
    """Buffers of one batch, and the events of its last copy and of its last use."""

    def __init__(self, streams: _Streams) -> None:
        self.streams = streams
        self.buffers: Any = None
        self.batch: Any = None
        self.copied: Any = None
        self.used: Any = None

    def load(self, batch: Any) -> _Slot:
        """Start to copy a batch from the host into the buffers, a smaller one into their first rows."""
        streams = self.streams
        if all(streams.is_there(tensor) for tensor in _leaves(batch)):
            self.batch, self.copied = batch, streams.copied()
            return self
        if not _fits(batch, self.buffers):
            # The memory may be in use by what the consumer's stream has yet to do: its owner before gave it back there.
            self.buffers = _each(batch, streams.empty_like)
            self.used = streams.used()
        streams.wait_to_copy(self.used)
        self.batch = _each(self.buffers, lambda buffer: buffer[: _rows(batch)])
        streams.copy(_leaves(self.batch), _leaves(batch))
        self.copied = streams.copied()
        return self


def _ahead(batches: Iterator[Any], streams: _Streams) -> Generator[Any, None, None]:
    slots = itertools.cycle([_Slot(streams) for _ in range(_SLOTS)])
    with _closing(batches):
        # In this order, so that no slot is taken for a batch that does not come.
        loaded = (slot.load(batch) for batch, slot in zip(batches, slots, strict=False))
        current, following = next(loaded, None), next(loaded, None)
        try:
            while current is not None:
                streams.wait_to_use(current.copied)
                yield current.batch
                current.used = streams.used()
                # The batch after the next goes where the batch before this one was.
                current, following = following, None
                following = next(loaded, None)
        finally:
            # The buffers go back to the consumer's stream, which must not use their memory while a copy is under way.
            for slot in filter(None, (current, following)):
                streams.wait_to_use(slot.copied)


def _closing(batches: Iterator[Any]) -> contextlib.AbstractContextManager[Any]:
    return contextlib.closing(batches) if hasattr(batches, "close") else contextlib.nullcontext()


def _leaves(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    return [tensor for part in batch for tensor in _leaves(part)]


def _each(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(batch, Tensor):
        return function(batch)
    parts = [_each(part, function) for part in batch]
    return Batch(*parts) if isinstance(batch, Batch) else tuple(parts)


def _rows(batch: Any) -> int:
    return len(_leaves(batch)[0])


def _fits(batch: Any, buffers: Any) -> bool:
    return buffers is not None and all(
        len(host) <= len(buffer) and host.shape[1:] == buffer.shape[1:] and host.dtype == buffer.dtype
        for host, buffer in zip(_leaves(batch), _leaves(buffers), strict=True)
    )
