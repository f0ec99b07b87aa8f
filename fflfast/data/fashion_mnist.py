"""Fashion-MNIST from its idx files, gzipped or not."""

from __future__ import annotations

import gzip
import logging
import struct
import zlib
from pathlib import Path
from typing import IO, cast

import numpy as np

from .arrays import array_bundle
from .batch import DataBundle, DataError
from .files import download_file, find, locate

__all__ = ["fashion_mnist", "read_idx"]

_log = logging.getLogger("fflfast.data")

_DEBIAN_DIR = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist installs
_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_MD5 = {
    "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
}
_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def fashion_mnist(data_dir: Path | None, *, download: bool = False, image_size: int | None = None) -> DataBundle:
    """Open Fashion-MNIST (Xiao et al., arXiv 1708.07747): 60,000 + 10,000 gray images, 28 × 28, ten classes.

    ``data_dir`` None means where Debian's package dataset-fashion-mnist installs the files, if it did.

    Raises:
        ValueError, DataError: files missing or damaged, named.
    """
    if data_dir is None and _DEBIAN_DIR.is_dir():
        data_dir = _DEBIAN_DIR

    def fetch(folder: Path) -> None:
        for file, md5 in _MD5.items():
            download_file("fashion_mnist", f"{_URL}{file}.gz", folder, md5)

    folder = locate(
        "fashion_mnist",
        data_dir,
        ("fashion-mnist", "fashion_mnist", "FashionMNIST/raw"),
        tuple(_MD5),
        download=download,
        fetch=fetch,
    )
    parts = []
    for part, official in (("train", 60_000), ("t10k", 10_000)):
        images = read_idx(cast(Path, find(folder, f"{part}-images-idx3-ubyte")), (28, 28))
        targets = read_idx(cast(Path, find(folder, f"{part}-labels-idx1-ubyte")), ())
        if len(images) != official:
            _log.warning(
                "fashion_mnist: %s holds %d %s images, the official set %d",
                folder,
                len(images),
                part,
                official,
            )
        parts.append((images[:, None], targets))
    return array_bundle(
        "fashion_mnist",
        parts[0],
        parts[1],
        class_names=_CLASSES,
        mean=[72.94] * 3,
        std=[90.02] * 3,
        image_size=image_size,
        pad=2,
        flip=True,
    )


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Read an idx file of bytes (Y. LeCun's format), gzipped if its name ends in ``.gz``.

    Args:
        path: the file.
        shape: expected shape of one item: (28, 28) for images, () for labels.

    Returns:
        uint8 (n, *shape).

    Raises:
        DataError: another header, or more or fewer bytes than it promises.
    """
    rank = 1 + len(shape)
    try:
        with cast(IO[bytes], gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")) as file:
            header = file.read(4 + 4 * rank)
            if len(header) < 4 + 4 * rank or header[:4] != bytes((0, 0, 8, rank)):
                raise DataError(
                    f"{path}: expected an idx file of bytes with {rank} dimension(s), header "
                    f"00 00 08 {rank:02x}, got {header[:4].hex(' ') or 'an empty file'}; fetch it again"
                )
            count, *found = struct.unpack(f">{rank}I", header[4:])
            if tuple(found) != shape:
                raise DataError(f"{path}: expected items of shape {shape}, the header says {tuple(found)}; wrong file?")
            expected = count * int(np.prod(shape, dtype=np.int64))
            # In pieces, so that a damaged count allocates no more than the file really holds.
            body = bytearray()
            while piece := file.read(min(1 << 24, expected + 1 - len(body))):
                body += piece
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); fetch it again") from error
    if len(body) != expected:
        held = "more" if len(body) > expected else f"only {len(body)}"
        raise DataError(
            f"{path}: the header promises {count} items, {expected} bytes, the file holds {held}; fetch it again"
        )
    return np.frombuffer(body, dtype=np.uint8).reshape(count, *shape)
