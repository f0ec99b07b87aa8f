"""The cases of `python -m benchmarks.loss` under pytest-benchmark: pytest benchmarks --benchmark-group-by=group.

FFLFAST_TEST_DEVICE chooses the device. The numbers of the README come from `python -m benchmarks.loss`, whose variants
take turns; this is for watching one variant over time (--benchmark-autosave, --benchmark-compare).
"""

from __future__ import annotations

import os
import time

import pytest
import torch

from .cases import Case, cases_for
from .measure import errors, once
from .variants import context, variants_for

pytest.importorskip("pytest_benchmark")

DEVICE = torch.device(os.environ.get("FFLFAST_TEST_DEVICE", "cpu"))


@pytest.mark.parametrize("variant", variants_for(DEVICE), ids=lambda variant: variant[0])
@pytest.mark.parametrize("case", cases_for(DEVICE), ids=lambda case: case.name)
def test_forward_and_backward(benchmark, case: Case, variant):
    torch.compiler.reset()
    name, factory = variant
    data = case.draw(DEVICE)
    loss = factory(case)
    benchmark.group = case.name
    with context(loss):
        result = once(loss, data)
        loss_error, gradient_error = errors(case, data, {name: result})[name]
        del result
        assert loss_error < 1e-2
        benchmark.extra_info.update(loss_error=loss_error, gradient_error=gradient_error)

        def call():
            once(loss, data)
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        # Five rounds of the slow ones, more of those that fit into half a second.
        once_took = _seconds(call)
        benchmark.pedantic(
            call,
            rounds=max(5, min(200, int(0.5 / once_took))),
            iterations=max(1, int(1e-3 / once_took)),
            warmup_rounds=2,
        )


def _seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
