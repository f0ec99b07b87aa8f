"""Curves of one or more runs as a PNG (or whatever the file's ending asks for): loss terms and test scores."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import ConfigError
from .log import read_records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["check_ending", "plot", "save"]

_COLOURS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#bbbbbb")  # Paul Tol's "bright"


def plot(runs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Draw loss terms (left) and test scores (right) of each run, a row a run, and return the file.

    Networks that the run trained alone as its baseline appear dotted. ``out`` is curves.png in the first run by
    default. Raises ConfigError where a folder holds no finished epoch or a damaged record, or where ``out`` cannot be
    written or its ending names no format.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    folders = [Path(run) for run in runs]
    file = Path(out) if out is not None else folders[0] / "curves.png"
    figure = Figure(figsize=(11, 4 * len(folders)), layout="constrained")
    check_ending(figure, file)
    records = [_epochs(folder) for folder in folders]
    for folder, epochs in zip(folders, records, strict=True):
        if not epochs:
            raise ConfigError(f"{folder}: expected the folder of a run with at least one finished epoch, found none")
    axes = figure.subplots(len(folders), 2, squeeze=False)
    for (left, right), folder, epochs in zip(axes, folders, records, strict=True):
        colours = dict(zip(_outputs(epochs), itertools.cycle(_COLOURS), strict=False))
        _draw_losses(left, epochs, colours)
        _draw_scores(right, folder, epochs, colours)
        left.set_title(folder.resolve().name, loc="left", fontweight="bold")
        for axis in (left, right):
            axis.set_xlabel("epoch")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    return save(figure, file)


def check_ending(figure: Figure, file: Path) -> None:
    """Raise ConfigError where a file's ending names no format that a figure can be written in."""
    known = figure.canvas.get_supported_filetypes()
    if os.path.isdir(file) or file.suffix[1:].lower() not in known:
        raise ConfigError(f"--out {file}: expected a file that ends in .{', .'.join(sorted(known))}")


def save(figure: Figure, file: Path, **options: Any) -> Path:
    """Write a figure (``options``: of savefig) and return its file; ConfigError where that cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=150, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--out {file}: {error}") from error
    return file


def _epochs(folder: Path) -> list[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    try:
        epochs = [record for record in read_records(file) if record["kind"] == "epoch"]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    for record in epochs:
        numbers = all(_is_number(value) for key, value in record.items() if key != "kind")
        if not (numbers and record.keys() == epochs[0].keys() and _outputs([record])):
            raise ConfigError(f"{file} is damaged: epoch {record['epoch']} lacks values; take its line out")
    return epochs


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


def _outputs(epochs: Sequence[Mapping[str, Any]]) -> list[str]:
    return [key.partition("/")[2] for key in epochs[0] if key.startswith("test_") and "/" in key]


def _metric(epochs: Sequence[Mapping[str, Any]]) -> str:
    """Return what the records call their scores: they have ``test_METRIC/OUTPUT`` for each output."""
    return next(key for key in epochs[0] if key.startswith("test_") and "/" in key)[len("test_") :].partition("/")[0]


def _draw_losses(axis: Any, epochs: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    numbers = [record["epoch"] + 1 for record in epochs]
    for name in (key for key in epochs[0] if "/" in key and f"{_metric(epochs)}/" not in key):
        learner = name.rpartition("→")[2].rpartition("/")[2]  # who learns by the term: its colour
        style = "-" if name.startswith("ce/") else "--"
        axis.plot(numbers, [record[name] for record in epochs], style, color=colours.get(learner), label=name)
    axis.set_yscale("log")
    axis.set_ylabel("loss term, mean of the epoch")
    axis.legend(fontsize="small", frameon=False)


def _draw_scores(axis: Any, folder: Path, epochs: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    marker = "." if len(epochs) < 20 else ""
    for name, colour in colours.items():
        axis.plot(*_curve(epochs, name), color=colour, marker=marker, label=name)
    for i, other in enumerate(sorted(folder.glob("baseline-*"))):
        alone = _epochs(other)
        if alone:  # it may still train its first epoch
            label = f"{other.name.removeprefix('baseline-')} alone"
            axis.plot(*_curve(alone, _outputs(alone)[0]), ":", color="#333333", lw=1.5 + i, label=label)
    later = [value for line in axis.lines for value in line.get_ydata()[len(epochs) // 3 :]]
    margin = 0.5 + 0.1 * (max(later) - min(later))
    axis.set_ylim(min(later) - margin, max(later) + margin)  # the first third of the epochs may lie below
    axis.set_ylabel(f"test {_metric(epochs)} %")
    axis.legend(fontsize="small", frameon=False, loc="lower right")


def _curve(epochs: Sequence[Mapping[str, Any]], output: str) -> tuple[list[int], list[float]]:
    key = f"test_{_metric(epochs)}/{output}"
    return [record["epoch"] + 1 for record in epochs], [100 * record[key] for record in epochs]
