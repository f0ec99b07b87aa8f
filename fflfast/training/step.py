"""One training step: augment, forward, one loss, one backward, one optimizer step, and no wait for the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..cohort import Learner, StepOutput, StepState
from ..data import Batch
from ..methods import Method
from ..ops.augment import augment
from ..tasks import Task
from .config import ResolvedConfig

__all__ = ["TrainStep", "build_optimizer", "optimizer_tensors", "restore_optimizer", "to_device"]

_AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TrainStep:
    """Everything that one step changes: learner, optimizer and scaler; ``state`` holds what the schedule sets."""

    def __init__(
        self, learner: Learner, task: Task, table: Tensor, config: ResolvedConfig, device: torch.device
    ) -> None:
        self.learner = learner
        self.task = task
        self.config = config
        self.device = device
        self.table = table.to(device)
        self.optimizer = build_optimizer(learner, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        options = cast(Method, learner.method).options
        self.state = StepState(device, ce_weight=options.ce_weight, temperature=options.temperature)

    def set_schedule(self, *, learning_rate: float, kl_weight: float) -> None:
        """Set what changes over a run; fills device scalars, reads none."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.state.learning_rate.fill_(learning_rate)
        self.state.kl_weight.fill_(kl_weight)

    def __call__(self, batch: Batch, *, epoch: int, step: int) -> StepOutput:
        """Take one step on a batch of the loader that lies on the device; ``step`` counts within the epoch."""
        config = self.config
        images = augment(
            cast(Tensor, batch.images),
            batch.index,
            seed=config.seed,
            epoch=epoch,
            pad=config.pad,
            flip=config.flip,
            table=self.table,
        )
        images, target = self.task.encode(images, batch.target, epoch=epoch, step=step)
        if config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with self.autocast():
            output = self.learner(Batch(images, target, batch.index), self.state)
        self.scaler.scale(output.loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.state.step.add_(1)
        return output

    def autocast(self) -> AbstractContextManager:
        """Return the autocast context of the training forward."""
        dtype = _AMP_DTYPES.get(self.config.amp)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch; to a CUDA device through pinned memory, so that the host need not wait for the copy."""
    if device.type == "cpu":
        return batch
    pin = device.type == "cuda"  # memory that is pinned already is not copied
    parts = (cast(Tensor, part) for part in batch)
    return Batch(*((part.pin_memory() if pin else part).to(device, non_blocking=pin) for part in parts))


def build_optimizer(learner: Learner, config: ResolvedConfig) -> torch.optim.SGD:
    """Return one SGD over all parameters: a group for each setting that a module or the config asks for.

    ``method.parameter_options()`` overrides settings by parameter-name prefix (FFL: weight decay 1e-5 in ``fusion``);
    with ``decay_norm_and_bias`` off, parameters of fewer than two dimensions have no weight decay.
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
    return torch.optim.SGD(
        list(groups.values()),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=device_type in ("cpu", "cuda") or None,
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer, learner: nn.Module) -> dict[str, Tensor]:
    """Return the optimizer's state by ``PARAMETER NAME/STATE NAME``."""
    return {
        f"{name}/{key}": value
        for name, parameter in _trainable(learner)
        for key, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, learner: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` returned, in each parameter's own memory order.

    A fused optimizer walks parameter and state side by side in memory, so that a channels-last parameter needs
    channels-last state, which ``Optimizer.load_state_dict`` does not see to.
    """
    parameters = dict(_trainable(learner))
    optimizer.state.clear()
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition("/")
        parameter = parameters[name]
        like_parameter = value.shape == parameter.shape
        own = torch.empty_like(parameter) if like_parameter else torch.empty_like(value, device=parameter.device)
        optimizer.state[parameter][key] = own.detach().copy_(value)


def _trainable(learner: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in learner.named_parameters() if p.requires_grad)
