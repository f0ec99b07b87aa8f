"""Who computes a case: ours through each backend, PyTorch's operators eager and compiled, and the peers that are here.

A variant is a function of (logits, target) that returns the loss. Peers get what suits them best: torch.compile sees
static shapes and one graph, on a GPU also with its kernels tuned where a case asks for it; Liger and quack run their
own kernels for the terms that they have, and PyTorch the rest.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fflfast

from .calls import Variant, available_backends, under
from .cases import Case

__all__ = ["plain_ffl", "variants_for"]

Loss = Callable[[Sequence[Tensor], Tensor], Tensor]


def plain_ffl(logits: Sequence[Tensor], target: Tensor, temperature: float = 3.0, kl_weight: float = 0.5) -> Tensor:
    """FFL's loss as people write it: F.cross_entropy and F.kl_div on softmaxes, the ensemble detached."""
    *subs, fused = logits
    ce = sum(F.cross_entropy(z, target) for z in logits)

    def kl(student: Tensor, teacher: Tensor) -> Tensor:
        log_s, p_t = F.log_softmax(student / temperature, 1), F.softmax(teacher.detach() / temperature, 1)
        return F.kl_div(log_s, p_t, reduction="batchmean") * temperature**2

    distilled = sum(kl(z, fused) for z in subs) + kl(fused, sum(subs[1:], subs[0]) / len(subs))
    return ce + kl_weight * distilled


def _ours(backend: str) -> Callable[[Case], Loss]:
    def build(case: Case) -> Loss:
        settings = case.settings._asdict()

        def loss(logits: Sequence[Tensor], target: Tensor) -> Tensor:
            return fflfast.distill_loss(logits, target, case.graph, **settings).loss

        return under(backend, loss)

    return build


def _eager(case: Case) -> Loss:
    return plain_ffl


def _compiled(**options: Any) -> Callable[[Case], Loss]:
    def build(case: Case) -> Loss:
        return torch.compile(plain_ffl, dynamic=False, fullgraph=True, **options)

    return build


def _terms(logits: Sequence[Tensor], ce: Callable[..., Tensor], kl: Callable[..., Tensor], target: Tensor) -> Tensor:
    *subs, fused = logits
    with torch.no_grad():
        ensemble = sum(subs[1:], subs[0]) / len(subs)
    distilled = sum(kl(z, fused.detach()) for z in subs) + kl(fused, ensemble)
    return sum(ce(z, target) for z in logits) + 0.5 * distilled


def _liger(case: Case) -> Loss:
    from liger_kernel.transformers import LigerCrossEntropyLoss, LigerKLDIVLoss

    cross_entropy, divergence = LigerCrossEntropyLoss(), LigerKLDIVLoss(reduction="batchmean", log_target=True)

    def kl(student: Tensor, teacher: Tensor) -> Tensor:
        # Liger has the divergence of log-probabilities; the softmaxes before it are PyTorch's.
        return 9 * divergence(F.log_softmax(student / 3, 1), F.log_softmax(teacher / 3, 1))

    # Its cross-entropy writes the gradient over its input, which the other terms still need.
    return lambda logits, target: _terms(logits, lambda z, y: cross_entropy(z.clone(), y), kl, target)


def _liger_jsd(case: Case) -> Loss:
    from liger_kernel.transformers import LigerCrossEntropyLoss, LigerJSD

    # At β = 0 the generalised Jensen-Shannon divergence is KL(teacher ‖ student), in the mean over the rows.
    cross_entropy, divergence = LigerCrossEntropyLoss(), LigerJSD(beta=0.0)

    def kl(student: Tensor, teacher: Tensor) -> Tensor:
        return 9 * divergence(F.log_softmax(student / 3, 1), F.log_softmax(teacher / 3, 1))

    return lambda logits, target: _terms(logits, lambda z, y: cross_entropy(z.clone(), y), kl, target)


def _quack(case: Case) -> Loss:
    from quack import cross_entropy

    def kl(student: Tensor, teacher: Tensor) -> Tensor:
        return 9 * F.kl_div(F.log_softmax(student / 3, 1), F.softmax(teacher / 3, 1), reduction="batchmean")

    compiled_kl = torch.compile(kl, dynamic=False, fullgraph=True)
    return lambda logits, target: _terms(
        logits, lambda z, y: cross_entropy(z, y, reduction="mean"), compiled_kl, target
    )


def variants_for(device: torch.device, *, compiled: bool = True, tuned: bool = False) -> list[Variant]:
    """Everything that can run on a device, ours first; peers only where their package is installed."""
    found: list[Variant] = [(name, _ours(name)) for name in available_backends(device)]
    found.append(("eager", _eager))
    if compiled:
        found.append(("compile", _compiled()))
        if tuned and device.type != "cpu":
            found.append(("compile-tuned", _compiled(mode="max-autotune-no-cudagraphs")))
    if device.type == "cuda":
        peers = (
            ("liger", "liger_kernel", _liger), ("liger-jsd", "liger_kernel", _liger_jsd), ("quack", "quack", _quack),
        )  # fmt: skip
        for name, package, build in peers:
            if importlib.util.find_spec(package) is not None:
                found.append((name, build))
    return found
