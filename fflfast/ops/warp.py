"""Rotating, zooming and mirroring uint8 images together with points on them, in plain PyTorch and integer arithmetic.

Every decision is a pure function of (seed, epoch, index, view), as in `fflfast.ops.augment`, and every byte of the
result is the same on every device: positions are fixed-point numbers with 24 bits behind the point, weights have 11,
and sines come from tables that the host computes once. Nothing here waits for a device.
"""

from __future__ import annotations

import functools
import math
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from .counters import FLIP, ROTATION, ZOOM, below, describe, hash_words, word

__all__ = ["prepare_warp", "warp"]

_DRAW_BITS = 12  # resolution of angle and zoom: 4,096 equally likely values
_TABLE_BITS = 30  # behind the point of sines and zooms
_BITS = 24  # behind the point of positions, in pixels
_WEIGHT_BITS = 11  # of each of the two weights: with 8 bits of pixel and both, a product fits into 31
_POINT_BITS = 10  # behind the point of the points' coordinates
_MOST_SCALE = 0.75  # 1 / zoom is at most 4: its product with a sine fits into int64
_FAR = 1 << 20  # pixels; no point that counts lies as far out


def warp(
    images: Tensor,
    points: Tensor,
    index: Tensor,
    size: int,
    *,
    seed: int | Tensor,
    epoch: int | Tensor,
    view: int | Tensor = 0,
    rotation: float = 0.0,
    scale: float = 0.0,
    flip: bool = False,
    order: Tensor,
) -> tuple[Tensor, Tensor]:
    """Cut the middle out of each image after rotating, zooming and mirroring it about its centre.

    The angle is uniform in ±rotation, the zoom uniform in 1 ± scale, each of 4,096 values; half of the images are
    mirrored, and then each point takes the place of its mirror image. Output pixel q shows the bilinear interpolation
    of the image at A⁻¹·(q − c') + c, with A = mirror · turn · zoom about the centres c and c', and black outside; a
    point p goes to A·(p − c) + c'. All by default off: then the middle of the image, exactly.

    Args:
        images: uint8 (B, C, H, W).
        points: float (B, J, 3), each x, y, visible; in pixels, whose centres are at integers.
        index: int64 (B,), each image's place in its data set.
        size: side of the result in pixels, ≥ 1.
        seed, epoch, view: ints ≥ 0, or 0-dim integer tensors on the CPU or beside the images.
        rotation: in degrees, 0 to 180.
        scale: 0 to 0.75.
        flip: whether to mirror.
        order: int64 (J,), for each point the one that stands in its place in a mirror image.

    Returns:
        uint8 (B, C, size, size) and float32 (B, J, 3) in its pixels; visible is 1 where it was positive and the point
        lies on the result, else 0, and then so are x and y.

    Raises:
        TypeError, ValueError: an argument of another type, shape, dtype or range.
    """
    _check(images, points, index, order, size)
    key = cast(Tensor, hash_words(word(seed, "seed"), word(epoch, "epoch"), index, word(view, "view")))
    turns, zooms = _tables(float(rotation), float(scale), images.device)
    cos, sin = turns.index_select(0, below(key, ROTATION, len(turns))).unbind(1)
    zoom, shrink = zooms.index_select(0, below(key, ZOOM, len(zooms))).unbind(1)
    sign = 1 - 2 * below(key, FLIP, 2) if flip else torch.ones_like(cos)
    moved = _move(points, _matrix(zoom, sign * cos, -sign * sin, sin, cos), images.shape[-2:], size)
    if flip:
        moved = torch.where(sign[:, None, None] < 0, moved.index_select(1, order), moved)
    return _interpolate(images, _matrix(shrink, sign * cos, sin, -sign * sin, cos), size), moved


def prepare_warp(device: torch.device | str, *, rotation: float = 0.0, scale: float = 0.0) -> None:
    """Bring to a device the tables that `warp` reads, so that its first call waits for no copy either.

    Raises:
        ValueError: rotation or scale out of range.
    """
    _tables(float(rotation), float(scale), torch.empty(0, device=device).device)


def _matrix(factor: Tensor, *entries: Tensor) -> Tensor:
    """Return int64 (B, 2, 2) with `_BITS` behind the point: entries (B,), row by row, times a factor (B,)."""
    surplus = 2 * _TABLE_BITS - _BITS
    product = torch.stack(entries, dim=1) * factor[:, None]
    return ((product + (1 << (surplus - 1))) >> surplus).view(-1, 2, 2)


def _interpolate(images: Tensor, inverse: Tensor, size: int) -> Tensor:
    """Look up every pixel of the result; ``inverse`` leads from its offset from the centre to that in the image."""
    batch, channels, height, width = images.shape
    offset = 2 * torch.arange(size, device=images.device) - (size - 1)  # in half pixels
    across, along = inverse[:, :, 0, None, None] * offset, inverse[:, :, 1, None, None] * offset[:, None]
    corner, weight = [], []
    for axis, length in ((0, width), (1, height)):
        # Position in half pixels, counted from one pixel before the image: where a frame of black begins.
        place = across[:, axis] + along[:, axis] + ((length + 1) << _BITS)
        first = place >> (_BITS + 1)
        corner.append([(first + step).clamp(0, length + 1) for step in (0, 1)])
        after = ((place >> (_BITS + 1 - _WEIGHT_BITS)) & ((1 << _WEIGHT_BITS) - 1)).to(torch.int32)
        weight.append([(1 << _WEIGHT_BITS) - after, after])
    framed = pad(images, (1, 1, 1, 1)).flatten(2)
    total = torch.full((1, 1, 1), 1 << (2 * _WEIGHT_BITS - 1), dtype=torch.int32, device=images.device)
    for row in (0, 1):
        for column in (0, 1):
            source = (corner[1][row] * (width + 2) + corner[0][column]).flatten(1)
            value = framed.gather(2, source[:, None].expand(-1, channels, -1)).to(torch.int32)
            total = total + value * (weight[1][row] * weight[0][column]).flatten(1)[:, None]
    return (total >> (2 * _WEIGHT_BITS)).to(torch.uint8).view(batch, channels, size, size)


def _move(points: Tensor, forward: Tensor, shape: torch.Size, size: int) -> Tensor:
    """Take points (B, J, 3) along; ``forward`` leads from the offset from the image's centre to that in the result."""
    visible = (points[..., 2] > 0) & (points[..., :2].abs() < _FAR).all(dim=-1)
    places = torch.where(visible[..., None], points[..., :2], 0.0)
    fixed = (places * (1 << _POINT_BITS)).round().to(torch.int64)
    height, width = shape
    half = 1 << (_POINT_BITS - 1)
    x, y = fixed[..., 0] - (width - 1) * half, fixed[..., 1] - (height - 1) * half
    turned = forward[:, None, :, 0] * x[..., None] + forward[:, None, :, 1] * y[..., None]
    fixed = ((turned + (1 << (_BITS - 1))) >> _BITS) + (size - 1) * half
    visible = visible & ((fixed >= -half) & (fixed < (size << _POINT_BITS) - half)).all(dim=-1)
    moved = torch.where(visible[..., None], fixed, 0).to(torch.float32) / (1 << _POINT_BITS)
    return torch.cat([moved, visible[..., None].to(torch.float32)], dim=-1)


@functools.lru_cache(maxsize=16)
def _tables(rotation: float, scale: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (cos, sin) of the angles and (zoom, 1 / zoom), int64 (n, 2) with `_TABLE_BITS` behind the point."""
    if not 0 <= rotation <= 180:
        raise ValueError(f"rotation: expected 0 to 180 degrees, got {rotation!r}")
    if not 0 <= scale <= _MOST_SCALE:
        raise ValueError(f"scale: expected 0 to {_MOST_SCALE}, got {scale!r}")
    count = 1 << _DRAW_BITS
    spread = [(2 * k + 1) / count - 1 for k in range(count)]
    angles = [math.radians(rotation * share) for share in spread] if rotation else [0.0]
    zooms = [1 + scale * share for share in spread] if scale else [1.0]
    pairs = [(math.cos(angle), math.sin(angle)) for angle in angles], [(zoom, 1 / zoom) for zoom in zooms]
    turns, sizes = (
        torch.tensor([[round(value * (1 << _TABLE_BITS)) for value in pair] for pair in table], device="cpu")
        for table in pairs
    )
    return turns.to(device), sizes.to(device)


def _check(images: Tensor, points: Tensor, index: Tensor, order: Tensor, size: int) -> None:
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.dim() != 4:
        raise TypeError(f"images: expected uint8 (B, C, H, W), got {describe(images)}")
    batch = images.shape[0]
    if not isinstance(points, Tensor) or not points.is_floating_point() or points.dim() != 3:
        raise TypeError(f"points: expected float (B, J, 3), got {describe(points)}")
    if points.shape[0] != batch or points.shape[2] != 3:
        raise ValueError(f"points: expected ({batch}, J, 3) for {batch} images, got {describe(points)}")
    for name, value, length in (("index", index, batch), ("order", order, points.shape[1])):
        if not isinstance(value, Tensor) or value.dtype != torch.int64 or value.shape != (length,):
            raise ValueError(f"{name}: expected int64 ({length},), got {describe(value)}")
    for name, value in (("points", points), ("index", index), ("order", order)):
        if value.device != images.device:
            raise ValueError(f"{name} is on {value.device} but images on {images.device}; move both to one device")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"size: expected an int ≥ 1, got {size!r}")
