"""PCK against a plain loop, the flip test against its definition, and what a training batch of persons is."""

from __future__ import annotations

import json
import math

import pytest
import torch
from steps import Reads

from fflfast.data import Batch, Keypoints
from fflfast.ops.augment import normalization_table
from fflfast.tasks import Score, task_of
from fflfast.tasks.pck import PCK, torso_lengths

KEYPOINTS = Keypoints(
    ("left_shoulder", "right_shoulder", "left_hip", "right_hip", "nose"),
    flip_pairs=((0, 1), (2, 3)),
    skeleton=((0, 2), (1, 3)),
    torso=((0, 3), (1, 2)),
)
SIZE = 32
TABLE = normalization_table((120.0,) * 3, (60.0,) * 3)


def sample(batch=30, seed=0):
    """Targets with unseen joints, and maps whose peaks lie about the joints."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(batch, 5, 3, generator=generator) * SIZE - 0.5
    target[..., 2] = (torch.rand(batch, 5, generator=generator) < 0.8).float()
    target[..., :2] *= target[..., 2:]
    maps = torch.rand(batch, 5, 8, 8, generator=generator) * 0.1
    cells = ((target[..., :2] + 0.5) / 4 + torch.randn(batch, 5, 2, generator=generator) / 2).long().clamp(0, 7)
    for b in range(batch):
        for j in range(5):
            maps[b, j, cells[b, j, 1], cells[b, j, 0]] = 1
    return maps, target


def plain(maps, target):
    """Right and counted joints, joint by joint, in Python's own numbers."""
    right, counted = [0] * 5, [0] * 5
    for heatmaps, joints in zip(maps.tolist(), target.tolist(), strict=True):
        torso = None
        for a, b in ((0, 3), (1, 2)):
            if torso is None and joints[a][2] and joints[b][2]:
                torso = math.dist(joints[a][:2], joints[b][:2])
        if not torso:
            continue
        for j, (x, y, visible) in enumerate(joints):
            if not visible:
                continue
            counted[j] += 1
            rows = heatmaps[j]
            row, column = max(((r, c) for r in range(8) for c in range(8)), key=lambda place: rows[place[0]][place[1]])
            shift = [0.0, 0.0]
            if 0 < row < 7 and 0 < column < 7:
                for axis, (after, before) in enumerate(
                    ((rows[row][column + 1], rows[row][column - 1]), (rows[row + 1][column], rows[row - 1][column]))
                ):
                    shift[axis] = 0.25 * ((after > before) - (after < before))
            found = [(place + moved + 0.5) * 4 - 0.5 for place, moved in zip((column, row), shift, strict=True)]
            right[j] += math.dist(found, (x, y)) <= 0.2 * torso
    return right, counted


def test_pck_is_what_a_plain_loop_counts():
    maps, target = sample(60)
    metric = PCK(KEYPOINTS, SIZE)
    for part in (slice(0, 25), slice(25, 26), slice(26, 60)):
        metric.update({"a": maps[part], "b": maps[part].flip(-1)}, target[part])
    for name, shown in (("a", maps), ("b", maps.flip(-1))):
        right, counted = plain(shown, target)
        assert metric.details()[name] == {
            joint: Score(*pair) for joint, *pair in zip(KEYPOINTS.names, right, counted, strict=True)
        }
        assert metric.read()[name] == Score(sum(right), sum(counted))
    assert 0.2 < metric.read()["a"].value < 0.9
    assert min(counted) < max(counted)


def test_unseen_joints_and_persons_without_a_torso_count_for_nothing():
    maps, target = sample(1)
    maps[:, :, 0, 0] = 2
    target[0] = torch.tensor([[1.5, 1.5, 0], [1.5, 1.5, 1], [20, 20, 0], [20, 20, 1], [1.5, 1.5, 1]])
    metric = PCK(KEYPOINTS, SIZE)
    metric.update({"a": maps}, target)
    assert metric.read() == {"a": Score(0, 0)}  # no pair of a shoulder and the other side's hip
    target[0, 2, 2] = 1
    metric.update({"a": maps}, target)
    assert metric.details()["a"] == {
        "left_shoulder": Score(0, 0),
        "right_shoulder": Score(1, 1),
        "left_hip": Score(0, 1),
        "right_hip": Score(0, 1),
        "nose": Score(1, 1),
    }
    assert metric.read()["a"].value == 0.5


def test_the_torso_is_the_first_visible_diagonal():
    target = torch.zeros(4, 5, 3)
    target[:, :, 2] = 1
    target[:, 3, 0], target[:, 2, 1] = 3.0, 4.0
    target[1, 0, 2] = target[2, 3, 2] = 0
    target[3, :2, 2] = 0
    assert torso_lengths(target, KEYPOINTS.torso).tolist() == [3, 4, 4, 0]


def test_a_map_with_a_nan_is_never_right():
    maps, target = sample(40)
    metric, broken = PCK(KEYPOINTS, SIZE), PCK(KEYPOINTS, SIZE)
    metric.update({"a": maps}, target)
    assert metric.details()["a"]["nose"].correct > 0
    maps[:, 4] = maps[:, 4].masked_fill(maps[:, 4] == 1, torch.nan)  # where it was found before
    broken.update({"a": maps}, target)
    assert broken.details()["a"]["nose"].correct == 0
    assert {**metric.details()["a"], "nose": 0} == {**broken.details()["a"], "nose": 0}


def test_a_bad_step_counts_nothing():
    maps, target = sample()
    metric = PCK(KEYPOINTS, SIZE, ("a",), "cpu")
    metric.update({"a": maps}, target, torch.tensor(True))
    assert metric.read() == {}
    metric.update({"a": maps}, target, torch.tensor(False))
    plainly = PCK(KEYPOINTS, SIZE)
    plainly.update({"a": maps}, target)
    assert metric.details() == plainly.details()


def test_state_survives_and_processes_add_up():
    maps, target = sample()
    whole = PCK(KEYPOINTS, SIZE)
    whole.update({"a": maps, "b": maps.flip(-1)}, target)
    parts = [PCK(KEYPOINTS, SIZE, ("a", "b"), "cpu") for _ in range(3)]
    for part, rows in zip(parts, (slice(0, 7), slice(7, 30)), strict=False):
        part.update({"a": maps[rows], "b": maps.flip(-1)[rows]}, target[rows])
    states = json.loads(json.dumps([part.state() for part in parts]))
    for k in range(3):
        again = PCK(KEYPOINTS, SIZE, ("a", "b"), "cpu")
        again.load(PCK.share(states, k, 3))
        assert again.details() == parts[k].details()
    first, second = PCK(KEYPOINTS, SIZE), PCK(KEYPOINTS, SIZE, ("a", "b"), "cpu")
    first.load(PCK.share([*states, PCK(KEYPOINTS, SIZE).state()], 0, 2))
    second.load(PCK.share(states, 1, 2))
    assert first.details() == whole.details()
    assert second.read() == {}

    class Two:
        """Another process that counted the same."""

        def sum_(self, tensors):
            for tensor in tensors:
                tensor.mul_(2)

    doubled = whole.read(Two())["a"]
    assert doubled == Score(*(2 * n for n in whole.read()["a"]))
    assert whole.read()["a"] != doubled
    whole.reset()
    assert whole.read() == {}


def test_an_empty_batch_counts_nothing_and_makes_nothing():
    maps, target = sample()
    metric = PCK(KEYPOINTS, SIZE)
    metric.update({"a": maps[:0]}, target[:0])
    assert metric.read() == {}
    made = training(pose(rotation=30.0, flip=True), Batch(*(part[:0] for part in uint8_batch())))
    assert [tuple(part.shape) for part in made] == [(0, 3, SIZE, SIZE), (0, 5, 3), (0,)]


# ---- the task -------------------------------------------------------------------------------------------------


def pose(**options):
    return task_of("pose", 5, keypoints=KEYPOINTS, image_size=SIZE, **options)


def uint8_batch(count=10, size=48):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    target = torch.rand(count, 5, 3, generator=generator) * size
    target[..., 2] = 1
    return Batch(images, target, torch.arange(count) * 7)


def training(task, batch, channels_last=False, epoch=3):
    zero = torch.zeros((), dtype=torch.int64)
    return task.training_batch(batch, TABLE, epoch=zero + epoch, step=zero, views=1, channels_last=channels_last)


def test_a_training_batch_is_a_function_of_epoch_and_index():
    task, batch = pose(seed=4, rotation=30.0, scale=0.25, flip=True), uint8_batch()
    task.prepare("cpu")
    whole = training(task, batch)
    assert whole.images.shape == (10, 3, SIZE, SIZE)
    assert whole.target.shape == (10, 5, 3)
    assert ((whole.target[..., :2] >= -0.5) & (whole.target[..., :2] < SIZE - 0.5)).all()
    some = training(task, Batch(*(part[3:6] for part in batch)), channels_last=True)
    assert some.images.is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(some, whole, strict=True):
        assert torch.equal(a, b[3:6])
    assert not torch.equal(training(task, batch, epoch=4).images, whole.images)
    assert not torch.equal(training(pose(seed=5, rotation=30.0), batch).images, whole.images)


def test_without_augmentation_it_is_the_middle():
    batch = uint8_batch()
    plainly = training(pose(), batch)
    assert torch.equal(plainly.images, TABLE[batch.images[..., 8:40, 8:40].long(), torch.arange(3).view(3, 1, 1)])


def test_no_step_waits_for_the_device():
    task, batch = pose(rotation=30.0, scale=0.25, flip=True), uint8_batch()
    task.prepare("cpu")
    metric = task.metric(("a",), "cpu")
    maps, _ = sample(10)
    with Reads() as reads:
        made = training(task, batch)
        metric.update({"a": maps}, made.target, torch.tensor(False))
    assert reads.count == 0


def test_two_views_are_refused():
    batch = uint8_batch()
    zero = torch.zeros((), dtype=torch.int64)
    for images in (batch.images, (batch.images, batch.images)):
        with pytest.raises(ValueError, match="one view of each image, got 2"):
            pose().training_batch(
                batch._replace(images=images), TABLE, epoch=zero, step=zero, views=2, channels_last=False
            )


def coloured(images):
    """Maps that depend on the image from left to right and differ by joint, as a network's would."""
    shrunk = torch.nn.functional.avg_pool2d(images, 4)
    weights = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [1.0, 1.0, 0], [0, 1.0, 1.0]])
    slope = torch.linspace(0, 1, shrunk.shape[-1])
    return {
        "sub0": torch.einsum("jc,bchw->bjhw", weights, shrunk) * slope,
        "sub1": shrunk.mean(1, True).repeat(1, 5, 1, 1),
    }


def test_the_flip_test_averages_with_the_mirror_image():
    images = uint8_batch(4, SIZE).images
    seen = TABLE[images.long(), torch.arange(3).view(3, 1, 1)].contiguous()
    got = pose().outputs(coloured, images, TABLE)
    once = pose(flip_test=False).outputs(coloured, images, TABLE)
    for name, maps in coloured(seen).items():
        assert torch.equal(once[name], maps)
        mirrored = coloured(seen.flip(-1))[name]
        for j, partner in enumerate((1, 0, 3, 2, 4)):
            want = (maps[:, j] + mirrored[:, partner].flip(-1)) / 2
            assert torch.allclose(got[name][:, j], want, atol=1e-6)
    assert not torch.allclose(got["sub0"], once["sub0"], atol=0.1)


def test_the_flip_test_of_a_network_that_knows_mirrors_changes_nothing():
    """A network whose answer to a mirror image is the mirrored answer, joints swapped, is left as it is."""

    slope = torch.linspace(0, 1, SIZE)

    def network(images):
        left, right = images[:, 0] * slope, images[:, 0] * slope.flip(-1)
        return {"a": torch.stack([left, right, 2 * left, 2 * right, left + right], dim=1)}

    images = uint8_batch(4, SIZE).images
    got, once = (pose(flip_test=on).outputs(network, images, TABLE)["a"] for on in (True, False))
    assert torch.allclose(got, once, atol=1e-6)


def test_arguments_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="keypoints"):
        task_of("pose", 5)
    with pytest.raises(ValueError, match="side of the images"):
        task_of("pose", 5, keypoints=KEYPOINTS)
    with pytest.raises(ValueError, match="rotation"):
        pose(rotation=-1.0)
    with pytest.raises(ValueError, match="classification or pose"):
        task_of("detection", 5)
