"""Folders of images: every format a folder may hold, against Pillow and torchvision; damage; odd layouts."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
from PIL import Image
from torchvision.transforms.v2 import functional as F

from fflfast.data import DataError, Loader, open_data, random_resized_crop_boxes
from fflfast.data import decode as decode_module
from fflfast.data import folder as folder_module
from fflfast.data.decode import decode_rgb


def picture(height=48, width=64, seed=0) -> Image.Image:
    rough = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    """Two classes; 4 + 3 images to train, 2 + 1 to test, of unlike sizes."""
    for part, counts in (("train", (4, 3)), ("val", (2, 1))):
        for name, count in zip(("cat", "dog"), counts, strict=True):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                image = picture(40 + 9 * number, 70 - 11 * number, seed=number)
                image.save(tmp_path / part / name / f"{number}.jpg", quality=95)
    return tmp_path


BLOCKS = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
GRAY = np.rint(BLOCKS @ (0.299, 0.587, 0.114))[..., None].repeat(3, 2)


@pytest.mark.parametrize(
    ("mode", "want"),
    [(mode, BLOCKS) for mode in ("RGB", "CMYK", "P", "RGBA", "YCbCr", "RGBX")]
    + [(mode, GRAY) for mode in ("L", "LA")]
    + [("1", None)],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tif", "ppm"])
def test_every_mode_becomes_rgb(tmp_path, suffix, mode, want):
    path = tmp_path / f"image.{suffix}"
    image = Image.fromarray(BLOCKS)
    image = image.quantize(48) if mode == "P" else image.convert(mode)
    try:
        image.save(path, **{"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {}))
    except (OSError, ValueError):
        pytest.skip(f"{suffix} has no mode {mode}")
    got = decode_rgb(path)
    assert got.dtype == torch.uint8
    assert got.shape == (3, 48, 64)
    if want is None:
        assert (got == got[0]).all()
        want = np.where(got[0] > 127, 255, 0)[..., None]
    assert np.abs(got.numpy() - want.transpose(2, 0, 1).astype(float)).max() <= (5 if suffix == "jpg" else 3)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_gray_keeps_its_range(tmp_path, suffix):
    values = np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 21
    Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
    got = decode_rgb(tmp_path / f"deep.{suffix}")
    want = np.rint(values.astype(np.float64) * 255 / 65535)
    assert np.array_equal(got.numpy(), np.broadcast_to(want, (3, 48, 64)))


def test_the_content_counts_not_the_name(tmp_path):
    picture().save(tmp_path / "image.png")
    (tmp_path / "image.png").rename(tmp_path / "image.jpg")
    assert torch.equal(decode_rgb(tmp_path / "image.jpg"), torch.from_numpy(np.array(picture())).permute(2, 0, 1))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tif", "ppm"])
@pytest.mark.parametrize("kept", [0.9, 0.3, 0.01])
def test_a_file_that_ends_early_is_an_error(tmp_path, suffix, kept):
    path = tmp_path / f"image.{suffix}"
    picture(200, 300).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises((OSError, ValueError)):
        decode_rgb(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"hello", "not an image of a known format"),
        (b"\xff\xd8\xff", "not an image of a known format"),
    ],
    ids=["empty", "text", "three bytes of JPEG"],
)
def test_files_that_are_no_images(tmp_path, content, message):
    (tmp_path / "image.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        decode_rgb(tmp_path / "image.jpg")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tif"])
def test_random_damage_gives_an_image_or_one_of_two_errors(tmp_path, suffix):
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(BLOCKS).save(path)
    whole = np.fromfile(path, dtype=np.uint8)
    random = np.random.default_rng(0)
    for _ in range(40):
        data = whole.copy()
        data[random.integers(0, min(len(data), 400), 5)] = random.integers(0, 256, 5)
        data.tofile(path)
        with contextlib.suppress(OSError, ValueError):
            assert decode_rgb(path).shape[0] == 3


def test_formats_beyond_the_documented_are_refused(tmp_path):
    Image.fromarray(BLOCKS).save(tmp_path / "image.eps")
    with pytest.raises(ValueError, match="not an image of a known format"):
        decode_rgb(tmp_path / "image.eps")


def test_pixels_of_unknown_range_are_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "image.tif")
    with pytest.raises(ValueError, match="pixels of mode F have no known range"):
        decode_rgb(tmp_path / "image.tif")


def test_evaluation_resizes_and_cuts_the_centre(folder):
    bundle = open_data("imagefolder", folder, image_size=32)
    images, target, _ = next(Loader(bundle.test, batch_size=8, seed=0, train=False).epoch(0))
    files = [folder / "val" / name for name in ("cat/0.jpg", "cat/1.jpg", "dog/0.jpg")]
    assert target.tolist() == [0, 0, 1]
    for image, file in zip(images, files, strict=True):
        want = F.center_crop(F.resize(decode_rgb(file), [37], antialias=True), [32, 32])
        assert torch.equal(image, want)


def test_training_crops_by_seed_epoch_index_and_view(folder):
    bundle = open_data("imagefolder", folder, image_size=32)
    loader = Loader(bundle.train, batch_size=8, seed=3, train=True, views=2)
    views, target, index = next(loader.epoch(1))
    files = sorted((folder / "train").glob("*/*.jpg"))
    for row, place in enumerate(index.tolist()):
        image = decode_rgb(files[place])
        assert target[row] == int(files[place].parent.name == "dog")
        for number, view in enumerate(views):
            top, left, height, width = random_resized_crop_boxes(
                torch.tensor([place]), torch.tensor([image.shape[1:]]), seed=3, epoch=1, view=number
            )[0].tolist()
            want = F.resized_crop(image, top, left, height, width, [32, 32], antialias=True)
            assert torch.equal(view[row], want)
    assert not torch.equal(*views)
    again = next(Loader(bundle.train, batch_size=8, seed=3, train=True, views=2, workers=3).epoch(1))
    assert all(torch.equal(a, b) for a, b in zip(views, again.images, strict=True))


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 7)], ids=str)
@pytest.mark.parametrize("train", [True, False], ids=["train", "test"])
def test_images_of_extreme_shape(folder, size, train):
    picture(*size).save(folder / "train" / "cat" / "0.jpg")
    picture(*size).save(folder / "val" / "cat" / "0.jpg")
    bundle = open_data("imagefolder", folder, image_size=224)
    split = bundle.train if train else bundle.test
    images = next(Loader(split, batch_size=8, seed=0, train=train).epoch(0)).images
    assert images.shape == (len(split), 3, 224, 224)


def test_a_long_image_loses_its_ends_before_it_is_resized(tmp_path, monkeypatch):
    sizes = []

    def resize(image, size, **options):
        sizes.append(size)
        return torch.nn.functional.interpolate(image, size, **options)

    monkeypatch.setattr(decode_module, "interpolate", resize)
    picture(3, 900).save(tmp_path / "long.png")
    split = folder_module.FolderSplit("long", [str(tmp_path / "long.png")], [0], 32)
    got = next(Loader(split, batch_size=1, seed=0, train=False).epoch(0)).images[0]
    assert sizes == [(37, 37 * 8)]
    middle = decode_rgb(tmp_path / "long.png")[:, :, 438:462]
    assert torch.equal(got, F.center_crop(F.resize(middle, [37], antialias=True), [32, 32]))


def test_damaged_files_are_left_out_of_training_and_stop_evaluation(folder, caplog):
    for path in ("train/cat/2.jpg", "val/cat/1.jpg"):
        data = (folder / path).read_bytes()
        (folder / path).write_bytes(data[: len(data) // 2])
    bundle = open_data("imagefolder", folder, image_size=32)
    with caplog.at_level(logging.WARNING, "fflfast.data"):
        batch = next(Loader(bundle.train, batch_size=8, seed=0, train=True, workers=2).epoch(0))
    assert 2 not in batch.index
    assert len(batch.images) == 7
    assert f"left out '{folder}/train/cat/2.jpg' cannot be read (image file is truncated" in caplog.text
    with pytest.raises(DataError, match=r"evaluation needs every image, but '.*val/cat/1.jpg' cannot be read"):
        next(Loader(bundle.test, batch_size=8, seed=0, train=False).epoch(0))


def test_a_file_that_vanished_is_named(folder):
    bundle = open_data("imagefolder", folder)
    (folder / "val" / "dog" / "0.jpg").unlink()
    with pytest.raises(DataError, match=r"val/dog/0.jpg' cannot be read .*No such file"):
        next(Loader(bundle.test, batch_size=8, seed=0, train=False).epoch(0))


@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_names_of_the_test_folder(folder, name):
    (folder / "val").rename(folder / name)
    bundle = open_data("imagefolder", folder)
    assert (len(bundle.train), len(bundle.test), bundle.num_classes) == (7, 3, 2)
    assert bundle.class_names == ("cat", "dog")
    assert bundle.image_size == 224
    assert bundle.recipe == {"pad": 0, "flip": True}


def test_val_comes_before_test(folder):
    os.makedirs(folder / "test" / "cat")
    assert len(open_data("imagefolder", folder).test) == 3


def test_only_image_files_count_at_any_depth(folder):
    cat = folder / "train" / "cat"
    (cat / "notes.txt").write_text("no image")
    (cat / "._0.jpg").write_bytes(b"left by another system")
    (cat / ".hidden").mkdir()
    picture().save(cat / ".hidden" / "x.jpg")
    (cat / "deep" / "er").mkdir(parents=True)
    picture().save(cat / "deep" / "er" / "X.JPG")
    (folder / "train" / ".cache").mkdir()
    bundle = open_data("imagefolder", folder)
    assert [Path(file).name for file in bundle.train.files] == [
        "0.jpg", "1.jpg", "2.jpg", "3.jpg", "X.JPG", "0.jpg", "1.jpg", "2.jpg",
    ]  # fmt: skip
    assert bundle.train.targets.tolist() == [0] * 5 + [1] * 3


def test_links_are_followed_once(folder):
    (folder / "train" / "cat" / "loop").symlink_to(folder / "train" / "cat")
    (folder / "train" / "fox").symlink_to(folder / "train" / "dog")
    bundle = open_data("imagefolder", folder)
    assert bundle.class_names == ("cat", "dog", "fox")
    assert np.bincount(bundle.train.targets).tolist() == [4, 3, 3]


def test_a_class_that_only_train_has(folder):
    (folder / "train" / "ant").mkdir()
    picture().save(folder / "train" / "ant" / "0.jpg")
    bundle = open_data("imagefolder", folder)
    assert bundle.test.targets.tolist() == [1, 1, 2]


def remove(folder, *parts):
    import shutil

    for part in parts:
        shutil.rmtree(folder / part)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: remove(f, "train"), r"no folder train in .*; expected train/CLASS/IMAGE"),
        (lambda f: remove(f, "val"), r"no folder val \(or validation, or test\) in"),
        (lambda f: remove(f, "train/cat", "train/dog"), r"no class folder in .*train; expected train/CLASS/IMAGE"),
        (lambda f: remove(f, "train/dog"), r"val has 1 class folder.*train lacks, such as 'dog'"),
        (lambda f: (f / "train" / "empty").mkdir(), r"no image \(.jpg, .*\) in .*train/empty; add some or remove"),
        (lambda f: [p.unlink() for p in f.glob("val/*/*")], r"no image .* in .*val; the test split needs some"),
    ],
)
def test_layout_errors(folder, change, message):
    change(folder)
    with pytest.raises(DataError, match=message):
        open_data("imagefolder", folder)


def test_option_errors(folder):
    with pytest.raises(ValueError, match="cannot be downloaded"):
        open_data("imagefolder", folder, download=True)
    with pytest.raises(ValueError, match="needs a folder"):
        open_data("imagefolder")
    with pytest.raises(DataError, match=r"no folder train in .*nowhere"):
        open_data("imagefolder", folder / "nowhere")
