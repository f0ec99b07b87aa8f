"""Test accuracy of a run, of a checkpoint or of an exported file; export of a run's networks."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import safetensors
import torch
from torch import Tensor, nn

from .. import models
from ..cohort import Cohort, Learner
from ..data import DataBundle
from ..ops.augment import normalization_table
from ..tasks import Score, Task, task_of
from . import checkpoint
from .build import build_learner, open_bundle, select_device
from .checkpoint import Snapshot
from .config import ConfigError, ResolvedConfig, TrainConfig, check_ranges
from .feeding import Feed, evaluation_feed
from .layout import to_channels_last
from .processes import SINGLE, Processes
from .recipes import complete

__all__ = [
    "Judged",
    "Scores",
    "Subject",
    "check_classes",
    "evaluate",
    "export",
    "is_run",
    "judge",
    "load_file",
    "load_run",
    "open_subject",
    "score_split",
]


class Scores(NamedTuple):
    """What a test gives.

    Attributes:
        scores: by output.
        details: by output, the scores of its parts (of a pose: its joints); empty where the task has none.
    """

    scores: dict[str, Score]
    details: dict[str, dict[str, Score]]


class Judged(NamedTuple):
    """`Scores`, and what they measure."""

    metric: str
    scores: dict[str, Score]
    details: dict[str, dict[str, Score]]


class Subject(NamedTuple):
    """A trained network and what it is tested on.

    Attributes:
        predict: normalised images (B, 3, H, W) on the device of ``table`` to logits by output.
        main: the output that counts.
        task, table, data, feed: see `score_split`.
    """

    predict: Callable[[Tensor], Mapping[str, Tensor]]
    main: str
    task: Task
    table: Tensor
    data: DataBundle
    feed: Feed


@torch.no_grad()
def score_split(
    predict: Callable[[Tensor], Mapping[str, Tensor]],
    feed: Feed,
    table: Tensor,
    task: Task,
    *,
    processes: Processes = SINGLE,
    should_stop: Callable[[], bool] = lambda: False,
) -> Scores | None:
    """Judge a test set, unaugmented, in file order and in float32; None when asked to stop before the end.

    ``predict`` takes normalised images (B, 3, H, W) on the device of ``table`` and returns logits by name. Right
    answers are counted on the device and read once. Of several processes each judges the batches of its ``feed``, and
    all get the scores of the whole; ``should_stop`` has to answer them alike.
    """
    metric = None
    for inputs in feed.inputs(0):
        batch = feed.batch(inputs)
        outputs = task.outputs(predict, cast(Tensor, batch.images), table)
        metric = metric or task.metric(tuple(outputs), table.device)
        metric.update(outputs, batch.target)
        if should_stop():
            return None
    return Scores({}, {}) if metric is None else Scores(metric.read(processes), metric.details(processes))


def evaluate(
    path: str | Path,
    *,
    data: str | None = None,
    data_dir: str | None = None,
    device: str = "auto",
    weights: str = "last",
    limit_test: int | None = None,
    workers: int = 0,
) -> dict[str, Score]:
    """Return the test scores, by output, of a run's folder, a checkpoint, or an exported .safetensors or .pt2 file.

    `judge` of `open_subject`, which takes the same arguments, returns more.

    Args:
        path: folder or file.
        data, data_dir: what to test on; None takes what the file names.
        device: as in TrainConfig; a .pt2 program runs on the CPU.
        weights: of a run's folder, "last" or "best".
        limit_test: test on this many images only; None means as the run was tested.
        workers: threads that load images.

    Raises:
        ConfigError: no such file, data that does not fit it, or an argument out of range.
        CheckpointError: a damaged checkpoint. A damaged last one is named on stderr, and the one before is taken.
    """
    subject = open_subject(
        path, data=data, data_dir=data_dir, device=device, weights=weights, limit_test=limit_test, workers=workers
    )
    return judge(subject).scores


def judge(subject: Subject) -> Judged:
    """Return what `evaluate` returns, what it measures, and the scores of the parts where the task has some."""
    scored = score_split(subject.predict, subject.feed, subject.table, subject.task)
    scores, details = scored or Scores({}, {})
    return Judged(subject.task.metric_name, scores, details)


def open_subject(
    path: str | Path,
    *,
    data: str | None = None,
    data_dir: str | None = None,
    device: str = "auto",
    weights: str = "last",
    limit_test: int | None = None,
    workers: int = 0,
) -> Subject:
    """Open what `evaluate` tests, with the same arguments and errors."""
    path, where = Path(path), select_device(device)
    check_ranges(TrainConfig(limit_test=limit_test, workers=workers))
    _check_path(path, weights)
    if is_run(path):
        config, learner, facts = load_run(path, weights=weights)
        learner.to(where).eval()
        if config.channels_last:  # in the order in which the run tested it, for the same last bits
            to_channels_last(learner, where)
        predict: Callable[[Tensor], Mapping[str, Tensor]] = learner.predict
        main = str(learner.method.main_output)
        data_dir = data_dir or (config.data_dir if data in (None, config.data) else None)
    else:
        module, facts = load_file(path)
        if isinstance(module, torch.fx.GraphModule):
            if device != "auto" and where.type != "cpu":
                raise ConfigError(f"--device {device}: a .pt2 program runs where it was traced; take --device cpu")
            where = torch.device("cpu")
        main = facts.get("output", path.stem)
        predict = _naming(main, module.to(where))
    bundle = _open(path, facts, data, data_dir)
    task = task_of(
        bundle.task,
        bundle.num_classes,
        keypoints=bundle.keypoints,
        image_size=bundle.image_size,
        flip_test=facts.get("flip_test", True),
    )
    table = normalization_table(facts["mean"], facts["std"]).to(where)
    limit = facts.get("limit_test") if limit_test is None else limit_test
    feed = evaluation_feed(bundle.test, where, data_on="host", workers=workers, limit=limit)
    return Subject(predict, main, task, table, bundle, feed)


def export(run: str | Path, out: str | Path | None = None, *, weights: str = "last") -> list[Path]:
    """Write every sub-network of a run as OUT/subK.safetensors and the fused model, if there is one, as OUT/fused.pt2.

    Networks that the method itself holds, such as PCL's averages, become OUT/NAMEK.safetensors.

    OUT is RUN/export by default. The safetensors files hold the plain state dict of the architecture; fused.pt2 is a
    torch.export program from normalised images (B, 3, H, W) to logits. Each carries what ``fflfast eval`` needs.

    Raises:
        ConfigError: no run there, or OUT cannot be a folder to write into; nothing was written.
        CheckpointError: a damaged checkpoint. A damaged last one is named on stderr, and the one before is taken.
        OSError: the disk refuses; the files that are there are whole.
    """
    run = Path(run)
    config, learner, facts = load_run(run, weights=weights)
    folder = Path(out) if out is not None else (run if run.is_dir() else run.parent) / "export"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("no right to write there")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--out {folder}: expected a folder to write into ({reason}); choose another") from error
    try:
        return _export_all(learner.eval(), folder, facts, config.arch)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"cannot write into {folder}: {reason}; free the disk, then export again") from error


def _export_all(learner: Learner, folder: Path, facts: Mapping[str, Any], arch: list[str]) -> list[Path]:
    files = []
    for k, sub_network in enumerate(learner.cohort.sub_networks):
        metadata = {**facts, "output": f"sub{k}"}
        path = folder / f"sub{k}.safetensors"
        files.append(models.export_sub_network(sub_network, learner.cohort.trunk, path, metadata=metadata))
    for name, held in learner.method.named_children():  # a method may judge networks of its own, such as averages
        if isinstance(held, Cohort):
            for k, sub_network in enumerate(held.sub_networks):
                path, metadata = folder / f"{name}{k}.safetensors", {**facts, "output": f"{name}{k}"}
                files.append(models.export_sub_network(sub_network, held.trunk, path, metadata=metadata))
    if hasattr(learner.method, "fused_logits"):
        example = torch.zeros(2, 3, facts["image_size"], facts["image_size"])
        metadata = {**facts, "output": "fused", "arch": arch}
        files.append(models.export_fused(learner, folder / "fused.pt2", example_images=example, metadata=metadata))
    return files


def load_run(path: str | Path, *, weights: str = "last") -> tuple[ResolvedConfig, Learner, dict[str, Any]]:
    """Return config, learner (on the CPU, with its trained weights) and data facts of a run's folder or checkpoint.

    The weights of a run with ``ema`` are their average. The facts are what an exported file carries: the data set, its
    classes and normalisation, ``limit_test`` and ``flip_test``. A frozen teacher is not loaded.
    """
    snapshot = _snapshot(Path(path), weights)
    config = ResolvedConfig.from_dict(complete(snapshot.info["config"]))
    facts = {**snapshot.info["data"], "limit_test": config.limit_test, "flip_test": config.flip_test}
    learner = build_learner(config, len(facts["class_names"]), start=False)
    raw = checkpoint.under(snapshot.tensors, "learner/")
    average = checkpoint.under(snapshot.tensors, "average/")
    learner.load_state_dict(raw | {name: tensor for name, tensor in average.items() if name in raw})
    return config, learner, facts


def _snapshot(path: Path, weights: str) -> Snapshot:
    _check_path(path, weights)
    if not path.is_dir():
        if not is_run(path):
            raise ConfigError(f"{path} is damaged or is no checkpoint of fflfast train; give the folder of a run")
        return checkpoint.read(path)
    names = (checkpoint.LAST, checkpoint.PREVIOUS) if weights == "last" else (checkpoint.BEST,)
    if not any(os.path.exists(path / name) for name in names):
        raise ConfigError(f"{path} holds no {names[0]}; give the folder of a run of fflfast train")
    if weights == "best":
        return checkpoint.read(path / checkpoint.BEST)
    snapshot, used, warnings = checkpoint.load_latest(path)
    for warning in warnings:
        print(f"fflfast: warning: {warning}; took {used.name}", file=sys.stderr)
    return snapshot


def _check_path(path: Path, weights: str) -> None:
    if weights not in ("last", "best"):
        raise ConfigError(f"--weights: expected last or best, got {weights!r}")
    if not os.path.exists(path):  # unlike Path.exists, False for a name that is too long
        raise ConfigError(f"{path} does not exist; give the folder of a run, or a file that fflfast wrote")
    if weights == "best" and not path.is_dir():
        raise ConfigError(f"--weights best chooses a file in a run's folder, but {path} is a file; leave it away")


def _naming(name: str, module: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Mapping[str, Tensor]]:
    return lambda images: {name: module(images)}


def load_file(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network of an exported file, on the CPU, and its facts; ConfigError where it lacks some."""
    try:
        module, facts = models.load_exported(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    missing = {"data", "image_size", "class_names", "mean", "std"} - facts.keys()
    if missing:
        raise ConfigError(f"{path} does not say its {', '.join(sorted(missing))}; write it with fflfast export")
    return cast(nn.Module, module), facts


def is_run(path: Path) -> bool:
    """Tell a run's folder or checkpoint from an exported file."""
    if path.is_dir():
        return True
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return "info" in (file.metadata() or {})
    except (OSError, safetensors.SafetensorError):
        return False


def _open(path: Path, facts: Mapping[str, Any], data: str | None, data_dir: str | None) -> DataBundle:
    config = TrainConfig(data=data or facts["data"], data_dir=data_dir, image_size=facts["image_size"])
    bundle = open_bundle(config)
    check_classes(str(path), facts, bundle, "give --data and --data-dir of the data it was trained on")
    return bundle


def check_classes(path: str, facts: Mapping[str, Any], data: DataBundle, remedy: str) -> None:
    """Raise ConfigError where a trained network knows other classes than those of ``data``."""
    expected, got = list(facts["class_names"]), list(data.class_names)
    if expected != got:
        differing = next((f"{a!r} and {b!r}" for a, b in zip(expected, got, strict=False) if a != b), "the number")
        raise ConfigError(
            f"{path} was trained on {len(expected)} classes of {facts['data']}, but {data.name} has {len(got)} that "
            f"are not the same ({differing}); {remedy}"
        )
