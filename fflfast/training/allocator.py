"""Memory that a CPU run keeps: glibc, left alone, hands every large tensor back to the system as soon as it is free."""

from __future__ import annotations

import ctypes

__all__ = ["keep_memory"]

# <malloc.h>
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
# glibc raises the threshold by itself only up to 32 MiB, and some versions refuse a larger one.
_THRESHOLDS = (1 << 30, 32 << 20)
_PAD = 64 << 20


def keep_memory() -> bool:
    """Let the C library keep freed memory mapped, for the rest of this process; tells whether it could be asked to.

    A training step frees every activation and asks for the same sizes again in the next one. glibc serves large
    blocks with a mapping of their own and unmaps them when they are freed, so that each step touches all its pages for
    the first time: a page fault for every 4 KiB. With the thresholds raised, freed blocks stay in the heap and are
    given out again. The process then keeps its peak, which in training the next step needs anyway.

    Does nothing where the C library is not glibc (macOS, Windows, musl); safe to call twice.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 (only glibc has it)
        mallopt = libc.mallopt
    except (OSError, TypeError, AttributeError):  # no C library to be had, Windows, another C library
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    mapped = any(mallopt(_MMAP_THRESHOLD, size) for size in _THRESHOLDS)
    # −1 never gives the top of the heap back; the pad makes the heap grow in few large pieces.
    return bool(mapped and mallopt(_TRIM_THRESHOLD, -1) and mallopt(_TOP_PAD, _PAD))
