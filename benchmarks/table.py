"""Every method on CIFAR-100 at the published length: ResNet-32 and WRN-20-8, by its own recipe and by a common one.

    python -m benchmarks.table --data-dir D                  # D holds cifar-100-binary; three seeds, on a GPU
    python -m benchmarks.table --data-dir D --only ffl,dml --arch resnet32 --recipe own --seeds 1 --minutes 25

Trains what is missing in RUNS, in the order of the seeds; with --minutes it saves and stops in time, with exit code 3,
and the same command goes on. --only, --arch, --recipe and --seeds say what is trained in this call; the tables between
the two markers of docs/results.md hold every run of the seeds that is finished, beside the published figure.

"own" is the recipe of each method's class, with as many networks as its paper has on CIFAR: two for FFL, DML and AFD,
three for ONE and PCL, three peers and a leader for OKDDip, four for MCL-OKD, five widths for OEM; three for CL and
KDCL are ours. "common" is that of PCL's tables for all (300 epochs of batch 128, SGD with Nesterov momentum from 0.1,
×0.1 at 150 and 225, weight decay 5e-4) with three networks each, OKDDip's leader besides; temperatures, weights and
ramp-ups stay each method's own. KD has one network, taught by one that was trained alone by the same recipe and seed:
a ResNet-110 teaches the ResNet-32, a WRN-20-8 the WRN-20-8.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from . import matrix
from .matrix import CLASSIFICATION, SINGLE, Document, Job, Run

__all__ = ["jobs", "main", "run", "tables"]

EPOCHS, SEEDS = 300, (1, 2, 3)
ARCHS = ("resnet32", "wrn_20_8")
RECIPES = ("own", "common")
TEACHERS = {"resnet32": "resnet110"}  # of other networks: the same again
OWN_NETWORKS = {"cl": 3, "one": 3, "kdcl": 3, "okddip": 4, "pcl": 3, "mcl_okd": 4, "oem": 5}  # else two
COMMON_NETWORKS = 3
COMMON: dict[str, Any] = {
    "batch_size": 128, "optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4,
    "schedule": "multistep", "gamma": 0.1, "milestones": [150, 225], "warmup_epochs": 0.0,
}  # fmt: skip

# Test accuracy of a single network in %, as published for methods' own recipes. Sources: a, the table of PCL (arXiv
# 2006.04147), with three networks each; b, that of MCL-OKD (arXiv 2006.04093), with four; c, of AFD (arXiv 2002.01775)
# as later work quotes it, with two.
PUBLISHED = {
    "resnet32": {
        "single": "71.09 b", "ffl": "72.18 a", "dml": "73.68 a", "cl": "72.33 a", "one": "73.79 a", "okddip": "73.25 a",
        "kdcl": "73.76 a", "pcl": "74.14 ± 0.16 a", "mcl_okd": "75.48 b", "afd": "74.03 c",
    },
    "wrn_20_8": {
        "ffl": "78.22 a", "dml": "79.77 a", "cl": "79.40 a", "one": "79.10 a", "okddip": "78.83 a", "kdcl": "79.37 a",
        "pcl": "80.51 a",
    },
}  # fmt: skip
SOURCES = (
    "Published, one network at test time: a, PCL's table (arXiv 2006.04147), three networks; b, MCL-OKD's (arXiv "
    "2006.04093), four; c, AFD (arXiv 2002.01775) as later work quotes it, two."
)


def jobs(
    options: argparse.Namespace,
    names: Sequence[str],
    archs: Sequence[str],
    recipes: Sequence[str],
    seeds: Sequence[int],
) -> list[Job]:
    """The runs of these methods, seed by seed; no folder twice."""
    found = [
        job
        for seed in seeds
        for arch in archs
        for recipe in recipes
        for job in _of_one_table(options, names, arch, recipe, seed)
    ]
    return list({job.folder: job for job in found}.values())


def _of_one_table(
    options: argparse.Namespace, names: Sequence[str], arch: str, recipe: str, seed: int
) -> Iterator[Job]:
    def make(name: str, teacher: Job | None = None, *, other: str | None = None) -> Job:
        values = settings | {"method": name, "arch": [other or arch] * _networks(name, recipe)}
        label = name if other in (None, arch) else f"{name}-{other}"
        row = name if label == name else f"{name}, {other}, teaches kd"
        folder = options.runs / f"{arch}-{recipe}-{label}-seed{seed}"
        return matrix.job(row, seed, folder, values, teacher=teacher, table=f"{arch}, {recipe} recipe")

    settings = matrix.settings(options) | (COMMON | {"epochs": EPOCHS} if recipe == "common" else {}) | options.changes
    return matrix.with_teachers(names, make, partial(make, SINGLE, other=TEACHERS.get(arch, arch)))


def _networks(name: str, recipe: str) -> int:
    least = matrix.networks(name)
    if least == 1:
        return 1
    return OWN_NETWORKS.get(name, least) if recipe == "own" else COMMON_NETWORKS + (name == "okddip")


def tables(runs: Sequence[Run], *, everything: Sequence[Job], shortened: bool = False) -> str:
    """One table a network and recipe, of what is finished, and what it was made with, as Markdown.

    Args:
        runs: finished ones.
        everything: what is to be run.
        shortened: no full runs: nothing published stands beside them.
    """
    if not runs:
        return "Not run yet."

    def count(found: Sequence[Run]) -> str:
        return str(len(found[0].job.config.arch or ()))

    def published(found: Sequence[Run]) -> str:
        arch = found[0].job.table.partition(",")[0]
        return PUBLISHED.get(arch, {}).get(found[0].job.row, "–") if not shortened else "–"

    parts = ["**Shortened.** Not comparable with published figures."] if shortened else [SOURCES]
    for name in dict.fromkeys(run.job.table for run in runs):
        here = [run for run in runs if run.job.table == name]
        parts += [f"### {name}", matrix.common_table(here, [("networks", count), ("published", published)])]
    return "\n\n".join([*parts, *matrix.footer(runs, everything)])


def main() -> int:
    """Train what is missing and keep the tables up to date; returns the exit code."""
    parser = matrix.arguments("table", __doc__, runs="runs/table", seeds=",".join(map(str, SEEDS)))
    parser.add_argument("--only", help=f"methods to train now, of {','.join(CLASSIFICATION)} (default: all)")
    parser.add_argument("--arch", help=f"networks to train now, of {','.join(ARCHS)} (default: both)")
    parser.add_argument("--recipe", help=f"recipes to train by now, of {','.join(RECIPES)} (default: both)")
    parser.set_defaults(data="cifar100", archs=ARCHS, changes={})
    options = parser.parse_args()
    return run(
        options,
        matrix.chosen(parser, "--only", options.only, CLASSIFICATION),
        matrix.chosen(parser, "--arch", options.arch, ARCHS),
        matrix.chosen(parser, "--recipe", options.recipe, RECIPES),
        matrix.integers(parser, options.seeds),
    )


def run(
    options: argparse.Namespace,
    names: Sequence[str],
    archs: Sequence[str],
    recipes: Sequence[str],
    seeds: Sequence[int],
) -> int:
    """Do what `main` was asked for."""
    everything = jobs(options, CLASSIFICATION, options.archs, RECIPES, sorted({*SEEDS, *seeds}))
    return matrix.work(
        "benchmarks.table", everything, jobs(options, names, archs, recipes, seeds), Document(options.results, "table"),
        partial(tables, everything=everything, shortened="epochs" in options.changes),
        minutes=options.minutes, rows=options.csv,
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
