"""Execution plans on a real GPU: races, waits of the host, captures that work and captures that fail."""

from __future__ import annotations

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts; deterministic mode needs it

import random
import threading
from collections import Counter

import pytest
import torch
from plan_steps import Step, batches, make_learner
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from training_runs import SMALL, assert_same

from fflfast import streams
from fflfast.data import Batch, Loader
from fflfast.execution import PLANS, Graph, create
from fflfast.ops.augment import normalization_table
from fflfast.training import TrainConfig, resolve
from fflfast.training.autotune import choose
from fflfast.training.build import build_learner
from fflfast.training.feeding import task_for
from fflfast.training.step import TrainStep

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = torch.device("cuda", 0)
NOISY = "training_runs:Noisy"


@pytest.fixture(autouse=True)
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.synchronize()


def delay(module, draw, cycles=100_000):
    """Hold up the stream of a module at random: before its forward, and where its gradients arrive."""

    def sleep(*_):
        torch.cuda._sleep(draw.randrange(cycles))

    def backward(_, inputs, output):
        for value in output if isinstance(output, tuple) else (output,):
            if isinstance(value, torch.Tensor) and value.requires_grad:
                value.register_hook(sleep)

    module.register_forward_pre_hook(sleep)
    module.register_forward_hook(backward)


def run(name, data, *, steps, delays=None, between=lambda: None, **options):
    """Take steps by a plan; return every loss, and all that changed."""
    step = Step(make_learner(**options), "cuda")
    cohort = step.learner.cohort
    if delays is not None:
        for module in (cohort.trunk, *cohort.sub_networks, step.learner.method.fusion):
            delay(module, delays)
    plan = create(name, step.learner, CUDA)
    torch.manual_seed(3)
    losses = []
    for k in range(steps):
        output = plan(step.body, data[k % len(data)], capture=True, changing=step.changing)
        losses.append(output.loss.clone())
        between()
    plan.close()
    return {"losses": torch.stack(losses), **step.named()}


@pytest.mark.parametrize("name", ["streams", "graph"])
@pytest.mark.parametrize("networks", [2, 6])
def test_random_delays_on_every_stream_change_no_bit(name, networks):
    """1,000 steps; a missing wait, or memory that is given away too early, shows in the weights."""
    data = batches(7, 32, device="cuda", pixels=16)
    want = run("serial", data, steps=1000, networks=networks)
    draw = random.Random(networks)
    ambient = (lambda: torch.cuda._sleep(draw.randrange(100_000))) if name == "graph" else lambda: None
    got = run(name, data, steps=1000, networks=networks, delays=draw, between=ambient)
    assert_same(got, want)


def test_the_delays_show_a_missing_wait(monkeypatch):
    """The race test can fail: without the join, fusion and loss read what is not there yet."""
    data = batches(7, 32, device="cuda", pixels=16)
    want = run("serial", data, steps=50)
    default = torch.cuda.current_stream()
    wait = streams.CudaStreams.wait

    def forgets_joins(self, waiter, waited):
        if waiter != default:
            wait(self, waiter, waited)

    monkeypatch.setattr(streams.CudaStreams, "wait", forgets_joins)
    got = run("streams", data, steps=50, delays=random.Random(0))
    assert not torch.equal(got["losses"], want["losses"])


def real_step(name, *, frozen=None, **changes):
    """Return a step as the trainer builds it, on the GPU, and batches for it, the last of them short."""
    config, data, _ = resolve(TrainConfig(**{**SMALL, "device": "cuda", **changes}))
    learner = build_learner(config, data.num_classes, teacher=frozen)
    learner.method.attach(data.train.targets)
    learner.to(CUDA)
    if config.channels_last:
        learner.to(memory_format=torch.channels_last)
    learner.train()
    table = normalization_table(data.mean, data.std)
    step = TrainStep(learner, task_for(config, data), table, config, CUDA, plan=create(name, learner, CUDA))
    loader = Loader(data.train, batch_size=config.batch_size, seed=0, train=True, limit=config.limit_train)
    return step, [Batch(*(part.to(CUDA) for part in batch)) for batch in loader.epoch(0)]


def take(step, data, steps, start=0):
    outputs = []
    for k in range(start, start + steps):
        step.set_schedule(learning_rate=0.05 / (1 + k // 9), kl_weight=min(1.0, k / 20))
        epoch, at = divmod(k, len(data))
        outputs.append(step(data[at], epoch=epoch, step=at).loss.clone())
    return outputs


OPTIONS = {
    "plain": {},
    "dropout, averages, skip": {"method": NOISY, "ema": 0.9, "nan": "skip"},
    "fp16": {"method": NOISY, "amp": "fp16", "nan": "skip", "channels_last": True},
    "bf16": {"amp": "bf16", "channels_last": True, "clip_norm": 0.5},
    "parts, mixing": {"accumulate": 2, "mixup": 0.2, "cutmix": 1.0},
    "adam": {"optimizer": "adam", "lr": 1e-3, "amp": "fp16", "nan": "skip", "clip_norm": 0.5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ["streams", "graph"])
def test_every_plan_gives_the_bits_of_serial(name, options):
    """25 steps of the trainer with a changing schedule, dropout, scaler, averages, and short batches in between."""
    results = []
    for plan in ("serial", name):
        torch.manual_seed(0)
        step, data = real_step(plan, **options)
        losses = take(step, data, 25)
        state = {str(i): value.clone() for i, value in enumerate(step.changing())}
        results.append({"losses": torch.stack(losses), "random": torch.cuda.get_rng_state(), **state})
        step.plan.close()
    assert_same(results[1], results[0])
    assert results[0]["losses"].isfinite().all()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", PLANS)
def test_the_host_never_waits(name, options):
    """50 steps under PyTorch's own check, and none of the calls that it does not see."""
    step, data = real_step(name, **options)
    take(step, data, 10)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        take(step, data, 50, start=10)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        with torch.profiler.record_function("the steps"):
            take(step, data, 2 * len(data), start=60)
        torch.cuda.synchronize()
    events = profile.events()
    on_host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    span = next(event.time_range for event in on_host if event.name == "the steps")
    calls = Counter(event.name for event in on_host if span.start <= event.time_range.start <= span.end)
    assert not [name for name in calls if name.endswith("Synchronize")], calls
    assert not [event.name for event in events if "DtoH" in event.name]
    if name == "graph":
        assert calls["cudaGraphLaunch"] == 2 * (len(data) - 1)  # all but the short batch
    step.plan.close()


def waits_in_capture(step):
    def body(batch):
        if torch.cuda.is_current_stream_capturing():
            float(step.loss_sum.item())
        return step.body(batch)

    return body


def waits(step):
    def body(batch):
        output = step.body(batch)
        float(output.loss.item())
        return output

    return body


@pytest.mark.parametrize("make_body", [waits, waits_in_capture])
def test_a_step_that_waits_is_refused_and_the_process_goes_on(make_body):
    """Found in the warm-up where it can be, else the broken capture is cleaned up: weights, generator, allocator."""
    data = batches(3, device="cuda")
    want = run("streams", data, steps=20)
    step = Step(make_learner(), "cuda")
    plan = create("graph", step.learner, CUDA)
    torch.manual_seed(3)
    before = step.named()
    with pytest.raises(RuntimeError, match=r"cannot be captured .*--plan streams"):
        plan(make_body(step), data[0], capture=True, changing=step.changing)
    plan.close()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert_same(step.named(), before)
    torch.rand(3, device="cuda")  # the generator has left the capture
    assert_same(run("streams", data, steps=20), want)
    allocated = torch.cuda.memory_allocated()
    run("streams", data, steps=200)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= allocated + 2**20  # blocks that two streams used come back
    assert_same(run("graph", data, steps=20), run("serial", data, steps=20))


def test_threads_that_pin_memory_do_not_break_a_capture():
    data, stop = batches(3, device="cuda"), threading.Event()

    def load():
        while not stop.is_set():
            torch.empty(100_000, dtype=torch.uint8).pin_memory().to(CUDA, non_blocking=True)

    thread = threading.Thread(target=load)
    want = run("serial", data, steps=10)
    thread.start()
    try:
        assert_same(run("graph", data, steps=10), want)
    finally:
        stop.set()
        thread.join()


def test_a_closed_plan_gives_its_memory_back():
    data = batches(3, 64, device="cuda", pixels=32)
    run("graph", data, steps=5)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        run("graph", data, steps=5)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + 2**20


def test_a_graph_goes_on_from_another_state():
    """As after a resume: weights, momentum and generator are put back in place between two replays."""
    data = batches(4, device="cuda")
    step = Step(make_learner(), "cuda")
    plan = create("graph", step.learner, CUDA)
    torch.manual_seed(3)
    plan(step.body, data[0], capture=True, changing=step.changing)
    saved = step.named()
    first = [plan(step.body, batch, capture=True, changing=step.changing).loss.clone() for batch in data]
    end = step.named()
    with torch.no_grad():
        for tensor, value in zip(step.changing(), list(saved.values()), strict=False):
            tensor.copy_(value)
    torch.set_rng_state(saved["cpu generator"])
    torch.cuda.set_rng_state(saved["device generator"])
    second = [plan(step.body, batch, capture=True, changing=step.changing).loss.clone() for batch in data]
    assert torch.equal(torch.stack(first), torch.stack(second))
    assert_same(step.named(), end)
    plan.close()


@pytest.mark.skipif(not distributed.is_nccl_available(), reason="needs NCCL")
def test_ddp_is_captured_by_the_documented_recipe(monkeypatch, tmp_path):
    """One process on NCCL: its all-reduce is part of the graph, and changes nothing."""
    data = batches(3, device="cuda")
    want = run("serial", data, steps=15)
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        step = Step(make_learner(), "cuda")
        plan = create("graph", step.learner, CUDA, processes=2)  # what it does for several, it does here
        with plan.construction():
            step.model = DistributedDataParallel(
                step.learner, device_ids=[0], broadcast_buffers=False, gradient_as_bucket_view=True
            )
        torch.manual_seed(3)
        losses = [plan(step.body, data[k % 3], capture=True, changing=step.changing).loss.clone() for k in range(15)]
        assert plan.warmup_steps == 11
        assert step.bodies == 11 + 1
        assert_same({"losses": torch.stack(losses), **step.named()}, want)
        plan.close()
        step.model = step.learner
    finally:
        distributed.destroy_process_group()


def test_the_choice_leaves_no_trace():
    step, data = real_step("serial", method=NOISY, amp="fp16", ema=0.9)
    take(step, data, 3)
    before = {str(i): value.clone() for i, value in enumerate(step.changing())}
    state = torch.cuda.get_rng_state()
    choice = choose(step, data[:-1])
    assert [timing.reason for timing in choice.timings] == [None, None, None]
    assert all(timing.milliseconds > 0 for timing in choice.timings)
    assert_same({str(i): value for i, value in enumerate(step.changing())}, before)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert step.plan.name == choice.name
    assert isinstance(step.plan, Graph) == (choice.name == "graph")
