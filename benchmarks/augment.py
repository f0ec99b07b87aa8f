"""Measure the augmentation operator against PyTorch as people write it, eager and compiled.

    python -m benchmarks.augment                                  # this machine's CPU, about a minute
    python -m benchmarks.augment --device cuda --out FOLDER
    python -m benchmarks.augment --table benchmarks/results/FOLDER/augment.csv

From uint8 images to shifted, mirrored, normalised ones. Writes augment.csv (a row a case, variant and mode), augment.md
(the tables) and augment.png.

The reference is ours in plain PyTorch; eager is the batch at once by one gather, eager-images image by image; compile
is torch.compile of eager, compile-reference that of the reference. The mode is forward; on a GPU also graph, the call
inside a CUDA graph, and host, the time to enqueue it. A difference of 0 means the bytes of the reference, which ours
promises; those who draw their own numbers are held against the nearest of all shifts and flips.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import command, report
from .augment_cases import AugmentCase, AugmentData, augment_cases_for
from .augment_variants import augment_variants_for, differences
from .calls import Call
from .memory import launches, peak_bytes
from .report import MADE, OURS, TIMES, Row, best, ratio, time_of, value

__all__ = ["FIELDS", "MODES", "main", "tables"]

MODES = ("forward",)
FIELDS = (
    "case", "batch", "size", "pad", "layout", "dtype", *TIMES, "minimal_mb", "copy_ms", "copy_share", "difference",
    "peak_mb", "launches", *MADE,
)  # fmt: skip


def _facts(case: AugmentCase, data: AugmentData, calls: Mapping[str, Call], kind: str) -> dict[str, dict[str, Any]]:
    far = differences(case, data, calls)
    return {
        name: {
            "difference": far[name],
            "peak_mb": peak_bytes(call, data, "forward") / 1e6,
            "launches": launches(call, data, "forward"),
        }
        for name, call in calls.items()
    }


def label(row: Row) -> str:
    """A case as tables and plots name it."""
    return f"({row['batch']}, {row['size']}², ±{row['pad']}), {row['layout']}, {row['dtype']}"


def tables(rows: list[Row]) -> str:
    """Everything that the results say, in Markdown."""
    return "\n\n".join(filter(None, (_table(rows), report.latency_table(rows, label))))


def _table(rows: list[Row]) -> str:
    head = [
        "(B, H², ± pad), layout, dtype", "ours (backend)", "eager", "image by image", "torch.compile", "× eager",
        "× compile", "share of a copy", "difference from the reference, ours / eager / compile",
        "peak memory, ours / eager / compile", "launches, ours / eager / compile",
    ]  # fmt: skip
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        here = {row["variant"]: row for row in rows if row["case"] == case and row["mode"] == "forward"}
        ours, eager = best(here, OURS.__contains__), here.get("eager")
        compiled = best(here, lambda variant: variant.startswith("compile"))
        all_ours = [here[name] for name in OURS if name in here]
        three = (ours, eager, compiled)
        lines.append([
            label(next(iter(here.values()))),
            ", ".join(f"{time_of(row)} ({row['variant']})" for row in all_ours) or "not measured yet",
            *(time_of(row) for row in (eager, here.get("eager-images"), compiled)),
            ratio(eager, ours), ratio(compiled, ours),
            " / ".join(f"{100 * float(row['copy_share']):.2g} %" for row in all_ours) or "–",
            " / ".join(_difference(row) for row in three),
            " / ".join(value(row, "peak_mb", "{:.3g}") for row in three) + " MB",
            " / ".join(value(row, "launches", "{:.0f}") for row in three),
        ])  # fmt: skip
    return f"{report.markdown(head, lines)}\n\nMedians. {report.made_with(rows)}"


def _difference(row: Row | None) -> str:
    found = value(row, "difference", "{:.1e}")
    return "none" if row is not None and float(row["difference"]) == 0 else found


def _plot(rows: list[Row], path: Path) -> None:
    report.plot(rows, path, "augmentation", label, "copy", "a copy of the least bytes", MODES[0])


def main() -> int:
    benchmark = command.Benchmark(
        "augment", __doc__ or "", augment_cases_for, augment_variants_for, MODES, _facts, "copy", tables, _plot, FIELDS,
        time=0.5,
    )  # fmt: skip
    return command.run(benchmark)


if __name__ == "__main__":
    raise SystemExit(main())
