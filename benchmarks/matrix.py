"""Matrices of training runs: train what is missing, go on where it stopped, keep a table of it in a document.

What `benchmarks.methods`, `.table`, `.pose` and `.paper` share. Every run has a folder of its own under RUNS; one that
was interrupted goes on from its last checkpoint, one that is finished is read. After each run the table between two
markers of the document is written anew from all runs that are finished.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import signal
import statistics
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from fflfast import methods
from fflfast.data import DataError
from fflfast.training import CheckpointError, ConfigError, Stopped, TrainConfig, TrainingError
from fflfast.training.files import replace_text

from .accuracy import finished, spread
from .report import markdown

__all__ = [
    "CLASSIFICATION", "DOCUMENT", "SINGLE", "TIME_IS_UP", "Document", "Job", "Run", "arguments", "by_row", "chosen",
    "common_table", "footer", "integers", "job", "networks", "settings", "with_teachers", "work",
]  # fmt: skip

SINGLE = "single"
CLASSIFICATION = (SINGLE, *(
    name for name in methods.available() if name != SINGLE and methods.resolve(name).task == "classification"
))  # fmt: skip
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "results.md"
TIME_IS_UP = 3  # the exit code of a command that --minutes ended


@dataclass(frozen=True)
class Job:
    """One run that is wanted.

    Attributes:
        row: of the table that it belongs to: the method, as a rule.
        seed: its place in the row.
        config: with the folder as ``out``.
        needs: folder of the run among those before it that must be finished, if any.
        table: name of the table, where a matrix has several.
    """

    row: str
    seed: int
    config: TrainConfig
    needs: Path | None = None
    table: str = ""

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return Path(str(self.config.out))


@dataclass(frozen=True)
class Run:
    """One finished run: its job, its summary.json, and with what it was made (commit, versions and hardware)."""

    job: Job
    summary: Mapping[str, Any]
    made_with: str

    @property
    def scores(self) -> dict[str, float]:
        """Test score of each output, in %."""
        return {name: 100 * score["accuracy"] for name, score in self.summary["scores"].items()}

    @property
    def main(self) -> float:
        """That of the output by which the method is judged."""
        return self.scores[self.summary["best"]["output"]]

    @property
    def sub_networks(self) -> float:
        """The mean of the sub-networks' own."""
        return statistics.mean(value for name, value in self.scores.items() if name.startswith("sub"))


class Document:
    """A Markdown file in which one table stands between ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``.

    Raises:
        ValueError: the file has no such pair of markers: told before hours of training.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.begin, self.end = path, f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        self.replaced("")

    def replaced(self, new: str) -> str:
        """Return the text with what stands between the markers replaced."""
        text = self.path.read_text(encoding="utf-8")
        if text.count(self.begin) != 1 or text.count(self.end) != 1 or text.index(self.begin) > text.index(self.end):
            raise ValueError(f"{self.path}: expected one line {self.begin} and after it one line {self.end}")
        before, _, rest = text.partition(self.begin)
        return f"{before}{self.begin}\n\n{new}\n\n{self.end}{rest.partition(self.end)[2]}"

    def write(self, new: str) -> None:
        """Replace what stands between the markers."""
        replace_text(self.path, self.replaced(new))


def work(
    command: str,
    jobs: Sequence[Job],
    wanted: Sequence[Job],
    document: Document,
    table: Callable[[Sequence[Run]], str],
    *,
    minutes: float | None = None,
    rows: Path | None = None,
) -> int:
    """Train what is missing and keep the table up to date; returns the exit code.

    A run that fails is named, and the others go on; one that cannot start ends the command.

    Args:
        command: as errors name it.
        jobs: of the whole table.
        wanted: those to train now.
        document: which gets the table.
        table: of the finished runs of ``jobs``, in their order.
        minutes: after which to save and stop; the exit code then is `TIME_IS_UP`.
        rows: CSV file for the scores of every finished run.
    """
    done: dict[Path, Run] = {}
    failed = 0
    try:
        with _time_limit(minutes):
            for k, job in enumerate(wanted, 1):
                print(f"run {k} of {len(wanted)}: {job.folder.name}", flush=True)
                try:
                    if job.needs is not None and job.needs not in done:
                        raise TrainingError(f"needs the run {job.needs}, which is not finished")
                    done[job.folder] = Run(job, *finished(job.config, job.folder))
                except (TrainingError, CheckpointError) as error:
                    print(f"{command}: {job.folder.name}: {error}", file=sys.stderr)
                    failed += 1
                for other in jobs:
                    if other.folder not in done and (other.folder / "summary.json").exists():
                        done[other.folder] = Run(other, *finished(other.config, other.folder))
                found = [done[each.folder] for each in jobs if each.folder in done]
                text = table(found)
                document.write(text)
                if rows is not None and found:
                    _write_rows(rows, found)
                print(f"\n{text}\n", flush=True)
    except (ConfigError, DataError) as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 1
    except _TimeIsUp:
        print(f"{command}: {minutes:g} minutes are over, all saved; the same command goes on", flush=True)
        return TIME_IS_UP
    return 1 if failed else 0


class _TimeIsUp(Exception):
    """The time that a command was given is over."""


@contextlib.contextmanager
def _time_limit(minutes: float | None) -> Iterator[None]:
    """Raise _TimeIsUp when the time is over; a run that is going on saves first."""
    if minutes is None:
        yield
        return
    over = threading.Event()

    def end() -> None:
        over.set()
        os.kill(os.getpid(), signal.SIGTERM)  # which a run answers by saving and raising Stopped

    def between_runs(signum: int, frame: FrameType | None) -> None:
        raise Stopped(signum)

    before = signal.signal(signal.SIGTERM, between_runs)
    timer = threading.Timer(60 * minutes, end)
    try:
        timer.start()
        yield
    except Stopped:
        if not over.is_set():
            raise
        raise _TimeIsUp from None
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)


def _write_rows(path: Path, runs: Sequence[Run]) -> None:
    """One CSV row a run and output."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ("row", "seed", "output", "test_percent", "epochs", "seconds", "images_per_second", "config", "made_with")
        )
        for run in runs:
            facts = (
                run.summary["epochs"], f"{run.summary['seconds']:.1f}", f"{run.summary['images_per_second']:.1f}",
                run.summary["config_hash"], run.made_with,
            )  # fmt: skip
            writer.writerows(
                (run.job.row, run.job.seed, name, f"{score:.2f}", *facts) for name, score in run.scores.items()
            )


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What every run of a matrix is told, from the flags of `arguments`."""
    return {
        "data": options.data, "data_dir": options.data_dir, "device": options.device, "amp": options.amp,
        "channels_last": True, "resume": "auto", "checkpoint_every": 200,
    }  # fmt: skip


def job(
    row: str, seed: int, folder: Path, values: Mapping[str, Any], *, teacher: Job | None = None, table: str = ""
) -> Job:
    """A run in a folder, perhaps with a network of another run as its teacher."""
    config = TrainConfig(**values, seed=seed, out=str(folder), teacher=teacher and str(teacher.folder))
    return Job(row, seed, config, teacher and teacher.folder, table)


def with_teachers(
    names: Iterable[str], make: Callable[[str, Job | None], Job], teacher: Callable[[], Job]
) -> Iterator[Job]:
    """The runs of methods, as ``make`` of the name and its teacher gives them, each behind its teacher's run."""
    for name in names:
        needed = teacher() if methods.resolve(name).needs_teacher else None
        if needed is not None:
            yield needed
        yield make(name, needed)


def networks(method: str) -> int:
    """How many networks a method gets: two, or as many as it needs at least."""
    least = methods.resolve(method).min_sub_networks
    return 1 if least == 1 else max(2, least)


def by_row(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each row, in the order of their first ones."""
    rows: dict[str, list[Run]] = {}
    for run in runs:
        rows.setdefault(run.job.row, []).append(run)
    return rows


Column = tuple[str, Callable[[Sequence[Run]], str]]


def common_table(runs: Sequence[Run], extra: Sequence[Column] = (), alone: str = SINGLE) -> str:
    """The table that holds methods side by side: mean ± sample deviation over seeds.

    Args:
        runs: finished ones.
        extra: further columns behind the first: the head, and the text for the runs of a row.
        alone: the row with which the others are compared, seed by seed.
    """
    if not runs:
        return "Not run yet."
    rows = by_row(runs)
    lines = []
    for name, found in rows.items():
        base = {} if name == alone else {run.job.seed: run.main for run in rows.get(alone, ())}
        compared = [run for run in found if run.job.seed in base]
        gaps = [
            spread([score(run) - base[run.job.seed] for run in compared], signed=True) if compared else "–"
            for score in (lambda run: run.main, lambda run: run.sub_networks)
        ]
        several = "ensemble" in found[0].scores
        rates, seconds = ([run.summary[key] for run in found] for key in ("images_per_second", "seconds"))
        lines.append((
            name,
            *(text(found) for _, text in extra),
            found[0].summary["best"]["output"],
            spread([run.main for run in found]),
            gaps[0],
            spread([run.sub_networks for run in found]),
            gaps[1],
            spread([run.scores["ensemble"] for run in found]) if several else "–",
            len(found),
            f"{statistics.median(rates):,.0f}",
            f"{statistics.median(seconds):,.0f}",
        ))  # fmt: skip
    head = (
        "method", *(title for title, _ in extra), "judged by", "test %", "minus alone", "mean of the sub-networks",
        "minus alone", "ensemble", "seeds", "images/s", "seconds of training",
    )  # fmt: skip
    return markdown(head, lines)


def footer(runs: Sequence[Run], jobs: Sequence[Job]) -> list[str]:
    """What is missing of a matrix, and with what its runs were made."""
    missing = len(jobs) - len(runs)
    parts = [f"Not all of it: {len(runs)} of {len(jobs)} runs are finished."] if missing else []
    made: dict[str, list[str]] = {}
    for run in runs:
        made.setdefault(run.made_with, []).append(run.job.folder.name)
    if len(made) == 1:
        return [*parts, f"{next(iter(made))}."]
    return [*parts, *(f"{made_with}: {', '.join(names)}." for made_with, names in made.items())]


def arguments(
    module: str, about: str | None, *, runs: str, seeds: str, results: Path = DOCUMENT
) -> argparse.ArgumentParser:
    """The flags that every matrix has."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", help="folder that holds the data set, where it needs one")
    parser.add_argument("--runs", type=Path, default=Path(runs), help="folder of the runs (default: %(default)s)")
    parser.add_argument("--seeds", default=seeds, help="with commas between (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="as fflfast train has it (default: auto)")
    parser.add_argument("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"), help="likewise")
    parser.add_argument("--minutes", type=float, help="save and stop after so many, with exit code 3")
    parser.add_argument("--csv", type=Path, help="file to write the scores of every run to")
    parser.add_argument("--results", type=Path, default=results, help="document to write (default: docs/results.md)")
    return parser


def integers(parser: argparse.ArgumentParser, text: str) -> list[int]:
    """The numbers of a flag such as --seeds."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        parser.error(f"--seeds: expected whole numbers with commas between, got {text!r}")


def chosen(parser: argparse.ArgumentParser, flag: str, text: str | None, known: Sequence[str]) -> list[str]:
    """The names of a flag such as --only, all where it was not given."""
    names = list(known) if text is None else [name for name in text.split(",") if name]
    if wrong := [name for name in names if name not in known]:
        parser.error(f"{flag}: expected names among {', '.join(known)}, got {wrong[0]!r}")
    return names
