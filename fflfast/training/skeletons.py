"""Pictures of what a pose run predicts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ..heatmaps import decode_heatmaps
from ..tasks.drawing import draw_person
from .config import ConfigError
from .evaluation import open_subject
from .plots import check_ending, save

__all__ = ["draw_predictions"]

_COLUMNS = 8
_SIDE = 2.0  # inches of an image


@torch.no_grad()
def draw_predictions(
    path: str | Path,
    out: str | Path | None = None,
    *,
    count: int = 16,
    data: str | None = None,
    data_dir: str | None = None,
    device: str = "auto",
    weights: str = "last",
) -> Path:
    """Draw true and predicted skeletons on test images and return the file.

    Args:
        path: folder of a run, checkpoint or exported file; what is drawn is the run's main output.
        out: image file; None for predictions.png in the run's folder, or beside the file.
        count: how many images, always the same ones, each under how many of its joints the run's metric
            counts as found.
        data, data_dir, device, weights: see `fflfast.training.evaluate`.

    Raises:
        ConfigError: no run of the task pose there, or ``out`` cannot be written.
    """
    from matplotlib.figure import Figure

    path = Path(path)
    if count < 1:
        raise ConfigError(f"--predictions: expected at least 1 image, got {count}")
    subject = open_subject(path, data=data, data_dir=data_dir, device=device, weights=weights, limit_test=count)
    keypoints, size = subject.data.keypoints, subject.data.image_size
    if keypoints is None:
        raise ConfigError(f"{path}: --predictions draws joints, and {subject.data.name} has none; draw its curves")
    file = Path(out) if out is not None else (path if path.is_dir() else path.parent) / "predictions.png"
    shown = min(count, len(subject.data.test))
    rows = math.ceil(shown / _COLUMNS)
    figure = Figure(figsize=(_SIDE * min(shown, _COLUMNS), (_SIDE + 0.2) * rows), layout="constrained")
    check_ending(figure, file)
    axes = figure.subplots(rows, min(shown, _COLUMNS), squeeze=False).flat
    for inputs in subject.feed.inputs(0):
        batch = subject.feed.batch(inputs)
        images = cast(Tensor, batch.images)
        maps = subject.task.outputs(subject.predict, images, subject.table)[subject.main]
        found, _ = decode_heatmaps(maps, size)
        for k, axis in zip(range(len(images)), axes, strict=False):
            one = subject.task.metric((subject.main,))
            one.update({subject.main: maps[k : k + 1]}, batch.target[k : k + 1])
            score = one.read()[subject.main]
            axis.set_title(f"{score.correct} of {score.total}" if score.total else "torso not seen", fontsize="small")
            draw_person(axis, images[k], found[k], batch.target[k], keypoints)
    for axis in axes:
        axis.set_axis_off()
    return save(figure, file)
