"""Measure the fused loss against PyTorch's operators, torch.compile and the peers that are installed.

    python -m benchmarks.loss                                  # this machine's CPU, some minutes
    python -m benchmarks.loss --device cuda --out FOLDER
    python -m benchmarks.loss --table benchmarks/results/FOLDER/loss.csv

Writes loss.csv (a row a case, variant and mode), loss.md (the table of the README) and loss.png.

Modes: forward+backward through autograd with fresh gradients; forward under no_grad; backward after an untimed forward
(ours writes its gradients in the forward where it can, so that little is left there). On a GPU also graph, the step
inside a CUDA graph, and host, the time to enqueue it, autograd's engine included; the variant engine is that alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from . import command, report
from .calls import Call, Variant, context
from .cases import Case, Data, cases_for
from .measure import once
from .memory import launches, peak_bytes
from .variants import variants_for

MODES = ("forward+backward", "forward", "backward")


def _variants(case: Case, device: torch.device, compiled: bool) -> list[Variant]:
    return variants_for(device, compiled=compiled, tuned=case.tuned)


def _facts(case: Case, data: Data, calls: Mapping[str, Call], kind: str) -> dict[str, dict[str, Any]]:
    results = {}
    for name, call in calls.items():
        with context(call):
            results[name] = once(call, data)
    errors = case.errors(data, results)
    del results
    return {
        name: {**errors[name], "peak_mb": peak_bytes(call, data) / 1e6, "launches": launches(call, data)}
        for name, call in calls.items()
    }


def _tables(rows: list[dict[str, str]]) -> str:
    return "\n\n".join(filter(None, (report.table(rows), report.latency_table(rows, report.loss_label))))


def _plot(rows: list[dict[str, str]], path: Path) -> None:
    report.plot(rows, path, "FFL loss, N = 2", report.loss_label, "copy", "a copy of the least bytes")


def main() -> int:
    benchmark = command.Benchmark(
        "loss", __doc__ or "", cases_for, _variants, MODES, _facts, "copy", _tables, _plot, report.FIELDS
    )
    return command.run(benchmark)


if __name__ == "__main__":
    raise SystemExit(main())
