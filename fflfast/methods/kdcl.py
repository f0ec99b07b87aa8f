"""KDCL: each sub-network sees an augmentation of its own, and what is best in their logits teaches all of them.

L = Σ_i [CE(z_i) + λ · KL_T(z_t → z_i)], z_t detached, λ = 1, T = 3, no ramp-up; KL_T(t → s) = T² · KL(softmax(t/T) ‖
softmax(s/T)), mean over the batch. The teacher z_t is one of
    naive:      z_k of the network k whose cross-entropy in the batch is lowest;
    linear:     Σ_i α_i z_i with the α ≥ 0, Σ_i α_i = 1, for which the cross-entropy of the batch is lowest;
    min_logit:  for each image with class y and each class c, min over i of (z_ic − z_iy), which bounds what any such
                combination can reach: the default.
Guo, Wang, Wu, Yu, Liang, Hu, Luo, CVPR 2020. The form that weighs networks by a validation set is not here.

The convex problem of linear, whose solver the paper leaves open, is solved by mirror descent: eight steps along
α ← α · exp(−t · gradient), normalised, with the best t of a fixed ladder, so that the cross-entropy never rises; no
step asks the host. T and the recipe are those of FFL's code for CIFAR.

Departure: of several processes each finds k and α on its own share of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cohort import Batch, Cohort, CohortOutput
from ..graph import DistillGraph
from .base import Method, MethodOptions

__all__ = ["KDCL", "KDCLOptions"]

_FORMS = ("naive", "linear", "min_logit")
_STEPS = 8


@dataclass(frozen=True)
class KDCLOptions(MethodOptions):
    """Options of KDCL.

    Attributes:
        ensemble: how the teacher is made of the logits: naive, linear or min_logit.
    """

    ramp_up_epochs: float = 0.0
    ensemble: Literal["naive", "linear", "min_logit"] = "min_logit"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ensemble not in _FORMS:
            raise ValueError(f"KDCLOptions: ensemble must be one of {', '.join(_FORMS)}, got {self.ensemble!r}")


class KDCL(Method):
    """Collaborative learning from the best of all logits (CVPR 2020); needs logits alone, one view a sub-network.

    Raises:
        ValueError: fewer than two sub-networks.
    """

    Options = KDCLOptions
    shared_stages = -1
    options: KDCLOptions

    def __init__(self, cohort: Cohort, num_classes: int, options: KDCLOptions | None = None) -> None:
        super().__init__(cohort, num_classes, options)
        self.graph = DistillGraph.kdcl(len(cohort))
        self.num_views = len(cohort)

    @classmethod
    def refusal(cls, settings: Mapping[str, Any]) -> str | None:
        if settings["options"]["ensemble"] == "min_logit" and (settings["mixup"] or settings["cutmix"]):
            return (
                "min_logit needs one class an image, which --mixup and --cutmix mix; leave them away, or take "
                "--options.ensemble linear"
            )
        return None

    @property
    def output_names(self) -> tuple[str, ...]:
        return self.graph.logit_names[:-1]  # the teacher was made with the answer before its eyes

    def joint_logits(self, output: CohortOutput, batch: Batch) -> list[Tensor]:
        return [*output.logits, self.teacher_logits(output.logits, batch.target)]

    @torch.no_grad()
    def teacher_logits(self, logits: tuple[Tensor, ...], target: Tensor) -> Tensor:
        """The teacher's logits (B, K), from those of N networks (B, K) and classes (B,) or probabilities (B, K).

        Raises:
            ValueError: min_logit with probabilities.
        """
        z = torch.stack(logits)
        own = z.dtype
        z = z.float() if own in (torch.float16, torch.bfloat16) else z
        if self.options.ensemble == "min_logit":
            if target.is_floating_point():
                raise ValueError(
                    "KDCL: min_logit needs one class an image, got probabilities; take ensemble='linear' or 'naive'"
                )
            return (z - _at(z, target)).amin(0).to(own)
        # An ignored row has the same cross-entropy for every network when its logits are 0, and so decides nothing.
        judged = z if target.is_floating_point() else z.masked_fill((target < 0)[:, None], 0.0)
        right = _at(judged, target).sum((1, 2)) / max(len(target), 1)
        if self.options.ensemble == "naive":
            best = (judged.logsumexp(-1).sum(1) / max(len(target), 1) - right).argmin()
            return z.index_select(0, best.view(1)).squeeze(0).to(own)
        with torch.autocast(z.device.type, enabled=False):  # products of matrices would be rounded
            return torch.tensordot(_lowest_cross_entropy(judged, right), z, 1).to(own)


def _at(z: Tensor, target: Tensor) -> Tensor:
    """The logit of the class, (N, B, 1), of logits (N, B, K)."""
    if target.is_floating_point():
        return (z * target.to(z.dtype)).sum(-1, keepdim=True)
    return z.gather(-1, target.clamp(min=0).expand(len(z), -1).unsqueeze(-1))


def _lowest_cross_entropy(z: Tensor, right: Tensor) -> Tensor:
    """Weights α (N,) on the simplex for which Σ α_i z_i of logits (N, B, K) has the lowest mean cross-entropy.

    ``right``, (N,), is the mean logit of the right class: the cross-entropy, mean_b logsumexp(Σ α_i z_ib) − α · right,
    is convex in α. The steps are θ ← θ − t · gradient with α = softmax(θ), the gradient centred and scaled to 1.
    """
    rows = max(z.shape[1], 1)
    ladder = torch.cat([z.new_zeros(1), torch.exp2(torch.arange(-6, 6, dtype=z.dtype, device=z.device))])
    theta = z.new_zeros(len(z))
    for _ in range(_STEPS):
        alpha = F.softmax(theta, 0)
        p = F.softmax(torch.tensordot(alpha, z, 1), -1)
        gradient = (p * z).sum((1, 2)) / rows - right
        gradient = gradient - alpha @ gradient
        gradient = gradient / gradient.abs().amax().clamp_min(torch.finfo(z.dtype).tiny)
        tried = theta - ladder[:, None] * gradient
        weights = F.softmax(tried, -1)
        values = torch.tensordot(weights, z, 1).logsumexp(-1).sum(1) / rows - weights @ right
        theta = tried.index_select(0, values.argmin().view(1)).squeeze(0)
        # What is far below the largest has no weight, and would not come back from further below in a step.
        theta = (theta - theta.amax()).clamp_min(-20.0)
    return F.softmax(theta, 0)
