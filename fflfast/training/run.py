"""Start, continue and finish a run: its folder, its baseline, its closing table."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import platform
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

import fflfast

from .. import methods
from ..cohort import Learner
from ..data import DataBundle
from ..execution import offered, refusal
from ..tasks import Score
from . import processes
from .allocator import keep_memory
from .build import Resolved, build_learner, open_bundle, resolve
from .checkpoint import LAST, Snapshot
from .config import ConfigError, ResolvedConfig, TrainConfig, check_given, naming
from .feeding import check_residence
from .files import alone_in, replace_text
from .loop import PLAN_FILE, Trainer
from .processes import Processes
from .report import Reporter, score_table
from .resume import check_data, find_snapshot, has_checkpoint, load, resume
from .signals import Stopped, StopSignal
from .teacher import check_teacher, load_teacher

__all__ = ["RunResult", "arithmetic", "train"]


_ABORTED_START = frozenset(
    (
        "config.yaml",
        "config.yaml.tmp",
        "metrics.csv",
        "metrics.jsonl",
        "metrics.tmp",
        "tensorboard",
        PLAN_FILE,
        f"{PLAN_FILE}.tmp",
        f"{LAST}.tmp",
    )
)
"""What a run that dies before its first checkpoint leaves in its folder."""


class RunResult(NamedTuple):
    """What a finished run leaves: its folder, its test scores by output, and those of each architecture alone."""

    folder: Path
    scores: dict[str, Score]
    baseline: dict[str, Score]


def train(config: TrainConfig, *, quiet: bool = False) -> RunResult:
    """Train as configured, or continue a run, and return its scores.

    Under torchrun its processes share every batch; the first one alone writes and shows. On a CPU the process keeps its
    memory (`allocator.keep_memory`). Seeds the global generators of torch, NumPy and Python. SIGTERM and SIGINT save
    the run and raise `Stopped`, a SystemExit of code 143 or 130; the run then continues with ``resume``, bit for bit. A
    setting of ``config`` that equals its default counts as not given, so that with ``resume`` it neither changes nor
    contradicts the run's own;
    `TrainConfig.from_dict` takes every key as given.

    Raises:
        ConfigError: the run cannot start; nothing was written.
        TrainingError: the loss or a weight is no longer finite; the last good checkpoint stands.
        CheckpointError: a checkpoint cannot be read or written.
        DataError: images that cannot be read.
        ProcessLost: another process of the run is gone; the last good checkpoint stands.
    """
    # Signals from the first moment on: torchrun sends them to the rest when a process dies.
    with StopSignal() as stop, processes.start(config.device, plan=config.plan) as together:
        return _train(config, Reporter(quiet=quiet or not together.main), stop, together)


def _train(config: TrainConfig, reporter: Reporter, stop: StopSignal, processes: Processes) -> RunResult:
    check_given(config)
    snapshot = processes.only_main(lambda: find_snapshot(config, reporter))
    if config.download and processes.count > 1:
        processes.only_main(lambda: open_bundle(config) and None)  # the others find the files there
    resolved, data, notes = processes.together(lambda: _open(config, snapshot, processes))
    with arithmetic(resolved), contextlib.ExitStack() as held:
        learner = processes.together(lambda: _build(resolved, data, snapshot, notes))
        folder = Path(processes.only_main(lambda: str(_folder(resolved))))
        if snapshot is None:
            resolved = dataclasses.replace(resolved, out=str(folder), resume=None)
            processes.only_main(lambda: _begin(folder, resolved))
        processes.only_main(lambda: held.enter_context(alone_in(folder)))
        for line in [*_headline(resolved, data, learner, processes.count), *notes]:
            reporter.line(line, style="dim")
        try:
            trainer = _run(resolved, data, learner, folder, snapshot, reporter, stop, processes)
            alone = _run_baselines(resolved, data, folder, reporter, stop, processes) if resolved.baseline else {}
        except Stopped as stopped:
            reporter.line(f"stopped by {signal.Signals(stopped.signum).name}, all saved; go on with --resume {folder}")
            raise
    result = RunResult(folder, trainer.scores, {arch: one.scores["sub0"] for arch, one in alone.items()})
    processes.only_main(lambda: _write_summary(result, resolved, trainer))
    _print_result(result, resolved, trainer, reporter)
    return result


def _open(config: TrainConfig, snapshot: Snapshot | None, processes: Processes) -> Resolved:
    """Return the settings of a new run, or of the one that goes on, and its data."""
    if snapshot is None:
        resolved = resolve(config, processes)
        _check_baseline(resolved.config)
    else:
        settings = resume(config, snapshot)
        resolved = Resolved(settings, open_bundle(settings), [])
        check_data(snapshot, settings, resolved.data)
    check_residence(resolved.config.data_on, resolved.data)
    resolved.notes.extend(_check_plan(resolved.config, processes))
    return resolved


def _build(config: ResolvedConfig, data: DataBundle, snapshot: Snapshot | None, notes: list[str]) -> Learner:
    teacher = load_teacher(config.teacher, data, config.device) if config.teacher else None
    learner = build_learner(config, data.num_classes, teacher=teacher, start=snapshot is None, tell=notes.append)
    if snapshot is not None:
        check_teacher(snapshot, config, learner)
    return learner


def _check_plan(config: ResolvedConfig, processes: Processes) -> list[str]:
    """Return what the user should know of the plan that the config names; ConfigError where it cannot run."""
    if config.plan != "auto":
        reason = refusal(config.plan, config.device, processes=processes.count, backend=processes.backend)
        if reason:
            raise ConfigError(f"--plan {config.plan}: {reason}; take --plan serial, or auto")
        idle = dict(offered(config.device, processes=processes.count, backend=processes.backend))[config.plan]
        return [f"plan {config.plan}: {idle}"] if idle else []
    return []


def _run(
    config: ResolvedConfig,
    data: DataBundle,
    learner: Learner,
    folder: Path,
    snapshot: Snapshot | None,
    reporter: Reporter,
    stop: StopSignal,
    processes: Processes,
) -> Trainer:
    trainer = Trainer(config, data, learner, folder, reporter, stop, processes)
    if snapshot is not None:
        trainer.restore(snapshot)
        processes.saved(folder / LAST)
        at = trainer.position
        if trainer.finished:
            reporter.line(f"{folder} is finished: {config.epochs} epochs")
            return trainer
        reporter.line(f"continuing {folder} at epoch {at.epoch + 1}, step {at.step} of {len(trainer.loader)}")
    trainer.run(f"{config.method} {' + '.join(config.arch)}")
    return trainer


def _run_baselines(
    config: ResolvedConfig,
    data: DataBundle,
    folder: Path,
    reporter: Reporter,
    stop: StopSignal,
    processes: Processes,
) -> dict[str, Trainer]:
    """Train one network of each architecture alone, in RUN/baseline-ARCH; one that was interrupted goes on."""
    trainers = {}
    method = methods.resolve(config.method).alone
    for arch in dict.fromkeys(config.arch):
        own = folder / f"baseline-{arch.replace('/', '_')}"
        alone = dataclasses.replace(
            config,
            arch=[arch],
            init=config.init and [config.init[config.arch.index(arch)]],
            method=method,
            options=config.options
            if method == config.method
            else dataclasses.asdict(methods.resolve(method).Options()),
            teacher=None,
            trunk="none",
            baseline=False,
            out=str(own),
            resume=None,
        )
        snapshot = processes.only_main(functools.partial(_load_if_any, own, reporter))
        if snapshot is None:
            processes.only_main(functools.partial(_begin, own, alone))
        learner = build_learner(alone, data.num_classes, start=snapshot is None)
        reporter.line(f"baseline: {arch} alone, same recipe and seed", style="dim")
        trainers[arch] = _run(alone, data, learner, own, snapshot, reporter, stop, processes)
    return trainers


def _load_if_any(folder: Path, reporter: Reporter) -> Snapshot | None:
    return load(folder, reporter) if has_checkpoint(folder) else None


def _begin(folder: Path, config: ResolvedConfig) -> None:
    """Make the run's folder and write its config: the first thing that touches the disk."""
    file = folder / "config.yaml"
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(file, config.to_yaml())
    except OSError as error:
        with contextlib.suppress(OSError):
            for left in (file, file.with_name(file.name + ".tmp")):
                left.unlink(missing_ok=True)
            for path in made:
                path.rmdir()
        raise ConfigError(f"--out {folder}: cannot write there ({error.strerror}); choose another folder") from error


@naming("--out")
def _folder(config: ResolvedConfig) -> Path:
    """Return the folder of a run; for a new one, one that does not exist or holds nothing but an aborted start."""
    if config.resume and config.out and config.resume != "auto":
        return Path(config.out)
    if config.out is None:
        name = f"{config.data}-{config.method.split(':')[-1]}-{'+'.join(config.arch).replace('/', '_')}"
        first = Path("runs") / name
        others = (Path(f"{first}-{k}") for k in itertools.count(2))
        return next(path for path in itertools.chain([first], others) if not path.exists())
    folder = Path(config.out)
    leftovers = _ABORTED_START if config.resume == "auto" or _began_alike(folder, config) else frozenset()
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - leftovers):
        advice = f", or continue the run in it with --resume {folder}" if has_checkpoint(folder) else ""
        raise ConfigError(f"--out {folder}: exists and is not an empty folder; choose another{advice}")
    return folder


def _began_alike(folder: Path, config: ResolvedConfig) -> bool:
    """Whether a run of the same settings began in a folder: what it left before its first checkpoint is no loss."""
    try:
        return (folder / "config.yaml").read_text(encoding="utf-8") == config.to_yaml()
    except (OSError, ValueError):
        return False


def _check_baseline(config: ResolvedConfig) -> None:
    if config.baseline and len(config.arch) == 1 and methods.resolve(config.method).alone == config.method:
        raise ConfigError(
            f"--baseline trains each network alone, which --method {config.method} does already; leave it away"
        )


@contextlib.contextmanager
def arithmetic(config: ResolvedConfig) -> Iterator[None]:
    """Choose the algorithms of a run; the caller's own choice is back afterwards."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not config.deterministic
    if config.device == "cpu":
        keep_memory()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark


def _headline(config: ResolvedConfig, data: DataBundle, learner: Learner, count: int) -> list[str]:
    parameters = sum(p.numel() for p in learner.parameters())
    parts = "joints" if data.keypoints else "classes"
    sizes = f"{len(data.train):,} training and {len(data.test):,} test images, {data.num_classes} {parts}"
    trunk = "" if learner.cohort.trunk is None else ", shared trunk"
    taught = f", taught by {config.teacher}" if config.teacher else ""
    milestones = f", ×{config.gamma:g} at {', '.join(map(str, config.milestones))}" if config.milestones else ""
    amp = "" if config.amp == "off" else f", {config.amp}"
    where = config.device if count == 1 else f"{count} processes, the first on {config.device}"
    return [
        f"{config.data}: {sizes}, {data.image_size}×{data.image_size}",
        f"{config.method}: {' + '.join(config.arch)}{trunk}{taught}, {parameters:,} parameters, on {where}{amp}",
        f"{config.epochs} epochs of batch {config.batch_size}, lr {config.lr:g} {config.schedule}{milestones}, "
        f"seed {config.seed} → {config.out}",
    ]


def _write_summary(result: RunResult, config: ResolvedConfig, trainer: Trainer) -> None:
    at = trainer.position
    loader = trainer.loader
    images = min(loader.num_images, len(loader) * loader.batch_size) * config.epochs  # drop_last may leave one out
    scores = {name: score._asdict() | {"accuracy": score.value} for name, score in result.scores.items()}
    summary = {
        "metric": trainer.task.metric_name,
        "scores": scores,
        "baseline": {arch: score._asdict() | {"accuracy": score.value} for arch, score in result.baseline.items()},
        "best": {"output": trainer.learner.method.main_output, "accuracy": at.best, "epoch": at.best_epoch},
        "epochs": config.epochs,
        "seconds": at.seconds,
        "images_per_second": images / at.seconds,
        "config_hash": config.hash(),
        "versions": {"fflfast": fflfast.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "device": str(trainer.device),
        "plan": trainer.plan_name,
        "processes": trainer.processes.count,
    }
    replace_text(result.folder / "summary.json", json.dumps(summary, indent=2) + "\n")


def _print_result(result: RunResult, config: ResolvedConfig, trainer: Trainer, reporter: Reporter) -> None:
    arch = config.arch
    what = {f"sub{k}": name for k, name in enumerate(arch)}
    what |= {f"ema{k}": f"{name}, averaged" for k, name in enumerate(arch)}
    what |= {"ensemble": "ensemble of sub-networks", "fused": "fused classifier", "leader": arch[-1]}
    rows = [(name, what.get(name, ""), score) for name, score in result.scores.items()]
    alone = [("alone", f"{name}, same recipe and seed", score) for name, score in result.baseline.items()]
    metric = f"test {trainer.task.metric_name}"
    reporter.console.print(score_table(f"{config.data}, {config.method}, {config.epochs} epochs", metric, rows, alone))
    reporter.line(f"trained in {trainer.position.seconds:.0f} s; {result.folder} holds the run")
