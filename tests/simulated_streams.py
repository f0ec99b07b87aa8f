"""Streams, a caching allocator and an autograd engine in miniature, which notice every race.

A vector clock per stream says which work of the others is certain to be over. `Device.op` checks that

- what it reads was written by work that is certain to be over;
- what it writes in place was last used by such work;
- the memory of its result is not still in use: the allocator gives a block that the host let go of to the next work of
  the stream that allocated it, as PyTorch's does, and asks nothing about other streams.

`Tape.backward` follows PyTorch's rules: a node runs on the stream of its forward, in any order in which all gradients
are there; it waits for the streams that made them; a gradient that changes streams is recorded on the reading stream
(its block comes back only when that has read it); at the end the caller's stream waits for those of the parameters.
"""

from __future__ import annotations

import contextlib
import random
import weakref
from collections import Counter

from fflfast.streams import POOL


class Race(Exception):
    """Work may meet work of another stream that is not certain to be over."""


class Block:
    """Memory of a tensor; its end gives the memory back to the pool of the stream that allocated it."""

    def __init__(self, device: Device, stream: str) -> None:
        self.uses: list[tuple[str, int]] = []
        self.written: tuple[str, int] | None = None
        self.recorded: list[bool] = []  # not empty: comes back only when all streams are done with it
        weakref.finalize(self, device.freed, stream, self.uses, self.recorded)


class Device:
    """Implements `fflfast.streams.DeviceStreams`; ``skip`` names the calls of `wait` that are left out."""

    def __init__(self, skip: tuple[int, ...] = ()) -> None:
        self.skip = skip
        self.waits = 0
        self.current = "default"
        self.clocks: dict[str, Counter[str]] = {}
        self.free: dict[str, list[list[tuple[str, int]]]] = {}

    def ambient(self):
        return self.current

    def sides(self, count):
        return [f"side{k}" for k in range(min(count, POOL))]

    def wait(self, waiter, waited):
        self.waits += 1
        if self.waits - 1 not in self.skip:
            self.join(waiter, self.clock(waited))

    @contextlib.contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def aside(self):
        ambient = self.current
        self.join("capture", self.clock(ambient))
        try:
            with self.on("capture"):
                yield
        finally:
            self.join(ambient, self.clock("capture"))

    def refuse_waiting(self):
        return contextlib.nullcontext()

    def record(self, step):
        def replay():
            with self.aside():
                return step()

        return replay

    def finish(self):
        everything = Counter()
        for clock in self.clocks.values():
            everything |= clock
        for stream in self.clocks:
            self.join(stream, everything)

    def clock(self, stream):
        return self.clocks.setdefault(stream, Counter())

    def join(self, stream, clock):
        self.clocks[stream] = self.clock(stream) | clock

    def freed(self, stream, uses, recorded):
        if not recorded:
            self.free.setdefault(stream, []).append(uses)

    def op(self, reads=(), writes=()) -> Block:
        """Enqueue work on the current stream and return its result, in newly allocated memory."""
        clock = self.clock(self.current)

        def certain(what, uses):
            for stream, at in uses:
                if clock[stream] < at:
                    raise Race(f"{what} on {self.current} may meet work {at} of {stream}")

        for block in reads:
            certain("a read", [block.written])
        for block in writes:
            certain("a write", block.uses)
        for uses in self.free.pop(self.current, []):
            certain("a reuse of memory", uses)
        clock[self.current] += 1
        use = (self.current, clock[self.current])
        result = Block(self, self.current)
        for block in (*reads, *writes, result):
            block.uses.append(use)
        for block in (*writes, result):
            block.written = use
        return result


class Node:
    def __init__(self, stream, parents, saved, parameter) -> None:
        self.stream, self.parents, self.saved, self.parameter = stream, parents, saved, parameter


class Value:
    """A tensor: memory, and how it was made."""

    def __init__(self, block, node=None) -> None:
        self.block, self.node = block, node

    def detach(self):
        return Value(self.block)


class Tape:
    """Forward operations and their backward pass on a `Device`."""

    def __init__(self, device: Device, seed: int) -> None:
        self.device = device
        self.random = random.Random(seed)
        self.nodes: list[Node] = []
        self.gradients: list[tuple[Block, Block]] = []

    def apply(self, *inputs: Value, parameter=None, buffer=None) -> Value:
        """An operation that saves its inputs, with a weight and with a buffer that it changes, if given."""
        saved = [value.block for value in inputs] + ([] if parameter is None else [parameter])
        block = self.device.op(saved, () if buffer is None else [buffer])
        node = Node(self.device.current, [value.node for value in inputs if value.node], saved, parameter)
        self.nodes.append(node)
        return Value(block, node)

    def backward(self, loss: Value, *, fails_after: int | None = None) -> None:
        device, nodes, self.nodes = self.device, self.nodes, []
        caller = device.current
        waiting = Counter(parent for node in nodes for parent in node.parents)
        arrived: dict[Node, list] = {loss.node: [(device.op(), Counter(device.clock(caller)))]}
        ready, leaf_streams, done = [loss.node], set(), 0
        del nodes, loss
        while ready:
            if done == fails_after:
                raise ArithmeticError("in the backward pass")
            done += 1
            node = ready.pop(self.random.randrange(len(ready)))
            with device.on(node.stream):
                incoming = []
                for gradient, event in arrived.pop(node):
                    device.join(node.stream, event)
                    incoming.append(gradient)
                gradient = incoming[0] if len(incoming) == 1 else device.op(incoming)
                outgoing = [(parent, device.op([gradient, *node.saved])) for parent in node.parents]
                if node.parameter is not None:
                    self.gradients.append((node.parameter, device.op([gradient, *node.saved])))
                    leaf_streams.add(node.stream)
                event = Counter(device.clock(node.stream))
            node.saved = []
            for parent, gradient in outgoing:
                if parent.stream != node.stream:
                    gradient.recorded.append(True)
                arrived.setdefault(parent, []).append((gradient, event))
                waiting[parent] -= 1
                if waiting[parent] == 0:
                    ready.append(parent)
            del node, gradient, incoming, outgoing
        for stream in leaf_streams:
            device.join(caller, device.clock(stream))
