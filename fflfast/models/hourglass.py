"""Stacked hourglass networks (Newell, Yang, Deng, "Stacked Hourglass Networks for Human Pose Estimation", 2016).

Sizes and layers are those that the code of OKDHP trains (github.com/zhengli97/OKDHP): one residual block a step, four
levels, pre-activation bottlenecks, biases everywhere, PyTorch's own initial weights. Departure: an hourglass takes maps
of any size, where that code fails on odd ones: the last row and column are then pooled by themselves, and what comes
back is brought to the size of the skip connection.
"""

from __future__ import annotations

from fractions import Fraction

import torch.nn.functional as F
from torch import Tensor, nn

from .base import scaled
from .pose import PoseNetwork

__all__ = ["stacked_hourglass"]

_LEVELS = 4


def stacked_hourglass(joints: int, stacks: int, *, width: Fraction = Fraction(1)) -> PoseNetwork:
    """Build a stem and ``stacks`` hourglasses, each of which gives heatmaps (B, J, S/4, S/4) of images (B, 3, S, S).

    The parts are called stem, stack0, stack1, …; by default networks share the stem and half of the stacks. All
    channels, the stem's too, are those of the original network (256 between stacks) times ``width``. In training one
    image makes a batch from 67 pixels on: on fewer the smallest map is one cell, which a norm takes no statistics of.
    """
    channels = scaled(256, width)
    parts: dict[str, nn.Module] = {"stem": Stem(channels)}
    parts |= {f"stack{k}": Stack(channels, joints, last=k == stacks - 1) for k in range(stacks)}
    net = PoseNetwork(joints, parts, channels)
    net.default_split = f"stack{stacks // 2}"
    net.head_names = tuple(f"stack{k}.score" for k in range(stacks))
    return net


class Residual(nn.Module):
    """Pre-activation bottleneck: 1×1, 3×3, 1×1 convolutions, the first two half as wide as the output."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        inner = max(1, channels // 2)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, inner, 1)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, channels, 1)
        self.skip = None if in_channels == channels else nn.Conv2d(in_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x), inplace=True))
        y = self.conv2(F.relu(self.bn2(y), inplace=True))
        y = self.conv3(F.relu(self.bn3(y), inplace=True))
        return y + (x if self.skip is None else self.skip(x))


class Stem(nn.Module):
    """7×7 convolution with stride 2, residual block, 2×2 maximum, two residual blocks: a quarter of the size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        first, second = max(1, channels // 4), max(1, channels // 2)
        self.conv = nn.Conv2d(3, first, 7, stride=2, padding=3)
        self.bn = nn.BatchNorm2d(first)
        self.res1 = Residual(first, second)
        self.res2 = Residual(second, channels)
        self.res3 = Residual(channels, channels)
        self.out_channels = channels

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)), inplace=True)
        return self.res3(self.res2(F.max_pool2d(self.res1(x), 2)))


class Hourglass(nn.Module):
    """A residual block at this size, beside it the same at half the size around a smaller hourglass; their sum."""

    def __init__(self, levels: int, channels: int) -> None:
        super().__init__()
        self.skip = Residual(channels, channels)
        self.down = Residual(channels, channels)
        self.inner: nn.Module = Hourglass(levels - 1, channels) if levels > 1 else Residual(channels, channels)
        self.up = Residual(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.skip(x)
        low = self.up(self.inner(self.down(F.max_pool2d(x, 2, ceil_mode=True))))
        return skip + F.interpolate(low, size=skip.shape[-2:], mode="nearest")


class Stack(nn.Module):
    """Hourglass, residual block, 1×1 convolution with norm and ReLU; heatmaps of that, and what the next stack reads.

    The last stack of a network has no next one: it returns its features instead.
    """

    def __init__(self, channels: int, joints: int, *, last: bool) -> None:
        super().__init__()
        self.hourglass = Hourglass(_LEVELS, channels)
        self.res = Residual(channels, channels)
        self.conv = nn.Conv2d(channels, channels, 1)
        self.bn = nn.BatchNorm2d(channels)
        self.score = nn.Conv2d(channels, joints, 1)
        self.merge_features = None if last else nn.Conv2d(channels, channels, 1)
        self.merge_score = None if last else nn.Conv2d(joints, channels, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(self.bn(self.conv(self.res(self.hourglass(x)))), inplace=True)
        heatmaps = self.score(y)
        if self.merge_features is None or self.merge_score is None:
            return y, heatmaps
        return x + self.merge_features(y) + self.merge_score(heatmaps), heatmaps
