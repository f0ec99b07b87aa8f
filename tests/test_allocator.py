"""`keep_memory` lets a CPU run keep its pages, and does nothing where there is no glibc."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fflfast.training import allocator

ROOT = Path(__file__).resolve().parent.parent
FAULTS = """
import resource, sys, torch
from fflfast.training.allocator import keep_memory
if sys.argv[1] == "keep":
    assert keep_memory() and keep_memory()
def step():
    kept = [torch.ones(10 << 20) for _ in range(2)]  # 40 MiB each: always mappings of their own by default
    return sum(float(x[-1]) for x in kept)
for _ in range(3):
    assert step() == 2
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    command = [sys.executable, "-c", FAULTS, mode]
    # Thresholds given from outside, or another allocator, would hide the default.
    outside = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(outside)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_used_again_without_page_faults():
    kept, default = faults("keep"), faults("default")
    # 5 steps of 80 MiB are 102,400 pages of 4 KiB, or 200 where the system gives pages of 2 MiB.
    assert default >= 200
    assert kept < default / 10


class Elsewhere:
    """A C library without mallopt."""


@pytest.mark.parametrize("library", ["another", "none"])
def test_elsewhere_it_does_nothing(monkeypatch, library):
    def load(name):
        if library == "none":
            raise TypeError("LoadLibrary() argument 1 must be str, not None")
        return Elsewhere()

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert allocator.keep_memory() is False


class MallOpt:
    """Takes note of what it is asked for, and refuses thresholds above ``most``."""

    def __init__(self, most: int) -> None:
        self.most, self.asked = most, []

    def __call__(self, parameter, value):
        self.asked.append((parameter, value))
        return int(value <= self.most)


@pytest.mark.parametrize(
    ("most", "kept", "asked"),
    [
        (1 << 30, True, [(-3, 1 << 30), (-1, -1), (-2, 64 << 20)]),
        (64 << 20, True, [(-3, 1 << 30), (-3, 32 << 20), (-1, -1), (-2, 64 << 20)]),
        (-2, False, [(-3, 1 << 30), (-3, 32 << 20)]),
    ],
    ids=["all", "small thresholds alone", "nothing"],
)
def test_what_the_c_library_is_asked_for(monkeypatch, most, kept, asked):
    mallopt = MallOpt(most)
    library = SimpleNamespace(gnu_get_libc_version=None, mallopt=mallopt)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert allocator.keep_memory() is kept
    assert mallopt.asked == asked
