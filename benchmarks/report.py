"""Results as they are kept: a CSV file with what made them, the README's table, a plot."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import fflfast
from fflfast.doctor import machine

__all__ = [
    "FIELDS",
    "MADE",
    "OURS",
    "STEP",
    "TIMES",
    "best",
    "commit",
    "device_folder",
    "folder",
    "latency_table",
    "loss_label",
    "made_with",
    "markdown",
    "plot",
    "provenance",
    "ratio",
    "read",
    "table",
    "time_of",
    "value",
    "write",
]

TIMES = ("variant", "mode", "median_ms", "least_ms", "p20_ms", "p80_ms", "repetitions")
MADE = ("device", "threads", "torch", "fflfast", "python", "commit", "date", "command")
# Of the loss.
FIELDS = (
    "case", "rows", "classes", "dtype", *TIMES, "eager_goal", "compile_goal", "minimal_mb", "copy_ms", "copy_share",
    "loss_error", "gradient_error", "peak_mb", "launches", *MADE,
)  # fmt: skip

STEP = "forward+backward"
OURS = ("cuda", "cpu", "triton", "reference")
Row = dict[str, str]


def provenance(device: torch.device, command: str) -> dict[str, Any]:
    """What the rows of this process share."""
    return {
        "device": machine([device])[1].partition(":")[2].strip(),
        "threads": torch.get_num_threads() if device.type == "cpu" else "",
        "torch": torch.__version__,
        "fflfast": fflfast.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "-m", command, *sys.argv[1:]]),
    }


def commit() -> str:
    """The commit of this checkout, with "-dirty" behind it if a file differs that no benchmark writes."""
    written = [":!docs", ":!README.md", ":!benchmarks/results"]
    described = _git("describe", "--always", "--exclude=*")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *written)
    return described + "-dirty" * bool(changed) if described else "unknown"


def _git(*words: str) -> str:
    command = ["git", "-C", str(Path(__file__).resolve().parents[1]), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def device_folder(device: torch.device) -> str:
    """The name of a device's folder under benchmarks/results."""
    if device.type == "cpu":
        return f"cpu-{os.cpu_count()}-cores"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def folder(device: torch.device) -> Path:
    """Where the results of a device lie."""
    return Path(__file__).resolve().parent / "results" / device_folder(device)


def write(path: Path, rows: Iterable[dict[str, Any]], fields: Sequence[str] = FIELDS) -> None:
    """Write rows with these columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def made_with(rows: Sequence[Row]) -> str:
    """What made the rows, in one line."""
    made = rows[0]
    return (
        f"{made['device']}, torch {made['torch']}, Python {made['python']}, commit {made['commit']}, {made['date']}: "
        f"`{made['command']}`"
    )


def loss_label(row: Row) -> str:
    """A case of the loss as tables and plots name it."""
    return f"({row['rows']}, {row['classes']}), {row['dtype']}"


def table(rows: list[Row], mode: str = STEP) -> str:
    """The loss's Markdown table: a line a case, ours beside eager, the best of torch.compile and the best peer."""
    head = [
        "(B, C), dtype", "ours (backend)", "eager", "torch.compile", "× eager", "× compile", "share of a copy",
        "gradient error, ours / eager", "peak memory, ours / eager / compile",
    ]  # fmt: skip
    peers = any(_is_peer(row["variant"]) for row in rows)
    if peers:
        head.insert(4, "best peer")
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        here = {row["variant"]: row for row in rows if row["case"] == case and row["mode"] == mode}
        ours, eager = best(here, lambda v: v in OURS), here.get("eager")
        compiled, peer = best(here, lambda v: v.startswith("compile")), best(here, _is_peer)
        all_ours = [here[name] for name in OURS if name in here]
        first = next(iter(here.values()), None)
        if first is None:
            continue
        lines.append([
            loss_label(first),
            ", ".join(f"{time_of(row)} ({row['variant']})" for row in all_ours) or "not measured yet",
            *(time_of(row) for row in (eager, compiled, *([peer] if peers else []))),
            ratio(eager, ours, first["eager_goal"]),
            ratio(compiled, ours, first["compile_goal"]),
            " / ".join(f"{100 * float(row['copy_share']):.0f} %" for row in all_ours) or "–",
            " / ".join(value(row, "gradient_error", "{:.1e}") for row in (ours, eager)),
            " / ".join(value(row, "peak_mb", "{:.3g}") for row in (ours, eager, compiled)) + " MB",
        ])  # fmt: skip
    return f"{markdown(head, lines)}\n\n{mode}, medians. {made_with(rows)}"


def latency_table(rows: list[Row], label: Callable[[Row], str]) -> str:
    """A Markdown table of what counts where a call is short: launches, GPU time, host time. Empty for a CPU."""
    lines = []
    for row in (row for row in rows if row["mode"] == "host" and row["variant"] != "engine"):
        same = {r["mode"]: r for r in rows if r["case"] == row["case"] and r["variant"] == row["variant"]}
        engine = [float(r["median_ms"]) for r in rows if r["case"] == row["case"] and r["variant"] == "engine"]
        host = 1e3 * (float(row["median_ms"]) - sum(engine))
        lines.append((label(row), row["variant"], row["launches"], time_of(same.get("graph")), f"{host:.3g} µs"))
    head = ("case", "variant", "launches", "GPU time, in a CUDA graph", "host time without autograd's engine")
    return markdown(head, lines) if lines else ""


def _is_peer(variant: str) -> bool:
    return variant in ("liger", "liger-jsd", "quack")


def best(here: Mapping[str, Row], wanted: Callable[[str], bool]) -> Row | None:
    """The fastest of the variants that are wanted."""
    found = [row for name, row in here.items() if wanted(name)]
    return min(found, key=lambda row: float(row["median_ms"]), default=None)


def time_of(row: Row | None) -> str:
    """A row's median."""
    if row is None:
        return "–"
    ms = float(row["median_ms"])
    if ms < 1:
        return f"{1e3 * ms:.3g} µs"
    return f"{ms:.3g} ms" if ms < 999.5 else f"{ms / 1e3:.3g} s"


def ratio(other: Row | None, ours: Row | None, goal: str = "") -> str:
    """How many times faster ours is, and how many times it has to be."""
    if other is None or ours is None:
        return "–"
    asked = f" (goal {float(goal):g}×)" if goal and float(goal) else ""
    return f"{float(other['median_ms']) / float(ours['median_ms']):.1f}×{asked}"


def value(row: Row | None, field: str, form: str) -> str:
    """One number of a row."""
    return "–" if row is None or row[field] == "" else form.format(float(row[field]))


def plot(
    rows: list[Row], path: Path, title: str, label: Callable[[Row], str], floor: str, unit: str, mode: str = STEP
) -> None:
    """Time over the floor's time per case, a bar a variant; 1 is the floor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["mode"] == mode]
    cases, variants = (list(dict.fromkeys(row[key] for row in rows)) for key in ("case", "variant"))
    figure, axes = plt.subplots(figsize=(1.5 + 1.8 * len(cases), 4.2), layout="constrained")
    width = 0.8 / len(variants)
    for k, variant in enumerate(variants):
        points = [(cases.index(r["case"]), 1 / float(r[f"{floor}_share"])) for r in rows if r["variant"] == variant]
        places = [x + (k - (len(variants) - 1) / 2) * width for x, _ in points]
        bars = axes.bar(places, [y for _, y in points], width, label=variant)
        axes.bar_label(bars, fmt="%.3g", fontsize=7)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_ylabel(f"time ÷ {unit}")
    labels = {r["case"]: "\n".join(label(r).rsplit(", ", 1)) for r in rows}
    axes.set_xticks(range(len(cases)), [labels[case] for case in cases])
    axes.set_title(f"{title}, {mode}: {rows[0]['device']}", fontsize=9)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
