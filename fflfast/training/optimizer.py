"""The optimizer of a run: one SGD with parameter groups, and its state in and out of checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..cohort import Learner
from ..methods import Method
from .config import ResolvedConfig

__all__ = ["build_optimizer", "optimizer_tensors", "restore_optimizer"]


def build_optimizer(learner: Learner, config: ResolvedConfig) -> torch.optim.SGD:
    """Return one SGD over all parameters: a group for each setting that a module or the config asks for.

    ``method.parameter_options()`` overrides settings by parameter-name prefix (FFL: weight decay 1e-5 in ``fusion``);
    with ``decay_norm_and_bias`` off, parameters of fewer than two dimensions have no weight decay. Momentum is there
    from the start, since a captured step must find it in place; it is zero, which a first step takes as having none.
    """
    method = cast(Method, learner.method)
    overrides = {f"method.{prefix}.": options for prefix, options in method.parameter_options().items()}
    groups: dict[tuple, dict[str, Any]] = {}
    for name, parameter in _trainable(learner):
        options = next((o for prefix, o in overrides.items() if name.startswith(prefix)), {})
        if not config.decay_norm_and_bias and parameter.ndim < 2:
            options = {**options, "weight_decay": 0.0}
        group = groups.setdefault(tuple(sorted(options.items())), {"params": [], **options})
        group["params"].append(parameter)
    device_type = next(iter(learner.parameters())).device.type
    optimizer = torch.optim.SGD(
        list(groups.values()),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=device_type in ("cpu", "cuda") or None,
    )
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def optimizer_tensors(optimizer: torch.optim.Optimizer, learner: nn.Module) -> dict[str, Tensor]:
    """Return the optimizer's state by ``PARAMETER NAME/STATE NAME``."""
    return {
        f"{name}/{key}": value
        for name, parameter in _trainable(learner)
        for key, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, learner: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` returned, in place; what it did not know becomes zero.

    Each parameter's memory order is kept: a fused optimizer walks parameter and state side by side in memory, which
    ``Optimizer.load_state_dict`` does not see to.
    """
    for name, value in optimizer_tensors(optimizer, learner).items():
        if name in tensors:
            value.copy_(tensors[name])
        else:
            value.zero_()  # a checkpoint from before the first step of an optimizer that made its state then


def _trainable(learner: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in learner.named_parameters() if p.requires_grad)
