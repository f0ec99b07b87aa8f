"""The compiled libraries: where they are, why one is missing, and the calls into them.

Two shared libraries on PyTorch's stable ABI lie beside the package: `_cpu.abi3.so` and `_cuda.abi3.so`, each with
private operators of its own (`fflfast_cpu::…`, `fflfast_cuda::…`). They are loaded at their first use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..graph import DistillGraph
from .fusion_reference import STAGES, Norm

__all__ = [
    "REDUCTIONS",
    "TABLE_LIMITS",
    "as_rows",
    "bits",
    "distill_loss_functions",
    "fusion_functions",
    "fusion_operators",
    "load",
    "operators",
    "table",
]

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
# What the table of csrc/distill_graph.h holds: logits tensors, mixtures, edges.
TABLE_LIMITS = (16, 16, 240)
# (T, λ, μ), and (graph, label_smoothing, ignore_index, target_eps, reduction).
Scalars: TypeAlias = Sequence[Tensor]
Options: TypeAlias = tuple[DistillGraph, float, int, float, str]
_FOLDER = Path(__file__).resolve().parent.parent


@cache
def load(name: str) -> str | None:
    """Load the library `cpu` or `cuda`; None when its operators are there, else the reason why not."""
    if name == "cuda":
        if torch.version.cuda is None:
            return "this PyTorch has no CUDA"
        if not torch.cuda.is_available():
            return "PyTorch sees no CUDA device"
    path = library(name)
    if not path.exists():
        tools = "a C++ compiler" if name == "cpu" else "a CUDA compiler (nvcc)"
        return (
            f"fflfast was installed without its {name.upper()} library; with {tools} at hand, "
            "install it again with: pip install --no-build-isolation and the path of its sources"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load: {error}"
    return None


def library(name: str) -> Path:
    """Where the library of a device lies, if it was built."""
    return _FOLDER / f"_{name}.abi3.so"


def table(graph: DistillGraph) -> Tensor:
    """The graph as the flat float64 form that csrc/distill_graph.h reads, made once."""
    return _table(graph.key)  # a string keeps its hash, a graph does not


@lru_cache(maxsize=1024)
def _table(key: str) -> Tensor:
    graph = DistillGraph.from_key(key)
    flat: list[float] = [graph.num_logits, graph.num_mixtures, len(graph.edges), *graph.ce_weights]
    for row in graph.mixtures:
        flat += row
    for edge in graph.edges:
        flat += edge
    return torch.tensor(flat, dtype=torch.float64, device="cpu")


def fits(graph: DistillGraph, device: str, dtype: torch.dtype) -> str | None:
    """None when the graph fits the kernels' table, else the reason why not."""
    return _fits(graph.key, device == "cuda" and dtype == torch.float64)


@lru_cache(maxsize=1024)
def _fits(key: str, wide: bool) -> str | None:
    graph = DistillGraph.from_key(key)
    sizes = (graph.num_logits, graph.num_mixtures, len(graph.edges))
    limits = (*TABLE_LIMITS[:2], 80) if wide else TABLE_LIMITS  # in float64 fewer edges fill a launch's 4 KB
    if all(size <= limit for size, limit in zip(sizes, limits, strict=True)):
        return None
    return "the graph has {} logits tensors, {} mixtures and {} edges; the kernels take at most {}, {} and {}".format(
        *sizes, *limits
    )


@lru_cache(maxsize=1024)
def bits(needs_grad: tuple[bool, ...]) -> int:
    """Booleans as the bits of a number, the first one lowest."""
    return sum(1 << i for i, need in enumerate(needs_grad) if need)


def as_rows(tensor: Tensor) -> Tensor:
    """(..., C) as (R, C) with adjacent classes: the tensor itself or a view of it where its strides allow."""
    if tensor.dim() == 2 and tensor.stride(1) == 1:
        return tensor
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _as_target(target: Tensor | None, like: Tensor) -> Tensor | None:
    """Class indices as (R,) in one piece, probabilities as (R, C) in the dtype that sums are taken in."""
    if target is None:
        return None
    if target.is_floating_point():
        return as_rows(target.to(torch.float64 if like.dtype == torch.float64 else torch.float32))
    return target if target.dim() == 1 and target.is_contiguous() else target.reshape(-1).contiguous()


def distill_loss_functions(
    operators: Callable[[], Any], argument: Callable[[DistillGraph], Any]
) -> dict[str, Callable[..., Any]]:
    """The roles of `fflfast::distill_loss` on top of a backend's private operators.

    Args:
        operators: returns what has distill_loss, distill_loss_backward and scale_gradients; called at each use, as
            a library is loaded late.
        argument: what of a graph these operators take.
    """

    def call(
        logits: Sequence[Tensor], target: Tensor | None, scalars: Scalars, options: Options, gradients: int
    ) -> list[Tensor]:
        graph, smoothing, ignore_index, eps, reduction = options
        rows = [as_rows(z) for z in logits]
        return operators().distill_loss(
            rows, _as_target(target, rows[0]), *scalars, argument(graph), smoothing, ignore_index, eps,
            REDUCTIONS[reduction], gradients,
        )  # fmt: skip

    def forward(
        logits: Sequence[Tensor], target: Tensor | None, scalars: Scalars, options: Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, terms, statistics = call(logits, target, scalars, options, 0)
        return loss.view(logits[0].shape[:-1]) if options[-1] == "none" else loss, terms, statistics

    def forward_with_gradients(
        logits: Sequence[Tensor], target: Tensor | None, scalars: Scalars, options: Options, needs: tuple[bool, ...]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        loss, terms, *gradients = call(logits, target, scalars, options, bits(needs))
        return loss, terms, _shaped(gradients, logits)

    def backward(
        grad_loss: Tensor, logits: Sequence[Tensor], target: Tensor | None, statistics: Tensor, scalars: Scalars,
        options: Options, needs: tuple[bool, ...],
    ) -> list[Tensor]:  # fmt: skip
        graph, smoothing, ignore_index, eps, reduction = options
        rows = [as_rows(z) for z in logits]
        grad_loss = grad_loss.to(statistics.dtype)
        gradients = operators().distill_loss_backward(
            grad_loss.reshape(-1).contiguous() if reduction == "none" else grad_loss,
            rows, _as_target(target, rows[0]), statistics, *scalars, argument(graph), smoothing, ignore_index, eps,
            REDUCTIONS[reduction], bits(needs),
        )  # fmt: skip
        return _shaped(gradients, logits)

    def scale(grad_loss: Tensor, gradients: list[Tensor]) -> None:
        # On the CPU a look costs less than a call; elsewhere it would synchronise, and the kernel looks.
        if not grad_loss.is_cpu or grad_loss.item() != 1.0:
            operators().scale_gradients(grad_loss, gradients)

    return {
        "forward": forward,
        "forward_with_gradients": forward_with_gradients,
        "backward": backward,
        "scale": scale,
    }


def fusion_functions(operators: Callable[[], Any]) -> dict[str, Callable[..., Any]]:
    """The stages of the fusion operator on top of a library's private operators, which take a Norm in pieces."""

    def stage(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            pieces: list[Any] = []
            for argument in arguments:
                pieces += argument if isinstance(argument, Norm) else (argument,)
            return getattr(operators(), name)(*pieces)

        return call

    return {name: stage(f"fusion_{name}") for name in STAGES}


def _shaped(gradients: Sequence[Tensor], logits: Sequence[Tensor]) -> list[Tensor]:
    if logits[0].dim() == 2:
        return list(gradients)
    return [g.view(z.shape) if g.numel() else g for g, z in zip(gradients, logits, strict=True)]


@cache
def operators(namespace: str) -> SimpleNamespace:
    """The private operators of a loaded library; overloads, as looking one up costs more than a small kernel."""
    found = getattr(torch.ops, namespace)
    return SimpleNamespace(
        distill_loss=found.distill_loss.default,
        distill_loss_backward=found.distill_loss_backward.default,
        scale_gradients=found.scale_gradients.default,
    )


@cache
def fusion_operators(namespace: str) -> SimpleNamespace:
    """The private operators of the fusion's stages in a loaded library."""
    found = getattr(torch.ops, namespace)
    return SimpleNamespace(**{f"fusion_{name}": getattr(found, f"fusion_{name}").default for name in STAGES})
