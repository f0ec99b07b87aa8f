"""Leeds Sports Pose (Extended), or persons of your own, from images and one file of joints."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from .batch import DataBundle, DataError, Keypoints
from .decode import stated_size
from .pose import Persons, PersonSplit, keypoints_of, pose_bundle, read_json, square, within

__all__ = ["lspet"]

_log = logging.getLogger("fflfast.data")

_SKELETON = (
    ("head_top", "neck"),
    *((f"{side}_{a}", f"{side}_{b}") for side in ("left", "right") for a, b in (
        ("shoulder", "elbow"), ("elbow", "wrist"), ("shoulder", "hip"), ("hip", "knee"), ("knee", "ankle"),
    )),
    ("neck", "left_shoulder"), ("neck", "right_shoulder"), ("left_hip", "right_hip"),
)  # fmt: skip


def lspet(data_dir: Path | None, *, download: bool = False, image_size: int | None = None) -> DataBundle:
    """Open ``data_dir/images/…`` and ``data_dir/joints.json``: one person in an image.

    The file holds ``{"joints": [name, …], "images": {file: [[x, y, visible], …], …}}`` in pixels. Images of Leeds
    Sports Pose Extended can be laid out so (S. Johnson, M. Everingham: Learning Effective Human Pose Estimation from
    Inaccurate Annotation, CVPR 2011): people doing sports, about 150 pixels long.

    The last fifth of the file names, in their order, are the test images (of 2,000 the last 400). A joint that lies
    outside its image counts as unseen. A person is cut out as a square around the joints that are seen, a quarter
    larger than they reach: a test is told where the person is, as in MPII's protocol. A person of whom fewer than two
    joints are seen is left out, and counted in a warning.

    Args:
        data_dir: the folder, or the one that holds it.
        download: refused.
        image_size: S, None for 128; training images are 3/2 as large.

    Raises:
        ValueError: no data_dir, or a request to download.
        DataError: a file that is missing or malformed, named.
    """
    if download:
        raise ValueError("lspet is not fetched by fflfast; get it from its authors and leave out --download")
    if data_dir is None:
        raise ValueError("lspet needs a folder of joints.json and images/; give --data-dir (data_dir)")
    folder = next((path for path in (data_dir, data_dir / "lspet") if (path / "joints.json").is_file()), None)
    if folder is None:
        raise DataError(f"lspet: no joints.json in {data_dir}; give the folder that holds it and images/ as --data-dir")
    file = folder / "joints.json"
    keypoints, entries = _entries(file)
    names = sorted(entries)
    num_test = len(names) // 5
    if num_test == 0:
        raise DataError(f"{file}: expected at least 5 images, of which a fifth are for tests, got {len(names)}")
    size = 128 if image_size is None else image_size
    splits = []
    for part, chosen, context in (("train", names[:-num_test], size // 4), ("test", names[-num_test:], 0)):
        persons = _persons(file, {name: entries[name] for name in chosen}, len(keypoints.names))
        if not persons.files:
            raise DataError(f"{file}: no person of the {part} images has two joints that are seen")
        if len(persons.files) < len(chosen):
            _log.warning(
                "lspet %s: left out %d of %d persons, of whom fewer than two joints are seen",
                part, len(chosen) - len(persons.files), len(chosen),
            )  # fmt: skip
        splits.append(PersonSplit(f"lspet {part}", persons, size, context))
    return pose_bundle("lspet", keypoints, *splits)


def _entries(file: Path) -> tuple[Keypoints, dict[str, Any]]:
    content = read_json(file)
    joints = content.get("joints") if isinstance(content, dict) else None
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(joints, list) or not isinstance(images, dict):
        raise DataError(f'{file}: expected {{"joints": [names], "images": {{file: [[x, y, visible], …]}}}}')
    return keypoints_of(str(file), joints, _SKELETON), images


def _persons(file: Path, entries: dict[str, Any], num_joints: int) -> Persons:
    files, sizes, joints, boxes = [], [], [], []
    for name, entry in entries.items():
        try:
            places = np.array(entry, dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            places = np.empty(0)
        plain = places.shape == (num_joints, 3) and all(type(v) in (int, float) for joint in entry for v in joint)
        seen_or_not = plain and np.isin(places[:, 2], (0, 1)).all()
        if not seen_or_not or not np.isfinite(places[places[:, 2] > 0]).all():
            raise DataError(
                f"{file}: expected {num_joints} joints [x, y, visible] of finite numbers for {name!r}, visible 0 or 1, "
                f"got {str(entry)[:60]}"
            )
        path = file.parent / "images" / name
        try:
            height, width = stated_size(path)
        except ValueError as error:
            raise DataError(f"lspet: {error}; restore the file, or take its line out of {file}") from error
        places[:, 2] *= within(places, height, width)
        seen = places[places[:, 2] > 0]
        if len(seen) >= 2:
            files.append(str(path))
            sizes.append((height, width))
            joints.append(places)
            boxes.append(square(*seen[:, :2].min(axis=0), *seen[:, :2].max(axis=0)))
    return Persons(files, np.array(sizes), np.array(joints), np.array(boxes, dtype=np.int64))
