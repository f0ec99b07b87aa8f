"""The instruction sets of the CPU library, one after the other."""

from __future__ import annotations

import pytest
import torch

ISAS = ("baseline", "avx2", "avx512")


def _each(request):
    best, wanted = torch.ops.fflfast_cpu.isa(-1), ISAS.index(request.param)
    if torch.ops.fflfast_cpu.isa(wanted) != wanted:
        torch.ops.fflfast_cpu.isa(best)
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    torch.ops.fflfast_cpu.isa(best)


# Each instruction set that this machine has; a test module takes it over by `isa = cpu_isas.isa`.
isa = pytest.fixture(params=ISAS, name="isa")(_each)
