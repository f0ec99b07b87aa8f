"""What the benchmarks' command lines have in common: where to measure, and where to keep it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from . import report

__all__ = ["arguments", "keep_table", "results", "usable_device"]


def arguments(name: str, about: str | None, *, device: str = "cpu") -> argparse.ArgumentParser:
    """A parser with --device and --out, for the module benchmarks.NAME and its docstring."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default=device, help=f"cpu, cuda or cuda:N (default: {device})")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results/DEVICE)")
    return parser


def usable_device(name: str, options: argparse.Namespace) -> torch.device | None:
    """The device that was asked for; None, with a line that says so, where it is not there."""
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(f"benchmarks.{name}: no CUDA device; --device cpu measures the CPU", file=sys.stderr)
        return None
    return device


def results(options: argparse.Namespace, device: torch.device, name: str) -> Path:
    """The CSV file of these results."""
    folder: Path = options.out or report.folder(device)
    return folder / f"{name}.csv"


def keep_table(file: Path, table: Callable[[list[report.Row]], str]) -> None:
    """Write the table of what a CSV file holds beside it, and print it."""
    text = table(report.read(file))
    file.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)
