"""The operator fflfast::augment: pad-reflect, crop, flip and normalise batches of uint8 images.

Every random decision is a pure function of small integers: (seed, epoch, index, view) for what happens to one image,
(seed, epoch, step) for what happens to a batch (`mix`). It is taken in integer arithmetic, and pixels become floats
through a table, so that the device, the backend, the composition of a batch and the number of workers change nothing.
Nothing here waits for a device; seed, epoch, view and step may be ints or 0-dim integer tensors, which also work under
a captured CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import augment_reference
from .backends import Implementation, choose, forced_backend
from .counters import describe, word
from .mix import mix
from .tracing import is_exported, is_traced, is_transformed

__all__ = ["IMPLEMENTATIONS", "augment", "mix", "normalization_table", "normalize"]


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
    channels_last: bool = False,
) -> Tensor:
    """Shift each image by up to ``pad`` pixels (reflected at the border), flip half of them and normalise.

    That is: pad by reflection, crop back to H × W at a uniformly drawn offset, mirror left-right
    with probability 1/2.

    Args:
        images: uint8 (B, C, H, W), C = 3, or 1, which is repeated to three channels.
        index: int64 (B,), each image's place in its data set; draws its randomness, so that it does
            not depend on which other images share the batch.
        seed, epoch, view: ints ≥ 0, or 0-dim integer tensors on the CPU or beside the images. Views of one image
            differ by ``view``.
        pad: largest shift in pixels, 0 ≤ pad < min(H, W). 0 crops nothing.
        flip: whether to mirror.
        table: float (256, 3), see `normalization_table`; its dtype is that of the result.
        channels_last: write the result in channels-last memory order.

    Returns:
        (B, 3, H, W) in the table's dtype, the same bytes on every device and backend.

    Raises:
        TypeError, ValueError: an argument of another type, shape, dtype, device or range, or a forced backend that
            does not take the call.
    """
    _check_images(images)
    _check_table(table, images)
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.shape != images.shape[:1]:
        raise ValueError(f"index: expected int64 ({images.shape[0]},), one per image, got {describe(index)}")
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
    words = (word(seed, "seed"), word(epoch, "epoch"), word(view, "view"))
    for value in words:
        if isinstance(value, Tensor) and value.device != images.device and not value.is_cpu:
            raise ValueError(f"seed, epoch, view: expected ints or tensors on {images.device}, got {describe(value)}")
    if is_exported() or is_transformed((images,)):
        return augment_reference.augment(images, index, *words, pad, flip, table, channels_last)
    if is_traced(images):
        one = torch.ones((), dtype=torch.int64, device=images.device)
        tensors = (value if isinstance(value, Tensor) else one * value for value in words)
        return torch.ops.fflfast.augment(images, index, *tensors, pad, flip, table, channels_last)
    return _choose(images).functions["augment"](images, index, *words, pad, flip, table, channels_last)


def normalize(images: Tensor, table: Tensor, *, channels_last: bool = False) -> Tensor:
    """Turn uint8 images into normalised floats through a table: what evaluation does in place of
    `augment`.

    Args:
        images: uint8 (B, C, H, W), C = 3, or 1, which is repeated to three channels.
        table: float (256, 3), see `normalization_table`; its dtype is that of the result.
        channels_last: write the result in channels-last memory order.

    Returns:
        (B, 3, H, W) in the table's dtype.

    Raises:
        TypeError, ValueError: an argument of another type, shape or dtype, or a forced backend that does not take the
            call.
    """
    _check_images(images)
    _check_table(table, images)
    if is_traced(images) or is_transformed((images,)):
        return augment_reference.normalize(images, table, channels_last)
    return _choose(images).functions["normalize"](images, table, channels_last)


def normalization_table(mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Tabulate (v − mean_c) / std_c for every pixel value v = 0 … 255.

    Args:
        mean, std: three numbers each, in units of pixel values (0 … 255), std > 0.

    Returns:
        float32 (256, 3) on the CPU, computed in float64 and rounded once. A channel's values are adjacent in memory.

    Raises:
        ValueError: not three finite numbers, or a std that is not positive.
    """
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"mean, std: expected 3 numbers each (R, G, B), got {len(mean)} and {len(std)}")
    if not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        raise ValueError(f"mean, std: expected finite numbers and std > 0, got {tuple(mean)} and {tuple(std)}")
    value = torch.arange(256, dtype=torch.float64, device="cpu")
    centre, width = torch.tensor([tuple(mean), tuple(std)], dtype=torch.float64, device="cpu")[..., None]
    return ((value - centre) / width).to(torch.float32).t()


# ---- backends -------------------------------------------------------------------------------------------------


def _triton(name: str) -> Callable[..., Tensor]:
    """A function of a module that is imported when first used: not every machine has Triton."""

    def run(*arguments: Any) -> Tensor:
        from ..kernels import augment

        return getattr(augment, name)(*arguments)

    return run


def _triton_refuses(images: Tensor) -> str | None:
    from .. import kernels  # when first asked for

    if images.is_cpu and forced_backend() != "triton":
        return "Triton's interpreter is for tests, which force it"
    return kernels.available() or kernels.refuses_augment(images)


IMPLEMENTATIONS: dict[str, Implementation] = {
    "triton": Implementation({name: _triton(name) for name in ("augment", "normalize")}, _triton_refuses),
    "reference": Implementation(
        {"augment": augment_reference.augment, "normalize": augment_reference.normalize}, lambda images: None
    ),
}


def _choose(images: Tensor) -> Implementation:
    # An empty batch has nothing for a kernel to do: it is no reason to refuse a forced backend.
    return choose("augment", IMPLEMENTATIONS, images) if images.numel() else IMPLEMENTATIONS["reference"]


# ---- registered route -----------------------------------------------------------------------------------------

_library = torch.library.Library("fflfast", "FRAGMENT")
_library.define(
    "augment(Tensor images, Tensor index, Tensor seed, Tensor epoch, Tensor view, int pad, bool flip, Tensor table, "
    "bool channels_last) -> Tensor"
)


def _augment_op(images: Tensor, *arguments: Any) -> Tensor:
    return _choose(images).functions["augment"](images, *arguments)


def _fake_augment(images: Tensor, *arguments: Any) -> Tensor:
    *_, table, channels_last = arguments
    batch, _, height, width = images.shape
    order = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((batch, 3, height, width), dtype=table.dtype, device=images.device, memory_format=order)


_library.impl("augment", _augment_op, "CompositeExplicitAutograd")
torch.library.register_fake("fflfast::augment", _fake_augment, lib=_library)


# ---- checks ---------------------------------------------------------------------------------------------------


def _check_images(images: Tensor) -> None:
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        raise TypeError(f"images: expected uint8 (B, C, H, W), got {describe(images)}")
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images: expected (B, C, H, W) with 1 or 3 channels, got {describe(images)}")


def _check_table(table: Tensor, images: Tensor) -> None:
    if not isinstance(table, Tensor) or not table.is_floating_point() or table.shape != (256, 3):
        raise ValueError(f"table: expected float (256, 3) from normalization_table(), got {describe(table)}")
    if table.device != images.device:
        raise ValueError(f"table is on {table.device} but images on {images.device}; move both to one device")
    if table.requires_grad:
        raise ValueError("table: expected no gradient to be asked for, which a lookup in it does not give; detach it")
