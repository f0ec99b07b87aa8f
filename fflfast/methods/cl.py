"""Collaborative learning: the mean of the others teaches each sub-network, and shared layers get the mean gradient.

L = Σ_i [0.5 · CE(z_i) + 0.5 · KL_T(m_i → z_i)], m_i = mean of z_j over j ≠ i, detached, T = 2, no ramp-up; KL_T(t → s)
= T² · KL(softmax(t/T) ‖ softmax(s/T)), mean over the batch. What the N sub-networks send back into the layers that they
share is divided by N (the paper's backpropagation rescaling), so that these layers see a loss of one network's size and
each head its full gradient. Song, Chai, NeurIPS 2018, arXiv 1805.11761 (CL-ILR).

Departure: the paper shares low layers in a tree, pairs of heads further up than all; here all share one trunk. Without
one the sub-networks learn collaboratively from separate weights, and nothing is rescaled. The recipe is the one that
FFL's code has for CIFAR, of the same schedule.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..cohort import Cohort
from ..graph import DistillGraph
from .base import Method, MethodOptions

__all__ = ["CL", "CLOptions"]


@dataclass(frozen=True)
class CLOptions(MethodOptions):
    """Options of CL: the paper's temperature and weights, and no ramp-up."""

    temperature: float = 2.0
    kl_weight: float = 0.5
    ce_weight: float = 0.5
    ramp_up_epochs: float = 0.0


class CL(Method):
    """Collaborative learning with a rescaled trunk gradient (arXiv 1805.11761); needs logits alone.

    Raises:
        ValueError: fewer than two sub-networks.
    """

    Options = CLOptions

    def __init__(self, cohort: Cohort, num_classes: int, options: CLOptions | None = None) -> None:
        super().__init__(cohort, num_classes, options)
        self.graph = DistillGraph.cl(len(cohort))
        self.trunk_gradient_scale = 1.0 / len(cohort)
