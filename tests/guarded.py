"""Tensors whose neighbours in memory may not be touched, and children that may die of it."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import traceback
from collections.abc import Callable

import torch


def between_guards(tensor: torch.Tensor, at_end: bool) -> torch.Tensor:
    """A copy with the same strides that ends, or begins, where memory may not be touched."""
    page = mmap.PAGESIZE
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    size = extent * tensor.element_size()
    room = (size + page - 1) // page * page
    memory = mmap.mmap(-1, room + 2 * page)
    offset = page + (room - size if at_end else 0)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=extent, offset=offset)
    copy.copy_(tensor.as_strided((extent,), (1,)))
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for guard in (base, base + page + room):
        assert protect(guard, page, 0) == 0
    return copy.as_strided(tensor.shape, tensor.stride())


def died(action: Callable[[], object]) -> bool:
    """Whether a child process that does this does not end well."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        try:
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitpid(child, 0)[1] != 0
