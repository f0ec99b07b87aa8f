"""Shared fixtures."""

from __future__ import annotations

import os

# The tensors here are small: one thread is fastest, and two that must wait for each other on a busy machine are
# slower by orders of magnitude. Set before torch is imported, and for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# FFLFAST_TEST_DEVICE=cuda runs the tests on a GPU; without it, Triton's kernels run under its interpreter, which Triton
# must know when it is imported.
DEVICE = os.environ.get("FFLFAST_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

import operator_backends
import pytest
import torch

if DEVICE != "cpu":
    # PyTorch's own convolutions, which ours are held against: in full float32, and the same bits every time.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True


def _set_default_device(path):
    """The operators' tests make their tensors on the device; test_gpu_* bring theirs there, as the trainer does."""
    if DEVICE != "cpu":
        torch.set_default_device(None if path.name.startswith("test_gpu_") else DEVICE)


class _FailuresAtOnce:
    """Says what failed when it fails: a GPU is lent for minutes, and a run that is stopped writes no summary."""

    def __init__(self, config):
        self.config = config

    def pytest_runtest_logreport(self, report):
        if report.failed:
            terminal = self.config.pluginmanager.get_plugin("terminalreporter")
            terminal.write_line(f"\n{report.nodeid}, {report.when}:\n{report.longreprtext}")


def pytest_configure(config):
    if DEVICE != "cpu":
        if not hasattr(config, "workerinput"):  # of pytest-xdist, whose workers report to the process that started them
            config.pluginmanager.register(_FailuresAtOnce(config))
        # A package that is missing on a lent machine costs the tests of a file that needs it, and no others.
        config.option.continue_on_collection_errors = True


def pytest_collectstart(collector):
    if isinstance(collector, pytest.Module):  # its import comes next
        _set_default_device(collector.path)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    _set_default_device(item.path)


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
