"""The floor of a step: the sub-networks of a cohort, each with its cross-entropy, and nothing between them."""

from __future__ import annotations

from ..cohort import Cohort
from ..graph import DistillGraph
from ..methods import Method, MethodOptions

__all__ = ["Floor"]


class Floor(Method):
    """Cross-entropy of every sub-network: no fusion, no mutual loss. What a method costs is its time above this."""

    min_sub_networks = 1
    main_output = "sub0"  # which one network has too

    def __init__(self, cohort: Cohort, num_classes: int, options: MethodOptions | None = None) -> None:
        super().__init__(cohort, num_classes, options)
        self.graph = DistillGraph(len(cohort), ce_weights=(1.0,) * len(cohort))
