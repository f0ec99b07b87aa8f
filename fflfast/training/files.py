"""Files of a run's folder: written whole or not at all, by one run at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from .config import ConfigError

__all__ = ["alone_in", "replace_text"]


def replace_text(path: Path, text: str) -> None:
    """Write a text file so that whoever reads it, whenever, finds the old one or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    with open(temporary, "r+b") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder while entered; the system lets go of it when the process ends, however it does.

    Raises ConfigError where another process is in it. Does nothing where the system or the disk knows no such locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"--out {folder}: another process is training there; wait for its end, or choose another folder"
            ) from None
        except OSError:
            pass  # some network disks have no locks
        yield
    finally:
        os.close(handle)
