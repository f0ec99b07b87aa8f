"""The channels-last memory order of a learner, with the convolutions that it does not suit on a CPU left out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["to_channels_last"]

_FEWEST_CHANNELS = 16


def to_channels_last(module: nn.Module, device: torch.device) -> None:
    """Bring weights to channels-last order, in place; images in that order then keep it through the network.

    On a CPU, 1×1 convolutions that stride and read fewer than 16 channels stay in the other order. In torch 2.10 to
    2.14 with AVX-512 their backward in channels-last order writes beyond its memory from images of some 64 pixels on.
    """
    module.to(memory_format=torch.channels_last)
    for part in module.modules() if device.type == "cpu" else ():
        if isinstance(part, nn.Conv2d) and _is_unsafe(part):
            # The strides of such a weight, of which both orders would do, decide the order of the result.
            part.weight.data = part.weight.data.flatten().view(part.weight.shape)
            part.register_forward_pre_hook(_contiguous)


def _is_unsafe(convolution: nn.Conv2d) -> bool:
    few = convolution.in_channels // convolution.groups < _FEWEST_CHANNELS
    return few and tuple(convolution.kernel_size) == (1, 1) and max(convolution.stride) > 1


def _contiguous(convolution: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    images: Tensor = arguments[0]
    return (images.contiguous(), *arguments[1:])
