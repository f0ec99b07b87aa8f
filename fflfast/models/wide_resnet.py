"""Wide residual networks for small images (Zagoruyko and Komodakis, "Wide Residual Networks", 2016)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .base import SubNetwork, init_weights

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
    """WRN-``depth``-``width``: depth = 6n + 4, n pre-activation blocks in each of three stages."""

    default_split = "layer3"
    head_names = ("fc",)

    def __init__(self, num_classes: int, depth: int, width: int) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"a wide ResNet's depth must be 6n + 4 (10, 16, 22, …), got {depth}")
        self.num_classes = num_classes
        self.feature_channels = 64 * width

        def stage(in_channels: int, channels: int, stride: int) -> nn.Sequential:
            layer = nn.Sequential(PreActivationBlock(in_channels, channels, stride))
            for _ in range((depth - 4) // 6 - 1):
                layer.append(PreActivationBlock(channels, channels, 1))
            return layer

        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.layer1 = stage(16, 16 * width, 1)
        self.layer2 = stage(16 * width, 32 * width, 2)
        self.layer3 = stage(32 * width, 64 * width, 2)
        self.bn = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        x = F.relu(self.bn(x), inplace=True)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1)), x
