"""Finding the files of a data set, or fetching them where that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from .batch import DataError

__all__ = ["download_file", "find", "locate"]


def find(folder: Path, file: str) -> Path | None:
    """Return ``folder/file``, or its ``.gz``, whichever exists as a file."""
    return next((path for path in (folder / file, folder / f"{file}.gz") if path.is_file()), None)


def locate(
    name: str,
    data_dir: Path | None,
    subfolders: Sequence[str],
    files: Sequence[str],
    *,
    download: bool,
    fetch: Callable[[Path], None],
) -> Path:
    """Return the folder that holds ``files``: data_dir itself or one of its subfolders.

    Raises:
        DataError: files are missing and ``download`` is off, or they are still missing after
            ``fetch(data_dir)``.
        ValueError: data_dir is None.
    """
    if data_dir is None:
        raise ValueError(f"{name} needs a folder that holds its files, or that --download may fill; give --data-dir")
    candidates = [data_dir, *(data_dir / sub for sub in subfolders)]

    def missing(folder: Path) -> list[str]:
        return [file for file in files if find(folder, file) is None]

    best = min(candidates, key=lambda folder: len(missing(folder)))
    if missing(best) and download:
        fetch(data_dir)
        best = min(candidates, key=lambda folder: len(missing(folder)))
    if missing(best):
        what = "" if data_dir.is_dir() else ", which is not a folder"
        raise DataError(
            f"{name}: {', '.join(missing(best))} not found in {best}{what}; pass the folder that holds "
            "the files as --data-dir, or download them there with --download (download=True)"
        )
    return best


def download_file(name: str, url: str, folder: Path, md5: str, *, extract: bool = False) -> None:
    """Fetch ``url`` into ``folder`` unless it is there already, verify its MD5, and unpack it if asked.

    Raises:
        DataError: no connection, or the file that came is not the published one.
    """
    try:
        from torchvision.datasets.utils import download_and_extract_archive, download_url
    except ImportError as error:
        raise ValueError("downloading needs torchvision; install it: pip install torchvision") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if extract:
            download_and_extract_archive(url, str(folder), md5=md5, remove_finished=True)
        else:
            download_url(url, str(folder), md5=md5)
    except (OSError, RuntimeError, EOFError) as error:
        raise DataError(
            f"{name}: cannot download {url} to {folder}: {error}; try again, or fetch it by hand"
        ) from error
