"""Test accuracy of a run, of a checkpoint or of an exported file; export of a run's networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
from torch import Tensor, nn

from .. import models
from ..cohort import Learner
from ..data import DataBundle, Loader, Split
from ..ops.augment import normalization_table, normalize
from ..tasks import Score, Task, task_of
from . import checkpoint
from .build import build_learner, open_bundle, select_device
from .config import ConfigError, ResolvedConfig, TrainConfig
from .step import to_device

__all__ = ["evaluate", "export", "load_run", "score_split"]

BATCH_SIZE = 256
"""Images in a test batch: one number for every test, since it may decide the last bit of a logit."""


@torch.no_grad()
def score_split(
    predict: Callable[[Tensor], Mapping[str, Tensor]],
    split: Split,
    table: Tensor,
    task: Task,
    *,
    workers: int = 0,
    limit: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Score] | None:
    """Classify a split, unaugmented, in file order and in float32; None when asked to stop before the end.

    ``predict`` takes normalised images (B, 3, H, W) on the device of ``table`` and returns logits (B, K) by name. Right
    answers are counted on the device and read once.
    """
    metric = task.metric()
    loader = Loader(split, batch_size=BATCH_SIZE, seed=0, train=False, workers=workers, limit=limit)
    for batch in loader.epoch(0):
        batch = to_device(batch, table.device)
        metric.update(predict(normalize(cast(Tensor, batch.images), table)), batch.target)
        if should_stop():
            return None
    return metric.read()


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

    Args:
        path: folder or file.
        data, data_dir: what to test on; None takes what the file names.
        device: as in TrainConfig.
        weights: of a run's folder, "last" or "best".
        limit_test: test on this many images only; None for a run means as it was trained.
        workers: threads that load images.

    Raises:
        ConfigError: no such file, or data that does not fit it.
        CheckpointError: a damaged checkpoint.
    """
    path, where = Path(path), select_device(device)
    if not path.exists():
        raise ConfigError(f"{path} does not exist; expected the folder of a run, a checkpoint or an exported file")
    if _is_run(path):
        config, learner, facts = load_run(path, weights=weights)
        predict: Callable[[Tensor], Mapping[str, Tensor]] = learner.to(where).eval().predict
        data_dir = data_dir or (config.data_dir if data in (None, config.data) else None)
        limit_test = limit_test or config.limit_test
    else:
        try:
            module, facts = models.load_exported(path)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        missing = {"data", "image_size", "class_names", "mean", "std"} - facts.keys()
        if missing:
            raise ConfigError(f"{path} does not say its {', '.join(sorted(missing))}; write it with fflfast export")
        if isinstance(module, torch.fx.GraphModule):
            where = torch.device("cpu")  # a program stays where it was traced
        else:
            cast(nn.Module, module).to(where)
        predict = _naming(facts.get("output", path.stem), module)
    bundle = _open(path, facts, data, data_dir)
    table = normalization_table(facts["mean"], facts["std"]).to(where)
    task = task_of(bundle.num_classes)
    return score_split(predict, bundle.test, table, task, workers=workers, limit=limit_test) or {}


def export(run: str | Path, out: str | Path | None = None, *, weights: str = "last") -> list[Path]:
    """Write every sub-network of a run as OUT/subK.safetensors and the fused model, if there is one, as OUT/fused.pt2.

    OUT is RUN/export by default. The safetensors files hold the plain state dict of the architecture; fused.pt2 is a
    torch.export program from normalised images (B, 3, H, W) to logits. Each carries what ``fflfast eval`` needs.

    Raises:
        ConfigError: no run there. CheckpointError: a damaged checkpoint.
    """
    run = Path(run)
    config, learner, facts = load_run(run, weights=weights)
    folder = Path(out) if out is not None else (run if run.is_dir() else run.parent) / "export"
    folder.mkdir(parents=True, exist_ok=True)
    learner.eval()
    files = []
    for k, sub_network in enumerate(learner.cohort.sub_networks):
        metadata = {**facts, "output": f"sub{k}"}
        path = folder / f"sub{k}.safetensors"
        files.append(models.export_sub_network(sub_network, learner.cohort.trunk, path, metadata=metadata))
    if hasattr(learner.method, "fused_logits"):
        example = torch.zeros(2, 3, facts["image_size"], facts["image_size"])
        metadata = {**facts, "output": "fused", "arch": config.arch}
        files.append(models.export_fused(learner, folder / "fused.pt2", example_images=example, metadata=metadata))
    return files


def load_run(path: str | Path, *, weights: str = "last") -> tuple[ResolvedConfig, Learner, dict[str, Any]]:
    """Return config, learner (on the CPU, with its trained weights) and data facts of a run's folder or checkpoint."""
    path = Path(path)
    if not path.is_dir():
        snapshot = checkpoint.read(path)
    elif weights == "best":
        snapshot = checkpoint.read(path / checkpoint.BEST)
    elif weights == "last":
        snapshot, _, _ = checkpoint.load_latest(path)
    else:
        raise ConfigError(f"--weights: expected last or best, got {weights!r}")
    facts = snapshot.info["data"]
    config = ResolvedConfig.from_dict(snapshot.info["config"])
    learner = build_learner(config, len(facts["class_names"]), start=False)
    learner.load_state_dict(checkpoint.under(snapshot.tensors, "learner/"))
    return config, learner, facts


def _naming(name: str, module: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Mapping[str, Tensor]]:
    return lambda images: {name: module(images)}


def _is_run(path: Path) -> bool:
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
    expected, got = list(facts["class_names"]), list(bundle.class_names)
    if expected != got:
        differing = next((f"{a!r} and {b!r}" for a, b in zip(expected, got, strict=False) if a != b), "the number")
        raise ConfigError(
            f"{path} was trained on {len(expected)} classes of {facts['data']}, but {config.data} has {len(got)} that "
            f"are not the same ({differing}); give --data and --data-dir of the data it was trained on"
        )
    return bundle
