"""OKDHP, online distillation for human pose: branches learn from heatmaps that a learned unit weighs together.

L = μ · Σ_s M(H_s) + λ_ens · M(m) + λ(e) · Σ_s KL(m → H_s), over the heatmaps H_s of every stack, shared ones included.
M(H) = 1/2 · the mean over B, J, h, w of (v · (H − G))², G Gaussians at the joints, v = 1 for a visible joint, else 0.
m = Σ_b a_b ⊙ H_b of the last heatmaps H_b of each branch and a (B, N, J) from the feature aggregation unit, which reads
the shared stem (`fflfast.methods.fau`, in the forms of the code and of the figure). KL(m → H) = 1/(B·h·w) · the sum
over images and visible joints of KL(softmax over the h·w pixels of m ‖ that of H): a distillation graph over rows of
h·w whose teacher is not detached, so that every branch and the unit learn through m too. T = 1, μ = 1, λ_ens = 1, λ = 2
ramped up over 90 epochs. One branch alone has Σ_s M(H_s). Li, Ye, Song, Huang, Pan, ICCV 2021, arXiv 2108.02092; what
the paper leaves open is as in its code (github.com/zhengli97/OKDHP).

The recipe is the code's for MPII: Adam at 2.5e-4 without weight decay (its files name one that its Adam is not given),
150 epochs, batches of 16, rotation ±30°, scale ±25 %, flip. Departures: the numbers of joints, branches and stacks are
free, the last heatmaps are those of the right branch (the code's index is wrong for most numbers of stacks, its issue
8), and one image makes a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..cohort import Batch, Cohort, CohortOutput, StepOutput, StepState
from ..functional import distill_loss
from ..graph import DistillGraph
from ..heatmaps import gaussian_heatmaps
from .base import Method, MethodOptions
from .fau import FAU_FORMS, FeatureAggregation

__all__ = ["OKDHP", "OKDHPOptions"]

_NO_TRUNK = "its feature aggregation unit reads the stem that the branches share, and these share none"


@dataclass(frozen=True)
class OKDHPOptions(MethodOptions):
    """Options of OKDHP, with the weights of the code's script for MPII.

    Attributes:
        ensemble_weight: λ_ens of the ensemble's own error.
        sigma: of the Gaussians, in cells of a heatmap.
        fau: form of the feature aggregation unit, "code" or "figure".
    """

    temperature: float = 1.0
    kl_weight: float = 2.0
    ramp_up_epochs: float = 90.0
    ensemble_weight: float = 1.0
    sigma: float = 2.0
    fau: str = "code"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigma <= 0:
            raise ValueError(f"OKDHPOptions: sigma must be greater than 0, got {self.sigma}")
        if self.fau not in FAU_FORMS:
            raise ValueError(f"OKDHPOptions: fau must be one of {', '.join(FAU_FORMS)}, got {self.fau!r}")


class OKDHP(Method):
    """Online Knowledge Distillation for Human Pose (arXiv 2108.02092); ``method.fau`` weighs the branches.

    A batch has images (B, 3, S, S) and a target (B, J, 3) of x, y, visible in their pixels. A sub-network returns
    ``(heatmaps, feature map, earlier heatmaps)``, each (B, J, h, w), and says in its attribute ``heatmaps`` how many;
    a trunk likewise returns ``(features, (the stem's output, *heatmaps))``. Branches may have unlike numbers of stacks.
    In names of terms, sub0 has the last heatmaps of branch 0, sub0.1 those of its second own stack, shared1 those of
    the second shared one.

    Args:
        cohort: one pose network, or two and more on a trunk.
        num_classes: J.

    Raises:
        ValueError: networks that give no heatmaps, or two and more without a trunk; in a step, heatmaps that do not fit
            the target or each other.
    """

    Options = OKDHPOptions
    recipe = MappingProxyType(
        {
            "epochs": 150,
            "batch_size": 16,
            "optimizer": "adam",
            "lr": 2.5e-4,
            "momentum": 0.0,
            "nesterov": False,
            "weight_decay": 0.0,
            "schedule": "multistep",
            "milestones": (90, 120),
            "gamma": 0.1,
            "rotation": 30.0,
            "scale": 0.25,
            "flip": True,
            "pad": 0,
        }
    )
    task = "pose"
    alone = "okdhp"
    min_sub_networks = 1
    options: OKDHPOptions

    def __init__(self, cohort: Cohort, num_classes: int, options: OKDHPOptions | None = None) -> None:
        super().__init__(cohort, num_classes, options)
        self.joints = num_classes
        names = [f"shared{k}" for k in range(getattr(cohort.trunk, "heatmaps", 0))]
        for b, net in enumerate(cohort.sub_networks):
            count = getattr(net, "heatmaps", 0)
            if not isinstance(count, int) or count < 1:
                raise ValueError(
                    f"OKDHP: expected pose networks, but sub-network {b} ({type(net).__name__}) does not say how many "
                    "heatmaps it gives; take hourglass4 or mobilepose, or add an int attribute heatmaps"
                )
            names += [*(f"sub{b}.{k}" for k in range(count - 1)), f"sub{b}"]
        self.head_names = tuple(names)
        if len(cohort) == 1:
            self.main_output = "sub0"
            self.graph = DistillGraph(len(names), (0.0,) * len(names), names=names)
            return
        channels = getattr(cohort.trunk, "stem_channels", None) or cohort.trunk_channels
        if channels is None:
            raise ValueError(
                f"OKDHP: {_NO_TRUNK}; split them with fflfast.models.split and build Cohort(sub_networks, trunk)"
            )
        edges = DistillGraph.okdhp(len(names)).edges
        self.graph = DistillGraph(len(names) + 1, (0.0,) * (len(names) + 1), (), edges, (*names, "ensemble"))
        self.fau = FeatureAggregation(channels, len(cohort), num_classes, self.options.fau)

    @classmethod
    def refusal(cls, settings: Mapping[str, Any]) -> str | None:
        if settings.get("trunk") != "none" or len(settings.get("arch") or ()) < 2:
            return None
        return f"{_NO_TRUNK}; take pose networks with the same low layers and --trunk auto, or one network"

    @property
    def term_names(self) -> tuple[str, ...]:
        return (*(f"mse/{name}" for name in self.graph.logit_names), *self.graph.term_names)

    @property
    def output_names(self) -> tuple[str, ...]:
        branches = tuple(name for name in self.head_names if name.startswith("sub") and "." not in name)
        return (*branches, "ensemble") if len(branches) > 1 else branches

    def ensemble(self, output: CohortOutput) -> Tensor:
        """The heatmaps m (B, J, h, w) of all branches together, float32 or more."""
        weights = self.fau(output.trunk_stages[0] if output.trunk_stages else output.trunk_features)
        parts = [a[..., None, None] * h for a, h in zip(weights.unbind(1), output.logits, strict=True)]
        return torch.stack(parts).sum(0)

    def forward(
        self,
        output: CohortOutput,
        batch: Batch,
        state: StepState | None = None,
        *,
        label_smoothing: float = 0.0,
    ) -> StepOutput:
        """The loss of a cohort's output, see `Learner.forward`; label_smoothing has to be 0."""
        if label_smoothing:
            raise ValueError(f"OKDHP: label_smoothing must be 0, since joints are no classes, got {label_smoothing}")
        scalars = self.options if state is None else state
        heads = list(output.trunk_stages[1:])
        for stages, logits in zip(output.stages, output.logits, strict=True):
            heads += [*stages, logits]
        self._check(heads, batch.target)
        outputs = self.predict(output, batch.images)
        heads += [outputs["ensemble"]] if len(output.logits) > 1 else []
        maps = torch.stack([head.to(torch.promote_types(head.dtype, torch.float32)) for head in heads])
        height, width = maps.shape[-2:]
        truth, visible = gaussian_heatmaps(
            batch.target, (height, width), tuple(batch.images.shape[-2:]), sigma=self.options.sigma
        )
        errors = ((maps - truth) * visible[..., None, None]).square().flatten(1).sum(1) / max(2 * truth.numel(), 1)
        loss = scalars.ce_weight * errors[: len(self.head_names)].sum()
        terms = errors.detach()
        if len(output.logits) > 1:
            loss = loss + self.options.ensemble_weight * errors[-1]
            pixels = max(len(batch.target), 1) * height * width
            # What is left out gives the 0 that the code gets for two rows of zeros.
            rows = torch.where(visible > 0, 0, -100)
            kl = distill_loss(
                maps.flatten(3).unbind(0),
                rows,
                self.graph,
                temperature=scalars.temperature,
                kl_weight=scalars.kl_weight / pixels,
                reduction="sum",
            )
            loss = loss + kl.loss
            terms = torch.cat([terms, kl.terms / pixels])
        return StepOutput(loss, terms, outputs)

    def predict(self, output: CohortOutput, images: Tensor) -> dict[str, Tensor]:
        """Heatmaps (B, J, h, w) by name: sub0 …, and the ensemble where there is more than one."""
        named = {f"sub{k}": heatmaps for k, heatmaps in enumerate(output.logits)}
        return {**named, "ensemble": self.ensemble(output)} if len(named) > 1 else named

    def _check(self, heads: list[Tensor], target: Tensor) -> None:
        if len(heads) != len(self.head_names):
            raise ValueError(
                f"OKDHP: expected {len(self.head_names)} heatmaps ({', '.join(self.head_names)}), got {len(heads)}; "
                "a network's attribute heatmaps must be what its forward gives"
            )
        expected = (len(target), self.joints)
        for name, head in zip(self.head_names, heads, strict=True):
            if head.dim() != 4 or head.shape[:2] != expected or head.shape != heads[0].shape:
                raise ValueError(
                    f"OKDHP: expected heatmaps {(*expected, *heads[0].shape[2:])} of every stack, got "
                    f"{tuple(head.shape)} for {name}"
                )
        if target.shape != (*expected, 3):
            raise ValueError(
                f"OKDHP: expected a target {(*expected, 3)} of x, y, visible, got {tuple(target.shape)}; pose networks "
                "learn the joints of a pose data set"
            )
