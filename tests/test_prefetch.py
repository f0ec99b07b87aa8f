"""Batches on their way to a device: what the consumer sees, in every order in which two streams may run.

The streams are simulated: what is enqueued runs later, in an order drawn at random from those that the events allow, on
memory that others used before and use again. A wait that is left out shows as wrong bytes.
"""

from __future__ import annotations

import random
import threading

import pytest
import torch
from test_data_loader import Faulty, array_split, same, take

from fflfast.data import Batch, DataError, Loader, ResidentLoader, prefetch
from fflfast.data.prefetch import _ahead

SEEDS = range(40)


class Device:
    """Two streams, each a queue of operations; an event is a place in a queue."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.queues = {"copies": [], "consumer": []}
        self.done = {"copies": 0, "consumer": 0}
        self.eager = self.random.choice((0.0, 0.3, 1.0))  # how far the device keeps up with the host
        self.favour = self.random.choice((0.05, 0.5, 0.95))  # how often the copies are first where both may run
        self.memory = []  # of earlier owners, who gave it back on the consumer's stream
        self.wrong = []

    def enqueue(self, stream, operation):
        self.queues[stream].append(operation)
        while self.random.random() < self.eager and self.step():
            pass

    def step(self):
        """Run one operation that may run now."""
        ready = [
            s for s, queue in self.queues.items() if self.done[s] < len(queue) and self.may_run(queue[self.done[s]])
        ]
        if not ready:
            return False
        stream = ready[0] if len(ready) == 1 or self.random.random() < self.favour else ready[1]
        operation = self.queues[stream][self.done[stream]]
        self.done[stream] += 1
        if callable(operation):
            operation()
        return True

    def may_run(self, operation):
        return callable(operation) or self.done[operation[0]] >= operation[1]

    def finish(self):
        while self.step():
            pass
        assert all(self.done[stream] == len(queue) for stream, queue in self.queues.items())

    def use(self, tensor, want):
        """The consumer reads a tensor; later is when it is looked at."""
        want = want.clone()
        self.enqueue("consumer", lambda: self.wrong.append(not torch.equal(tensor, want)))

    def write(self, tensor, value):
        self.enqueue("consumer", lambda: tensor.fill_(value))

    # what prefetch asks of its streams

    def empty_like(self, host):
        memory = torch.empty_like(host)
        self.write(memory, 101)
        self.use(memory, torch.full_like(memory, 101))
        self.memory.append(memory)
        return memory

    def is_there(self, tensor):
        return any(tensor is own for own in self.memory)

    def copy(self, targets, sources):
        for target, source in zip(targets, sources, strict=True):
            self.enqueue("copies", lambda target=target, source=source: target.copy_(source))

    def copied(self):
        return "copies", len(self.queues["copies"])

    def used(self):
        return "consumer", len(self.queues["consumer"])

    def wait_to_copy(self, event):
        self.enqueue("copies", event)

    def wait_to_use(self, event):
        self.enqueue("consumer", event)


class NoWaitToCopy(Device):
    def wait_to_copy(self, event):
        pass


class NoWaitToUse(Device):
    def wait_to_use(self, event):
        pass


class NoWaitAtTheEnd(Device):
    leaving = False

    def wait_to_use(self, event):
        if not self.leaving:
            super().wait_to_use(event)


class NoWaitForTheOwnerBefore(Device):
    def used(self):
        # The first three events are of fresh buffers.
        self.asked = getattr(self, "asked", 0) + 1
        return super().used() if self.asked > 3 else ("consumer", 0)


class StaleUse(Device):
    """The event of the last use but one."""

    def used(self):
        before, self.last = getattr(self, "last", ("consumer", 0)), super().used()
        return before


class StaleCopy(Device):
    def copied(self):
        before, self.last = getattr(self, "last", ("copies", 0)), super().copied()
        return before


def run(device, batches, stop_after=None):
    """Use every batch on the consumer's stream; return whether all was as it should be."""
    originals = [Batch(*(part.clone() for part in batch)) for batch in batches]
    host = iter(batches)
    ahead = _ahead(host, device)
    for count, (batch, want) in enumerate(zip(ahead, originals, strict=stop_after is None), 1):
        assert [part.shape for part in batch] == [part.shape for part in want]
        for _ in range(device.random.randrange(3)):
            device.enqueue("consumer", lambda: None)
        for part, expected in zip(batch, want, strict=True):
            device.use(part, expected)
        if count == stop_after:
            break
    device.leaving = True
    ahead.close()
    for action in (lambda memory: device.write(memory, 77), lambda memory: device.use(memory, memory * 0 + 77)):
        for memory in device.memory:  # given back, and handed out again to the consumer
            action(memory)
    device.finish()
    return not any(device.wrong)


def batches_of(sizes):
    generator = torch.Generator().manual_seed(0)
    return [
        Batch(
            torch.randint(0, 100, (n, 3, 2, 2), dtype=torch.uint8, generator=generator),
            torch.randint(0, 100, (n,), generator=generator),
            torch.randint(0, 100, (n,), generator=generator),
        )
        for n in sizes
    ]


@pytest.mark.parametrize(
    "sizes", [[], [4], [4, 4], [4, 4, 4, 4, 4, 4, 3], [0, 4, 4, 5, 4, 0, 5]], ids=lambda sizes: f"{len(sizes)} batches"
)
@pytest.mark.parametrize("stop_after", [None, 1, 3])
def test_the_consumer_sees_every_batch_whatever_the_streams_do(sizes, stop_after):
    for seed in SEEDS:
        assert run(Device(seed), batches_of(sizes), stop_after)


@pytest.mark.parametrize(
    "mutant", [NoWaitToCopy, NoWaitToUse, NoWaitAtTheEnd, NoWaitForTheOwnerBefore, StaleUse, StaleCopy]
)
def test_a_missing_wait_is_noticed(mutant):
    sizes = [4] * 8
    assert not all(run(mutant(seed), batches_of(sizes), stop_after=5) for seed in SEEDS)


def test_three_buffers_serve_an_epoch_and_copies_run_ahead():
    device = Device(0)
    device.eager = 0.0
    seen = [batch.images.data_ptr() for batch in _ahead(iter(batches_of([4] * 7 + [2])), device)]
    assert len(device.memory) == 9  # three slots of three tensors
    assert seen == (seen[:3] * 3)[:8]
    device = Device(0)
    ahead = _ahead(iter(batches_of([4] * 7)), device)
    next(ahead)
    device.finish()
    assert [int(slot.sum()) for slot in device.memory[3::3]] == [int(batches_of([4, 4])[1].images.sum())]


def test_views_and_what_is_on_the_device_already():
    device = Device(0)
    views = Batch(tuple(torch.full((2, 1, 2, 2), v, dtype=torch.uint8) for v in (1, 2)), torch.ones(2), torch.ones(2))
    batch = next(_ahead(iter([views]), device))
    device.finish()
    assert isinstance(batch.images, tuple)
    assert [int(view.max()) for view in batch.images] == [1, 2]
    there = device.empty_like(torch.zeros(3))
    assert next(_ahead(iter([there]), device)) is there


def test_an_error_of_the_loader_arrives_and_ends_its_threads():
    before = threading.active_count()
    loader = Loader(Faulty(50, bad=[30]), batch_size=8, seed=0, train=False, workers=2)
    with pytest.raises(DataError, match="image-30 cannot be read"):
        list(_ahead(loader.epoch(0), Device(0)))
    assert threading.active_count() == before


@pytest.mark.parametrize("device", ["cpu", "meta", "simulated"])
def test_leaving_early_ends_the_loaders_threads(device):
    before = threading.active_count()
    batches = Loader(Faulty(5000), batch_size=8, seed=0, train=True, workers=4).epoch(0)
    ahead = _ahead(batches, Device(0)) if device == "simulated" else prefetch(batches, device)
    next(ahead)
    assert threading.active_count() > before
    ahead.close()
    assert threading.active_count() == before


def test_on_a_cpu_batches_pass_through():
    loader = Loader(array_split(), batch_size=8, seed=0, train=True)
    assert same(list(prefetch(loader.epoch(1), "cpu")), take(loader, 1))
    resident = ResidentLoader(array_split(), device="cpu", batch_size=8, seed=0, train=True)
    assert same([resident.batch(rows) for rows in prefetch(resident.inputs(1), "cpu")], take(loader, 1))


def test_on_another_device_batches_are_copied():
    batch = next(prefetch(iter(batches_of([4])), "meta"))
    assert isinstance(batch, Batch)
    assert {part.device.type for part in batch} == {"meta"}
