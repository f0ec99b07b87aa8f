"""The backends of both operators that the tests run through, each forced so that a silent refusal is a failure."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping

import pytest
import torch

from fflfast.ops import backends, distill_loss, fuse_features, fusion_backends, fusion_reference, native
from fflfast.ops.backends import Implementation

DEVICE = os.environ.get("FFLFAST_TEST_DEVICE", "cpu")
# FFLFAST_TEST_BACKENDS names the backends that must be there; without it those that are not are skipped.
REQUIRED = os.environ.get("FFLFAST_TEST_BACKENDS", "").split()
ALL = ("reference", "cpu", "triton", "emulated") if DEVICE == "cpu" else ("reference", "cuda", "triton")
NAMES = tuple(name for name in ALL if not REQUIRED or name in REQUIRED)
# The reference's stages taken for kernels: what lies around the stages is tested in float64 with them.
FUSION_NAMES = (*NAMES, "stages")


def _implementation(name: str, implementations: Mapping[str, Implementation], emulated: Mapping) -> Implementation:
    if name != "emulated":
        if (reason := backends.missing(name)) is not None:
            (pytest.fail if REQUIRED else pytest.skip)(reason)
        return implementations[name]
    return Implementation(emulated, lambda *case: None)


@functools.lru_cache(maxsize=1)
def _emulated():
    """The CUDA library's operators, its kernels run on the host."""
    import simt_build

    simt_build.load_distill_loss()
    return native.operators("fflfast_emulated")


@functools.lru_cache(maxsize=1)
def _emulated_fusion():
    import simt_build

    simt_build.load_fuse_features()
    return native.fusion_operators("fflfast_emulated")


def fusion(name: str) -> Implementation:
    """One backend of fuse_features."""
    if name == "stages":
        return Implementation(dict(fusion_reference.STAGES), lambda *case: None)
    return _implementation(name, fusion_backends.IMPLEMENTATIONS, native.fusion_functions(_emulated_fusion))


def use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let distill_loss run through one backend alone, the reference for what has no rows."""
    emulated = native.distill_loss_functions(_emulated, native.table)
    chosen = _implementation(name, distill_loss.IMPLEMENTATIONS, emulated)

    def refuses(*case):
        reason = chosen.refuses(*case)
        assert reason is None or not case[0][0].numel(), f"{name} refuses: {reason}"
        return reason if case[0][0].numel() else "there are no rows"

    _force(name, Implementation(chosen.functions, refuses), distill_loss, monkeypatch)


def use_fusion(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let fuse_features run through one backend alone: the reference for float64 and empty batches, what else the
    backend refuses skips the test."""
    chosen = fusion(name)

    def refuses(features, *weights):
        if not features[0].numel() or (features[0].dtype == torch.float64 and name != "stages"):
            return "a case for the reference"
        if (reason := chosen.refuses(features, *weights)) is not None:
            pytest.skip(f"{name} refuses: {reason}")
        return None

    _force(name, Implementation(chosen.functions, refuses), fusion_backends, monkeypatch)
    if name != "reference":
        monkeypatch.setattr(fuse_features, "has_kernels", lambda kind: name == "stages" or "float64" not in kind)


def _force(name: str, chosen: Implementation, module, monkeypatch: pytest.MonkeyPatch) -> None:
    implementations = {name if name in backends.NAMES else "cuda": chosen}
    if name != "reference":
        implementations["reference"] = module.IMPLEMENTATIONS["reference"]
    monkeypatch.setattr(module, "IMPLEMENTATIONS", implementations)
