"""Residual networks for small images (He et al., "Deep Residual Learning", 2015, §4.2)."""

from __future__ import annotations

from fractions import Fraction

import torch.nn.functional as F
from torch import Tensor, nn

from .base import SubNetwork, init_weights, scaled

__all__ = ["BasicBlock", "Bottleneck", "SmallResNet"]


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut: 1×1 convolution and batch norm where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return F.relu(y, inplace=True)


class Bottleneck(nn.Module):
    """1×1, 3×3 (``inner`` channels, carries the stride), 1×1 convolutions and the same shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int, inner: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample = _shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return F.relu(y, inplace=True)


class SmallResNet(SubNetwork):
    """conv3×3 → three stages (strides 1, 2, 2) → global average pool → linear.

    ``channels`` are the stages' output channels, the first also the stem's unless ``stem`` is given;
    ``inner``, if given, makes the blocks bottlenecks with these inner channels. ``width`` scales both, see `scaled`,
    but not the stem.
    """

    default_split = "layer3"
    head_names = ("fc",)
    stage_names = ("layer1", "layer2", "layer3")

    def __init__(
        self,
        num_classes: int,
        blocks: int,
        channels: tuple[int, int, int] = (16, 32, 64),
        *,
        stem: int | None = None,
        inner: tuple[int, int, int] | None = None,
        width: Fraction = Fraction(1),
    ) -> None:
        super().__init__()
        first = stem or channels[0]
        out = [scaled(c, width) for c in channels]
        self.num_classes = num_classes
        self.feature_channels = out[-1]
        self.conv1 = nn.Conv2d(3, first, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)

        def stage(i: int, in_channels: int, stride: int) -> nn.Sequential:
            layer = nn.Sequential()
            for _ in range(blocks):
                sizes = (in_channels, out[i], stride)
                layer.append(Bottleneck(*sizes, scaled(inner[i], width)) if inner else BasicBlock(*sizes))
                in_channels, stride = out[i], 1
            return layer

        self.layer1 = stage(0, first, 1)
        self.layer2 = stage(1, out[0], 2)
        self.layer3 = stage(2, out[1], 2)
        self.fc = nn.Linear(out[2], num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        first = self.layer1(x)
        second = self.layer2(first)
        third = self.layer3(second)
        return self._outputs(self.fc(F.adaptive_avg_pool2d(third, 1).flatten(1)), third, first, second, third)


def _shortcut(in_channels: int, channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_channels == channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
