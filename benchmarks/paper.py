"""The published run: CIFAR-100, ResNet-32, 300 epochs, seeds 1 to 3, FFL and one network alone.

    python -m benchmarks.paper --data-dir D     # D holds cifar-100-binary

Trains what is missing in RUNS/METHOD-seedK. Stop it whenever you like, or let the machine be taken away: the next call
goes on where the last checkpoint stands (one before and after the test of each epoch, and every 200 steps). After each
run the table between the two markers in docs/results.md is written anew from the runs' summary.json, mean ± sample
deviation beside the published figures. With --epochs or other --seeds the table says that it is no full run.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Sequence

from . import matrix
from .accuracy import spread
from .matrix import Document, Job, Run
from .report import markdown

__all__ = ["jobs", "main", "run", "table"]

EPOCHS, SEEDS = 300, (1, 2, 3)
METHODS = ("ffl", "single")
# FFL's ResNet-32 on CIFAR-100 (arXiv 1904.09058), as the tables of later papers quote it.
PUBLISHED = {"sub-networks": "72.18 ± 0.11", "fused": "74.44"}


def _lines(run: Run) -> dict[str, float]:
    """Test accuracy in % of each line of the table; that of the sub-networks is their mean."""
    if run.job.row == "single":
        return {"ResNet-32 alone": run.main}
    return {"sub-networks": run.sub_networks, "ensemble": run.scores["ensemble"], "fused": run.scores["fused"]}


def table(runs: Sequence[Run], *, epochs: int = EPOCHS, seeds: Sequence[int] = SEEDS) -> str:
    """Return the table of what is finished, and what it was made with, as Markdown.

    Args:
        runs: finished ones.
        epochs, seeds: what was asked for.
    """
    if not runs:
        return "Not run yet."
    values: dict[str, list[float]] = defaultdict(list)
    seconds: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        for name, accuracy in _lines(run).items():
            values[name].append(accuracy)
            seconds[name].append(run.summary["seconds"])
    lines = [
        [
            name,
            spread(found),
            PUBLISHED.get(name, "–") if epochs == EPOCHS else "–",
            len(found),
            f"{statistics.mean(seconds[name]) / epochs:.3g} s",
            f"{statistics.mean(seconds[name]) / 60:.3g} min",
        ]
        for name, found in values.items()
    ]
    head = ("output", "test accuracy %", "published", "seeds", "training time an epoch", f"of {epochs} epochs")
    parts = [markdown(head, lines)]
    if epochs != EPOCHS:
        parts.insert(0, f"**Shortened: {epochs} of {EPOCHS} epochs.** Not comparable with published figures.")
    if len(runs) < len(seeds) * len(METHODS) or set(seeds) != set(SEEDS):
        done = ", ".join(f"{run.job.row} seed {run.job.seed}" for run in runs)
        parts.append(f"Not the whole of seeds {', '.join(map(str, SEEDS))}: so far {done}.")
    parts.append(" ".join(f"{made}." for made in sorted({run.made_with for run in runs})))
    return "\n\n".join(parts)


def jobs(options: argparse.Namespace, seeds: Sequence[int]) -> list[Job]:
    """Both methods, seed by seed."""
    return [
        matrix.job(
            method,
            seed,
            options.runs / f"{method}-seed{seed}",
            matrix.settings(options)
            | {"method": method, "arch": [options.arch] * (1 if method == "single" else 2), "epochs": options.epochs},
        )
        for seed in seeds
        for method in METHODS
    ]


def main() -> int:
    """Train what is missing and keep the table up to date; returns the exit code."""
    parser = matrix.arguments("paper", __doc__, runs="runs/paper", seeds=",".join(map(str, SEEDS)))
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="fewer make a shortened schedule (default: 300)")
    parser.set_defaults(data="cifar100", arch="resnet32")
    options = parser.parse_args()
    return run(options, matrix.integers(parser, options.seeds))


def run(options: argparse.Namespace, seeds: Sequence[int]) -> int:
    """Do what `main` was asked for."""
    wanted = jobs(options, seeds)
    return matrix.work(
        "benchmarks.paper", wanted, wanted, Document(options.results, "paper"),
        lambda found: table(found, epochs=options.epochs, seeds=seeds), minutes=options.minutes, rows=options.csv,
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
