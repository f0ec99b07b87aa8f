"""The cases of `python -m benchmarks.augment` under pytest-benchmark; see test_loss.py."""

from __future__ import annotations

import os

import pytest
import torch

from .augment_cases import augment_cases_for
from .augment_variants import augment_variants_for, differences
from .calls import context

DEVICE = torch.device(os.environ.get("FFLFAST_TEST_DEVICE", "cpu"))
PAIRS = [(case, variant) for case in augment_cases_for(DEVICE) for variant in augment_variants_for(case, DEVICE)]


@pytest.mark.parametrize(
    ("case", "variant"), [pytest.param(case, variant, id=f"{case.name}-{variant[0]}") for case, variant in PAIRS]
)
def test_forward(repeated, case, variant):
    torch.compiler.reset()
    name, factory = variant
    data = case.draw(DEVICE)
    call = factory(case)
    difference = differences(case, data, {name: call})[name]
    assert difference < 0.1
    with context(call), torch.no_grad():
        benchmark = repeated(lambda: call(*data.arguments), DEVICE)
    benchmark.group = case.name
    benchmark.extra_info["difference"] = difference
