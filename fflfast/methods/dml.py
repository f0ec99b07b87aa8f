"""Deep Mutual Learning: every sub-network teaches every other one.

L = Σ_i [CE(z_i) + λ/(N−1) · Σ_{j≠i} KL(p_j ‖ p_i)], teachers detached, T = 1, no ramp-up. Zhang, Xiang, Hospedales,
Lu, CVPR 2018, arXiv 1706.00384.

Departure: the paper updates the networks one after the other and recomputes the predictions in between; here all
learn from the predictions of one forward, in one backward, as every later work does. The recipe is the one that FFL's
code has for CIFAR. As in the paper the networks share no layer unless a run asks for a trunk.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..cohort import Cohort
from ..graph import DistillGraph
from .base import Method, MethodOptions

__all__ = ["DML", "DMLOptions"]


@dataclass(frozen=True)
class DMLOptions(MethodOptions):
    """Options of DML: the paper's temperature of 1 and no ramp-up."""

    temperature: float = 1.0
    ramp_up_epochs: float = 0.0


class DML(Method):
    """Deep Mutual Learning (arXiv 1706.00384); needs logits alone.

    Raises:
        ValueError: fewer than two sub-networks.
    """

    Options = DMLOptions
    shared_stages = -1

    def __init__(self, cohort: Cohort, num_classes: int, options: DMLOptions | None = None) -> None:
        super().__init__(cohort, num_classes, options)
        self.graph = DistillGraph.dml(len(cohort))
