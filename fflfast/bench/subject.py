"""What a worker of the benchmark steps: one loop on batches that are ready, built as `fflfast train` builds it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .. import execution
from ..data import DataBundle, Loader
from ..methods import Method
from ..ops.augment import augment, normalization_table
from ..training.allocator import keep_memory
from ..training.build import build_learner, open_bundle
from ..training.config import ConfigError, ResolvedConfig
from ..training.feeding import Feed, task_for, training_feed
from ..training.layout import to_channels_last
from ..training.processes import SINGLE
from ..training.run import arithmetic
from ..training.step import TrainStep
from ..training.teacher import load_teacher
from .figures import PeakMemory, count_launches
from .floor import Floor
from .naive import NaiveLoop
from .variants import Variant

__all__ = ["Job", "Subject", "opened"]

_POOL = 4  # batches that the steps go round, where an epoch has as many
_WARM_UP = 3
_FLOOR = f"{Floor.__module__}:{Floor.__name__}"


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker is started for.

    Attributes:
        variant: the loop.
        config: of the run.
        num_classes: of the networks, where they shall have more than the data.
        threads: of PyTorch on the CPU.
    """

    variant: Variant
    config: ResolvedConfig
    num_classes: int | None
    threads: int


class Subject:
    """A loop, and what can be measured of it once it is warmed up.

    Args:
        take: takes one step on a batch and returns its loss, a number or a 0-dim tensor.
        pool: batches as ``take`` wants them, all of one size.
        memory: started before the networks were built.
        feed: gives batches as a run gets them; None for the naive loop, which has no loader of its own.
    """

    def __init__(
        self, take: Callable[[Any], Any], pool: list[Any], memory: PeakMemory, feed: Feed | None = None
    ) -> None:
        self.take, self.pool, self.memory, self.feed = take, pool, memory, feed

    def warm_up(self) -> float:
        """Take the first steps, which compile, capture and choose algorithms; returns the loss of the first one."""
        loss = float(self.take(self.pool[0]))
        self._go_round(_WARM_UP)
        self._make_room()
        return loss

    def block(self, steps: int) -> float:
        """Return the seconds of a step, over a block; one step before it, which takes memory into use, is not timed."""
        self._go_round(1)
        seconds = self._timed(lambda: self._go_round(steps)) / steps
        self._make_room()
        return seconds

    def facts(self) -> dict[str, Any]:
        """Return the peak memory in bytes and the launches of a step."""
        peak = self.memory.read()  # before the profiler takes memory of its own
        launches = count_launches(lambda: self._go_round(1), self.memory.device)
        self._make_room()
        return {"peak_bytes": peak, "launches": launches}

    def pass_through(self, steps: int, *, step: bool) -> float:
        """Return the images a second of loading ``steps`` batches as a run does, with or without a step on each."""
        assert self.feed is not None
        feed = self.feed
        with contextlib.closing(_endless(feed)) as batches:
            next(batches)  # starts the threads, if any
            images = 0

            def many() -> None:
                nonlocal images
                for inputs, count in itertools.islice(batches, steps):
                    images += count
                    if step:
                        self.take(inputs)
                    else:
                        feed.batch(inputs)

            seconds = self._timed(many)
        self._make_room()
        return images / seconds

    def _go_round(self, steps: int) -> None:
        for batch in itertools.islice(itertools.cycle(self.pool), steps):
            self.take(batch)

    def _timed(self, action: Callable[[], object]) -> float:
        self._wait()
        start = time.perf_counter()
        action()
        self._wait()
        return time.perf_counter() - start

    def _make_room(self) -> None:
        """Give back what the allocator keeps between steps: on a GPU it would be missing in the other workers."""
        if self.memory.device.type == "cuda":
            self._wait()
            torch.cuda.empty_cache()

    def _wait(self) -> None:
        if self.memory.device.type != "cpu":
            torch.accelerator.synchronize(self.memory.device)


def _endless(feed: Feed) -> Generator[tuple[Any, int], None, None]:
    """Yield the batches of epoch after epoch, with their number of images."""
    for epoch in itertools.count():
        for step, inputs in enumerate(feed.inputs(epoch)):
            yield inputs, feed.loader.images(step)


@contextlib.contextmanager
def opened(job: Job) -> Iterator[Subject]:
    """Open the data and build the loop of a job.

    Raises:
        ConfigError: a loop that does not exist for these settings, or fewer images than a batch.
    """
    torch.set_num_threads(job.threads)
    config, device = job.config, torch.device(job.config.device)
    data = open_bundle(config)
    images = min(len(data.train), config.limit_train or len(data.train))
    if images < config.batch_size:
        raise ConfigError(f"--batch-size {config.batch_size}: the data has {images} images; take a smaller batch")
    count = min(_POOL, images // config.batch_size)
    _load_libraries(device)
    classes = job.num_classes or data.num_classes
    if job.variant.loop == "naive":
        yield _naive(config, data, classes, count, device)
        return
    if device.type == "cpu":
        keep_memory()
    with arithmetic(config):
        yield _ours(job.variant, config, data, classes, count, device)


def _load_libraries(device: torch.device) -> None:
    """Take one step of a small network, so that what PyTorch loads at its first one is no memory of a variant."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 6 * 6, 2)).to(device)
    optimizer = torch.optim.SGD(network.parameters())
    network(torch.zeros(2, 3, 8, 8, device=device)).sum().backward()
    optimizer.step()


def _naive(config: ResolvedConfig, data: DataBundle, classes: int, count: int, device: torch.device) -> Subject:
    loader = Loader(
        data.train, batch_size=config.batch_size, seed=config.seed, train=True, workers=config.workers,
        limit=config.limit_train,
    )  # fmt: skip
    table = normalization_table(data.mean, data.std)
    pool = []
    for batch in itertools.islice(loader.epoch(0), count):
        images = augment(
            cast(Tensor, batch.images), batch.index,
            seed=config.seed, epoch=0, pad=config.pad, flip=config.flip, table=table,
        )  # fmt: skip
        pool.append((images, batch.target))
    memory = PeakMemory(device)
    loop = NaiveLoop(build_learner(config, classes).to(device), config, device)
    return Subject(lambda batch: loop(*batch), pool, memory)


def _ours(
    variant: Variant, config: ResolvedConfig, data: DataBundle, classes: int, count: int, device: torch.device
) -> Subject:
    if variant.loop == "floor":
        config = dataclasses.replace(config, method=_FLOOR, options=dataclasses.asdict(Floor.Options()))
    feed = training_feed(config, data.train, device, SINGLE, lead=False)
    # What comes over a ring of buffers is overwritten by a later batch: keep a copy.
    pool = [tree_map(torch.clone, inputs) for inputs in itertools.islice(feed.inputs(0), count)]
    memory = PeakMemory(device)
    teacher = load_teacher(config.teacher, data, config.device) if config.teacher and variant.loop == "ours" else None
    learner = build_learner(config, classes, teacher=teacher)
    cast(Method, learner.method).attach(data.train.targets)
    learner.to(device)
    if config.channels_last:
        to_channels_last(learner, device)
    if variant.compile:
        for module in filter(None, (learner.cohort.trunk, *learner.cohort.sub_networks)):
            module.compile()
    learner.train()
    task = task_for(config, dataclasses.replace(data, num_classes=classes))
    plan = execution.create(variant.plan, learner, device)
    table = normalization_table(data.mean, data.std)
    step = TrainStep(learner, task, table, config, device, plan=plan, batch_of=feed.batch)
    step.set_schedule(learning_rate=config.lr, kl_weight=config.options.get("kl_weight", 1.0))
    steps = itertools.count()  # as a run counts them, which costs a launch
    return Subject(lambda inputs: step(inputs, epoch=0, step=next(steps)).loss, pool, memory, feed)
