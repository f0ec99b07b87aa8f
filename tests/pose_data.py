"""Tiny data sets of persons: figures of dots, a colour each joint, in the layouts that are read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

JOINTS = ("head_top", "left_shoulder", "right_shoulder", "left_hip", "right_hip", "left_wrist")
POSE = np.array([[0, -5], [3, -2], [-3, -2], [2, 3], [-2, 3], [6, 0]], dtype=np.float64)  # upright, seen from behind
COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255], [255, 0, 255]])


def person(seed: int, height: int = 80, width: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Return an image (H, W, 3) of one figure, and its joints (J, 2)."""
    random = np.random.default_rng(seed)
    joints = (POSE * random.uniform(4, 5) + (width / 2, height / 2) + random.uniform(-3, 3, (1, 2))).round(1)
    image = random.integers(40, 60, (height, width, 3))
    rows, columns = np.mgrid[:height, :width]
    for (x, y), colour in zip(joints, COLOURS, strict=True):
        image[np.hypot(columns - x, rows - y) < 3] = colour
    return image.astype(np.uint8), joints


def write_lspet(folder: Path, count: int = 20) -> dict:
    """Write images and joints.json, all joints visible; return what the file holds."""
    (folder / "images").mkdir(parents=True)
    content: dict = {"joints": list(JOINTS), "images": {}}
    for k in range(count):
        image, joints = person(k)
        Image.fromarray(image).save(folder / "images" / f"im{k:03}.png")
        content["images"][f"im{k:03}.png"] = [[*joint, 1] for joint in joints.tolist()]
    write_joints(folder, content)
    return content


def write_joints(folder: Path, content: object) -> None:
    (folder / "joints.json").write_text(json.dumps(content))


COCO_JOINTS = ("nose", "left_shoulder", "right_shoulder", "left_hip", "right_hip", "left_wrist")


def write_coco(folder: Path, counts: tuple[int, int] = (6, 4)) -> dict[str, dict]:
    """Write two parts of images with one person each, and their annotations; return these by part."""
    (folder / "annotations").mkdir(parents=True)
    contents = {}
    for part, count, start in zip(("train", "val"), counts, (0, 100), strict=True):
        (folder / f"{part}2017").mkdir()
        category = {"id": 1, "name": "person", "keypoints": list(COCO_JOINTS), "skeleton": [[2, 4], [3, 5], [2, 6]]}
        content: dict = {"categories": [category], "images": [], "annotations": []}
        for k in range(start, start + count):
            image, joints = person(k)
            Image.fromarray(image).save(folder / f"{part}2017" / f"{k}.png")
            content["images"].append({"id": k, "file_name": f"{k}.png", "height": 80, "width": 100})
            content["annotations"].append(annotation(1000 + k, k, joints))
        contents[part] = content
        write_annotations(folder, part, content)
    return contents


def annotation(number: int, image: int, joints: np.ndarray, visible: int = 2) -> dict:
    """Return one person in COCO's form."""
    left, top = joints.min(axis=0) - 4
    width, height = joints.max(axis=0) + 4 - (left, top)
    return {
        "id": number,
        "image_id": image,
        "category_id": 1,
        "iscrowd": 0,
        "keypoints": [value for joint in joints.tolist() for value in (*joint, visible)],
        "num_keypoints": len(joints),
        "bbox": [left, top, width, height],
        "area": width * height * 0.6,
    }


def write_annotations(folder: Path, part: str, content: object) -> None:
    (folder / "annotations" / f"person_keypoints_{part}2017.json").write_text(json.dumps(content))
