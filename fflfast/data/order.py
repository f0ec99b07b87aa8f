"""Data order and random crops, as pure functions of small integers.

Both draw the raw 64-bit output of Philox-4×64 (Salmon et al., SC 2011), a counter-based generator
whose bits NumPy guarantees: no state is kept, so that an epoch can be entered at any step and by
any number of workers.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["permutation", "random_resized_crop_boxes"]

_ORDER, _CROP = 0, 1
_ATTEMPTS = 10


def permutation(n: int, *, seed: int, epoch: int) -> Tensor:
    """Shuffle 0 … n − 1 as a function of (seed, epoch) alone.

    Args:
        n: number of items, ≥ 0.
        seed, epoch: 0 ≤ value < 2**63.

    Returns:
        int64 (n,), the same on every machine.
    """
    check_counter("n", n)
    # A stable sort keeps the result defined even where two draws are equal.
    return torch.from_numpy(np.argsort(_draw(n, seed, epoch, 0, 0, _ORDER), kind="stable"))


def random_resized_crop_boxes(
    index: Tensor,
    sizes: Tensor,
    *,
    seed: int,
    epoch: int,
    view: int = 0,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """Draw one box an image: a share of its area, then an aspect ratio, then a place.

    The share is uniform in ``scale``, the logarithm of width/height uniform in that of ``ratio``,
    the place uniform (Szegedy et al., arXiv 1409.4842). A box that does not fit is drawn again, ten
    times in all; then the largest central box with an allowed ratio is taken.

    Args:
        index: int64 (B,), each image's place in its data set.
        sizes: int64 (B, 2), heights and widths in pixels, ≥ 1.
        seed, epoch, view: ints ≥ 0.
        scale: 0 < smallest ≤ largest ≤ 1, shares of the area.
        ratio: 0 < smallest ≤ largest, width/height.

    Returns:
        int64 (B, 4): top, left, height, width.

    Raises:
        TypeError, ValueError: an argument of another shape, dtype or range.
    """
    for name, value in (("index", index), ("sizes", sizes)):
        if not isinstance(value, Tensor) or value.dtype != torch.int64:
            raise TypeError(f"{name}: expected an int64 tensor, got {getattr(value, 'dtype', type(value).__name__)}")
    if index.dim() != 1 or sizes.shape != (len(index), 2) or (sizes < 1).any() or (index < 0).any():
        raise ValueError(
            f"expected index ≥ 0 of shape (B,) and sizes ≥ 1 of shape (B, 2), got {tuple(index.shape)} and "
            f"{tuple(sizes.shape)}, smallest size {sizes.min().item() if sizes.numel() else None}"
        )
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale: expected 0 < smallest ≤ largest ≤ 1, got {scale}")
    if not 0 < ratio[0] <= ratio[1] < math.inf:
        raise ValueError(f"ratio: expected 0 < smallest ≤ largest, got {ratio}")
    boxes = [
        _crop_box(_draw(4 * _ATTEMPTS, seed, epoch, i, view, _CROP).tolist(), height, width, scale, ratio)
        for i, (height, width) in zip(index.tolist(), sizes.tolist(), strict=True)
    ]
    return torch.tensor(boxes, dtype=torch.int64, device="cpu").reshape(-1, 4)


def _crop_box(
    draws: list[int], height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    for attempt in range(_ATTEMPTS):
        share, shape, top, left = draws[4 * attempt : 4 * attempt + 4]
        area = height * width * (scale[0] + (scale[1] - scale[0]) * _unit(share))
        low, high = math.log(ratio[0]), math.log(ratio[1])
        # 16 fractional bits: a libm that differs in the last place still gives the same box.
        aspect = round(math.exp(low + (high - low) * _unit(shape)) * 65536) / 65536
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            return (
                top * (height - box_height + 1) >> 64,
                left * (width - box_width + 1) >> 64,
                box_height,
                box_width,
            )
    box_width = max(1, min(width, round(height * ratio[1])))
    box_height = max(1, min(height, round(width / ratio[0])))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def _unit(draw: int) -> float:
    return (draw >> 11) * 2.0**-53


def _draw(n: int, seed: int, epoch: int, index: int, view: int, stream: int) -> np.ndarray:
    for name, value in (("seed", seed), ("epoch", epoch), ("index", index), ("view", view)):
        check_counter(name, value)
    counter = np.array([0, index, view, stream], dtype=np.uint64)
    return np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64), counter=counter).random_raw(n)


def check_counter(name: str, value: int, least: int = 0) -> None:
    """Raise unless ``value`` is an int with least ≤ value < 2**63."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if not least <= value < 1 << 63:
        raise ValueError(f"{name}: expected {least} ≤ {name} < 2**63, got {value}")
