"""What every method is: an nn.Module that owns what it adds to a cohort, its graph and its loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor, nn

from ..cohort import Cohort, CohortOutput, StepOutput, StepState
from ..functional import distill_loss
from ..graph import DistillGraph

__all__ = ["CIFAR_RECIPE", "Method", "MethodOptions"]

# The schedule that FFL's code trains CIFAR with, and the line of papers around it took over.
CIFAR_RECIPE: Mapping[str, Any] = MappingProxyType(
    {
        "epochs": 300,
        "batch_size": 128,
        "lr": 0.1,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 1e-4,
        "schedule": "multistep",
        "milestones": (150, 225),
        "gamma": 0.1,
    }
)


@dataclass(frozen=True)
class MethodOptions:
    """What every method can be told.

    Attributes:
        temperature: T of the distillation terms, > 0.
        kl_weight: λ once the ramp-up is over, finite.
        ce_weight: μ of the cross-entropy terms, finite.
        ramp_up_epochs: R of λ(e) = kl_weight · exp(−5(1 − min(e, R)/R)²), e = epoch from 0; 0 means no ramp-up.
    """

    temperature: float = 3.0
    kl_weight: float = 1.0
    ce_weight: float = 1.0
    ramp_up_epochs: float = 80.0

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if type(f.default) not in (int, float):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{type(self).__name__}: {f.name} must be a finite number, got {value!r}")
        if self.temperature <= 0:
            raise ValueError(f"{type(self).__name__}: temperature must be greater than 0, got {self.temperature}")
        if self.ramp_up_epochs < 0:
            raise ValueError(f"{type(self).__name__}: ramp_up_epochs must not be negative, got {self.ramp_up_epochs}")


class Method(nn.Module):
    """Base of the methods; a subclass sets the graph and adds modules, logits or terms.

    Subclasses write a file of their own with an options dataclass, a `recipe`, `__init__` and, where the method
    brings logits of its own, `joint_logits` and `predict`.

    Args:
        cohort: the sub-networks; only read (counts and channels), never owned.
        num_classes: K.
        options: an instance of the class's `Options`; None takes its defaults.

    Attributes:
        options: as given.
        graph: who teaches whom.
        main_output: the key of `predict` by which a run is judged.
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    recipe: ClassVar[Mapping[str, Any]] = CIFAR_RECIPE
    min_sub_networks: ClassVar[int] = 2
    max_sub_networks: ClassVar[int | None] = None
    main_output: str = "ensemble"
    graph: DistillGraph
    target_eps: float = 0.0

    def __init__(self, cohort: Cohort, num_classes: int, options: MethodOptions | None = None) -> None:
        super().__init__()
        name, count = type(self).__name__, len(cohort)
        if options is not None and not isinstance(options, self.Options):
            raise TypeError(f"{name}: options must be a {self.Options.__name__}, got {type(options).__name__}")
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"{name}: num_classes must be a positive int, got {num_classes!r}")
        if count < self.min_sub_networks:
            raise ValueError(f"{name}: needs at least {self.min_sub_networks} sub-networks, got {count}")
        if self.max_sub_networks is not None and count > self.max_sub_networks:
            raise ValueError(f"{name}: takes at most {self.max_sub_networks} sub-network(s), got {count}")
        self.options = self.Options() if options is None else options

    @property
    def term_names(self) -> tuple[str, ...]:
        """Names of the entries of ``StepOutput.terms``."""
        return self.graph.term_names

    def parameter_options(self) -> dict[str, dict[str, Any]]:
        """Optimizer settings by parameter-name prefix in the method, e.g. ``{"fusion": {"weight_decay": 1e-5}}``."""
        return {}

    def joint_logits(self, output: CohortOutput) -> list[Tensor]:
        """The M logits tensors (B, K) in the graph's order."""
        return list(output.logits)

    def forward(
        self,
        output: CohortOutput,
        target: Tensor,
        state: StepState | None = None,
        *,
        label_smoothing: float = 0.0,
    ) -> StepOutput:
        """The loss of a cohort's output, see `Learner.forward`."""
        logits = self.joint_logits(output)
        scalars = self.options if state is None else state
        loss, terms = distill_loss(
            logits,
            target,
            self.graph,
            temperature=scalars.temperature,
            kl_weight=scalars.kl_weight,
            ce_weight=scalars.ce_weight,
            label_smoothing=label_smoothing,
            target_eps=self.target_eps,
        )
        return StepOutput(loss, terms, dict(zip(self.graph.logit_names, logits, strict=True)))

    def predict(self, output: CohortOutput) -> dict[str, Tensor]:
        """Logits (B, K) by name: sub0 …, and the mean ensemble where there is more than one."""
        named = {f"sub{k}": z for k, z in enumerate(output.logits)}
        if len(output.logits) > 1:
            named["ensemble"] = sum(output.logits[1:], output.logits[0]) / len(output.logits)
        return named
