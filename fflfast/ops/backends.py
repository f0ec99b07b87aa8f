"""Which implementation of an operator runs: the registry, the forced choice and the report.

An operator registers each of its implementations under a backend's name. ``auto`` takes the first backend, in
the order of `NAMES`, that is available and takes the case; a forced one that does not take it says why.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from . import native

__all__ = ["NAMES", "Implementation", "backends", "choose", "use_backend"]

NAMES = ("cuda", "cpu", "triton", "reference")
ENVIRONMENT_VARIABLE = "FFLFAST_BACKEND"

# The blocks of use_backend that are open, innermost last. A plain list, because torch.compile traces and guards it
# (a ContextVar it does not), and because autograd's own threads must see it too.
_forced: list[str] = []


@dataclass(frozen=True)
class Implementation:
    """How one backend computes one operator.

    Attributes:
        functions: the callables of the operator by role, e.g. ``{"forward": …, "backward": …}``.
        refuses: called with what the operator was given; returns None when this backend takes the case, else
            the reason in a few words.
    """

    functions: Mapping[str, Callable[..., Any]]
    refuses: Callable[..., str | None]


def missing(name: str) -> str | None:
    """The reason why a backend is not available in this process, or None when it is."""
    if name in ("cpu", "cuda"):
        return native.load(name)
    if name == "triton":
        from .. import kernels  # when first asked for

        return kernels.available()
    return None


def backends() -> dict[str, str]:
    """What is there, by name: ``"available"``, or the reason why a backend is not."""
    return {name: missing(name) or "available" for name in NAMES}


def _checked(name: str, origin: str) -> str:
    if name != "auto" and name not in NAMES:
        raise ValueError(f"{origin}: expected one of {', '.join(('auto', *NAMES))}, got {name!r}")
    return name


def forced_backend() -> str:
    """The backend asked for by `use_backend`, else by the environment variable FFLFAST_BACKEND, else ``auto``."""
    return _forced[-1] if _forced else _checked(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", ENVIRONMENT_VARIABLE)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend inside a ``with`` block: cuda, triton, cpu, reference, or auto for the normal choice.

    The choice holds for all threads of the process; what torch.compile has traced goes by the choice of its call.

    Raises:
        ValueError: an unknown name, or a backend that is not available here (with the reason).
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "use_backend: expected to be entered outside of compiled code, which is traced once and would not see it; "
            "put the with block around the call of the compiled function"
        )
    _checked(name, "use_backend")
    if name != "auto" and (reason := missing(name)) is not None:
        raise ValueError(f"use_backend: {name} is not available: {reason}; fflfast.backends() lists what is")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def choose(operator: str, implementations: Mapping[str, Implementation], *case: Any) -> Implementation:
    """The implementation of `operator` that takes `case`: the forced one, else the first in the order of `NAMES`.

    An operator that has no kernels of the forced backend at all is left to its normal choice.

    Raises:
        ValueError: the forced backend is missing or refuses the case (with the reason).
    """
    name = forced_backend()
    if name != "auto" and (absent := missing(name)) is not None:
        raise ValueError(f"{operator}: the forced backend {name} is not available: {absent}")
    if name in implementations:
        reason = implementations[name].refuses(*case)
        if reason is not None:
            raise ValueError(f"{operator}: the forced backend {name} cannot take this call: {reason}")
        return implementations[name]
    for name in NAMES:
        if name in implementations and implementations[name].refuses(*case) is None:
            return implementations[name]
    raise ValueError(f"{operator}: no backend takes this call; fflfast.backends() lists what is there")
