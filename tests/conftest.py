"""Shared fixtures."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(2)


@pytest.fixture(params=["eager", "registered"])
def route(request, monkeypatch):
    """Both ways to the operator: the autograd.Function and the registered operator."""
    from fflfast.ops import distill_loss

    if request.param == "registered":
        monkeypatch.setattr(distill_loss, "_is_traced", lambda tensor: True)
    return request.param
