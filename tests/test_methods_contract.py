"""What holds for every method for classification, whatever it computes."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from method_steps import COHORTS, METHODS, Teacher, left_behind, make_method, networks, settings
from steps import CPU, Alone, Reads, batches, bits, gradients, rows, same_bits
from torch import nn
from training_runs import small
from training_runs import start as start_python

import fflfast
from fflfast import execution
from fflfast.training import checkpoint, resolve, saving
from fflfast.training.build import build_learner
from fflfast.training.loop import Trainer
from fflfast.training.report import Reporter

every_method = pytest.mark.parametrize("name", METHODS)


@pytest.fixture(autouse=True)
def _no_interpreter():
    """Steps in bf16 would run in Triton's interpreter here, at seconds a step."""
    with fflfast.use_backend("reference"):
        yield


def run(step, some, start=0):
    for k, batch in enumerate(some, start):
        output = step(batch, epoch=0, step=k)
    return output


@every_method
def test_each_network_runs_once_a_step(name):
    step, calls = make_method(name), {}
    for place, network in networks(step).items():
        for inner, module in network.named_modules():
            if module is network or isinstance(module, nn.Conv2d):
                key = f"{place}.{inner}"
                calls[key] = 0
                module.register_forward_hook(lambda *_, key=key: calls.update({key: calls[key] + 1}))
    run(step, batches(step, 1))
    assert calls
    assert set(calls.values()) == {1}, {key: n for key, n in calls.items() if n != 1}


@every_method
def test_every_plan_leaves_the_same_bits(name):
    results = []
    for plan in execution.PLANS:
        step = make_method(name)
        step.use(execution.create(plan, step.learner, CPU))
        whole = batches(step, 2)
        last = run(step, [*whole, rows(whole[0], 0, 5), whole[0]])
        results.append([*left_behind(step), *bits([last.loss, last.terms, *last.logits.values()])])
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


@every_method
@pytest.mark.parametrize("n", [2, 3, 4])
def test_every_parameter_learns_in_parts_and_in_mixed_precision(name, n):
    if n > 2 and name not in COHORTS:
        pytest.skip("takes one network")
    step = make_method(name, n, amp="bf16", channels_last=True, accumulate=2)
    seen = gradients(step)
    before = bits(step.learner.parameters())
    output = run(step, batches(step, 2))
    trained = {place for place, parameter in step.learner.named_parameters() if parameter.requires_grad}
    assert seen.keys() == trained
    assert all(bool(g.isfinite().all()) for g in seen.values())
    assert {place for place, g in seen.items() if not g.any()} == set()
    assert bool(output.loss.isfinite())
    assert len(output.terms) == len(step.learner.term_names)
    assert all(bool(z.isfinite().all()) for z in output.logits.values())
    assert not same_bits(bits(step.learner.parameters()), before)
    assert step.metric.read().keys() == set(step.learner.method.output_names)


@every_method
def test_a_run_goes_on_bit_for_bit(name, tmp_path):
    """Stopped within an epoch, written to a file, and taken up by a trainer that was built anew."""
    given = settings(name)
    teacher = given.pop("frozen", None)
    config, data, _ = resolve(small(tmp_path, plan="serial", **given))

    def trainer():
        learner = build_learner(config, data.num_classes, teacher=teacher)
        return Trainer(config, data, learner, tmp_path, Reporter(quiet=True), SimpleNamespace(signum=None))

    def go_on(trainer, steps):
        trainer.learner.train()
        at = trainer.position
        for inputs in trainer.feed.inputs(at.epoch, at.step):
            learning_rate, kl_weight = trainer._schedule(trainer.global_step)
            trainer.take_step.set_schedule(learning_rate=learning_rate, kl_weight=kl_weight)
            trainer.take_step(inputs, epoch=at.epoch, step=at.step, images=trainer.loader.images(at.step))
            at.step += 1
            if at.step == steps:
                return

    whole = trainer()
    go_on(whole, 2)
    checkpoint.write(tmp_path / "stopped", saving.take(whole))
    go_on(whole, 4)
    torch.manual_seed(99)  # a new process finds its generators anywhere
    again = trainer()
    again.restore(checkpoint.read(tmp_path / "stopped"))
    go_on(again, 4)
    for place, value in whole.learner.state_dict().items():
        assert same_bits(bits([value]), bits([again.learner.state_dict()[place]])), place
    assert same_bits(left_behind(whole.take_step), left_behind(again.take_step))
    assert whole.take_step.losses.state() == again.take_step.losses.state()
    assert whole.take_step.metric.state() == again.take_step.metric.state()


@every_method
def test_a_share_without_an_image_takes_part(name):
    """Every parameter gets a gradient, for which the other processes wait, and it is zero."""
    step = make_method(name, processes=Alone(1, 2))
    seen, statistics = gradients(step), bits(_statistics(step))
    (batch,) = batches(step, 1)
    output = step(rows(batch, 0, 0), epoch=0, step=0, images=3)
    assert output.loss == 0
    assert not output.terms.any()
    assert seen.keys() == {place for place, p in step.learner.named_parameters() if p.requires_grad}
    assert not any(gradient.any() for gradient in seen.values())
    assert same_bits(bits(_statistics(step)), statistics)
    assert all(bool(p.isfinite().all()) for p in step.learner.parameters())


def _statistics(step):
    return [buffer for place, buffer in step.learner.named_buffers() if "running" in place or "tracked" in place]


@every_method
def test_a_step_that_is_left_out_leaves_no_trace(name):
    step = make_method(name, nan="skip")
    some = batches(step, 3)
    run(step, some[:1])
    before = left_behind(step)
    prepare = step.task.training_batch

    def broken(*arguments, **options):
        batch = prepare(*arguments, **options)
        poisoned = [image * torch.nan for image in ([batch.images] if torch.is_tensor(batch.images) else batch.images)]
        return batch._replace(images=poisoned[0] if len(poisoned) == 1 else tuple(poisoned))

    step.task.training_batch = broken
    run(step, some[1:2], 1)
    assert same_bits(left_behind(step), before)
    step.task.training_batch = prepare
    run(step, some[2:], 2)
    assert not same_bits(left_behind(step), before)
    assert step.losses.read().skipped == 1
    twin = make_method(name, nan="skip")
    run(twin, [some[0]])
    run(twin, [some[2]], 2)
    assert same_bits(left_behind(step), left_behind(twin))


@every_method
def test_a_step_asks_nothing_of_the_device(name):
    """On a CPU the loss itself looks at its target, which "single" shows; no method adds a read."""
    counts = []
    for each in ("single", name):
        step = make_method(each)
        some = batches(step, 2)
        run(step, some[:1])
        with Reads() as reads:
            step.set_schedule(learning_rate=0.01, kl_weight=0.7)
            run(step, some[1:], 1)
        counts.append(reads.count)
    assert counts[0] == counts[1]


def test_the_teacher_stays_as_it_is():
    step = make_method("kd", nan="skip", ema=0.9)
    teacher = step.learner.method.teacher
    assert isinstance(teacher, Teacher)
    before = bits(teacher.state_dict().values())
    run(step, batches(step, 3))
    assert same_bits(bits(teacher.state_dict().values()), before)
    assert not any(module.training for module in teacher.modules())
    held = [*step.learner.state_dict(), *step.averages.tensors()]
    assert {place for place in held if place.startswith("method.")} == {"method.teacher_fingerprint"}


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_two_processes_learn_what_one_does(tmp_path):
    """Norms keep their statistics, so that shares can only differ in how sums are rounded, here in float64."""
    process = start_python("-c", "import method_steps; method_steps.drive()", cwd=tmp_path)
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    told = "".join((tmp_path / f"shared-{rank}.err").read_text(encoding="utf-8") for rank in range(2))
    record = json.loads((tmp_path / "ends.json").read_text(encoding="utf-8"))
    assert record["shared"]["codes"] == [0, 0], told


@pytest.mark.parametrize("name", ["pcl", "oem"])
def test_networks_may_be_compiled(name):
    """Whole, without a break, also those that run without gradient, return stages or share a trunk: the same bits."""
    torch.compiler.reset()
    plain, compiled = make_method(name), make_method(name)
    for network in networks(compiled).values():
        network.compile(backend="eager", fullgraph=True)
    some = batches(plain, 2)
    run(plain, some)
    run(compiled, some)
    assert same_bits(left_behind(plain), left_behind(compiled))
