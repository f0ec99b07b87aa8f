"""Sums of losses and right answers: in place on the device, exact in a checkpoint, over any number of processes."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from steps import bits, same_bits

from fflfast.cohort import StepOutput
from fflfast.tasks import Classification, Score
from fflfast.tasks.classification import Accuracy
from fflfast.training.log import Means
from fflfast.training.processes import Processes

NAMES = ("loss", "ce/sub0", "kl/a")


def _output(*values):
    return StepOutput(torch.tensor(values[0]), torch.tensor(values[1:]), {})


class _Two(Processes):
    """Process 0 of two, the other of which is a copy held here: sums add what it would have."""

    count = 2

    def __init__(self, *others):
        self.others = others

    def sum_(self, tensors):
        tensors = list(tensors)
        for other in self.others:
            if isinstance(other, Means):
                images, _, _, sums = other._parts(other.tensors()[0])
                theirs = [images, sums]
            else:
                theirs = other.tensors()
            for own, their in zip(tensors, theirs, strict=True):
                own.add_(their)


def test_means_are_over_images():
    means = Means(NAMES, "cpu")
    assert means.peek() == means.read() == ({}, 0, 0)
    assert means.epoch_means() == {}
    means.update(_output(1.0, 2.0, 4.0), 3)
    means.update(_output(5.0, 2.0, 0.0), 1)
    assert means.peek() == (dict(zip(NAMES, (2.0, 2.0, 3.0), strict=True)), 2, 0)
    assert means.read().means["loss"] == 2.0
    assert means.read() == ({}, 0, 0)
    means.update(_output(10.0, 2.0, 0.0), 4)
    means.read()
    assert means.epoch_means() == dict(zip(NAMES, (6.0, 2.0, 1.5), strict=True))
    means.reset()
    assert means.epoch_means() == {}


@pytest.mark.parametrize("lazily", [False, True])
def test_updates_are_in_place_from_the_first_on(lazily):
    cpu = None if lazily else "cpu"
    means, metric = Means(NAMES, cpu), Classification(3).metric(("a", "b"), cpu)
    assert len(means.tensors()) == len(metric.tensors()) == (0 if lazily else 1)
    logits = {"a": torch.eye(3), "b": torch.eye(3).flip(0), "other": torch.zeros(3, 3)}
    means.update(_output(1.0, 2.0, 3.0), 3)
    metric.update(logits, torch.arange(3))
    assert metric.read() == {"a": Score(3, 3), "b": Score(1, 3)}
    (sums,), (counts,) = means.tensors(), metric.tensors()
    for measure in (means, metric):
        measure.load(json.loads(json.dumps(measure.state())))
        measure.reset()
        measure.read()
    means.update(_output(1.0, 2.0, 3.0), 3)
    metric.update(logits, torch.arange(3))
    assert means.tensors()[0] is sums
    assert metric.tensors()[0] is counts
    assert means.read().means == dict(zip(NAMES, (1.0, 2.0, 3.0), strict=True))
    assert metric.read()["b"] == Score(1, 3)


def test_a_step_left_out_is_counted_and_adds_nothing():
    means, metric = Means(NAMES, "cpu"), Accuracy(("a",), "cpu")
    logits, target = {"a": torch.eye(3)}, torch.arange(3)
    for bad, value in ((False, 2.0), (True, math.nan), (True, math.inf), (False, 4.0)):
        means.update(_output(value, value, 1.0), 3, torch.tensor(bad))
        metric.update(logits, target, torch.tensor(bad))
    assert means.read() == (dict(zip(NAMES, (3.0, 3.0, 1.0), strict=True)), 4, 2)
    assert metric.read() == {"a": Score(6, 6)}
    means.update(_output(math.nan, 1.0, 1.0), 3, torch.tensor(True))
    assert means.read() == ({}, 1, 1)
    assert means.epoch_means() == dict(zip(NAMES, (3.0, 3.0, 1.0), strict=True))


def _measured(seed, steps=3, sized=(24, 24, 5)):
    generator = torch.Generator().manual_seed(seed)
    means, metric = Means(NAMES, "cpu"), Accuracy(("a", "b"), "cpu")
    for size in sized[:steps]:
        means.update(_output(*torch.rand(3, generator=generator).tolist()), size, torch.tensor(size == 5))
        logits = {name: torch.randn(size, 3, generator=generator) for name in "ab"}
        metric.update(logits, torch.randint(3, (size,), generator=generator))
    return means, metric


@pytest.mark.parametrize("read", [False, True])
def test_a_state_is_exact(read):
    for measure, twin in zip(_measured(0), _measured(1), strict=True):
        if read:
            measure.read()
        twin.load(json.loads(json.dumps(measure.state(), allow_nan=False)))
        assert same_bits(bits(twin.tensors()), bits(measure.tensors()))
        assert twin.state() == measure.state()
        assert twin.read() == measure.read()


def test_reading_over_processes_leaves_each_its_own():
    (means, metric), (other_means, other_metric) = _measured(0), _measured(1, steps=2)
    together = copy.deepcopy(means)
    before = bits([*means.tensors(), *metric.tensors()])
    interval = means.peek(_Two(other_means))
    scores = metric.read(_Two(other_metric))
    assert same_bits(bits([*means.tensors(), *metric.tensors()]), before)
    images = means.state()["images"] + other_means.state()["images"]
    assert images == 48 + 48  # the step of 5 images was left out
    for k, name in enumerate(NAMES):
        total = means.state()["sums"][k] + other_means.state()["sums"][k]
        assert interval.means[name] == pytest.approx(total / images, rel=1e-6)
    assert (interval.steps, interval.skipped) == (3, 1)
    assert scores["a"] == Score(metric.read()["a"].correct + other_metric.read()["a"].correct, 53 + 48)
    assert together.read(_Two(other_means)) == interval
    assert together.epoch_means() == interval.means


@pytest.mark.parametrize("which", [0, 1], ids=["means", "accuracy"])
@pytest.mark.parametrize(("then", "now"), [(1, 1), (2, 2), (2, 1), (1, 2), (3, 2)])
def test_states_go_over_to_any_number_of_processes(which, then, now):
    before = [_measured(seed)[which] for seed in range(then)]
    states = json.loads(json.dumps([measure.state() for measure in before]))
    after = [_measured(9)[which] for _ in range(now)]
    for rank, measure in enumerate(after):
        measure.load(type(measure).share(states, rank, now))
    if then == now:
        assert [m.state() for m in after] == [m.state() for m in before]
    first, *others = after
    total, *rest = before
    left = first.read(_Two(*others))
    right = total.read(_Two(*rest))
    if which == 0:
        assert left[1:] == right[1:]
        assert left.means == pytest.approx(right.means, rel=1e-6)
        assert list(left.means) == list(NAMES)
    else:
        assert left == right
        assert left["a"].total == 53 * then


def test_a_process_without_a_batch_has_a_share_of_the_score():
    empty, full = Accuracy(("a",), "cpu"), Accuracy()
    full.update({"a": torch.eye(3)}, torch.arange(3))
    assert empty.read(_Two(full)) == {"a": Score(3, 3)}
    states = [empty.state(), Accuracy().state(), full.state()]
    for names in ((), ("a",)):
        metric = Accuracy(names)
        metric.load(Accuracy.share(states, 0, 1))
        assert metric.read() == {"a": Score(3, 3)}
        metric = Accuracy(names)
        metric.load(Accuracy.share(states, 1, 2))
        assert metric.read() == {}


def test_states_of_version_0_1():
    means, metric = Means(NAMES), Classification(3).metric()
    old = {"sums": None, "images": 0, "totals": [4.0, 2.0, 8.0], "total_images": 4}
    means.load(old, torch.device("cpu"))
    metric.load({"names": (), "correct": None, "total": 0}, torch.device("cpu"))
    assert means.peek() == ({}, 0, 0)
    assert means.epoch_means() == dict(zip(NAMES, (1.0, 0.5, 2.0), strict=True))
    assert metric.read() == {}
    means.load({**old, "sums": [3.0, 6.0, 9.0], "images": 3}, torch.device("cpu"))
    metric.load({"names": ["a"], "correct": [2], "total": 3}, torch.device("cpu"))
    assert means.read().means == dict(zip(NAMES, (1.0, 2.0, 3.0), strict=True))
    assert metric.read() == {"a": Score(2, 3)}
