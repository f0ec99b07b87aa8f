"""What is measured of the fusion: sizes of its users, each with the least bytes and multiplications that it needs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .floor import copy_rate, matrix_rate

__all__ = ["CPU_CASES", "GPU_CASES", "FusionCase", "FusionData", "fusion_cases_for"]


class FusionData(NamedTuple):
    """One set of inputs: feature maps that require grad, and the gradient of the pooled features."""

    features: list[Tensor]
    grad: Tensor

    @property
    def arguments(self) -> tuple[list[Tensor]]:
        return (self.features,)

    @property
    def leaves(self) -> list[Tensor]:
        return self.features


@dataclass(frozen=True)
class FusionCase:
    """N feature maps (batch, channels, size, size) to pooled features (batch, channels).

    Attributes:
        channels_last: the memory order of the feature maps; NCHW otherwise.
        tuned: whether torch.compile is also given the time to tune its kernels, where it has any.
    """

    batch: int
    maps: int
    channels: int
    size: int
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    tuned: bool = False

    @property
    def layout(self) -> str:
        return "channels_last" if self.channels_last else "nchw"

    @property
    def name(self) -> str:
        sizes = "x".join(map(str, (self.batch, self.maps, self.channels, self.size)))
        return f"fusion-{sizes}-{self.layout}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def columns(self) -> dict[str, Any]:
        """What the rows of this case have in common."""
        return {
            "case": self.name, "batch": self.batch, "maps": self.maps, "channels": self.channels, "size": self.size,
            "layout": self.layout, "dtype": str(self.dtype).removeprefix("torch."),
        }  # fmt: skip

    @property
    def values(self) -> int:
        """P, values of a channel in the batch."""
        return self.batch * self.size**2

    @property
    def total_channels(self) -> int:
        return self.maps * self.channels

    @property
    def bytes_of_inputs(self) -> int:
        """A."""
        return self.values * self.total_channels * self.dtype.itemsize

    def minimal_bytes(self, mode: str) -> int:
        """With Y the bytes of the pointwise output, weights left out.

        Forward: the statistics of each norm wait for the whole batch, so x is read twice, y is written and read:
        2 A + 2 Y, which is 3 A for two maps. Backward: x and y are read for the sums of the first norm and again for
        dx, which is written: 3 A + 2 Y (4 A). Inference reads x once.
        """
        a, y = self.bytes_of_inputs, self.values * self.channels * self.dtype.itemsize
        return {
            "forward": 2 * a + 2 * y, "backward": 3 * a + 2 * y, "forward+backward": 5 * a + 4 * y, "inference": a
        }[mode]  # fmt: skip

    def flops(self, mode: str) -> int:
        """Multiplications and additions: the pointwise product and the depthwise convolution, each twice backward."""
        once = 2 * self.values * self.total_channels * (self.channels + 9)
        return once * {"forward": 1, "backward": 2, "forward+backward": 3, "inference": 1}[mode]

    def floors(self, device: torch.device) -> dict[str, dict[str, Any]]:
        """By mode: the time of a copy of the least bytes, of the products at the rate of torch.mm, and the larger."""
        shape = (self.batch, self.channels, self.size, self.size)
        bytes_rate = copy_rate([shape] * self.maps, self.dtype, device)
        flop_rate = matrix_rate(self.values, self.total_channels, self.channels, self.dtype, device)
        floors = {}
        for mode in ("forward+backward", "forward", "backward", "inference"):
            copy, product = self.minimal_bytes(mode) / bytes_rate, self.flops(mode) / flop_rate
            floors[mode] = {
                "minimal_mb": self.minimal_bytes(mode) / 1e6, "gflop": self.flops(mode) / 1e9, "copy_ms": 1e3 * copy,
                "product_ms": 1e3 * product, "floor_ms": 1e3 * max(copy, product),
                "bound": "bytes" if copy >= product else "product",
            }  # fmt: skip
        return floors

    def draw(self, device: torch.device, seed: int = 0) -> FusionData:
        """Feature maps as networks make them, after a ReLU."""
        generator = torch.Generator(device).manual_seed(seed)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        features = []
        for _ in range(self.maps):
            x = torch.empty(
                self.batch, self.channels, self.size, self.size, dtype=self.dtype, device=device, memory_format=layout
            )
            features.append(x.normal_(generator=generator).relu_().requires_grad_())
        grad = torch.empty(self.batch, self.channels, dtype=self.dtype, device=device)
        return FusionData(features, grad.normal_(generator=generator))


_LAYOUTS = (False, True)
CPU_CASES = tuple(
    FusionCase(*sizes, channels_last=layout)
    for sizes, layout in itertools.product(
        ((128, 2, 64, 8), (32, 2, 512, 7), (8, 3, 2048, 7), (32, 2, 64, 32)), _LAYOUTS
    )
)

_GPU_SIZES = ((128, 2, 64, 8), (256, 2, 512, 7), (1024, 2, 512, 7), (256, 3, 2048, 7))
GPU_CASES = (
    *(
        FusionCase(*sizes, torch.bfloat16, layout, tuned=layout and sizes in _GPU_SIZES[::2])
        for sizes, layout in itertools.product(_GPU_SIZES, _LAYOUTS)
    ),
    FusionCase(*_GPU_SIZES[1], torch.float16, True),
    *(FusionCase(*sizes, torch.float32, True) for sizes in _GPU_SIZES[:2]),
)


def fusion_cases_for(device: torch.device) -> tuple[FusionCase, ...]:
    """The cases of a kind of device."""
    return CPU_CASES if device.type == "cpu" else GPU_CASES
