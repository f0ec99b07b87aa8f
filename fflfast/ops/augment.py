"""Augmentation of uint8 image batches: pad-reflect, crop, flip, normalise, mixup and cutmix, in
plain PyTorch.

Every random decision is a pure function of small integers: (seed, epoch, index, view) for what
happens to one image, (seed, epoch, step) for what happens to a batch. It is taken in integer
arithmetic, and pixels become floats through a table, so that the device, the composition of a batch
and the number of workers change nothing. Nothing here waits for a device; seed, epoch, view and
step may be ints or 0-dim integer tensors, which also work under a captured CUDA graph.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

__all__ = ["augment", "mix", "normalization_table", "normalize"]

_MASK = 0xFFFFFFFF
_CROP_TOP, _CROP_LEFT, _FLIP, _MIX_KIND, _MIX_RATIO, _CUT_ROW, _CUT_COLUMN = range(7)
_RATIO_BITS = 12  # resolution of the mixing ratio: 4,096 equally likely values


def augment(
    images: Tensor,
    index: Tensor,
    *,
    seed: int | Tensor,
    epoch: int | Tensor,
    view: int | Tensor = 0,
    pad: int = 4,
    flip: bool = True,
    table: Tensor,
) -> Tensor:
    """Shift each image by up to ``pad`` pixels (reflected at the border), flip half of them and normalise.

    That is: pad by reflection, crop back to H × W at a uniformly drawn offset, mirror left-right
    with probability 1/2.

    Args:
        images: uint8 (B, C, H, W), C = 3, or 1, which is repeated to three channels.
        index: int64 (B,), each image's place in its data set; draws its randomness, so that it does
            not depend on which other images share the batch.
        seed, epoch, view: ints ≥ 0 or 0-dim integer tensors. Views of one image differ by ``view``.
        pad: largest shift in pixels, 0 ≤ pad < min(H, W). 0 crops nothing.
        flip: whether to mirror.
        table: float32 (256, 3), see `normalization_table`.

    Returns:
        float32 (B, 3, H, W), the same bytes on every device.

    Raises:
        TypeError, ValueError: an argument of another type, shape, dtype or range.
    """
    _check_images(images)
    _check_table(table)
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.shape != images.shape[:1]:
        raise ValueError(f"index: expected int64 ({images.shape[0]},), one per image, got {_describe(index)}")
    if index.device != images.device:
        raise ValueError(f"index is on {index.device} but images on {images.device}; move both to one device")
    height, width = images.shape[-2:]
    if isinstance(pad, bool) or not isinstance(pad, int):
        raise TypeError(f"pad: expected an int, got {pad!r}")
    if not 0 <= pad < max(min(height, width), 1):
        raise ValueError(
            f"pad: expected 0 ≤ pad < {min(height, width)} for {height}×{width} images, since reflection "
            f"cannot add more than it has, got {pad}; choose a smaller pad or larger images"
        )
    key = cast(Tensor, _hash(_word(seed, "seed"), _word(epoch, "epoch"), index, _word(view, "view")))
    flipped = _below(key, _FLIP, 2).bool() if flip else None
    if pad == 0:
        if flipped is not None:
            images = torch.where(flipped[:, None, None, None], images.flip(3), images)
        return normalize(images, table)
    row = torch.arange(height, device=images.device).expand(images.shape[0], -1)
    column = torch.arange(width, device=images.device).expand(images.shape[0], -1)
    if flipped is not None:
        column = torch.where(flipped[:, None], width - 1 - column, column)
    row = _reflect(row + (_below(key, _CROP_TOP, 2 * pad + 1) - pad)[:, None], height)
    column = _reflect(column + (_below(key, _CROP_LEFT, 2 * pad + 1) - pad)[:, None], width)
    source = (row[:, :, None] * width + column[:, None, :]).flatten(1)
    moved = images.flatten(2).gather(2, source[:, None].expand(-1, images.shape[1], -1))
    return normalize(moved.view(images.shape), table)


def normalize(images: Tensor, table: Tensor) -> Tensor:
    """Turn uint8 images into normalised floats through a table: what evaluation does in place of
    `augment`.

    Args:
        images: uint8 (B, C, H, W), C = 3, or 1, which is repeated to three channels.
        table: float32 (256, 3), see `normalization_table`; another floating dtype is kept.

    Returns:
        (B, 3, H, W) in the table's dtype.

    Raises:
        TypeError, ValueError: an argument of another type, shape or dtype.
    """
    _check_images(images)
    _check_table(table)
    if table.device != images.device:
        raise ValueError(f"table is on {table.device} but images on {images.device}; move both to one device")
    # One flat lookup: channel c reads rows 256·c … 256·c+255 of the transposed table.
    offset = torch.arange(0, 768, 256, dtype=torch.int32, device=images.device).view(3, 1, 1)
    place = images.to(torch.int32) + offset
    return table.t().flatten().index_select(0, place.flatten()).view(place.shape)


def normalization_table(mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Tabulate (v − mean_c) / std_c for every pixel value v = 0 … 255.

    Args:
        mean, std: three numbers each, in units of pixel values (0 … 255), std > 0.

    Returns:
        float32 (256, 3) on the CPU, computed in float64 and rounded once.

    Raises:
        ValueError: not three finite numbers, or a std that is not positive.
    """
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"mean, std: expected 3 numbers each (R, G, B), got {len(mean)} and {len(std)}")
    if not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        raise ValueError(f"mean, std: expected finite numbers and std > 0, got {tuple(mean)} and {tuple(std)}")
    value = torch.arange(256, dtype=torch.float64, device="cpu")[:, None]
    centre, width = torch.tensor([tuple(mean), tuple(std)], dtype=torch.float64, device="cpu")
    return ((value - centre) / width).to(torch.float32)


def mix(
    images: Tensor,
    target: Tensor,
    num_classes: int,
    *,
    seed: int | Tensor,
    epoch: int | Tensor,
    step: int | Tensor,
    mixup_alpha: float = 0.0,
    cutmix_alpha: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Mix each image and target of a batch with those of its neighbour, by mixup or by cutmix.

    One ratio r ~ Beta(alpha, alpha) is drawn for the whole batch; image b meets image b − 1 (the
    first meets the last). Mixup (Zhang et al., arXiv 1710.09412): x ← r·x + (1 − r)·x', y ← r·y +
    (1 − r)·y'. Cutmix (Yun et al., arXiv 1905.04899): a box of about (1 − r)·H·W pixels comes from
    x', and y takes the exact shares of the pixels. With both alphas positive each batch takes one
    of them with probability 1/2; with none, images stay and targets become probabilities. Calls
    with the same (seed, epoch, step) take the same decisions, so that N views stay aligned.

    Args:
        images: float (B, C, H, W).
        target: int64 (B,) class indices, or float (B, num_classes) probabilities.
        num_classes: K > 0.
        seed, epoch, step: ints ≥ 0 or 0-dim integer tensors.
        mixup_alpha, cutmix_alpha: 0 (off) to 100. The ratio takes 4,096 values, the midpoint quantiles of the
            distribution, so that it needs no rejection loop and no wait for a device.

    Returns:
        images (B, C, H, W) in their dtype and probabilities (B, num_classes), float32 for class indices.

    Raises:
        TypeError, ValueError: an argument of another type, shape, dtype or range. A class index out
            of range raises on the CPU and makes its own row NaN on other devices, where looking
            would wait for the device.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.dim() != 4:
        raise TypeError(f"images: expected float (B, C, H, W), got {_describe(images)}; normalize uint8 images first")
    probs = _probabilities(target, images.shape[0], num_classes, images.device)
    for name, alpha in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
        if not 0 <= alpha <= 100:
            raise ValueError(f"{name}: expected 0 (off) to 100, got {alpha!r}")
    key = torch.zeros((), dtype=torch.int64, device=images.device)
    key = key + _hash(_word(seed, "seed"), _word(epoch, "epoch"), _word(step, "step"))
    if mixup_alpha > 0 and cutmix_alpha > 0:
        by_cut = _below(key, _MIX_KIND, 2).bool()
        mixed = _mixup(images, probs, key, mixup_alpha)
        cut = _cutmix(images, probs, key, cutmix_alpha)
        return torch.where(by_cut, cut[0], mixed[0]), torch.where(by_cut, cut[1], mixed[1])
    if mixup_alpha > 0:
        return _mixup(images, probs, key, mixup_alpha)
    if cutmix_alpha > 0:
        return _cutmix(images, probs, key, cutmix_alpha)
    return images, probs


def _mixup(images: Tensor, probs: Tensor, key: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    ratio = _draw_ratio(key, alpha)
    return _blend(images, ratio), _blend(probs, ratio)


def _blend(values: Tensor, ratio: Tensor) -> Tensor:
    # Both factors are exact multiples of 2⁻¹⁶ and the products are rounded apart, so devices agree
    # in eager mode.
    ratio = ratio.to(values.dtype)
    return values * ratio + values.roll(1, 0) * (1 - ratio)


def _cutmix(images: Tensor, probs: Tensor, key: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    height, width = images.shape[-2:]
    side = (1 - _draw_ratio(key, alpha)).sqrt()
    inside = []
    for length, stream in ((height, _CUT_ROW), (width, _CUT_COLUMN)):
        extent = (side * length).long()
        start = _below(key, stream, length) - extent // 2
        place = torch.arange(length, device=images.device)
        inside.append((place >= start) & (place < start + extent))
    box = inside[0][:, None] & inside[1]
    replaced = (box.sum() / max(height * width, 1)).to(probs.dtype)
    return torch.where(box, images.roll(1, 0), images), probs * (1 - replaced) + probs.roll(1, 0) * replaced


def _draw_ratio(key: Tensor, alpha: float) -> Tensor:
    # take, since indexing with a 0-dim tensor waits for the device.
    return _beta_quantiles(float(alpha), key.device).take(_below(key, _MIX_RATIO, 1 << _RATIO_BITS))


@functools.lru_cache(maxsize=16)
def _beta_quantiles(alpha: float, device: torch.device) -> Tensor:
    """Return the midpoint quantiles of Beta(alpha, alpha), float32 (4096,), rounded to multiples of 2⁻¹⁶.

    On t ≤ 1/2 the density t^(alpha−1)·(1−t)^(alpha−1) dt is integrated by the trapezoidal rule, over
    s = t^alpha where alpha < 1, which takes its pole at 0 away; the other half follows by symmetry.
    """
    power = min(alpha, 1.0)
    s = torch.linspace(0, 0.5**power, (1 << 14) + 1, dtype=torch.float64, device="cpu")
    density = s ** (alpha / power - 1) * (1 - s ** (1 / power)) ** (alpha - 1)
    mass = torch.cumulative_trapezoid(density, s)
    mass = torch.cat([mass.new_zeros(1), mass / mass[-1] / 2])
    count = 1 << _RATIO_BITS
    wanted = (torch.arange(count // 2, dtype=torch.float64, device="cpu") + 0.5) / count
    right = torch.searchsorted(mass, wanted).clamp(1, len(mass) - 1)
    share = (wanted - mass[right - 1]) / (mass[right] - mass[right - 1])
    lower = torch.lerp(s[right - 1], s[right], share) ** (1 / power)
    return torch.cat([lower, 1 - lower.flip(0)]).mul(65536).round().div(65536).to(device, torch.float32)


def _probabilities(target: Tensor, batch: int, num_classes: int, device: torch.device) -> Tensor:
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes: expected an int ≥ 1, got {num_classes!r}")
    if not isinstance(target, Tensor) or target.device != device:
        raise ValueError(f"target: expected a tensor on {device} beside the images, got {_describe(target)}")
    if target.is_floating_point() and target.shape == (batch, num_classes):
        return target
    if target.dtype != torch.int64 or target.shape != (batch,):
        raise ValueError(
            f"target: expected int64 ({batch},) or probabilities ({batch}, {num_classes}), got {_describe(target)}"
        )
    valid = (target >= 0) & (target < num_classes)
    if device.type == "cpu" and not bool(valid.all()):
        raise ValueError(
            f"target: expected classes 0 … {num_classes - 1}, got {int(target[~valid][0])}; "
            "an ignored row cannot be mixed"
        )
    one_hot = (target[:, None] == torch.arange(num_classes, device=device)).to(torch.float32)
    return one_hot.masked_fill(~valid[:, None], torch.nan)


def _reflect(place: Tensor, length: int) -> Tensor:
    return (length - 1) - ((length - 1) - place.abs()).abs()


def _scramble(x: int | Tensor) -> int | Tensor:
    """Mix 32 bits held in an int64: the bijection [16 21f0aaad 15 735a2d97 15] of
    github.com/skeeto/hash-prospector.

    Both multipliers are below 2³¹, so no product of the chain leaves the positive int64 range, and
    a kernel may do the same in uint32.
    """
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & _MASK
    return x ^ (x >> 15)


def _hash(*words: int | Tensor) -> int | Tensor:
    """Hash 64-bit words, in order, to 32 bits."""
    state: int | Tensor = 0
    for word in words:
        for half in (word & _MASK, (word >> 32) & _MASK):
            state = _scramble(((state ^ half) + 0x9E3779B9) & _MASK)
    return state


def _below(key: Tensor, stream: int, bound: int) -> Tensor:
    """Draw from 0 … bound − 1, bound < 2³¹, off uniform by less than bound · 2⁻³²; one draw a stream."""
    return cast(Tensor, (_hash(key, stream) * bound) >> 32)


def _word(value: int | Tensor, name: str) -> int | Tensor:
    if isinstance(value, Tensor):
        if value.dim() or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name}: expected an int or a 0-dim integer tensor, got {_describe(value)}")
        return value.to(torch.int64)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int or a 0-dim integer tensor, got {value!r}")
    if not 0 <= value < 1 << 63:
        raise ValueError(f"{name}: expected 0 ≤ {name} < 2**63, got {value}")
    return value


def _check_images(images: Tensor) -> None:
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        raise TypeError(f"images: expected uint8 (B, C, H, W), got {_describe(images)}")
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images: expected (B, C, H, W) with 1 or 3 channels, got {_describe(images)}")


def _check_table(table: Tensor) -> None:
    if not isinstance(table, Tensor) or not table.is_floating_point() or table.shape != (256, 3):
        raise ValueError(f"table: expected float (256, 3) from normalization_table(), got {_describe(table)}")


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} on {value.device}"
    return f"a {type(value).__name__}"
