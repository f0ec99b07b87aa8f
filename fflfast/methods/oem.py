"""Online Ensemble Model Compression: students of falling width learn from their ensemble and from the widest one.

L = μ · Σ_j CE(z_j) + λ · Σ_j KL_T(mean z → z_j) + φ · Σ_b Σ_{j≥1} MSE(A_{b,j}(f_j^b), sg f_0^b), μ = 0.7, λ = φ = 0.15,
T = 2, no ramp-up, ensemble detached; f_j^b = output of stage b of student j, A_{b,j} = 1×1 convolution with bias from
C_j to C_0 channels, MSE = mean over all elements. Student j has (N−j)/N of the channels in every stage, rounded down;
all share the stem. Walawalkar, Shen, Savvides, ECCV 2020, arXiv 2011.07449, and its code (Devwalkar/BOC-KD).

Departures: the code lets the MSE's gradient into student 0 too (option detach_features), begins to train the adapters
in the second epoch and at half the rate, where here they learn as everything else from the start, and draws initial
weights as Xavier. Its DenseNet shares all up to the first transition and compares the transitions' outputs; here it
shares the stem and compares the dense blocks'. Batch, rate, decay, epochs and milestones are those of its CIFAR runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import models
from ..cohort import Batch, Cohort, CohortOutput, StepState
from ..graph import DistillGraph
from .base import CIFAR_RECIPE, Method, MethodOptions

__all__ = ["OEM", "OEMOptions"]


@dataclass(frozen=True)
class OEMOptions(MethodOptions):
    """Options of OEM, with the paper's weights.

    Attributes:
        feature_weight: φ of the terms on feature maps.
        detach_features: whether student 0's maps are targets alone; False lets them learn too, as in the paper's code.
    """

    temperature: float = 2.0
    kl_weight: float = 0.15
    ce_weight: float = 0.7
    ramp_up_epochs: float = 0.0
    feature_weight: float = 0.15
    detach_features: bool = True


class OEM(Method):
    """Online Ensemble Model Compression (arXiv 2011.07449); needs the outputs of the sub-networks' stages.

    Sub-network 0 is the pseudo-teacher; ``method.adapters[j - 1][b]`` brings stage b of sub-network j to its channels.

    Raises:
        ValueError: fewer than two sub-networks, or stages that cannot be compared: none, another number of them than
            sub-network 0 has, or another height and width.
    """

    Options = OEMOptions
    recipe = MappingProxyType(
        {
            **CIFAR_RECIPE,
            "epochs": 350,
            "optimizer": "adam",
            "lr": 1e-3,
            "weight_decay": 1e-5,
            "milestones": (200, 300),
        }
    )
    shared_stages = 0
    needs_stages = True
    options: OEMOptions

    def __init__(self, cohort: Cohort, num_classes: int, options: OEMOptions | None = None) -> None:
        super().__init__(cohort, num_classes, options)
        first, *others = cohort.stage_shapes
        if not first:
            raise ValueError(
                "OEM: sub-network 0 returns no stages, which this method compares; set return_stages = True on "
                "networks of fflfast.models, or return (logits, feature_map, stages)"
            )
        self.adapters = nn.ModuleList()
        for j, shapes in enumerate(others, 1):
            _check_stages(first, shapes, j)
            pairs = zip(shapes, first, strict=True)
            self.adapters.append(nn.ModuleList(nn.Conv2d(own[0], target[0], 1) for own, target in pairs))
        self.graph = DistillGraph.oem(len(cohort))
        self.extra_term_names = tuple(f"mse/sub0→sub{j}" for j in range(1, len(cohort)))

    @classmethod
    def architectures(cls, names: Sequence[str]) -> list[str]:
        """N times one network of ours become widths N/N, (N−1)/N, … 1/N of it; other names stay as they are."""
        count = len(names)
        if count < 2 or len(set(names)) > 1 or names[0] not in models.available():
            return list(names)
        return [names[0], *(f"{names[0]}@{Fraction(count - j, count)}" for j in range(1, count))]

    def extra_terms(
        self, output: CohortOutput, batch: Batch, state: StepState | None
    ) -> list[tuple[Tensor | float, Tensor]]:
        first, *others = output.stages
        targets = [stage.detach() if self.options.detach_features else stage for stage in first]
        terms: list[tuple[Tensor | float, Tensor]] = []
        for j, (adapters, stages) in enumerate(zip(self.adapters, others, strict=True), 1):
            _check_stages([t.shape[1:] for t in targets], [s.shape[1:] for s in stages], j)
            errors = [
                _squared_error(adapt(stage), target)
                for adapt, stage, target in zip(cast(nn.ModuleList, adapters), stages, targets, strict=True)
            ]
            terms.append((self.options.feature_weight, torch.stack(errors).sum()))
        return terms


def _check_stages(targets: Sequence[Sequence[int]], shapes: Sequence[Sequence[int]], network: int) -> None:
    sizes = [[tuple(shape[1:]) for shape in each] for each in (targets, shapes)]
    if sizes[0] != sizes[1] or any(len(size) != 2 for size in sizes[1]):
        raise ValueError(
            f"OEM: the stages of sub-network {network} must be maps, as many and as large as those of sub-network 0, "
            f"{_join(sizes[0])}, got {_join(sizes[1])}; take widths of one architecture, such as resnet32@1/2"
        )


def _join(sizes: Sequence[Sequence[int]]) -> str:
    return ", ".join("×".join(map(str, size)) for size in sizes) or "none"


def _squared_error(values: Tensor, target: Tensor) -> Tensor:
    dtype = torch.promote_types(values.dtype, torch.float32)
    total = F.mse_loss(values.to(dtype), target.to(dtype), reduction="sum")
    return total / max(target.numel(), 1)  # 0 with a graph for an empty batch
