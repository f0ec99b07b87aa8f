"""Steps of OKDHP as the trainer takes them: plans, what is saved, shares, mixed precision, steps left out."""

from __future__ import annotations

import pytest
import torch
from method_steps import left_behind, networks
from pose_data import write_lspet
from steps import CPU, Alone, Reads, bits, gradients, make, same_bits
from torch import nn

from fflfast import execution
from fflfast.data import Batch, Loader
from fflfast.training import TrainConfig, resolve
from fflfast.training.optimizer import optimizer_tensors, restore_optimizers

SIZE = 32
BRANCHES = ["hourglass2@1/32", "hourglass4@1/32"]


@pytest.fixture(scope="module")
def persons(tmp_path_factory):
    folder = tmp_path_factory.mktemp("persons")
    write_lspet(folder, 24)
    return {
        "data": "lspet",
        "data_dir": str(folder),
        "image_size": SIZE,
        "batch_size": 4,
        "method": "okdhp",
        "arch": BRANCHES,
        "trunk": "stack1",
        "pad": None,
        "limit_train": 12,
        "limit_test": 8,
    }


def step_of(persons, **changes):
    torch.manual_seed(0)
    return make(**{**persons, **changes})


def batches(persons, count):
    data = resolve(TrainConfig(**persons)).data
    loader = Loader(data.train, batch_size=4, seed=0, train=True, limit=12)
    return [batch for batch, _ in zip(loader.epoch(0), range(count), strict=False)]


def rows(batch, start, stop):
    return Batch(*(part[start:stop] for part in batch))


def run(step, some, start=0):
    for k, batch in enumerate(some, start):
        output = step(batch, epoch=0, step=k)
    return output


def test_each_network_runs_once_a_step_and_the_host_reads_nothing_more_than_for_one_branch(persons):
    some, counts = batches(persons, 2), []
    for changes in ({"arch": ["hourglass2@1/32"], "trunk": None}, {}):
        step, calls = step_of(persons, **changes), {}
        for place, network in networks(step).items():
            for inner, module in network.named_modules():
                if module is network or isinstance(module, nn.Conv2d):
                    key = f"{place}.{inner}"
                    calls[key] = 0
                    module.register_forward_hook(lambda *_, key=key, calls=calls: calls.update({key: calls[key] + 1}))
        run(step, some[:1])
        assert calls
        assert set(calls.values()) == {1}
        with Reads() as reads:
            step.set_schedule(learning_rate=0.01, kl_weight=0.7)
            run(step, some[1:], 1)
        counts.append(reads.count)
    # On a CPU the distillation loss itself looks at its scalars and at its loss: T, λ, μ and the loss.
    assert counts[0] == 0
    assert counts[1] <= 4


def test_every_plan_leaves_the_same_bits(persons):
    some, results = batches(persons, 2), []
    for plan in execution.PLANS:
        step = step_of(persons)
        step.use(execution.create(plan, step.learner, CPU))
        last = run(step, [*some, rows(some[0], 0, 3), some[0]])
        results.append([*left_behind(step), *bits([last.loss, last.terms, *last.logits.values()])])
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


def test_what_is_saved_is_enough_to_go_on_bit_for_bit(persons):
    some = batches(persons, 3)
    whole = step_of(persons)
    run(whole, some[:1])
    learner = {name: tensor.clone() for name, tensor in whole.learner.state_dict().items()}
    optimizers = {name: t.clone() for name, t in optimizer_tensors(whole.optimizers, whole.learner).items()}
    run(whole, some[1:], 1)
    again = step_of(persons)
    again.learner.load_state_dict(learner)
    restore_optimizers(again.optimizers, again.learner, optimizers)
    run(again, some[1:], 1)
    assert same_bits(left_behind(whole), left_behind(again))


@pytest.mark.parametrize("fau", ["code", "figure"])
def test_every_parameter_learns_in_parts_and_in_mixed_precision(persons, fau):
    step = step_of(persons, amp="bf16", channels_last=True, accumulate=2, options={"fau": fau})
    seen = gradients(step)
    output = run(step, batches(persons, 2))
    assert seen.keys() == {place for place, _ in step.learner.named_parameters()}
    assert all(bool(g.isfinite().all()) for g in seen.values())
    assert bool(output.loss.isfinite())
    assert step.metric.read().keys() == {"sub0", "sub1", "ensemble"}


def test_shares_add_up_to_the_batch_and_an_empty_one_takes_part(persons):
    step = step_of(persons)
    step.learner.eval()  # so that norms do not tell how the batch was cut
    (batch,) = batches(persons, 1)
    ready = step.task.training_batch(
        batch, step.table, epoch=step.state.epoch, step=step.state.batch, views=1, channels_last=False
    )
    whole = step.learner(ready, step.state)
    parts = [step.learner(rows(ready, *span), step.state) for span in ((0, 1), (1, 4))]
    torch.testing.assert_close(0.25 * parts[0].loss + 0.75 * parts[1].loss, whole.loss)
    torch.testing.assert_close(0.25 * parts[0].terms + 0.75 * parts[1].terms, whole.terms)
    other = step_of(persons, processes=Alone(1, 2))
    seen = gradients(other)
    output = other(rows(batch, 0, 0), epoch=0, step=0, images=3)
    assert output.loss == 0
    assert seen.keys() == {place for place, _ in other.learner.named_parameters()}
    assert not any(gradient.any() for gradient in seen.values())


def test_a_step_that_is_left_out_leaves_no_trace(persons):
    step, some = step_of(persons, nan="skip"), batches(persons, 2)
    run(step, some[:1])
    before, prepare = left_behind(step), step.task.training_batch

    def broken(*arguments, **options):
        batch = prepare(*arguments, **options)
        return batch._replace(images=batch.images * torch.nan)

    step.task.training_batch = broken
    run(step, some[1:], 1)
    assert same_bits(left_behind(step), before)
    step.task.training_batch = prepare
    run(step, some[1:], 2)
    assert not same_bits(left_behind(step), before)
    assert step.losses.read().skipped == 1
