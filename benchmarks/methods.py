"""Every classification method and a network alone on Fashion-MNIST, reduced budget: the runs behind docs/results.md.

    OMP_NUM_THREADS=1 python -m benchmarks.methods
    OMP_NUM_THREADS=1 python -m benchmarks.methods --only ffl,dml --seeds 0

One recipe for all (COMMON below) in place of their own, each with its own temperature, loss weights and ramp-up, on the
same images in the same order for every method of a seed. Two ResNet-8 a method, sharing the low layers that its paper
shares; OKDDip has two peers and a leader, OEM a second network of half the width, KD one network and, as its teacher, a
ResNet-20 that was trained alone by the same recipe and seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from . import matrix
from .matrix import CLASSIFICATION, SINGLE, Document, Job, Run

__all__ = ["jobs", "main", "run", "table"]

SEEDS = (0, 1, 2)
# 6,000 images three times: on one core of the machine of docs/results.md the slowest method then takes about a minute.
# The rate was chosen for a network alone, among 0.05 and 0.1 with batches of 32 and 64.
COMMON: dict[str, Any] = {
    "epochs": 3, "batch_size": 64, "optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True,
    "weight_decay": 1e-4, "schedule": "cosine", "warmup_epochs": 0.0, "limit_train": 6000,
}  # fmt: skip
# PCL's averages look back over 1,000 steps, and these runs have 282.
OPTIONS: dict[str, dict[str, Any]] = {"pcl": {"decay": 0.9}}


def jobs(options: argparse.Namespace, names: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """The runs of these methods, seed by seed."""

    def of_seed(seed: int) -> Iterator[Job]:
        def make(name: str, teacher: Job | None) -> Job:
            values = common | {"method": name, "arch": [options.arch] * matrix.networks(name)}
            values |= {"options": OPTIONS[name]} if name in OPTIONS else {}
            return matrix.job(name, seed, options.runs / f"{name}-seed{seed}", values, teacher=teacher)

        def teacher() -> Job:
            row, folder = f"{SINGLE}, {options.teacher}, teaches kd", options.runs / f"{options.teacher}-seed{seed}"
            return matrix.job(row, seed, folder, common | {"method": SINGLE, "arch": [options.teacher]})

        return matrix.with_teachers(names, make, teacher)

    common = matrix.settings(options) | COMMON | options.changes
    return [job for seed in seeds for job in of_seed(seed)]


def table(runs: Sequence[Run], *, everything: Sequence[Job]) -> str:
    """The table of what is finished, and what it was made with, as Markdown.

    Args:
        runs: finished ones.
        everything: what is to be run.
    """

    def count(found: Sequence[Run]) -> str:
        return str(len(found[0].job.config.arch or ()))

    return "\n\n".join([matrix.common_table(runs, [("networks", count)]), *matrix.footer(runs, everything)])


def main() -> int:
    """Train what is missing and keep the table up to date; returns the exit code."""
    parser = matrix.arguments("methods", __doc__, runs="runs/methods", seeds=",".join(map(str, SEEDS)))
    parser.add_argument("--only", help=f"methods to train now, of {','.join(CLASSIFICATION)} (default: all)")
    parser.set_defaults(data="fashion_mnist", arch="resnet8", teacher="resnet20", changes={})
    options = parser.parse_args()
    only = matrix.chosen(parser, "--only", options.only, CLASSIFICATION)
    return run(options, only, matrix.integers(parser, options.seeds))


def run(options: argparse.Namespace, names: Sequence[str], seeds: Sequence[int]) -> int:
    """Do what `main` was asked for."""
    everything = jobs(options, CLASSIFICATION, sorted({*SEEDS, *seeds}))
    return matrix.work(
        "benchmarks.methods", everything, jobs(options, names, seeds), Document(options.results, "methods"),
        partial(table, everything=everything), minutes=options.minutes, rows=options.csv,
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
