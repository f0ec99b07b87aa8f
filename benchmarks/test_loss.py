"""The cases of `python -m benchmarks.loss` under pytest-benchmark: pytest benchmarks --benchmark-group-by=group.

FFLFAST_TEST_DEVICE chooses the device. The numbers of the README come from `python -m benchmarks.loss`, whose variants
take turns; this is for watching one variant over time (--benchmark-autosave, --benchmark-compare).
"""

from __future__ import annotations

import os

import pytest
import torch

from .calls import context
from .cases import cases_for
from .measure import once
from .variants import variants_for

DEVICE = torch.device(os.environ.get("FFLFAST_TEST_DEVICE", "cpu"))


@pytest.mark.parametrize("variant", variants_for(DEVICE), ids=lambda variant: variant[0])
@pytest.mark.parametrize("case", cases_for(DEVICE), ids=lambda case: case.name)
def test_forward_and_backward(repeated, case, variant):
    torch.compiler.reset()
    name, factory = variant
    data = case.draw(DEVICE)
    loss = factory(case)
    with context(loss):
        errors = case.errors(data, {name: once(loss, data)})[name]
        assert errors["loss_error"] < 1e-2
        benchmark = repeated(lambda: once(loss, data), DEVICE)
    benchmark.group = case.name
    benchmark.extra_info.update(errors)
