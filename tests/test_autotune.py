"""The choice of a plan by measurement: what is timed, what is preferred, and that no trace of it stays."""

from __future__ import annotations

import io
import json
from datetime import timedelta

import pytest
import torch
from plan_steps import Step, batches, make_learner
from rich.console import Console
from steps import batches as step_batches
from steps import bits, make, same_bits
from training_runs import assert_same

from fflfast.execution import PLANS, Snapshot, Streams, create
from fflfast.streams import HostStreams
from fflfast.training import autotune
from fflfast.training.autotune import Choice, Timing, choice_table, choose
from fflfast.training.errors import TrainingError
from fflfast.training.processes import SINGLE, Processes

ALL = tuple((name, None) for name in PLANS)


class TakeStep(Step):
    """A step with the interface of `TrainStep`; remembers which plan took each step."""

    def __init__(self, processes: Processes = SINGLE) -> None:
        super().__init__(make_learner())
        self.device, self.processes = torch.device("cpu"), processes
        self.plan = create("serial", self.learner, self.device)
        self.taken: list[str] = []
        self.calls: list[dict] = []

    def use(self, plan):
        self.plan.close()
        self.plan = plan

    def __call__(self, inputs, **options):
        self.taken.append(self.plan.name)
        self.calls.append({"inputs": inputs, **options})
        return self.plan(self.body, inputs, capture=True, changing=self.changing)


class Clock:
    """Steps of each plan take a given time; a round of `autotune` lasts from one call to the next."""

    def __init__(self, take_step, steps=10, **milliseconds) -> None:
        self.take_step, self.steps, self.milliseconds, self.now = take_step, steps, milliseconds, 0.0
        self.calls = dict.fromkeys(milliseconds, 0)

    def __call__(self):
        name = self.take_step.plan.name
        times = self.milliseconds[name]
        if isinstance(times, list):  # one a round
            times = times[self.calls[name] // 2]
        self.calls[name] += 1
        self.now += times * self.steps / 1000
        return self.now


def chosen(*, processes=SINGLE, candidates=ALL, tell=lambda table: None, **milliseconds):
    take_step = TakeStep(processes)
    clock = Clock(take_step, **milliseconds)
    choice = choose(take_step, batches(2), candidates=candidates, tell=tell, clock=clock)
    assert take_step.plan.name == choice.name
    return choice


@pytest.mark.parametrize(
    ("serial", "streams", "graph", "want"),
    [
        (10.0, 9.9, 9.85, "serial"),  # less than 2 % is noise
        (10.0, 9.7, 9.6, "streams"),
        (10.0, 9.9, 9.7, "graph"),  # streams were not preferred, so only serial has to be beaten
        (10.0, 11.0, 5.0, "graph"),
        (10.0, 9.8, 9.8, "streams"),  # 2 % exactly is enough
        (10.0, 12.0, 14.0, "serial"),
    ],
)
def test_what_is_preferred(serial, streams, graph, want):
    choice = chosen(serial=serial, streams=streams, graph=graph)
    assert choice.name == want
    assert [round(timing.milliseconds, 9) for timing in choice.timings] == [serial, streams, graph]


def test_the_median_round_counts():
    choice = chosen(serial=[10.0, 10.0, 99.0], streams=[1.0, 20.0, 20.0], graph=[5.0, 90.0, 4.0])
    assert [round(timing.milliseconds, 9) for timing in choice.timings] == [10.0, 20.0, 5.0]
    assert choice.name == "graph"


def test_no_trace_is_left_and_rounds_alternate():
    take_step, data = TakeStep(), batches(3)
    create("serial", take_step.learner, "cpu")(take_step.body, data[0], capture=True, changing=take_step.changing)
    torch.manual_seed(5)
    before = take_step.named()
    choice = choose(take_step, data, candidates=ALL, steps=9, tell=lambda table: None)
    assert_same(take_step.named(), before)
    assert all(parameter.grad is None for parameter in take_step.learner.parameters())
    one_round = [name for name in PLANS for _ in range(3 + 3)]
    assert take_step.taken == 3 * one_round
    assert [call["inputs"] is data[k] for k, call in enumerate(take_step.calls[:3])] == [True] * 3
    assert all(timing.milliseconds > 0 for timing in choice.timings)


def test_the_restore_is_what_leaves_no_trace(monkeypatch):
    take_step = TakeStep()
    monkeypatch.setattr(Snapshot, "restore", lambda self: None)
    choose(take_step, batches(1), candidates=ALL[:2], steps=3, tell=lambda table: None)
    assert int(take_step.steps) == 2 * 3 * (3 + 1)


@pytest.mark.parametrize("options", [{}, {"nan": "skip", "ema": 0.9, "method": "training_runs:Noisy"}])
def test_the_trainers_step_goes_on_as_if_nothing_had_been(options):
    """Losses, accuracies, averages and generators included; the schedule's scalars are set again."""
    results = []
    for tuned in (False, True):
        torch.manual_seed(0)
        step = make(**options)
        data = step_batches(step, 3)
        step(data[0], epoch=0, step=0)
        if tuned:
            choose(step, data, candidates=ALL, steps=3, tell=lambda table: None)
        outputs = [step(batch, epoch=0, step=k) for k, batch in enumerate(data[1:], start=1)]
        state = [*step.changing(), step.state.epoch, step.state.batch, *(output.loss for output in outputs)]
        results.append((bits(state), step.losses.read(), step.metric.read(), torch.get_rng_state()))
    assert same_bits(results[0][0], results[1][0])
    assert results[0][1:3] == results[1][1:3]
    assert torch.equal(results[0][3], results[1][3])


def test_one_offered_plan_is_not_timed():
    take_step, tables = TakeStep(), []
    choice = choose(take_step, batches(1), tell=tables.append)
    assert take_step.taken == []
    reason = "a CPU has no streams: runs as serial"
    assert choice == Choice(
        "serial", (Timing("serial", None, None), Timing("streams", None, reason), Timing("graph", None, reason))
    )
    shown = text(tables[0])
    assert shown.count(reason) == 2
    assert "chosen: the only plan that this machine offers" in shown


def fails(monkeypatch, *names, error=None):
    """Let plans fail in the middle of a step: after the optimizer, before the counter."""
    error = error or ValueError("no room\nfor this")

    def body(self, batch):
        output = Step.body(self, batch)
        if self.plan.name in names:
            raise error
        return output

    monkeypatch.setattr(TakeStep, "body", body)


def test_a_plan_that_fails_is_refused_and_leaves_no_trace(monkeypatch):
    fails(monkeypatch, "streams")
    take_step = TakeStep()
    before = take_step.named()
    choice = choose(take_step, batches(1), candidates=ALL, steps=3, tell=lambda table: None)
    assert_same(take_step.named(), before)
    assert choice.timings[1] == Timing("streams", None, "no room\nfor this")
    assert choice.name in ("serial", "graph")
    assert take_step.taken.count("streams") == 1  # and is not tried again


def test_a_step_that_cannot_be_captured_is_refused_with_the_reason(monkeypatch):
    fails(monkeypatch, "graph")
    choice = choose(TakeStep(), batches(1), candidates=ALL, steps=3, tell=lambda table: None)
    assert choice.timings[2].reason.startswith("plan graph: this step cannot be captured (ValueError: no room, at ")
    assert choice.timings[2].milliseconds is None


def test_where_no_plan_can_run_the_error_passes(monkeypatch):
    fails(monkeypatch, *PLANS)
    take_step = TakeStep()
    before = take_step.named()
    with pytest.raises(RuntimeError, match="no room") as raised:
        choose(take_step, batches(1), candidates=ALL, steps=3, tell=lambda table: None)
    assert isinstance(raised.value.__cause__, ValueError)
    assert_same(take_step.named(), before)


def test_a_step_that_replaces_a_tensor_is_refused_as_it_leaves_a_trace(monkeypatch):
    def body(self, batch):
        self.loss_sum = self.loss_sum + 1
        return Step.body(self, batch)

    monkeypatch.setattr(TakeStep, "body", body)
    with pytest.raises(RuntimeError, match="made or replaced 1"):
        choose(TakeStep(), batches(1), candidates=ALL[:2], steps=3, tell=lambda table: None)


def test_an_error_of_the_run_is_no_fault_of_a_plan(monkeypatch):
    fails(monkeypatch, "streams", error=TrainingError("process 1 is lost"))
    with pytest.raises(TrainingError, match="process 1 is lost"):
        choose(TakeStep(), batches(1), candidates=ALL, steps=3, tell=lambda table: None)


class Two(Processes):
    """Process ``rank`` of two; ``other`` is what the other reports of each trial, None where it is silent."""

    count = 2
    backend = "cpu:gloo,cuda:nccl"

    def __init__(self, rank, other) -> None:
        self.rank, self.other, self.patience = rank, iter(other), []

    def survey(self, report, patience=None):
        self.patience.append(patience)
        other = next(self.other)
        if other is None:
            return None
        return [report, json.dumps(other)] if self.rank == 0 else [json.dumps(other), report]


def test_the_slowest_process_counts_and_all_choose_the_same():
    tables = []
    here, there = {"serial": 10.0, "streams": 1.0, "graph": 1.0}, {"serial": 4.0, "streams": 3.0, "graph": 20.0}
    for rank, mine, others in ((0, here, there), (1, there, here)):
        other = [(milliseconds, None) for milliseconds in others.values()] * 3
        choice = chosen(processes=Two(rank, other), **mine, tell=tables.append)
        assert [round(timing.milliseconds, 9) for timing in choice.timings] == [10.0, 3.0, 20.0]
        assert choice.name == "streams"
    assert len(tables) == 1


def test_a_plan_that_fails_in_one_process_is_refused_in_all():
    other = [(4.0, None), (0.0, "out of memory"), (3.0, None), *[(4.0, None), (3.0, None)] * 2]
    choice = chosen(processes=Two(0, other), serial=10.0, streams=1.0, graph=9.0)
    assert choice.timings[1] == Timing("streams", None, "out of memory")
    assert choice.name == "graph"


def test_a_process_that_fails_while_the_others_wait_for_it_ends_the_run(monkeypatch):
    fails(monkeypatch, "streams", error=RuntimeError("out of memory"))
    take_step = TakeStep()
    take_step.processes = two = Two(1, [(4.0, None), None])
    with pytest.raises(TrainingError, match=r"streams failed on process 1 of 2 and not on all \(out of memory\)"):
        choose(take_step, batches(1), candidates=ALL, steps=3, tell=lambda table: None)
    assert two.patience == [None, timedelta(seconds=30)]


def test_sizes_reach_the_step():
    take_step = TakeStep()
    choose(take_step, batches(1), candidates=ALL[:2], steps=3, images=16, lead=1, tell=lambda table: None)
    assert {(call["images"], call["lead"]) for call in take_step.calls} == {(16, 1)}


def test_the_device_is_idle_at_both_ends_of_a_round(monkeypatch):
    events = []

    class Streams(HostStreams):
        def finish(self):
            events.append("idle")

    monkeypatch.setattr(autotune, "streams_of", lambda device: Streams())
    take_step = TakeStep()

    def clock():
        events.append("clock")
        return float(len(events))

    choose(take_step, batches(1), candidates=ALL[:2], steps=3, tell=lambda table: None, clock=clock)
    assert events == ["idle", "clock", "idle", "clock"] * 6


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([], {"candidates": ALL}, "0 batches"),
        (None, {"steps": 0}, "0 steps"),
        (None, {"candidates": [("serial", "not wanted")]}, "0 plans"),
    ],
)
def test_nothing_to_choose_from(data, options, message):
    with pytest.raises(ValueError, match=message):
        choose(TakeStep(), batches(1) if data is None else data, **options)


def text(table) -> str:
    console = Console(width=120, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_the_table():
    timings = (Timing("serial", 12.0, None), Timing("streams", 10.0, None), Timing("graph", None, "it waits"))
    lines = [line.split() for line in text(choice_table(Choice("streams", timings))).splitlines()]
    assert ["serial", "12.00", "1.00", "×"] in lines
    assert ["streams", "10.00", "1.20", "×", "chosen:", "1.20", "×", "as", "fast", "as", "serial"] in lines
    assert ["graph", "–", "–", "it", "waits"] in lines


@pytest.mark.parametrize(
    ("name", "times", "why"),
    [
        ("serial", (10.0, 9.9, 12.0), "no other plan is 2% faster"),
        ("graph", (10.0, None, 2.5), "4.00 × as fast as serial"),
        ("serial", (10.0, None, None), "the only plan that could run"),
        ("serial", (None, None, None), "the only plan that this machine offers"),
    ],
)
def test_why(name, times, why):
    assert Choice(name, tuple(Timing(n, ms, None) for n, ms in zip(PLANS, times, strict=True))).why == why


def test_plans_of_the_trial_are_closed(monkeypatch):
    closed = []
    close = Streams.close
    monkeypatch.setattr(Streams, "close", lambda self: (closed.append(self), close(self)))
    take_step = TakeStep()
    choose(
        take_step,
        batches(1),
        candidates=ALL[:2],
        steps=3,
        tell=lambda table: None,
        clock=Clock(take_step, 1, serial=1, streams=2),
    )
    assert len(closed) == 3
    assert take_step.plan.name == "serial"
