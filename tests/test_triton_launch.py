"""How the Triton kernels are launched: the policy, what is refused, and what a launch compiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from truth import GRAPHS

from fflfast import DistillGraph, kernels

pytest.importorskip("triton")

from fflfast.kernels import launch
from fflfast.kernels.plan import columns

FFL = GRAPHS["ffl2"]


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("graph_size", [1, 3, 7, 8, 9, 20, 21, 96])
@pytest.mark.parametrize("vec", [1, 2, 8])
def test_policy_covers_every_case(size, graph_size, vec):
    for c in (1, 2, 3, 31, 32, 33, 1000, 4096, 4097, 131072, 300_000):
        rows, block, warps = launch.tile(c, size, graph_size, vec)
        assert all(n & (n - 1) == 0 for n in (rows, block, warps))
        assert 2 <= block <= max(2 * c, 2)
        assert rows == 1 or block >= c  # a row in parts has the program for itself
        assert 4 <= warps <= 16


@pytest.mark.parametrize("name", GRAPHS)
def test_statistics_are_where_the_header_says(name):
    graph = GRAPHS[name]
    m, v, e = graph.num_logits, graph.num_mixtures, len(graph.edges)
    assert columns(graph) == (m + v, 2 * (m + v), 2 * (m + v) + m, 2 * (m + v) + m + e)


def test_refuses_what_it_does_not_take():
    assert kernels.refuses("mps", FFL) is not None
    assert kernels.refuses("cuda", DistillGraph.dml(8)) is None
    assert "72 edges" in kernels.refuses("cuda", DistillGraph.dml(9))
    assert "17 logits" in kernels.refuses("cuda", DistillGraph(17, (1.0,) * 17))


# ---- what a launch would compile, without a device and without the interpreter

LAUNCHES = """
import json, sys, torch
import fflfast.kernels
assert "triton" not in sys.modules, "fflfast.kernels imports Triton"
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import driver
from triton.runtime.jit import JITFunction, create_function_from_signature
import triton
from fflfast import DistillGraph
from fflfast.kernels import distill_loss as op

target = GPUTarget("cuda", 90, 32)
backend = make_backend(target)
seen = {}

def run(self, *args, grid, warmup, **kwargs):
    kwargs["debug"] = False
    binder = create_function_from_signature(self.signature, self.params, backend)
    bound, specialization, options = binder(*args, **kwargs)
    key = (self.fn.__name__, str(specialization), str(options))
    if key not in seen:
        seen[key] = (self, self._pack_args(backend, kwargs, bound, specialization, options))

JITFunction.run = run
ffl = DistillGraph.ffl(2)

def loss(rows, classes, t=3.0, kl=0.5, ce=1.0, dtype=torch.bfloat16, pad=0, fast=True):
    z = [torch.randn(rows, classes + pad).to(dtype)[:, :classes] for _ in range(3)]
    y = torch.zeros(rows, dtype=torch.int64)
    s = [torch.tensor(v) for v in (t, kl, ce)]
    if fast:
        _, _, *g = op.distill_loss(z, y, *s, ffl, 0.0, -100, 0.0, 1, 7)
        op.scale_gradients(torch.tensor(2.0), g)
    else:
        _, _, statistics = op.distill_loss(z, y, *s, ffl, 0.0, -100, 0.0, 1, 0)
        op.distill_loss_backward(torch.tensor(1.0), z, y, statistics, *s, ffl, 0.0, -100, 0.0, 1, 7)

counts = []
loss(128, 104)
loss(128, 104, fast=False)
counts.append(len(seen))
for rows in (1, 2, 16, 17, 1000):
    loss(rows, 104)
    loss(rows, 104, fast=False)
for t, kl, ce in ((1.0, 0.0, 1.0), (2.5, 1.0, 0.0)):
    loss(128, 104, t, kl, ce)
loss(128, 104, pad=16)
loss(128, 120)
counts.append(len(seen))
for self, (options, signature, constants, attributes) in list(seen.values()):
    if len(sys.argv) > 1:
        triton.compile(ASTSource(self, signature, constants, attributes), target=target, options=options.__dict__)
print(json.dumps(counts))
"""


def test_a_launch_compiles_and_new_sizes_and_values_do_not_recompile():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    root = str(Path(__file__).resolve().parent.parent)
    result = subprocess.run(
        [sys.executable, "-c", LAUNCHES, "compile"], capture_output=True, text=True, env=environment, cwd=root
    )
    assert result.returncode == 0, result.stderr
    first, after = json.loads(result.stdout)
    assert first == 6  # forward and finish of both forms, backward, scale
    assert after == first
