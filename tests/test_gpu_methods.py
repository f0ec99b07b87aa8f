"""Every method for classification on a real GPU: the bits of serial on every plan, and no wait of the host."""

from __future__ import annotations

import pytest
import torch
from method_steps import METHODS, settings
from test_gpu_execution import assert_same, deterministic, pytestmark, real_step, take

__all__ = ["deterministic", "pytestmark"]

OPTIONS = {"amp": "bf16", "channels_last": True, "nan": "skip"}


@pytest.mark.parametrize("method", METHODS)
def test_every_plan_gives_the_bits_of_serial(method):
    """15 steps with a changing schedule and short batches in between."""
    results = []
    for plan in ("serial", "streams", "graph"):
        torch.manual_seed(0)
        step, data = real_step(plan, **settings(method), **OPTIONS)
        losses = take(step, data, 15)
        state = {str(i): value.clone() for i, value in enumerate(step.changing())}
        results.append({"losses": torch.stack(losses), **state})
        step.plan.close()
    assert results[0]["losses"].isfinite().all()
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("plan", ["serial", "graph"])
def test_the_host_never_waits(method, plan):
    step, data = real_step(plan, **settings(method), **OPTIONS)
    take(step, data, 10)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        take(step, data, 10, start=10)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    step.plan.close()
