"""The training step as the published FFL code does it, written anew: what every ratio of the benchmark is against.

Eager PyTorch in float32 and NCHW; copies from pageable memory; the sub-networks one after the other; the fusion of
their concatenated feature maps from plain modules; a softmax, 1e-7 and a sum for every KL term; one SGD for the
networks and one for the fusion module, as `torch.optim.SGD` is by default; and four waits for the device (N + 2 with N
sub-networks), for the loss and the number of right answers of each classifier.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cohort import Learner
from ..methods import DML, FFL, Method, Single
from ..training.config import ConfigError, ResolvedConfig

__all__ = ["NaiveLoop", "kl_divergence"]


class NaiveLoop:
    """One training step of a learner's own modules, without anything of ours around them.

    Args:
        learner: on the device, in training mode, NCHW; its parameters and buffers are trained in place.
        config: learning rate, momentum and weight decays are read from it.
        device: where the step runs.

    Attributes:
        right: right answers in the last batch, of each sub-network and of the fused classifier.

    Raises:
        ConfigError: a method that the published code does not have, or mixed images.
    """

    def __init__(self, learner: Learner, config: ResolvedConfig, device: torch.device) -> None:
        method = learner.method
        if type(method) not in (FFL, DML, Single):
            raise ConfigError(f"the naive loop knows the methods ffl, dml and single, not {config.method}")
        if config.mixup or config.cutmix:
            raise ConfigError("the naive loop does not mix images; leave out --mixup and --cutmix")
        assert isinstance(method, Method)
        self.device = device
        self.trunk, self.networks = learner.cohort.trunk, list(learner.cohort.sub_networks)
        self.options, self.label_smoothing = method.options, config.label_smoothing
        self.fusion = method.fusion if isinstance(method, FFL) else None
        self.mutual = isinstance(method, DML)
        sgd = partial(torch.optim.SGD, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)
        parts = [*self.networks, *([] if self.trunk is None else [self.trunk])]
        parameters = [p for part in parts for p in part.parameters()]
        self.optimizers = [sgd(parameters, weight_decay=config.weight_decay)]
        if isinstance(method, FFL):
            decay = method.options.fusion_weight_decay
            self.optimizers.append(sgd(method.fusion.parameters(), weight_decay=decay))
        self.right: list[int] = []

    def __call__(self, images: Tensor, target: Tensor) -> float:
        """Take one step and return the loss.

        Args:
            images: float32 (B, 3, H, W) in memory of the host, augmented.
            target: int64 (B,), likewise.
        """
        images, target = images.to(self.device), target.to(self.device)
        x = images if self.trunk is None else self.trunk(images)
        outputs = [network(x) for network in self.networks]
        logits = [output[0] for output in outputs]
        classifiers = [*logits]
        if self.fusion is not None:
            classifiers.append(self._fused([output[1] for output in outputs]))
        loss = self.options.kl_weight * self._mutual(classifiers)
        for z in classifiers:
            loss = loss + self.options.ce_weight * F.cross_entropy(z, target, label_smoothing=self.label_smoothing)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.right = [int((z.argmax(dim=1) == target).sum().cpu()) for z in classifiers]
        return loss.item()

    def _fused(self, features: list[Tensor]) -> Tensor:
        fusion = self.fusion
        assert fusion is not None
        sizes = {f.shape[-2:] for f in features}
        if len(sizes) > 1:  # to the smallest, as `fflfast.nn.FeatureFusion` says
            smallest = (min(height for height, _ in sizes), min(width for _, width in sizes))
            features = [F.adaptive_avg_pool2d(f, smallest) for f in features]
        x = torch.cat(features, dim=1)
        x = F.relu(fusion.depthwise_norm(fusion.depthwise(x)))
        x = F.relu(fusion.pointwise_norm(fusion.pointwise(x)))
        return fusion.classifier(F.avg_pool2d(x, x.shape[-2:]).flatten(1))

    def _mutual(self, classifiers: list[Tensor]) -> Tensor:
        temperature = self.options.temperature
        if self.fusion is not None:
            *logits, fused = classifiers
            ensemble = sum(logits[1:], logits[0]) / len(logits)
            return sum(
                (kl_divergence(z, fused, temperature) for z in logits), kl_divergence(fused, ensemble, temperature)
            )
        none = torch.zeros((), device=self.device)
        if self.mutual:
            pairs = [(s, t) for s in classifiers for t in classifiers if s is not t]
            return sum((kl_divergence(s, t, temperature) for s, t in pairs), none) / (len(classifiers) - 1)
        return none


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T²·KL of logits (B, K) as the published code has it: teacher detached, 1e-7 added to its probabilities."""
    log_probabilities = F.log_softmax(student / temperature, dim=1)
    target = (F.softmax(teacher / temperature, dim=1) + 1e-7).detach()
    return temperature**2 * (target * (target.log() - log_probabilities)).sum(1).sum() / len(student)
