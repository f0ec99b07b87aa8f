"""How fast a cohort trains, beside a naive loop and beside its networks alone.

    python -m benchmarks.train                        # this machine's CPU, some minutes
    python -m benchmarks.train --device cuda --out FOLDER

The same measurement as `fflfast bench train` on fixed cases; see fflfast/bench. Writes train.csv and train.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fflfast.bench import Result, measure
from fflfast.bench.report import dtype_of, layout_of
from fflfast.training import ConfigError, resolve

from .. import report
from ..options import arguments, keep_table, results, usable_device
from ..report import MADE
from .cases import Case, cases

__all__ = ["FIELDS", "main", "rows_of", "table"]

FIGURES = (
    "images_per_second", "step_ms", "p20_ms", "p80_ms", "times_naive", "overhead_percent", "peak_mb", "launches",
    "first_loss",
)  # fmt: skip
RATES = ("loader", "step", "end_to_end")
FIELDS = (
    "case", "arch", "classes", "image_size", "batch", "variant", "dtype", "layout", *FIGURES, "launches_are",
    "not_measured", *(f"{rate}_images_per_second" for rate in RATES), "steps", "goal_times_naive",
    "goal_overhead_percent", *MADE,
)  # fmt: skip


def rows_of(case: Case, result: Result) -> Iterator[dict[str, Any]]:
    """Yield a row a variant; one that did not run has nothing but the reason."""
    for row in result.rows:
        figures = {key: "" if value is None else value for key, value in result.figures(row).items()}
        rates = {f"{key}_images_per_second": value for key, value in result.rates.items() if row is result.fastest}
        yield {
            **case.columns, "variant": row.variant.name, "dtype": dtype_of(result, row),
            "layout": layout_of(result, row), **figures, "launches_are": result.launches, **rates,
            "steps": result.steps,
        }  # fmt: skip
    for name, reason in result.refused.items():
        yield {**case.columns, "variant": name, "not_measured": reason}


def table(rows: list[dict[str, str]]) -> str:
    """Return a Markdown table a case, and each goal beside what was reached."""
    parts = []
    for case in dict.fromkeys(row["case"] for row in rows):
        here = [row for row in rows if row["case"] == case]
        ran = [row for row in here if not row["not_measured"]]
        parts.append(f"### {case}")
        if ran:
            head = (
                "variant", "arithmetic", "images/s", "ms a step (20th … 80th percentile)", "× naive", "over floor",
                "peak memory", ran[0]["launches_are"],
            )  # fmt: skip
            parts.append(report.markdown(head, map(_line, ran)))
        notes = [f"- {row['variant']} not measured: {row['not_measured']}" for row in here if row["not_measured"]]
        notes += [f"- {line}" for line in (*_rates(ran), *_goals(ran))]
        if notes:
            parts.append("\n".join(notes))
    return "\n\n".join([*parts, report.made_with(rows)])


def _line(row: dict[str, str]) -> tuple[str, ...]:
    times = f"{float(row['step_ms']):.4g} ({float(row['p20_ms']):.4g} … {float(row['p80_ms']):.4g})"
    return (
        row["variant"],
        f"{row['dtype']} {row['layout']}",
        report.value(row, "images_per_second", "{:,.0f}"),
        times,
        report.value(row, "times_naive", "{:.2f}"),
        report.value(row, "overhead_percent", "{:+.1f} %"),
        report.value(row, "peak_mb", "{:,.0f} MB"),
        report.value(row, "launches", "{:,.0f}"),
    )


def _ours(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [row for row in rows if row["variant"] != "naive" and not row["variant"].startswith("floor")]


def _rates(rows: list[dict[str, str]]) -> Iterator[str]:
    for row in rows:
        if row["end_to_end_images_per_second"]:
            loader, step, both = (f"{float(row[f'{rate}_images_per_second']):,.0f}" for rate in RATES)
            yield f"{row['variant']}, images/s: loader alone {loader}, step alone {step}, end to end {both}"


def _goals(rows: list[dict[str, str]]) -> Iterator[str]:
    """Say of each goal whether the best of ours meets it."""
    for field, text, unit, best, meets in (
        ("times_naive", "times the naive loop", "", max, lambda got, goal: got >= goal),
        ("overhead_percent", "over the floor", " %", min, lambda got, goal: got <= goal),
    ):
        reached = [(float(row[field]), row["variant"]) for row in _ours(rows) if row[field]]
        if not reached or not rows[0][f"goal_{field}"]:
            continue
        goal, (got, variant) = float(rows[0][f"goal_{field}"]), best(reached)
        outcome = "met" if meets(got, goal) else "missed"
        yield f"goal {goal:g}{unit} {text}: {outcome}, {got:.3g}{unit} ({variant})"


def main() -> int:
    """Measure every case that is asked for and keep the rows; returns the exit code."""
    parser = arguments("train", __doc__)
    parser.add_argument("--case", action="append", help="a part of a case's name; may be given again")
    parser.add_argument("--variants", help="some of naive,serial,streams,graph,floor (default: all that run here)")
    parser.add_argument("--steps", type=int, help="timed steps of each variant (default: by case)")
    parser.add_argument("--table", type=Path, metavar="CSV", help="print the table of earlier results and stop")
    options = parser.parse_args()
    if options.table is not None:
        print(table(report.read(options.table)))
        return 0
    device = usable_device("train", options)
    if device is None:
        return 1
    file = results(options, device, "train")
    made = report.provenance(device, "benchmarks.train")
    variants = None if options.variants is None else options.variants.split(",")
    rows: list[dict[str, Any]] = []
    for case in cases(device):
        if options.case and not any(part in case.name for part in options.case):
            continue
        print(case.name, flush=True)
        try:
            result = measure(
                resolve(case.config(device)).config, steps=options.steps or case.steps, variants=variants,
                num_classes=case.classes, tell=lambda line: print(f"  {line}", flush=True),
            )  # fmt: skip
        except ConfigError as error:  # torchvision is missing, say: the other cases can still run
            print(f"  left out: {error}", flush=True)
            continue
        rows += [{**row, **made} for row in rows_of(case, result)]
        report.write(file, rows, FIELDS)  # after each case: what is measured is kept, whatever comes
    if not rows:
        print("benchmarks.train: nothing was measured", file=sys.stderr)
        return 1
    keep_table(file, table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
