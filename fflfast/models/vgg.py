"""VGG-16 with batch norm for small images (Simonyan and Zisserman, 2014)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .base import SubNetwork, init_weights

__all__ = ["SmallVGG"]


class SmallVGG(SubNetwork):
    """Five stages of 3×3 convolutions with a 2×2 max pool between them, then 512-512-classes linear layers.

    The last max pool is global, which on 32×32 images is the usual 2×2 one; its input is the feature map.
    """

    default_split = "layer5"
    head_names = ("classifier.4",)

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.feature_channels = 512
        self.layer1 = _stage(3, 64, convolutions=2)
        self.layer2 = _stage(64, 128, convolutions=2)
        self.layer3 = _stage(128, 256, convolutions=3)
        self.layer4 = _stage(256, 512, convolutions=3)
        self.layer5 = _stage(512, 512, convolutions=3)
        # ceil_mode changes nothing on even sizes and lets images below 16 pixels through.
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.classifier = nn.Sequential(
            nn.Linear(512, 512),
            nn.ReLU(inplace=True),
            nn.Linear(512, 512),
            nn.ReLU(inplace=True),
            nn.Linear(512, num_classes),
        )
        init_weights(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.pool(self.layer1(x))
        x = self.pool(self.layer2(x))
        x = self.pool(self.layer3(x))
        x = self.layer5(self.pool(self.layer4(x)))
        return self.classifier(F.adaptive_max_pool2d(x, 1).flatten(1)), x


def _stage(in_channels: int, channels: int, *, convolutions: int) -> nn.Sequential:
    layer = nn.Sequential()
    for _ in range(convolutions):
        layer.append(nn.Conv2d(in_channels, channels, 3, padding=1))
        layer.append(nn.BatchNorm2d(channels))
        layer.append(nn.ReLU(inplace=True))
        in_channels = channels
    return layer
