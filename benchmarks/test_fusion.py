"""The cases of `python -m benchmarks.fusion` under pytest-benchmark; see test_loss.py."""

from __future__ import annotations

import os

import pytest
import torch

from .calls import context
from .fusion_cases import fusion_cases_for
from .fusion_variants import fusion_errors, fusion_variants_for
from .measure import once

DEVICE = torch.device(os.environ.get("FFLFAST_TEST_DEVICE", "cpu"))
PAIRS = [(case, variant) for case in fusion_cases_for(DEVICE) for variant in fusion_variants_for(case, DEVICE)]


@pytest.mark.parametrize(
    ("case", "variant"), [pytest.param(case, variant, id=f"{case.name}-{variant[0]}") for case, variant in PAIRS]
)
def test_forward_and_backward(repeated, case, variant):
    torch.compiler.reset()
    name, factory = variant
    data = case.draw(DEVICE)
    call = factory(case)
    errors = fusion_errors(case, data, {name: call}, "training")[name]
    assert errors["output_error"] < 1e-1
    with context(call):
        benchmark = repeated(lambda: once(call, data), DEVICE)
    benchmark.group = case.name
    benchmark.extra_info.update(errors)
