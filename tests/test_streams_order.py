"""Fork and join order all that crosses streams, and hold memory for as long as another stream may use it."""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest
import torch
from plan_steps import Step, batches, make_learner
from simulated_streams import Device, Race, Tape, Value
from training_runs import assert_same

from fflfast import execution
from fflfast.cohort import serial
from fflfast.execution import create
from fflfast.streams import POOL, ForkJoin

SEEDS = range(40)


class Token:
    """Its life can be watched; it may be put on a tensor."""


class Training:
    """Steps and evaluations of a cohort on a simulated device, with a branch that only reads detached outputs."""

    def __init__(self, device: Device, runner, networks: int, seed: int) -> None:
        self.device, self.runner, self.networks = device, runner, networks
        self.tape = Tape(device, seed)
        names = ["trunk", "fusion", "branch", *(f"{part}{k}" for part in "abc" for k in range(networks))]
        self.parameters = {name: device.op() for name in names}
        self.buffers = [device.op() for _ in range(networks)]
        self.held: list[int] = []

    def outputs(self):
        """Trunk and sub-networks: the logits and feature map of each."""
        tape, weights = self.tape, self.parameters
        trunk = tape.apply(self.images, parameter=weights["trunk"])

        def thunk(k):
            def run():
                hidden = tape.apply(trunk, parameter=weights[f"a{k}"], buffer=self.buffers[k])
                feature = tape.apply(hidden, parameter=weights[f"b{k}"])
                return tape.apply(feature, parameter=weights[f"c{k}"]), feature

            return run

        return self.runner([thunk(k) for k in range(self.networks)])

    def forward(self):
        tape, weights = self.tape, self.parameters
        self.images = Value(self.device.op())
        outputs = self.outputs()
        branch = tape.apply(self.images, parameter=weights["branch"])
        for logits, feature in outputs:
            branch = tape.apply(branch, logits.detach(), feature.detach(), parameter=weights["branch"])
        fused = tape.apply(*(feature for _, feature in outputs), parameter=weights["fusion"])
        return tape.apply(*(logits for logits, _ in outputs), fused, branch)

    def step(self, **options):
        """Forward, backward, an optimizer step, and what reads the buffers."""
        loss = self.forward()
        self.tape.backward(loss, **options)
        for parameter, gradient in self.tape.gradients:
            self.device.op([gradient], [parameter])
        self.tape.gradients.clear()
        self.device.op(self.buffers)

    def evaluate(self):
        """A forward without gradients: nothing is saved."""
        with torch.no_grad():
            self.images = Value(self.device.op())
            for logits, feature in self.outputs():
                self.device.op([logits.block, feature.block])
        self.tape.nodes.clear()


def history(runner_class=ForkJoin, *, skip=(), networks=3, seed=0) -> Device:
    """Steps, one of two forwards, evaluations, and a step that fails in its backward pass; raises Race."""
    device = Device(skip)
    runner = runner_class(device, serial)
    training = Training(device, runner, networks, seed)
    for _ in range(2):
        with runner.step():
            training.step()
    with runner.step():  # two parts of an accumulated batch
        training.step()
        training.step()
    training.evaluate()
    training.evaluate()
    with contextlib.suppress(ArithmeticError), runner.step():
        training.step(fails_after=9 + seed % (3 * networks))
    training.tape.gradients.clear()
    training.evaluate()
    with runner.step():
        training.step()
    return device


def races(**options) -> list[str]:
    found = []
    for seed in SEEDS:
        try:
            history(seed=seed, **options)
        except Race as race:
            found.append(str(race))
    return found


@pytest.mark.parametrize("networks", [2, 3, POOL + 2])
def test_no_work_meets_work_of_another_stream(networks):
    assert races(networks=networks) == []


def test_the_simulation_uses_every_stream():
    device = history(networks=3)
    assert set(device.clocks) == {"default", "side0", "side1", "side2"}
    assert min(device.clock(stream)[stream] for stream in device.clocks) > 30
    assert set(history(networks=POOL + 2).clocks) == {"default", *device.sides(POOL)}


WAITS = {"fork": range(3), "join": range(3, 6)}


@pytest.mark.parametrize(
    "wait", range(6), ids=[f"{kind} {k}" for kind, span in WAITS.items() for k in range(len(span))]
)
def test_a_missing_wait_of_a_fork_or_join_is_noticed(wait):
    assert len(races(skip=(wait,))) == len(SEEDS)


def test_a_missing_wait_at_the_end_of_a_step_is_noticed():
    """After a backward pass that failed, autograd has not joined the streams."""

    class Impatient(ForkJoin):
        @contextlib.contextmanager
        def step(self):
            with super().step():
                try:
                    yield
                finally:
                    self._used = 0

    found = races(runner_class=Impatient)
    assert found
    assert all("side" in race for race in found)


class Forgetful(ForkJoin):
    """Lets go of something right behind the join."""

    keeps: int | None = None

    def __call__(self, thunks):
        results = super().__call__(thunks)
        if self._held:
            held = self._held.pop()
            self._held += [] if self.keeps is None else [held[self.keeps]]
        return results


class ForgetsInputs(Forgetful):
    keeps = 1


class ForgetsResults(Forgetful):
    keeps = 0


@pytest.mark.parametrize(("runner", "where"), [(ForgetsInputs, "default"), (ForgetsResults, "side")])
def test_missing_retention_is_noticed(runner, where):
    found = races(runner_class=runner)
    assert found
    assert all(race.startswith(f"a reuse of memory on {where}") for race in found), found


def test_with_gradients_outside_of_a_step_nothing_is_forked():
    device = Device()
    runner = ForkJoin(device, serial)
    ran = []
    thunks = [lambda k=k: ran.append((k, device.current)) for k in range(3)]
    runner(thunks)
    assert ran == [(0, "default"), (1, "default"), (2, "default")]
    assert device.waits == 0
    ran.clear()
    with torch.no_grad():
        runner(thunks)
    assert ran == [(0, "side0"), (1, "side1"), (2, "side2")]


def test_what_a_caller_does_to_the_results_does_not_let_go_of_them():
    runner = ForkJoin(Device(), serial)
    with runner.step():
        results = runner([Token, Token])
        alive = [weakref.ref(token) for token in results]
        results.clear()
        assert all(ref() is not None for ref in alive)
    assert all(ref() is None for ref in alive)


def test_streams_are_joined_and_let_go_after_an_error():
    device = Device()
    runner = ForkJoin(device, serial)

    def fails():
        device.op()
        raise KeyError("broken")

    with pytest.raises(KeyError), runner.step():
        runner([device.op, fails, device.op])
    assert device.current == "default"
    assert all(device.clock("default")[side] == device.clock(side)[side] for side in device.sides(3))
    gc.collect()
    assert set(device.free) == {"side0", "side1"}


@pytest.fixture
def device(monkeypatch):
    """A simulated device under the plans; what is computed is computed on the CPU."""
    device = Device()
    monkeypatch.setattr(execution, "streams_of", lambda _: device)
    return device


def traced(step, device):
    """Note on which stream each part runs."""
    seen: dict[str, list[str]] = {}

    def note(name):
        return lambda *_: seen.setdefault(name, []).append(device.current)

    cohort = step.learner.cohort
    cohort.trunk.register_forward_hook(note("trunk"))
    step.learner.method.register_forward_hook(note("method"))
    step.optimizer.register_step_post_hook(note("optimizer"))
    for k, network in enumerate(cohort.sub_networks):
        network.register_forward_hook(note(f"sub{k}"))
    return seen


@pytest.mark.parametrize("name", ["streams", "graph"])
def test_parts_of_a_real_step_run_where_they_should(name, device):
    step = Step(make_learner(POOL + 2))
    plan = create(name, step.learner, "cpu")
    seen = traced(step, device)
    plan(step.body, batches(1)[0], capture=True, changing=step.changing)
    ambient = "default" if name == "streams" else "capture"
    assert {part: set(streams) for part, streams in seen.items()} == {
        "trunk": {ambient},
        "method": {ambient},
        "optimizer": {ambient},
        **{f"sub{k}": {f"side{k % POOL}"} for k in range(POOL + 2)},
    }
    seen.clear()
    plan(step.body, batches(1)[0], capture=False, changing=step.changing)
    short = {"default"} if name == "graph" else None  # a graph's eager steps need no streams
    assert all(
        set(streams) == (short or {f"side{int(part[3:]) % POOL}"}) for part, streams in seen.items() if "sub" in part
    )


@pytest.mark.parametrize("name", ["streams", "graph"])
def test_inputs_and_results_live_until_the_streams_are_joined_again(name, device, monkeypatch):
    """When the last wait is enqueued, a thunk's input and result are still held, and right after it they are not."""
    step = Step(make_learner())
    plan = create(name, step.learner, "cpu")
    alive, seen = [], []

    def watch(_, inputs, output):
        for tensor in (inputs[0], output[1]):
            tensor.token = Token()
            alive.append(weakref.ref(tensor.token))

    step.learner.cohort.sub_networks[0].register_forward_hook(watch)
    wait = device.wait
    monkeypatch.setattr(
        device, "wait", lambda *pair: (wait(*pair), seen.append([ref() is not None for ref in alive[-2:]]))
    )
    plan(step.body, batches(1)[0], capture=True, changing=step.changing)
    assert seen[-1] == [True, True]
    assert [ref() for ref in alive] == [None] * len(alive)


@pytest.mark.parametrize("name", ["streams", "graph"])
def test_the_order_of_forks_changes_no_bit(name, device):
    data = batches(5)
    results = {}
    for plan_name in ("serial", name):
        step = Step(make_learner(3))
        plan = create(plan_name, step.learner, "cpu")
        torch.manual_seed(3)
        for batch in data:
            plan(step.body, batch, capture=True, changing=step.changing)
        results[plan_name] = step.named()
    assert_same(results[name], results["serial"])
