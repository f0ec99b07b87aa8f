"""Wide residual networks for small images (Zagoruyko and Komodakis, "Wide Residual Networks", 2016)."""

from __future__ import annotations

from fractions import Fraction

import torch.nn.functional as F
from torch import Tensor, nn

from .base import SubNetwork, init_weights, scaled

__all__ = ["WideResNet"]


class PreActivationBlock(nn.Module):
    """BN → ReLU → conv, twice; where the shape changes the shortcut is a 1×1 convolution of the first ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        changes = stride != 1 or in_channels != channels
        self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x), inplace=True)
        y = self.conv2(F.relu(self.bn2(self.conv1(active)), inplace=True))
        return y + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(SubNetwork):
    """WRN-``depth``-``widening``: depth = 6n + 4, n pre-activation blocks in each of three stages.

    ``width`` scales the stages' channels, see `scaled`, but not the stem. A stage's output is the sum before the
    next batch norm and ReLU, which the next block applies itself.
    """

    default_split = "layer3"
    head_names = ("fc",)
    stage_names = ("layer1", "layer2", "layer3")

    def __init__(self, num_classes: int, depth: int, widening: int, *, width: Fraction = Fraction(1)) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"a wide ResNet's depth must be 6n + 4 (10, 16, 22, …), got {depth}")
        out = [scaled(channels * widening, width) for channels in (16, 32, 64)]
        self.num_classes = num_classes
        self.feature_channels = out[-1]

        def stage(in_channels: int, channels: int, stride: int) -> nn.Sequential:
            layer = nn.Sequential(PreActivationBlock(in_channels, channels, stride))
            for _ in range((depth - 4) // 6 - 1):
                layer.append(PreActivationBlock(channels, channels, 1))
            return layer

        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.layer1 = stage(16, out[0], 1)
        self.layer2 = stage(out[0], out[1], 2)
        self.layer3 = stage(out[1], out[2], 2)
        self.bn = nn.BatchNorm2d(out[2])
        self.fc = nn.Linear(out[2], num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        first = self.layer1(self.conv1(x))
        second = self.layer2(first)
        third = self.layer3(second)
        x = F.relu(self.bn(third), inplace=True)
        return self._outputs(self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1)), x, first, second, third)
