"""A step whose loss or gradients are not finite leaves no trace under ``nan: skip``."""

from __future__ import annotations

import pytest
import torch
from steps import CPU, Alone, Reads, batches, bits, make, same_bits
from torch import nn

import fflfast
from fflfast import execution
from fflfast.training import step as step_module
from fflfast.training.guard import StepGuard
from fflfast.training.packed import Packed

POISONS = ["loss", "gradient", "logits"]
OPTIONS = {
    "plain": {},
    "ema-clip-accumulate": {"ema": 0.9, "clip_norm": 1.0, "accumulate": 3},
    "fp16-channels-last": {"amp": "fp16", "channels_last": True},
    "bf16-mixing": {"amp": "bf16", "mixup": 0.5},
}


@pytest.fixture(autouse=True)
def _no_interpreter():
    """Steps in bf16 and fp16 would run in Triton's interpreter here, at seconds a step."""
    with fflfast.use_backend("reference"):
        yield


def _poisoned(**options):
    step = make(method="steps:Poisoned", **{"nan": "skip", **options})
    if options.get("amp") == "fp16":
        step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": 16.0})
    return step


def _all(step):
    """Everything that a bad step must leave alone."""
    counts = step.losses.state()
    averages = step.averages.tensors().values() if step.averages else ()
    momentum = [state["momentum_buffer"] for state in step.optimizers[0].state.values()]
    sums = torch.tensor([*counts["sums"], counts["images"]], dtype=torch.float64)
    return bits([*step.learner.state_dict().values(), *momentum, *averages, *step.metric.tensors(), sums])


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_skipped_step_changes_nothing(options, poison):
    step, twin = _poisoned(**options), _poisoned(**options)
    some = batches(step, 4)
    for each in (step, twin):
        each(some[0], epoch=0, step=0)
    before = _all(step)
    step.learner.method.poison = poison
    step(some[1], epoch=0, step=1)
    assert same_bits(_all(step), before)
    assert step.state.step == 2
    step.learner.method.poison = None
    if options.get("amp") == "fp16":
        twin.scaler.load_state_dict(step.scaler.state_dict())  # all that may differ
    for each in (step, twin):
        each(some[2], epoch=0, step=2)
    assert same_bits(_all(step), _all(twin))
    assert not same_bits(_all(step), before)
    means, steps, skipped = step.losses.read()
    assert (steps, skipped) == (3, 1)
    assert means == twin.losses.read().means


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_guard_changes_no_bit_of_a_good_step(options):
    steps = [_poisoned(**options, nan=nan) for nan in ("raise", "skip")]
    for k, batch in enumerate(batches(steps[0], 3)):
        for step in steps:
            step(batch, epoch=0, step=k)
    assert same_bits(*(_all(step) for step in steps))


@pytest.mark.parametrize("poison", POISONS)
def test_the_poisons_reach_weights_or_statistics_without_the_guard(poison):
    step = _poisoned(nan="raise")
    some = batches(step, 2)
    before = _all(step)
    step.learner.method.poison = poison
    step(some[0], epoch=0, step=0)
    assert not same_bits(_all(step), before)
    finite = all(p.isfinite().all() for p in step.learner.parameters())
    assert finite == (poison == "loss")  # an infinite constant in the loss has finite gradients
    assert torch.tensor(step.losses.peek().means["loss"]).isfinite() == (poison == "gradient")


def test_each_poison_is_what_it_says():
    for poison in POISONS:
        step = _poisoned()
        step.learner.method.poison = poison
        (batch,) = batches(step, 1)
        seen = []
        judge = step._guard.judge
        step._guard.judge = lambda loss, norm, judge=judge, seen=seen: seen.append((loss, norm)) or judge(loss, norm)
        step(batch, epoch=0, step=0)
        ((loss, norm),) = seen
        assert (bool(loss.isfinite()), bool(norm.isfinite())) == {
            "loss": (False, True),
            "gradient": (True, False),
            "logits": (False, False),
        }[poison]


@pytest.mark.parametrize("plan", ["streams", "graph"])
def test_every_plan_skips(plan):
    step, twin = _poisoned(ema=0.9), _poisoned(ema=0.9)
    some = batches(step, 4)
    step.use(execution.create(plan, step.learner, CPU))
    for k, batch in enumerate(some):
        for each in (step, twin):
            each.learner.method.poison = "gradient" if k in (0, 2) else None
            each(batch, epoch=0, step=k)
    assert same_bits(_all(step), _all(twin))
    assert step.losses.read()[1:] == twin.losses.read()[1:] == (4, 2)


def test_a_process_leaves_out_the_step_that_another_cannot_take():
    good, other = _poisoned(processes=Alone(0, 2, bad=0.0)), _poisoned(processes=Alone(0, 2, bad=1.0))
    (batch,) = batches(good, 1)
    before = _all(other)
    for step in (good, other):
        step(batch, epoch=0, step=0, images=48)
    assert good.losses.read().skipped == 0
    assert other.losses.read().skipped == 1
    other.losses.reset()
    assert same_bits(_all(other), before)


def test_an_overflow_of_the_scaler_is_skipped_and_halves_the_scale():
    step = _poisoned(amp="fp16")
    some = batches(step, 2)
    before = _all(step)
    step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": 1e38})
    step(some[0], epoch=0, step=0)
    assert same_bits(_all(step), before)
    assert step.scaler.get_scale() == pytest.approx(5e37)
    step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": 16.0})
    step(some[1], epoch=0, step=1)
    assert step.losses.read().skipped == 1


def test_a_bad_step_reads_nothing_from_the_device():
    step = _poisoned(ema=0.9, clip_norm=1.0)
    some = batches(step, 2)
    with Reads() as good:
        step(some[0], epoch=0, step=0)
    step.learner.method.poison = "logits"
    with Reads() as bad:
        step(some[1], epoch=0, step=1)
    assert bad.count == good.count


class _Keeping(nn.Module):
    """Buffers of every kind, one of them empty, one not in the checkpoint."""

    def __init__(self):
        super().__init__()
        self.register_buffer("zero", -torch.zeros(3))
        self.register_buffer("image", torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
        self.register_buffer("low", torch.randn(5).half())
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("none", torch.zeros(0, 4))
        self.register_buffer("unsaved", torch.randn(2), persistent=False)

    def change(self):
        for buffer in self.buffers():
            buffer.copy_(torch.where(buffer == 0, torch.ones_like(buffer), torch.zeros_like(buffer)))
        self.image.fill_(torch.nan)


@pytest.mark.parametrize("bad", [True, False])
def test_buffers_of_every_kind_are_put_back_or_left(bad):
    module = _Keeping()
    guard = StepGuard(module)
    before = bits(module.buffers())
    guard.begin()
    module.change()
    changed = bits(module.buffers())
    guard.undo(torch.tensor(bad))
    assert same_bits(bits(module.buffers()), before if bad else changed)
    assert not same_bits(before, changed)


def test_judging():
    guard, one = StepGuard(_Keeping()), torch.tensor(1.0)
    for value in (torch.inf, -torch.inf, torch.nan):
        broken = torch.tensor(value)
        assert guard.judge(broken, one) == guard.judge(one, broken) == guard.judge(broken, broken) == 1
    largest = torch.tensor(torch.finfo(torch.float32).max)
    verdict = guard.judge(largest, largest)  # their sum is infinite, they are not
    assert verdict == 0
    assert verdict.dtype == torch.float32


def test_a_buffer_that_overlaps_itself_is_refused_by_name():
    module = nn.Module()
    module.register_buffer("positions", torch.arange(4).expand(1, -1))
    assert StepGuard(module)._before[0].tolist() == [0, 1, 2, 3]
    module.register_buffer("wide", torch.zeros(1).expand(4))
    with pytest.raises(ValueError, match=r"wide: expected a tensor without gaps or overlaps"):
        StepGuard(module)
    with pytest.raises(ValueError, match=r"part: .*strides \(2,\)"):
        Packed({"part": torch.zeros(6)[::2]})


def test_an_optimizer_that_cannot_skip_is_refused(monkeypatch):
    def unfused(learner, config):
        return [torch.optim.SGD(learner.parameters(), lr=config.lr)]

    monkeypatch.setattr(step_module, "build_optimizers", unfused)
    with pytest.raises(ValueError, match="nan: skip needs a fused optimizer"):
        make(nan="skip")
    step = make(nan="raise")
    (batch,) = batches(step, 1)
    step.set_schedule(learning_rate=0.0, kl_weight=1.0)
    before = bits(step.learner.parameters())
    step(batch, epoch=0, step=0)
    assert same_bits(bits(step.learner.parameters()), before)
    step.set_schedule(learning_rate=0.1, kl_weight=1.0)
    step(batch, epoch=0, step=1)
    assert not same_bits(bits(step.learner.parameters()), before)
