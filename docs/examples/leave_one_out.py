"""A method of one's own: each network is taught by an ensemble in which its own voice counts little, or not at all.

L = Σ_i [CE(z_i) + λ(e) · KL_T(t_i → z_i)], t_i = w·z_i + (1 − w)/(N − 1) · Σ_{j≠i} z_j, detached.
"""

from dataclasses import dataclass

from fflfast import DistillGraph
from fflfast.methods import Method, MethodOptions


@dataclass(frozen=True)
class LeaveOneOutOptions(MethodOptions):
    """Options; those of every method come with the base class, and a default here replaces its own.

    Attributes:
        own_weight: w, how much a network counts in its own teacher, in [0, 1).
    """

    temperature: float = 2.0
    ramp_up_epochs: float = 20.0
    own_weight: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.own_weight < 1:
            raise ValueError(f"LeaveOneOutOptions: own_weight must be in [0, 1), got {self.own_weight}")


class LeaveOneOut(Method):
    """Learn from the others' ensemble; needs two networks or more, and their logits alone."""

    Options = LeaveOneOutOptions

    def __init__(self, cohort, num_classes, options=None):
        super().__init__(cohort, num_classes, options)
        n, own = len(cohort), self.options.own_weight
        others = (1 - own) / (n - 1)
        teachers = [[own if j == i else others for j in range(n)] for i in range(n)]
        names = [*(f"sub{i}" for i in range(n)), *(f"teacher{i}" for i in range(n))]
        edges = [(n + i, i, 1.0) for i in range(n)]  # teacher i, which is distribution n + i, teaches network i
        self.graph = DistillGraph(n, [1.0] * n, teachers, edges, names)
