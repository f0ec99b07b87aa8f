"""A light pose network: the inverted residual blocks of MobileNetV2 and a decoder of depthwise separable convolutions.

Sandler, Howard, Zhu, Zhmoginov, Chen, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018, arXiv 1801.04381.
OKDHP's supplement trains such a network with a shared encoder and one decoder a branch. Its sizes are not published as
code, so these are ours: the blocks up to 160 channels, those of 160 without a stride, so that a 128-pixel image keeps a
map of 8 × 8; then two doublings to a quarter of the image's size. Initial weights are PyTorch's own.
"""

from __future__ import annotations

from fractions import Fraction

import torch.nn.functional as F
from torch import Tensor, nn

from .base import scaled
from .pose import PoseNetwork

__all__ = ["mobile_pose"]

# Expansion, channels, blocks and stride of each stage after the stem (arXiv 1801.04381, table 2).
_STAGES = ((6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 1))


def mobile_pose(joints: int, *, width: Fraction = Fraction(1)) -> PoseNetwork:
    """Build the network for images (B, 3, S, S), whose heatmaps are (B, J, S/4, S/4).

    The parts are called stem, stage0 … stage3, decoder; by default networks share all but the decoder. All channels,
    the stem's too, are scaled by ``width``.
    """
    parts: dict[str, nn.Module] = {"stem": MobileStem(width)}
    channels = scaled(24, width)
    for k, (expansion, out, blocks, stride) in enumerate(_STAGES):
        stage = nn.Sequential(InvertedResidual(channels, scaled(out, width), stride, expansion))
        channels = scaled(out, width)
        for _ in range(blocks - 1):
            stage.append(InvertedResidual(channels, channels, 1, expansion))
        parts[f"stage{k}"] = stage
    decoder = Decoder(channels, scaled(128, width), joints)
    net = PoseNetwork(joints, {**parts, "decoder": decoder}, scaled(128, width))
    net.default_split = "decoder"
    net.head_names = ("decoder.score",)
    return net


class InvertedResidual(nn.Module):
    """1×1 to ``expansion`` times the channels, depthwise 3×3, 1×1 without activation; a sum where it fits."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        self.expand = _norm_conv(in_channels, inner, 1) if expansion > 1 else None
        self.depthwise = _norm_conv(inner, inner, 3, stride=stride, groups=inner)
        self.project = _norm_conv(inner, channels, 1)
        self.adds = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.adds else y


class MobileStem(nn.Module):
    """3×3 convolution with stride 2, the blocks of 16 and of 24 channels: a quarter of the image's size."""

    def __init__(self, width: Fraction) -> None:
        super().__init__()
        first, second, third = (scaled(channels, width) for channels in (32, 16, 24))
        self.conv = _norm_conv(3, first, 3, stride=2)
        self.blocks = nn.Sequential(
            InvertedResidual(first, second, 1, 1),
            InvertedResidual(second, third, 2, 6),
            InvertedResidual(third, third, 1, 6),
        )
        self.out_channels = third

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(F.relu6(self.conv(x)))


class Decoder(nn.Module):
    """1×1 convolution; twice: double the size, depthwise 3×3 and 1×1 convolution, ReLU; 1×1 to the heatmaps."""

    def __init__(self, in_channels: int, channels: int, joints: int) -> None:
        super().__init__()
        self.enter = _norm_conv(in_channels, channels, 1)
        self.depthwise = nn.ModuleList(_norm_conv(channels, channels, 3, groups=channels) for _ in range(2))
        self.pointwise = nn.ModuleList(_norm_conv(channels, channels, 1) for _ in range(2))
        self.score = nn.Conv2d(channels, joints, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.enter(x), inplace=True)
        for depthwise, pointwise in zip(self.depthwise, self.pointwise, strict=True):
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = F.relu(pointwise(depthwise(x)), inplace=True)
        return x, self.score(x)


def _norm_conv(in_channels: int, channels: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels))
