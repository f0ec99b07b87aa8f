"""Which plans are offered where, and how a plan takes over a cohort: its runner, copies, compilation, DDP."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
from plan_steps import Step, batches, make_learner
from training_runs import assert_same

from fflfast import execution
from fflfast.cohort import serial
from fflfast.execution import create, offered, refusal
from fflfast.methods import DML
from fflfast.streams import HostStreams

CPU = torch.device("cpu")


def test_plans_give_the_runner_back():
    learner = make_learner()

    def own(thunks):
        return serial(thunks)

    learner.cohort.runner = own
    first = create("streams", learner, CPU)
    assert learner.cohort.runner is not own
    second = create("graph", learner, CPU)
    first.close()  # the new plan is in use
    assert learner.cohort.runner not in (own, serial)
    second.close()
    assert learner.cohort.runner is own
    second.close()
    assert learner.cohort.runner is own


@pytest.mark.parametrize("name", ["streams", "graph"])
def test_copies_of_a_learner_run_serially(name):
    learner = make_learner()
    plan = create(name, learner, CPU)
    for copied in (copy.deepcopy(learner), pickle.loads(pickle.dumps(learner))):
        assert copied.cohort.runner is serial
    assert learner.cohort.runner is not serial
    plan.close()


class UntouchedStreams(HostStreams):
    """Fails where it is used."""

    def wait(self, waiter, waited):
        raise AssertionError("a stream waits")


@pytest.mark.parametrize("name", ["streams", "graph"])
def test_dynamo_sees_the_serial_runner(name, monkeypatch):
    """Someone compiles the whole learner: one graph, no fork in it, and the numbers of the learner as it is."""
    images = batches(1)[0].images.float()
    learner = make_learner(method=DML).eval()
    want = learner.cohort(images).logits
    monkeypatch.setattr(execution, "streams_of", lambda device: UntouchedStreams())
    plan = create(name, learner, CPU)
    compiled = torch.compile(lambda x: learner.cohort(x).logits, backend="eager", fullgraph=True)
    with torch.no_grad():
        got = compiled(images)
        with pytest.raises(AssertionError, match="a stream waits"):
            learner.cohort(images)
    plan.close()
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("name", ["streams", "graph"])
def test_compiled_sub_networks(name):
    """`module.compile()` on each part, as the trainer does it: still the bits of serial."""
    states = []
    for plan_name in ("serial", name):
        step = Step(make_learner())
        for part in (step.learner.cohort.trunk, *step.learner.cohort.sub_networks):
            part.compile(backend="aot_eager")
        plan = create(plan_name, step.learner, CPU)
        torch.manual_seed(3)
        for batch in batches(4):
            plan(step.body, batch, capture=True, changing=step.changing)
        states.append(step.named())
    assert_same(*states)


def test_a_shared_buffer_is_refused():
    learner = make_learner(networks=3)
    first, _, third = learner.cohort.sub_networks
    third.norm.num_batches_tracked = first.norm.num_batches_tracked
    for name in ("streams", "graph"):
        with pytest.raises(ValueError, match=r"sub-networks 0 and 2 share the buffer 'norm.num_batches_tracked'"):
            create(name, learner, CPU)
    assert learner.cohort.runner is serial


@pytest.mark.parametrize(
    ("name", "device", "processes", "backend", "match"),
    [
        ("serial", "mps", 4, "gloo", None),
        ("streams", "cpu", 2, "gloo", None),
        ("streams", "cuda", 2, "cpu:gloo,cuda:nccl", None),
        ("streams", "mps", 1, None, "type mps has no"),
        ("graph", "cpu", 1, None, None),
        ("graph", "cuda:3", 1, None, None),
        ("graph", "mps", 1, None, "type mps has no"),
        ("graph", "cuda", 2, "cpu:gloo,cuda:nccl", None),
        ("graph", "cuda", 2, "gloo", "NCCL on CUDA only, these use gloo on cuda"),
        ("graph", "cpu", 2, "gloo", "NCCL on CUDA only, these use gloo on cpu"),
        ("graph", "cuda", 2, None, "these use no backend"),
    ],
)
def test_refusal(name, device, processes, backend, match):
    reason = refusal(name, device, processes=processes, backend=backend)
    assert (reason is None) if match is None else match in reason


def test_offered():
    assert offered("cuda") == (("serial", None), ("streams", None), ("graph", None))
    reason = "a CPU has no streams: runs as serial"
    assert offered("cpu") == (("serial", None), ("streams", reason), ("graph", reason))
    assert [why is None for _, why in offered("cuda", processes=2, backend="gloo")] == [True, True, False]
    assert "NCCL" in dict(offered("cpu", processes=2, backend="gloo"))["graph"]


@pytest.mark.parametrize("call", [lambda: refusal("stream", "cpu"), lambda: create("auto", make_learner(), CPU)])
def test_an_unknown_plan(call):
    with pytest.raises(ValueError, match="plan must be one of serial, streams, graph, got"):
        call()


class AsideStreams(HostStreams):
    """Knows whether work goes aside."""

    inside = False

    @contextlib.contextmanager
    def aside(self):
        self.inside = True
        yield
        self.inside = False


def test_ddp_under_a_graph_is_built_by_the_documented_recipe(monkeypatch):
    """On the stream of the capture, and only where NCCL does not watch for errors; else it is refused at once."""
    streams = AsideStreams()
    monkeypatch.setattr(execution, "streams_of", lambda device: streams)
    plan = create("graph", make_learner(), "cuda", processes=2)
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", raising=False)
    with pytest.raises(RuntimeError, match="TORCH_NCCL_ASYNC_ERROR_HANDLING=0"):
        plan.construction()
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    with plan.construction():
        assert streams.inside
    assert not streams.inside
    for name, processes in (("graph", 1), ("streams", 2), ("serial", 2)):
        with create(name, make_learner(), "cuda", processes=processes).construction():
            assert not streams.inside
