"""Adversarial feature-map distillation: networks teach each other by logits, and fool each other's discriminators.

L = Σ_k [CE(z_k) + KL_T(z_{k−1} → z_k) + w · (1 − D_k(f_k))² + (1 − D_k(f_{k−1}))² + D_k(f_k)²], T = 3, means over the
batch. Network k learns from network k−1, in a ring (the first from the last; of two, each from the other). D_k, a small
convolutional network into (0, 1), tells the feature maps of the two apart; where they have unlike channels, a 1×1
convolution, part of network k, brings f_k to those of its teacher first. The term with w moves network k alone (D_k and
f_{k−1} detached), the two others D_k alone (both maps detached). Chung, Park, Kim, Kwak, ICML 2020, arXiv 2002.01775.

Departures:
- The paper alternates between two losses within a batch, and its second optimizer, with a small rate, moves networks
  and discriminators. Here all terms share one backward: D_k sees detached maps, the maps see detached weights of D_k.
  D_k has an Adam of its own; the networks have the run's optimizer alone, and w stands for the small rate.
- No code is published, and the sizes of D were not available to us; Adam's rate of 2e-5 and weight decay of 0.1 are
  quoted from memory. Ours: 3×3 to 64 channels, twice, each with a group norm over all channels and a leaky ReLU, 3×3
  to one, mean over the map, sigmoid. That norm takes no statistics of the batch, which would hide from D_k how the two
  kinds of map differ.
- Unlike spatial sizes, which the paper has none of, are brought to the smaller by adaptive average pooling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..cohort import Batch, Cohort, CohortOutput, StepState
from ..graph import DistillGraph
from .base import Method, MethodOptions, known_channels, row_mean

__all__ = ["AFD", "AFDOptions"]


@dataclass(frozen=True)
class AFDOptions(MethodOptions):
    """Options of AFD: no ramp-up, as in the paper.

    Attributes:
        adversarial_weight: w, ours: by it SGD with a rate of 0.1 and momentum 0.9 moves convolutions about as far in a
            step as an Adam with a rate of 2e-5 does (two ResNet-8 in their first 400 steps on CIFAR-100, by the root
            mean square of the gradients: a w of 0.01 to 0.04).
        discriminator_channels: inner channels of a discriminator.
        discriminator_lr: its peak rate, by Adam.
        discriminator_weight_decay: its weight decay.
    """

    ramp_up_epochs: float = 0.0
    adversarial_weight: float = 0.02
    discriminator_channels: int = 64
    discriminator_lr: float = 2e-5
    discriminator_weight_decay: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        channels = self.discriminator_channels
        if not isinstance(channels, int) or channels < 1:
            raise ValueError(f"AFDOptions: discriminator_channels must be an int of at least 1, got {channels!r}")
        for name in ("adversarial_weight", "discriminator_lr", "discriminator_weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"AFDOptions: {name} must not be negative, got {getattr(self, name)}")


class AFD(Method):
    """Adversarial feature-map distillation (arXiv 2002.01775) between networks that share no layer.

    The schedule is that of FFL's code, by the same authors; the paper's own was not available to us.

    Raises:
        ValueError: fewer than two sub-networks, or one without a spatial feature map.
    """

    Options = AFDOptions
    shared_stages = -1
    options: AFDOptions

    def __init__(self, cohort: Cohort, num_classes: int, options: AFDOptions | None = None) -> None:
        super().__init__(cohort, num_classes, options)
        channels = known_channels(cohort, "AFD")
        pairs = [(channels[k - 1], channels[k]) for k in range(len(channels))]
        self.graph = DistillGraph.afd(len(channels))
        self.extra_term_names = (
            *(f"adversarial/sub{(k - 1) % len(pairs)}→sub{k}" for k in range(len(pairs))),
            *(f"discriminator/sub{k}" for k in range(len(pairs))),
        )
        self.transfers = nn.ModuleList(
            nn.Identity() if teacher == own else nn.Conv2d(own, teacher, 1, bias=False) for teacher, own in pairs
        )
        self.discriminators = nn.ModuleList(
            Discriminator(teacher, self.options.discriminator_channels) for teacher, _ in pairs
        )

    def parameter_options(self) -> dict[str, dict[str, Any]]:
        given = self.options
        adam = {"optimizer": "adam", "lr": given.discriminator_lr, "weight_decay": given.discriminator_weight_decay}
        return {"discriminators": adam}

    def extra_terms(
        self, output: CohortOutput, batch: Batch, state: StepState | None
    ) -> list[tuple[Tensor | float, Tensor]]:
        fooling, telling = [], []
        for k, judge in enumerate(self.discriminators):
            real, fake = _of_one_size(_feature_map(output, k - 1).detach(), self.transfers[k](_feature_map(output, k)))
            fixed = {name: parameter.detach() for name, parameter in judge.named_parameters()}
            fooling.append(row_mean((1 - functional_call(judge, fixed, fake)).square()))
            of_real, of_fake = judge(torch.cat([real, fake.detach()])).chunk(2)
            telling.append(row_mean((1 - of_real).square()) + row_mean(of_fake.square()))
        return [*((self.options.adversarial_weight, term) for term in fooling), *((1.0, term) for term in telling)]


class Discriminator(nn.Sequential):
    """Feature maps (B, channels, H, W) → how real they look (B,), in (0, 1)."""

    def __init__(self, channels: int, inner: int) -> None:
        layers: list[nn.Module] = []
        for given in (channels, inner):
            layers += [nn.Conv2d(given, inner, 3, padding=1), nn.GroupNorm(1, inner), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(inner, 1, 3, padding=1))

    def forward(self, feature_map: Tensor) -> Tensor:
        score = super().forward(feature_map)
        return score.to(self[0].weight.dtype).mean((1, 2, 3)).sigmoid()  # in the parameters' precision under autocast


def _feature_map(output: CohortOutput, k: int) -> Tensor:
    feature_map = output.features[k]
    if feature_map is None:
        raise ValueError(
            f"AFD: sub-network {k % len(output.features)} returned None as its feature map; it said it would have one"
        )
    return feature_map


def _of_one_size(*maps: Tensor) -> list[Tensor]:
    """Feature maps brought to the smallest height and width among them."""
    height, width = (min(m.shape[d] for m in maps) for d in (2, 3))
    return [m if m.shape[2:] == (height, width) else F.adaptive_avg_pool2d(m, (height, width)) for m in maps]
