"""What is measured of the augmentation: batches of its users, each with the least bytes that it can move."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fflfast.ops.augment import normalization_table

from .floor import copy_rate

__all__ = ["CPU_CASES", "GPU_CASES", "MEAN", "STD", "AugmentCase", "AugmentData", "augment_cases_for"]

# Of CIFAR-100's training images, in units of pixel values.
MEAN, STD = (129.3, 124.1, 112.4), (68.2, 65.4, 70.4)


@dataclass(frozen=True)
class AugmentData:
    """One batch: images, their places in the data set, and the epoch, a number on the device as the trainer has it."""

    images: Tensor
    index: Tensor
    epoch: Tensor

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.images, self.index, self.epoch

    @property
    def leaves(self) -> list[Tensor]:
        return [self.images]

    @property
    def grad(self) -> None:
        return None


@dataclass(frozen=True)
class AugmentCase:
    """uint8 images (batch, 3, size, size) to normalised ones of the same size.

    Attributes:
        pad: largest shift in pixels; 0 only mirrors.
        dtype: of the result.
        channels_last: the memory order of the result; NCHW otherwise.
        tuned: whether torch.compile is also given the time to tune its kernels, where it has any.
    """

    batch: int
    size: int
    pad: int = 4
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    tuned: bool = False

    @property
    def layout(self) -> str:
        return "channels_last" if self.channels_last else "nchw"

    @property
    def name(self) -> str:
        precision = str(self.dtype).removeprefix("torch.")
        return f"augment-{self.batch}x{self.size}-pad{self.pad}-{self.layout}-{precision}"

    @property
    def columns(self) -> dict[str, Any]:
        """What the rows of this case have in common."""
        return {
            "case": self.name, "batch": self.batch, "size": self.size, "pad": self.pad, "layout": self.layout,
            "dtype": str(self.dtype).removeprefix("torch."),
        }  # fmt: skip

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, 3, self.size, self.size

    @property
    def bytes_of_inputs(self) -> int:
        return self.batch * 3 * self.size**2

    @property
    def minimal_bytes(self) -> int:
        """Each pixel read once as a byte and written once in the result's dtype; tables and indices left out."""
        return self.bytes_of_inputs * (1 + self.dtype.itemsize)

    def floors(self, device: torch.device) -> dict[str, dict[str, float]]:
        """The time of a copy of the least bytes."""
        rate = copy_rate([self.shape], self.dtype, device)
        return {"forward": {"minimal_mb": self.minimal_bytes / 1e6, "copy_ms": 1e3 * self.minimal_bytes / rate}}

    def table(self, device: torch.device) -> Tensor:
        """The table of ours: normalised values in the result's dtype."""
        return normalization_table(MEAN, STD).to(device, self.dtype)

    def draw(self, device: torch.device, seed: int = 0) -> AugmentData:
        """Random pixels, and images from all over a data set of 50,000."""
        generator = torch.Generator(device).manual_seed(seed)
        images = torch.randint(256, self.shape, generator=generator, dtype=torch.uint8, device=device)
        index = torch.randint(50_000, (self.batch,), generator=generator, device=device)
        return AugmentData(images, index, torch.full((), 7, dtype=torch.int64, device=device))


# Both ends of what the trainer asks for: float32 NCHW, and what a GPU's networks get by default.
_RESULTS = ((torch.float32, False), (torch.bfloat16, True))

CPU_CASES = (
    AugmentCase(128, 32),
    AugmentCase(128, 32, dtype=torch.bfloat16, channels_last=True),
    AugmentCase(1024, 32),
    AugmentCase(16, 224),
)
GPU_CASES = (
    *(
        AugmentCase(batch, size, dtype=dtype, channels_last=layout, tuned=layout and batch != 1024)
        for (batch, size), (dtype, layout) in itertools.product(
            ((128, 32), (1024, 32), (8192, 32), (256, 224)), _RESULTS
        )
    ),
    AugmentCase(256, 224, dtype=torch.bfloat16),
    # As ImageNet is trained here: images come cropped.
    AugmentCase(256, 224, pad=0, dtype=torch.bfloat16, channels_last=True),
)


def augment_cases_for(device: torch.device) -> tuple[AugmentCase, ...]:
    """The cases of a kind of device."""
    return CPU_CASES if device.type == "cpu" else GPU_CASES
