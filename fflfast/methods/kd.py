"""Knowledge distillation: a frozen network teaches each student.

L = Σ_i [(1 − α) · CE(z_i) + α · KL_T(z_t → z_i)], T = 4, α = 0.9, no ramp-up; KL_T(t → s) = T² · KL(softmax(t/T) ‖
softmax(s/T)), mean over the batch; z_t are the logits of the teacher, which has no gradient. Hinton, Vinyals, Dean,
arXiv 1503.02531, who leave T and α open; these are the values of Tian, Krishnan, Isola, ICLR 2020, arXiv 1910.10699,
whose comparison later papers took over. The recipe is the one that FFL's code has for CIFAR: theirs, of 240 epochs, is
made for other networks.

Departure: N students may learn from one teacher in one run. They do not know of each other; they only save N − 1
forwards of the teacher. The teacher runs under the step's autocast, as the students do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..cohort import Batch, Cohort, CohortOutput
from ..graph import DistillGraph, Edge
from .base import Method, MethodOptions

__all__ = ["KD", "KDOptions"]


@dataclass(frozen=True)
class KDOptions(MethodOptions):
    """Options of KD.

    Attributes:
        alpha: α, from 0 to 1; where it is given it sets both weights, kl_weight = α and ce_weight = 1 − α, and is not
            kept.
    """

    temperature: float = 4.0
    kl_weight: float = 0.9
    ce_weight: float = 0.1
    ramp_up_epochs: float = 0.0
    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.alpha is not None:
            if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)) or not 0 <= self.alpha <= 1:
                raise ValueError(f"KDOptions: alpha must be a number from 0 to 1, got {self.alpha!r}")
            object.__setattr__(self, "kl_weight", float(self.alpha))
            object.__setattr__(self, "ce_weight", 1.0 - self.alpha)
            # A run's config.yaml then holds the weights alone, over which a later alpha or weight can be given.
            object.__setattr__(self, "alpha", None)
        super().__post_init__()


class KD(Method):
    """Knowledge distillation (arXiv 1503.02531) from a frozen teacher; needs logits alone.

    The teacher is no part of the method's parameters and of its state dict. ``teacher_fingerprint``, int64 (4,), the
    SHA-256 of the teacher's weights, is: a state dict that another teacher trained is refused.

    Args:
        cohort: one student or more.
        num_classes: K.
        options: see `KDOptions`.
        teacher: images (B, C, H, W), normalised as the run's, to logits (B, K), in eval mode; it moves with the method.
            None where nothing is trained.

    Raises:
        TypeError: a teacher that is not a module.
    """

    Options = KDOptions
    min_sub_networks = 1
    shared_stages = -1
    needs_teacher = True
    replicated = ("teacher_fingerprint",)
    teacher_fingerprint: Tensor

    def __init__(
        self, cohort: Cohort, num_classes: int, options: KDOptions | None = None, teacher: nn.Module | None = None
    ) -> None:
        super().__init__(cohort, num_classes, options)
        if teacher is not None and not isinstance(teacher, nn.Module):
            raise TypeError(f"KD: expected a teacher that is an nn.Module, got {type(teacher).__name__}")
        n = len(cohort)
        self.graph = DistillGraph(
            n + 1,
            (*[1.0] * n, 0.0),
            edges=[Edge(n, i) for i in range(n)],
            names=[*(f"sub{i}" for i in range(n)), "teacher"],
        )
        self.main_output = "sub0" if n == 1 else "ensemble"
        self._frozen = [] if teacher is None else [teacher]  # in a list, so that it is no submodule
        self.register_buffer("teacher_fingerprint", _fingerprint(teacher))

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen network, None where nothing is trained."""
        return self._frozen[0] if self._frozen else None

    def beside(self, images: Tensor | Sequence[Tensor]) -> list[Callable[[], Any]]:
        teacher = self.teacher
        if teacher is None:
            raise ValueError("KD: has no teacher, so that it can only predict; build it with teacher=MODULE to train")
        return [lambda: teacher(images)]

    def joint_logits(self, output: CohortOutput, batch: Batch) -> list[Tensor]:
        (taught,) = output.beside
        expected = output.logits[0].shape
        if not isinstance(taught, Tensor) or taught.shape != expected:
            got = tuple(taught.shape) if isinstance(taught, Tensor) else type(taught).__name__
            raise ValueError(
                f"KD: expected logits {tuple(expected)} of the teacher, got {got}; take one for these classes"
            )
        return [*output.logits, taught]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KD:
        for teacher in self._frozen:
            teacher._apply(fn)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        saved = state_dict.get(f"{prefix}teacher_fingerprint")
        if self._frozen and saved is not None and not torch.equal(saved.cpu(), self.teacher_fingerprint.cpu()):
            error_msgs.append("KD: another teacher trained these students; give the one that the run began with")
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs)


def _fingerprint(teacher: nn.Module | None) -> Tensor:
    """The SHA-256 of types, shapes and bytes of a module's state, as int64 (4,); zeros for None.

    Names and order are left out: the same network has others in a run's folder than in an exported file.
    """
    if teacher is None:
        return torch.zeros(4, dtype=torch.int64)
    parts = []
    for tensor in teacher.state_dict().values():
        held = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(held)
        parts.append(digest.digest())
    whole = hashlib.sha256(b"".join(sorted(parts))).digest()
    return torch.frombuffer(bytearray(whole), dtype=torch.int64).clone()
