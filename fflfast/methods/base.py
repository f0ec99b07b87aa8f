"""What every method is: an nn.Module that owns what it adds to a cohort, its graph and its loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..cohort import Batch, Cohort, CohortOutput, StepOutput, StepState
from ..functional import distill_loss
from ..graph import DistillGraph

__all__ = ["CIFAR_RECIPE", "Method", "MethodOptions", "known_channels", "pooled_features", "row_mean"]

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
    brings logits or terms of its own, `joint_logits`, `extra_terms` and `predict`.

    Args:
        cohort: the sub-networks; only read (counts and channels), never owned.
        num_classes: K.
        options: an instance of the class's `Options`; None takes its defaults.

    Attributes:
        options: as given.
        graph: who teaches whom.
        main_output: the key of `predict` by which a run is judged.
        num_views: how many augmentations of each image a step takes: 1, or one a sub-network.
        extra_term_names: names of the terms that `extra_terms` adds to those of the graph.
        trunk_gradient_scale: see `Cohort`.
        task: name of the task that the method is for (class attribute, as those below).
        alone: name of the method by which one network of the same kind trains alone.
        shared_stages: how many stages of equal networks of ours are shared by default, besides the stem; None: as the
            network has it (all but the last), -1: no layer at all.
        needs_stages: whether the sub-networks have to return their inner feature maps.
        needs_teacher: whether ``__init__`` takes ``teacher``, a frozen module from images to logits (B, K).
        replicated: names of buffers that each process keeps equal to those of the others by itself.
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    recipe: ClassVar[Mapping[str, Any]] = CIFAR_RECIPE
    task: ClassVar[str] = "classification"
    alone: ClassVar[str] = "single"
    min_sub_networks: ClassVar[int] = 2
    max_sub_networks: ClassVar[int | None] = None
    shared_stages: ClassVar[int | None] = None
    needs_stages: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = False
    replicated: ClassVar[tuple[str, ...]] = ()
    main_output: str = "ensemble"
    graph: DistillGraph
    target_eps: float = 0.0
    num_views: int = 1
    extra_term_names: tuple[str, ...] = ()
    trunk_gradient_scale: float = 1.0

    def __init__(self, cohort: Cohort, num_classes: int, options: MethodOptions | None = None) -> None:
        super().__init__()
        name, count = type(self).__name__, len(cohort)
        if options is not None and not isinstance(options, self.Options):
            raise TypeError(f"{name}: options must be a {self.Options.__name__}, got {type(options).__name__}")
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"{name}: num_classes must be a positive int, got {num_classes!r}")
        if count < self.min_sub_networks:
            raise ValueError(
                f"{name}: needs at least {self.min_sub_networks} sub-networks, got {count}; give more of them, one "
                "--arch each"
            )
        if self.max_sub_networks is not None and count > self.max_sub_networks:
            raise ValueError(
                f"{name}: takes at most {self.max_sub_networks} sub-network(s), got {count}; give fewer, one --arch "
                "each, or take another method"
            )
        self.options = self.Options() if options is None else options

    # ---- what a run asks before it builds a method

    @classmethod
    def refusal(cls, settings: Mapping[str, Any]) -> str | None:
        """Why the method cannot run with these settings (the fields of a resolved config), None if it can."""
        return None

    @classmethod
    def architectures(cls, names: Sequence[str]) -> list[str]:
        """The networks that a run builds when these are asked for."""
        return list(names)

    # ---- what a run asks of the built method

    @property
    def term_names(self) -> tuple[str, ...]:
        """Names of the entries of ``StepOutput.terms``: those of the graph, then `extra_term_names`."""
        return (*self.graph.term_names, *self.extra_term_names)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of ``StepOutput.logits``, which are judged in training."""
        return self.graph.logit_names

    def parameter_options(self) -> dict[str, dict[str, Any]]:
        """Optimizer settings by parameter-name prefix in the method, e.g. ``{"fusion": {"weight_decay": 1e-5}}``.

        ``lr`` is a peak rate, which the run's schedule multiplies as it does its own. ``optimizer`` ("sgd" or "adam")
        gives these parameters an optimizer of their own; settings that are not named are then PyTorch's.
        """
        return {}

    def attach(self, targets: Tensor) -> None:
        """Learn of the training set, once, before the first step: int64 (n,), the class of each image by its index."""

    def after_step(self, bad: Tensor | None = None) -> None:
        """Follow the weights after an optimizer step, in place on the device and without a word to the host.

        Where ``bad``, a 0-dim bool, the step was left out, and nothing may change.
        """

    # ---- a step

    def beside(self, images: Tensor | Sequence[Tensor]) -> list[Callable[[], Any]]:
        """Forwards without gradient that run beside the sub-networks; their results are ``output.beside``."""
        return []

    def joint_logits(self, output: CohortOutput, batch: Batch) -> list[Tensor]:
        """The M logits tensors (B, K) in the graph's order."""
        return list(output.logits)

    def extra_terms(
        self, output: CohortOutput, batch: Batch, state: StepState | None
    ) -> list[tuple[Tensor | float, Tensor]]:
        """Weight and value of each term beside the graph's, in the order of `extra_term_names`.

        A value is 0-dim: a mean over the batch, 0 for an empty one (see `row_mean`). Rows whose target is ignored are
        left out of the graph's terms alone: these here count every row.
        """
        return []

    def forward(
        self,
        output: CohortOutput,
        batch: Batch,
        state: StepState | None = None,
        *,
        label_smoothing: float = 0.0,
    ) -> StepOutput:
        """The loss of a cohort's output, see `Learner.forward`."""
        logits = self.joint_logits(output, batch)
        scalars = self.options if state is None else state
        loss, terms = distill_loss(
            logits,
            batch.target,
            self.graph,
            temperature=scalars.temperature,
            kl_weight=scalars.kl_weight,
            ce_weight=scalars.ce_weight,
            label_smoothing=label_smoothing,
            target_eps=self.target_eps,
        )
        extra = self.extra_terms(output, batch, state)
        if extra:
            loss = torch.stack([loss, *(weight * term for weight, term in extra)]).sum()
            terms = torch.cat([terms, torch.stack([term.detach().to(terms.dtype) for _, term in extra])])
        return StepOutput(loss, terms, dict(zip(self.graph.logit_names, logits, strict=True)))

    def predict(self, output: CohortOutput, images: Tensor) -> dict[str, Tensor]:
        """Logits (B, K) by name: sub0 …, and the mean ensemble where there is more than one."""
        named = {f"sub{k}": z for k, z in enumerate(output.logits)}
        if len(output.logits) > 1:
            named["ensemble"] = sum(output.logits[1:], output.logits[0]) / len(output.logits)
        return named


def row_mean(values: Tensor) -> Tensor:
    """The mean over all elements of values (B, …); 0 with a graph for B = 0, as a share of a batch may be."""
    return values.sum() / max(values.numel(), 1)


def pooled_features(output: CohortOutput, method: str) -> list[Tensor]:
    """The N feature maps, averaged over H × W: (B, C_k) each.

    Raises:
        ValueError: a sub-network without a spatial feature map; the message names ``method``.
    """
    pooled = []
    for k, feature_map in enumerate(output.features):
        if feature_map is None:
            raise ValueError(f"{method}: sub-network {k} returned None as its feature map; it said it would have one")
        pooled.append(feature_map.mean(dim=(2, 3)))
    return pooled


def known_channels(cohort: Cohort, method: str) -> list[int]:
    """Channels C_k of each sub-network's feature map.

    Raises:
        ValueError: a sub-network without a spatial feature map; the message names ``method``.
    """
    channels = []
    for k, c in enumerate(cohort.feature_channels):
        if c is None:
            raise ValueError(
                f"{method}: sub-network {k} ({type(cohort.sub_networks[k]).__name__}) has no spatial feature map, "
                "which it needs; take a convolutional network, or a method on logits alone such as dml"
            )
        channels.append(c)
    return channels
