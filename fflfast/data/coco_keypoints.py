"""COCO person keypoints, or persons of your own in that form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .batch import DataBundle, DataError, Keypoints
from .pose import Persons, PersonSplit, keypoints_of, pose_bundle, read_json, square, within

__all__ = ["CocoSplit", "coco_keypoints"]

_SIGMAS = {  # of the official evaluation, by kind of joint
    "nose": 0.026, "eye": 0.025, "ear": 0.035, "shoulder": 0.079, "elbow": 0.072, "wrist": 0.062, "hip": 0.107,
    "knee": 0.087, "ankle": 0.089,
}  # fmt: skip


class CocoSplit(PersonSplit):
    """Persons of an annotation file in COCO's form; other arguments: `PersonSplit`.

    Args:
        annotations: the file.
        category: the persons' category id there.
        ids: of each person's annotation, n.
        image_ids: of each person's image, n.
    """

    def __init__(
        self,
        name: str,
        persons: Persons,
        image_size: int,
        context: int,
        *,
        annotations: Path,
        category: int,
        ids: list[int],
        image_ids: list[int],
    ) -> None:
        super().__init__(name, persons, image_size, context)
        self.annotations, self.category, self.ids, self.image_ids = annotations, category, ids, image_ids


def coco_keypoints(data_dir: Path | None, *, download: bool = False, image_size: int | None = None) -> DataBundle:
    """Open COCO's person keypoints (Lin et al., arXiv 1405.0312): train2017 to train, val2017 to test.

    Reads ``annotations/person_keypoints_{train,val}2017.json`` in data_dir; images lie in ``{train,val}2017/`` there or
    in ``images/``. Each annotated person is an image of its own: a square around its box, a quarter larger than the
    box is long. Persons without a labelled joint and crowds are left out, as usual; joints labelled but hidden count as
    visible. A test is told where the persons are, so an average precision that follows is one with true boxes.

    Args:
        data_dir: the folder, or the one that holds it as ``coco``.
        download: refused.
        image_size: S, None for 256; training images are 3/2 as large.

    Raises:
        ValueError: no data_dir, or a request to download.
        DataError: a file that is missing or malformed, named.
    """
    if download:
        raise ValueError("coco-keypoints is not fetched by fflfast; get it from cocodataset.org, leave out --download")
    if data_dir is None:
        raise ValueError("coco-keypoints needs a folder of annotations/ and images; give --data-dir (data_dir)")
    folder = data_dir if (data_dir / "annotations").is_dir() else data_dir / "coco"
    size = 256 if image_size is None else image_size
    keypoints, train = _open(folder, "train", size, size // 4)
    tested, test = _open(folder, "val", size, 0)
    if keypoints != tested:
        raise DataError(
            f"{test.annotations}: its joints ({', '.join(tested.names)}) are not those of {train.annotations.name} "
            f"({', '.join(keypoints.names)}); these do not belong together"
        )
    return pose_bundle("coco-keypoints", keypoints, train, test)


class _Picture(NamedTuple):
    file: str
    height: int
    width: int


def _open(folder: Path, part: str, size: int, context: int) -> tuple[Keypoints, CocoSplit]:
    file = folder / "annotations" / f"person_keypoints_{part}2017.json"
    if not file.is_file():
        raise DataError(f"coco-keypoints: no file {file}; give the folder that holds annotations/ as --data-dir")
    content = read_json(file)
    categories, images, annotations = (_list(file, content, key) for key in ("categories", "images", "annotations"))
    category = next((item for item in categories if "keypoints" in item and "id" in item), None)
    if category is None:
        raise DataError(f"{file}: no category with an id has keypoints; take the person_keypoints annotations")
    keypoints = _keypoints(file, category)
    try:
        known = {
            item["id"]: _Picture(str(item["file_name"]), int(item["height"]), int(item["width"])) for item in images
        }
        if any(min(picture.height, picture.width) < 1 for picture in known.values()):
            raise ValueError("a height or width below 1")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{file}: an image lacks its id, file_name, height or width ({error!r})") from error
    pictures = folder / f"{part}2017"
    if not pictures.is_dir():
        pictures = folder / "images" / f"{part}2017"
    files, sizes, joints, boxes, ids, image_ids = [], [], [], [], [], []
    for item in annotations:
        if item.get("category_id") != category["id"] or item.get("iscrowd"):
            continue
        picture, places, box = _person(file, item, known, len(keypoints.names))
        if places[:, 2].any():
            files.append(str(pictures / picture.file))
            sizes.append((picture.height, picture.width))
            joints.append(places)
            boxes.append(box)
            ids.append(item["id"])
            image_ids.append(item["image_id"])
    if not files:
        raise DataError(f"{file}: no person has a labelled joint")
    if len(set(ids)) < len(ids):
        twice = next(id for k, id in enumerate(ids) if id in ids[:k])
        raise DataError(f"{file}: the annotation id {twice} stands twice; expected one of its own for each person")
    persons = Persons(files, np.array(sizes), np.array(joints), np.array(boxes, dtype=np.int64))
    name = f"coco-keypoints {'test' if part == 'val' else part}"
    return keypoints, CocoSplit(
        name, persons, size, context, annotations=file, category=category["id"], ids=ids, image_ids=image_ids
    )


def _list(file: Path, content: Any, key: str) -> list[dict[str, Any]]:
    items = content.get(key) if isinstance(content, dict) else None
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise DataError(f"{file}: expected a list of {key} in COCO's form")
    return items


def _keypoints(file: Path, category: Mapping[str, Any]) -> Keypoints:
    names = category["keypoints"]
    try:
        skeleton = [(names[a - 1], names[b - 1]) for a, b in category.get("skeleton", ())]  # counted from 1
        sigmas = [_SIGMAS.get(name.rpartition("_")[2]) for name in names]
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise DataError(
            f"{file}: category {category['id']!r}: expected names of joints and a skeleton of their pairs ({error!r})"
        ) from error
    known = [sigma for sigma in sigmas if sigma is not None]
    return keypoints_of(str(file), names, skeleton, known if len(known) == len(names) else None)


def _person(
    file: Path, item: Mapping[str, Any], known: Mapping[Any, _Picture], num_joints: int
) -> tuple[_Picture, np.ndarray, tuple[int, int, int]]:
    """Return image, joints (J, 3) and square of an annotation."""
    try:
        picture = known[item["image_id"]]
        places = np.array(item["keypoints"], dtype=np.float64).reshape(num_joints, 3)
        x, y, width, height = np.array(item["bbox"], dtype=np.float64).tolist()
        if not isinstance(item["id"], int):
            raise ValueError("an id that is no whole number")
        if not np.isfinite([x, y, width, height]).all() or min(width, height) < 0:
            raise ValueError("a bbox that is not finite or has a negative size")
        if not np.isfinite(places[places[:, 2] > 0]).all():
            raise ValueError("a labelled joint that is not finite")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"{file}: annotation {item.get('id')!r}: expected id, image_id of a listed image, {num_joints} "
            f"keypoints x, y, v and bbox x, y, width, height ({error!r})"
        ) from error
    places[:, 2] = (places[:, 2] > 0) & within(places, picture.height, picture.width)
    right, bottom = min(max(x + width, 0), picture.width), min(max(y + height, 0), picture.height)
    left, top = min(max(x, 0), right), min(max(y, 0), bottom)
    return picture, places, square(left, top, right, bottom)
