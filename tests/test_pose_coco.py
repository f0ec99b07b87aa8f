"""COCO's average precision: against a plain evaluation of its formula, and against pycocotools on the files."""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("pycocotools")
from pose_data import annotation, person, write_annotations, write_coco

from fflfast.data import DataError, open_data
from fflfast.tasks.coco_ap import average_precision, coco_results


@pytest.fixture
def opened(tmp_path):
    """Annotations of the test part, and the data set."""
    contents = write_coco(tmp_path, (2, 8))
    return contents["val"], open_data("coco-keypoints", tmp_path, image_size=64)


def results_of(split, index, *, off=0.0, scores=None):
    """Entries whose joints lie ``off`` pixels (of the file) to the right of the truth."""
    index = torch.as_tensor(index)
    off = torch.as_tensor(off, dtype=torch.float64).expand(len(index))
    scale = torch.tensor([split.shape[-1] / side for side in split.persons.boxes[index][:, 2].tolist()])
    places = split.targets[index][..., :2].double()
    places[..., 0] += (off * scale)[:, None]
    values = torch.arange(len(index), 0, -1.0) if scores is None else torch.as_tensor(scores)
    return coco_results(split, index, places, values[:, None].expand(-1, places.shape[1]))


def similarity(item, off, sigmas):
    """Object keypoint similarity, all joints labelled and off by the same distance."""
    return np.mean([math.exp(-(off**2) / (2 * item["area"] * (2 * sigma) ** 2)) for sigma in sigmas])


def precision_by_hand(similarities, scores, threshold):
    """Area under the interpolated curve at 101 recalls, one person an image."""
    right = [similarities[k] >= threshold for k in np.argsort([-score for score in scores], kind="stable")]
    curve = [(sum(right[: k + 1]) / len(right), sum(right[: k + 1]) / (k + 1)) for k in range(len(right))]
    wanted = [max((p for r, p in curve if r >= k / 100 - 1e-9), default=0.0) for k in range(101)]
    return sum(wanted) / 101


def test_it_is_the_formula(opened):
    content, data = opened
    off = [0.0, 1.5, 3.0, 4.0, 5.0, 6.0, 8.0, 30.0]
    scores = [0.3, 0.9, 0.5, 0.8, 0.2, 0.7, 0.6, 0.95]
    sigmas = data.keypoints.sigmas
    results = results_of(data.test, range(8), off=off, scores=scores)
    got = average_precision(data.test, range(8), results, sigmas)
    found = [similarity(item, d, sigmas) for item, d in zip(content["annotations"], off, strict=True)]
    thresholds = np.linspace(0.5, 0.95, 10)
    assert min(abs(s - t) for s in found for t in thresholds) > 1e-3
    by_hand = [precision_by_hand(found, scores, t) for t in thresholds]
    assert got["AP"] == pytest.approx(np.mean(by_hand), abs=1e-9)
    assert (got["AP50"], got["AP75"]) == pytest.approx((by_hand[0], by_hand[5]), abs=1e-9)
    assert got["AR"] == pytest.approx(np.mean([[s >= t for s in found] for t in thresholds]))
    assert 0.2 < got["AP"] < 0.9


def test_it_is_pycocotools_on_the_files(opened, tmp_path):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    content, data = opened
    split = data.test
    content["annotations"][3]["num_keypoints"] = 0  # as in COCO, such a person is passed over
    content["annotations"].append(annotation(9, 103, person(103)[1] + 7.0) | {"num_keypoints": 0})
    write_annotations(tmp_path, "val", content)
    results = results_of(split, range(8), off=np.linspace(0, 9, 8), scores=np.linspace(0.9, 0.1, 8))
    results.append({**results[0], "score": 0.05})  # found twice
    (tmp_path / "results.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(split.annotations))
        measure = COCOeval(truth, truth.loadRes(str(tmp_path / "results.json")), "keypoints")
        measure.params.kpt_oks_sigmas = np.array([0.026, 0.079, 0.079, 0.107, 0.107, 0.062])
        measure.evaluate()
        measure.accumulate()
        measure.summarize()
    got = average_precision(split, range(8), results, data.keypoints.sigmas)
    names = [f"A{kind}{of}" for kind in "PR" for of in ("", "50", "75", " medium", " large")]
    want = dict(zip(names, measure.stats.tolist(), strict=True))
    assert got == {name: value for name, value in want.items() if value != -1}
    assert got.keys() == want.keys() - {"AP large", "AR large"}  # every person here is small or medium


def test_results_have_cocos_form(opened):
    content, data = opened
    index = torch.tensor([5, 2])
    joints = data.test.targets[index][..., :2]
    scores = torch.tensor([[0.5, 0.1, 0.2, 0.3, 0.4, 0.6], [1.0] * 6])
    first, second = coco_results(data.test, index, joints, scores)
    assert first.keys() == {"image_id", "category_id", "keypoints", "score"}
    assert (first["image_id"], second["image_id"], first["category_id"]) == (105, 102, 1)
    assert (first["score"], second["score"]) == pytest.approx((0.35, 1.0))
    triples = np.reshape(first["keypoints"], (6, 3))
    assert triples[:, :2] == pytest.approx(np.reshape(content["annotations"][5]["keypoints"], (6, 3))[:, :2], abs=1e-3)
    assert triples[:, 2] == pytest.approx(scores[0].numpy())


def test_persons_that_were_not_looked_for_are_no_part_of_the_truth(opened, tmp_path):
    content, data = opened
    content["annotations"].append(annotation(9, 101, person(101)[1] + 20.0))  # a second person in an image
    write_annotations(tmp_path, "val", content)
    split = open_data("coco-keypoints", tmp_path, image_size=64).test
    some = average_precision(split, [1, 4], results_of(split, [1, 4]), data.keypoints.sigmas)
    assert (some["AP"], some["AR"]) == pytest.approx((1.0, 1.0))
    missed = average_precision(split, [1, 4, 8], results_of(split, [1, 4]), data.keypoints.sigmas)
    assert missed["AR"] == pytest.approx(2 / 3)


def test_what_the_measure_lacks_is_named(opened, tmp_path, monkeypatch):
    content, data = opened
    results = results_of(data.test, range(8))
    del content["annotations"][2]["area"]
    write_annotations(tmp_path, "val", content)
    with pytest.raises(DataError, match=r"person_keypoints_val2017.json: the average precision needs.*'area'"):
        average_precision(data.test, range(8), results, data.keypoints.sigmas)
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(ImportError, match=r"fflfast\[pose\]"):
        average_precision(data.test, range(8), results, data.keypoints.sigmas)
