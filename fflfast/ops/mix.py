"""Mixup and cutmix, in plain PyTorch: each image with its neighbour, as a function of (seed, epoch, step) alone.

Every decision is taken in integer arithmetic (`ops.counters`), the same on every device; nothing here waits for one.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .counters import CUT_COLUMN, CUT_ROW, MIX_KIND, MIX_RATIO, below, describe, hash_words, word

__all__ = ["mix", "prepare_mix"]

_RATIO_BITS = 12  # resolution of the mixing ratio: 4,096 equally likely values


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
        raise TypeError(f"images: expected float (B, C, H, W), got {describe(images)}; normalize uint8 images first")
    probs = _probabilities(target, images.shape[0], num_classes, images.device)
    for name, alpha in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
        if not 0 <= alpha <= 100:
            raise ValueError(f"{name}: expected 0 (off) to 100, got {alpha!r}")
    key = torch.zeros((), dtype=torch.int64, device=images.device)
    key = key + hash_words(word(seed, "seed"), word(epoch, "epoch"), word(step, "step"))
    if mixup_alpha > 0 and cutmix_alpha > 0:
        by_cut = below(key, MIX_KIND, 2).bool()
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
    for length, stream in ((height, CUT_ROW), (width, CUT_COLUMN)):
        extent = (side * length).long()
        start = below(key, stream, length) - extent // 2
        place = torch.arange(length, device=images.device)
        inside.append((place >= start) & (place < start + extent))
    box = inside[0][:, None] & inside[1]
    replaced = (box.sum() / max(height * width, 1)).to(probs.dtype)
    return torch.where(box, images.roll(1, 0), images), probs * (1 - replaced) + probs.roll(1, 0) * replaced


def prepare_mix(device: torch.device | str, *, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0) -> None:
    """Bring to a device what `mix` draws its ratios from, so that its first call waits for no copy either."""
    device = torch.empty(0, device=device).device  # with its index, as tensors have it
    for alpha in (mixup_alpha, cutmix_alpha):
        if alpha > 0:
            _beta_quantiles(float(alpha), device)


def _draw_ratio(key: Tensor, alpha: float) -> Tensor:
    # take, since indexing with a 0-dim tensor waits for the device.
    return _beta_quantiles(float(alpha), key.device).take(below(key, MIX_RATIO, 1 << _RATIO_BITS))


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
        raise ValueError(f"target: expected a tensor on {device} beside the images, got {describe(target)}")
    if target.is_floating_point() and target.shape == (batch, num_classes):
        return target
    if target.dtype != torch.int64 or target.shape != (batch,):
        raise ValueError(
            f"target: expected int64 ({batch},) or probabilities ({batch}, {num_classes}), got {describe(target)}"
        )
    valid = (target >= 0) & (target < num_classes)
    if device.type == "cpu" and not bool(valid.all()):
        raise ValueError(
            f"target: expected classes 0 … {num_classes - 1}, got {int(target[~valid][0])}; "
            "an ignored row cannot be mixed"
        )
    one_hot = (target[:, None] == torch.arange(num_classes, device=device)).to(torch.float32)
    return one_hot.masked_fill(~valid[:, None], torch.nan)
