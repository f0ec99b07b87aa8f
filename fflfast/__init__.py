"""fflfast: online mutual knowledge distillation for PyTorch.

The operators live here; `fflfast.nn` has them as modules. The rest is imported when first used: `fflfast.cohort`,
`fflfast.methods`, `fflfast.models`, `fflfast.compat`, and `fflfast.data` and `fflfast.training`, which need the
extra [train].
"""

from __future__ import annotations

import importlib
from typing import Any

from . import functional, nn
from .cohort import Cohort, Learner
from .functional import distill_loss, fuse_features, kd_loss, kl_div_with_logits
from .graph import DistillGraph
from .ops.backends import backends, use_backend

__version__ = "0.1.0"
__all__ = [
    "Cohort",
    "DistillGraph",
    "Learner",
    "backends",
    "distill_loss",
    "functional",
    "fuse_features",
    "kd_loss",
    "kl_div_with_logits",
    "nn",
    "use_backend",
]

_LAZY = ("compat", "data", "methods", "models", "tasks", "training")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
