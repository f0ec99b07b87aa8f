"""What every sub-network of this library is, whoever wrote the network inside it."""

from __future__ import annotations

import math
from fractions import Fraction

from torch import Tensor, nn

__all__ = ["SubNetwork", "init_weights", "scaled"]


class SubNetwork(nn.Module):
    """A classifier whose ``forward(x)`` returns ``(logits, feature_map)``.

    ``x`` is (B, 3, H, W); ``logits`` (B, num_classes); ``feature_map`` (B, feature_channels, H', W'), the last
    spatial activation before pooling, or None where a network has none (``feature_channels`` is None then). With
    ``return_stages`` it returns ``(logits, feature_map, stages)``.

    A subclass may have a method ``split_at(name)`` that returns trunk and sub-network; `fflfast.models.split` then
    leaves the work to it.
    """

    feature_channels: int | None = None
    num_classes: int = 0
    arch: str | None = None
    """The name `fflfast.models.create` takes; None for a network that was built elsewhere."""
    default_split: str | None = None
    """Where a trunk is taken off by default: this module and what follows stay with the sub-network."""
    plan: object = None
    """How the network was taken apart, where `fflfast.models.adapt` did so; prints as a few lines."""
    head_names: tuple[str, ...] = ()
    """Names of the modules that hold the last layer, whose size follows the number of classes."""
    stage_names: tuple[str, ...] = ()
    """The modules whose outputs are the stages, first to last; what comes before the first of them is the stem. A
    network that was split has those whose outputs it computes."""
    return_stages: bool = False
    """Whether the forward returns, as a third value, a tuple of the outputs of ``stage_names``, not detached."""

    def _outputs(
        self, logits: Tensor, feature_map: Tensor, *stages: Tensor
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        return (logits, feature_map, stages) if self.return_stages else (logits, feature_map)


def scaled(channels: int, width: Fraction) -> int:
    """``channels`` × ``width``, rounded down, at least 1."""
    return max(1, math.floor(channels * width))


def init_weights(net: nn.Module) -> None:
    """Convolutions N(0, √(2 / (k²·C_out))), batch norms 1 and 0, linear layers as PyTorch has them.

    Source: He et al., "Delving Deep into Rectifiers" (2015), in the fan-out form of the CIFAR ResNets.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
