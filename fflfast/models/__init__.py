"""Networks as sub-networks: our own for small images, and any of torchvision, timm or the user."""

from __future__ import annotations

from .adapt import AdaptedNetwork, AdaptPlan, adapt
from .base import SubNetwork
from .export import export_fused, export_sub_network, load_exported
from .registry import available, create
from .split import split
from .weights import LoadReport, load_weights

__all__ = [
    "AdaptPlan",
    "AdaptedNetwork",
    "LoadReport",
    "SubNetwork",
    "adapt",
    "available",
    "create",
    "export_fused",
    "export_sub_network",
    "load_exported",
    "load_weights",
    "split",
]
