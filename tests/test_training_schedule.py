"""Schedules against PyTorch's own and against values worked out by hand."""

from __future__ import annotations

import pytest
import torch

from fflfast.training.schedule import learning_rate_factor, ramp_up, rescale_milestones


@pytest.mark.parametrize(
    ("epoch", "weight"), [(0, 0.0067), (10, 0.0218), (20, 0.060), (40, 0.2865), (60, 0.7316), (80, 1.0), (300, 1.0)]
)
def test_ramp_up_of_the_paper(epoch, weight):
    assert ramp_up(epoch, 80) == pytest.approx(weight, abs=6e-5)


@pytest.mark.parametrize("epoch", [0, 5])
def test_no_ramp_up(epoch):
    assert ramp_up(epoch, 0) == 1.0


def _rates(scheduler_class, steps, **options):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = scheduler_class(optimizer, **options)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_multistep_is_that_of_pytorch():
    expected = _rates(torch.optim.lr_scheduler.MultiStepLR, 10, milestones=[3, 7], gamma=0.2)
    for epoch, rate in enumerate(expected):
        for step in (4 * epoch, 4 * epoch + 3):
            factor = learning_rate_factor("multistep", step, 4, epochs=10, milestones=[3, 7], gamma=0.2)
            assert factor == pytest.approx(rate)


def test_cosine_is_that_of_pytorch():
    expected = _rates(torch.optim.lr_scheduler.CosineAnnealingLR, 40, T_max=40)
    factors = [learning_rate_factor("cosine", step, 4, epochs=10) for step in range(40)]
    assert factors == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("schedule", ["multistep", "cosine"])
def test_warm_up_rises_in_equal_parts_to_the_peak(schedule):
    factors = [learning_rate_factor(schedule, step, 5, epochs=10, warmup_epochs=2) for step in range(11)]
    assert factors[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
    assert factors[10] == pytest.approx(1.0)


def test_warm_up_of_part_of_an_epoch():
    factors = [learning_rate_factor("multistep", step, 8, epochs=1, warmup_epochs=0.5) for step in range(8)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1])


def test_cosine_after_warm_up_ends_near_zero():
    assert learning_rate_factor("cosine", 99, 10, epochs=10, warmup_epochs=2) == pytest.approx(0.00038, abs=1e-5)


def test_unknown_schedule():
    with pytest.raises(ValueError, match="'multistep' or 'cosine', got 'linear'"):
        learning_rate_factor("linear", 0, 1, epochs=1)


@pytest.mark.parametrize(
    ("epochs", "expected"), [(300, [150, 225]), (30, [15, 22]), (600, [300, 450]), (1, [1]), (2, [1, 2])]
)
def test_rescaled_milestones(epochs, expected):
    assert rescale_milestones([150, 225], epochs, 300) == expected
