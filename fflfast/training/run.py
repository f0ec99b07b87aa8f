"""Start, continue and finish a run: its folder, its baseline, its closing table."""

from __future__ import annotations

import contextlib
import dataclasses
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
from ..tasks import Score
from .build import build_learner, open_bundle, resolve
from .checkpoint import LAST, Snapshot
from .config import ConfigError, ResolvedConfig, TrainConfig, naming
from .loop import Trainer
from .report import Reporter, score_table
from .resume import check_data, has_checkpoint, load, resume
from .signals import Stopped, StopSignal

__all__ = ["RunResult", "train"]


_ABORTED_START = frozenset(
    (
        "config.yaml",
        "metrics.csv",
        "metrics.jsonl",
        "metrics.tmp",
        "tensorboard",
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

    Seeds the global generators of torch, NumPy and Python. SIGTERM and SIGINT save the run and raise `Stopped`,
    a SystemExit of code 143 or 130; the run then continues with ``resume``, bit for bit. A setting of ``config`` that
    equals its default counts as not given, so that with ``resume`` it neither changes nor contradicts the run's own;
    `TrainConfig.from_dict` takes every key as given.

    Raises:
        ConfigError: the run cannot start; nothing was written.
        TrainingError: the loss or a weight is no longer finite; the last good checkpoint stands.
        CheckpointError: a checkpoint cannot be read or written.
        DataError: images that cannot be read.
    """
    reporter = Reporter(quiet=quiet)
    snapshot = None
    resumed = resume(config, reporter)
    if resumed is None:
        resolved, data, notes = resolve(config)
        _check_baseline(resolved)
    else:
        resolved, snapshot = resumed
        data, notes = open_bundle(resolved), []
        check_data(snapshot, resolved, data)
    with _arithmetic(resolved), StopSignal() as stop:
        learner = build_learner(resolved, data.num_classes, start=snapshot is None, tell=notes.append)
        folder = _folder(resolved)
        if snapshot is None:
            resolved = _begin(folder, resolved)
        for line in [*_headline(resolved, data, learner), *notes]:
            reporter.line(line, style="dim")
        try:
            trainer = _run(resolved, data, learner, folder, snapshot, reporter, stop)
            baseline = _run_baselines(resolved, data, folder, reporter, stop) if resolved.baseline else {}
        except Stopped as stopped:
            reporter.line(f"stopped by {signal.Signals(stopped.signum).name}, all saved; go on with --resume {folder}")
            raise
    result = RunResult(folder, trainer.scores, {arch: alone.scores["sub0"] for arch, alone in baseline.items()})
    _write_summary(result, resolved, trainer)
    _print_result(result, resolved, trainer, reporter)
    return result


def _run(
    config: ResolvedConfig,
    data: DataBundle,
    learner: Learner,
    folder: Path,
    snapshot: Snapshot | None,
    reporter: Reporter,
    stop: StopSignal,
) -> Trainer:
    trainer = Trainer(config, data, learner, folder, reporter, stop)
    if snapshot is not None:
        trainer.restore(snapshot)
        at = trainer.position
        if trainer.finished:
            reporter.line(f"{folder} is finished: {config.epochs} epochs")
            return trainer
        reporter.line(f"continuing {folder} at epoch {at.epoch + 1}, step {at.step} of {len(trainer.loader)}")
    trainer.run(f"{config.method} {' + '.join(config.arch)}")
    return trainer


def _run_baselines(
    config: ResolvedConfig, data: DataBundle, folder: Path, reporter: Reporter, stop: StopSignal
) -> dict[str, Trainer]:
    """Train one network of each architecture alone, in RUN/baseline-ARCH; one that was interrupted goes on."""
    trainers = {}
    for arch in dict.fromkeys(config.arch):
        own = folder / f"baseline-{arch.replace('/', '_')}"
        alone = dataclasses.replace(
            config,
            arch=[arch],
            init=config.init and [config.init[config.arch.index(arch)]],
            method="single",
            options=dataclasses.asdict(methods.resolve("single").Options()),
            trunk="none",
            baseline=False,
            out=str(own),
        )
        snapshot = None
        if has_checkpoint(own):
            snapshot = load(own, reporter)
        else:
            alone = _begin(own, alone)
        learner = build_learner(alone, data.num_classes, start=snapshot is None)
        reporter.line(f"baseline: {arch} alone, same recipe and seed", style="dim")
        trainers[arch] = _run(alone, data, learner, own, snapshot, reporter, stop)
    return trainers


def _begin(folder: Path, config: ResolvedConfig) -> ResolvedConfig:
    """Make the run's folder and write its config: the first thing that touches the disk."""
    config = dataclasses.replace(config, out=str(folder), resume=None)
    file = folder / "config.yaml"
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(config.to_yaml(), encoding="utf-8")
    except OSError as error:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
            for path in made:
                path.rmdir()
        raise ConfigError(f"--out {folder}: cannot write there ({error.strerror}); choose another folder") from error
    return config


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
    leftovers = _ABORTED_START if config.resume == "auto" else frozenset()
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - leftovers):
        advice = f", or continue the run in it with --resume {folder}" if has_checkpoint(folder) else ""
        raise ConfigError(f"--out {folder}: exists and is not an empty folder; choose another{advice}")
    return folder


def _check_baseline(config: ResolvedConfig) -> None:
    if config.baseline and config.method == "single":
        raise ConfigError("--baseline trains each network alone, which --method single does already; leave it away")


@contextlib.contextmanager
def _arithmetic(config: ResolvedConfig) -> Iterator[None]:
    """Choose the algorithms of a run; the caller's own choice is back afterwards."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not config.deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark


def _headline(config: ResolvedConfig, data: DataBundle, learner: Learner) -> list[str]:
    parameters = sum(p.numel() for p in learner.parameters())
    sizes = f"{len(data.train):,} training and {len(data.test):,} test images, {data.num_classes} classes"
    trunk = "" if learner.cohort.trunk is None else ", shared trunk"
    milestones = f", ×{config.gamma:g} at {', '.join(map(str, config.milestones))}" if config.milestones else ""
    amp = "" if config.amp == "off" else f", {config.amp}"
    return [
        f"{config.data}: {sizes}, {data.image_size}×{data.image_size}",
        f"{config.method}: {' + '.join(config.arch)}{trunk}, {parameters:,} parameters, on {config.device}{amp}",
        f"{config.epochs} epochs of batch {config.batch_size}, lr {config.lr:g} {config.schedule}{milestones}, "
        f"seed {config.seed} → {config.out}",
    ]


def _write_summary(result: RunResult, config: ResolvedConfig, trainer: Trainer) -> None:
    at = trainer.position
    loader = trainer.loader
    images = min(loader.num_images, len(loader) * loader.batch_size) * config.epochs  # drop_last may leave one out
    scores = {name: score._asdict() | {"accuracy": score.value} for name, score in result.scores.items()}
    summary = {
        "scores": scores,
        "baseline": {arch: score._asdict() | {"accuracy": score.value} for arch, score in result.baseline.items()},
        "best": {"output": trainer.learner.method.main_output, "accuracy": at.best, "epoch": at.best_epoch},
        "epochs": config.epochs,
        "seconds": at.seconds,
        "images_per_second": images / at.seconds,
        "config_hash": config.hash(),
        "versions": {"fflfast": fflfast.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "device": str(trainer.device),
    }
    (result.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def _print_result(result: RunResult, config: ResolvedConfig, trainer: Trainer, reporter: Reporter) -> None:
    arch = config.arch
    what = {f"sub{k}": name for k, name in enumerate(arch)}
    what |= {"ensemble": f"mean of the {len(arch)} logits", "fused": "fused classifier"}
    rows = [(name, what.get(name, ""), score) for name, score in result.scores.items()]
    alone = [("alone", f"{name}, same recipe and seed", score) for name, score in result.baseline.items()]
    metric = f"test {trainer.task.metric_name}"
    reporter.console.print(score_table(f"{config.data}, {config.method}, {config.epochs} epochs", metric, rows, alone))
    reporter.line(f"trained in {trainer.position.seconds:.0f} s; {result.folder} holds the run")
