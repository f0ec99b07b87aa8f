"""One training step: what it computes under each option, on every plan, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from steps import CPU, Reads, batches, bits, freeze_norms, gradients, make, same_bits
from torch.utils._python_dispatch import TorchDispatchMode

import fflfast
from fflfast import execution
from fflfast.data import Batch
from fflfast.training.optimizer import build_optimizers, optimizer_tensors, restore_optimizers

NOISY = "training_runs:Noisy"
# Options that add work to a step; every plan must give the same bits with each.
OPTIONS = {
    "plain": {},
    "dropout-ema-skip": {"method": NOISY, "ema": 0.9, "nan": "skip"},
    "accumulate-clip": {"accumulate": 3, "clip_norm": 0.5},
    "fp16": {"amp": "fp16", "nan": "skip", "channels_last": True},
    "bf16": {"amp": "bf16", "channels_last": True, "ema": 0.5},
    "mixing": {"mixup": 0.2, "cutmix": 1.0},
}


@pytest.fixture(autouse=True)
def _no_interpreter():
    """Steps in bf16 and fp16 would run in Triton's interpreter here, at seconds a step."""
    with fflfast.use_backend("reference"):
        yield


def _run(step, some, epoch=0):
    for k, batch in enumerate(some):
        output = step(batch, epoch=epoch, step=k)
    return output


def _everything(step):
    """All that a step leaves behind, collected without asking it what that is."""
    optimizer = optimizer_tensors(step.optimizers, step.learner)
    averages = step.averages.tensors() if step.averages else {}
    measures = [step.losses.state(), step.metric.state(), step.scaler.state_dict(), int(step.state.step)]
    return bits([*step.learner.state_dict().values(), *optimizer.values(), *averages.values()]), measures


@pytest.mark.parametrize("plan", ["streams", "graph"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_plan_takes_the_same_steps(options, plan):
    results = []
    for name in ("serial", plan):
        torch.manual_seed(0)
        step = make(**options)
        step.use(execution.create(name, step.learner, CPU))
        last = _run(step, [*batches(step, 5), *batches(step, 2)])  # a short batch in the middle
        results.append((*_everything(step), bits([last.loss, last.terms, *last.logits.values()])))
    (tensors, measures, outputs), others = results
    assert same_bits(tensors, others[0])
    assert measures == others[1]
    assert same_bits(outputs, others[2])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_nothing_changes_in_a_step_that_is_not_named(options):
    """Put back what `changing` names, and the generators, and the same steps give the same bits."""
    torch.manual_seed(0)
    step = make(**options)
    some = batches(step, 3)
    _run(step, some)
    before, tensors, measures = execution.Snapshot(step.changing, CPU), *_everything(step)
    last = _run(step, some, epoch=1)
    after, outputs = _everything(step), bits([last.loss, *last.logits.values()])
    assert not same_bits(after[0], tensors)
    assert after[1][3] == measures[3] + 3
    before.restore()
    assert same_bits(_everything(step)[0], tensors)
    assert _everything(step)[1] == measures
    last = _run(step, some, epoch=1)
    assert same_bits(_everything(step)[0], after[0])
    assert same_bits(bits([last.loss, *last.logits.values()]), outputs)


@pytest.mark.parametrize(
    ("options", "parts"),
    [({}, 1), ({"accumulate": 3, "clip_norm": 1.0, "ema": 0.9, "nan": "skip"}, 3), ({"amp": "fp16", "nan": "skip"}, 1)],
    ids=["plain", "everything", "fp16"],
)
def test_a_step_reads_nothing_from_the_device(options, parts):
    """On a CPU the loss itself looks at its target; the step around it adds not one read."""
    step = make(**options)
    (batch,) = batches(step, 1)
    float_batch = Batch(torch.zeros(24, 3, 8, 8), batch.target, batch.index)
    with Reads() as alone, step.autocast():
        step.learner(float_batch, step.state).loss.backward()
    step.optimizers[0].zero_grad(set_to_none=True)
    with Reads() as reads:
        step.set_schedule(learning_rate=0.1, kl_weight=0.5)
        step(batch, epoch=0, step=0)
    assert reads.count == parts * alone.count
    with Reads() as reads:
        step.losses.peek()
    assert reads.count > 0


class _Fills(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        self.count += operation.overloadpacket == torch.ops.aten.fill_
        return operation(*arguments, **(options or {}))


def test_the_learning_rate_is_the_states_tensor_and_unchanged_values_launch_nothing():
    step = make()
    assert len(step.optimizers[0].param_groups) == 2
    assert all(group["lr"] is step.state.learning_rate for group in step.optimizers[0].param_groups)
    with _Fills() as fills:
        step.set_schedule(learning_rate=0.05, kl_weight=0.5)
    assert fills.count == 0
    with _Fills() as fills:
        step.set_schedule(learning_rate=0.07, kl_weight=0.5)
    assert fills.count == 1
    assert step.state.learning_rate == torch.tensor(0.07)
    (batch,) = batches(step, 1)
    before = step.optimizers[0].param_groups[0]["params"][0].detach().clone()
    step.set_schedule(learning_rate=0.0, kl_weight=0.5)
    step(batch, epoch=0, step=0)
    assert torch.equal(step.optimizers[0].param_groups[0]["params"][0], before)


def test_the_state_says_where_the_run_stands():
    step = make()
    (batch,) = batches(step, 1)
    step(batch, epoch=3, step=7)
    step(batch, epoch=3, step=8)
    state = step.state
    assert (int(state.epoch), int(state.batch), int(state.step)) == (3, 8, 2)


def test_what_a_step_returns_holds_no_graph():
    step = make()
    (batch,) = batches(step, 1)
    output = step(batch, epoch=0, step=0)
    assert all(t.grad_fn is None for t in (output.loss, output.terms, *output.logits.values()))
    assert all(p.grad is None for p in step.learner.parameters())
    assert list(output.logits) == ["sub0", "sub1", "fused"]
    assert step.losses.peek().means["loss"] == pytest.approx(output.loss.item())
    assert step.metric.read()["fused"].total == 24


# ---- the optimizer


@pytest.mark.parametrize("channels_last", [False, True])
def test_momentum_is_there_from_the_start_and_counts_as_none(channels_last):
    step = make(channels_last=channels_last)
    state = optimizer_tensors(step.optimizers, step.learner)
    assert len(state) == len(list(step.learner.parameters()))
    for name, parameter in step.learner.named_parameters():
        assert state[f"{name}/momentum_buffer"].stride() == parameter.stride(), name
    twin = make(channels_last=channels_last)
    twin.optimizers[0].state.clear()  # as an optimizer of torch begins
    (batch,) = batches(step, 1)
    for each in (step, twin):
        each(batch, epoch=0, step=0)
        each(batch, epoch=0, step=1)
    assert same_bits(bits(step.learner.parameters()), bits(twin.learner.parameters()))


def test_no_momentum_no_buffers():
    assert optimizer_tensors(make(momentum=0.0, nesterov=False).optimizers, make().learner) == {}


def test_the_optimizer_is_restored_in_place_and_in_each_parameters_memory_order():
    step = make(channels_last=True)
    some = batches(step, 3)
    _run(step, some[:2])
    own = optimizer_tensors(step.optimizers, step.learner)
    saved = {name: value.clone(memory_format=torch.contiguous_format) for name, value in own.items()}
    before = bits(own.values())
    _run(step, some[2:])
    restore_optimizers(step.optimizers, step.learner, saved)
    now = optimizer_tensors(step.optimizers, step.learner)
    assert all(now[name] is value for name, value in own.items())
    assert same_bits(bits(now.values()), before)
    restore_optimizers(step.optimizers, step.learner, {})
    assert all(not value.any() for value in now.values())


# ---- accumulation, clipping, mixed precision


@pytest.mark.parametrize(("accumulate", "size"), [(2, 24), (5, 24), (3, 8)])
def test_parts_add_up_to_the_batch(accumulate, size):
    """With norms that do not look at the batch, parts of unequal size give the gradients of the whole."""
    whole, parted = (make(dtype=torch.float64, prepare=freeze_norms, accumulate=n) for n in (1, accumulate))
    (batch,) = batches(whole, 1, size)
    seen = [gradients(whole), gradients(parted)]
    outputs = [step(batch, epoch=0, step=0) for step in (whole, parted)]
    for name, gradient in seen[0].items():
        torch.testing.assert_close(seen[1][name], gradient, rtol=1e-9, atol=1e-12)
    assert max(gradient.abs().max() for gradient in seen[0].values()) > 1e-2
    for left, right in zip(*(
        [output.loss, output.terms, *output.logits.values()] for output in outputs
    ), strict=True):  # fmt: skip
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12)
    assert parted.losses.peek().means == pytest.approx(whole.losses.peek().means)
    assert parted.metric.read() == whole.metric.read()


@pytest.mark.parametrize(("size", "parts"), [(24, 4), (9, 4), (7, 3), (3, 1), (2, 1)])
def test_a_part_has_at_least_two_images(size, parts):
    step = make(accumulate=4)
    sizes = []
    step.learner.register_forward_pre_hook(lambda module, arguments: sizes.append(len(arguments[0].target)))
    (batch,) = batches(step, 1, size)
    step(batch, epoch=0, step=0)
    assert len(sizes) == parts
    assert sum(sizes) == size
    assert max(sizes) - min(sizes) <= 1
    norm = step.learner.get_submodule("method.fusion.depthwise_norm")
    assert norm.num_batches_tracked == parts


@pytest.mark.parametrize("amp", ["off", "fp16"])
@pytest.mark.parametrize("nan", ["raise", "skip"])
def test_clipping_bounds_the_norm_of_all_gradients(amp, nan):
    free, loose, tight = (make(amp=amp, nan=nan, clip_norm=clip) for clip in (1e-30, 1e30, 0.25))
    (batch,) = batches(free, 1)
    seen = [gradients(step) for step in (free, loose, tight)]
    for step in (free, loose, tight):
        step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": 16.0} if amp == "fp16" else {})
        step(batch, epoch=0, step=0)
    norms = [torch.stack([g.norm() for g in each.values()]).norm() for each in seen]
    assert norms[0] < 1e-29
    assert norms[1] > 0.5
    torch.testing.assert_close(norms[2], torch.tensor(0.25), rtol=1e-4, atol=0)
    for name, gradient in seen[1].items():
        torch.testing.assert_close(seen[2][name], gradient * (0.25 / norms[1]), rtol=1e-3, atol=1e-7)


def test_a_scaled_loss_gives_the_same_gradients():
    steps = [make(amp="fp16") for _ in range(2)]
    (batch,) = batches(steps[0], 1)
    for step, scale in zip(steps, (1.0, 64.0), strict=True):
        step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": scale})
        step(batch, epoch=0, step=0)
    # What moves the weights is what the optimizer kept: its gradient plus weight decay.
    left, right = (optimizer_tensors(step.optimizers, step.learner) for step in steps)
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_an_overflow_halves_the_scale_and_leaves_weights_and_momentum_alone(clip_norm):
    step = make(amp="fp16", clip_norm=clip_norm)
    some = batches(step, 3)
    step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": 16.0})
    step(some[0], epoch=0, step=0)
    weights, momentum = list(step.learner.parameters()), optimizer_tensors(step.optimizers, step.learner).values()
    before = bits([*weights, *momentum])
    step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": 1e38})
    step(some[1], epoch=0, step=1)
    assert same_bits(bits([*weights, *momentum]), before)
    assert step.scaler.get_scale() == pytest.approx(5e37)
    step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": 16.0})
    step(some[2], epoch=0, step=2)
    assert not same_bits(bits([*weights, *momentum]), before)
    assert all(t.isfinite().all() for t in weights)


def test_images_come_in_the_layers_dtype_and_order():
    seen = []
    channels_last = {"amp": "bf16", "channels_last": True}
    for options in ({"channels_last": False}, channels_last, {**channels_last, "mixup": 0.2}):
        step = make(**options)
        step.learner.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].images))
        step(batches(step, 1)[0], epoch=0, step=0)
    assert [x.dtype for x in seen] == [torch.float32, torch.bfloat16, torch.float32]
    assert [x.is_contiguous(memory_format=torch.channels_last) for x in seen] == [False, True, True]
    assert torch.equal(seen[1], seen[0].bfloat16())


def test_a_step_that_fails_leaves_no_gradient_behind():
    step = make(nan="skip")
    (batch,) = batches(step, 1)

    def fail(*_):
        raise RuntimeError("no more")

    handle = step.optimizers[0].register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no more"):
        step(batch, epoch=0, step=0)
    handle.remove()
    assert all(p.grad is None for p in step.learner.parameters())
    assert not hasattr(step.optimizers[0], "found_inf")


# ---- where batches come from


def test_inputs_may_be_places_in_a_set_on_the_device():
    plain = make()
    some = batches(plain, 3)
    whole = Batch(*(torch.cat(parts) for parts in zip(*some, strict=True)))
    gathering = make(batch_of=lambda places: Batch(*(part.index_select(0, places) for part in whole)))
    gathering.use(execution.create("graph", gathering.learner, CPU))
    for k, batch in enumerate(some):
        plain(batch, epoch=0, step=k)
        gathering(torch.arange(24 * k, 24 * (k + 1)), epoch=0, step=k)
    assert same_bits(bits(plain.changing()), bits(gathering.changing()))


def test_epoch_and_step_reach_augmentation_and_mixing():
    seen = []
    step = make(mixup=0.2)
    step.learner.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    (batch,) = batches(step, 1)
    for epoch, k in ((0, 0), (0, 1), (1, 0), (0, 0)):
        step(batch, epoch=epoch, step=k)
    assert not torch.equal(seen[0].target, seen[1].target)
    assert not torch.equal(seen[0].images, seen[2].images)
    assert torch.equal(seen[0].images, seen[3].images)
    assert torch.equal(seen[0].target, seen[3].target)
    assert step.metric.read() == {}


def test_build_optimizers_stands_alone():
    step = make()
    (optimizer,) = build_optimizers(step.learner, step.config)
    assert optimizer.param_groups[0]["lr"] == step.config.lr
