"""The Triton backend: one module an operator, `kernels.distill_loss`, which imports Triton; this one does not."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..graph import DistillGraph
    from .offline import Case

__all__ = ["available", "interpreted", "offline_cases", "refuses"]


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels on CPU tensors: TRITON_INTERPRET=1 since before Triton's import."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def available() -> str | None:
    """None where the backend can run, else the reason why not."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if interpreted():
        return None
    import torch

    if torch.cuda.is_available() or torch.xpu.is_available():
        return None
    return "there is no GPU (TRITON_INTERPRET=1 runs the kernels on CPU tensors, slowly)"


def refuses(device_type: str, graph: DistillGraph) -> str | None:
    """None where the kernels take logits on such a device with this graph, else the reason in a few words."""
    from . import launch

    if device_type not in ("cuda", "xpu") and not (device_type == "cpu" and interpreted()):
        return f"Triton has no kernels for {device_type} tensors"
    sizes = (graph.num_logits, graph.num_mixtures, len(graph.edges))
    limits = (launch.MAX_LOGITS, launch.MAX_MIXTURES, launch.MAX_EDGES)
    if any(size > limit for size, limit in zip(sizes, limits, strict=True)):
        found = "the graph has {} logits tensors, {} mixtures and {} edges".format(*sizes)
        return found + "; these kernels take at most {}, {} and {}".format(*limits)
    return None


def offline_cases() -> Iterator[Case]:
    """Every variant of every kernel, for a compilation without a device."""
    from .offline import cases

    return cases()
