"""Image classification: one class per image, measured by accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..data import Batch
from ..ops.augment import augment, mix, normalize
from ..ops.mix import prepare_mix
from .base import Score, Summing
from .counting import Counting

__all__ = ["Accuracy", "Classification"]


class Accuracy(Counting):
    """Counts the images whose largest logit is that of their class; arguments: `Counting`."""

    @torch.no_grad()
    def update(self, logits: Mapping[str, Tensor], target: Tensor, bad: Tensor | None = None) -> None:
        """Count one batch: logits of shape (B, K) by name, target int64 (B,). A row of NaN is never right.

        Where ``bad``, a 0-dim bool, nothing is counted.
        """
        self.names = self.names or tuple(logits)
        top, index = torch.stack([logits[name].detach().float() for name in self.names]).max(dim=-1)
        self._add(((index == target) & ~top.isnan()).sum(dim=-1), target.shape[0], bad)

    def read(self, processes: Summing | None = None) -> dict[str, Score]:
        """Return the score of every name so far, empty if there was no image; waits for the device.

        Args:
            processes: over whose images the scores are; each of them calls this, and all get the same. A process that
                may see no batch needs its names from the start.
        """
        *correct, total = self._read(processes) or [0]
        return {name: Score(n, total) for name, n in zip(self.names, correct, strict=True)} if total else {}

    def details(self, processes: Summing | None = None) -> dict[str, dict[str, Score]]:
        """Return nothing: an answer has no parts."""
        return {}


class Classification:
    """Augmentation, mixing and metric of images that show one of K classes; see `fflfast.tasks.base.Task`.

    Args:
        num_classes: K.
        seed: of augmentation and mixing.
        mixup, cutmix: alphas of the Beta distribution that the mixing ratio is drawn from; 0 is off.
        pad, flip: see `fflfast.ops.augment.augment`.
    """

    name = "classification"
    metric_name = "accuracy"

    def __init__(
        self,
        num_classes: int,
        *,
        seed: int = 0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        pad: int = 0,
        flip: bool = False,
    ) -> None:
        self.num_classes = num_classes
        self.seed = seed
        self.mixup, self.cutmix = mixup, cutmix
        self.pad, self.flip = pad, flip

    @property
    def mixes(self) -> bool:
        """Whether training batches are mixed, so that no image has one right answer."""
        return self.mixup > 0 or self.cutmix > 0

    def prepare(self, device: torch.device | str) -> None:
        """Bring to a device what `training_batch` needs there."""
        prepare_mix(device, mixup_alpha=self.mixup, cutmix_alpha=self.cutmix)

    def training_batch(
        self, batch: Batch, table: Tensor, *, epoch: Tensor, step: Tensor, views: int, channels_last: bool
    ) -> Batch:
        """Return float images (B, 3, H, W), a tuple of them for more than one view, in the table's dtype.

        Every view of an image is cropped and mirrored by itself; all are mixed with the same neighbour, in the same
        ratio and box, so that one target, then (B, K), is right for all. Arguments: `fflfast.tasks.base.Task`.
        """
        given = batch.images
        images, target = [], batch.target
        for view in range(views):
            image = augment(
                given if isinstance(given, Tensor) else given[view],
                batch.index,
                seed=self.seed,
                epoch=epoch,
                view=view,
                pad=self.pad,
                flip=self.flip,
                table=table,
                channels_last=channels_last,
            )
            if self.mixes:
                image, target = mix(
                    image,
                    batch.target,
                    self.num_classes,
                    seed=self.seed,
                    epoch=epoch,
                    step=step,
                    mixup_alpha=self.mixup,
                    cutmix_alpha=self.cutmix,
                )
                if channels_last:
                    image = image.contiguous(memory_format=torch.channels_last)  # mixing may have left that order
            images.append(image)
        return Batch(images[0] if views == 1 else tuple(images), target, batch.index)

    def metric(self, names: Sequence[str] = (), device: torch.device | str | None = None) -> Accuracy:
        """Return a fresh metric of the outputs ``names``, see `Accuracy`."""
        return Accuracy(names, device)

    def outputs(
        self, predict: Callable[[Tensor], Mapping[str, Tensor]], images: Tensor, table: Tensor
    ) -> Mapping[str, Tensor]:
        """Return logits (B, K) by name of uint8 images, unaugmented."""
        return predict(normalize(images, table))
