"""What is measured: the FFL loss at the sizes of its users, each with the least bytes that it can move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fflfast import DistillGraph
from fflfast.accuracy import LossSettings

__all__ = ["CPU_CASES", "GPU_CASES", "Case", "Data", "cases_for"]


class Data(NamedTuple):
    """One set of inputs, the logits leaves that require grad."""

    logits: list[Tensor]
    target: Tensor


@dataclass(frozen=True)
class Case:
    """FFL's loss with two sub-networks: logits (rows, num_classes) of three networks, T = 3.

    Attributes:
        eager_factor, compile_factor: how many times faster than both ours has to be; 0 where nothing is promised.
        tuned: whether torch.compile is also given the time to tune its kernels, where it has any.
    """

    rows: int
    num_classes: int
    dtype: torch.dtype = torch.float32
    eager_factor: float = 0.0
    compile_factor: float = 0.0
    tuned: bool = False

    graph = DistillGraph.ffl(2)
    settings = LossSettings(temperature=3.0, kl_weight=0.5)

    @property
    def name(self) -> str:
        return f"ffl2-{self.rows}x{self.num_classes}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def tensor_bytes(self) -> int:
        """Bytes of one logits tensor."""
        return self.rows * self.num_classes * self.dtype.itemsize

    def minimal_bytes(self, mode: str) -> int:
        """Each logits tensor read once; with a backward, each gradient written once."""
        return (1 if mode == "forward" else 2) * self.graph.num_logits * self.tensor_bytes

    def draw(self, device: torch.device, seed: int = 0) -> Data:
        """Normal logits with deviation 3, and class indices."""
        generator = torch.Generator(device).manual_seed(seed)
        shape = (self.rows, self.num_classes)
        # In slices, so that the float32 numbers behind 16-bit logits never lie in memory whole.
        logits = []
        for _ in range(self.graph.num_logits):
            z = torch.empty(shape, dtype=self.dtype, device=device)
            for part in z.split(max(1, (1 << 26) // self.num_classes)):
                part.copy_(3 * torch.randn(part.shape, generator=generator, device=device))
            logits.append(z.requires_grad_())
        return Data(logits, torch.randint(self.num_classes, (self.rows,), generator=generator, device=device))


CPU_CASES = (
    Case(128, 100, torch.float32, 6, 4),
    Case(256, 1000, torch.float32, 12, 5),
    Case(512, 32_000, torch.float32, 25, 4),
    Case(64, 131_072, torch.float32, 25, 4),
)

# The large ones move some gigabytes, so that neither launches nor the L2 cache count.
GPU_CASES = (
    Case(128, 100, torch.float32, 8, 1.3),
    Case(128, 100, torch.bfloat16, 8, 1.3, tuned=True),
    Case(256, 1000, torch.float32, 8, 1.3),
    Case(16_384, 4096, torch.bfloat16, 8, 1.3),
    Case(4096, 32_000, torch.bfloat16, 8, 1.3, tuned=True),
    Case(2048, 131_072, torch.bfloat16, 8, 1.3, tuned=True),
    Case(4096, 16_384, torch.bfloat16, 8, 1.3),
    Case(2048, 65_536, torch.bfloat16, 8, 1.3),
    Case(2048, 131_072, torch.float32, 8, 1.3),
)


def cases_for(device: torch.device) -> tuple[Case, ...]:
    """The cases of a kind of device."""
    return CPU_CASES if device.type == "cpu" else GPU_CASES
