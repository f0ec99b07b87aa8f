"""What people and programs read of a benchmark: a table, lines, JSON."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Sequence
from typing import Any

import torch

import fflfast

from ..doctor import machine
from .measure import Result, Row

__all__ = ["HEAD", "cells", "dtype_of", "footnotes", "headline", "layout_of", "markdown", "refusals", "to_dict"]

HEAD = ("variant", "arithmetic", "images/s", "ms a step", "× naive", "over floor", "peak memory")

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "off": "float32"}


def dtype_of(result: Result, row: Row) -> str:
    """Return what the forward of a variant computes in."""
    return "float32" if row.variant.loop == "naive" else _DTYPES[result.config.amp]


def layout_of(result: Result, row: Row) -> str:
    """Return the memory order of a variant's weights and images."""
    return "channels_last" if row.variant.loop != "naive" and result.config.channels_last else "NCHW"


def headline(result: Result) -> list[str]:
    """Return what was measured where, two lines."""
    config = result.config
    networks = " + ".join(config.arch)
    if len(config.arch) > 1:
        networks += ", no shared trunk" if config.trunk == "none" else f", trunk shared up to {config.trunk}"
    images = f"batch {config.batch_size} of {config.data}, {config.image_size}×{config.image_size}"
    return [f"{config.method}: {networks}, {images}", machine([result.device])[1].strip()]


def cells(result: Result) -> list[list[str]]:
    """Return a line of text a variant, under `HEAD` and a last column of launches."""
    lines = []
    for row in result.rows:
        found = result.figures(row)
        times, over, peak = found["times_naive"], found["overhead_percent"], found["peak_mb"]
        lines.append([
            row.variant.name,
            f"{dtype_of(result, row)} {layout_of(result, row)}",
            f"{found['images_per_second']:,.0f}",
            f"{found['step_ms']:.4g} ({found['p20_ms']:.4g} … {found['p80_ms']:.4g})",
            "–" if times is None else f"{times:.2f}",
            "–" if over is None else f"{over:+.1f} %",
            "–" if peak is None else f"{peak:,.0f} MB",
            f"{row.launches:,}",
        ])  # fmt: skip
    return lines


def footnotes(result: Result) -> list[str]:
    """Return what the table leaves open: refusals, rates, and how to read it."""
    lines = refusals(result)
    if result.fastest is not None and result.rates:
        rates = result.rates
        lines.append(
            f"{result.fastest.variant.name}, images/s: loader alone {rates['loader']:,.0f}, step alone "
            f"{rates['step']:,.0f}, end to end {rates['end_to_end']:,.0f}"
        )
    peak = "PyTorch's tensors" if result.device.type == "cuda" else "resident memory of the process"
    blocks = max((len(row.seconds) for row in result.rows), default=0)
    lines.append(
        "images/s of the whole cohort: an image that goes through all sub-networks counts once. Medians (20th … 80th "
        f"percentile) of {blocks} blocks, {result.steps} steps in all, in turns; ratios of blocks side by side. Peak "
        f"memory: {peak}, beside data and libraries. naive: the loop of the published FFL code; its images come "
        "augmented, the others augment theirs in the step. floor: the networks with cross-entropy alone, under the "
        "same plan."
    )
    return lines


def refusals(result: Result) -> list[str]:
    """Return what was not measured, and why."""
    return [f"{name} not measured: {reason}" for name, reason in result.refused.items()]


def markdown(result: Result) -> str:
    """Return headline, table and footnotes as Markdown."""
    head = [*HEAD, result.launches]
    rows = [head, ["---"] * len(head), *cells(result)]
    table = [f"| {' | '.join(row)} |" for row in rows]
    return "\n\n".join(["\n\n".join(headline(result)), "\n".join(table), *footnotes(result)]) + "\n"


def to_dict(result: Result) -> dict[str, Any]:
    """Return everything as JSON values."""
    return {
        "fflfast": fflfast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "device": machine([result.device])[1].partition(":")[2].strip(),
        "config": result.config.to_dict(),
        "launches": result.launches,
        "steps": result.steps,
        "variants": [_row(result, row) for row in result.rows],
        "not_measured": dict(result.refused),
        "images_per_second": dict(result.rates),
    }


def _row(result: Result, row: Row) -> dict[str, Any]:
    return {
        "variant": row.variant.name,
        "loop": row.variant.loop,
        "plan": row.variant.plan,
        "compile": row.variant.compile,
        "dtype": dtype_of(result, row),
        "layout": layout_of(result, row),
        **result.figures(row),
        "block_seconds": list(_rounded(row.seconds)),
    }


def _rounded(seconds: Sequence[float]) -> list[float]:
    return [float(f"{value:.6g}") for value in seconds]
