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
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fflfast.data import DataError
from fflfast.training import CheckpointError, ConfigError, TrainConfig, TrainingError
from fflfast.training.files import replace_text

from .accuracy import finished, spread
from .report import markdown

__all__ = ["BEGIN", "END", "Run", "main", "replaced", "table"]

BEGIN, END = "<!-- paper: begin -->", "<!-- paper: end -->"
EPOCHS, SEEDS = 300, (1, 2, 3)
METHODS = ("ffl", "single")
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "results.md"
# FFL's ResNet-32 on CIFAR-100 (arXiv 1904.09058), as the tables of later papers quote it.
PUBLISHED = {"sub-networks": "72.18 ± 0.11", "fused": "74.44"}


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        method, seed: of the run.
        summary: its summary.json.
        made_with: commit, versions and hardware.
    """

    method: str
    seed: int
    summary: Mapping[str, Any]
    made_with: str

    @property
    def accuracies(self) -> dict[str, float]:
        """Test accuracy in % of each line of the table; that of the sub-networks is their mean."""
        scores = {name: 100 * score["accuracy"] for name, score in self.summary["scores"].items()}
        if self.method == "single":
            return {"ResNet-32 alone": scores["sub0"]}
        own = [value for name, value in scores.items() if name.startswith("sub")]
        return {"sub-networks": statistics.mean(own), "ensemble": scores["ensemble"], "fused": scores["fused"]}


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
        for name, accuracy in run.accuracies.items():
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
        done = ", ".join(f"{run.method} seed {run.seed}" for run in runs)
        parts.append(f"Not the whole of seeds {', '.join(map(str, SEEDS))}: so far {done}.")
    parts.append(" ".join(f"{made}." for made in sorted({run.made_with for run in runs})))
    return "\n\n".join(parts)


def replaced(text: str, new: str) -> str:
    """Return a document with what stands between the markers replaced; ValueError without one pair of them."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected one line {BEGIN} and after it one line {END}")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{new}\n\n{END}{rest.partition(END)[2]}"


def _config(method: str, seed: int, options: argparse.Namespace) -> TrainConfig:
    folder = options.runs / f"{method}-seed{seed}"
    return TrainConfig(
        data=options.data, data_dir=options.data_dir, arch=[options.arch] * (1 if method == "single" else 2),
        method=method, seed=seed, epochs=options.epochs, device=options.device, amp=options.amp, channels_last=True,
        out=str(folder), resume="auto", checkpoint_every=200,
    )  # fmt: skip


def main() -> int:
    """Train what is missing and keep the table up to date; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", help="folder that holds cifar-100-binary")
    parser.add_argument("--runs", type=Path, default=Path("runs/paper"), help="folder of the runs (%(default)s)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="fewer make a shortened schedule (default: 300)")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="with commas between (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="as fflfast train has it (default: auto)")
    parser.add_argument("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"), help="likewise")
    parser.add_argument("--results", type=Path, default=DOCUMENT, help="document to write (default: docs/results.md)")
    parser.set_defaults(data="cifar100", arch="resnet32")
    options = parser.parse_args()
    try:
        seeds = [int(seed) for seed in options.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds: expected whole numbers with commas between, got {options.seeds!r}")
    return run(options, seeds)


def _finished(todo: Sequence[tuple[str, int]], options: argparse.Namespace) -> Iterator[Run]:
    for method, seed in todo:
        config = _config(method, seed, options)
        folder = Path(str(config.out))
        if (folder / "summary.json").exists():
            yield Run(method, seed, *finished(config, folder))


def run(options: argparse.Namespace, seeds: Sequence[int]) -> int:
    """Do what `main` was asked for."""
    replaced(options.results.read_text(encoding="utf-8"), "")  # a wrong document is told before hours of training
    todo = [(method, seed) for seed in seeds for method in METHODS]
    for k, (method, seed) in enumerate(todo, 1):
        print(f"run {k} of {len(todo)}: {method}, seed {seed}", flush=True)
        config = _config(method, seed, options)
        try:
            finished(config, Path(str(config.out)))
        except (ConfigError, TrainingError, CheckpointError, DataError) as error:
            print(f"benchmarks.paper: {error}", file=sys.stderr)
            return 1
        text = table(list(_finished(todo, options)), epochs=options.epochs, seeds=seeds)
        document = options.results.read_text(encoding="utf-8")
        replace_text(options.results, replaced(document, text))
        print(f"\n{text}\n", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
