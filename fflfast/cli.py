"""The command line: fflfast train | eval | export | plot | bench | doctor.

Exit codes: 0 done; 1 the run failed; 2 it could not start as asked, and nothing was written; 130 and 143 stopped by
SIGINT or SIGTERM, with the run saved.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

__all__ = ["main"]

_ABOUT = """\
usage: fflfast COMMAND ...

Online mutual knowledge distillation: sub-networks that teach each other.

  train    train a cohort                        fflfast train --data digits --arch resnet20 --arch resnet20
  eval     test a run or an exported file        fflfast eval RUN
  export   write a run's networks as plain files fflfast export RUN
  plot     draw a run's curves, or a method      fflfast plot RUN | fflfast plot graph METHOD
  bench    how fast a cohort trains here         fflfast bench train --arch resnet32 --arch resnet32
  doctor   each backend against float64          fflfast doctor --quick

fflfast COMMAND --help shows every flag. Exit codes: 0 done, 1 failed, 2 could not start (nothing written),
130 and 143 stopped by SIGINT or SIGTERM with the run saved."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    if "" not in sys.path:
        sys.path.append("")  # methods of the user's own lie in the working folder, which an installed script leaves out
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of a pipe is gone: nobody is left to tell
        return 1
    except OSError as error:
        return _fail(str(error), 1)


def _run(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_ABOUT)
        return 0
    if arguments[0] == "--version":
        import fflfast

        print(fflfast.__version__)
        return 0
    if arguments[0] == "doctor":
        return _doctor(arguments[1:])
    command = _COMMANDS.get(arguments[0])
    if command is None:
        return _fail(f"unknown command {arguments[0]!r}; expected one of {', '.join((*_COMMANDS, 'doctor'))}", 2)
    try:
        import fflfast.training as training
    except ImportError as error:
        return _fail(f"{error.name or error} is not installed; training needs: pip install 'fflfast[train]'", 2)
    from .data import DataError
    from .training.errors import is_told_elsewhere

    try:
        command(arguments[1:])
    except (_UsageError, training.ConfigError) as error:
        return 2 if is_told_elsewhere(error) else _fail(str(error), 2)
    except (training.TrainingError, training.CheckpointError, DataError) as error:
        return 1 if is_told_elsewhere(error) else _fail(str(error), 1)
    return 0


def _fail(message: str, code: int) -> int:
    print(f"fflfast: error: {' '.join(message.split())}", file=sys.stderr)
    return code


class _UsageError(Exception):
    """Flags that do not fit."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{message}; see {self.prog} --help")


def _doctor(argv: Sequence[str]) -> int:
    # Apart from the other commands, which need the extra [train]: this one works with torch and numpy alone.
    from .doctor import doctor

    parser = _Parser(
        prog="fflfast doctor",
        description="Hold every backend that is here against float64, on random and nasty input, forward and backward, "
        "eager and compiled. Exit code 1 if one misses.",
        allow_abbrev=False,
    )
    parser.add_argument("--backend", help="this backend alone; exit code 1 if it is not available (default: all)")
    parser.add_argument("--device", help="cpu, cuda, cuda:N … (default: the CPU and the accelerator, if any)")
    parser.add_argument("--quick", action="store_true", help="leave out the largest inputs and torch.compile")
    try:
        options = vars(parser.parse_args(argv))
        return doctor(options.pop("backend"), options.pop("device"), **options)
    except (_UsageError, ValueError) as error:
        return _fail(str(error), 2)


def _train(argv: Sequence[str]) -> None:
    from .training import ConfigError, train
    from .training.arguments import parse_arguments
    from .training.errors import tell_elsewhere

    try:
        config = parse_arguments(argv)
    except ConfigError as error:
        if os.environ.get("RANK", "0") != "0":
            tell_elsewhere(error)  # every process of torchrun reads the same flags
        raise
    train(config)


def _eval(argv: Sequence[str]) -> None:
    from rich.console import Console

    from .training.evaluation import judge, open_subject
    from .training.report import details_table, score_table

    parser = _Parser(
        prog="fflfast eval", description="Test a run, a checkpoint or an exported file.", allow_abbrev=False
    )
    parser.add_argument("path", help="folder of a run, checkpoint, exported .safetensors or .pt2")
    parser.add_argument("--data", help="data set to test on (default: the one it was trained on)")
    parser.add_argument("--data-dir", "--data_dir", help="folder of the data set (default for a run: where it was)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--weights", default="last", choices=("last", "best"), help="which weights of a run")
    parser.add_argument("--limit-test", "--limit_test", type=int, help="images to test on (default: as the run was)")
    parser.add_argument("--workers", type=int, default=0, help="threads that load images")
    parser.add_argument("--coco-json", "--coco_json", help="for pose: write the results here too, in COCO's format")
    options = vars(parser.parse_args(argv))
    path, coco_json = options.pop("path"), options.pop("coco_json")
    precision = {}
    if coco_json is not None:
        from .training.coco import evaluate_ap

        precision = evaluate_ap(path, coco_json, **options)
    metric, scores, details = judge(open_subject(path, **options))
    rows = [(name, "", score) for name, score in scores.items()]
    console = Console(highlight=False)
    console.print(score_table(str(path), f"test {metric}", rows, exact=True))
    if details:
        console.print(details_table(f"test {metric} % of each joint", details, scores))
    if coco_json is not None:
        console.print("  ".join([coco_json, *(f"{name} {100 * value:.2f}" for name, value in precision.items())]))


def _export(argv: Sequence[str]) -> None:
    from .training import export

    parser = _Parser(
        prog="fflfast export",
        description="Write every sub-network of a run as a plain safetensors file and the fused model as a program.",
        allow_abbrev=False,
    )
    parser.add_argument("run", help="folder of a run, or a checkpoint")
    parser.add_argument("--out", help="folder for the files (default: RUN/export)")
    parser.add_argument("--weights", default="last", choices=("last", "best"), help="which weights of the run")
    options = parser.parse_args(argv)
    for path in export(options.run, options.out, weights=options.weights):
        print(path)


_OF_PREDICTIONS = {
    "data-dir": "folder of the data set (default: where it was)",
    "device": "auto, cpu, cuda, cuda:N or mps (default: auto)",
    "weights": "last or best (default: last)",
}


def _plot(argv: Sequence[str]) -> None:
    if argv and argv[0] == "graph":
        _plot_graph(argv[1:])
        return
    parser = _Parser(
        prog="fflfast plot",
        description="Draw loss terms and test scores of runs; with --predictions what a pose run sees in test images. "
        "fflfast plot graph METHOD draws who teaches whom (a run in a folder of that name is ./graph).",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--predictions", type=int, metavar="N", help="draw predicted skeletons on N test images")
    parser.add_argument("--out", help="image file, .png, .svg or .pdf (default: in RUN)")
    for name, text in _OF_PREDICTIONS.items():
        parser.add_argument(f"--{name}", dest=name.replace("-", "_"), help=f"with --predictions: {text}")
    options = vars(parser.parse_args(argv))
    runs, out, count = options.pop("runs"), options.pop("out"), options.pop("predictions")
    options = {name: value for name, value in options.items() if value is not None}
    if count is None:
        from .training import plot

        if options:
            raise _UsageError(f"--{next(iter(options)).replace('_', '-')} belongs to --predictions; leave it away")
        print(plot(runs, out))
        return
    if len(runs) != 1:
        raise _UsageError(f"--predictions: expected one run, got {len(runs)}; draw one after the other")
    from .training.skeletons import draw_predictions

    print(draw_predictions(runs[0], out, count=count, **options))


def _plot_graph(argv: Sequence[str]) -> None:
    from .training.graphs import plot_graph

    parser = _Parser(prog="fflfast plot graph", description="Draw who teaches whom by a method.", allow_abbrev=False)
    parser.add_argument("method", metavar="METHOD", help="a short name, or package.module:Class")
    parser.add_argument(
        "--sub-networks", "--sub_networks", type=int, metavar="N", help="how many networks learn together (default: 2)"
    )
    parser.add_argument("--out", help="image file, .svg, .png or .pdf (default: METHOD.svg)")
    options = parser.parse_args(argv)
    print(plot_graph(options.method, options.sub_networks, options.out))


def _bench(argv: Sequence[str]) -> None:
    from .bench.command import bench

    bench(argv)


_COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": _train,
    "eval": _eval,
    "export": _export,
    "plot": _plot,
    "bench": _bench,
}

if __name__ == "__main__":
    raise SystemExit(main())
