"""PCL, peers that collaborate: a classifier of all peers' features teaches each, and so do averages of the others.

L = CE(z_e) + Σ_k CE(z_k) + λ(e) · Σ_k [KL_T(z_e → z_k) + 1/(N−1) · Σ_{j≠k} KL_T(z̄_j → z_k)], T = 3, teachers detached,
λ ramped up over 80 epochs; z_e = linear layer of the N pooled feature maps together, whose CE reaches every peer; z̄_j =
peer j with averaged weights. Each peer sees an augmentation of its own, which its average sees too. After optimizer
step t = 0, 1, … each averaged parameter becomes d·average + (1−d)·parameter, d = min(1 − 1/(t+1), 0.999); the averages'
batch norms keep statistics of their own, from forwards in training mode. Wu, Gong, AAAI 2021, arXiv 2006.04147.

The paper is tested on the first peer's average, and so is a run here; the ensemble classifier and the other peers are
reported beside it. The decay, the norms of the averages and the recipe (weight decay 5e-4) are those of a
reimplementation by others (shaoeric on GitHub).

Departures: where peers share a trunk, its norms take their statistics from the views of all peers together. Peers of
unlike architectures are allowed; the paper has equal ones on shared low layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..cohort import Batch, Cohort, CohortOutput
from ..graph import DistillGraph
from .base import CIFAR_RECIPE, Method, MethodOptions, known_channels, pooled_features

__all__ = ["PCL", "PCLOptions"]


@dataclass(frozen=True)
class PCLOptions(MethodOptions):
    """Options of PCL.

    Attributes:
        decay: the largest share of an average that a step keeps, in [0, 1): averages look back over some 1/(1 − decay)
            steps. The default suits the 117,000 steps of the recipe on CIFAR; a run of a few thousand wants less.
    """

    decay: float = 0.999

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.decay < 1:
            raise ValueError(f"PCLOptions: decay must be at least 0 and less than 1, got {self.decay}")


class PCL(Method):
    """Peer Collaborative Learning (arXiv 2006.04147).

    Attributes:
        head: the classifier of all pooled feature maps.
        ema: the cohort with averaged weights, which are saved with the method's.
        updates: int64, 0-dim: how many steps the averages have followed.

    Raises:
        ValueError: fewer than two sub-networks, or one without a spatial feature map.
    """

    Options = PCLOptions
    recipe = MappingProxyType({**CIFAR_RECIPE, "weight_decay": 5e-4})
    main_output = "ema0"
    options: PCLOptions
    updates: Tensor

    def __init__(self, cohort: Cohort, num_classes: int, options: PCLOptions | None = None) -> None:
        super().__init__(cohort, num_classes, options)
        self.num_views = len(cohort)
        self.graph = DistillGraph.pcl(len(cohort))
        self.head = nn.Linear(sum(known_channels(cohort, "PCL")), num_classes)
        self.ema = copy.deepcopy(cohort).requires_grad_(False)
        # A list keeps the cohort's parameters from becoming the method's own.
        self._pairs = list(zip(self.ema.parameters(), cohort.parameters(), strict=True))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @classmethod
    def refusal(cls, settings: Mapping[str, Any]) -> str | None:
        if settings.get("ema"):
            return (
                "it averages its peers itself and is tested on these averages; leave --ema away, its decay is an option"
            )
        if settings.get("teacher"):
            return "its teachers are its own ensemble and averages, which learn too; leave --teacher away, or take kd"
        return None

    @torch.no_grad()
    def beside(self, images: Tensor | Sequence[Tensor]) -> list[Callable[[], Tensor]]:
        """The forwards of the averaged peers, behind that of their trunk, each giving logits (B, K)."""
        views = [images] if isinstance(images, Tensor) else list(images)
        if self.ema.trunk is not None:
            shared = self.ema.trunk(torch.cat(views))
            views = list((shared if isinstance(shared, Tensor) else shared[0]).chunk(len(views)))
        views *= len(self.ema) // len(views)
        # Views that are too few or too many are the cohort's to refuse.
        return [partial(_logits, net, view) for net, view in zip(self.ema.sub_networks, views, strict=False)]

    def ensemble_logits(self, output: CohortOutput) -> Tensor:
        """Logits (B, K) of the classifier of all feature maps."""
        return self.head(torch.cat(pooled_features(output, "PCL"), dim=1))

    def joint_logits(self, output: CohortOutput, batch: Batch) -> list[Tensor]:
        return [*output.logits, self.ensemble_logits(output), *output.beside]

    def predict(self, output: CohortOutput, images: Tensor) -> dict[str, Tensor]:
        averaged = {f"ema{k}": z for k, z in enumerate(self.ema(images).logits)}
        return {**super().predict(output, images), "ensemble": self.ensemble_logits(output), **averaged}

    @torch.no_grad()
    def after_step(self, bad: Tensor | None = None) -> None:
        averages, weights = (list(side) for side in zip(*self._pairs, strict=True))
        share = (self.updates + 1).reciprocal().clamp(min=1 - self.options.decay)
        news = list(torch._foreach_mul(averages, 1 - share))
        torch._foreach_add_(news, torch._foreach_mul(weights, share))
        if bad is not None:
            # Shares of 1 and 0 instead would turn −0 into 0.
            news = [torch.where(bad, old, new) for old, new in zip(averages, news, strict=True)]
        torch._foreach_copy_(averages, news)
        self.updates.add_(1 if bad is None else ~bad)


def _logits(net: nn.Module, images: Tensor) -> Tensor:
    return net(images)[0]
