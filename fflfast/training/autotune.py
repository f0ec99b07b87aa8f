"""Choose the execution plan of a run by timing real steps of it, and leave no trace of them."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from statistics import median
from typing import Any, NamedTuple

import rich
from rich import box
from rich.table import Table

from ..execution import Snapshot, create, offered
from ..streams import streams_of
from .errors import TrainingError
from .step import TrainStep

__all__ = ["Choice", "Timing", "choice_table", "choose"]

MARGIN = 0.02
"""By how much a plan has to beat a simpler one: less is within the noise of a machine and not worth the memory."""

_ROUNDS = 3
_UNTIMED_STEPS = 3
_PATIENCE = timedelta(seconds=30)  # until the others must have failed too


class Timing(NamedTuple):
    """What is known of a plan: its time, or why it has none.

    Attributes:
        name: of the plan.
        milliseconds: of a step, the median over rounds; None if it was not timed.
        reason: why it cannot be chosen; None if it can.
    """

    name: str
    milliseconds: float | None
    reason: str | None


class Choice(NamedTuple):
    """The plan to take, and what is known of each, the simplest first."""

    name: str
    timings: tuple[Timing, ...]

    @property
    def why(self) -> str:
        """One line on why this plan was chosen."""
        times = {timing.name: timing.milliseconds for timing in self.timings if timing.milliseconds is not None}
        if not times:
            return "the only plan that this machine offers"
        if len(times) == 1:
            return "the only plan that could run"
        simplest = next(iter(times))
        if self.name == simplest:
            return f"no other plan is {MARGIN:.0%} faster"
        return f"{times[simplest] / times[self.name]:.2f} × as fast as {simplest}"


def choose(
    take_step: TrainStep,
    batches: Sequence[Any],
    *,
    candidates: Sequence[tuple[str, str | None]] | None = None,
    steps: int = 30,
    images: int | None = None,
    lead: int = 0,
    tell: Callable[[Table], Any] = rich.print,
    clock: Callable[[], float] = time.perf_counter,
) -> Choice:
    """Time the plans on real steps, let ``take_step`` use the best, and tell which one it is.

    Each plan takes ``steps`` steps, in rounds between those of the others, the device idle at both ends of a round.
    After each round every tensor of ``take_step.changing()`` and the generators are what they were before, bit for
    bit. A plan that fails is left out with its message. Where only one plan is offered nothing is timed. Among several
    processes a plan's time is that of the slowest, and all choose the same.

    Args:
        take_step: of the run, in training mode.
        batches: inputs of full batches, used in turn; may be empty where only one plan is offered.
        candidates: names, the simplest plan first, each with why it is left out or None; default: what
            `fflfast.execution.offered` says.
        steps: timed for each plan.
        images, lead: of each batch, as `TrainStep.__call__` takes them.
        tell: prints the table; on the main process only.
        clock: seconds.

    Raises:
        ValueError: no batch to time plans on, fewer than one step, or no candidate that may be chosen.
        TrainingError: a plan failed on one process in the middle of a step, where the others wait for it.
        Exception: whatever the last plan raised, if none could run.
    """
    processes = take_step.processes
    if candidates is None:
        candidates = offered(take_step.device, processes=processes.count, backend=processes.backend)
    reasons = dict(candidates)
    names = [name for name, reason in candidates if reason is None]
    if steps < 1 or not names or (len(names) > 1 and not batches):
        raise ValueError(f"choose: got {len(batches)} batches, {steps} steps and {len(names)} plans that may be chosen")
    trial = _Trial(take_step, batches, max(1, steps // _ROUNDS), images, lead, clock)
    rounds: dict[str, list[float]] = {name: [] for name in names}
    if len(names) > 1:
        for _ in range(_ROUNDS):
            for name in list(rounds):
                milliseconds, problem = trial.run(name)
                if problem is None:
                    rounds[name].append(milliseconds)
                else:
                    reasons[name] = problem
                    del rounds[name]
    if not rounds:
        raise trial.error or TrainingError(f"no execution plan could run: {reasons}")
    times = {name: median(values) for name, values in rounds.items() if values}
    name = _preferred(times) if times else names[0]
    choice = Choice(name, tuple(Timing(n, times.get(n), reason) for n, reason in reasons.items()))
    take_step.use(create(name, take_step.learner, take_step.device, processes=processes.count))
    if processes.main:
        tell(choice_table(choice))
    return choice


class _Trial:
    """Runs rounds of steps that leave no trace."""

    def __init__(
        self,
        take_step: TrainStep,
        batches: Sequence[Any],
        steps: int,
        images: int | None,
        lead: int,
        clock: Callable[[], float],
    ) -> None:
        self.take_step, self.batches, self.steps, self.clock = take_step, batches, steps, clock
        self.images, self.lead = images, lead
        self.error: Exception | None = None

    def run(self, name: str) -> tuple[float, str | None]:
        """Return milliseconds of a step, the largest over the processes, and what went wrong on any of them."""
        milliseconds, problem = 0.0, None
        try:
            milliseconds = self._round(name)
        except TrainingError:  # a lost process, say, is no fault of the plan
            raise
        except Exception as error:
            self.error = error
            for part in filter(None, (error, error.__cause__)):
                traceback.clear_frames(part.__traceback__)  # which hold a copy of everything that changes
            problem = str(error) or type(error).__name__
        # A process that fails alone leaves the others in a collective that it never enters: no more of those here.
        processes = self.take_step.processes
        mine = json.dumps([milliseconds, problem])
        reports = processes.survey(mine) if problem is None else processes.survey(mine, _PATIENCE)
        if reports is None:
            raise TrainingError(
                f"plan {name} failed on process {processes.rank} of {processes.count} and not on all ({problem}), so "
                "that they cannot go on together; take --plan serial"
            )
        all_ = [json.loads(report) for report in reports]
        return max(ms for ms, _ in all_), next((p for _, p in all_ if p is not None), None)

    def _round(self, name: str) -> float:
        take_step = self.take_step
        device, processes = take_step.device, take_step.processes
        finish = streams_of(device).finish
        before = Snapshot(take_step.changing, device)
        try:
            take_step.use(create(name, take_step.learner, device, processes=processes.count))
            self._take(_UNTIMED_STEPS)  # a graph is captured here, and memory and plans of libraries are found
            finish()
            start = self.clock()
            self._take(self.steps)
            finish()
            seconds = self.clock() - start
        finally:
            before.restore()
        before.check()
        return 1000 * seconds / self.steps

    def _take(self, steps: int) -> None:
        for k in range(steps):
            self.take_step(self.batches[k % len(self.batches)], epoch=0, step=0, images=self.images, lead=self.lead)


def _preferred(times: dict[str, float]) -> str:
    """Return the plan that beats each simpler one that is preferred so far by `MARGIN`."""
    best, *others = times
    for name in others:
        if times[name] <= times[best] * (1 - MARGIN):
            best = name
    return best


def choice_table(choice: Choice) -> Table:
    """Return a table of the plans: time of a step, speed relative to the simplest, and why or why not."""
    table = Table(
        title="Execution plans", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, caption_justify="left"
    )
    table.add_column("plan")
    table.add_column("ms/step", justify="right")
    table.add_column("speed", justify="right")
    table.add_column("")
    base = next((t.milliseconds for t in choice.timings if t.milliseconds is not None), None)
    for name, milliseconds, reason in choice.timings:
        shown = ("–", "–") if milliseconds is None or base is None else _shown(milliseconds, base)
        chosen = name == choice.name
        note = f"chosen: {choice.why}" if chosen else reason or ""
        table.add_row(name, *shown, note, style="bold" if chosen else None)
    return table


def _shown(milliseconds: float, base: float) -> tuple[str, str]:
    return f"{milliseconds:.2f}", f"{base / milliseconds:.2f} ×"
