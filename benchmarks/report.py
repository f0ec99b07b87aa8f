"""Results as they are kept: a CSV file with what made them, the README's table, a plot."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import fflfast
from fflfast.doctor import machine

__all__ = ["FIELDS", "device_folder", "latency_table", "plot", "provenance", "read", "table", "write"]

FIELDS = (
    "case", "rows", "classes", "dtype", "variant", "mode", "median_ms", "least_ms", "p20_ms", "p80_ms", "repetitions",
    "eager_goal", "compile_goal", "minimal_mb", "copy_ms", "copy_share", "loss_error", "gradient_error", "peak_mb",
    "launches", "device", "threads", "torch", "fflfast", "python", "commit", "date", "command",
)  # fmt: skip

STEP = "forward+backward"
OURS = ("cuda", "cpu", "triton", "reference")


def provenance(device: torch.device) -> dict[str, Any]:
    """What the rows of this process share."""
    git = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--exclude=*"]
    described = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": machine([device])[1].partition(":")[2].strip(),
        "threads": torch.get_num_threads() if device.type == "cpu" else "",
        "torch": torch.__version__,
        "fflfast": fflfast.__version__,
        "python": platform.python_version(),
        "commit": described or "unknown",
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "-m", "benchmarks.loss", *sys.argv[1:]]),
    }


def device_folder(device: torch.device) -> str:
    """The name of a device's folder under benchmarks/results."""
    if device.type == "cpu":
        return f"cpu-{os.cpu_count()}-cores"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows with the columns `FIELDS`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def table(rows: list[dict[str, str]], mode: str = STEP) -> str:
    """A Markdown table: a line a case, the best of ours beside eager, the best of torch.compile and the best peer."""
    head = [
        "(B, C), dtype", "ours (backend)", "eager", "torch.compile", "× eager", "× compile", "share of a copy",
        "gradient error, ours / eager", "peak memory, ours / eager / compile",
    ]  # fmt: skip
    peers = any(_is_peer(row["variant"]) for row in rows)
    if peers:
        head.insert(4, "best peer")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for case in dict.fromkeys(row["case"] for row in rows):
        here = {row["variant"]: row for row in rows if row["case"] == case and row["mode"] == mode}
        ours, eager = _best(here, lambda v: v in OURS), here.get("eager")
        compiled, peer = _best(here, lambda v: v.startswith("compile")), _best(here, _is_peer)
        all_ours = [here[name] for name in OURS if name in here]
        first = next(iter(here.values()), None)
        if first is None:
            continue
        cells = [
            f"({first['rows']}, {first['classes']}), {first['dtype']}",
            ", ".join(f"{_time(row)} ({row['variant']})" for row in all_ours) or "not measured yet",
            *(_time(row) for row in (eager, compiled, *([peer] if peers else []))),
            _ratio(eager, ours, first["eager_goal"]),
            _ratio(compiled, ours, first["compile_goal"]),
            " / ".join(f"{100 * float(row['copy_share']):.0f} %" for row in all_ours) or "–",
            " / ".join(_value(row, "gradient_error", "{:.1e}") for row in (ours, eager)),
            " / ".join(_value(row, "peak_mb", "{:.3g}") for row in (ours, eager, compiled)) + " MB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    made = rows[0]
    lines += [
        "",
        f"{mode}, medians. {made['device']}, torch {made['torch']}, Python {made['python']}, commit "
        f"{made['commit']}, {made['date']}: `{made['command']}`",
    ]
    return "\n".join(lines)


def latency_table(rows: list[dict[str, str]]) -> str:
    """A Markdown table of what counts where a call is short: launches, GPU time, host time. Empty for a CPU."""
    lines = []
    for row in (row for row in rows if row["mode"] == "host" and row["variant"] != "engine"):
        same = {r["mode"]: r for r in rows if r["case"] == row["case"] and r["variant"] == row["variant"]}
        engine = next(r for r in rows if r["case"] == row["case"] and r["variant"] == "engine")
        host = 1e3 * (float(row["median_ms"]) - float(engine["median_ms"]))
        lines.append(
            f"| ({row['rows']}, {row['classes']}), {row['dtype']} | {row['variant']} | {row['launches']} | "
            f"{_time(same.get('graph'))} | {host:.3g} µs |"
        )
    if not lines:
        return ""
    head = "| (B, C), dtype | variant | launches | GPU time, in a CUDA graph | host time without autograd's engine |"
    return "\n".join([head, "|---|---|---|---|---|", *lines])


def _is_peer(variant: str) -> bool:
    return variant in ("liger", "quack")


def _best(here: dict[str, dict[str, str]], wanted: Any) -> dict[str, str] | None:
    found = [row for name, row in here.items() if wanted(name)]
    return min(found, key=lambda row: float(row["median_ms"]), default=None)


def _time(row: dict[str, str] | None) -> str:
    if row is None:
        return "–"
    ms = float(row["median_ms"])
    if ms < 1:
        return f"{1e3 * ms:.3g} µs"
    return f"{ms:.3g} ms" if ms < 999.5 else f"{ms / 1e3:.3g} s"


def _ratio(other: dict[str, str] | None, ours: dict[str, str] | None, goal: str) -> str:
    if other is None or ours is None:
        return "–"
    asked = f" (goal {float(goal):g}×)" if goal and float(goal) else ""
    return f"{float(other['median_ms']) / float(ours['median_ms']):.1f}×{asked}"


def _value(row: dict[str, str] | None, field: str, form: str) -> str:
    return "–" if row is None or row[field] == "" else form.format(float(row[field]))


def plot(rows: list[dict[str, str]], path: Path, mode: str = STEP) -> None:
    """Time over minimal time (a copy of the least bytes) per case, a bar a variant; 1 is the floor of a copy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["mode"] == mode and row["variant"] != "copy"]
    cases, variants = (list(dict.fromkeys(row[key] for row in rows)) for key in ("case", "variant"))
    figure, axes = plt.subplots(figsize=(1.5 + 1.8 * len(cases), 4.2), layout="constrained")
    width = 0.8 / len(variants)
    for k, variant in enumerate(variants):
        points = [(cases.index(r["case"]), 1 / float(r["copy_share"])) for r in rows if r["variant"] == variant]
        places = [x + (k - (len(variants) - 1) / 2) * width for x, _ in points]
        bars = axes.bar(places, [y for _, y in points], width, label=variant)
        axes.bar_label(bars, fmt="%.3g", fontsize=7)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_ylabel("time ÷ a copy of the least bytes")
    labels = {r["case"]: f"({r['rows']}, {r['classes']})\n{r['dtype']}" for r in rows}
    axes.set_xticks(range(len(cases)), [labels[case] for case in cases])
    axes.set_title(f"FFL loss, N = 2, {mode}: {rows[0]['device']}", fontsize=9)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
