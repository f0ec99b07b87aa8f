"""Variants side by side: a worker each, blocks of steps in turns, medians."""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import execution
from ..training.config import ConfigError, ResolvedConfig
from . import figures
from .subject import Job
from .variants import NAMES, Variant, choose
from .worker import Refused, Worker, started

__all__ = ["Result", "Row", "measure"]

_ROUNDS = 10
_STEPS = {"cpu": 30}
_STEPS_ELSEWHERE = 200
_PASSES = 3


@dataclass
class Row:
    """What was measured of one variant.

    Attributes:
        variant: the loop.
        seconds: of a step, one number a block; blocks of equal place ran side by side.
        first_loss: of the first step from the common weights on the first batch.
        peak_bytes: most memory above what the process held before it built its networks; None where unknown.
        launches: of one step, see `fflfast.bench.figures.count_launches`.
    """

    variant: Variant
    seconds: list[float] = field(default_factory=list)
    first_loss: float = float("nan")
    peak_bytes: int | None = None
    launches: int = 0


@dataclass
class Result:
    """What `measure` found.

    Attributes:
        config: what was run.
        device: where.
        block: steps in a block, one more in the first of them where ``steps`` does not divide.
        rows: what ran.
        refused: what did not, by name, with the reason.
        rates: images/s of ``loader``, ``step`` and ``end_to_end``, of the fastest of our variants.
        steps: timed steps of each variant.
    """

    config: ResolvedConfig
    device: torch.device
    block: int
    rows: list[Row] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    steps: int = 0

    def find(self, variant: Variant | None) -> Row | None:
        """Return the row of a variant, if it ran."""
        return next((row for row in self.rows if row.variant == variant), None)

    @property
    def fastest(self) -> Row | None:
        """The fastest of our variants."""
        ours = [row for row in self.rows if row.variant.loop == "ours"]
        return min(ours, key=lambda row: statistics.median(row.seconds), default=None)

    def figures(self, row: Row) -> dict[str, Any]:
        """Return the figures of a row; None where there is nothing to hold it against."""
        median, low, high = figures.spread(row.seconds)
        naive, floor = self.find(Variant("naive")), self.find(row.variant.floor)
        return {
            "images_per_second": self.config.batch_size / median,
            "step_ms": 1e3 * median,
            "p20_ms": 1e3 * low,
            "p80_ms": 1e3 * high,
            "times_naive": None if naive is None else figures.ratio(naive.seconds, row.seconds),
            "overhead_percent": None if floor is None else 100 * figures.overhead(row.seconds, floor.seconds),
            "peak_mb": None if row.peak_bytes is None else row.peak_bytes / 1e6,
            "launches": row.launches,
            "first_loss": row.first_loss,
        }

    @property
    def launches(self) -> str:
        """What `Row.launches` counts on this device."""
        return figures.LAUNCHES_ON_GPU if self.device.type == "cuda" else figures.LAUNCHES_ON_CPU


def measure(
    config: ResolvedConfig,
    *,
    steps: int | None = None,
    variants: Sequence[str] | None = None,
    num_classes: int | None = None,
    tell: Callable[[str], object] = lambda line: None,
) -> Result:
    """Hold training loops side by side on one device.

    Every variant lives in a process of its own, with the same weights and the same augmented images. They take turns,
    one block of steps each, so that a slow moment of the machine falls on all of them.

    Args:
        config: as `fflfast.training.resolve` returns it. Its ``plan``, unless auto, is the only plan that is measured;
            with ``compile`` each plan runs with compiled sub-networks too. λ is that after the ramp-up.
        steps: timed steps of each variant, in up to ten blocks; None for 30 on a CPU, else 200.
        variants: of `fflfast.bench.variants.NAMES`; None for those that make sense on the device.
        num_classes: of the networks, where they shall have more than the data.
        tell: gets a line for each thing that is begun.

    Raises:
        ConfigError: a variant that nobody knows, or more than one process.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("fflfast bench train measures one process; start it without torchrun")
    if unknown := [name for name in variants or () if name not in NAMES]:
        raise ConfigError(f"--variants: expected names among {', '.join(NAMES)}, got {unknown[0]!r}")
    if steps is not None and steps < 1:
        raise ConfigError(f"--steps: expected at least 1, got {steps}")
    device = torch.device(config.device)
    alone = config.method == "single"
    chosen, refused = choose(
        _names(config, variants), _left_out(device, asked=variants is not None or config.plan != "auto"),
        compile=config.compile, alone=alone,
    )  # fmt: skip
    steps = steps or _STEPS.get(device.type, _STEPS_ELSEWHERE)
    rounds = min(_ROUNDS, steps)
    block, more = divmod(steps, rounds)
    result = Result(config, device, block, refused=refused, steps=steps)
    with contextlib.ExitStack() as stack:
        workers = _start(chosen, config, num_classes, result, stack, tell)
        tell(f"{steps} steps in {rounds} rounds")
        for round_ in range(rounds):
            size = block + (round_ < more)
            for variant in _rotated(list(workers), round_):
                _ask(workers, result, variant, functools.partial(_time, size))
        for variant in list(workers):
            _ask(workers, result, variant, _add_facts)
        best = result.fastest
        if best is not None:
            tell("loader alone, step alone, end to end")
            _ask(workers, result, best.variant, lambda row, worker: result.rates.update(_rates(worker, result)))
    return result


def _names(config: ResolvedConfig, variants: Sequence[str] | None) -> Sequence[str]:
    if variants is None and config.plan != "auto":
        return ("naive", config.plan, "floor")
    return NAMES if variants is None else variants


def _left_out(device: torch.device, *, asked: bool) -> dict[str, str]:
    """Return the plans that cannot run here or, unless somebody asked for them, make no sense here."""
    if asked:
        reasons = {name: execution.refusal(name, device) for name in execution.PLANS}
    else:
        reasons = dict(execution.offered(device))
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _start(
    chosen: Sequence[Variant],
    config: ResolvedConfig,
    num_classes: int | None,
    result: Result,
    stack: contextlib.ExitStack,
    tell: Callable[[str], object],
) -> dict[Variant, Worker]:
    tell(f"starting {len(chosen)} processes")
    threads = torch.get_num_threads()
    workers = {v: stack.enter_context(started(Job(v, config, num_classes, threads))) for v in chosen}
    result.rows += [Row(variant) for variant in chosen]
    for variant in chosen:
        _ask(workers, result, variant, lambda row, worker: worker.wait())
    for variant in list(workers):  # one at a time: whoever chooses algorithms by their time needs the device alone
        tell(f"{variant.name}: first steps")
        _ask(workers, result, variant, _warm_up)
    return workers


def _rotated(variants: list[Variant], round_: int) -> list[Variant]:
    """Let another variant begin each round, so that none always follows the same one."""
    k = round_ % max(1, len(variants))
    return variants[k:] + variants[:k]


def _ask(
    workers: dict[Variant, Worker], result: Result, variant: Variant, action: Callable[[Row, Worker], object]
) -> None:
    """Let a worker fill in its row; one that fails is out, and the reason kept."""
    row = result.find(variant)
    assert row is not None
    try:
        action(row, workers[variant])
    except Refused as refused:
        del workers[variant]
        result.rows.remove(row)
        result.refused[variant.name] = str(refused)


def _time(steps: int, row: Row, worker: Worker) -> None:
    row.seconds.append(worker.ask("block", steps))


def _warm_up(row: Row, worker: Worker) -> None:
    row.first_loss = worker.ask("warm_up")


def _add_facts(row: Row, worker: Worker) -> None:
    facts = worker.ask("facts")
    row.peak_bytes, row.launches = facts["peak_bytes"], facts["launches"]


def _rates(worker: Worker, result: Result) -> dict[str, float]:
    block, batch = max(result.block, 5), result.config.batch_size
    passes = [
        {
            "loader": worker.ask("pass_through", block, step=False),
            "step": batch / worker.ask("block", block),
            "end_to_end": worker.ask("pass_through", block, step=True),
        }
        for _ in range(_PASSES)
    ]
    return {key: statistics.median(one[key] for one in passes) for key in passes[0]}
