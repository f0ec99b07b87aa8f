"""What every pose network of this library is: a stem, then parts one after the other, some of which give heatmaps."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from .base import SubNetwork

__all__ = ["PoseNetwork", "PoseTrunk"]


class PoseNetwork(SubNetwork):
    """``forward(x)`` returns ``(heatmaps, feature_map, stages)``: what the last part gives, and all earlier heatmaps.

    ``x`` is (B, 3, S, S), heatmaps are (B, J, S/4, S/4), the feature map (B, feature_channels, S/4, S/4).

    Args:
        joints: J.
        parts: by name, in the order in which they run. A part maps a tensor to the next one's input, or to that and
            heatmaps, the output of its module ``score``, as the last one must; the last one's tensor is the feature
            map. The first is the stem, whose ``out_channels`` a trunk tells, except in what `split_at` leaves.
        channels: of the feature map.
    """

    task = "pose"

    def __init__(self, joints: int, parts: Mapping[str, nn.Module], channels: int) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.part_names = tuple(parts)
        self.num_classes = joints
        self.feature_channels = channels

    @property
    def heatmaps(self) -> int:
        """How many times over the forward gives all J heatmaps."""
        return _count(self, self.part_names)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        found: list[Tensor] = []
        for name in self.part_names:
            x, maps = _step(getattr(self, name), x)
            found += maps
        return found[-1], x, tuple(found[:-1])

    def split_at(self, at: str) -> tuple[PoseTrunk, PoseNetwork]:
        """Split before the part ``at``; both halves share their parts with the network, under the same names.

        Raises:
            ValueError: no such part, or nothing would be below it.
        """
        names = self.part_names
        if at not in names[1:]:
            raise ValueError(
                f"cannot split {self.arch or 'the network'} at '{at}'; a split is possible at: {', '.join(names[1:])}"
            )
        place = names.index(at)
        trunk = PoseTrunk({name: getattr(self, name) for name in names[:place]})
        above = PoseNetwork(
            self.num_classes, {name: getattr(self, name) for name in names[place:]}, self.feature_channels or 0
        )
        above.arch, above.training = self.arch, self.training
        above.head_names = tuple(head for head in self.head_names if head.split(".")[0] in above.part_names)
        trunk.training = self.training
        return trunk, above


class PoseTrunk(nn.Module):
    """The low parts of a pose network: images → (the next part's input, (the stem's output, *heatmaps))."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.part_names = tuple(parts)

    @property
    def heatmaps(self) -> int:
        """How many times over the forward gives all J heatmaps."""
        return _count(self, self.part_names)

    @property
    def stem_channels(self) -> int:
        """Channels of the stem's output."""
        return getattr(self, self.part_names[0]).out_channels

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        stem, _ = _step(getattr(self, self.part_names[0]), x)
        x, found = stem, []
        for name in self.part_names[1:]:
            x, maps = _step(getattr(self, name), x)
            found += maps
        return x, (stem, *found)


def _step(part: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    out = part(x)
    return (out, []) if isinstance(out, Tensor) else (out[0], [out[1]])


def _count(module: nn.Module, names: tuple[str, ...]) -> int:
    return sum(hasattr(getattr(module, name), "score") for name in names)
