"""The command line of `fflfast bench`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from rich import box
from rich.console import Console
from rich.table import Table

from ..training import TrainingError, resolve
from ..training.arguments import parse_arguments
from ..training.config import ConfigError
from . import report
from .measure import Result, measure
from .variants import NAMES

__all__ = ["bench"]

_ABOUT = """\
Hold training loops side by side on this machine: a naive one as the published FFL code has it, ours with each
execution plan, and the sub-networks alone with cross-entropy (the floor); then the loader alone, the step alone and
both together. Each runs in a process of its own, with the same weights and images, in turns. No weights are kept."""

_MORE = """\
All other flags are those of `fflfast train` (see fflfast train --help) and mean the same: --data (default: synthetic),
--arch, --method, --batch-size, --amp, --channels-last, --device, --workers … With --compile, every plan is measured
with and without compiled sub-networks; --plan NAME measures this plan alone. Example:

  fflfast bench train --arch resnet32 --arch resnet32 --amp bf16 --channels-last"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def bench(argv: Sequence[str]) -> None:
    """Run ``fflfast bench``; errors of its flags are ConfigError."""
    what = argv[0] if argv else ""
    if what not in ("train", "-h", "--help"):
        raise ConfigError(f"expected fflfast bench train, got {what!r}; see fflfast bench train --help")
    parser = _Parser(
        prog="fflfast bench train",
        usage="fflfast bench train --arch NAME --arch NAME [--FLAG VALUE ...]",
        description=_ABOUT,
        epilog=_MORE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--steps", type=int, help="timed steps of each variant (default: 30 on a CPU, else 200)")
    parser.add_argument("--variants", help=f"some of {','.join(NAMES)} (default: all that run here)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write bench.md and bench.json into this folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    options, rest = parser.parse_known_args(list(argv[1:] if what == "train" else argv))
    config = parse_arguments(rest)
    if config.resume is not None:
        raise ConfigError("--resume: a measurement continues no run; leave it away")
    if config.data is None:
        config = dataclasses.replace(config, data="synthetic")
    resolved = resolve(config).config
    files = _made([options.out / name for name in ("bench.md", "bench.json")] if options.out else [], options.json)
    variants = None if options.variants is None else [name for name in options.variants.split(",") if name]
    console = Console(highlight=False)
    with _progress(console) as tell:
        result = measure(resolved, steps=options.steps, variants=variants, tell=tell)
    if not result.rows:
        raise TrainingError("nothing could be measured: " + "; ".join(report.refusals(result)))
    _print(console, result)
    for file in files:
        text = report.markdown(result) if file.suffix == ".md" else json.dumps(report.to_dict(result), indent=2) + "\n"
        file.write_text(text, encoding="utf-8")


def _made(files: list[Path], json_file: Path | None) -> list[Path]:
    """Return the files to write, with their folders made: a wrong path is told before minutes of measuring."""
    files = [*files, *([] if json_file is None else [json_file])]
    for file in files:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        except OSError as error:
            raise ConfigError(f"cannot write {file} ({error.strerror}); choose another folder") from error
    return files


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Callable[[str], object]]:
    """Say what is going on: in place on a terminal, a line each elsewhere."""
    if not console.is_terminal or console.is_dumb_terminal:
        yield lambda line: console.print(line, soft_wrap=True)
        return
    with console.status("") as status:
        yield status.update


def _print(console: Console, result: Result) -> None:
    if not console.is_terminal or console.is_dumb_terminal:
        console.print(report.markdown(result), soft_wrap=True, markup=False, end="")
        return
    for line in report.headline(result):
        console.print(line, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD)
    for k, name in enumerate((*report.HEAD, result.launches)):
        table.add_column(name, justify="left" if k < 2 else "right")
    for texts in report.cells(result):
        table.add_row(*texts)
    console.print(table)
    for line in report.footnotes(result):
        console.print(line, style="dim")
