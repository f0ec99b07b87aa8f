"""A training step for the tests of the execution plans, with all that makes a step hard to repeat, and no trainer."""

from __future__ import annotations

import torch
from torch import nn

from fflfast.cohort import Cohort, Learner
from fflfast.data import Batch
from fflfast.methods import FFL


class Block(nn.Module):
    """A sub-network with batch norm and dropout; counts its forwards."""

    def __init__(self, channels: int, classes: int, inputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(channels, classes)
        self.feature_channels = channels
        self.forwards = 0

    def forward(self, x):
        self.forwards += 1
        feature_map = torch.relu(self.norm(self.conv(x)))
        return self.head(self.drop(feature_map).mean((2, 3))), feature_map


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.forwards = 0

    def forward(self, x):
        self.forwards += 1
        return torch.relu(self.norm(self.conv(x)))


def make_learner(networks: int = 2, *, trunk: bool = True, method: type = FFL, classes: int = 5) -> Learner:
    """Return a learner with the same weights every time, of sub-networks that differ in width."""
    torch.manual_seed(1)
    blocks = [Block(6 + 2 * k, classes, 4 if trunk else 3) for k in range(networks)]
    cohort = Cohort(blocks, Trunk() if trunk else None)
    return Learner(cohort, method(cohort, classes))


class Step:
    """Forward, backward, SGD with momentum, and sums of metrics; everything changes in place."""

    def __init__(self, learner: Learner, device: str = "cpu", *, views: int = 0) -> None:
        self.learner, self.views = learner.to(device).train(), views
        self.model = self.learner  # or what wraps it
        self.rate = torch.tensor(0.05, device=device)
        self.optimizer = torch.optim.SGD(
            learner.parameters(), lr=self.rate, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=True
        )
        for parameter in learner.parameters():
            self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.loss_sum = torch.zeros((), device=device)
        self.steps = torch.zeros((), dtype=torch.int64, device=device)
        self.bodies = 0

    def body(self, batch: Batch):
        self.bodies += 1
        images = batch.images.float() / 255
        images = [images + 0.01 * k for k in range(self.views)] if self.views else images
        output = self.model(Batch(images, batch.target, batch.index))
        output.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_sum += output.loss.detach() * len(batch.target)
        self.steps += 1
        return output

    def changing(self):
        momentum = [self.optimizer.state[p]["momentum_buffer"] for p in self.learner.parameters()]
        return [*self.learner.parameters(), *self.learner.buffers(), *momentum, self.loss_sum, self.steps]

    def named(self) -> dict[str, torch.Tensor]:
        """Everything that a step changes, copied, and the generators' states."""
        state = {str(i): value.detach().clone() for i, value in enumerate(self.changing())}
        state["cpu generator"] = torch.get_rng_state()
        if self.rate.is_cuda:
            state["device generator"] = torch.cuda.get_rng_state()
        return state


def batches(count: int, size: int = 8, *, device: str = "cpu", classes: int = 5, pixels: int = 6) -> list[Batch]:
    """Return batches of random images, the same ones every time."""
    generator = torch.Generator().manual_seed(7)
    images = torch.randint(0, 256, (count, size, 3, pixels, pixels), dtype=torch.uint8, generator=generator)
    targets = torch.randint(0, classes, (count, size), generator=generator)
    index = torch.arange(count * size).reshape(count, size)
    return [Batch(*(x[k].to(device) for x in (images, targets, index))) for k in range(count)]
