"""Joints in COCO's result format, and their average precision by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..data import CocoSplit, DataError
from ..data.pose import read_json

__all__ = ["average_precision", "coco_results"]

_NAMES = ("AP", "AP50", "AP75", "AP medium", "AP large", "AR", "AR50", "AR75", "AR medium", "AR large")


def coco_results(split: CocoSplit, index: Tensor, places: Tensor, scores: Tensor) -> list[dict[str, Any]]:
    """Return what pycocotools reads, an entry a person; its score is the mean of those of its joints.

    Args:
        split: whose persons these are.
        index: int64 (b,), their places in the split.
        places: (b, J, 2), x and y of the joints in pixels of the split's images.
        scores: (b, J), of the joints.
    """
    in_file = split.in_file(index, places.cpu()).numpy()
    entries = []
    for row, joints, score in zip(index.tolist(), in_file, scores.cpu().double().numpy(), strict=True):
        triples = np.concatenate([joints, score[:, None]], axis=1).round(4)
        entries.append(
            {
                "image_id": split.image_ids[row],
                "category_id": split.category,
                "keypoints": triples.flatten().tolist(),
                "score": float(score.mean()),
            }
        )
    return entries


def average_precision(
    split: CocoSplit, index: Sequence[int], results: list[dict[str, Any]], sigmas: Sequence[float]
) -> dict[str, float]:
    """Return average precision and recall over object keypoint similarities of 0.5 … 0.95, as pycocotools has them.

    Args:
        split: whose annotations are the truth.
        index: the persons that were looked for; the split's others are taken out of the truth.
        results: see `coco_results`.
        sigmas: one a joint, see `fflfast.data.Keypoints`.

    Returns:
        AP, AP50, AP75, AP medium, AP large and the same of AR, without those for which there is no person.

    Raises:
        ImportError: pycocotools is not installed.
        DataError: an annotation lacks what the measure needs, such as its area.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise ImportError("the average precision needs pycocotools; install it: pip install 'fflfast[pose]'") from error
    left_out = set(split.ids) - {split.ids[row] for row in index}
    truth, content = COCO(), read_json(split.annotations)
    truth.dataset = {**content, "annotations": [a for a in content["annotations"] if a.get("id") not in left_out]}
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            truth.createIndex()
            measure = COCOeval(truth, truth.loadRes(results), "keypoints")
            measure.params.imgIds = sorted({split.image_ids[row] for row in index})
            measure.params.catIds = [split.category]
            measure.params.kpt_oks_sigmas = np.array(sigmas)
            measure.evaluate()
            measure.accumulate()
            measure.summarize()
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{split.annotations}: the average precision needs of every annotation area, iscrowd and num_keypoints "
                f"as COCO has them, and one lacks them or has others ({error!r})"
            ) from error
    # pycocotools says −1 where there is nothing to find.
    return {name: value for name, value in zip(_NAMES, measure.stats.tolist(), strict=True) if value >= 0}
