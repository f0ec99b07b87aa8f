"""`fflfast bench train` on a GPU: every plan beside the naive loop and its floor, figures from the device."""

from __future__ import annotations

import pytest
import torch
from bench_runs import resolved

from fflfast.bench import Variant, measure
from fflfast.bench.subject import Job, opened

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def result():
    return measure(resolved(device="cuda", amp="off", channels_last=True), steps=20)


def test_every_plan_runs_and_begins_with_the_same_loss(result):
    assert result.refused == {}
    plans = ["serial", "streams", "graph"]
    assert [row.variant.name for row in result.rows] == ["naive", *plans, *(f"floor {plan}" for plan in plans)]
    losses = {row.variant.name: row.first_loss for row in result.rows}
    # Convolutions run in TF32, as PyTorch has it by default.
    assert all(losses[name] == pytest.approx(losses["naive"], rel=2e-3) for name in plans)
    assert all(losses[f"floor {name}"] < losses[name] for name in plans)


def test_a_graph_is_one_launch_and_a_few_copies(result):
    launches = {row.variant.name: row.launches for row in result.rows}
    assert 1 <= launches["graph"] < 10
    assert launches["graph"] < launches["serial"] < launches["naive"]


def test_memory_and_rates_are_measured(result):
    assert all(row.peak_bytes for row in result.rows)
    assert all(value > 0 for value in result.rates.values())
    assert len(result.rates) == 3


def test_another_worker_finds_the_memory_free():
    with opened(Job(Variant("ours", "serial"), resolved(device="cuda"), None, 1)) as subject:
        subject.warm_up()
        subject.block(3)
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        assert kept < 32 << 20  # rounding to segments, nothing else
