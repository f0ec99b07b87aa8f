"""Human pose: one heatmap a joint, measured by PCK."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from ..data import Batch, Keypoints
from ..heatmaps import flip_back, flip_order
from ..ops.augment import normalize
from ..ops.warp import prepare_warp, warp
from .pck import PCK

__all__ = ["Pose"]


class Pose:
    """Augmentation, flip test and metric of persons with J joints; see `fflfast.tasks.base.Task`.

    Angle and zoom are uniform where the code that many follow draws them from a clipped normal distribution.

    Args:
        keypoints: what the joints are.
        image_size: S, the side of what a network sees; images of a batch may be larger, then their middle counts.
        seed: of the augmentation.
        rotation: of training images, uniform in ± this many degrees.
        scale: zoom of training images, uniform in 1 ± scale.
        flip: whether half of the training images are mirrored, left and right joints exchanged.
        flip_test: whether the heatmaps of a test image are averaged with those of its mirror image.

    Raises:
        ValueError: a number out of range.
    """

    name = "pose"
    metric_name = "PCK@0.2"
    mixes = False

    def __init__(
        self,
        keypoints: Keypoints,
        image_size: int,
        *,
        seed: int = 0,
        rotation: float = 0.0,
        scale: float = 0.0,
        flip: bool = False,
        flip_test: bool = True,
    ) -> None:
        if image_size < 1:
            raise ValueError(f"task pose: expected the side of the images in pixels, got {image_size}")
        self.keypoints, self.image_size, self.seed = keypoints, image_size, seed
        self.rotation, self.scale, self.flip = rotation, scale, flip
        self.flip_test = flip_test
        self._order = flip_order(len(keypoints.names), keypoints.flip_pairs)
        prepare_warp("cpu", rotation=rotation, scale=scale)

    def prepare(self, device: torch.device | str) -> None:
        """Bring to a device what a step needs there."""
        self._order = self._order.to(device)
        prepare_warp(device, rotation=self.rotation, scale=self.scale)

    def training_batch(
        self, batch: Batch, table: Tensor, *, epoch: Tensor, step: Tensor, views: int, channels_last: bool
    ) -> Batch:
        """Return float images (B, 3, S, S) in the table's dtype and targets in their pixels.

        Arguments: `fflfast.tasks.base.Task`.

        Raises:
            ValueError: more than one view, whose joints would lie elsewhere in each.
        """
        if views != 1 or isinstance(batch.images, tuple):
            raise ValueError(
                f"task pose: expected one view of each image, got {views}: joints lie elsewhere in each view, and "
                "there is one target for all; take a method of one view"
            )
        images, target = warp(
            batch.images,
            batch.target,
            batch.index,
            self.image_size,
            seed=self.seed,
            epoch=epoch,
            rotation=self.rotation,
            scale=self.scale,
            flip=self.flip,
            order=self._order,
        )
        return Batch(normalize(images, table, channels_last=channels_last), target, batch.index)

    def metric(self, names: Sequence[str] = (), device: torch.device | str | None = None) -> PCK:
        """Return a fresh metric of the outputs ``names``, see `PCK`."""
        return PCK(self.keypoints, self.image_size, names, device)

    def outputs(
        self, predict: Callable[[Tensor], Mapping[str, Tensor]], images: Tensor, table: Tensor
    ) -> Mapping[str, Tensor]:
        """Return heatmaps (B, J, h, w) by output of uint8 images (B, 3, S, S), averaged with those of mirror images.

        ``predict`` takes normalised images and returns heatmaps by output.
        """
        seen = normalize(images, table)
        heatmaps = predict(seen)
        if not self.flip_test:
            return heatmaps
        mirrored = predict(seen.flip(-1))
        order = cast(Tensor, self._order.to(images.device))
        return {name: (maps + flip_back(mirrored[name], order)) / 2 for name, maps in heatmaps.items()}
