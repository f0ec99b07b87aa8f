"""OKDHP on Leeds Sports Pose Extended at the budget of a CPU: three branches beside one that is trained alone.

    OMP_NUM_THREADS=2 python -m benchmarks.pose --data-dir D/lspet      # D/lspet holds joints.json and images

128 pixels, 64 channels and heatmaps of 32 × 32 in place of 256, 256 and 64 × 64; one hourglass that all share and one
of its own for each of three branches; alone is the same network with one branch. Method, recipe and order of the images
are the same for both: Adam, rotation ±30°, scale ±25 %, flips, the flip test; what is shortened stands in SETTINGS.
Trains what is missing and writes the table between the two markers of docs/results.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

from . import matrix
from .matrix import Document, Job, Run

__all__ = ["jobs", "main", "run", "table"]

METHOD, ALONE = "okdhp", "alone"
SEEDS = (0, 1, 2)
BRANCHES = {METHOD: 3, ALONE: 1}
ARCH = "hourglass2@1/4"
# The recipe has 150 epochs of batch 16 at 2.5e-4, for 22,000 images. On 1,600, a branch alone learned next to nothing
# in its first 800 steps of that; small batches make more of them.
SETTINGS: dict[str, Any] = {"epochs": 36, "batch_size": 4, "lr": 1e-3, "schedule": "cosine"}


def jobs(options: argparse.Namespace, names: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """The runs of these rows, seed by seed."""
    common = matrix.settings(options) | SETTINGS | options.changes
    return [
        matrix.job(
            name, seed, options.runs / f"{name}-seed{seed}",
            common | {"method": METHOD, "arch": [options.arch] * BRANCHES[name]},
        )
        for seed in seeds
        for name in names
    ]  # fmt: skip


def table(runs: Sequence[Run], *, everything: Sequence[Job]) -> str:
    """The table of what is finished, and what it was made with, as Markdown."""

    def count(found: Sequence[Run]) -> str:
        return str(BRANCHES[found[0].job.row])

    return "\n\n".join([matrix.common_table(runs, [("branches", count)], ALONE), *matrix.footer(runs, everything)])


def main() -> int:
    """Train what is missing and keep the table up to date; returns the exit code."""
    parser = matrix.arguments("pose", __doc__, runs="runs/pose", seeds=",".join(map(str, SEEDS)))
    parser.add_argument("--only", help=f"rows to train now, of {','.join(BRANCHES)} (default: both)")
    parser.set_defaults(data="lspet", arch=ARCH, changes={})
    options = parser.parse_args()
    only = matrix.chosen(parser, "--only", options.only, tuple(BRANCHES))
    return run(options, only, matrix.integers(parser, options.seeds))


def run(options: argparse.Namespace, names: Sequence[str], seeds: Sequence[int]) -> int:
    """Do what `main` was asked for."""
    everything = jobs(options, tuple(BRANCHES), sorted({*SEEDS, *seeds}))
    return matrix.work(
        "benchmarks.pose", everything, jobs(options, names, seeds), Document(options.results, "pose"),
        partial(table, everything=everything), minutes=options.minutes, rows=options.csv,
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
