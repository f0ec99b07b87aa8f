"""What the cases under pytest-benchmark share."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.fixture
def repeated(request: pytest.FixtureRequest) -> Callable[[Callable[[], object], torch.device], Any]:
    """Measure a call: five rounds of a slow one, more of those that fit into half a second."""
    pytest.importorskip("pytest_benchmark")
    benchmark = request.getfixturevalue("benchmark")

    def repeat(call: Callable[[], object], device: torch.device) -> Any:
        def finished() -> None:
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()

        start = time.perf_counter()
        finished()
        once_took = time.perf_counter() - start
        benchmark.pedantic(
            finished,
            rounds=max(5, min(200, int(0.5 / once_took))),
            iterations=max(1, int(1e-3 / once_took)),
            warmup_rounds=2,
        )
        return benchmark

    return repeat
