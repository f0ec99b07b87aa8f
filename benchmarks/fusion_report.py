"""The fusion's results as tables, held against the targets that it was built for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from . import report
from .report import MADE, OURS, STEP, TIMES, Row, best, ratio, time_of, value

__all__ = ["FIELDS", "label", "plot", "tables", "targets"]

FIELDS = (
    "case", "batch", "maps", "channels", "size", "layout", "dtype", *TIMES, "minimal_mb", "gflop", "copy_ms",
    "product_ms", "floor_ms", "bound", "floor_share", "output_error", "gradient_error", "statistics_error", "peak_mb",
    "saved_mb", "launches", *MADE,
)  # fmt: skip

MODES_SHOWN = (STEP, "inference")
# Three kernels forward, four backward, and the update of the running statistics.
LAUNCHES = 3 + 4 + 1


def label(row: Row) -> str:
    """A case as tables and plots name it."""
    return f"({row['batch']}, {row['maps']}, {row['channels']}, {row['size']}), {row['layout']}, {row['dtype']}"


def tables(rows: list[Row]) -> str:
    """Everything that the results say, in Markdown."""
    parts = [_table(rows), report.latency_table(rows, label), "Targets:", _target_table(rows)]
    return "\n\n".join(filter(None, parts))


def plot(rows: list[Row], path: Path) -> None:
    report.plot(rows, path, "fusion", label, "floor", "the floor (copy or product)")


def _cases(rows: list[Row], mode: str) -> Iterator[dict[str, Row]]:
    """By variant, the rows of each case in a mode."""
    for case in dict.fromkeys(row["case"] for row in rows):
        here = {row["variant"]: row for row in rows if row["case"] == case and row["mode"] == mode}
        if here:
            yield here


def _eager(variant: str) -> bool:
    return variant.startswith("eager")


def _compiled(variant: str) -> bool:
    return variant.startswith("compile")


def _table(rows: list[Row]) -> str:
    head = [
        "(B, N, C, H), layout, dtype", "pass", "ours (backend)", "eager, best", "torch.compile", "× eager", "× compile",
        "share of the floor (bound)", "error of outputs, ours / eager", "of gradients",
        "peak memory, ours / eager / compile", "saved for backward, ours / eager / compile", "launches",
    ]  # fmt: skip
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        for mode in MODES_SHOWN:
            for here in _cases([row for row in rows if row["case"] == case], mode):
                ours, eager, compiled = best(here, OURS.__contains__), best(here, _eager), best(here, _compiled)
                all_ours = [here[name] for name in OURS if name in here]
                first = next(iter(here.values()))
                three = (ours, eager, compiled)
                lines.append([
                    label(first), mode,
                    ", ".join(f"{time_of(row)} ({row['variant']})" for row in all_ours) or "not measured yet",
                    time_of(eager), time_of(compiled), ratio(eager, ours), ratio(compiled, ours),
                    " / ".join(f"{100 * float(row['floor_share']):.0f} %" for row in all_ours) + f" ({first['bound']})",
                    *(" / ".join(value(r, f, "{:.1e}") for r in three[:2]) for f in ("output_error", "gradient_error")),
                    *(" / ".join(value(r, f, "{:.3g}") for r in three) + " MB" for f in ("peak_mb", "saved_mb")),
                    " / ".join(value(r, "launches", "{:.0f}") for r in three),
                ])  # fmt: skip
    return f"{report.markdown(head, lines)}\n\nMedians. {report.made_with(rows)}"


def _target_table(rows: list[Row]) -> str:
    return report.markdown(("case", "target", "asked", "measured", ""), targets(rows))


def targets(rows: list[Row]) -> list[tuple[str, str, str, str, str]]:
    """(case, target, asked, measured, met or missed) of the best of ours, a line a target."""
    lines = []
    on_gpu = any(row["launches"] for row in rows)
    for here in _cases(rows, STEP):
        ours = best(here, OURS.__contains__)
        if ours is None:
            continue
        eager = best(here, _eager)
        same = [row for row in rows if row["case"] == ours["case"]]
        if on_gpu:
            lines.append(
                _target(ours, f"{STEP}, share of the floor ({ours['bound']})", 0.7, float(ours["floor_share"]))
            )
            # The goal is against channels_last whatever order ours was given.
            sizes = ("batch", "maps", "channels", "size", "dtype")
            twins = [
                row for row in rows
                if row["layout"] == "channels_last" and row["mode"] == STEP and all(row[k] == ours[k] for k in sizes)
            ]  # fmt: skip
            eager = best({row["variant"]: row for row in twins}, _eager) or eager
            bytes_bound = ours["bound"] == "bytes"
            lines += _faster(ours, eager, f"{STEP}, × eager channels_last", 4.0 if bytes_bound else 1.5)
            if bytes_bound:
                lines += _faster(ours, best(here, _compiled), f"{STEP}, × torch.compile", 2.0)
            lines.append(_target(ours, "launches of a step", LAUNCHES, float(ours["launches"]), at_most=True))
            for frozen in _cases(same, "inference"):
                lines += _faster(best(frozen, OURS.__contains__), best(frozen, _eager), "inference, × eager", 6.0)
        else:
            for mode in dict.fromkeys(row["mode"] for row in same):
                for timed in _cases(same, mode):
                    lines += _faster(best(timed, OURS.__contains__), best(timed, _eager), f"{mode}, × eager", 1.0)
        if eager is not None:
            share = float(ours["saved_mb"]) / float(eager["saved_mb"])
            lines.append(_target(ours, "saved for backward ÷ eager's", 0.5, share, at_most=True))
    return lines


def _faster(ours: Row | None, other: Row | None, what: str, asked: float) -> list[tuple[str, str, str, str, str]]:
    if ours is None or other is None:
        return []
    return [_target(ours, what, asked, float(other["median_ms"]) / float(ours["median_ms"]))]


def _target(ours: Row, what: str, asked: float, got: float, *, at_most: bool = False) -> tuple[str, str, str, str, str]:
    factor = (asked / got if got else 1.0) if at_most else got / asked
    outcome = "met" if factor >= 1 else f"missed, {factor:.2f} of it"
    return f"{label(ours)} ({ours['variant']})", what, f"{'≤' if at_most else '≥'} {asked:g}", f"{got:.3g}", outcome
