"""Joints as heatmaps and back: Gaussian targets, coordinates from maps, the maps of mirrored images.

Joints are float32 (B, J, 3), each x, y, visible: pixels of the S × S network input, whose centres are at integers. Cell
i of a map that is w wide stands for the pixel x = (i + 0.5) · S / w − 0.5. With this convention the map of a mirrored
image, mirrored back, lies exactly on the map of the image, so that a flip test needs no shift by a cell.

Sources: Newell, Yang, Deng, "Stacked Hourglass Networks", 2016, arXiv 1603.06937 (targets, shift by a quarter); Xiao,
Wu, Wei, "Simple Baselines for Human Pose Estimation", 2018, arXiv 1804.06208, whose code that of OKDHP builds on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["decode_heatmaps", "flip_back", "flip_order", "gaussian_heatmaps"]


def gaussian_heatmaps(
    target: Tensor, size: tuple[int, int], image_size: int | tuple[int, int], *, sigma: float = 2.0
) -> tuple[Tensor, Tensor]:
    """Encode joints as maps: exp(−d² / 2σ²) of the distance d to the joint's cell, 0 where |dx| or |dy| is over 3σ.

    The joint's cell is the nearest one, as in the sources, so that the largest value is 1. A joint that is not visible
    or whose Gaussian has no cell on the map has a map of zeros and weight 0; its coordinates may be anything.

    Args:
        target: (B, J, 3), floating point.
        size: (h, w) of a map, in cells.
        image_size: S, or (height, width), of the network input in pixels.
        sigma: in cells, > 0.

    Returns:
        Maps (B, J, h, w) and weights (B, J), 0 or 1, without a graph: float32, float64 for a target of float64.

    Raises:
        ValueError, TypeError: a target of another shape or dtype, a size or sigma that is not positive.
    """
    if not isinstance(target, Tensor) or not target.is_floating_point():
        kind = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"gaussian_heatmaps: target must be a floating-point tensor (B, J, 3), got {kind}")
    if target.dim() != 3 or target.shape[-1] != 3:
        raise ValueError(f"gaussian_heatmaps: target must be (B, J, 3) = x, y, visible, got {tuple(target.shape)}")
    if not (math.isfinite(sigma) and sigma > 0):
        raise ValueError(f"gaussian_heatmaps: sigma must be greater than 0, got {sigma!r}")
    height, width = _sides("size", size)
    image_height, image_width = _sides("image_size", image_size)
    joints = target.detach().to(torch.promote_types(target.dtype, torch.float32))
    seen = joints[..., 2] > 0
    across, meets_x = _profile(joints[..., 0], seen, width, image_width, sigma)
    along, meets_y = _profile(joints[..., 1], seen, height, image_height, sigma)
    weight = (seen & meets_x & meets_y).to(joints.dtype)
    return along[..., :, None] * across[..., None, :] * weight[..., None, None], weight


def decode_heatmaps(heatmaps: Tensor, image_size: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Joints of maps: the largest cell, moved by a quarter of a cell towards the larger of its neighbours on each axis.

    As in OKDHP's code (github.com/zhengli97/OKDHP), a cell on the border is not moved. Departures: that code leaves the
    second column and row from the upper left unmoved too, and puts a joint whose largest value is not positive at 0, 0.

    Args:
        heatmaps: (B, J, h, w), floating point.
        image_size: S, or (height, width), of the network input in pixels.

    Returns:
        Coordinates x, y in pixels (B, J, 2) and the largest values (B, J), float32 without a graph.

    Raises:
        ValueError: maps of another shape or without a cell, an image size that is not positive.
    """
    if heatmaps.dim() != 4 or heatmaps.shape[-1] == 0 or heatmaps.shape[-2] == 0:
        raise ValueError(f"decode_heatmaps: heatmaps must be (B, J, h, w) with h, w ≥ 1, got {tuple(heatmaps.shape)}")
    height, width = heatmaps.shape[-2:]
    image_height, image_width = _sides("image_size", image_size)
    flat = heatmaps.detach().float().flatten(2)
    score, cell = flat.max(dim=-1)
    column, row = cell % width, cell.div(width, rounding_mode="floor")
    inside = (column > 0) & (column < width - 1) & (row > 0) & (row < height - 1)
    x = column + 0.25 * _uphill(flat, cell, 1, inside)
    y = row + 0.25 * _uphill(flat, cell, width, inside)
    pixels = [(x + 0.5) * (image_width / width) - 0.5, (y + 0.5) * (image_height / height) - 0.5]
    return torch.stack(pixels, dim=-1), score


def flip_order(num_joints: int, pairs: Sequence[tuple[int, int]], device: torch.device | str | None = None) -> Tensor:
    """Return what `flip_back` takes, int64 (J,): which joint of a mirrored image is joint j of the image.

    Args:
        num_joints: J.
        pairs: (left, right) joints that a mirror swaps; the others are their own mirror image.
        device: of the result.

    Raises:
        ValueError: a joint out of range, or one that stands in two pairs.
    """
    order = list(range(num_joints))
    for pair in pairs:
        left, right = pair
        if not (0 <= left < num_joints and 0 <= right < num_joints):
            raise ValueError(f"flip_order: joints must be in [0, {num_joints}), got the pair {tuple(pair)}")
        if order[left] != left or order[right] != right or left == right:
            raise ValueError(f"flip_order: a joint can stand in one pair only, got {[tuple(p) for p in pairs]}")
        order[left], order[right] = right, left
    return torch.tensor(order, dtype=torch.int64, device=device)


def flip_back(heatmaps: Tensor, order: Tensor) -> Tensor:
    """Return the maps (B, J, h, w) of mirrored images as maps of the images; ``order`` is from `flip_order`."""
    return heatmaps.flip(-1).index_select(1, order)


def _profile(pixels: Tensor, seen: Tensor, cells: int, image: int, sigma: float) -> tuple[Tensor, Tensor]:
    """Values (B, J, cells) of the Gaussian along one axis, and whether it has a cell there."""
    place = (pixels + 0.5) * (cells / image) - 0.5
    centre = (torch.where(seen, place, torch.zeros_like(place)) + 0.5).floor()
    distance = torch.arange(cells, dtype=pixels.dtype, device=pixels.device) - centre[..., None]
    near = distance.abs() <= 3 * sigma
    values = torch.exp(distance.square() * (-0.5 / sigma**2))
    return torch.where(near, values, torch.zeros_like(values)), near.any(dim=-1)


def _uphill(flat: Tensor, cell: Tensor, step: int, inside: Tensor) -> Tensor:
    """−1, 0 or 1 where ``inside``: on which side of the cell the neighbour ``step`` further is larger; else 0."""
    last = flat.shape[-1] - 1
    after = flat.gather(-1, (cell + step).clamp(max=last)[..., None])
    before = flat.gather(-1, (cell - step).clamp(min=0)[..., None])
    return torch.where(inside, (after - before)[..., 0].sign(), torch.zeros_like(flat[..., 0]))


def _sides(name: str, size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"heatmaps: {name} must be positive, got {size!r}")
    return height, width
