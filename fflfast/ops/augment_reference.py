"""The definition of the augmentation operator in plain PyTorch, which every backend reproduces bit for bit."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from .counters import CROP_LEFT, CROP_TOP, FLIP, hash_words, scaled

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
    """See `fflfast.ops.augment.augment`; the arguments are checked."""
    height, width = images.shape[-2:]
    key = cast(Tensor, hash_words(seed, epoch, index, view))
    # All three streams at once: on small batches each operation costs more than what it computes.
    draws = cast(Tensor, hash_words(key, torch.arange(3, device=images.device)[:, None]))
    flipped = scaled(draws[FLIP], 2).bool() if flip else None
    if pad == 0:
        if flipped is not None:
            images = torch.where(flipped[:, None, None, None], images.flip(3), images)
        return normalize(images, table, channels_last)
    row = torch.arange(height, device=images.device).expand(images.shape[0], -1)
    column = torch.arange(width, device=images.device).expand(images.shape[0], -1)
    if flipped is not None:
        column = torch.where(flipped[:, None], width - 1 - column, column)
    row = _reflect(row + (scaled(draws[CROP_TOP], 2 * pad + 1) - pad)[:, None], height)
    column = _reflect(column + (scaled(draws[CROP_LEFT], 2 * pad + 1) - pad)[:, None], width)
    source = (row[:, :, None] * width + column[:, None, :]).flatten(1)
    moved = images.flatten(2).gather(2, source[:, None].expand(-1, images.shape[1], -1))
    return normalize(moved.view(images.shape), table, channels_last)


def normalize(images: Tensor, table: Tensor, channels_last: bool) -> Tensor:
    """See `fflfast.ops.augment.normalize`; the arguments are checked."""
    # One flat lookup: channel c reads rows 256·c … 256·c+255 of the transposed table.
    offset = torch.arange(0, 768, 256, dtype=torch.int32, device=images.device).view(3, 1, 1)
    place = images.to(torch.int32) + offset
    if channels_last:
        place = place.permute(0, 2, 3, 1)
    looked_up = table.t().flatten().index_select(0, place.flatten()).view(place.shape)
    return looked_up.permute(0, 3, 1, 2) if channels_last else looked_up


def _reflect(place: Tensor, length: int) -> Tensor:
    return (length - 1) - ((length - 1) - place.abs()).abs()
