"""The loops that `fflfast bench train` holds side by side train alike, and its figures are what they say."""

from __future__ import annotations

import mmap
import os

import pytest
import torch
import torch.nn.functional as F
from bench_runs import CPU, SMALL, resolved

from fflfast.bench import Result, Row, Variant, figures
from fflfast.bench.floor import Floor
from fflfast.bench.naive import NaiveLoop, kl_divergence
from fflfast.bench.subject import Job, opened
from fflfast.cohort import Learner
from fflfast.ops.augment import augment, normalization_table
from fflfast.training import ConfigError, TrainConfig, resolve
from fflfast.training.build import build_learner

# ---- the loops ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "ffl"},
        {"method": "dml"},
        {"method": "dml", "arch": ["tiny"] * 3, "trunk": "none"},
        {"method": "single", "arch": ["tiny"]},
        {"method": "ffl", "label_smoothing": 0.1, "arch": ["tiny", "resnet8"]},
    ],
    ids=lambda settings: f"{settings['method']}-{len(settings.get('arch', 'ab'))}",
)
def test_the_naive_loop_trains_as_ours_does(settings):
    config = resolved(**settings)
    losses = {}
    for variant in (Variant("naive"), Variant("ours", "serial")):
        with opened(Job(variant, config, None, 1)) as subject:
            losses[variant.name] = [float(subject.take(batch)) for batch in subject.pool]
    assert len(losses["naive"]) == 4
    assert len(set(losses["naive"])) == 4
    # 1e-7 on the teacher's probabilities and rounding; both grow from step to step.
    assert losses["naive"] == pytest.approx(losses["serial"], rel=2e-4)


def test_the_naive_loop_counts_right_answers_and_updates_everything():
    config = resolved()
    learner = build_learner(config, 10)
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    loop = NaiveLoop(learner, config, CPU)
    images, target = torch.randn(24, 3, 8, 8), torch.arange(24) % 10
    learner.eval()
    with torch.no_grad():
        outputs = learner.predict(images)
    expected = [int((outputs[name].argmax(1) == target).sum()) for name in ("sub0", "sub1", "fused")]
    loop(images, target)
    assert loop.right == expected
    unchanged = [name for name, value in learner.state_dict().items() if torch.equal(value, before[name])]
    statistics = ("running_mean", "running_var", "num_batches_tracked")  # in eval mode here
    assert [name for name in unchanged if not name.endswith(statistics)] == []
    decays = [group["weight_decay"] for optimizer in loop.optimizers for group in optimizer.param_groups]
    assert decays == [1e-4, 1e-5]


def test_the_divergence_is_that_of_the_published_code():
    student, teacher = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    teacher.requires_grad_()
    exact = 9 * F.kl_div(F.log_softmax(student / 3, 1), F.softmax(teacher / 3, 1), reduction="batchmean")
    got = kl_divergence(student, teacher, 3.0)
    assert not got.requires_grad  # the teacher is detached
    assert float(got) == pytest.approx(exact.item(), rel=1e-4)
    assert float(got) != exact.item()  # the 1e-7


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"method": "fflfast.bench.floor:Floor"}, "knows the methods"), ({"mixup": 0.2}, "does not mix")],
    ids=["method", "mixup"],
)
def test_what_the_naive_loop_is_not(settings, words):
    config = resolved(**settings)
    with pytest.raises(ConfigError, match=words):
        NaiveLoop(build_learner(config, 10), config, CPU)


def test_the_floor_is_the_cross_entropy_of_every_network_from_the_same_weights():
    config = resolved()
    ours = build_learner(config, 10)
    floor = Learner(ours.cohort, Floor(ours.cohort, 10))
    assert floor.term_names == ("ce/sub0", "ce/sub1")
    assert list(floor.method.parameters()) == []
    with opened(Job(Variant("floor", "serial"), config, None, 1)) as subject:
        first = float(subject.take(subject.pool[0]))
    with opened(Job(Variant("naive"), config, None, 1)) as subject:
        images, target = subject.pool[0]
    output = ours.train().cohort(images)
    assert first == pytest.approx(sum(F.cross_entropy(z, target).item() for z in output.logits), rel=1e-5)


def test_a_pool_is_made_of_whole_batches_and_the_images_of_an_epoch():
    config = resolved(limit_train=60, flip=True)
    data = resolve(TrainConfig(**{**SMALL, "arch": ["tiny", "tiny"]})).data
    with (
        opened(Job(Variant("naive"), config, None, 1)) as naive,
        opened(Job(Variant("ours", "serial"), config, None, 1)) as ours,
    ):
        assert [len(target) for _, target in naive.pool] == [24, 24]
        batch = ours.feed.batch(ours.pool[1])
        table = normalization_table(data.mean, data.std)
        images = augment(batch.images, batch.index, seed=0, epoch=0, pad=1, flip=True, table=table)
        assert torch.equal(naive.pool[1][0], images)
        assert torch.equal(naive.pool[1][1], batch.target)
    with (
        pytest.raises(ConfigError, match="60 images"),
        opened(Job(Variant("naive"), resolved(limit_train=60, batch_size=64), None, 1)),
    ):
        pass


# ---- figures --------------------------------------------------------------------------------------------------


def test_ratios_are_those_of_blocks_side_by_side():
    # The machine was four times slower in the second block, for both.
    assert figures.ratio([2.0, 8.0, 2.0], [1.0, 4.0, 1.0]) == 2.0
    assert figures.overhead([1.1, 4.4, 1.2], [1.0, 4.0, 1.0]) == pytest.approx(0.1)
    assert figures.spread([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == (3.5, 2.0, 5.0)
    with pytest.raises(ValueError):
        figures.ratio([1.0], [1.0, 2.0])


def test_the_figures_of_a_row():
    naive = Row(Variant("naive"), [0.5, 0.4, 0.6])
    ours = Row(Variant("ours", "serial"), [0.25, 0.2, 0.2], 2.0, 3_000_000, 9)
    floor = Row(Variant("floor", "serial"), [0.2, 0.2, 0.16])
    compiled = Row(Variant("ours", "serial", True), [0.1] * 3)
    result = Result(resolved(), CPU, 2, [naive, ours, floor, compiled])
    assert result.figures(ours) == {
        "images_per_second": 24 / 0.2, "step_ms": 200.0, "p20_ms": 200.0, "p80_ms": 250.0, "times_naive": 2.0,
        "overhead_percent": pytest.approx(25), "peak_mb": 3.0, "launches": 9, "first_loss": 2.0,
    }  # fmt: skip
    assert result.figures(compiled)["overhead_percent"] is None  # its floor, compiled too, did not run
    assert result.figures(floor)["overhead_percent"] is None
    assert result.figures(naive)["times_naive"] == 1.0
    assert result.fastest is compiled
    assert result.launches == "operator calls"


def test_operators_that_others_call_do_not_count():
    x = torch.randn(2, 3, 8, 8)
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)

    def step():
        F.conv2d(x, weight).relu()

    assert figures.count_launches(step, CPU) == 2
    # The gradient of the sum, that of the convolution, and what puts it into weight.grad come to these.
    assert figures.count_launches(lambda: F.conv2d(x, weight).sum().backward(), CPU) > 4


class Event:
    def __init__(self, name):
        self.name = name


class Profile:
    """What torch.profiler sees of a step on a GPU."""

    EVENTS = (
        "cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaMemcpyAsync",
        "cudaMemsetAsync", "cudaGraphLaunch", "cudaLaunchCooperativeKernel",
        "cudaDeviceSynchronize", "cudaEventRecord", "cudaStreamWaitEvent", "aten::mm", "Memcpy HtoD (Pinned -> Device)",
        "ampere_sgemm_128x64_nn", "cudaGraphInstantiate", "cudaOccupancyMaxActiveBlocksPerMultiprocessor",
    )  # fmt: skip

    def __init__(self, **options):
        self.options = options

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def events(self):
        return [Event(name) for name in self.EVENTS]


def test_launches_on_a_gpu_are_the_hosts_calls(monkeypatch):
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    assert figures.count_launches(lambda: None, torch.device("cuda")) == 8


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux")
def test_peak_memory_is_what_came_on_top_and_went_again():
    memory = figures.PeakMemory(CPU)
    assert memory.read() < 16e6
    with mmap.mmap(-1, 64 << 20) as fresh:  # not from the heap, which may have kept so much of what was freed before
        fresh[:: mmap.PAGESIZE] = bytes((64 << 20) // mmap.PAGESIZE)  # touches each page
    assert 60e6 < memory.read() < 100e6
    assert figures.PeakMemory(CPU).read() < 16e6  # begins anew
