"""One network alone with cross-entropy: what every method is compared with."""

from __future__ import annotations

from ..cohort import Cohort
from ..graph import DistillGraph
from .base import Method, MethodOptions

__all__ = ["Single"]


class Single(Method):
    """Plain training of one network.

    Raises:
        ValueError: more than one sub-network.
    """

    min_sub_networks = 1
    max_sub_networks = 1
    main_output = "sub0"

    def __init__(self, cohort: Cohort, num_classes: int, options: MethodOptions | None = None) -> None:
        super().__init__(cohort, num_classes, options)
        self.graph = DistillGraph.single()
