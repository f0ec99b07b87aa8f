"""The Triton backend: one module an operator (`kernels.distill_loss`, …), which imports Triton; this one does not."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ..graph import DistillGraph
    from .offline import Case

__all__ = ["available", "interpreted", "offline_cases", "refuses", "refuses_augment", "refuses_fusion"]

# Pixels of a feature map are counted in 32 bits, tiles of them reach a little beyond the last.
MAX_PIXELS = 2**31 - 2**16


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels on CPU tensors: TRITON_INTERPRET=1 since before Triton's import."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def available() -> str | None:
    """None where the backend can run, else the reason why not."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if interpreted():
        return None
    import torch

    if torch.cuda.is_available() or torch.xpu.is_available():
        return None
    return "there is no GPU (TRITON_INTERPRET=1 runs the kernels on CPU tensors, slowly)"


def _refuses_device(device_type: str) -> str | None:
    if device_type in ("cuda", "xpu") or (device_type == "cpu" and interpreted()):
        return None
    return f"Triton has no kernels for {device_type} tensors"


def refuses(device_type: str, graph: DistillGraph) -> str | None:
    """None where the kernels take logits on such a device with this graph, else the reason in a few words."""
    from . import launch

    if (reason := _refuses_device(device_type)) is not None:
        return reason
    sizes = (graph.num_logits, graph.num_mixtures, len(graph.edges))
    limits = (launch.MAX_LOGITS, launch.MAX_MIXTURES, launch.MAX_EDGES)
    if any(size > limit for size, limit in zip(sizes, limits, strict=True)):
        found = "the graph has {} logits tensors, {} mixtures and {} edges".format(*sizes)
        return found + "; these kernels take at most {}, {} and {}".format(*limits)
    return None


def refuses_fusion(features: Sequence[Tensor]) -> str | None:
    """None where the kernels take such feature maps, else the reason in a few words."""
    batch, _, height, width = features[0].shape
    if batch * height * width > MAX_PIXELS:
        return f"B·H·W is {batch * height * width}; these kernels count pixels in 32 bits and take up to {MAX_PIXELS}"
    return _refuses_device(features[0].device.type)


def refuses_augment(images: Tensor) -> str | None:
    """None where the kernels take such images, else the reason in a few words."""
    batch, channels, height, width = images.shape
    # Numbers of one image, in the result and where its pixels lie, are counted in 32 bits; so are programs.
    numbers = 3 * height * width
    reach = sum((size - 1) * step for size, step in zip((channels, height, width), images.stride()[1:], strict=True))
    if max(numbers, reach, batch * -(-numbers // 256)) > MAX_PIXELS:
        return f"{batch} images of {height}×{width}, {reach + 1} bytes apart at most, are more than 32 bits can count"
    return _refuses_device(images.device.type)


def offline_cases() -> Iterator[Case]:
    """Every variant of every kernel, for a compilation without a device."""
    from .offline import cases

    return cases()
