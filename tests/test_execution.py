"""Every execution plan trains as the serial one does, bit for bit, and starts without a trace."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from plan_steps import Step, batches, make_learner
from training_runs import assert_same

from fflfast import execution
from fflfast.cohort import serial
from fflfast.data import Batch
from fflfast.execution import PLANS, create
from fflfast.methods import DML, Single

CPU = torch.device("cpu")


def train(name, data, *, full=8, between=None, **options):
    """Take a step on each batch by a plan; return what came out, all that changed, and the step itself."""
    views = options.pop("views", 0)
    step = Step(make_learner(**options), views=views)
    plan = create(name, step.learner, CPU)
    torch.manual_seed(3)
    outputs = []
    for k, batch in enumerate(data):
        output = plan(step.body, batch, capture=len(batch.target) == full, changing=step.changing)
        outputs.append(
            torch.cat([output.loss.reshape(1), output.terms, *(z.flatten() for z in output.logits.values())])
        )
        if between is not None:
            between(step, k)
    return outputs, step.named(), step


@pytest.mark.parametrize("name", ["streams", "graph"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"trunk": False, "method": DML},
        {"networks": 6},
        {"networks": 3, "views": 3},
        {"networks": 1, "method": Single},
    ],
    ids=["trunk", "no trunk", "more networks than streams", "views", "one network"],
)
def test_every_plan_gives_the_bits_of_serial(name, options):
    data = batches(22)
    data[9] = Batch(*(x[:3] for x in data[9]))  # a short batch in between
    want, want_state, _ = train("serial", data, **options)
    got, got_state, step = train(name, data, **options)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    assert_same(got_state, want_state)
    extra = execution.Graph.warmup_steps if name == "graph" else 0
    parts = [*step.learner.cohort.sub_networks, step.learner.cohort.trunk]
    assert step.bodies == len(data) + extra
    assert {part.forwards for part in parts if part is not None} == {len(data) + extra}


def test_evaluation_between_steps_changes_nothing():
    images = batches(1)[0].images.float()

    def evaluate(step, k):
        step.learner.eval()
        with torch.no_grad():
            predictions = step.learner.predict(images)
        assert all(torch.equal(predictions[name], value) for name, value in predict_serially(step, images).items())
        step.learner.train()

    data = batches(6)
    want = train("serial", data)[1]
    for name in ("streams", "graph"):
        assert_same(train(name, data, between=evaluate)[1], want)


def predict_serially(step, images):
    runner, step.learner.cohort.runner = step.learner.cohort.runner, serial
    with torch.no_grad():
        predictions = step.learner.predict(images)
    step.learner.cohort.runner = runner
    return predictions


@pytest.fixture
def graph():
    step = Step(make_learner())
    plan = create("graph", step.learner, CPU)
    yield step, plan
    plan.close()


def test_capture_leaves_no_trace(graph):
    step, plan = graph
    batch = batches(1)[0]
    before, seen = step.named(), []

    def first_real(inputs):
        if step.bodies == plan.warmup_steps:
            seen.append(step.named())
        return step.body(inputs)

    plan(first_real, batch, capture=True, changing=step.changing)
    assert_same(seen[0], before)
    assert int(step.steps) == 1
    assert all(parameter.grad is None for parameter in step.learner.parameters())


def test_the_restore_of_the_warm_up_is_what_makes_it_so(graph, monkeypatch):
    step, plan = graph
    monkeypatch.setattr(execution.Snapshot, "restore", lambda self: None)
    plan(step.body, batches(1)[0], capture=True, changing=step.changing)
    assert int(step.steps) == 1 + plan.warmup_steps


def test_several_processes_warm_up_as_long_as_ddp_measures_itself():
    step = Step(make_learner())
    plan = create("graph", step.learner, CPU, processes=2)
    plan(step.body, batches(1)[0], capture=True, changing=step.changing)
    assert step.bodies == 11 + 1


def test_a_graph_reads_its_own_buffers(graph):
    """The inputs of a call may be overwritten or freed as soon as it returns, and are never written."""
    step, plan = graph
    addresses = []

    def body(batch):
        addresses.append([x.data_ptr() for x in batch])
        return step.body(batch)

    data = batches(3)
    copies = [[x.clone() for x in batch] for batch in data]
    for batch in data:
        plan(body, batch, capture=True, changing=step.changing)
    assert len({tuple(a) for a in addresses}) == 1
    given = {x.data_ptr() for batch in data for x in batch}
    assert not given & set(addresses[0])
    assert all(
        torch.equal(x, y) for batch, kept in zip(data, copies, strict=True) for x, y in zip(batch, kept, strict=True)
    )


def test_what_a_graph_cannot_take_runs_eagerly(graph):
    """Other shapes, dtypes, plain values and bodies, each on the tensors that were given."""
    step, plan = graph
    full, seen = batches(1)[0], []

    def body(inputs):
        seen.append((inputs[0].images.data_ptr(), inputs[1]))
        return step.body(inputs[0])

    def other(inputs):
        seen.append("other")
        return step.body(inputs[0])

    plan(body, (full, 8), capture=True, changing=step.changing)
    own = seen[-1][0]
    short = Batch(*(x[:4] for x in full))
    wide = Batch(torch.zeros(8, 3, 7, 7, dtype=torch.uint8), full.target, full.index)
    small_index = Batch(full.images, full.target, full.index.int())
    for batch, images in ((short, 8), (wide, 8), (small_index, 8), (full, 7)):
        plan(body, (batch, images), capture=True, changing=step.changing)
        assert seen[-1] == (batch.images.data_ptr(), images)
    plan(body, (full, 8), capture=False, changing=step.changing)
    assert seen[-1] == (full.images.data_ptr(), 8)
    plan(other, (full, 8), capture=True, changing=step.changing)
    assert seen[-1] == "other"
    plan(body, (full, 8), capture=True, changing=step.changing)
    assert seen[-1] == (own, 8)
    assert step.bodies == plan.warmup_steps + 8


def test_a_short_first_batch_waits_for_a_full_one(graph):
    step, plan = graph
    batch = batches(1)[0]
    plan(step.body, batch, capture=False, changing=step.changing)
    assert step.bodies == 1
    plan(step.body, batch, capture=True, changing=step.changing)
    assert step.bodies == 1 + plan.warmup_steps + 1


def test_a_step_that_cannot_be_captured_says_so_and_leaves_no_trace(graph):
    step, plan = graph
    batch, before = batches(1)[0], step.named()

    def waits(inputs):
        output = step.learner(Batch(inputs.images.float(), inputs.target, inputs.index))
        output.loss.backward()
        raise RuntimeError("called a synchronizing CUDA operation\nand a second line")

    line = waits.__code__.co_firstlineno + 3
    message = (
        rf"\(RuntimeError: called a synchronizing CUDA operation, at .*test_execution.py:{line}\);.*--plan streams"
    )
    with pytest.raises(RuntimeError, match=message):
        plan(waits, batch, capture=True, changing=step.changing)
    assert_same(step.named(), before)
    assert all(parameter.grad is None for parameter in step.learner.parameters())
    plan(step.body, batch, capture=True, changing=step.changing)  # and is not in the way of one that can
    assert int(step.steps) == 1


def test_a_step_that_replaces_a_tensor_is_refused(graph):
    step, plan = graph

    def replaces(batch):
        step.loss_sum = step.loss_sum + 1
        return step.body(batch)

    with pytest.raises(RuntimeError, match=r"made or replaced 1 .* of shape \(\)"):
        plan(replaces, batches(1)[0], capture=True, changing=step.changing)


@pytest.mark.parametrize("name", PLANS)
def test_no_autograd_graph_outlives_a_step(name):
    step = Step(make_learner())
    nodes = []

    def body(batch):
        output = step.body(batch)
        nodes.append(weakref.ref(output.loss.grad_fn))
        return output

    plan = create(name, step.learner, CPU)
    output = plan(body, batches(1)[0], capture=True, changing=step.changing)
    assert not output.loss.requires_grad
    assert not any(z.requires_grad for z in output.logits.values())
    gc.collect()
    assert nodes[-1]() is None


@pytest.mark.parametrize("name", PLANS)
def test_an_error_in_a_sub_network_passes_and_the_next_step_works(name):
    step = Step(make_learner())
    plan = create(name, step.learner, CPU)
    batch = batches(1)[0]
    plan(step.body, batch, capture=True, changing=step.changing)
    second = step.learner.cohort.sub_networks[1]
    handle = second.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("broken")))
    with pytest.raises(KeyError, match="broken"):
        plan(step.body, batch, capture=True, changing=step.changing)
    handle.remove()
    plan(step.body, batch, capture=True, changing=step.changing)
    assert int(step.steps) == 2


def test_a_closed_graph_lets_go_of_its_buffers(graph):
    step, plan = graph
    seen = []

    def body(batch):
        seen.append(weakref.ref(batch.images))
        return step.body(batch)

    plan(body, batches(1)[0], capture=True, changing=step.changing)
    gc.collect()
    assert seen[-1]() is not None
    plan.close()
    gc.collect()
    assert seen[-1]() is None
