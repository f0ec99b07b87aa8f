"""What a pose run finds in COCO's test images: a file of results, and their average precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..data import CocoSplit
from ..heatmaps import decode_heatmaps
from ..tasks.coco_ap import average_precision, coco_results
from .config import ConfigError
from .evaluation import open_subject
from .files import replace_text

__all__ = ["evaluate_ap"]


@torch.no_grad()
def evaluate_ap(
    path: str | Path,
    out: str | Path,
    *,
    output: str | None = None,
    data: str | None = None,
    data_dir: str | None = None,
    device: str = "auto",
    weights: str = "last",
    limit_test: int | None = None,
    workers: int = 0,
) -> dict[str, float]:
    """Write the joints of all test persons in COCO's result format and return their average precision and recall.

    The network is told where the persons are (true boxes), so the figures are above those with a detector's boxes.
    With ``limit_test`` the persons left out are no part of the truth.

    Args:
        path: folder of a run, checkpoint or exported file.
        out: the JSON file.
        output: whose joints; None for the run's main output.
        data, data_dir, device, weights, limit_test, workers: see `fflfast.training.evaluate`.

    Returns:
        See `fflfast.tasks.coco_ap.average_precision`; empty where the joints are not of COCO's kinds, for which there
        is no object keypoint similarity.

    Raises:
        ConfigError: the data has no COCO annotations, there is no such output, ``out`` cannot be written, or
            pycocotools is missing (then the file is written).
        DataError: see `fflfast.tasks.coco_ap.average_precision`.
    """
    subject = open_subject(
        path, data=data, data_dir=data_dir, device=device, weights=weights, limit_test=limit_test, workers=workers
    )
    split, keypoints = subject.data.test, subject.data.keypoints
    if not isinstance(split, CocoSplit) or keypoints is None:
        raise ConfigError(f"--coco-json: {subject.data.name} has no COCO annotations; take data coco-keypoints")
    output = output or subject.main
    index: list[int] = []
    results: list[dict[str, Any]] = []
    for inputs in subject.feed.inputs(0):
        batch = subject.feed.batch(inputs)
        heatmaps = subject.task.outputs(subject.predict, cast(Tensor, batch.images), subject.table)
        if output not in heatmaps:
            raise ConfigError(f"--coco-json: expected one of the outputs {', '.join(heatmaps)}, got {output!r}")
        places, scores = decode_heatmaps(heatmaps[output], subject.data.image_size)
        results += coco_results(split, batch.index, places, scores)
        index += batch.index.tolist()
    try:
        replace_text(Path(out), json.dumps(results))
    except OSError as error:
        raise ConfigError(f"--coco-json {out}: {error}; choose another file") from error
    if keypoints.sigmas is None:
        return {}
    try:
        return average_precision(split, index, results, keypoints.sigmas)
    except ImportError as error:
        raise ConfigError(f"{out} is written; {error}") from error
