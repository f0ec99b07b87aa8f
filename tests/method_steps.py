"""Training steps of every method for classification, each built with what it needs, and what two processes do of them.

python -c "import method_steps; method_steps.drive()"
"""

from __future__ import annotations

from typing import Any

import torch
from forked import fork_all
from steps import batches, bits, freeze_norms, make, rows, same_bits
from torch import distributed as dist
from torch import nn

from fflfast import methods, models
from fflfast.cohort import Cohort
from fflfast.training.buffers import own_buffers
from fflfast.training.optimizer import optimizer_tensors
from fflfast.training.processes import start
from fflfast.training.step import TrainStep

METHODS = [name for name in methods.available() if methods.resolve(name).task == "classification"]
COHORTS = [name for name in METHODS if name != "single"]
BY_SHARE = ("kdcl",)
"""Methods whose teacher depends on which images a process has beside one another, as they say in their docstrings."""

_CLASSES = 10


class Teacher(nn.Module):
    """A frozen network."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.network = models.create("tiny", _CLASSES).requires_grad_(False)
        self.eval()

    def forward(self, images):
        return self.network(images)[0]


def settings(name: str, n: int = 2) -> dict[str, Any]:
    """What `steps.make` takes for a method with N sub-networks; a leader is one more."""
    kind = methods.resolve(name)
    count = 1 if kind.max_sub_networks == 1 else n + kind.min_sub_networks - 2 if kind.min_sub_networks > 2 else n
    given: dict[str, Any] = {"method": name, "arch": ["tiny"] * count}
    return {**given, "teacher": "teacher", "frozen": Teacher()} if kind.needs_teacher else given


def make_method(name: str, n: int = 2, **changes: Any) -> TrainStep:
    """Return the step of a small run of a method."""
    torch.manual_seed(0)
    return make(**settings(name, n), **changes)


def networks(step: TrainStep) -> dict[str, nn.Module]:
    """Every network that a step runs, by name: of each cohort the trunk and what lies on it, and a frozen teacher."""
    found = {}
    for place, cohort in step.learner.named_modules():
        if isinstance(cohort, Cohort):
            found |= {f"{place}.{name}": part for name, part in cohort.sub_networks.named_children()}
            if cohort.trunk is not None:
                found[f"{place}.trunk"] = cohort.trunk
    teacher = getattr(step.learner.method, "teacher", None)
    return found if teacher is None else {**found, "teacher": teacher}


def left_behind(step: TrainStep) -> list[torch.Tensor]:
    """All that a step leaves behind besides its counts, collected without asking it what that is, as bytes."""
    averages = step.averages.tensors().values() if step.averages else ()
    optimizers = optimizer_tensors(step.optimizers, step.learner).values()
    return bits([*step.learner.parameters(), *step.learner.buffers(), *optimizers, *averages])


def shared() -> None:
    """Two processes take three steps of each method; in the last the second one has no image."""
    torch.set_num_threads(1)
    with start("cpu", plan="serial") as p:
        for name in METHODS:
            both(name, p)


def both(name: str, p) -> None:
    options = {"dtype": torch.float64, "prepare": freeze_norms}
    alone, step = make_method(name, **options), make_method(name, **options, processes=p)
    for k, (batch, cut) in enumerate(zip(batches(alone, 3), (12, 9, 3), strict=True)):
        batch = rows(batch, 0, 3) if k == 2 else batch
        size = len(batch.target)
        alone(batch, epoch=0, step=k)
        step(rows(batch, 0, cut) if p.main else rows(batch, cut, size), epoch=0, step=k, images=size)
    differing = own_buffers(step.learner)
    equal = [*step.learner.parameters(), *(b for n, b in step.learner.named_buffers() if n not in differing)]
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, bits(equal))
    assert same_bits(*everyone), f"{name}: the processes have different weights"
    assert all(bool(t.isfinite().all()) for t in equal), name
    if name not in BY_SHARE:
        for place, expected in alone.learner.named_parameters():
            got = step.learner.get_parameter(place)
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9, msg=f"{name}: {place}")
    means = step.losses.read(p).means
    assert name in BY_SHARE or abs(means["loss"] - alone.losses.read().means["loss"]) < 1e-5, name


def drive() -> None:
    fork_all({"shared": shared})
