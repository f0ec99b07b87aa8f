"""Feature Fusion Learning: the fused classifier teaches each sub-network, the ensemble teaches the fused classifier.

L = CE(z_1) + … + CE(z_N) + CE(z_f) + λ(e) · [Σ_k KL_T(z_f → z_k) + KL_T(mean z → z_f)], T = 3, teachers detached;
KL_T(t → s) = T² · KL(softmax(t/T) ‖ softmax(s/T)), mean over the batch; z_f = fusion module of the N feature maps,
whose gradient flows into every sub-network. Kim, Hyun, Chung, Kwak, ICPR 2020, arXiv 1904.09058.

Departure: the paper's code adds 1e-7 to the teacher's probabilities; here that is the option target_eps, off by
default. Unlike architectures: the paper does not say how sizes are matched; see `fflfast.nn.FeatureFusion`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..cohort import Batch, Cohort, CohortOutput
from ..graph import DistillGraph
from ..nn import FeatureFusion
from .base import Method, MethodOptions, known_channels

__all__ = ["FFL", "FFLOptions", "fusion_channels"]


@dataclass(frozen=True)
class FFLOptions(MethodOptions):
    """Options of FFL.

    Attributes:
        fusion_channels: output channels of the pointwise convolution; None takes the mean of the feature maps'
            channels, rounded (for equal sub-networks their own number, as in the paper).
        fusion_weight_decay: weight decay of the fusion module.
        target_eps: added to the teacher's probabilities without renormalising; 1e-7 reproduces the paper's code.
    """

    fusion_channels: int | None = None
    fusion_weight_decay: float = 1e-5
    target_eps: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        channels = self.fusion_channels
        if channels is not None and (isinstance(channels, bool) or not isinstance(channels, int) or channels < 1):
            raise ValueError(f"FFLOptions: fusion_channels must be an int of at least 1 or None, got {channels!r}")
        for name in ("fusion_weight_decay", "target_eps"):
            if getattr(self, name) < 0:
                raise ValueError(f"FFLOptions: {name} must not be negative, got {getattr(self, name)}")


def fusion_channels(channels: Sequence[int]) -> int:
    """The paper's n·C → C, for unequal feature maps ΣC_k → round(ΣC_k / N)."""
    return max(1, round(sum(channels) / len(channels)))


class FFL(Method):
    """Feature Fusion Learning (arXiv 1904.09058); ``method.fusion`` is its `fflfast.nn.FeatureFusion`.

    Raises:
        ValueError: fewer than two sub-networks, or one without a spatial feature map.
    """

    Options = FFLOptions
    main_output = "fused"
    options: FFLOptions

    def __init__(self, cohort: Cohort, num_classes: int, options: FFLOptions | None = None) -> None:
        super().__init__(cohort, num_classes, options)
        channels = known_channels(cohort, "FFL")
        self.graph = DistillGraph.ffl(len(channels))
        self.target_eps = self.options.target_eps
        self.fusion = FeatureFusion(channels, self.options.fusion_channels or fusion_channels(channels), num_classes)

    def parameter_options(self) -> dict[str, dict[str, Any]]:
        return {"fusion": {"weight_decay": self.options.fusion_weight_decay}}

    def joint_logits(self, output: CohortOutput, batch: Batch) -> list[Tensor]:
        return [*output.logits, self.fused_logits(output)]

    def fused_logits(self, output: CohortOutput) -> Tensor:
        """Logits (B, K) of the fused classifier."""
        for k, feature_map in enumerate(output.features):
            if feature_map is None:
                raise ValueError(f"FFL: sub-network {k} returned None as its feature map; it said it would have one")
        return self.fusion(output.features)

    def predict(self, output: CohortOutput, images: Tensor) -> dict[str, Tensor]:
        return {**super().predict(output, images), "fused": self.fused_logits(output)}
