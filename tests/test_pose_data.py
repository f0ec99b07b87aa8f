"""Data sets of persons: what is cut out, where joints lie then, and which file an error names."""

from __future__ import annotations

import copy
import logging
import math

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
from PIL import Image
from pose_data import (
    COCO_JOINTS,
    COLOURS,
    JOINTS,
    annotation,
    person,
    write_annotations,
    write_coco,
    write_joints,
    write_lspet,
)

from fflfast.data import DataError, Loader, ResidentLoader, open_data, resident_bytes


def everything(split):
    batch = next(Loader(split, batch_size=1000, seed=0, train=False).epoch(0))
    assert torch.equal(batch.target, split.targets)
    return batch.images, batch.target


def colour_at(image, joint):
    return image[:, round(float(joint[1])), round(float(joint[0]))].int()


@pytest.fixture
def lspet_dir(tmp_path):
    return tmp_path / "data", write_lspet(tmp_path / "data")


@pytest.fixture
def coco_dir(tmp_path):
    return tmp_path / "data", write_coco(tmp_path / "data")


# ---- lspet ----------------------------------------------------------------------------------------------------


def test_lspet_describes_itself(lspet_dir):
    data = open_data("lspet", lspet_dir[0], image_size=48)
    assert (data.task, data.num_classes, data.class_names) == ("pose", 6, JOINTS)
    assert (data.image_size, data.train.shape, data.test.shape) == (48, (3, 72, 72), (3, 48, 48))
    assert data.keypoints.flip_pairs == ((1, 2), (3, 4))
    assert data.keypoints.torso == ((1, 4), (2, 3))
    assert set(data.keypoints.skeleton) == {(1, 3), (2, 4), (3, 4)}
    assert data.keypoints.sigmas is None
    assert open_data("lspet", lspet_dir[0].parent / "data").image_size == 128


def test_the_last_fifth_of_the_names_tests(lspet_dir):
    folder, content = lspet_dir
    content["images"] = dict(sorted(content["images"].items(), reverse=True))
    write_joints(folder, content)
    data = open_data("lspet", folder)
    assert [path.rpartition("/")[2] for path in data.test.persons.files] == [f"im{k:03}.png" for k in range(16, 20)]
    assert [path.rpartition("/")[2] for path in data.train.persons.files] == [f"im{k:03}.png" for k in range(16)]


@pytest.mark.parametrize("part", ["train", "test"])
def test_joints_lie_on_their_dots(lspet_dir, part):
    split = getattr(open_data("lspet", lspet_dir[0], image_size=96), part)
    images, targets = everything(split)
    assert (targets[..., 2] == 1).all()
    for image, joints in zip(images, targets, strict=True):
        for joint, colour in zip(joints, COLOURS, strict=True):
            assert (colour_at(image, joint) - torch.from_numpy(colour)).abs().max() < 60


def test_a_cut_out_is_centred_and_a_quarter_larger_than_the_joints(lspet_dir):
    data = open_data("lspet", lspet_dir[0], image_size=96)
    for split, share in ((data.train, 2 / 3), (data.test, 1)):
        places = split.targets[..., :2]
        low, high = places.amin(dim=1), places.amax(dim=1)
        assert ((high - low).amax(dim=1) / split.shape[-1] * 1.25 / share - 1).abs().max() < 0.05
        assert ((high + low) / 2 - (split.shape[-1] - 1) / 2).abs().max() < 3


def test_points_go_back_to_the_file(lspet_dir):
    folder, content = lspet_dir
    data = open_data("lspet", folder, image_size=40)
    for split, first in ((data.train, 0), (data.test, 16)):
        index = torch.tensor([2, 0])
        got = split.in_file(index, split.targets[index, :, :2])
        want = np.array([content["images"][f"im{first + k:03}.png"] for k in (2, 0)])[..., :2]
        assert np.abs(got.numpy() - want).max() < 1e-4


def test_where_the_image_ends_is_black(tmp_path):
    folder = tmp_path / "data"
    content = write_lspet(folder, 5)
    Image.new("RGB", (60, 20), (200, 200, 200)).save(folder / "images" / "im004.png")
    content["images"]["im004.png"] = [[0, 10, 1], [59, 10, 1]] + [[30, 10, 1]] * 4
    write_joints(folder, content)
    image = everything(open_data("lspet", folder, image_size=74).test)[0][0]
    assert not image[:, :25].any()
    assert not image[:, :, :5].any()
    assert (image[:, 30:44, 10:64] == 200).all()


@pytest.mark.parametrize(
    "joints", [(0, 12, 20, 32), (38, 28, 58, 48), (28, 0, 48, 20), (12, 38, 32, 58), (20, 20, 40, 40)]
)
def test_a_cut_out_beyond_any_one_side(tmp_path, joints):
    """A square of 25 pixels, unresized, that leaves the image on the left, right, top, bottom or nowhere."""
    write_lspet(tmp_path, 5)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "images" / "im004.png")
    left, top, right, bottom = joints
    content = {"joints": list(JOINTS), "images": {f"im00{k}.png": [[50, 40, 1], [60, 50, 1]] * 3 for k in range(4)}}
    content["images"]["im004.png"] = [[left, top, 1], [right, bottom, 1]] * 3
    write_joints(tmp_path, content)
    image, target = (part[0] for part in everything(open_data("lspet", tmp_path, image_size=25).test))
    padded = np.pad(pixels, ((40, 40), (40, 40), (0, 0)))
    want = padded[40 + top - 2 : 40 + top + 23, 40 + left - 2 : 40 + left + 23]
    assert torch.equal(image, torch.from_numpy(want).permute(2, 0, 1))
    assert torch.equal(target[0], torch.tensor([2.0, 2.0, 1.0]))


def test_joints_outside_or_unseen_are_zero(lspet_dir):
    folder, content = lspet_dir
    joints = content["images"]["im019.png"]
    joints[0] = [-30.0, 5.0, 1]  # left of the image
    joints[1] = [99.6, 5.0, 1]  # right of it: the last pixel's centre is at 99
    joints[2] = [math.nan, 7.0, 0]
    joints[3] = [1e9, -1e9, 0]
    write_joints(folder, content)
    target = open_data("lspet", folder, image_size=64).test.targets[3]
    assert not target[:4].any()
    assert target[4:, 2].tolist() == [1, 1]
    assert ((target[4:, :2] > 0) & (target[4:, :2] < 63)).all()


def test_persons_of_one_joint_are_left_out_and_counted(lspet_dir, caplog):
    folder, content = lspet_dir
    content["images"]["im003.png"] = [[50.0, 40.0, int(j == 0)] for j in range(6)]
    write_joints(folder, content)
    with caplog.at_level(logging.WARNING, "fflfast.data"):
        data = open_data("lspet", folder)
    assert len(data.train) == 15
    assert "lspet train: left out 1 of 16 persons" in caplog.text


def test_a_person_who_all_but_vanishes_has_a_cut_out(lspet_dir):
    folder, content = lspet_dir
    content["images"]["im003.png"] = [[50.0, 40.0, 1]] * 6
    write_joints(folder, content)
    data = open_data("lspet", folder, image_size=32)
    assert data.train.persons.boxes[3].tolist() == [42, 32, 16]
    assert (data.train.targets[3, :, :2] - 23.5).abs().max() < 2


def test_a_set_that_lies_on_the_device_is_that_of_the_loader(lspet_dir):
    split = open_data("lspet", lspet_dir[0], image_size=32).train
    assert resident_bytes(split) == 16 * (3 * 48 * 48 + 6 * 3 * 4 + 8)
    options = {"batch_size": 5, "seed": 3, "train": True}
    pairs = zip(
        ResidentLoader(split, device="cpu", **options).epoch(1),
        Loader(split, workers=2, **options).epoch(1),
        strict=True,
    )
    for a, b in pairs:
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert a.target.dtype == torch.float32
        assert a.target.shape[1:] == (6, 3)


# ---- files that are damaged -----------------------------------------------------------------------------------


def test_an_unreadable_image_is_named(lspet_dir):
    folder, _ = lspet_dir
    file = folder / "images" / "im018.png"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    split = open_data("lspet", folder).test
    for read in (everything, lambda s: ResidentLoader(s, device="cpu", batch_size=4, seed=0, train=False)):
        with pytest.raises(DataError, match=r"im018.png.*cannot be read"):
            read(split)


@pytest.mark.parametrize("content", [None, b"", b"no image"], ids=["missing", "empty", "text"])
def test_a_file_that_is_no_image_is_named_at_once(lspet_dir, content):
    file = lspet_dir[0] / "images" / "im002.png"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=r"im002.png.*joints.json"):
        open_data("lspet", lspet_dir[0])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c.pop("joints"), 'expected {"joints"'),
        (lambda c: c.update(images=[]), 'expected {"joints"'),
        (lambda c: c.update(joints=["a"] * 6), "a name of its own"),
        (lambda c: c.update(joints=["head_top", *"abcde"]), "no joint left_shoulder, right_hip, right_shoulder"),
        (lambda c: c["images"]["im001.png"].pop(), "expected 6 joints .* for 'im001.png'"),
        (lambda c: c["images"].update({"im001.png": None}), "expected 6 joints .* for 'im001.png'"),
        (lambda c: c["images"]["im001.png"][2].__setitem__(2, 0.5), "visible 0 or 1"),
        (lambda c: c["images"]["im001.png"][2].__setitem__(0, "x"), "expected 6 joints .* for 'im001.png'"),
        (lambda c: c["images"]["im001.png"][2].__setitem__(0, "5"), "expected 6 joints .* for 'im001.png'"),
        (lambda c: c["images"]["im001.png"][2].__setitem__(2, True), "expected 6 joints .* for 'im001.png'"),
        (lambda c: c["images"]["im001.png"][2].__setitem__(0, 10**400), "expected 6 joints .* for 'im001.png'"),
        (lambda c: c["images"]["im001.png"].__setitem__(2, [float("nan"), 1.0, 1]), "finite numbers for 'im001.png'"),
        (lambda c: c.update(joints=[["a"]] * 6), "a name of its own"),
        (lambda c: c.update(images=dict(list(c["images"].items())[:4])), "at least 5 images"),
        (lambda c: [row.__setitem__(2, 0) for rows in c["images"].values() for row in rows], "two joints"),
    ],
)
def test_malformed_joints_are_named(lspet_dir, change, match):
    folder, content = lspet_dir
    change(content)
    write_joints(folder, content)
    with pytest.raises(DataError, match=match) as error:
        open_data("lspet", folder)
    assert "joints.json" in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\xff"])
def test_a_file_that_is_no_json_is_named(lspet_dir, text):
    (lspet_dir[0] / "joints.json").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=r"joints.json"):
        open_data("lspet", lspet_dir[0])


@pytest.mark.parametrize("name", ["lspet", "coco-keypoints"])
def test_folders_and_downloads(tmp_path, name):
    with pytest.raises(ValueError, match="--data-dir"):
        open_data(name)
    with pytest.raises(ValueError, match="--download"):
        open_data(name, tmp_path, download=True)
    with pytest.raises(DataError, match=str(tmp_path)):
        open_data(name, tmp_path)


# ---- coco -----------------------------------------------------------------------------------------------------


def test_coco_describes_itself(coco_dir):
    data = open_data("coco-keypoints", coco_dir[0], image_size=48)
    assert (data.task, data.class_names, data.image_size) == ("pose", COCO_JOINTS, 48)
    assert (len(data.train), len(data.test)) == (6, 4)
    assert data.train.shape == (3, 72, 72)
    assert data.keypoints.skeleton == ((1, 3), (2, 4), (1, 5))
    assert data.keypoints.sigmas == (0.026, 0.079, 0.079, 0.107, 0.107, 0.062)
    assert open_data("coco-keypoints", coco_dir[0]).image_size == 256


def test_cocos_sigmas_are_pycocotools(coco_dir):
    params = pytest.importorskip("pycocotools.cocoeval").Params(iouType="keypoints")
    sides = [f"{side}_{part}" for part in ("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")
             for side in ("left", "right")]  # fmt: skip
    folder, contents = coco_dir
    for part, content in contents.items():
        content["categories"][0]["keypoints"] = ["nose", *sides]
        for item in content["annotations"]:
            item["keypoints"] = (item["keypoints"] * 3)[:51]
        write_annotations(folder, part, content)
    assert open_data("coco-keypoints", folder).keypoints.sigmas == pytest.approx(params.kpt_oks_sigmas)


@pytest.mark.parametrize("place", ["", "images"])
def test_coco_joints_lie_on_their_dots_and_go_back(coco_dir, place):
    folder, contents = coco_dir
    if place:
        (folder / place).mkdir()
        for part in ("train", "val"):
            (folder / f"{part}2017").rename(folder / place / f"{part}2017")
    data = open_data("coco-keypoints", folder, image_size=96)
    for split, content in ((data.train, contents["train"]), (data.test, contents["val"])):
        images, targets = everything(split)
        for image, joints in zip(images, targets, strict=True):
            for joint, colour in zip(joints, COLOURS, strict=True):
                assert (colour_at(image, joint) - torch.from_numpy(colour)).abs().max() < 60
        back = split.in_file(torch.arange(len(split)), targets[..., :2]).numpy()
        want = [np.reshape(item["keypoints"], (-1, 3))[:, :2] for item in content["annotations"]]
        assert np.abs(back - want).max() < 1e-4
        assert split.ids == [item["id"] for item in content["annotations"]]
        assert split.image_ids == [item["image_id"] for item in content["annotations"]]


def test_the_square_follows_the_box(coco_dir):
    folder, contents = coco_dir
    contents["val"]["annotations"][0]["bbox"] = [10.0, 20.0, 40.0, 30.0]
    contents["val"]["annotations"][1]["bbox"] = [-500.0, 60.0, 1e6, 1e6]  # the part on the image counts: 100 × 20
    write_annotations(folder, "val", contents["val"])
    boxes = open_data("coco-keypoints", folder).test.persons.boxes.tolist()
    assert boxes[0] == [5, 10, 50]
    assert boxes[1] == [-12, 8, 125]


def test_crowds_other_categories_and_persons_without_joints_are_left_out(coco_dir):
    folder, contents = coco_dir
    _, joints = person(100)
    for change in ({"iscrowd": 1}, {"category_id": 2}, {"keypoints": [0] * 18, "num_keypoints": 0}):
        contents["val"]["annotations"].append(annotation(7, 100, joints) | change)
    contents["val"]["annotations"].append(annotation(8, 100, joints, visible=1))  # hidden, but labelled
    write_annotations(folder, "val", contents["val"])
    test = open_data("coco-keypoints", folder).test
    assert len(test) == 5
    assert test.ids[-1] == 8
    assert (test.targets[-1, :, 2] == 1).all()


def _nothing_labelled(content):
    for item in content["annotations"]:
        item["keypoints"] = [0] * 18


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c.pop("images"), "a list of images"),
        (lambda c: c.update(annotations=[3]), "a list of annotations"),
        (lambda c: c["categories"][0].pop("keypoints"), "no category"),
        (lambda c: c["categories"][0].update(skeleton=[[1, 99]]), "category 1: expected .* a skeleton .*IndexError"),
        (lambda c: c["images"][0].pop("height"), "an image lacks"),
        (lambda c: c["annotations"][1].update(image_id=5), "annotation 1101"),
        (lambda c: c["annotations"][1].pop("id"), "annotation None"),
        (lambda c: c["annotations"][1].update(keypoints=[1, 2]), "annotation 1101"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, math.inf, 3]), "annotation 1101"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2]), "annotation 1101"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, -3, 4]), "annotation 1101"),
        (lambda c: c["annotations"][1].update(id=[7]), "annotation .*whole number"),
        (lambda c: c["annotations"][1].update(id=c["annotations"][0]["id"]), "stands twice"),
        (lambda c: c["annotations"][1]["keypoints"].__setitem__(slice(0, 3), [math.nan, 1, 2]), "not finite"),
        (lambda c: c["images"][0].update(height=0), "an image lacks"),
        (_nothing_labelled, "no person has a labelled joint"),
    ],
)
def test_malformed_annotations_are_named(coco_dir, change, match):
    folder, contents = coco_dir
    content = copy.deepcopy(contents["val"])
    change(content)
    write_annotations(folder, "val", content)
    with pytest.raises(DataError, match=match) as error:
        open_data("coco-keypoints", folder)
    assert "person_keypoints_val2017.json" in str(error.value)


def test_parts_that_do_not_belong_together(coco_dir):
    folder, contents = coco_dir
    contents["val"]["categories"][0]["keypoints"][0] = "left_ear"
    write_annotations(folder, "val", contents["val"])
    with pytest.raises(DataError, match="do not belong together"):
        open_data("coco-keypoints", folder)


def test_an_image_of_another_size_than_stated_is_named(coco_dir):
    folder, contents = coco_dir
    contents["val"]["images"][2]["width"] = 120
    write_annotations(folder, "val", contents["val"])
    with pytest.raises(DataError, match=r"102.png' is 100×80 pixels where its annotations say 120×80"):
        everything(open_data("coco-keypoints", folder).test)
