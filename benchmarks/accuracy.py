"""Accuracy of FFL beside one network alone, over seeds: the runs behind docs/results.md.

    python -m benchmarks.accuracy digits
    python -m benchmarks.accuracy fashion_mnist
    python -m benchmarks.accuracy cifar100 --data-dir D

Runs what is missing in RUNS/STUDY/seedK (an interrupted run goes on where it stopped), then prints a Markdown table of
mean ± sample deviation and writes one CSV row a run and output.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from fflfast.training import TrainConfig, resolve, train

from .report import commit

STUDIES: dict[str, tuple[int, dict[str, Any]]] = {
    # name: (seeds, settings). Each study says in docs/results.md how its budget differs from the published one.
    "digits": (5, {"arch": ["resnet20", "resnet20"], "baseline": True}),
    "fashion_mnist": (3, {"arch": ["resnet8", "resnet8"], "baseline": True, "epochs": 4, "channels_last": True}),
    "cifar100": (1, {"arch": ["resnet20", "resnet20"], "baseline": True, "epochs": 3, "channels_last": True}),
}


def run_study(study: str, runs: Path, data_dir: str | None) -> tuple[list[dict[str, Any]], set[str]]:
    """Train what is missing; one row a run and output, and what the runs were made with."""
    seeds, settings = STUDIES[study]
    rows, made_with = [], set()
    for seed in range(seeds):
        folder = runs / study / f"seed{seed}"
        config = TrainConfig(
            data=study,
            data_dir=data_dir,
            method="ffl",
            seed=seed,
            out=str(folder),
            resume="auto",
            checkpoint_every=200,
            **settings,
        )
        summary, made = finished(config, folder)
        made_with.add(made)
        scores = summary["scores"] | {f"{arch} alone": score for arch, score in summary["baseline"].items()}
        for output, score in scores.items():
            rows.append(
                {
                    "study": study,
                    "seed": seed,
                    "output": output,
                    "accuracy": 100 * score["accuracy"],
                    "epochs": summary["epochs"],
                    "seconds": round(summary["seconds"], 1),
                    "config": summary["config_hash"],
                }
            )
    return rows, made_with


def finished(config: TrainConfig, folder: Path) -> tuple[dict[str, Any], str]:
    """Train a run that is missing in its folder, or go on where it stopped; its summary, and what it was made with."""
    if not (folder / "summary.json").exists():
        train(config)
    made_with = folder / "provenance.txt"
    if not made_with.exists():
        made_with.write_text(provenance() + "\n", encoding="utf-8")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    if summary["config_hash"] != resolve(config).config.hash():
        sys.exit(f"{folder} was trained with other settings than are asked for now; remove it to train it anew")
    return summary, made_with.read_text(encoding="utf-8").strip()


def table(rows: list[dict[str, Any]]) -> str:
    """Mean ± sample deviation of each output, and its difference to the network alone, seed by seed."""
    by_output: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        by_output[row["output"]].append(row["accuracy"])
    alone = next((name for name in by_output if name.endswith(" alone")), None)
    lines = ["| output | test accuracy % | minus alone, same seed |", "|---|---|---|"]
    for name, values in by_output.items():
        gap = "–"
        if alone is not None and name != alone:
            gap = spread([a - b for a, b in zip(values, by_output[alone], strict=True)], signed=True)
        lines.append(f"| {name} | {spread(values)} | {gap} |")
    return "\n".join(lines)


def spread(values: list[float], *, signed: bool = False) -> str:
    """``mean ± deviation``, or the one value."""
    mean = f"{statistics.mean(values):{'+' if signed else ''}.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def provenance() -> str:
    """What a run that ends now was made with: commit, versions, threads and hardware."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    cpu = f"{torch.get_num_threads()} of {os.cpu_count()} cores of {model}"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return f"commit {commit()}, torch {torch.__version__}, Python {platform.python_version()}, {device}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=sorted(STUDIES))
    parser.add_argument("--data-dir", help="folder that holds the data set, where it needs one")
    parser.add_argument("--runs", type=Path, default=Path("runs/accuracy"), help="folder of the runs")
    parser.add_argument("--csv", type=Path, help="file to write the rows to")
    arguments = parser.parse_args()
    rows, made_with = run_study(arguments.study, arguments.runs, arguments.data_dir)
    if arguments.csv is not None:
        with arguments.csv.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    print(table(rows), "", f"{rows[0]['epochs']} epochs", *sorted(made_with), sep="\n")


if __name__ == "__main__":
    main()
