"""The optimizers of a run: its own, one for each kind that a method asks for, and their state in checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..cohort import Learner
from ..methods import Method
from .config import ResolvedConfig

__all__ = ["build_optimizers", "optimizer_tensors", "restore_optimizers"]

_KINDS: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}


def build_optimizers(learner: Learner, config: ResolvedConfig) -> list[torch.optim.Optimizer]:
    """Return the optimizer that the config names, and one of each kind that the method wants for parameters of its own.

    Each has a group for every setting that a module or the config asks for. ``method.parameter_options()`` overrides
    settings by parameter-name prefix (FFL: weight decay 1e-5 in ``fusion``); where it names an ``optimizer``, what it
    does not name besides is PyTorch's default. With ``decay_norm_and_bias`` off, parameters of fewer than two
    dimensions have no weight decay. Every parameter that learns belongs to exactly one optimizer.

    All state is there from the start, since a captured step must find it in place; it is zero, which a first step takes
    as having none.

    Raises:
        ValueError: the method names an optimizer or a setting that does not exist.
    """
    method = cast(Method, learner.method)
    overrides = {f"method.{prefix}.": dict(options) for prefix, options in method.parameter_options().items()}
    groups: dict[str | None, dict[tuple, dict[str, Any]]] = {None: {}}
    for name, parameter in _trainable(learner):
        options = next((o for prefix, o in overrides.items() if name.startswith(prefix)), {})
        if not config.decay_norm_and_bias and parameter.ndim < 2:
            options = {**options, "weight_decay": 0.0}
        settings = {key: value for key, value in options.items() if key != "optimizer"}
        own = groups.setdefault(options.get("optimizer"), {})
        own.setdefault(tuple(sorted(settings.items())), {"params": [], **settings})["params"].append(parameter)
    device = next(iter(learner.parameters())).device
    shared: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        shared |= {"momentum": config.momentum, "nesterov": config.nesterov}
    return [
        _build(kind or config.optimizer, list(of_kind.values()), device, **({} if kind else shared))
        for kind, of_kind in groups.items()
        if of_kind
    ]


def _build(kind: str, groups: list[dict[str, Any]], device: torch.device, **settings: Any) -> torch.optim.Optimizer:
    if kind not in _KINDS:
        raise ValueError(f"parameter_options: expected an optimizer of {', '.join(_KINDS)}, got {kind!r}")
    if kind == "adam" and device.type == "cuda":
        settings["capturable"] = True  # a captured step needs it; its fused kernels are the same
    optimizer: Any = _KINDS[kind](groups, fused=device.type in ("cpu", "cuda") or None, **settings)
    optimizer._warned_capturable_if_run_uncaptured = True  # by any other plan a step runs uncaptured, which is fine
    for group in optimizer.param_groups:
        unknown = group.keys() - optimizer.defaults.keys() - {"params"}
        if unknown:
            raise ValueError(f"parameter_options: {', '.join(sorted(unknown))} is no setting of the optimizer {kind}")
        for parameter in group["params"]:
            optimizer.state[parameter].update(_first_state(kind, group, parameter))
    return optimizer


def _first_state(kind: str, group: Mapping[str, Any], parameter: Tensor) -> dict[str, Tensor]:
    if kind == "sgd":
        return {"momentum_buffer": torch.zeros_like(parameter)} if group["momentum"] else {}
    where = parameter.device if group["fused"] else "cpu"
    names = ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else []))
    zeros = {name: torch.zeros_like(parameter) for name in names}
    return {"step": torch.zeros((), dtype=torch.float32, device=where), **zeros}


def optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer], learner: nn.Module) -> dict[str, Tensor]:
    """Return the state of all optimizers by ``PARAMETER NAME/STATE NAME``."""
    return {
        f"{name}/{key}": value
        for name, parameter in _trainable(learner)
        for optimizer in optimizers
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def restore_optimizers(
    optimizers: Sequence[torch.optim.Optimizer], learner: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` returned, in place; what it did not know becomes zero.

    Each parameter's memory order is kept: a fused optimizer walks parameter and state side by side in memory, which
    ``Optimizer.load_state_dict`` does not see to.
    """
    for name, value in optimizer_tensors(optimizers, learner).items():
        if name in tensors:
            value.copy_(tensors[name])
        else:
            value.zero_()  # a checkpoint from before the first step of an optimizer that made its state then


def _trainable(learner: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in learner.named_parameters() if p.requires_grad)
