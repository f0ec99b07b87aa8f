"""Methods of online distillation, one file each, all on one engine."""

from __future__ import annotations

import difflib
import importlib

from .afd import AFD
from .base import Method, MethodOptions
from .cl import CL
from .dml import DML, DMLOptions
from .ffl import FFL, FFLOptions
from .kd import KD
from .kdcl import KDCL
from .mcl_okd import MCL
from .oem import OEM
from .okddip import OKDDip
from .okdhp import OKDHP
from .one import ONE
from .pcl import PCL
from .single import Single

__all__ = [
    "AFD",
    "CL",
    "DML",
    "FFL",
    "KD",
    "KDCL",
    "MCL",
    "OEM",
    "OKDHP",
    "ONE",
    "PCL",
    "DMLOptions",
    "FFLOptions",
    "Method",
    "MethodOptions",
    "OKDDip",
    "Single",
    "available",
    "default",
    "resolve",
]

_METHODS: dict[str, type[Method]] = {
    "ffl": FFL,
    "dml": DML,
    "kd": KD,
    "cl": CL,
    "one": ONE,
    "okddip": OKDDip,
    "kdcl": KDCL,
    "pcl": PCL,
    "oem": OEM,
    "mcl_okd": MCL,
    "afd": AFD,
    "okdhp": OKDHP,
    "single": Single,
}


def available() -> tuple[str, ...]:
    """Short names that `resolve` knows."""
    return tuple(_METHODS)


def default(task: str) -> str:
    """The short name of the method that a run takes which names its task ("classification", "pose") alone.

    Raises:
        ValueError: no method is for that task.
    """
    for name, method in _METHODS.items():
        if method.task == task:
            return name
    tasks = sorted({method.task for method in _METHODS.values()})
    raise ValueError(f"expected one of {', '.join(tasks)}, got {task!r}")


def resolve(name: str) -> type[Method]:
    """The method class of a short name ("ffl") or of an import path ("package.module:Class").

    Raises:
        TypeError: no text.
        ValueError: an unknown name (with the nearest known one), a module or class that cannot be imported, or a
            class that is not a `Method`.
    """
    if not isinstance(name, str):
        raise TypeError(f"expected a method's name or an import path 'package.module:Class', got {name!r}")
    if name in _METHODS:
        return _METHODS[name]
    module_name, separator, class_name = name.partition(":")
    if not (separator and module_name and class_name):
        close = difflib.get_close_matches(name.lower().replace("-", "_"), _METHODS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"expected one of {', '.join(_METHODS)} or an import path 'package.module:Class', got {name!r}{hint}"
        )
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except Exception as error:  # a module may raise whatever it likes when it is imported
        kind = "" if isinstance(error, (ImportError, AttributeError)) else f"{type(error).__name__}: "
        raise ValueError(f"cannot import {name!r}: {kind}{error}") from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ValueError(f"{name!r} must be a subclass of fflfast.methods.Method, got {found!r}")
    return found
