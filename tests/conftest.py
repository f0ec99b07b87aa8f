"""Shared fixtures."""

from __future__ import annotations

import os

# The tensors here are small: one thread is fastest, and two that must wait for each other on a busy machine are
# slower by orders of magnitude. Set before torch is imported, and for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


@pytest.fixture(params=["eager", "registered"])
def route(request, monkeypatch):
    """Both ways to the operator: the autograd.Function and the registered operator."""
    from fflfast.ops import distill_loss

    if request.param == "registered":
        monkeypatch.setattr(distill_loss, "is_traced", lambda tensor: True)
    return request.param
