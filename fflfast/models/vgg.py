"""VGG-16 with batch norm for small images (Simonyan and Zisserman, 2014)."""

from __future__ import annotations

from fractions import Fraction

import torch.nn.functional as F
from torch import Tensor, nn

from .base import SubNetwork, init_weights, scaled

__all__ = ["SmallVGG"]


class SmallVGG(SubNetwork):
    """Five stages of 3×3 convolutions with a 2×2 max pool between them, then 512-512-classes linear layers.

    The last max pool is global, which on 32×32 images is the usual 2×2 one; its input is the feature map. The first
    stage is the stem; ``width`` scales the channels of the others and of the linear layers, see `scaled`.
    """

    default_split = "layer5"
    head_names = ("classifier.4",)
    stage_names = ("layer2", "layer3", "layer4", "layer5")

    def __init__(self, num_classes: int, *, width: Fraction = Fraction(1)) -> None:
        super().__init__()
        second, third, last = (scaled(channels, width) for channels in (128, 256, 512))
        self.num_classes = num_classes
        self.feature_channels = last
        self.layer1 = _stage(3, 64, convolutions=2)
        self.layer2 = _stage(64, second, convolutions=2)
        self.layer3 = _stage(second, third, convolutions=3)
        self.layer4 = _stage(third, last, convolutions=3)
        self.layer5 = _stage(last, last, convolutions=3)
        # ceil_mode changes nothing on even sizes and lets images below 16 pixels through.
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.classifier = nn.Sequential(
            nn.Linear(last, last),
            nn.ReLU(inplace=True),
            nn.Linear(last, last),
            nn.ReLU(inplace=True),
            nn.Linear(last, num_classes),
        )
        init_weights(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        second = self.layer2(self.pool(self.layer1(x)))
        third = self.layer3(self.pool(second))
        fourth = self.layer4(self.pool(third))
        fifth = self.layer5(self.pool(fourth))
        logits = self.classifier(F.adaptive_max_pool2d(fifth, 1).flatten(1))
        return self._outputs(logits, fifth, second, third, fourth, fifth)


def _stage(in_channels: int, channels: int, *, convolutions: int) -> nn.Sequential:
    layer = nn.Sequential()
    for _ in range(convolutions):
        layer.append(nn.Conv2d(in_channels, channels, 3, padding=1))
        layer.append(nn.BatchNorm2d(channels))
        layer.append(nn.ReLU(inplace=True))
        in_channels = channels
    return layer
