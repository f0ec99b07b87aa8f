"""What is trained: cohorts from CIFAR's ResNet-32 to ResNet-50, each in the arithmetic that its users take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fflfast.training import TrainConfig

__all__ = ["Case", "cases"]


@dataclass(frozen=True)
class Case:
    """One cohort and how it computes.

    Attributes:
        label: of the cohort, as tables name it.
        arch: of the sub-networks.
        classes: of the networks; the images are synthetic, so that no file is needed and no disk in the way.
        data, image_size, batch_size: as `fflfast train` has them.
        amp: off, bf16 or fp16.
        channels_last: memory order of ours and of the floor.
        compile: whether to measure compiled sub-networks too.
        steps: timed steps of each variant.
        goals: what ours is to reach: ``times_naive`` at least, ``overhead_percent`` at most.
    """

    label: str
    arch: tuple[str, ...]
    classes: int
    data: str
    image_size: int
    batch_size: int
    amp: str
    channels_last: bool = True
    compile: bool = False
    steps: int = 200
    goals: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As files name it."""
        order = "channels_last" if self.channels_last else "nchw"
        return f"{self.label}, batch {self.batch_size}, {self.amp}, {order}{', compiled too' * self.compile}"

    def config(self, device: torch.device) -> TrainConfig:
        """Return what is trained."""
        return TrainConfig(
            data=self.data, image_size=self.image_size, arch=list(self.arch), method="ffl", batch_size=self.batch_size,
            amp=self.amp, channels_last=self.channels_last, compile=self.compile, device=str(device), epochs=1,
        )  # fmt: skip

    @property
    def columns(self) -> dict[str, Any]:
        """Its columns in the results."""
        return {
            "case": self.name,
            "arch": " ".join(self.arch),
            "classes": self.classes,
            "image_size": self.image_size,
            "batch": self.batch_size,
            "goal_times_naive": self.goals.get("times_naive", ""),
            "goal_overhead_percent": self.goals.get("overhead_percent", ""),
        }


_SMALL = ("2 × ResNet-32, shared trunk", ("resnet32", "resnet32"), 100, "synthetic", 32)
_RESNET32 = (*_SMALL, 128)
_WRN = ("4 × WRN-16-2, shared trunk", ("wrn_16_2",) * 4, 100, "synthetic", 32, 128)
_RESNET18 = ("2 × ResNet-18", ("torchvision/resnet18",) * 2, 1000, "synthetic-imagenet", 224, 256)
_RESNET50 = ("2 × ResNet-50", ("torchvision/resnet50",) * 2, 1000, "synthetic-imagenet", 224, 256)
_UNLIKE = (
    "ResNet-50 + MobileNetV3",
    ("torchvision/resnet50", "torchvision/mobilenet_v3_large"),
    1000,
    "synthetic-imagenet",
    224,
    256,
)

_CPU = (
    Case(*_RESNET32, "off", steps=20, goals={"times_naive": 1.4, "overhead_percent": 6}),
    Case(*_RESNET32, "bf16", steps=20, goals={"times_naive": 2.2, "overhead_percent": 6}),
)
_GPU = (
    Case(*_RESNET32, "off", goals={"overhead_percent": 10}),
    Case(*_RESNET32, "bf16", goals={"times_naive": 10, "overhead_percent": 10}),
    Case(*_RESNET32, "bf16", channels_last=False),
    Case(*_RESNET32, "fp16"),
    Case(*_WRN, "bf16"),
    Case(*_RESNET18, "bf16", steps=50),
    Case(*_RESNET50, "bf16", steps=30, goals={"overhead_percent": 3}),
    Case(*_UNLIKE, "bf16", steps=30),
    # From a batch that is all launches to one that fills the device.
    *(Case(*_SMALL, batch, "bf16", steps=50) for batch in (32, 512, 2048)),
    # Last: compiling takes minutes.
    Case(*_RESNET32, "bf16", compile=True),
    Case(*_RESNET18, "bf16", compile=True, steps=30),
)


def cases(device: torch.device) -> Sequence[Case]:
    """Return what is measured on a device: everything on a GPU, what ends within minutes elsewhere."""
    return _GPU if device.type == "cuda" else _CPU
