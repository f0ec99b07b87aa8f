"""What a checkpoint of a run holds, when it may be written, and how it is put back."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import execution
from ..data import DataBundle
from ..tasks import Score
from . import checkpoint
from .buffers import gather_state, own_buffers, own_state
from .checkpoint import Snapshot
from .config import ResolvedConfig
from .optimizer import optimizer_tensors, restore_optimizers

if TYPE_CHECKING:
    from .loop import Trainer

__all__ = ["describe", "describe_data", "learner_tensors", "problem", "put_back", "take"]


def problem(trainer: Trainer) -> str:
    """Return what is not finite, of any process, in losses and weights; empty if all is well. Waits for the device."""
    processes = trainer.processes
    means = trainer.losses.peek(processes).means
    bad = [name for name, value in means.items() if not math.isfinite(value)]
    if bad:
        return f"the loss is not finite ({', '.join(bad)})"
    held = {name: t for name, t in trainer.learner.state_dict().items() if t.is_floating_point()}
    found = [tensor.isnan().any() for tensor in held.values()]
    names = list(held)
    for name, parameter in trainer.learner.named_parameters():  # a running variance may be infinite, a weight not
        found.append(parameter.isinf().any())
        names.append(name)
    flags = torch.stack(found).to(torch.int32)
    processes.max_(flags)
    bad = [name for name, flag in zip(names, flags.tolist(), strict=True) if flag]
    return f"{len(bad)} weights are not finite, the first {bad[0]!r}" if bad else ""


def learner_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Return weights and buffers by their names in a checkpoint."""
    return {f"learner/{name}": tensor for name, tensor in trainer.learner.state_dict().items()}


def describe(trainer: Trainer) -> dict[str, Any]:
    """Return what every checkpoint says besides its tensors."""
    return {
        "config": trainer.config.to_dict(),
        "position": asdict(trainer.position),
        "scores": trainer.scores,
        "data": describe_data(trainer.config, trainer.data),
        "plan": {"name": trainer.plan_name, "device": trainer.device.type},
    }


def describe_data(config: ResolvedConfig, data: DataBundle) -> dict[str, Any]:
    """Return what a checkpoint remembers of its data: enough to test on it, and to notice other data of that name."""
    return {
        "data": config.data,
        "task": data.task,
        "image_size": data.image_size,
        "class_names": list(data.class_names),
        "num_classes": data.num_classes,
        "mean": list(data.mean),
        "std": list(data.std),
        "train_images": len(data.train),
    }


def take(trainer: Trainer) -> Snapshot:
    """Return everything that a run needs to go on bit for bit, on process 0; the others take part."""
    step, processes = trainer.take_step, trainer.processes
    averages = step.averages.tensors() if step.averages else {}
    own = {**learner_tensors(trainer), **{f"average/{name}": tensor for name, tensor in averages.items()}}
    random = checkpoint.get_random_state(trainer.device)
    buffers = {f"{kind}/{name}" for name in own_buffers(trainer.learner) for kind in ("learner", "average")}
    of_all = gather_state({name: own[name] for name in sorted(buffers & own.keys())}, random, processes)
    counts = processes.gather((trainer.losses.state(), trainer.metric.state()))
    if of_all is None or counts is None:
        return Snapshot({}, {})
    tensors = {
        **own,
        **{f"optimizer/{name}": t for name, t in optimizer_tensors(step.optimizers, trainer.learner).items()},
        **{f"random/{name}": tensor for name, tensor in random.tensors.items()},
        **of_all.tensors,
    }
    losses, metrics = ([pair[k] for pair in counts] for k in (0, 1))
    info = {
        **describe(trainer),
        "losses": losses if processes.count > 1 else losses[0],
        "metric": metrics if processes.count > 1 else metrics[0],
        "random": random.info,
        "scaler": step.scaler.state_dict(),
        **(of_all.info if processes.count > 1 else {}),
    }
    return Snapshot(tensors, info)


def put_back(trainer: Trainer, snapshot: Snapshot) -> None:
    """Put everything back as `take` found it: for this process, if as many processes took it."""
    step, processes, device = trainer.take_step, trainer.processes, trainer.device
    tensors, info = own_state(snapshot, processes)
    trainer.learner.load_state_dict(checkpoint.under(tensors, "learner/"))
    restore_optimizers(step.optimizers, trainer.learner, checkpoint.under(tensors, "optimizer/"))
    step.scaler.load_state_dict(info["scaler"])
    if step.averages:
        step.averages.load(checkpoint.under(tensors, "average/"))
    trainer.position = type(trainer.position)(**info["position"])
    step.state.step.fill_(trainer.global_step)
    for name, counts in (("losses", trainer.losses), ("metric", trainer.metric)):
        states = info[name] if isinstance(info[name], list) else [info[name]]
        counts.load(counts.share(states, processes.rank, processes.count), device)
    trainer.scores = {name: Score(*counts) for name, counts in info["scores"].items()}
    if info["random"] is not None:
        checkpoint.set_random_state(Snapshot(checkpoint.under(tensors, "random/"), info["random"]), device)
    _keep_plan(trainer, info.get("plan"))


def _keep_plan(trainer: Trainer, recorded: dict[str, str] | None) -> None:
    """Go on by the plan that was chosen on this kind of device, unless the config names one."""
    if trainer.plan_name is not None or recorded is None or recorded["device"] != trainer.device.type:
        return
    name, processes = recorded["name"], trainer.processes
    if not execution.refusal(name, trainer.device, processes=processes.count, backend=processes.backend):
        trainer.use_plan(name)
