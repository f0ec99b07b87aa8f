"""One training step that several processes take together, seen from one of them."""

from __future__ import annotations

import weakref
from contextlib import suppress

import pytest
import torch
from steps import CPU, Alone, batches, bits, freeze_norms, gradients, make, rows, same_bits
from torch import nn

from fflfast import execution
from fflfast.training.processes import Processes


def test_the_leading_row_serves_mixing_and_is_dropped():
    whole, second = make(mixup=0.5), make(mixup=0.5, processes=Alone(1, 2))
    (batch,) = batches(whole, 1)
    seen = []
    for step in (whole, second):
        step.learner.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    whole(batch, epoch=0, step=4)
    output = second(rows(batch, 11, 24), epoch=0, step=4, images=24, lead=1)
    for part, all_rows in zip(seen[1], seen[0], strict=True):
        assert torch.equal(part, all_rows[12:])
    assert len(output.logits["fused"]) == 12


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_mean_of_the_processes_gradients_is_the_batches(accumulate):
    """Shares of unequal size; norms that do not look at the batch."""
    size, cut = 24, 9
    settings = {"dtype": torch.float64, "prepare": freeze_norms, "accumulate": accumulate}
    whole = make(**settings)
    (batch,) = batches(whole, 1, size)
    shares = [make(**settings, processes=Alone(rank, 2)) for rank in range(2)]
    seen = [gradients(step) for step in (whole, *shares)]
    whole(batch, epoch=0, step=0)
    for step, part in zip(shares, (rows(batch, 0, cut), rows(batch, cut, size)), strict=True):
        step(part, epoch=0, step=0, images=size)
    for name, gradient in seen[0].items():
        torch.testing.assert_close((seen[1][name] + seen[2][name]) / 2, gradient, rtol=1e-9, atol=1e-12)
    means = [step.losses.state() for step in (whole, *shares)]
    assert means[1]["images"] + means[2]["images"] == means[0]["images"] == size
    assert means[1]["sums"][0] + means[2]["sums"][0] == pytest.approx(means[0]["sums"][0], rel=1e-5)


def test_a_share_without_an_image_takes_part_and_moves_no_statistics():
    step = make(processes=Alone(1, 2), weight_decay=0.0, options={"fusion_weight_decay": 0.0})
    (batch,) = batches(step, 1)
    seen = gradients(step)
    buffers, weights = bits(step.learner.buffers()), bits(step.learner.parameters())
    output = step(rows(batch, 0, 0), epoch=0, step=0, images=3)
    assert output.loss == 0
    assert seen.keys() == dict(step.learner.named_parameters()).keys()  # DDP waits for each
    assert not any(gradient.any() for gradient in seen.values())
    assert same_bits(bits(step.learner.buffers()), buffers)
    assert same_bits(bits(step.learner.parameters()), weights)
    assert all(module.training for module in step.learner.modules())
    assert step.losses.state()["images"] == 0
    assert step.metric.read() == {}


def test_norms_that_are_synchronised_train_on_no_image_too():
    """They take statistics of all processes, so that each has to take part."""
    step = make(processes=Alone(1, 2))
    fusion, seen = step.learner.get_submodule("method.fusion"), []
    fusion.sync_batch_norm = True
    step = type(step)(step.learner, step.task, step.table, step.config, CPU, processes=step.processes)
    step.learner.register_forward_pre_hook(
        lambda module, arguments: seen.append({n: m.training for n, m in module.named_modules()})
    )
    (batch,) = batches(step, 1)
    with suppress(ValueError):  # no process is here that has images
        step(rows(batch, 0, 0), epoch=0, step=0, images=3)
    frozen = {name for name, training in seen[0].items() if not training}
    norms = {name for name, m in step.learner.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert frozen == {name for name in norms if not name.startswith("method.fusion.")}
    assert all(module.training for module in step.learner.modules())


class _Wrapped(Processes):
    """Two processes for the step; the group that DDP reduces over has this one alone."""

    count = 2
    wrapper = staticmethod(lambda: None)

    def wrap(self, learner):
        assert self.wrapper() is None, "an old wrapper is there when a new one is made"
        ddp = nn.parallel.DistributedDataParallel(learner, broadcast_buffers=False, gradient_as_bucket_view=True)
        self.wrapper = weakref.ref(ddp)
        return ddp


@pytest.fixture
def group():
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.broadcast_buffers")
def test_ddp_reduces_once_a_step_and_a_new_plan_wraps_anew(group):
    plain, wrapped = make(accumulate=3), make(accumulate=3, processes=_Wrapped())
    some = batches(plain, 4)
    reductions = []

    def count(state, bucket):
        reductions.append(bucket.index())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    for k, batch in enumerate(some):
        if k % 2 == 0:
            wrapped.use(execution.create("streams" if k else "serial", wrapped.learner, CPU))
            wrapped.processes.wrapper().register_comm_hook(None, count)
        plain(batch, epoch=0, step=k)
        wrapped(batch, epoch=0, step=k, images=2 * len(batch.target))
        assert len(reductions) == len(set(reductions)) >= 1
        reductions.clear()
    assert same_bits(bits(plain.learner.state_dict().values()), bits(wrapped.learner.state_dict().values()))
