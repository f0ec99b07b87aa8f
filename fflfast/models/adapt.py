"""Any image classifier as a sub-network."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from torch import Tensor, nn

from .base import SubNetwork
from .locate import Tap, locate
from .trace import GraphError, Traced, examples

__all__ = ["AdaptPlan", "AdaptedNetwork", "adapt"]

_SIZES = (224, 32, 64, 299, 28)  # pixels


@dataclass(frozen=True)
class AdaptPlan:
    """What `adapt` found; prints as a few lines."""

    network: str
    image: tuple[int, ...]
    """The shape of the image, (C, H, W), that was run to find it."""
    feature_map: str | None
    """The node whose value is the feature map, by its name in the graph or its module's path."""
    feature_shape: tuple[int, ...] | None
    heads: tuple[str, ...]
    num_classes: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        size = " × ".join(map(str, self.image))
        shape = "none: no spatial map reaches the classifier; methods that fuse feature maps will refuse it"
        if self.feature_shape is not None:
            shape = f"{' × '.join(map(str, self.feature_shape))}, the output of {self.feature_map}"
        lines = [
            f"{self.network} as a sub-network (for an image of {size})",
            f"  feature map  {shape}",
            f"  logits       {self.num_classes}, from {', '.join(self.heads) or 'no layer with parameters'}",
            *(f"  note         {note}" for note in self.notes),
        ]
        return "\n".join(lines)


class AdaptedNetwork(Traced, SubNetwork):
    """A network whose forward also gives its feature map: the same modules under the same names."""

    plan: AdaptPlan


def adapt(net: nn.Module, *, example: Tensor | None = None, verbose: bool = True) -> SubNetwork:
    """Make a sub-network of an image classifier, which shares its modules and parameters with ``net``.

    The feature map is the input of the last spatial pooling that the whole computation passes through, whether
    pool and activation are modules or functions; networks that end in tokens have none (None).

    torch.fx traces the forward of the root and of those modules that must be opened to see the pooling, once in
    training and once in eval mode; every other module stays a leaf that runs its own code. Nothing hooks into
    the network or is kept between calls, so that threads, streams, deep copies, torch.compile and torch.export
    see plain modules. Forward hooks on the root or on an opened module do not run.

    Args:
        net: ``net(x)`` gives logits (B, classes), or a tuple that begins with them; the rest of the tuple is left
            out. A sub-network of this library comes back as it is.
        example: images (B, C, H, W), for a network that takes none of 128, 224, 32, 64, 299 and 28 pixels.
        verbose: print the plan, which is also ``.plan`` of the result, to stderr.

    Raises:
        ValueError: torch.fx cannot follow the forward, there are no such logits, or no image passes through.
    """
    if isinstance(net, SubNetwork):
        return net
    if not isinstance(net, nn.Module):
        raise TypeError(f"adapt() expects a torch.nn.Module, got {type(net).__name__}")
    image, evaluated = _locate(net, example)
    trained = locate(net, image, training=True, opened=evaluated.opened, like=evaluated)
    shapes = (trained.feature_shape, evaluated.feature_shape)
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{type(net).__name__} has another feature map in training ({trained.feature}) than in "
            f"eval mode ({evaluated.feature}); write a sub-network yourself"
        )
    names = {*net._modules, *net._parameters, *net._buffers}
    sub_network = AdaptedNetwork(net, trained.graph, evaluated.graph, names)
    sub_network.feature_channels = evaluated.feature_shape[0] if evaluated.feature_shape else None
    sub_network.num_classes = evaluated.num_classes
    sub_network.head_names = evaluated.heads
    sub_network.plan = AdaptPlan(
        network=type(net).__name__,
        image=tuple(image.shape[1:]),
        feature_map=evaluated.feature,
        feature_shape=evaluated.feature_shape,
        heads=evaluated.heads,
        num_classes=evaluated.num_classes,
        notes=tuple(dict.fromkeys((*evaluated.notes, *trained.notes))),
    )
    if verbose:
        print(sub_network.plan, file=sys.stderr)
    return sub_network


def _locate(net: nn.Module, example: Tensor | None) -> tuple[Tensor, Tap]:
    """The first image that passes through the network, with what it shows."""
    # Large images first: on a small one the last map may be one pixel, which looks like a vector. 128 pixels
    # are cheaper than 224 and leave 2 × 2 even behind six halvings.
    made_for = (getattr(net, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))[-1]
    reasons: dict[int, Exception] = {}
    for image in examples(net, example, (128, made_for, *_SIZES)):
        try:
            return image, locate(net, image, training=False)
        except GraphError:
            raise
        except Exception as error:  # a network refuses a size in whatever way it likes
            reasons[image.shape[-1]] = error
    size, reason = list(reasons.items())[0 if example is None else -1]
    raise ValueError(
        f"{type(net).__name__} takes no image of {', '.join(map(str, reasons))} pixels "
        f"({size}: {type(reason).__name__}: {str(reason).splitlines()[0]}); give adapt() an example it takes"
    ) from reason
