"""Shared fixtures."""

from __future__ import annotations

import os

# The tensors here are small: one thread is fastest, and two that must wait for each other on a busy machine are
# slower by orders of magnitude. Set before torch is imported, and for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# FFLFAST_TEST_DEVICE=cuda runs the operators' tests on a GPU; without one, Triton's kernels run under its interpreter,
# which Triton must know when it is imported.
DEVICE = os.environ.get("FFLFAST_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

import operator_backends
import pytest
import torch

if DEVICE != "cpu":
    torch.set_default_device(DEVICE)
    # PyTorch's own convolutions, which ours are held against: in full float32, and the same bits every time.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True


@pytest.fixture(params=["eager", "registered"])
def route(request, monkeypatch):
    """Both ways to the operator: the autograd.Function and the registered operator."""
    from fflfast.ops import distill_loss, fuse_features

    if request.param == "registered":
        for module in (distill_loss, fuse_features):
            monkeypatch.setattr(module, "is_traced", lambda tensor: True)
    return request.param


@pytest.fixture(params=operator_backends.NAMES)
def backend(request, monkeypatch):
    """Every backend that can run here in turn, the CUDA kernels in their emulation; none may refuse a case."""
    operator_backends.use(request.param, monkeypatch)
    return request.param


@pytest.fixture(params=operator_backends.FUSION_NAMES)
def fusion_backend(request, monkeypatch):
    """Every backend of fuse_features that can run here in turn."""
    operator_backends.use_fusion(request.param, monkeypatch)
    return request.param
