"""The Triton backend of `augment` and `normalize`: what prepares and launches their kernel.

Arguments and results are those of `ops.augment_reference`. A counter on the device is passed as a pointer, one on the
CPU by value, so that nothing waits for the device and a captured CUDA graph sees new values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import device, launch
from .augment_kernels import augment_kernel

__all__ = ["augment", "normalize"]


def augment(
    images: Tensor,
    index: Tensor,
    seed: int | Tensor,
    epoch: int | Tensor,
    view: int | Tensor,
    pad: int,
    flip: bool,
    table: Tensor,
    channels_last: bool,
) -> Tensor:
    """See `ops.augment.augment`; the arguments are checked, and there is at least one number to write."""
    words: list[Tensor | int] = []
    by_pointer = 0
    for bit, word in enumerate((seed, epoch, view)):
        if isinstance(word, Tensor) and word.device == images.device:
            by_pointer |= 1 << bit
            words.append(word)
        else:
            words.append(int(word))
    return _launch(images, index, words, pad, flip, table, channels_last, by_pointer)


def normalize(images: Tensor, table: Tensor, channels_last: bool) -> Tensor:
    """See `ops.augment.normalize`; the arguments are checked, and there is at least one number to write."""
    return _launch(images, None, (0, 0, 0), 0, False, table, channels_last, 0)


def _launch(
    images: Tensor,
    index: Tensor | None,
    words: Sequence[Tensor | int],
    pad: int,
    flip: bool,
    table: Tensor,
    channels_last: bool,
    by_pointer: int,
) -> Tensor:
    batch, channels, height, width = images.shape
    order = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty((batch, 3, height, width), dtype=table.dtype, device=images.device, memory_format=order)
    image_step, channel_step, *steps = images.stride()
    block = launch.AUGMENT_BYTES // table.element_size()
    with device.of(images):
        augment_kernel[(batch * -(-3 * height * width // block),)](
            images, image_step, (channel_step if channels == 3 else 0, *steps), index,
            0 if index is None else index.stride(0), *words, table, table.stride(), out, height, width, pad, flip,
            channels_last, by_pointer, block, num_warps=launch.AUGMENT_WARPS,
        )  # fmt: skip
    return out
