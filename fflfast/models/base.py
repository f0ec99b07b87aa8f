"""What every sub-network of this library is, whoever wrote the network inside it."""

from __future__ import annotations

from torch import nn

__all__ = ["SubNetwork", "init_weights"]


class SubNetwork(nn.Module):
    """A classifier whose ``forward(x)`` returns ``(logits, feature_map)``.

    ``x`` is (B, 3, H, W); ``logits`` (B, num_classes); ``feature_map`` (B, feature_channels, H', W'), the last
    spatial activation before pooling, or None where a network has none (``feature_channels`` is None then).
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
