"""Cohort: N sub-networks that learn together. Learner: cohort + method, the one module that a trainer handles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["Cohort", "CohortOutput", "Learner", "StepOutput", "StepState", "serial"]

Result = TypeVar("Result")


class CohortOutput(NamedTuple):
    """What one forward of a cohort gives, one entry a sub-network.

    Attributes:
        logits: N tensors (B, K).
        features: N feature maps (B, C_k, H_k, W_k), after the last activation, not detached; None for a network
            without one.
        trunk_features: the output of the shared trunk (B, C, H, W), or None without a trunk; (N·B, C, H, W) where each
            sub-network has a view of its own.
        stages: N tuples of inner feature maps, empty for sub-networks that return none.
        trunk_stages: inner feature maps of the trunk, empty for one that returns none.
        beside: what ran beside the sub-networks gave, in order, see `Cohort.forward`.
    """

    logits: tuple[Tensor, ...]
    features: tuple[Tensor | None, ...]
    trunk_features: Tensor | None
    stages: tuple[tuple[Tensor, ...], ...]
    trunk_stages: tuple[Tensor, ...] = ()
    beside: tuple[Any, ...] = ()


class StepOutput(NamedTuple):
    """What one training step gives.

    Attributes:
        loss: the total, 0-dim, with a graph.
        terms: (num_terms,), detached, named by ``learner.term_names``.
        logits: by name, as the method's graph has them.
    """

    loss: Tensor
    terms: Tensor
    logits: dict[str, Tensor]


class StepState:
    """What changes from step to step, as 0-dim tensors that are updated in place and so may sit in a CUDA graph.

    Attributes:
        kl_weight: λ (ramp-up included), float32.
        ce_weight: μ, float32.
        temperature: T, float32.
        learning_rate: float32.
        step: int64, steps taken in the whole run.
        epoch: int64, counted from 0.
        batch: int64, place of the step in its epoch, counted from 0.
    """

    def __init__(
        self,
        device: torch.device | str | None = None,
        *,
        kl_weight: float = 1.0,
        ce_weight: float = 1.0,
        temperature: float = 1.0,
        learning_rate: float = 0.0,
        step: int = 0,
        epoch: int = 0,
        batch: int = 0,
    ) -> None:
        self.kl_weight = torch.tensor(kl_weight, dtype=torch.float32, device=device)
        self.ce_weight = torch.tensor(ce_weight, dtype=torch.float32, device=device)
        self.temperature = torch.tensor(temperature, dtype=torch.float32, device=device)
        self.learning_rate = torch.tensor(learning_rate, dtype=torch.float32, device=device)
        self.step = torch.tensor(step, dtype=torch.int64, device=device)
        self.epoch = torch.tensor(epoch, dtype=torch.int64, device=device)
        self.batch = torch.tensor(batch, dtype=torch.int64, device=device)


def serial(thunks: Sequence[Callable[[], Result]]) -> list[Result]:
    """The default runner of a cohort: one sub-network after the other."""
    return [thunk() for thunk in thunks]


class Cohort(nn.Module):
    """N sub-networks, optionally on a shared trunk; each part runs exactly once a forward.

    A sub-network is an `nn.Module` whose ``forward(x)`` returns ``(logits, feature_map)``, or
    ``(logits, feature_map, stages)`` with a sequence of inner feature maps; feature_map may be None.

    Args:
        sub_networks: N ≥ 1 distinct modules; architectures may differ.
        trunk: low layers that run once; the sub-networks get its output. It may return ``(output, stages)`` as well.

    Attributes:
        runner: called with thunks, returns their results in order. An execution plan replaces it.
        trunk_gradient_scale: by what the gradient that the sub-networks send into the trunk is multiplied.

    Raises:
        ValueError, TypeError: no sub-network, something that is not a module, or one module given twice.
    """

    def __init__(self, sub_networks: Sequence[nn.Module], trunk: nn.Module | None = None) -> None:
        super().__init__()
        networks = list(sub_networks)
        if not networks:
            raise ValueError("Cohort: expected at least one sub-network, got none")
        parts = [*networks, *([] if trunk is None else [trunk])]
        for k, part in enumerate(parts):
            if not isinstance(part, nn.Module):
                raise TypeError(f"Cohort: part {k} must be an nn.Module, got {type(part).__name__}")
        if len({id(part) for part in parts}) != len(parts):
            raise ValueError(
                "Cohort: one module was given twice; sub-networks that learn from each other need own weights"
            )
        self.trunk = trunk
        self.sub_networks = nn.ModuleList(networks)
        self.runner: Callable[[Sequence[Callable[[], Any]]], list[Any]] = serial
        self.trunk_gradient_scale = 1.0

    def __len__(self) -> int:
        return len(self.sub_networks)

    def forward(self, x: Tensor | Sequence[Tensor], beside: Sequence[Callable[[], Any]] = ()) -> CohortOutput:
        """Run every part once.

        Args:
            x: images (B, C, H, W) for all sub-networks, or a sequence of N such tensors, one view a sub-network.
                With a trunk, views are stacked and the trunk runs once on N·B images.
            beside: further networks without gradient that run while the sub-networks do, such as a frozen teacher.

        Raises:
            ValueError: another number of views than sub-networks, or views of unequal shape on a trunk.
            TypeError: a sub-network that does not return (logits, feature_map), a trunk that returns no tensor.
        """
        count = len(self.sub_networks)
        views = None if isinstance(x, Tensor) else list(x)
        if views is not None and len(views) != count:
            raise ValueError(f"Cohort: expected {count} views, one a sub-network, got {len(views)}")
        trunk_features: Tensor | None = None
        trunk_stages: tuple[Tensor, ...] = ()
        inputs: Sequence[Tensor]
        if self.trunk is not None:
            if views is not None and any(v.shape != views[0].shape for v in views):
                raise ValueError(
                    f"Cohort: views that share a trunk must have one shape, got {[tuple(v.shape) for v in views]}"
                )
            trunk_features, trunk_stages = _trunk_output(self.trunk(x if views is None else torch.cat(views)))
            shared = _scale_gradient(trunk_features, self.trunk_gradient_scale)
            inputs = [shared] * count if views is None else shared.chunk(count)
        else:
            inputs = [x] * count if views is None else views  # type: ignore[list-item]
        thunks = [_thunk(net, inputs[k], k) for k, net in enumerate(self.sub_networks)]
        results = self.runner([*thunks, *map(_without_gradient, beside)])
        logits, features, stages = zip(*results[:count], strict=True)
        return CohortOutput(logits, features, trunk_features, stages, trunk_stages, tuple(results[count:]))

    @property
    def feature_channels(self) -> tuple[int | None, ...]:
        """Channels C_k of each sub-network's feature map, None for a network without one.

        Read from the sub-networks' attribute ``feature_channels`` where all have it, else from one evaluation of
        a blank image, which leaves weights, buffers, mode and random state as they are.
        """
        if all(hasattr(net, "feature_channels") for net in self.sub_networks):
            return tuple(net.feature_channels for net in self.sub_networks)  # type: ignore[misc]
        return tuple(f.shape[1] if f is not None and f.dim() == 4 else None for f in self._probe().features)

    @property
    def trunk_channels(self) -> int | None:
        """Channels of the trunk's output, None without a trunk; found as `feature_channels` are."""
        found = None if self.trunk is None else self._probe().trunk_features
        return None if found is None else found.shape[1]

    @property
    def stage_shapes(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Shapes (C, H, W) of each sub-network's stages for one small blank image; empty for one that returns none."""
        return tuple(tuple(tuple(stage.shape[1:]) for stage in stages) for stages in self._probe().stages)

    @torch.no_grad()
    def _probe(self) -> CohortOutput:
        first = next((m for m in self.modules() if isinstance(m, nn.Conv2d)), None)
        like = next(self.parameters(), torch.empty(0))
        channels = 3 if first is None else first.in_channels
        modes = [(m, m.training) for m in self.modules()]
        self.eval()
        problem: Exception | None = None
        try:
            with torch.random.fork_rng([like.device] if like.is_cuda else ()):
                for size in (32, 64, 224, 299):
                    try:
                        return self(torch.zeros(1, channels, size, size, dtype=like.dtype, device=like.device))
                    except Exception as error:  # a network refuses a size in whatever way it likes
                        problem = error
        finally:
            for module, mode in modes:
                module.training = mode
        raise ValueError(
            "Cohort: could not find the channels of the feature maps by a trial on a blank image; give each "
            f"sub-network an int attribute feature_channels (the trial said: {type(problem).__name__}: {problem})"
        ) from problem


def _trunk_output(out: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    if isinstance(out, Tensor):
        return out, ()
    if isinstance(out, tuple) and len(out) == 2 and isinstance(out[0], Tensor):
        return out[0], tuple(out[1])
    raise TypeError(f"Cohort: the trunk must return one tensor or (tensor, stages), got {type(out).__name__}")


class _ScaledGradient(torch.autograd.Function):
    """The identity, whose backward multiplies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.scale, None


def _scale_gradient(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1.0 else _ScaledGradient.apply(x, scale)


def _without_gradient(thunk: Callable[[], Result]) -> Callable[[], Result]:
    return torch.no_grad()(thunk)


def _thunk(net: nn.Module, x: Tensor, k: int) -> Callable[[], tuple[Tensor, Tensor | None, tuple[Tensor, ...]]]:
    def run() -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        out = net(x)
        if not isinstance(out, tuple) or len(out) not in (2, 3) or not isinstance(out[0], Tensor):
            raise TypeError(
                f"Cohort: sub-network {k} ({type(net).__name__}) must return (logits, feature_map), got "
                f"{type(out).__name__}; wrap it with fflfast.models.adapt"
            )
        return out[0], out[1], tuple(out[2]) if len(out) == 3 else ()

    return run


class Batch(Protocol):
    """What a learner needs of a batch; a method that remembers images needs its ``index`` too, int64 (B,)."""

    @property
    def images(self) -> Any: ...

    @property
    def target(self) -> Tensor: ...


class Learner(nn.Module):
    """A cohort and the method by which it learns: the one module to train, wrap, capture and save.

    Args:
        cohort: the sub-networks.
        method: a `fflfast.methods.Method` built for this cohort.
        label_smoothing: of the cross-entropy terms, in [0, 1].

    Raises:
        TypeError, ValueError: a method without a graph or with the cohort's own parameters, a bad label_smoothing.
    """

    def __init__(self, cohort: Cohort, method: nn.Module, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not hasattr(method, "graph"):
            raise TypeError(
                f"Learner: expected a method with a graph, got {type(method).__name__}; its __init__ sets it"
            )
        if not (isinstance(label_smoothing, (int, float)) and 0.0 <= label_smoothing <= 1.0):
            raise ValueError(f"Learner: label_smoothing must be in [0, 1], got {label_smoothing!r}")
        shared = {id(p) for p in cohort.parameters()} & {id(p) for p in method.parameters()}
        if shared:
            raise ValueError(
                f"Learner: {type(method).__name__} holds {len(shared)} parameters of the cohort, which would be saved "
                "and trained twice; read the cohort in the method's __init__, but do not keep it as an attribute"
            )
        self.cohort = cohort
        self.method = method
        cohort.trunk_gradient_scale = float(getattr(method, "trunk_gradient_scale", 1.0))
        self.label_smoothing = label_smoothing

    @property
    def term_names(self) -> tuple[str, ...]:
        """Names of the entries of ``StepOutput.terms``."""
        return self.method.term_names  # type: ignore[return-value]

    def forward(self, batch: Batch, state: StepState | None = None) -> StepOutput:
        """Loss, terms and logits of one batch.

        Args:
            batch: has ``images``, (B, C, H, W) or a sequence of N views, and ``target``, class indices int64 (B,)
                or probabilities (B, K).
            state: T, λ and μ of this step; None takes the method's options, without ramp-up.
        """
        output = self.cohort(batch.images, self.method.beside(batch.images))  # type: ignore[operator]
        return self.method(output, batch, state, label_smoothing=self.label_smoothing)

    def predict(self, images: Tensor) -> dict[str, Tensor]:
        """Logits (B, K) by name: each sub-network, their mean ensemble, and what the method adds.

        Call it in eval mode and without gradients for predictions; it changes neither itself.
        """
        return self.method.predict(self.cohort(images), images)  # type: ignore[operator]
