"""ONE, an ensemble made on the fly: a gate weighs the branches of one network, and the gated ensemble teaches each.

L = Σ_k CE(z_k) + CE(z_e) + λ(e) · Σ_k KL_T(z_e → z_k), T = 3, the teacher detached, λ ramped up over 80 epochs;
z_e = Σ_k g_k·z_k, per image g = softmax(ReLU(BN(W·pool(h) + b))), h the output of the trunk that the branches share.
CE(z_e) flows through the gate into every branch and the trunk. Lan, Zhu, Gong, NeurIPS 2018, arXiv 1806.04606.

The recipe has the epochs, rates and weight decay (1e-4) of the authors' scripts for CIFAR, whose momentum is not
Nesterov's as it is here. The paper has three branches and calls one of them ONE, the gated ensemble ONE-E.

Departure: the code adds 1e-7 to the teacher's probabilities, which are exact here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cohort import Batch, Cohort, CohortOutput
from ..graph import DistillGraph
from .base import Method, MethodOptions

__all__ = ["ONE"]

_NO_TRUNK = "its gate reads the trunk that the sub-networks share, and these share none"


class ONE(Method):
    """On-the-fly Native Ensemble (arXiv 1806.04606); ``method.gate`` and ``method.gate_norm`` are its gate.

    Raises:
        ValueError: fewer than two sub-networks, or a cohort without a trunk; in a step, a trunk whose output is no map.
    """

    def __init__(self, cohort: Cohort, num_classes: int, options: MethodOptions | None = None) -> None:
        super().__init__(cohort, num_classes, options)
        channels = cohort.trunk_channels
        if channels is None:
            raise ValueError(
                f"ONE: {_NO_TRUNK}; split equal networks with fflfast.models.split and build "
                "Cohort(sub_networks, trunk)"
            )
        self.graph = DistillGraph.one(len(cohort))
        self.gate = nn.Linear(channels, len(cohort))
        self.gate_norm = nn.BatchNorm1d(len(cohort))

    @classmethod
    def refusal(cls, settings: Mapping[str, Any]) -> str | None:
        if settings.get("trunk") != "none":
            return None
        return f"{_NO_TRUNK}; take networks of one architecture with --trunk auto, or another method, such as okddip"

    def gates(self, output: CohortOutput) -> Tensor:
        """The weight of each sub-network for each image (B, N), at least 0, rows that sum to 1."""
        shared = output.trunk_features
        if shared is None or shared.dim() != 4:
            got = "None" if shared is None else f"shape {tuple(shared.shape)}"
            raise ValueError(f"ONE: expected a trunk that gives feature maps (B, C, H, W), got {got}; split elsewhere")
        return torch.softmax(F.relu(self.gate_norm(self.gate(shared.mean(dim=(2, 3))))), dim=1)

    def ensemble_logits(self, output: CohortOutput) -> Tensor:
        """Logits (B, K) of the gated ensemble."""
        return (self.gates(output).unsqueeze(2) * torch.stack(output.logits, dim=1)).sum(dim=1)

    def joint_logits(self, output: CohortOutput, batch: Batch) -> list[Tensor]:
        return [*output.logits, self.ensemble_logits(output)]

    def predict(self, output: CohortOutput, images: Tensor) -> dict[str, Tensor]:
        return {**super().predict(output, images), "ensemble": self.ensemble_logits(output)}
