"""Opening data sets: small files of the real formats, whole, damaged, misplaced and missing."""

from __future__ import annotations

import gzip
import logging
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fflfast.data import DataError, Loader, available, fashion_mnist, files, open_data

RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _see_warnings(caplog):
    caplog.set_level(logging.WARNING, "fflfast.data")


def everything(split, **options):
    loader = Loader(split, batch_size=1000, seed=0, train=False, **options)
    images, target, index = next(loader.epoch(0))
    assert len(loader) == 1
    assert torch.equal(index, torch.arange(len(split)))
    return images.numpy(), target.numpy()


def test_digits_are_scikit_learns_in_a_fixed_stratified_split():
    from sklearn.datasets import load_digits

    raw, label = load_digits(return_X_y=True)
    bundle = open_data("digits")
    assert (len(bundle.train), len(bundle.test)) == (1195, 602)
    seen = []
    for split in (bundle.train, bundle.test):
        images, target = everything(split) if len(split) < 1000 else (split.images, split.targets.numpy())
        assert images.shape[1:] == split.shape == (1, 8, 8)
        seen += [(image.tobytes(), t) for image, t in zip(images, target, strict=True)]
    scaled = np.rint(raw * 255 / 16).astype(np.uint8)
    assert sorted(seen) == sorted((image.tobytes(), t) for image, t in zip(scaled, label, strict=True))
    share = np.bincount(bundle.test.targets) / np.bincount(label)
    assert ((share > 0.32) & (share < 0.345)).all()
    assert bundle.recipe == {"pad": 1, "flip": False}
    assert bundle.class_names == tuple("0123456789")
    assert bundle.mean[0] == bundle.mean[2] == pytest.approx(bundle.train.images.mean())


def test_another_image_size_resizes_and_scales_the_padding():
    from torchvision.transforms.v2.functional import resize

    bundle = open_data("digits", image_size=32)
    assert bundle.train.shape == (1, 32, 32)
    assert bundle.image_size == 32
    assert bundle.recipe["pad"] == 4
    images, _ = everything(bundle.test)
    want = resize(torch.from_numpy(open_data("digits").test.images), [32, 32], antialias=True)
    assert np.array_equal(images, want.numpy())
    assert open_data("digits", image_size=1).recipe["pad"] == 0


IDX_FILES = tuple(fashion_mnist._MD5)


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def idx_folder(tmp_path):
    for part, count in (("train", 30), ("t10k", 20)):
        images = RANDOM.integers(0, 256, (count, 28, 28))
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(count) % 10))
    return tmp_path


def test_fashion_mnist_reads_plain_and_gzipped_files(idx_folder, caplog):
    bundle = open_data("fashion_mnist", idx_folder)
    images, target = everything(bundle.test)
    raw = gzip.decompress((idx_folder / "t10k-images-idx3-ubyte.gz").read_bytes())
    assert images.tobytes() == raw[16:]
    assert images.shape == (20, 1, 28, 28)
    assert np.array_equal(target, np.arange(20) % 10)
    assert bundle.class_names[9] == "Ankle boot"
    assert "holds 30 train images, the official set 60000" in caplog.text


def cut(data: bytes) -> bytes:
    return data[:-100]


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("train-images-idx3-ubyte.gz", cut, "cannot be read"),
        ("train-images-idx3-ubyte.gz", lambda data: data[:500] + b"\0\1\2" + data[503:], "cannot be read"),
        ("train-images-idx3-ubyte.gz", lambda data: b"", "got an empty file|cannot be read"),
        ("train-images-idx3-ubyte.gz", lambda data: b"no gzip", "cannot be read .*[Nn]ot a gzipped file"),
        ("train-labels-idx1-ubyte", lambda data: data[:-1], "promises 30 items, 30 bytes, the file holds only 29"),
        ("train-labels-idx1-ubyte", lambda data: data + b"\0", "promises 30 items, 30 bytes, the file holds more"),
        ("train-labels-idx1-ubyte", lambda data: data[:6], "expected an idx file of bytes"),
        ("train-labels-idx1-ubyte", lambda data: b"", "got an empty file"),
        ("train-labels-idx1-ubyte", lambda data: data[:8] + b"\x0a" + data[9:], "image 0 has label 10"),
        ("train-labels-idx1-ubyte", lambda data: idx(np.arange(29) % 10), "30 images but 29 labels"),
        ("train-labels-idx1-ubyte", lambda data: idx(np.zeros((30, 28, 28))), "got 00 00 08 03"),
        ("train-labels-idx1-ubyte", lambda data: data[:2] + b"\x0d" + data[3:], "got 00 00 0d 01"),
        ("train-labels-idx1-ubyte", lambda data: data[:4] + b"\xff" * 4, "promises 4294967295 items"),
    ],
)  # fmt: skip
def test_fashion_mnist_damaged(idx_folder, file, damage, message):
    path = idx_folder / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message) as error:
        open_data("fashion_mnist", idx_folder)
    assert "\n" not in str(error.value)


def test_fashion_mnist_of_another_size(idx_folder):
    (idx_folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros((30, 20, 20)))))
    with pytest.raises(DataError, match=r"expected items of shape \(28, 28\), the header says \(20, 20\)"):
        open_data("fashion_mnist", idx_folder)


def test_fashion_mnist_in_torchvisions_layout_and_missing(idx_folder, tmp_path_factory):
    home = tmp_path_factory.mktemp("data")
    (home / "FashionMNIST").mkdir()
    idx_folder.rename(home / "FashionMNIST" / "raw")
    assert len(open_data("fashion_mnist", str(home)).train) == 30
    (home / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte not found in .*raw; .*--download"):
        open_data("fashion_mnist", home)


def test_fashion_mnist_without_a_folder(monkeypatch, idx_folder, tmp_path):
    monkeypatch.setattr(fashion_mnist, "_DEBIAN_DIR", idx_folder)
    assert len(open_data("fashion_mnist").train) == 30
    monkeypatch.setattr(fashion_mnist, "_DEBIAN_DIR", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="fashion_mnist needs a folder"):
        open_data("fashion_mnist")


@pytest.mark.skipif(not fashion_mnist._DEBIAN_DIR.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist():
    bundle = open_data("fashion_mnist")
    assert (len(bundle.train), len(bundle.test)) == (60_000, 10_000)
    assert bundle.train.images.mean() == pytest.approx(bundle.mean[0], abs=0.01)
    assert bundle.train.images.std() == pytest.approx(bundle.std[0], abs=0.01)
    assert (np.bincount(bundle.test.targets) == 1000).all()


def write_records(path: Path, count: int, classes: tuple[int, ...]) -> np.ndarray:
    records = RANDOM.integers(0, 256, (count, len(classes) + 3072), dtype=np.uint8)
    for place, number in enumerate(classes):
        records[:, place] = np.arange(count) * 7 % number
    records.tofile(path)
    return records


@pytest.fixture
def cifar100_folder(tmp_path):
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    for file, count in (("train.bin", 60), ("test.bin", 40)):
        write_records(folder / file, count, (20, 100))
    (folder / "fine_label_names.txt").write_text("".join(f"fine_{k}\n" for k in range(100)))
    return folder


@pytest.fixture
def cifar10_folder(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for part in range(1, 6):
        write_records(folder / f"data_batch_{part}.bin", 10 + part, (10,))
    write_records(folder / "test_batch.bin", 10, (10,))
    (folder / "batches.meta.txt").write_text("".join(f"name_{k}\n" for k in range(10)) + "\n")
    return folder


def test_cifar100_takes_the_fine_label(cifar100_folder, caplog):
    for folder in (cifar100_folder, cifar100_folder.parent):
        bundle = open_data("cifar100", folder)
        images, target = everything(bundle.test)
        records = np.fromfile(cifar100_folder / "test.bin", dtype=np.uint8).reshape(-1, 3074)
        assert np.array_equal(images.reshape(40, -1), records[:, 2:])
        assert np.array_equal(target, records[:, 1])
    assert bundle.class_names[42] == "fine_42"
    assert bundle.recipe == {"pad": 4, "flip": True}
    assert "holds 60 images in train.bin, the official set 50000" in caplog.text


def test_cifar10_joins_its_five_files(cifar10_folder):
    bundle = open_data("cifar10", cifar10_folder)
    records = [
        np.fromfile(cifar10_folder / f"data_batch_{part}.bin", dtype=np.uint8).reshape(-1, 3073) for part in range(1, 6)
    ]
    images, target = everything(bundle.train)
    assert np.array_equal(images.reshape(65, -1), np.concatenate(records)[:, 1:])
    assert np.array_equal(target, np.concatenate(records)[:, 0])
    shuffled = next(Loader(bundle.train, batch_size=64, seed=0, train=True).epoch(0))
    assert np.array_equal(shuffled.images.numpy(), images[shuffled.index])
    assert bundle.num_classes == 10
    assert np.array_equal(everything(bundle.test)[1], np.arange(10) * 7 % 10)


def test_cifar_is_mapped_not_read(cifar100_folder):
    bundle = open_data("cifar100", cifar100_folder)
    with (cifar100_folder / "train.bin").open("r+b") as file:
        file.seek(2)
        file.write(b"\x00\x01\x02")
    first = next(Loader(bundle.train, batch_size=1, seed=0, train=False).epoch(0))
    assert first.images.flatten()[:3].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], r"test.bin: expected whole records of 3074 bytes, found 122959 bytes"),
        (lambda data: b"", "found 0 bytes"),
        (lambda data: data[: 3073 * 40], "cut short or of another data set"),
        (lambda data: data[:3075] + b"\x64" + data[3076:], "labels 0 … 99 in byte 1 .* record 1 has 100"),
        (lambda data: b"\x14" + data[1:], "labels 0 … 19 in byte 0 .* record 0 has 20"),
    ],
    ids=["cut", "empty", "cifar-10's record size", "fine label", "coarse label"],
)
def test_cifar_damaged(cifar100_folder, damage, message):
    path = cifar100_folder / "test.bin"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        open_data("cifar100", cifar100_folder)


def test_cifar_names_and_files_missing(cifar10_folder, cifar100_folder):
    (cifar100_folder / "fine_label_names.txt").write_text("one two three")
    with pytest.raises(DataError, match="expected 100 class names, found 3"):
        open_data("cifar100", cifar100_folder)
    (cifar10_folder / "data_batch_3.bin").unlink()
    with pytest.raises(DataError, match=r"cifar10: data_batch_3.bin not found in .*cifar-10-batches-bin; .*--download"):
        open_data("cifar10", cifar10_folder.parent)
    with pytest.raises(DataError, match=r"not found in .*nowhere, which is not a folder"):
        open_data("cifar10", cifar10_folder / "nowhere")
    with pytest.raises(ValueError, match="cifar10 needs a folder"):
        open_data("cifar10")


def test_nothing_is_downloaded_unless_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "download_file", None)
    for name in ("cifar10", "cifar100", "fashion_mnist"):
        with pytest.raises(DataError, match="not found in"):
            open_data(name, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "count"), [("cifar10", 1), ("cifar100", 1), ("fashion_mnist", 4)])
def test_download_fetches_published_files_into_the_folder(name, count, tmp_path, monkeypatch):
    import torchvision.datasets.utils as utils

    asked = []
    monkeypatch.setattr(utils, "download_url", lambda url, root, md5: asked.append((url, root, md5)))
    monkeypatch.setattr(
        utils, "download_and_extract_archive", lambda url, root, md5, **_: asked.append((url, root, md5))
    )
    with pytest.raises(DataError, match="not found in"):
        open_data(name, tmp_path / "new", download=True)
    assert len(asked) == count
    assert {root for _, root, _ in asked} == {str(tmp_path / "new")}
    assert all(url.endswith(".gz") and len(md5) == 32 for url, _, md5 in asked)


def test_a_failed_download_is_one_clear_line(tmp_path, monkeypatch):
    import torchvision.datasets.utils as utils

    def fail(*args, **kwargs):
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(utils, "download_and_extract_archive", fail)
    with pytest.raises(DataError, match=r"cifar10: cannot download https://.*cifar-10-binary.tar.gz to .*corrupted"):
        open_data("cifar10", tmp_path, download=True)


def test_files_that_are_there_are_not_downloaded(idx_folder, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "download_file", None)
    assert len(open_data("fashion_mnist", idx_folder, download=True).train) == 30


def test_available_names():
    assert available() == (
        "cifar10", "cifar100", "coco-keypoints", "digits", "fashion_mnist", "imagefolder", "lspet", "synthetic",
        "synthetic-imagenet",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cifar1000", {}, "expected one of cifar10, .* got 'cifar1000'; did you mean 'cifar10"),
        (None, {}, "got None"),
        ("digits", {"data_dir": "/d"}, "digits reads no files; leave out --data-dir '/d'"),
        ("digits", {"image_size": 0}, "image_size: expected 1 ≤ image_size"),
        ("digits", {"image_size": 8.0}, "image_size: expected an int, got 8.0"),
        ("synthetic", {"seed": -1}, "seed: expected 0 ≤ seed"),
    ],
)
def test_option_errors(name, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        open_data(name, **options)


def test_importing_data_imports_no_data_library():
    code = (
        "import sys, fflfast.data, fflfast.ops.augment; "
        "print([m for m in ('torchvision', 'sklearn', 'PIL', 'fflfast.training') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
