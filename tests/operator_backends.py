"""The backends of distill_loss that the tests run through, each forced so that a silent refusal is a failure."""

from __future__ import annotations

import functools
import os

import pytest

from fflfast.ops import backends, distill_loss, native
from fflfast.ops.backends import Implementation

DEVICE = os.environ.get("FFLFAST_TEST_DEVICE", "cpu")
# FFLFAST_TEST_BACKENDS names the backends that must be there; without it those that are not are skipped.
REQUIRED = os.environ.get("FFLFAST_TEST_BACKENDS", "").split()
ALL = ("reference", "cpu", "triton", "emulated") if DEVICE == "cpu" else ("reference", "cuda", "triton")
NAMES = tuple(name for name in ALL if not REQUIRED or name in REQUIRED)


def _implementation(name: str) -> Implementation:
    if name != "emulated":
        if (reason := backends.missing(name)) is not None:
            (pytest.fail if REQUIRED else pytest.skip)(reason)
        return distill_loss.IMPLEMENTATIONS[name]
    return Implementation(native.distill_loss_functions(_emulated, native.table), lambda *case: None)


@functools.lru_cache(maxsize=1)
def _emulated():
    """The CUDA library's operators, its kernels run on the host."""
    import simt_build

    simt_build.load_distill_loss()
    return native.operators("fflfast_emulated")


def use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let distill_loss run through one backend alone, the reference for what has no rows."""
    chosen = _implementation(name)

    def refuses(*case):
        reason = chosen.refuses(*case)
        assert reason is None or not case[0][0].numel(), f"{name} refuses: {reason}"
        return reason if case[0][0].numel() else "there are no rows"

    slot = "cuda" if name == "emulated" else name
    implementations = {slot: Implementation(chosen.functions, refuses)}
    if name != "reference":
        implementations["reference"] = distill_loss.IMPLEMENTATIONS["reference"]
    monkeypatch.setattr(distill_loss, "IMPLEMENTATIONS", implementations)
