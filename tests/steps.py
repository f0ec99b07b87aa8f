"""Training steps on tiny networks, built as the trainer builds them, and what it takes to compare them in tests."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import SMALL

from fflfast.data import Batch, Loader, Split
from fflfast.methods import FFL
from fflfast.ops.augment import normalization_table
from fflfast.training import TrainConfig, resolve
from fflfast.training.build import build_learner
from fflfast.training.feeding import task_for
from fflfast.training.processes import Processes
from fflfast.training.step import TrainStep

CPU = torch.device("cpu")


class Poisoned(FFL):
    """FFL in whose loss or gradients something is not finite while ``poison`` says so."""

    poison: str | None = None

    def joint_logits(self, output, batch):
        logits = super().joint_logits(output, batch)
        if self.poison == "logits":
            logits[0] = logits[0] * torch.nan
        if self.poison == "gradient":
            logits[1].register_hook(lambda gradient: gradient * torch.inf)
        return logits

    def forward(self, output, batch, state=None, *, label_smoothing=0.0):
        result = super().forward(output, batch, state, label_smoothing=label_smoothing)
        return result._replace(loss=result.loss + torch.inf) if self.poison == "loss" else result


class Alone(Processes):
    """Process ``rank`` of ``count``, the others of which are not there: what they would add is zero."""

    def __init__(self, rank: int, count: int, bad: float = 0.0) -> None:
        self.rank, self.count, self.bad = rank, count, bad

    def max_(self, tensor):
        tensor.clamp_(min=self.bad)


class Reads(TorchDispatchMode):
    """Counts the operations that make the host wait for a value of the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        if operation.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            self.count += 1
        return operation(*arguments, **(options or {}))


def make(
    *,
    prepare: Callable[[torch.nn.Module], object] = lambda learner: None,
    dtype: torch.dtype = torch.float32,
    batch_of: Callable[[torch.Tensor], Batch] | None = None,
    processes: Processes | None = None,
    amp: str = "off",
    frozen: torch.nn.Module | None = None,
    **changes,
) -> TrainStep:
    """Return the step of a small run.

    ``prepare`` gets the learner before the step is built; ``frozen`` is the teacher of a method that needs one.
    """
    config, data, _ = resolve(TrainConfig(**{**SMALL, **changes}))
    config = dataclasses.replace(config, amp=amp)  # here a CPU may take fp16 too
    learner = build_learner(config, data.num_classes, teacher=frozen).to(dtype)
    prepare(learner)
    learner.method.attach(data.train.targets)
    if config.channels_last:
        learner.to(memory_format=torch.channels_last)
    learner.train()
    table = normalization_table(data.mean, data.std).to(dtype)
    step = TrainStep(
        learner, task_for(config, data), table, config, CPU, processes=processes or Processes(), batch_of=batch_of
    )
    step.set_schedule(learning_rate=0.05, kl_weight=0.5)
    return step


@functools.cache
def _training_images() -> Split:
    return resolve(TrainConfig(**SMALL)).data.train


def batches(step: TrainStep, count: int, size: int | None = None) -> list[Batch]:
    """Return the first batches of the step's data."""
    loader = Loader(
        _training_images(), batch_size=size or SMALL["batch_size"], seed=0, train=True, limit=SMALL["limit_train"]
    )
    return [batch for batch, _ in zip(loader.epoch(0), range(count), strict=False)]


def rows(batch: Batch, start: int, stop: int) -> Batch:
    """Return some rows of a batch."""
    return Batch(*(part[start:stop] for part in batch))


def freeze_norms(learner: torch.nn.Module) -> None:
    """Let every batch norm use its running statistics, whatever mode the learner is in."""
    for module in learner.modules():
        if isinstance(module, _BatchNorm):
            module.eval().train = lambda mode=True, module=module: module


def gradients(step: TrainStep) -> dict[str, torch.Tensor]:
    """Return a dict that gets the gradients which the optimizer sees, by parameter name, at every step."""
    seen: dict[str, torch.Tensor] = {}

    def look(*_):
        seen.update({name: p.grad.clone() for name, p in step.learner.named_parameters() if p.grad is not None})

    for optimizer in step.optimizers:
        optimizer.register_step_pre_hook(look)
    return seen


def bits(tensors) -> list[torch.Tensor]:
    """Return copies of tensors as bytes, so that −0 is not 0 and NaN equals itself."""
    return [t.detach().clone().contiguous().reshape(-1).view(torch.uint8) for t in tensors]


def same_bits(left, right) -> bool:
    """Tell whether two results of `bits` are the same."""
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
