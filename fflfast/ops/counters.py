"""Random decisions of augmentation: a hash of small integers, in arithmetic that every device has."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

__all__ = [
    "CROP_LEFT",
    "CROP_TOP",
    "CUT_COLUMN",
    "CUT_ROW",
    "FLIP",
    "MIX_KIND",
    "MIX_RATIO",
    "ROTATION",
    "ZOOM",
    "below",
    "hash_words",
    "scaled",
    "word",
]

_MASK = 0xFFFFFFFF
# One stream of draws for each decision.
CROP_TOP, CROP_LEFT, FLIP, MIX_KIND, MIX_RATIO, CUT_ROW, CUT_COLUMN, ROTATION, ZOOM = range(9)


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


def hash_words(*words: int | Tensor) -> int | Tensor:
    """Hash 64-bit words, in order, to 32 bits."""
    state: int | Tensor = 0
    for word in words:
        for half in (word & _MASK, (word >> 32) & _MASK):
            state = _scramble(((state ^ half) + 0x9E3779B9) & _MASK)
    return state


def below(key: Tensor, stream: int, bound: int) -> Tensor:
    """Draw from 0 … bound − 1, bound < 2³¹, off uniform by less than bound · 2⁻³²; one draw a stream."""
    return scaled(cast(Tensor, hash_words(key, stream)), bound)


def scaled(draw: Tensor, bound: int | Tensor) -> Tensor:
    """Turn 32 random bits into a number from 0 … bound − 1, or 0 where bound is 0."""
    return (draw * bound) >> 32


def word(value: int | Tensor, name: str) -> int | Tensor:
    if isinstance(value, Tensor):
        if value.dim() or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name}: expected an int or a 0-dim integer tensor, got {describe(value)}")
        return value.to(torch.int64)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int or a 0-dim integer tensor, got {value!r}")
    if not 0 <= value < 1 << 63:
        raise ValueError(f"{name}: expected 0 ≤ {name} < 2**63, got {value}")
    return value


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} on {value.device}"
    return f"a {type(value).__name__}"
