"""What is measured: the FFL loss at the sizes of its users, each with the least bytes that it can move."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fflfast import DistillGraph
from fflfast.accuracy import LossSettings, gradient_scale, plain_distill_loss

from .floor import copy_rate

__all__ = ["CPU_CASES", "GPU_CASES", "Case", "Data", "cases_for"]


class Data(NamedTuple):
    """One set of inputs, the logits leaves that require grad."""

    logits: list[Tensor]
    target: Tensor

    @property
    def grad(self) -> None:
        return None

    @property
    def arguments(self) -> tuple[list[Tensor], Tensor]:
        return self.logits, self.target

    @property
    def leaves(self) -> list[Tensor]:
        return self.logits


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
    def columns(self) -> dict[str, Any]:
        """What the rows of this case have in common."""
        return {
            "case": self.name, "rows": self.rows, "classes": self.num_classes,
            "dtype": str(self.dtype).removeprefix("torch."), "eager_goal": self.eager_factor,
            "compile_goal": self.compile_factor,
        }  # fmt: skip

    @property
    def bytes_of_inputs(self) -> int:
        return self.graph.num_logits * self.tensor_bytes

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

    def floors(self, device: torch.device) -> dict[str, dict[str, float]]:
        """By mode, the time of a copy of the least bytes. Alone, a backward has none: it may find its work done."""
        rate = copy_rate([(self.rows, self.num_classes)] * self.graph.num_logits, self.dtype, device)
        least = {mode: self.minimal_bytes(mode) for mode in ("forward+backward", "forward")}
        return {mode: {"minimal_mb": n / 1e6, "copy_ms": 1e3 * n / rate} for mode, n in least.items()}

    def errors(self, data: Data, results: Mapping[str, tuple[Tensor, list[Tensor]]]) -> dict[str, dict[str, float]]:
        """Against float64: relative error of the loss, largest error of a gradient relative to s of the contract."""
        settings = self.settings._replace(reduction="sum")
        exact_loss, worst = 0.0, dict.fromkeys(results, 0.0)
        step = max(1, (1 << 22) // self.num_classes)
        for start in range(0, self.rows, step):
            part = slice(start, start + step)
            leaves = [z.detach()[part].double().requires_grad_() for z in data.logits]
            target = data.target[part]
            loss, _ = plain_distill_loss(leaves, target, self.graph, settings)
            loss.backward()
            exact_loss += float(loss.detach()) / self.rows
            scales = gradient_scale(leaves, target, self.graph, settings)
            for name, (_, gradients) in results.items():
                for g, z, s in zip(gradients, leaves, scales, strict=True):
                    assert z.grad is not None
                    ratio = ((g[part].double() * self.rows - z.grad).abs() / s.clamp(min=1e-300)).max()
                    worst[name] = max(worst[name], float(ratio))
        return {
            name: {
                "loss_error": abs(float(loss.double()) - exact_loss) / abs(exact_loss),
                "gradient_error": worst[name],
            }
            for name, (loss, _) in results.items()
        }


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
