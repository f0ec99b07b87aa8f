"""Measure the fused feature fusion against PyTorch's modules, eager and compiled.

    python -m benchmarks.fusion                                  # this machine's CPU, some minutes
    python -m benchmarks.fusion --device cuda --out FOLDER
    python -m benchmarks.fusion --table benchmarks/results/FOLDER/fusion.csv

Writes fusion.csv (a row a case, variant and mode), fusion.md (tables and targets) and fusion.png.

Modes: forward+backward through autograd with fresh gradients; forward in training, under no_grad; backward after an
untimed forward; inference, with frozen norms. All end at the pooled features and update running statistics in training.
On a GPU also graph, the step inside a CUDA graph, and host, the time to enqueue it; the variant engine is autograd's
engine alone. The floor is the larger of a copy of the least bytes and of the products at the rate of torch.mm, both
measured in the same run (`fusion_cases.py`). float32 means full float32 for all, without tf32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from . import command, fusion_report
from .calls import Call
from .fusion_cases import FusionCase, FusionData, fusion_cases_for
from .fusion_variants import fusion_errors, fusion_variants_for
from .memory import launches, peak_bytes, saved_bytes

MODES = ("forward+backward", "forward", "backward", "inference")


def _facts(case: FusionCase, data: FusionData, calls: Mapping[str, Call], kind: str) -> dict[str, dict[str, Any]]:
    errors = fusion_errors(case, data, calls, kind)
    mode = MODES[0] if kind == "training" else kind
    facts: dict[str, dict[str, Any]] = {}
    for name, call in calls.items():
        facts[name] = {
            **errors[name],
            "peak_mb": peak_bytes(call, data, mode) / 1e6,
            "launches": launches(call, data, mode),
        }
        if kind == "training":
            facts[name]["saved_mb"] = saved_bytes(call, data) / 1e6
    return facts


def main() -> int:
    torch.backends.cudnn.benchmark = True  # eager's best
    torch.backends.cudnn.allow_tf32 = (
        False  # float32 is full float32 for everybody: products outside cuDNN have no tf32
    )
    benchmark = command.Benchmark(
        "fusion", __doc__ or "", fusion_cases_for, fusion_variants_for, MODES, _facts, "floor", fusion_report.tables,
        fusion_report.plot, fusion_report.FIELDS, small=10e6, time=0.4,
    )  # fmt: skip
    return command.run(benchmark)


if __name__ == "__main__":
    raise SystemExit(main())
