"""DenseNet-BC for small images (Huang et al., "Densely Connected Convolutional Networks", 2016)."""

from __future__ import annotations

from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import SubNetwork, init_weights, scaled

__all__ = ["SmallDenseNet"]


class DenseLayer(nn.Module):
    """BN → ReLU → 1×1 conv to 4·growth → BN → ReLU → 3×3 conv to growth, appended to the input."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x), inplace=True))
        return torch.cat((x, self.conv2(F.relu(self.bn2(y), inplace=True))), 1)


class Transition(nn.Module):
    """BN → ReLU → 1×1 conv to half the channels → 2×2 average pool."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, in_channels // 2, 1, bias=False)
        self.pool = nn.AvgPool2d(2, ceil_mode=True)  # as a plain one on even sizes; takes one pixel too

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(F.relu(self.bn(x), inplace=True)))


class SmallDenseNet(SubNetwork):
    """DenseNet-BC with three dense blocks of (depth − 4) / 6 bottleneck layers and compression 0.5.

    ``width`` scales the growth, see `scaled`, and with it the bottlenecks' 4·growth, but not the stem. A stage is a
    dense block, whose output the transition behind it halves.
    """

    default_split = "block3"
    head_names = ("fc",)
    stage_names = ("block1", "block2", "block3")

    def __init__(self, num_classes: int, depth: int, growth: int, *, width: Fraction = Fraction(1)) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"a DenseNet-BC's depth must be 6n + 4 (10, 16, 22, …), got {depth}")
        self.num_classes = num_classes
        layers = (depth - 4) // 6
        first = 2 * growth
        growth = scaled(growth, width)

        def block(in_channels: int) -> nn.Sequential:
            return nn.Sequential(*(DenseLayer(in_channels + i * growth, growth) for i in range(layers)))

        second = (first + layers * growth) // 2
        third = (second + layers * growth) // 2
        self.feature_channels = third + layers * growth
        self.conv1 = nn.Conv2d(3, first, 3, padding=1, bias=False)
        self.block1 = block(first)
        self.transition1 = Transition(first + layers * growth)
        self.block2 = block(second)
        self.transition2 = Transition(second + layers * growth)
        self.block3 = block(third)
        self.bn = nn.BatchNorm2d(self.feature_channels)
        self.fc = nn.Linear(self.feature_channels, num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        first = self.block1(self.conv1(x))
        second = self.block2(self.transition1(first))
        third = self.block3(self.transition2(second))
        x = F.relu(self.bn(third), inplace=True)
        return self._outputs(self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1)), x, first, second, third)
