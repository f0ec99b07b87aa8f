"""Which run to continue, from which checkpoint, and whether what was asked for fits it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import methods
from ..data import DataBundle
from . import checkpoint
from .arguments import check_types
from .build import absolute, select_device, teacher_address
from .checkpoint import CheckpointError, Snapshot
from .config import MAY_CHANGE, ConfigError, ResolvedConfig, TrainConfig, check_ranges, naming, shorten
from .log import summary_writer
from .recipes import complete
from .report import Reporter
from .saving import describe_data

__all__ = ["check_data", "find_snapshot", "has_checkpoint", "load", "resume"]


@naming("--resume")
def find_snapshot(config: TrainConfig, reporter: Reporter) -> Snapshot | None:
    """Return the snapshot to continue from, None for a new run."""
    if config.resume is None:
        return None
    if config.resume == "auto":
        if config.out is None:
            raise ConfigError("--resume auto: continues the run in --out, which is not given; add --out FOLDER")
        if not has_checkpoint(Path(config.out)):
            return None
    folder = _folder(config)
    if not folder.is_dir():
        raise ConfigError(f"--resume {folder}: no such folder; give the folder of a run")
    if config.out is not None and Path(config.out).resolve() != folder.resolve():
        raise ConfigError(f"--resume {folder} continues in that folder, but --out is {config.out}; leave --out away")
    try:
        return load(folder, reporter)
    except CheckpointError as error:
        raise ConfigError(f"--resume {folder}: {error}") from error


def _folder(config: TrainConfig) -> Path:
    return Path((config.out if config.resume == "auto" else config.resume) or "")


@naming("--resume")
def resume(config: TrainConfig, snapshot: Snapshot) -> ResolvedConfig:
    """Return the settings that a run goes on with.

    What is `TrainConfig.given` must be as the run has it, except for what `MAY_CHANGE`.
    """
    folder = _folder(config)
    saved = snapshot.info["config"]
    values = {**complete(saved), "out": str(folder), "resume": str(folder)}
    method = methods.resolve(saved["method"])
    asked = config.to_dict()
    for name in sorted(config.given - {"out", "resume"}):
        given = asked[name]
        if name in ("data_dir", "init"):
            given = absolute(given)
        elif name == "teacher":
            given = teacher_address(given)
        elif name == "arch" and given is not None:
            given = method.architectures(given)
        if name in MAY_CHANGE:
            values[name] = given
        elif not _agrees(values[name], given, name):
            raise ConfigError(
                f"--resume {folder}: the run has {name} {values[name]}, got {shorten(given)}; leave it away to "
                "continue that run, or start a new one in another --out"
            )
    values["device"] = str(select_device(values["device"]))
    resolved = check_types(ResolvedConfig(**values), method.Options)
    check_ranges(resolved)
    if resolved.tensorboard:
        summary_writer()
    return resolved


def has_checkpoint(folder: Path) -> bool:
    """Tell whether a folder holds a checkpoint to continue from, good or damaged."""
    return (folder / checkpoint.LAST).exists() or (folder / checkpoint.PREVIOUS).exists()


def _agrees(old: Any, new: Any, name: str) -> bool:
    if isinstance(old, dict) and isinstance(new, dict):
        return all(key in old and old[key] == value for key, value in new.items())
    by_recipe = new is None and name in ResolvedConfig.__annotations__
    return bool(old == new) or new == "auto" or by_recipe


def load(folder: Path, reporter: Reporter) -> Snapshot:
    """Read the newest good checkpoint; a damaged newer one is reported and moved aside, so that it replaces nothing."""
    snapshot, path, warnings = checkpoint.load_latest(folder)
    for warning in warnings:
        reporter.line(f"warning: {warning}; going on from {path.name}", style="yellow")
    last = folder / checkpoint.LAST
    if path != last and last.exists():
        last.replace(last.with_suffix(".damaged"))
    return snapshot


def check_data(snapshot: Snapshot, config: ResolvedConfig, data: DataBundle) -> None:
    """Raise ConfigError where the data is not what the run began with."""
    was, now = snapshot.info["data"], describe_data(config, data)
    changed = [key for key in was if was[key] != now.get(key)]
    if changed:
        raise ConfigError(
            f"--resume {config.resume}: the data set {config.data} is not what the run began with (another "
            f"{', '.join(changed)}); give --data-dir of the same data"
        )
